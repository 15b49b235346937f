"""DSH against its formula."""

from typing import Any

from tests.support.losses import Array, check_formula, mean, pairs

SENSELESS: dict[str, tuple[float, ...]] = {"margin": (0,), "alpha": (-1,)}


def dsh(loss: Any, z: Array, y: Array) -> float:
    contrast = []
    for i, j, same in pairs(y):
        distance = sum((a - b) ** 2 for a, b in zip(z[i], z[j], strict=True))
        contrast.append(distance / 2 if same else max(0.0, loss.margin - distance) / 2)
    return mean(contrast) + loss.alpha * mean([abs(abs(value) - 1) for value in z.ravel()])


def test_formula() -> None:
    check_formula("dsh", dsh)
    check_formula("dsh", dsh, margin=20.0, alpha=2.0)
