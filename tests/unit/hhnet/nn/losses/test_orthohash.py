"""OrthoHash against its formula."""

from typing import Any

from tests.support.losses import Array, check_formula, cosine, mean, softmax_entropy

SENSELESS: dict[str, tuple[float, ...]] = {"scale": (0,), "margin": (-1,), "seed": (-1, 0.5)}
HEAD = "bn"
SOFT: dict[str, float] = {"margin": 0.0}


def orthohash(loss: Any, z: Array, y: Array) -> float:
    centres, values = loss.unit_centres.numpy(), []
    for i in range(len(z)):
        if y[i].any():
            logits = [loss.scale * (cosine(z[i], c) - loss.margin * y[i, k]) for k, c in enumerate(centres)]
            values.append(softmax_entropy(logits, y[i]))
    return mean(values)


def test_formula() -> None:
    check_formula("orthohash", orthohash)
    check_formula("orthohash", orthohash, scale=1.0, margin=0.5, seed=2)
