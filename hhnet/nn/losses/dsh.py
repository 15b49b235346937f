"""DSH: squared distances, small where a label is shared, and beyond a margin where none is.

    mean over pairs i < j of  s D / 2 + (1 - s) max(0, m - D) / 2   +   alpha * mean | |z| - 1 |

D = ||z_i - z_j||^2, s = 1 where the two share a label. m = 2 K, alpha = 0.01; the PyTorch port takes 0.1. Other public
code differs: BioDeepHashing has 1 - |z| without the outer absolute value, which pulls long codes further out;
the port has |1 - sign z|, which has no gradient and wants every bit to be 1. Source: Liu et al. 2016,
lhmRyan/deep-supervised-hashing-DSH `CIFAR-10/train_test.prototxt`, issue 14; swuxyj/DeepHash-pytorch `DSH.py`.

Shape suffixes: B samples, K bits, C classes.
"""

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import relu

from hhnet.nn.losses.base import HashLoss, above, at_least, masked_mean, similarity


class DSH(HashLoss):
    """The DSH loss; the module gives its equation.

    Options: `margin` m, None for 2 K; `alpha`, the weight of the quantisation term.
    """

    def __init__(self, bits: int, classes: int, *, margin: float | None = None, alpha: float = 0.01) -> None:
        super().__init__(bits, classes)
        self.margin, self.alpha = 2 * bits if margin is None else margin, alpha
        above(0, margin=self.margin)
        at_least(0, alpha=alpha)

    def compute(self, z_BK: Tensor, labels_BC: Tensor, keys: Sequence[str]) -> Tensor:
        """Compute the loss; see `HashLoss.forward`."""
        similar_BB, pairs_BB = similarity(labels_BC)
        squared_B = z_BK.square().sum(1)
        distance_BB = (squared_B[:, None] + squared_B - 2 * z_BK @ z_BK.T).clamp(min=0)
        apart_BB = relu(self.margin - distance_BB)
        contrast = masked_mean((similar_BB * distance_BB + (1 - similar_BB) * apart_BB) / 2, pairs_BB)
        return contrast + self.alpha * (z_BK.abs() - 1).abs().mean()
