"""GreedyHash: a linear classifier of the codes themselves; its gradient passes through the sign unchanged.

    mean over samples of  - sum_k t_k log softmax_k(W b)   +   alpha * mean | |z| - 1 |^3,   t = y / sum(y)

b is the sign of z; the derivative of b by z is taken as 1. W (C, K), without bias, is learned by the loss.
alpha = 0.1 (CIFAR; 1 for ImageNet). With several labels the target is spread over them, as in OrthoHash. Public code
differs: swuxyj/DeepHash-pytorch takes the first label of several (issue 40), and torch.sign leaves 0 as a third value,
which is -1 here. Source: Su et al. 2018, ssppp/GreedyHash `cifar1.py`, `imagenet.py`.

Shape suffixes: B samples, K bits, C classes.
"""

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn
from torch.nn.functional import linear

from hhnet.nn.losses.base import HashLoss, at_least, binary, soft_cross_entropy


class GreedyHash(HashLoss):
    """The GreedyHash loss; the module gives its equation. Option: `alpha`, the weight of the cubic penalty."""

    soft_labels: ClassVar[bool] = True

    def __init__(self, bits: int, classes: int, *, alpha: float = 0.1) -> None:
        super().__init__(bits, classes)
        at_least(0, alpha=alpha)
        self.alpha = alpha
        self.classifier = nn.Linear(bits, classes, bias=False)

    def compute(self, z_BK: Tensor, labels_BC: Tensor, keys: Sequence[str]) -> Tensor:
        """Compute the loss; see `HashLoss.forward`."""
        # z - z.detach() is 0 with the gradient of z: b stays exactly -1 or 1.
        b_BK = binary(z_BK) + (z_BK - z_BK.detach())
        cross_entropy = soft_cross_entropy(linear(b_BK, self.classifier.weight.to(z_BK.dtype)), labels_BC)
        penalty = (z_BK.abs() - 1).abs().pow(3).mean()
        return cross_entropy + self.alpha * penalty
