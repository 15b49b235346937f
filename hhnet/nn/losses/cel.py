"""CEL: the cosine embedding loss, with the margin that codes of this length allow.

    mean over pairs i < j of  s (1 - cos(z_i, z_j)) + (1 - s) max(0, cos(z_i, z_j) - zeta)

s = 1 where the two share a label; zeta comes from the best known binary linear code, see `hhnet.nn.centres.margin`.
It has no quantisation term. Source: torch's CosineEmbeddingLoss; Lucas-Schwengber/h2q `src/utils/losses.py`.

Shape suffixes: B samples, K bits, C classes.
"""

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import normalize, relu

from hhnet.nn.losses.base import HashLoss, class_margin, masked_mean, similarity


class CEL(HashLoss):
    """The CEL loss; the module gives its equation. Option: `zeta`, None for the code bound."""

    def __init__(self, bits: int, classes: int, *, zeta: float | None = None) -> None:
        super().__init__(bits, classes)
        self.zeta = class_margin(bits, classes, zeta)

    def compute(self, z_BK: Tensor, labels_BC: Tensor, keys: Sequence[str]) -> Tensor:
        """Compute the loss; see `HashLoss.forward`."""
        similar_BB, pairs_BB = similarity(labels_BC)
        unit_BK = normalize(z_BK)
        cos_BB = unit_BK @ unit_BK.T
        return masked_mean(similar_BB * (1 - cos_BB) + (1 - similar_BB) * relu(cos_BB - self.zeta), pairs_BB)
