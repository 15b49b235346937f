"""DHN against its formula."""

import math
from typing import Any

from tests.support.losses import Array, check_formula, likelihood, mean

SENSELESS: dict[str, tuple[float, ...]] = {"lam": (-0.1,)}


def dhn(loss: Any, z: Array, y: Array) -> float:
    return likelihood(z, y) + loss.lam * mean([math.log(math.cosh(abs(value) - 1)) for value in z.ravel()])


def test_formula() -> None:
    check_formula("dhn", dhn)
    check_formula("dhn", dhn, lam=3.0)
