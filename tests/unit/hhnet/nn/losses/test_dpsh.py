"""DPSH against its formula."""

from typing import Any

from tests.support.losses import Array, check_formula, likelihood, mean, sign

SENSELESS: dict[str, tuple[float, ...]] = {"eta": (-1,)}


def dpsh(loss: Any, z: Array, y: Array) -> float:
    return likelihood(z, y) + loss.eta * mean([(value - sign(value)) ** 2 for value in z.ravel()])


def test_formula() -> None:
    check_formula("dpsh", dpsh)
    check_formula("dpsh", dpsh, eta=2.0)
