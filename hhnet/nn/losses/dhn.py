"""DHN: likelihood of the pairwise similarities, and a smooth quantisation term.

    mean over pairs i < j of  softplus(theta) - s theta   +   lam * mean log cosh(|z| - 1)

theta = <z_i, z_j> / 2, s = 1 where the two share a label. lam = 0.1. Public code differs: BioDeepHashing has
log cosh |z| - 1, which pulls codes to 0, and <z_i, z_j> instead of its half; swuxyj/DeepHash-pytorch has | |z| - 1 |,
a form of log cosh that is not smooth. Source: Zhu et al. 2016, thulab/DeepHash `model/dhn/dhn.py`;
swuxyj/DeepHash-pytorch `DHN.py`.

Shape suffixes: B samples, K bits, C classes.
"""

import math
from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import softplus

from hhnet.nn.losses.base import HashLoss, at_least, pair_likelihood


class DHN(HashLoss):
    """The DHN loss; the module gives its equation. Option: `lam`, the weight of the quantisation term."""

    def __init__(self, bits: int, classes: int, *, lam: float = 0.1) -> None:
        super().__init__(bits, classes)
        at_least(0, lam=lam)
        self.lam = lam

    def compute(self, z_BK: Tensor, labels_BC: Tensor, keys: Sequence[str]) -> Tensor:
        """Compute the loss; see `HashLoss.forward`."""
        off_BK = z_BK.abs() - 1
        # log cosh x = x + softplus(-2 x) - log 2; cosh itself would overflow for large x.
        return pair_likelihood(z_BK, labels_BC) + self.lam * (off_BK + softplus(-2 * off_BK) - math.log(2)).mean()
