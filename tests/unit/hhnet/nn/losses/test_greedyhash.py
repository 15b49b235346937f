"""GreedyHash against its formula."""

from typing import Any

import numpy as np

from tests.support.losses import Array, Formula, check_formula, mean, softmax_entropy

SENSELESS: dict[str, tuple[float, ...]] = {"alpha": (-1,)}
SOFT: dict[str, float] = {}


def value_at(b: Array, loss: Any, z: Array, y: Array) -> float:
    weights = loss.classifier.weight.detach().numpy()
    entropy = [softmax_entropy([float(w @ b[i]) for w in weights], y[i]) for i in range(len(z)) if y[i].any()]
    return mean(entropy) + loss.alpha * mean([abs(abs(value) - 1) ** 3 for value in z.ravel()])


def greedyhash(loss: Any, z: Array, y: Array) -> float:
    return value_at(np.where(z > 0, 1.0, -1.0), loss, z, y)


def straight_through(z: Array) -> Formula:
    """Near `z` the codes follow as if the sign had slope 1."""
    return lambda loss, moved, y: value_at(np.where(z > 0, 1.0, -1.0) + moved - z, loss, moved, y)


def test_formula() -> None:
    check_formula("greedyhash", greedyhash, smooth=straight_through)
    check_formula("greedyhash", greedyhash, smooth=straight_through, alpha=1.0)
