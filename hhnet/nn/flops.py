"""The cost of a forward pass."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from hhnet.nn.model import HHNet


def forward_flops(model: HHNet, side: int) -> int:
    """Count the floating-point operations of the forward pass of one image of `side` x `side` pixels.

    Convolutions and matrix products count, with two operations for each multiplication and addition, as in
    `torch.utils.flop_counter`. The model is left in eval mode.
    """
    device = next(model.parameters()).device
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(torch.zeros(1, 3, side, side, device=device))
    return int(counter.get_total_flops())
