"""DPN against its formula."""

from typing import Any

from tests.support.losses import Array, check_formula, mean

SENSELESS: dict[str, tuple[float, ...]] = {"margin": (0,), "reg": (-1,), "seed": (-1, 0.5)}


def dpn(loss: Any, z: Array, y: Array) -> float:
    centres = loss.centres.numpy()
    values = []
    for i in range(len(z)):
        targets = [centres[k] for k in range(len(centres)) if y[i, k]]
        if targets:
            hinges = (max(0.0, loss.margin - v * t) for c in targets for v, t in zip(z[i], c, strict=True))
            values.append(sum(hinges))
    return mean(values) + loss.reg * mean([value**2 for value in z.ravel()])


def test_formula() -> None:
    check_formula("dpn", dpn)
    check_formula("dpn", dpn, margin=0.3, reg=0.7)
