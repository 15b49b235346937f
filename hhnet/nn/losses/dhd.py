"""DHD: a softmax over learned proxies on the weaker of two views, and a term that pulls the stronger one to it.

    mean over samples of  - sum_k t_k log softmax_k(cos(u, p_k) / tau),   t = y / sum(y)
    + distil * mean over samples of  1 - cos(v, u)   without gradient to u
    + lam * mean  (|u| - 1)^2 / (2 std^2) - log(1 - exp(-(|u| + 1)^2 / (2 std^2)))

u = tanh z of the weakly and v of the strongly augmented image of a sample; the last line is the cross-entropy of
each bit under two Gaussians, at 1 and at -1. tau = 0.2, distil = lam = 0.1, std = 0.5. Meant for the head Linear
and layer normalisation; proxies p_k start from a Xavier uniform for tanh and learn at the head's rate. The authors'
code differs: it divides the labels in place, so a sample without any makes the loss NaN. Source: Jang et al. 2022,
youngkyunJang/Deep-Hash-Distillation `main_DHD.py`, `loss.py`, `models.py`.

Shape suffixes: B rows, two for each sample, S samples, K bits, C classes.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, normalize

from hhnet.nn.losses.base import HashLoss, above, at_least, soft_cross_entropy


class DHD(HashLoss):
    """The DHD loss; the module gives its equation.

    Options: `tau`, the temperature; `distil` and `lam`, the weights of the second and the third term; `std` of the
    Gaussians.
    """

    default_head: ClassVar[str] = "ln"
    views: ClassVar[int] = 2
    soft_labels: ClassVar[bool] = True

    def __init__(
        self, bits: int, classes: int, *, tau: float = 0.2, distil: float = 0.1, lam: float = 0.1, std: float = 0.5
    ) -> None:
        super().__init__(bits, classes)
        above(0, tau=tau, std=std)
        at_least(0, distil=distil, lam=lam)
        self.tau, self.distil, self.lam, self.std = tau, distil, lam, std
        self.proxies = nn.Parameter(torch.empty(classes, bits))
        nn.init.xavier_uniform_(self.proxies, gain=nn.init.calculate_gain("tanh"))

    def compute(self, z_BK: Tensor, labels_BC: Tensor, keys: Sequence[str]) -> Tensor:
        """Compute the loss; see `HashLoss.forward`."""
        u_SK, v_SK = torch.tanh(z_BK[::2]), torch.tanh(z_BK[1::2])
        distillation = (1 - cosine_similarity(v_SK, u_SK.detach())).mean()
        return self._classes(u_SK, labels_BC[::2]) + self.distil * distillation + self.lam * self._bits(u_SK)

    def _classes(self, u_SK: Tensor, labels_SC: Tensor) -> Tensor:
        cos_SC = normalize(u_SK) @ normalize(self.proxies.to(u_SK.dtype)).T
        return soft_cross_entropy(cos_SC / self.tau, labels_SC)

    def _bits(self, u_SK: Tensor) -> Tensor:
        own_SK, other_SK = ((u_SK.abs() + shift).square() / (2 * self.std**2) for shift in (-1, 1))
        return (own_SK - torch.log(-torch.expm1(-other_SK))).mean()
