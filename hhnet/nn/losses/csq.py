"""CSQ: every bit is classified towards the hash centre of the sample's class.

    mean over samples and bits of BCE((u + 1) / 2, (c + 1) / 2)  +  lam * mean (|u| - 1)^2,   u = tanh z

c is the centre of the label; with several labels, the sign of the sum of their centres, where a sum of 0
takes the bit of one fixed random vector. Since (tanh z + 1) / 2 = sigmoid(2 z), the cross-entropy of a bit is
softplus(-2 c z), which never takes the logarithm of 0. lam = 0.05. Source: Yuan et al. 2020,
yuanli2333/Hadamard-Matrix-for-hashing README, `train.py`; centres as in `hhnet.nn.centres.hash_centres`.

Shape suffixes: B samples, K bits, C classes.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

from hhnet.nn.losses.base import HashLoss, at_least, class_centres, masked_mean


class CSQ(HashLoss):
    """The CSQ loss; the module gives its equation.

    Options: `lam`, the weight of the quantisation term; `seed` of the centres.
    """

    centres: Tensor
    tie: Tensor

    def __init__(self, bits: int, classes: int, *, lam: float = 0.05, seed: int = 0) -> None:
        super().__init__(bits, classes)
        at_least(0, lam=lam)
        self.lam = lam
        tie_K = np.random.default_rng([seed, 1]).integers(0, 2, bits) * 2 - 1
        self.register_buffer("centres", class_centres(classes, bits, seed, orthogonal=True))
        self.register_buffer("tie", torch.from_numpy(tie_K).float())

    def compute(self, z_BK: Tensor, labels_BC: Tensor, keys: Sequence[str]) -> Tensor:
        """Compute the loss; see `HashLoss.forward`."""
        votes_BK = labels_BC @ self.centres.to(z_BK.dtype)
        target_BK = torch.where(votes_BK == 0, self.tie.to(z_BK.dtype), votes_BK.sign())
        labelled_B = (labels_BC.sum(1) > 0).to(z_BK.dtype)
        attract = masked_mean(softplus(-2 * target_BK * z_BK).mean(1), labelled_B)
        return attract + self.lam * (torch.tanh(z_BK).abs() - 1).square().mean()
