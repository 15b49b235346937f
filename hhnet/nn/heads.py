"""Hash layers: the last layer of a network, from features to real codes.

Shape suffixes: B images, D features, K bits, C classes.
"""

import torch
from torch import Tensor, nn

__all__ = ["DERIVED_HEADS", "HEADS", "ClassIndex", "class_bits", "make_head"]

HEADS = ("linear", "bn", "ln")
"""The hash layers that a network can be trained with."""
DERIVED_HEADS = ("ln_rotated", "class_index")
"""The hash layers that only `hhnet.nn.rehead` makes, from a trained network."""


def class_bits(classes: int) -> int:
    """Return ceil(log2 C), the number of bits of a class index; at least 1."""
    return max(1, (classes - 1).bit_length())


def make_head(head: str, feature_dim: int, bits: int, classes: int = 0) -> nn.Module:
    """Make the layer (B, D) -> (B, K) named `head`, with fresh weights: N(0, 0.01), zero bias.

    "linear"; "bn" = Linear without bias, then BatchNorm1d (OrthoHash); "ln" = Linear, then LayerNorm; "ln_rotated" =
    the same, then a Linear (K, K) without bias; "class_index" = Linear (D, C), then `ClassIndex`.
    """
    width = classes if head == "class_index" else bits
    linear = nn.Linear(feature_dim, width, bias=head != "bn")  # batch normalisation brings its own shift
    nn.init.normal_(linear.weight, std=0.01)
    if head != "bn":
        nn.init.zeros_(linear.bias)
    if head == "linear":
        return linear
    if head == "class_index":
        return nn.Sequential(linear, ClassIndex(classes))
    if head == "bn":
        return nn.Sequential(linear, nn.BatchNorm1d(bits))
    turn = [nn.Linear(bits, bits, bias=False)] if head == "ln_rotated" else []
    return nn.Sequential(linear, nn.LayerNorm(bits), *turn)


class ClassIndex(nn.Module):
    """A layer from class logits (B, C) to real codes (B, K); their signs are the bits of the likeliest class's index.

    Output j is the largest logit of the classes whose index has bit j, minus the largest of the others. K =
    `class_bits(C)`.
    """

    has_bit: Tensor
    """bool (C, K): whether the index of a class has a bit."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        places = torch.arange(class_bits(classes))
        has_bit_CK = (torch.arange(classes)[:, None] >> places & 1).bool()
        self.register_buffer("has_bit", has_bit_CK, persistent=False)

    def forward(self, logits_BC: Tensor) -> Tensor:
        """Map class logits (B, C) to real codes (B, K)."""
        logits_BC1, low = logits_BC.unsqueeze(2), torch.finfo(logits_BC.dtype).min
        with_BK = logits_BC1.masked_fill(~self.has_bit, low).amax(1)
        without_BK = logits_BC1.masked_fill(self.has_bit, low).amax(1)
        return with_BK - without_BK
