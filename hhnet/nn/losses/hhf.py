"""HHF: the proxy-anchor loss, with a hinge at the margin that codes of this length can reach.

    sum over classes k of  log(1 + sum over i with y_ik = 1 of  exp(a max(0, 1 - delta - cos(z_i, p_k))) - 1) / C+
    + sum over classes k of  log(1 + sum over i with y_ik = 0 of  exp(a max(0, cos(z_i, p_k) - zeta - delta)) - 1) / C
    + beta * sum over samples of  ||b - z||^2

p_k are learned proxies, C+ counts the classes in the batch, b is the sign of z, and zeta comes from the best known
binary linear code, see `hhnet.nn.centres.margin`. a = 16 (32 for COCO), delta = 0.2, beta = 0.001. As in the authors'
code the last term is a sum, meant for batches of 85: its weight grows with the batch. Proxies start from a Kaiming
normal and learn at 10 times the rate of the network. The hinge suits other metric losses too; proxy-anchor is the
default of the authors' code. Several labels are several positives. Source: Xu et al. 2022, JerryXu0129/HHF `model.py`,
`config.py`, issue 4.

Shape suffixes: B samples, K bits, C classes.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, relu

from hhnet.nn.losses.base import HashLoss, at_least, between, binary, class_margin


class HHF(HashLoss):
    """The HHF loss; the module gives its equation.

    Options: `alpha` a, at most 40, where the exponential would come near the end of float32; `delta`, the width of
    the hinge; `beta`, the weight of the quantisation term; `zeta`, None for the code bound.
    """

    lr_scale: ClassVar[float] = 10.0

    def __init__(
        self,
        bits: int,
        classes: int,
        *,
        alpha: float = 16.0,
        delta: float = 0.2,
        beta: float = 0.001,
        zeta: float | None = None,
    ) -> None:
        super().__init__(bits, classes)
        self.alpha, self.delta, self.beta = alpha, delta, beta
        between(0.01, 40, alpha=alpha)
        between(0, 1, delta=delta)
        at_least(0, beta=beta)
        self.zeta = class_margin(bits, classes, zeta)
        self.proxies = nn.Parameter(torch.empty(classes, bits))
        nn.init.kaiming_normal_(self.proxies, mode="fan_out")

    def compute(self, z_BK: Tensor, labels_BC: Tensor, keys: Sequence[str]) -> Tensor:
        """Compute the loss; see `HashLoss.forward`."""
        cos_BC = normalize(z_BK) @ normalize(self.proxies.to(z_BK.dtype)).T
        near_BC = torch.expm1(self.alpha * relu(1 - self.delta - cos_BC))
        far_BC = torch.expm1(self.alpha * relu(cos_BC - self.zeta - self.delta))
        others_BC = (1 - labels_BC) * (labels_BC.sum(1, keepdim=True) > 0)
        present = (labels_BC.sum(0) > 0).sum().clamp(min=1)
        attract = torch.log1p((labels_BC * near_BC).sum(0)).sum() / present
        repel = torch.log1p((others_BC * far_BC).sum(0)).mean()
        return attract + repel + self.beta * (z_BK - binary(z_BK)).square().sum()
