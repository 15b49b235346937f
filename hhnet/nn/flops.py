"""What a forward pass costs."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from hhnet.nn.model import HHNet


def forward_flops(model: HHNet, side: int) -> int:
    """Floating-point operations of the forward pass of one image of `side` x `side` pixels.

    Those of convolutions and matrix products, two for each multiplication and addition, as `torch.utils.flop_counter`
    counts them. The model is in eval mode, and stays in it.
    """
    device = next(model.parameters()).device
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(torch.zeros(1, 3, side, side, device=device))
    return int(counter.get_total_flops())
