"""HashNet: weighted pairwise likelihood of codes that are pressed towards the sign as training goes on.

    mean over pairs i < j of  w (softplus(a d) - s a d),   d = <u_i, u_j>,   u = tanh(beta z)

s = 1 where the two share a label; w = N / N+ for such pairs and N / N- for the others, N = N+ + N- pairs of
the batch, so both kinds weigh the same. a = 10 / K. beta = sqrt(1 + 0.005 t), with t the number of training
steps so far, rounded down to a multiple of 200. Source: Cao et al. 2017, thuml/HashNet `pytorch/src/loss.py`,
`network.py`, `train.py`; the likelihood is written with softplus, since log(1 + exp(x)) overflows.

Shape suffixes: B samples, K bits, C classes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import softplus

from hhnet.nn.losses.base import HashLoss, above, masked_mean, similarity

_BETA_GROWTH = 0.005  # growth of beta^2 per training step
_STEPS_PER_BETA = 200  # training steps between two changes of beta


class HashNet(HashLoss):
    """The HashNet loss; the module gives its equation.

    Options: `scale` a, None for 10 / K; `positive`, a further weight of similar pairs.

    The step counter is a buffer, so that a run resumed from a checkpoint goes on where it was. It counts the
    forward passes made in training mode.
    """

    iteration: Tensor

    def __init__(self, bits: int, classes: int, *, scale: float | None = None, positive: float = 1.0) -> None:
        super().__init__(bits, classes)
        self.scale, self.positive = 10 / bits if scale is None else scale, positive
        above(0, scale=self.scale, positive=positive)
        self.register_buffer("iteration", torch.zeros((), dtype=torch.int64))

    def beta(self) -> Tensor:
        """Return the present slope of the tanh, a scalar on the buffer's device."""
        return torch.sqrt(1 + _BETA_GROWTH * (self.iteration // _STEPS_PER_BETA * _STEPS_PER_BETA))

    def compute(self, z_BK: Tensor, labels_BC: Tensor, keys: Sequence[str]) -> Tensor:
        """Compute the loss; see `HashLoss.forward`."""
        u_BK = torch.tanh(self.beta().to(z_BK.dtype) * z_BK)
        if self.training:
            self.iteration += 1
        similar_BB, pairs_BB = similarity(labels_BC)
        logit_BB = self.scale * (u_BK @ u_BK.T)
        loss_BB = softplus(logit_BB) - similar_BB * logit_BB
        similar = masked_mean(loss_BB, pairs_BB * similar_BB)
        return self.positive * similar + masked_mean(loss_BB, pairs_BB * (1 - similar_BB))
