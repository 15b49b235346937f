"""CSQ against its formula."""

import math
from typing import Any

import numpy as np
import pytest

from hhnet.nn.losses import make_loss
from tests.support.losses import CLASSES, Array, check_formula, mean

SENSELESS: dict[str, tuple[float, ...]] = {"lam": (-1,), "seed": (-1, 0.5)}


def csq(loss: Any, z: Array, y: Array) -> float:
    centres, tie = loss.centres.numpy(), loss.tie.numpy()
    entropy, quantisation = [], []
    for i in range(len(z)):
        votes = sum((centres[k] for k in range(CLASSES) if y[i, k]), np.zeros(z.shape[1]))
        for j in range(z.shape[1]):
            u = math.tanh(z[i, j])
            quantisation.append((abs(u) - 1) ** 2)
            if y[i].any():
                target = ((votes[j] > 0) * 2 - 1 if votes[j] else tie[j]) / 2 + 0.5
                p = (u + 1) / 2
                entropy.append(-target * math.log(p) - (1 - target) * math.log(1 - p))
    return mean(entropy) + loss.lam * mean(quantisation)


def test_formula() -> None:
    check_formula("csq", csq)
    check_formula("csq", csq, lam=1.0, seed=4)


@pytest.mark.parametrize(("bits", "classes"), [(1, 2), (5, 3), (12, 100), (48, 100), (64, 1), (100, 1000), (24, 5000)])
def test_any_number_of_bits_and_classes(bits: int, classes: int) -> None:
    centres = make_loss("csq", bits, classes).state_dict()["centres"].numpy()
    assert centres.shape == (classes, bits) and (np.abs(centres) == 1).all()
    assert len(np.unique(centres, axis=0)) == classes
