"""FLOPs beside those that others give for the same networks."""

import pytest
import torch

from hhnet.nn.flops import forward_flops
from hhnet.nn.model import HHNet


@pytest.mark.parametrize(("name", "giga"), [("resnet18", 1.814), ("resnet50", 4.089), ("hrnet_w18", 4.32)])
def test_two_for_each_multiplication_of_the_published_count(name: str, giga: float) -> None:
    """torchvision's tables for the ResNets, timm's results for HRNet, in 10^9 multiplications at 224."""
    with torch.device("meta"):
        model = HHNet(name, 64)
    assert forward_flops(model, 224) == pytest.approx(2e9 * giga, rel=0.01)
