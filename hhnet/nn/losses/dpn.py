"""DPN: every bit is pushed past a margin, to the side given by the centre of the sample's class.

    mean over samples of  sum over labels k of the sample  sum over bits j of  max(0, m - z_j c_kj)   +   reg * mean z^2

c_k are fixed hash centres. m = 1, reg = 0 (the authors report that 0.001 helps). With several labels the terms of all
are added, as in the authors' code. The authors draw centres at random until they are far enough apart; here they come
from `hhnet.nn.centres.hash_centres`. Source: Fan et al. 2020, kamwoh/DPN `main.py`, `scripts/train_hashing.py`.

Shape suffixes: B samples, K bits, C classes.
"""

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import relu

from hhnet.nn.losses.base import HashLoss, above, at_least, class_centres, masked_mean


class DPN(HashLoss):
    """The DPN loss; the module gives its equation.

    Options: `margin` m; `reg`, the weight of the squared codes; `seed` of the centres.
    """

    centres: Tensor

    def __init__(self, bits: int, classes: int, *, margin: float = 1.0, reg: float = 0.0, seed: int = 0) -> None:
        super().__init__(bits, classes)
        above(0, margin=margin)
        at_least(0, reg=reg)
        self.margin, self.reg = margin, reg
        self.register_buffer("centres", class_centres(classes, bits, seed))

    def compute(self, z_BK: Tensor, labels_BC: Tensor, keys: Sequence[str]) -> Tensor:
        """Compute the loss; see `HashLoss.forward`."""
        # How many of the sample's centres have a bit at 1, and at -1.
        up_BK = labels_BC @ (self.centres > 0).to(z_BK.dtype)
        down_BK = labels_BC @ (self.centres < 0).to(z_BK.dtype)
        polarised_B = (up_BK * relu(self.margin - z_BK) + down_BK * relu(self.margin + z_BK)).sum(1)
        labelled_B = (labels_BC.sum(1) > 0).to(z_BK.dtype)
        return masked_mean(polarised_B, labelled_B) + self.reg * z_BK.square().mean()
