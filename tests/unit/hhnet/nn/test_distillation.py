"""Distillation: the divergence against its formula in plain Python, and what it makes of free codes."""

import math

import numpy as np
import pytest
import torch

from hhnet.nn.distillation import neighbour_divergence
from tests.support.losses import Array, cosine, mean, slopes


def shares(x: Array, i: int, temperature: float) -> dict[int, float]:
    logits = {j: cosine(x[i], x[j]) / temperature for j in range(len(x)) if j != i}
    norm = math.fsum(math.exp(value) for value in logits.values())
    return {j: math.exp(value) / norm for j, value in logits.items()}


def divergence(z: Array, f: Array, temperature: float = 0.1) -> float:
    rows = []
    for i in range(len(z)):
        p, q = shares(f, i, temperature), shares(z, i, temperature)
        rows.append(math.fsum(p[j] * math.log(p[j] / q[j]) for j in p))
    return mean(rows)


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_value_and_gradient_are_those_of_the_formula(temperature: float) -> None:
    random = np.random.default_rng(0)
    codes, features = random.normal(size=(6, 8)), random.normal(size=(6, 3))
    z = torch.from_numpy(codes.copy()).requires_grad_()
    value = neighbour_divergence(z, torch.from_numpy(features), temperature)
    assert value.item() == pytest.approx(divergence(codes, features, temperature), rel=1e-9)
    value.backward()
    assert z.grad is not None
    expected = slopes(lambda: divergence(codes, features, temperature), codes)
    np.testing.assert_allclose(z.grad.numpy(), expected, rtol=1e-5, atol=1e-7)


def test_codes_like_the_features_are_done_and_others_come_near() -> None:
    torch.manual_seed(0)
    features = torch.randn(16, 32)
    assert neighbour_divergence(3 * features, features).item() == pytest.approx(0, abs=1e-6)
    z = torch.randn(16, 24, requires_grad=True)
    optimizer, first = torch.optim.Adam([z], lr=0.05), neighbour_divergence(z, features).item()
    for _ in range(200):
        optimizer.zero_grad()
        value = neighbour_divergence(z, features)
        value.backward()
        optimizer.step()
    assert value.item() < 0.05 * first


def test_extreme_batches_stay_finite() -> None:
    for z in (torch.zeros(3, 8), torch.ones(3, 8) * 1e4, torch.randn(1, 8)):
        z.requires_grad_()
        value = neighbour_divergence(z, torch.randn(len(z), 5).double())
        value.backward()
        assert value.isfinite() and value.dtype == torch.float32
        assert z.grad is not None and z.grad.isfinite().all()
    assert value.item() == 0
