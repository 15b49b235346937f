"""DCH against its formula."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from hhnet.nn.losses import make_loss
from tests.support.losses import BITS, CLASSES, Array, check_formula, cosine, mean, pairs

SENSELESS: dict[str, tuple[float, ...]] = {"gamma": (0, -1), "lam": (-1,)}


def dch(loss: Any, z: Array, y: Array) -> float:
    g, values = loss.gamma, pairs(y)
    alike = sum(same for *_, same in values)
    weighted = []
    for i, j, same in values:
        d = BITS / 2 * (1 - cosine(z[i], z[j]))
        weight = len(values) / (alike if same else len(values) - alike)
        weighted.append(weight * (same * math.log(d / g) + math.log(1 + g / d)))
    off = [BITS / 2 * (1 - cosine(np.abs(row), np.ones(BITS))) for row in z]
    return mean(weighted) + loss.lam * mean([math.log(1 + d / g) for d in off])


def test_formula() -> None:
    check_formula("dch", dch)
    check_formula("dch", dch, gamma=5.0, lam=2.0)


def test_equal_codes_without_a_common_label_are_finite() -> None:
    """The logarithm of their distance is not."""
    z = torch.ones(4, BITS, requires_grad=True)
    value = make_loss("dch", BITS, CLASSES)(z, torch.eye(CLASSES)[:4], list("abcd"))
    value.backward()
    assert value.item() == pytest.approx(math.log(1 + 20 / 1e-5), rel=1e-6)
    assert z.grad is not None and z.grad.isfinite().all()
