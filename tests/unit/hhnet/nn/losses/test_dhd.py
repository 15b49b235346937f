"""DHD against its formula."""

import math
from typing import Any

import numpy as np
import pytest

from hhnet.nn.losses import make_loss
from tests.support.losses import BITS, CLASSES, Array, Formula, batch, check_formula, cosine, mean, softmax_entropy

SENSELESS: dict[str, tuple[float, ...]] = {"tau": (0,), "distil": (-1,), "lam": (-1,), "std": (0,)}
HEAD = "ln"
SOFT: dict[str, float] = {}


def value_at(followed: Array, loss: Any, z: Array, y: Array) -> float:
    """The loss where the strong views are to follow the codes `followed`."""
    u, proxies = np.tanh(z), loss.proxies.detach().numpy()
    weak, strong = range(0, len(z), 2), range(1, len(z), 2)
    entropy = [softmax_entropy([cosine(u[i], p) / loss.tau for p in proxies], y[i]) for i in weak if y[i].any()]
    distil = [1 - cosine(u[j], followed[i]) for i, j in zip(weak, strong, strict=True)]
    bits = []
    for i in weak:
        for value in u[i]:
            at_one, at_minus_one = (math.exp(-(((value - m) / loss.std) ** 2) / 2) for m in (1, -1))
            own, other = (at_one, at_minus_one) if value > 0 else (at_minus_one, at_one)
            bits.append(-math.log(own) - math.log(1 - other))
    return mean(entropy) + loss.distil * mean(distil) + loss.lam * mean(bits)


def dhd(loss: Any, z: Array, y: Array) -> float:
    return value_at(np.tanh(z), loss, z, y)


def still(z: Array) -> Formula:
    """What is to be followed does not come nearer."""
    return lambda loss, moved, y: value_at(np.tanh(z), loss, moved, y)


def test_formula() -> None:
    check_formula("dhd", dhd, smooth=still)
    check_formula("dhd", dhd, smooth=still, tau=1.0, distil=3.0, lam=0.7, std=0.8)


def test_rows_that_are_no_two_views_are_refused() -> None:
    loss = make_loss("dhd", BITS, CLASSES)
    z, labels, keys = batch("single", size=6, views=2)
    for wrong in ([*keys[::2], *keys[1::2]], keys[1:] + keys[:1]):
        with pytest.raises(ValueError, match="rows must be 2 views of each sample, side by side"):
            loss(z, labels, wrong)
    with pytest.raises(ValueError, match="2 views"):
        loss(z[:-1], labels[:-1], keys[:-1])
