"""Folds batch normalisation into the convolution before it, so that a network has fewer layers to run."""

from collections.abc import Iterator
from copy import deepcopy
from itertools import pairwise
from typing import TypeVar

from timm.models.hrnet import HighResolutionNet
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

Network = TypeVar("Network", bound=nn.Module)

_NUMBERED = (HighResolutionNet, ResNet, BasicBlock, Bottleneck)
"""Modules that run `conv1` and then `bn1`, `conv2` and then `bn2`, and so on."""


def fold_norms(network: Network) -> Network:
    """Return a copy for inference in which convolutions do the work of the BatchNorm2d that follows them.

    Outputs are the same up to rounding. Norms are folded in HRNets, in ResNets, and wherever they follow a convolution
    in an `nn.Sequential`; others stay.
    """
    folded = deepcopy(network).eval()
    for parent in list(folded.modules()):
        for conv, norm in _pairs(parent):
            before, after = getattr(parent, conv, None), getattr(parent, norm, None)
            if isinstance(before, nn.Conv2d) and type(after) is nn.BatchNorm2d and after.running_var is not None:
                # In float64, so that every machine rounds the same product to the same weight.
                setattr(parent, conv, fuse_conv_bn_eval(before.double(), after.double()).float())
                setattr(parent, norm, nn.Identity())
    return folded


def _pairs(parent: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield the names of layers of a module of which the second takes just what the first returns."""
    if isinstance(parent, nn.Sequential):
        yield from pairwise(name for name, _ in parent.named_children())
    elif isinstance(parent, _NUMBERED):
        yield from ((f"conv{number}", f"bn{number}") for number in (1, 2, 3))
