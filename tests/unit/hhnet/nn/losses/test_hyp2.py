"""HyP2 against its formula."""

from typing import Any

from hhnet.nn.losses import make_loss
from tests.support.losses import BITS, CLASSES, Array, check_formula, cosine, mean, pairs

SENSELESS: dict[str, tuple[float, ...]] = {"beta": (-1,), "zeta": (-2, 2)}


def hyp2(loss: Any, z: Array, y: Array) -> float:
    proxies = loss.proxies.detach().numpy()
    attract, repel = [], []
    for i in range(len(z)):
        for k in range(CLASSES):
            if y[i, k]:
                attract.append(1 - cosine(z[i], proxies[k]))
            elif y[i].any():
                repel.append(max(0.0, cosine(z[i], proxies[k]) - loss.zeta))
    several = [(i, j) for i, j, same in pairs(y) if not same and y[i].sum() > 1 and y[j].sum() > 1]
    apart = [max(0.0, cosine(z[i], z[j]) - loss.zeta) for i, j in several]
    return mean(attract) + mean(repel) + loss.beta * mean(apart)


def test_formula() -> None:
    check_formula("hyp2", hyp2)
    check_formula("hyp2", hyp2, beta=3.0, zeta=-0.9)


def test_proxies_learn_faster() -> None:
    assert make_loss("hyp2", BITS, CLASSES).lr_scale == 10
