"""Distillation: a loss that gives codes the same neighbours as a teacher's features.

    mean over i of  sum over j of  p_ij (log p_ij - log q_ij)
    p_ij = softmax over j of cos(f_i, f_j) / T,   q_ij = softmax over j of cos(z_i, z_j) / T,   j other than i

Features and codes may have any lengths, since only their neighbourhoods are compared. T = 0.1. Source: Koohpayegani et
al. 2020, "CompRess: Self-Supervised Learning by Compressing Representations". Their anchors are a memory of samples;
here they are the others of the gathered global batch.

Shape suffixes: B samples, K bits, D features.
"""

import torch
from torch import Tensor
from torch.nn.functional import kl_div, normalize

_MASKED_LOGIT = -1e4  # a logit whose exponential is 0; minus infinity would make the divergence NaN


def neighbour_divergence(z_BK: Tensor, f_BD: Tensor, temperature: float = 0.1) -> Tensor:
    """Return how far the codes' neighbourhoods are from the features': a scalar, 0 for a batch of one."""
    log_q_BB, log_p_BB = _neighbours(z_BK, temperature), _neighbours(f_BD.to(z_BK.dtype), temperature)
    return kl_div(log_q_BB, log_p_BB, reduction="batchmean", log_target=True)


def _neighbours(x_BD: Tensor, temperature: float) -> Tensor:
    """Return the logarithms of the shares (B, B) that the other rows have in each row's neighbourhood."""
    unit_BD = normalize(x_BD)
    itself_BB = torch.eye(len(x_BD), dtype=torch.bool, device=x_BD.device)
    return torch.log_softmax((unit_BD @ unit_BD.T / temperature).masked_fill(itself_BB, _MASKED_LOGIT), dim=1)
