"""Folded norms: the same outputs from fewer layers, and the network that they were folded from as it was."""

import pytest
import torch
from torch import nn

from hhnet.nn.folding import fold_norms
from hhnet.nn.model import HHNet, model_to_bytes

BITS, SIDE = 16, 64


def trained(backbone: str) -> HHNet:
    """A network whose norms have seen data: nothing of them may get lost unnoticed."""
    torch.manual_seed(1)
    model = HHNet(backbone, BITS, stem_stride=4)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
    return model.eval()


def norms(network: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())


@pytest.mark.parametrize(
    ("backbone", "left"),
    [("hrnet_w18_small", 0), ("resnet18", 0), ("test_resnet", 1), ("vgg11_bn", 0), ("densenet121", 121)],
)
def test_outputs_are_the_same(backbone: str, left: int) -> None:
    model = trained(backbone)
    folded = fold_norms(model)
    images = torch.randn(3, 3, SIDE, SIDE)
    with torch.inference_mode():
        expected, found = model(images), folded(images)
    torch.testing.assert_close(found, expected, rtol=0, atol=float(expected.abs().max()) * 1e-5)
    assert norms(folded) == left < norms(model) or norms(folded) == norms(model) == left


def test_the_network_itself_stays() -> None:
    model = trained("hrnet_w18_small").train()
    before = model_to_bytes(model)
    assert not fold_norms(model).training
    assert model.training and model_to_bytes(model) == before
