"""Give a trained network another hash layer, without training.

A hash layer that is linear in eval mode stays one linear layer, so a rotated or projected model costs nothing more than
before. The models lie on the CPU.

Shape suffixes: D features, K bits, C classes.
"""

from copy import deepcopy
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from hhnet.nn.heads import class_bits, make_head
from hhnet.nn.model import HHNet

__all__ = ["as_class_index", "projected", "rotated"]

Reals = npt.NDArray[np.float64]


def rotated(model: HHNet, rotation_KK: Reals) -> HHNet:
    """Copy `model` so that its outputs, in eval mode, are multiplied by the orthogonal `rotation_KK`.

    Raises:
        ValueError: for the hash layer of a class index, since a rotated one would not be a class index.
    """
    turn = torch.from_numpy(np.ascontiguousarray(rotation_KK.T))  # a Linear multiplies by its transposed weight
    made = deepcopy(model)
    if model.head_name in ("ln", "ln_rotated"):
        linear, norm, *before = cast(nn.Sequential, made.head)
        last = nn.Linear(model.bits, model.bits, bias=False)
        with torch.no_grad():
            last.weight.copy_(turn @ cast(nn.Linear, before[0]).weight.double() if before else turn)
        made.head, made.head_name = nn.Sequential(linear, norm, last), "ln_rotated"
        return made
    weight_KD, bias_K = _affine(made.head)
    return _with_linear(made, turn @ weight_KD, turn @ bias_K)


def projected(model: HHNet, directions_DK: Reals, mean_D: Reals) -> HHNet:
    """Copy `model` with the outputs (features - `mean_D`) @ `directions_DK`, whatever its hash layer was."""
    weight_KD = torch.from_numpy(np.ascontiguousarray(directions_DK.T))
    return _with_linear(deepcopy(model), weight_KD, -weight_KD @ torch.from_numpy(mean_D))


def as_class_index(model: HHNet, weight_CK: Tensor, bias_C: Tensor) -> HHNet:
    """Copy `model` so that its code is the index of the class chosen by a linear classifier of its outputs.

    Raises:
        ValueError: for one class, and for a hash layer that is not linear in eval mode, such as "ln".
    """
    if len(weight_CK) < 2:
        raise ValueError("one class needs no code: give a classifier of at least 2 classes")
    weight_KD, bias_K = _affine(model.head)
    made, classes = deepcopy(model), len(weight_CK)
    made.head = make_head("class_index", model.feature_dim, model.bits, classes)
    made.bits, made.head_name, made.classes = class_bits(classes), "class_index", classes
    logit_bias_C = weight_CK.double() @ bias_K + bias_C.double()
    _fill(cast(nn.Sequential, made.head)[0], weight_CK.double() @ weight_KD, logit_bias_C)
    return made


def _affine(head: nn.Module) -> tuple[Tensor, Tensor]:
    """Return weight (K, D) and bias (K,) of a hash layer in eval mode, float64 on the CPU."""
    if isinstance(head, nn.Linear):
        return head.weight.detach().double().cpu(), head.bias.detach().double().cpu()
    if isinstance(head, nn.Sequential) and isinstance(head[1], nn.BatchNorm1d):
        linear, norm = cast(nn.Linear, head[0]), head[1]
        assert norm.running_mean is not None and norm.running_var is not None
        scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
        bias = norm.bias.double() - scale * norm.running_mean.double()
        return (scale[:, None] * linear.weight.double()).detach().cpu(), bias.detach().cpu()
    raise ValueError("the hash layer is not linear: train with model.head = linear or bn")


def _with_linear(model: HHNet, weight_KD: Tensor, bias_K: Tensor) -> HHNet:
    model.head = make_head("linear", model.feature_dim, len(weight_KD))
    model.bits, model.head_name = len(weight_KD), "linear"
    _fill(model.head, weight_KD, bias_K)
    return model


def _fill(linear: nn.Module, weight: Tensor, bias: Tensor) -> None:
    assert isinstance(linear, nn.Linear)
    with torch.no_grad():
        linear.weight.copy_(weight)
        linear.bias.copy_(bias)
