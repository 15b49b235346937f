"""Batches for losses, plain formulas of what they have in common, and the comparison of a loss with its formula."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from hhnet.nn.losses import make_loss

BITS, CLASSES = 16, 5
KINDS = ("single", "multi", "alike", "apart", "unlabelled")

Array = npt.NDArray[Any]
Formula = Callable[[Any, Array, Array], float]


def batch(kind: str, size: int = 12, seed: int = 0, views: int = 1) -> tuple[Tensor, Tensor, list[str]]:
    """Codes float64 (size * views, BITS), labels bool and keys; the views of a sample side by side.

    single = one label each; multi = several, and none for the first two; alike = all share a label; apart = nobody
    shares one, at most CLASSES samples; unlabelled = none has any.
    """
    rng = np.random.default_rng(seed)
    size = min(size, CLASSES) if kind == "apart" else size
    z = rng.normal(size=(size * views, BITS))
    if kind == "single":
        labels = np.eye(CLASSES, dtype=bool)[rng.integers(0, CLASSES, size)]
    elif kind == "multi":
        labels = rng.random((size, CLASSES)) < 0.35
        labels[:2] = False
        labels[2], labels[3] = [1, 1, 0, 0, 0], [0, 0, 1, 1, 0]  # two multi-label samples with nothing in common
        z[3 * views] = 0.8 * z[2 * views] + 0.2 * z[3 * views]  # ... and yet near
    elif kind == "alike":
        labels = rng.random((size, CLASSES)) < 0.35
        labels[:, 0] = True
    else:
        labels = np.eye(CLASSES, dtype=bool)[np.arange(size) % CLASSES] & (kind == "apart")
    keys = [f"k{place}" for place in range(size) for _ in range(views)]
    return torch.from_numpy(z), torch.from_numpy(labels.repeat(views, 0)), keys


def softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0


def cosine(a: Array, b: Array) -> float:
    return float(a @ b / math.sqrt(a @ a) / math.sqrt(b @ b))


def sign(x: float) -> int:
    return 1 if x > 0 else -1


def pairs(y: Array) -> list[tuple[int, int, bool]]:
    """Labelled pairs i < j and whether they share a label."""
    known = [i for i in range(len(y)) if y[i].any()]
    return [(i, j, bool((y[i] & y[j]).any())) for i in known for j in known if i < j]


def likelihood(z: Array, y: Array) -> float:
    """The pairwise likelihood of DPSH and DHN."""
    return mean([softplus(z[i] @ z[j] / 2) - same * (z[i] @ z[j] / 2) for i, j, same in pairs(y)])


def softmax_entropy(logits: list[float], labels: Array) -> float:
    """Cross-entropy of softmax(logits) and the labels, each of which counts alike."""
    norm = math.log(math.fsum(math.exp(value) for value in logits))
    return -math.fsum(logits[k] - norm for k in range(len(logits)) if labels[k]) / int(labels.sum())


def slopes(function: Callable[[], float], values: Array, step: float = 1e-5) -> Array:
    """Derivatives of `function` by each of `values`, which it reads, by central differences."""
    result = np.empty_like(values)
    for place in np.ndindex(*values.shape):
        kept, ends = values[place], []
        for side in (step, -step):
            values[place] = kept + side
            ends.append(function())
        values[place] = kept
        result[place] = (ends[0] - ends[1]) / (2 * step)
    return result


def check_formula(
    name: str,
    formula: Formula,
    *,
    smooth: Callable[[Array], Formula] | None = None,
    **options: Any,
) -> None:
    """Value and gradients of a loss against `formula`, in float64, to 1e-6.

    `smooth` makes of the codes where the gradient is wanted a formula whose derivative is meant, where that is not
    the derivative of the value. With options only batches of several labels are compared.
    """
    for kind in ("multi",) if options else KINDS:
        torch.manual_seed(0)
        loss = make_loss(name, BITS, CLASSES, **options).double().eval()
        z, labels, keys = batch(kind, size=6, views=loss.views)
        codes, y = z.numpy().copy(), labels.numpy()
        expected = formula(loss, codes, y)
        for form in (labels, labels.float(), labels.long()):
            assert loss(z, form, keys).item() == pytest.approx(expected, rel=1e-6, abs=1e-12), kind
        loss(z.requires_grad_(), labels, keys).backward()
        _check_slopes(loss, z, codes, y, smooth(codes.copy()) if smooth else formula)


def _check_slopes(loss: Any, z: Tensor, codes: Array, y: Array, formula: Formula) -> None:
    """Compare the gradients of the codes and of what the loss learns."""
    for tensor, values in ((z, codes), *((parameter, parameter.detach().numpy()) for parameter in loss.parameters())):
        expected = slopes(lambda: formula(loss, codes, y), values)
        assert tensor.grad is not None
        close = 1e-6 * max(float(np.abs(expected).max()), 1e-3)
        np.testing.assert_allclose(tensor.grad.numpy(), expected, rtol=1e-6, atol=close)
