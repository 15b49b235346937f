"""MDSH: a softmax over the cosines to fixed centres that lie far apart; later a term for pairs that share a label.

    - mean over samples and classes of  y log p + (1 - y) log(1 - p),   p = softmax_k(sqrt(K) cos(u, c_k))
    + beta * mean over pairs i < j that share a label of  softplus((1 - cos(u_i, u_j)) / 2)
    + lam * mean (|u| - 1)^2,   u = tanh z

beta = 1, lam = 1e-4. The pair term begins after `start` training steps: 1800, about the authors' 9 epochs of 13,000
images in batches of 64. The authors compare the batch with a memory of the training set that a momentum network fills;
here the pairs are those of the gathered global batch, as in DPSH. They optimise the centres for a distance of the
Gilbert-Varshamov bound; those of `hhnet.nn.centres.hash_centres` reach it or more. With several labels each is a 1 of
y, as in the authors' code. Source: Wang et al. 2023, Wangld5/Center-Hashing `loss/ourLoss.py`,
`scripts/utils.py`, `model/Net.py`.

Shape suffixes: B samples, K bits, C classes.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize, softplus

from hhnet.nn.losses.base import HashLoss, at_least, class_centres, masked_mean, similarity

_MASKED_LOGIT = -1e4  # a logit whose exponential is 0


class MDSH(HashLoss):
    """The MDSH loss; the module gives its equation.

    Options: `beta`, the weight of the pairs; `lam` that of the quantisation term; `start`, the steps before the
    pairs; `seed` of the centres. The step counter is a buffer and counts forward passes in training mode.
    """

    unit_centres: Tensor
    iteration: Tensor

    def __init__(
        self, bits: int, classes: int, *, beta: float = 1.0, lam: float = 1e-4, start: int = 1800, seed: int = 0
    ) -> None:
        super().__init__(bits, classes)
        at_least(0, beta=beta, lam=lam, start=start)
        self.beta, self.lam, self.start = beta, lam, start
        centres_CK = class_centres(classes, bits, seed).double() / math.sqrt(bits)
        self.register_buffer("unit_centres", centres_CK.float())
        self.register_buffer("iteration", torch.zeros((), dtype=torch.int64))

    def compute(self, z_BK: Tensor, labels_BC: Tensor, keys: Sequence[str]) -> Tensor:
        """Compute the loss; see `HashLoss.forward`."""
        u_BK = torch.tanh(z_BK)
        unit_BK = normalize(u_BK)
        begun = (self.iteration >= self.start).to(z_BK.dtype)
        if self.training:
            self.iteration += 1
        similar_BB, pairs_BB = similarity(labels_BC)
        pairs = masked_mean(softplus((1 - unit_BK @ unit_BK.T) / 2), pairs_BB * similar_BB)
        quantisation = (u_BK.abs() - 1).square().mean()
        return self._classes(unit_BK, labels_BC) + self.beta * begun * pairs + self.lam * quantisation

    def _classes(self, unit_BK: Tensor, labels_BC: Tensor) -> Tensor:
        """Return the cross-entropy over all classes, in a form that stays exact for the likeliest class.

        For that class 1 - p rounds to 0 in floats, so log(1 - p) is computed from the logits of all other classes.
        """
        logit_BC = math.sqrt(self.bits) * (unit_BK @ self.unit_centres.to(unit_BK.dtype).T)
        log_p_BC = torch.log_softmax(logit_BC, dim=1)
        top_B1 = logit_BC.argmax(1, keepdim=True)
        is_top_BC = torch.zeros_like(logit_BC, dtype=torch.bool).scatter(1, top_B1, True)
        others_B1 = torch.logsumexp(logit_BC.masked_fill(is_top_BC, _MASKED_LOGIT), 1, keepdim=True)
        all_B1 = torch.logsumexp(logit_BC, 1, keepdim=True)
        below_BC = torch.log1p(-torch.exp(log_p_BC.masked_fill(is_top_BC, _MASKED_LOGIT)))
        log_not_p_BC = torch.where(is_top_BC, others_B1 - all_B1, below_BC)
        labelled_BC = (labels_BC.sum(1, keepdim=True) > 0).to(unit_BK.dtype).expand_as(labels_BC)
        return -masked_mean(labels_BC * log_p_BC + (1 - labels_BC) * log_not_p_BC, labelled_BC)
