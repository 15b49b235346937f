"""CEL against its formula."""

from typing import Any

from tests.support.losses import Array, check_formula, cosine, mean, pairs

SENSELESS: dict[str, tuple[float, ...]] = {"zeta": (-1.1, 1.1)}


def cel(loss: Any, z: Array, y: Array) -> float:
    values = []
    for i, j, same in pairs(y):
        cos = cosine(z[i], z[j])
        values.append(1 - cos if same else max(0.0, cos - loss.zeta))
    return mean(values)


def test_formula() -> None:
    check_formula("cel", cel)
    check_formula("cel", cel, zeta=-0.3)
