"""DPSH: likelihood of the pairwise similarities, and a quantisation term.

    mean over pairs i < j of  softplus(theta) - s theta   +   eta * mean (z - b)^2

theta = <z_i, z_j> / 2, s = 1 where the two share a label, b the sign of z. eta = 0.1 as in the PyTorch port,
where the term is a mean over the entries. The originals compare the batch with a memory of the training set;
here the pairs are those of the gathered global batch. Source: Li et al. 2016, jiangqy/DPSH-pytorch
`DPSH_CIFAR_10.py`; swuxyj/DeepHash-pytorch `DPSH.py`.

Shape suffixes: B samples, K bits, C classes.
"""

from collections.abc import Sequence

from torch import Tensor

from hhnet.nn.losses.base import HashLoss, at_least, binary, pair_likelihood


class DPSH(HashLoss):
    """The DPSH loss; the module gives its equation. Option: `eta`, the weight of the quantisation term."""

    def __init__(self, bits: int, classes: int, *, eta: float = 0.1) -> None:
        super().__init__(bits, classes)
        at_least(0, eta=eta)
        self.eta = eta

    def compute(self, z_BK: Tensor, labels_BC: Tensor, keys: Sequence[str]) -> Tensor:
        """Compute the loss; see `HashLoss.forward`."""
        return pair_likelihood(z_BK, labels_BC) + self.eta * (z_BK - binary(z_BK)).square().mean()
