"""MDSH against its formula."""

import math
from typing import Any

import numpy as np
import pytest

from hhnet.nn.losses import make_loss
from tests.support.losses import BITS, CLASSES, Array, batch, check_formula, cosine, mean, pairs, softplus

SENSELESS: dict[str, tuple[float, ...]] = {"beta": (-1,), "lam": (-1,), "start": (-1, 0.5), "seed": (-1, 0.5)}


def mdsh(loss: Any, z: Array, y: Array) -> float:
    u, centres, entropy = np.tanh(z), loss.unit_centres.numpy(), []
    for i in range(len(z)):
        powers = [math.exp(math.sqrt(BITS) * cosine(u[i], c)) for c in centres]
        for k in range(CLASSES):
            p = powers[k] / sum(powers)
            if y[i].any():
                entropy.append(-math.log(p if y[i, k] else 1 - p))
    alike = [softplus((1 - cosine(u[i], u[j])) / 2) for i, j, same in pairs(y) if same]
    begun = int(loss.iteration) >= loss.start
    return mean(entropy) + begun * loss.beta * mean(alike) + loss.lam * mean([(abs(v) - 1) ** 2 for v in u.ravel()])


def test_formula() -> None:
    check_formula("mdsh", mdsh)
    check_formula("mdsh", mdsh, start=0)
    check_formula("mdsh", mdsh, start=0, beta=3.0, lam=0.5, seed=3)


def test_pairs_begin_at_their_step_also_after_a_checkpoint() -> None:
    z, labels, keys = batch("single")
    loss: Any = make_loss("mdsh", BITS, CLASSES, start=3)
    values = [loss(z, labels, keys).item() for _ in range(5)]
    assert values[0] == values[1] == values[2] < values[3] == values[4]
    assert loss.eval()(z, labels, keys).item() == values[4] and int(loss.iteration) == 5
    resumed: Any = make_loss("mdsh", BITS, CLASSES, start=3)
    resumed.load_state_dict(loss.state_dict())
    assert resumed(z, labels, keys).item() == values[4]


def test_a_class_as_likely_as_can_be_is_finite() -> None:
    """1 - p of it is 0 in float32, and its logarithm is not."""
    loss: Any = make_loss("mdsh", 1024, 2)
    z = 100 * loss.unit_centres.sign()
    z.requires_grad_()
    value = loss(z, loss.unit_centres.new_tensor([[0, 1], [1, 0]]), ["a", "b"])
    value.backward()
    off = math.sqrt(1024) * (1 - float(loss.unit_centres[0] @ loss.unit_centres[1]))
    assert value.item() == pytest.approx(off, rel=1e-5)
    assert z.grad is not None and z.grad.isfinite().all()
