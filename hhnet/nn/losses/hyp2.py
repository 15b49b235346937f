"""HyP2: one proxy per class and a repulsion between samples that share no label.

    mean over (i, k) with y_ik = 1 of            1 - cos(z_i, p_k)
    + mean over (i, k) with y_ik = 0 of          max(0, cos(z_i, p_k) - zeta)
    + beta * mean over pairs (i, j) of           max(0, cos(z_i, z_j) - zeta)

The pairs are those of two multi-label samples without a common label, and zeta comes from the best known
binary linear code, see `hhnet.nn.centres.margin`. beta = 0.5; proxies start from a Kaiming normal; the HHNet
protocol trains them at 10 times the rate of the hash layer. Source: Xu et al. 2022, JerryXu0129/HyP2-Loss
`config.py`, `model.py`, `retrieval.py`; rates from BioDeepHashing `src/utils`.

Shape suffixes: B samples, K bits, C classes.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, relu

from hhnet.nn.losses.base import HashLoss, at_least, class_margin, masked_mean, similarity


class HyP2(HashLoss):
    """The HyP2 loss; the module gives its equation.

    Options: `beta`, the weight of the pair term; `zeta`, None for the code bound.
    """

    lr_scale: ClassVar[float] = 10.0

    def __init__(self, bits: int, classes: int, *, beta: float = 0.5, zeta: float | None = None) -> None:
        super().__init__(bits, classes)
        at_least(0, beta=beta)
        self.beta, self.zeta = beta, class_margin(bits, classes, zeta)
        self.proxies = nn.Parameter(torch.empty(classes, bits))
        nn.init.kaiming_normal_(self.proxies, mode="fan_out")

    def compute(self, z_BK: Tensor, labels_BC: Tensor, keys: Sequence[str]) -> Tensor:
        """Compute the loss; see `HashLoss.forward`."""
        unit_BK = normalize(z_BK)
        cos_BC = unit_BK @ normalize(self.proxies.to(z_BK.dtype)).T
        labelled_B1 = (labels_BC.sum(1, keepdim=True) > 0).to(z_BK.dtype)
        attract = masked_mean(1 - cos_BC, labels_BC)
        repel = masked_mean(relu(cos_BC - self.zeta), (1 - labels_BC) * labelled_B1)
        return attract + repel + self.beta * self._pairs(unit_BK, labels_BC)

    def _pairs(self, unit_BK: Tensor, labels_BC: Tensor) -> Tensor:
        similar_BB, pairs_BB = similarity(labels_BC)
        multi_B = (labels_BC.sum(1) > 1).to(unit_BK.dtype)
        disjoint_BB = pairs_BB * (1 - similar_BB) * torch.outer(multi_B, multi_B)
        return masked_mean(relu(unit_BK @ unit_BK.T - self.zeta), disjoint_BB)
