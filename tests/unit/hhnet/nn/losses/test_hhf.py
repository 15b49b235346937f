"""HHF against its formula."""

import math
from typing import Any

from tests.support.losses import Array, check_formula, cosine, sign

SENSELESS: dict[str, tuple[float, ...]] = {"alpha": (0, 41), "delta": (-0.1, 1.1), "beta": (-1,), "zeta": (-2, 2)}


def hhf(loss: Any, z: Array, y: Array) -> float:
    proxies = loss.proxies.detach().numpy()
    attract = repel = 0.0
    for k in range(len(proxies)):
        near = far = 1.0
        for i in range(len(z)):
            cos = cosine(z[i], proxies[k])
            if y[i, k]:
                near += math.exp(loss.alpha * max(0.0, 1 - loss.delta - cos)) - 1
            elif y[i].any():
                far += math.exp(loss.alpha * max(0.0, cos - loss.zeta - loss.delta)) - 1
        attract += math.log(near) / max(1, int(y.any(0).sum()))
        repel += math.log(far) / len(proxies)
    return attract + repel + loss.beta * sum((value - sign(value)) ** 2 for value in z.ravel())


def test_formula() -> None:
    check_formula("hhf", hhf)
    check_formula("hhf", hhf, alpha=2.0, delta=0.4, beta=0.5, zeta=-0.5)
