"""WGLHH against its formula."""

import math
from typing import Any

import pytest
import torch

from hhnet.nn.losses import make_loss
from tests.support.losses import BITS, CLASSES, Array, check_formula, cosine, mean, pairs, sign

SENSELESS: dict[str, tuple[float, ...]] = {"alpha": (0,), "theta": (1,), "gamma": (-1,), "positive": (-1,)}


def times_log(factor: float, value: float) -> float:
    return factor * math.log(value) if factor else 0.0


def wglhh(loss: Any, z: Array, y: Array) -> float:
    t, values = loss.theta, []
    for i, j, s in pairs(y):
        cos = cosine(z[i], z[j])
        p = math.exp(-loss.alpha * (BITS / 2 * (1 - cos)) ** 2)
        divergence = times_log(p, t * p / ((t - 1) * p + s)) + times_log(s, t * s / ((t - 1) * s + p))
        values.append((1 + loss.positive * s) * math.exp(abs((1 + cos) / 2 - s)) * divergence)
    return mean(values) + loss.gamma * mean([sum((v - sign(v)) ** 2 for v in row) for row in z])


def test_formula() -> None:
    check_formula("wglhh", wglhh)
    check_formula("wglhh", wglhh, alpha=0.02, theta=3.0, gamma=0.5, positive=70.0)


def test_the_farthest_pair_is_finite() -> None:
    """Its p is 0 in floats, and so is p log p."""
    z = torch.ones(2, BITS) * torch.tensor([[1.0], [-1.0]])
    z.requires_grad_()
    value = make_loss("wglhh", BITS, CLASSES, alpha=10.0)(z, torch.eye(CLASSES)[[0, 0]], ["a", "b"])
    value.backward()
    assert value.item() == pytest.approx(1.7 * math.e * math.log(2), rel=1e-6)
    assert z.grad is not None and z.grad.isfinite().all()
