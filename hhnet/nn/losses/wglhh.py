"""WGLHH: similarities as a Gaussian of the Hamming distance, with more weight on pairs that are far off.

    mean over pairs i < j of  (1 + positive s) w (p log(t p / ((t - 1) p + s)) + s log(t s / ((t - 1) s + p)))
    + gamma * mean over samples of  ||b - z||^2

p = exp(-a d^2), d = K (1 - cos(z_i, z_j)) / 2, w = exp(|(1 + cos(z_i, z_j)) / 2 - s|), s = 1 where the two share a
label, b the sign of z, and 0 log 0 = 0. a = 0.1, t = 2, gamma = 0.001; positive = 0.7 as the authors take for 64
bits on COCO (0.1 for fewer than 32, else 0.6; 70 for ImageNet). The authors add constants inside the logarithms
where p or s is 0; here log p = -a d^2. Source: Tu et al. 2021, rongchengtu1/WGLHH `WGLHH.py`.

Shape suffixes: B samples, K bits, C classes.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from hhnet.nn.losses.base import HashLoss, above, at_least, binary, masked_mean, similarity


class WGLHH(HashLoss):
    """The WGLHH loss; the module gives its equation.

    Options: `alpha` a and `theta` t of the divergence; `gamma`, the weight of the quantisation term; `positive`,
    the further weight of similar pairs.
    """

    def __init__(
        self,
        bits: int,
        classes: int,
        *,
        alpha: float = 0.1,
        theta: float = 2.0,
        gamma: float = 0.001,
        positive: float = 0.7,
    ) -> None:
        super().__init__(bits, classes)
        above(0, alpha=alpha)
        above(1, theta=theta)
        at_least(0, gamma=gamma, positive=positive)
        self.alpha, self.theta, self.gamma, self.positive = alpha, theta, gamma, positive

    def compute(self, z_BK: Tensor, labels_BC: Tensor, keys: Sequence[str]) -> Tensor:
        """Compute the loss; see `HashLoss.forward`."""
        similar_BB, pairs_BB = similarity(labels_BC)
        unit_BK = normalize(z_BK)
        cos_BB = unit_BK @ unit_BK.T
        weight_BB = (1 + self.positive * similar_BB) * torch.exp(((1 + cos_BB) / 2 - similar_BB).abs())
        divergence = masked_mean(weight_BB * self._divergence(cos_BB, similar_BB), pairs_BB)
        return divergence + self.gamma * (z_BK - binary(z_BK)).square().sum(1).mean()

    def _divergence(self, cos_BB: Tensor, similar_BB: Tensor) -> Tensor:
        """Return the sum of the two logarithmic terms, for s = 1 and for s = 0; at s = 0 the second term is 0."""
        x_BB = self.alpha * (self.bits / 2 * (1 - cos_BB)).square()
        p_BB, log_t = torch.exp(-x_BB), math.log(self.theta)
        same_BB = (
            p_BB * (log_t - x_BB - torch.log1p((self.theta - 1) * p_BB)) + log_t - torch.log(self.theta - 1 + p_BB)
        )
        return torch.where(similar_BB > 0, same_BB, p_BB * (log_t - math.log(self.theta - 1)))
