"""Cross-entropy of a linear classifier of the real codes: the baseline without any hashing.

    mean over samples of  - sum_k t_k log softmax_k(W z + v),   t = y / sum(y)

W (C, K) and v (C,) are learned by the loss. The codes are the signs of z, or with `hhnet train --rotate classes` the
index of the largest class. With several labels the target is spread over them. OrthoHash (Hoe et al. 2021) has this
baseline as "CE".

Shape suffixes: B samples, K bits, C classes.
"""

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn
from torch.nn.functional import linear

from hhnet.nn.losses.base import HashLoss, soft_cross_entropy


class CE(HashLoss):
    """The CE loss; the module gives its equation. It has no options."""

    soft_labels: ClassVar[bool] = True

    def __init__(self, bits: int, classes: int) -> None:
        super().__init__(bits, classes)
        self.classifier = nn.Linear(bits, classes)

    def compute(self, z_BK: Tensor, labels_BC: Tensor, keys: Sequence[str]) -> Tensor:
        """Compute the loss; see `HashLoss.forward`."""
        weight, bias = self.classifier.weight.to(z_BK.dtype), self.classifier.bias.to(z_BK.dtype)
        return soft_cross_entropy(linear(z_BK, weight, bias), labels_BC)
