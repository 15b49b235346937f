"""HashNet against its formula."""

import math
from typing import Any

import numpy as np
import pytest

from hhnet.nn.losses import make_loss
from tests.support.losses import BITS, CLASSES, Array, batch, check_formula, mean, pairs, softplus

SENSELESS: dict[str, tuple[float, ...]] = {"scale": (0,), "positive": (0,)}


def hashnet(loss: Any, z: Array, y: Array) -> float:
    u = np.tanh(math.sqrt(1 + 0.005 * (int(loss.iteration) // 200 * 200)) * z)
    values: dict[bool, list[float]] = {True: [], False: []}
    for i, j, same in pairs(y):
        logit = loss.scale * (u[i] @ u[j])
        values[same].append((loss.positive if same else 1.0) * (softplus(logit) - same * logit))
    total = len(values[True]) + len(values[False])
    # w = N / N+ and N / N-, mean over all N pairs
    return mean([total / len(kind) * value for kind in values.values() for value in kind])


def test_formula() -> None:
    check_formula("hashnet", hashnet)
    check_formula("hashnet", hashnet, scale=1.0, positive=3.0)


def test_slope_follows_the_steps_and_survives_a_checkpoint() -> None:
    loss: Any = make_loss("hashnet", BITS, CLASSES)
    z, labels, keys = batch("single", size=4)
    slopes = []
    for _ in range(401):
        slopes.append(float(loss.beta()))
        loss(z, labels, keys)
    assert slopes[0] == slopes[199] == 1
    assert slopes[200] == slopes[399] == pytest.approx(math.sqrt(2))
    assert slopes[400] == pytest.approx(math.sqrt(3))
    loss.eval()(z, labels, keys)
    assert int(loss.iteration) == 401
    resumed: Any = make_loss("hashnet", BITS, CLASSES)
    resumed.load_state_dict(loss.state_dict())
    assert int(resumed.iteration) == 401 and float(resumed.beta()) == float(loss.beta())
