"""The base class of all losses, and functions that several of them use.

Shape suffixes: B samples of the global batch, K bits, C classes.
"""

import math
import warnings
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from hhnet.nn.centres import hash_centres, margin


class HashLoss(nn.Module):
    """A training loss over real codes.

    A loss may own parameters (proxies) and buffers (centres, a step counter). They belong in checkpoints, not in the
    model. Subclasses implement `compute`; `forward` has checked its inputs and made them at least float32.

    A sample without labels takes no part in the supervised terms. A batch where nothing can be compared has loss 0
    with zero gradients.

    Attributes:
        default_head: the head of `HHNet` this loss is meant for.
        lr_scale: learning rate of the loss's own parameters, relative to that of the model's head.
        views: augmented images of each sample that the loss compares. Their rows stand side by side, with equal
            labels and keys: with 2 views rows 2i, weakly augmented, and 2i + 1, strongly, are of one sample.
        soft_labels: labels may lie between 0 and 1, as mixup and label smoothing make them.
        bits, classes: K and C.
    """

    default_head: ClassVar[str] = "linear"
    lr_scale: ClassVar[float] = 1.0
    views: ClassVar[int] = 1
    soft_labels: ClassVar[bool] = False

    def __init__(self, bits: int, classes: int) -> None:
        super().__init__()
        if bits < 1 or classes < 1:
            raise ValueError(f"a loss needs at least 1 bit and 1 class: got bits={bits}, classes={classes}")
        if (message := code_shortage_warning(bits, classes)) is not None:
            warnings.warn(message, stacklevel=4)  # where make_loss is called
        self.bits, self.classes = bits, classes

    def forward(self, z_BK: Tensor, labels_BC: Tensor, keys: Sequence[str]) -> Tensor:
        """Compute the loss of one batch.

        Args:
            z_BK: real codes (B, K), any float dtype; in training the batch gathered from all workers, where
                gradients flow to the local part.
            labels_BC: multi-hot (B, C), bool or 0/1, or between where `soft_labels`.
            keys: the samples' keys, for losses that remember samples.

        Returns:
            A scalar, float32 (float64 for float64 codes).

        Raises:
            ValueError: if shapes do not fit each other, `bits` or `classes`, or rows are no views of one sample.
        """
        if z_BK.ndim != 2 or z_BK.shape[1] != self.bits:
            raise ValueError(f"codes must have shape (B, {self.bits}): got {tuple(z_BK.shape)}")
        if tuple(labels_BC.shape) != (len(z_BK), self.classes):
            raise ValueError(f"labels must be multi-hot ({len(z_BK)}, {self.classes}): got {tuple(labels_BC.shape)}")
        if len(keys) != len(z_BK):
            raise ValueError(f"there must be one key per sample: got {len(keys)} for {len(z_BK)}")
        if any(list(keys[view :: self.views]) != list(keys[:: self.views]) for view in range(1, self.views)):
            raise ValueError(f"rows must be {self.views} views of each sample, side by side")
        dtype = torch.promote_types(z_BK.dtype, torch.float32)  # half precision loses the small terms
        with torch.autocast(z_BK.device.type, enabled=False):  # or its matrix products would go back to half
            return self.compute(z_BK.to(dtype), labels_BC.to(dtype), keys)

    def compute(self, z_BK: Tensor, labels_BC: Tensor, keys: Sequence[str]) -> Tensor:
        """Compute the loss of checked inputs; see `forward`."""
        raise NotImplementedError


def code_shortage_warning(bits: int, classes: int) -> str | None:
    """Return a warning where there are more `classes` than codes of `bits`, else None."""
    if classes <= 2**bits:
        return None
    return f"{bits} bits tell at most {2**bits} classes apart: some of {classes} must share a code; use more bits"


def binary(z: Tensor) -> Tensor:
    """Return -1 or +1 for each output, as in the codes: exactly 0 becomes -1. No gradient flows through."""
    return torch.where(z.detach() > 0, 1.0, -1.0).to(z.dtype)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of `values` where `mask`, a 0/1 tensor of the same shape, is 1; 0 where the mask is empty."""
    return (values * mask).sum() / mask.sum().clamp(min=1)


def soft_cross_entropy(logits_BC: Tensor, labels_BC: Tensor) -> Tensor:
    """Return the mean over labelled samples of -sum_k t_k log softmax_k(logits), where t = y / sum(y)."""
    counts_B = labels_BC.sum(1)
    cross_entropy_B = -(labels_BC * torch.log_softmax(logits_BC, dim=1)).sum(1) / counts_B.clamp(min=1)
    return masked_mean(cross_entropy_B, (counts_B > 0).to(logits_BC.dtype))


def pair_likelihood(z_BK: Tensor, labels_BC: Tensor) -> Tensor:
    """Return the mean over pairs of log(1 + e^theta) - s theta, theta = half the inner product of two real codes."""
    similar_BB, pairs_BB = similarity(labels_BC)
    theta_BB = z_BK @ z_BK.T / 2
    return masked_mean(softplus(theta_BB) - similar_BB * theta_BB, pairs_BB)


def similarity(labels_BC: Tensor) -> tuple[Tensor, Tensor]:
    """Return two 0/1 tensors (B, B): pairs that share a label, and pairs i < j with labels on both sides."""
    similar_BB = (labels_BC @ labels_BC.T > 0).to(labels_BC.dtype)
    labelled_B = (labels_BC.sum(1) > 0).to(labels_BC.dtype)
    return similar_BB, torch.outer(labelled_B, labelled_B).triu(1)


def class_centres(classes: int, bits: int, seed: int, *, orthogonal: bool = False) -> Tensor:
    """Return the codes of `hash_centres` as float (C, K) of +-1; with more classes than codes, the codes repeat."""
    codes = torch.from_numpy(hash_centres(min(classes, 2**bits), bits, seed, orthogonal=orthogonal)).float()
    return codes[torch.arange(classes) % len(codes)]


def class_margin(bits: int, classes: int, zeta: float | None) -> float:
    """Return zeta, a cosine, by default that of `hhnet.nn.centres.margin` for at most as many classes as codes."""
    zeta = margin(bits, min(classes, 2**bits)) if zeta is None else zeta
    between(-1, 1, zeta=zeta)
    return zeta


def at_least(least: float, **options: float) -> None:
    """Raise ValueError naming the first option that is not a finite number from `least` on."""
    for name, value in options.items():
        if not least <= value < math.inf:
            raise ValueError(f"{name} must be a number of at least {least:g}: got {value}")


def above(limit: float, **options: float) -> None:
    """Raise ValueError naming the first option that is not a finite number above `limit`."""
    for name, value in options.items():
        if not limit < value < math.inf:
            raise ValueError(f"{name} must be a number above {limit:g}: got {value}")


def between(low: float, high: float, **options: float) -> None:
    """Raise ValueError naming the first option that is not within `low` and `high`."""
    for name, value in options.items():
        if not low <= value <= high:
            raise ValueError(f"{name} must be a number from {low:g} to {high:g}: got {value}")
