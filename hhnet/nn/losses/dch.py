"""DCH: a Cauchy distribution of the distance, which bends codes of similar samples into a small Hamming ball.

    mean over pairs i < j of  w (s log(d / g) + log(1 + g / d))   +   lam * mean log(1 + d(|z|, 1) / g)

d(x, y) = K (1 - cos(x, y)) / 2, for a pair of its two codes and for the quantisation term of |z| and a vector of
ones; s = 1 where the two share a label; w = N / N+ for such pairs and N / N- for the others, as in HashNet.
g = 20, lam = 0.1 (the authors' TensorFlow code takes g = 30 for the paper and 0 for lam). Distances below 1e-5
bits count as 1e-5, since the logarithm of 0 is infinite. Public code differs: swuxyj/DeepHash-pytorch cuts the cosine
at 0.99, so pairs nearer than K / 200 bits have no gradient, and counts each sample as a pair with itself;
BioDeepHashing weighs all pairs alike. Source: Cao et al. 2018, thulab/DeepHash `model/dch/dch.py`, issue 38;
swuxyj/DeepHash-pytorch `DCH.py`.

Shape suffixes: B samples, K bits, C classes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from hhnet.nn.losses.base import HashLoss, above, at_least, masked_mean, similarity

_MIN_DISTANCE_BITS = 1e-5  # bits; shorter distances count as this


class DCH(HashLoss):
    """The DCH loss; the module gives its equation.

    Options: `gamma` g, the scale of the distribution in bits; `lam`, the quantisation's weight.
    """

    def __init__(self, bits: int, classes: int, *, gamma: float = 20.0, lam: float = 0.1) -> None:
        super().__init__(bits, classes)
        above(0, gamma=gamma)
        at_least(0, lam=lam)
        self.gamma, self.lam = gamma, lam

    def compute(self, z_BK: Tensor, labels_BC: Tensor, keys: Sequence[str]) -> Tensor:
        """Compute the loss; see `HashLoss.forward`."""
        similar_BB, pairs_BB = similarity(labels_BC)
        unit_BK = normalize(z_BK)
        distance_BB = (self.bits / 2 * (1 - unit_BK @ unit_BK.T)).clamp(min=_MIN_DISTANCE_BITS)
        similar = masked_mean(torch.log1p(distance_BB / self.gamma), pairs_BB * similar_BB)
        apart = masked_mean(torch.log1p(self.gamma / distance_BB), pairs_BB * (1 - similar_BB))
        cos_B = unit_BK.abs().mean(1) * self.bits**0.5  # with a vector of ones
        return similar + apart + self.lam * torch.log1p(self.bits / 2 * (1 - cos_B) / self.gamma).mean()
