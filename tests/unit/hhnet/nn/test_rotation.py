"""Rotations and projections against computations of another kind, in float64."""

import numpy as np
import pytest
import torch

from hhnet.nn.rotation import (
    householder_rotation,
    itq_rotation,
    principal_directions,
    quantisation_error,
    random_hyperplanes,
    reflected,
)
from tests.support.losses import Array


def turned_codes(rows: int, bits: int, noise: float, seed: int = 0) -> tuple[Array, Array]:
    """Codes of -1 and 1 with noise, turned by a random rotation, and that rotation."""
    rng = np.random.default_rng(seed)
    turn, _ = np.linalg.qr(rng.normal(size=(bits, bits)))
    return (rng.choice([-1.0, 1.0], (rows, bits)) + noise * rng.normal(size=(rows, bits))) @ turn, turn


def error_of(z: Array) -> float:
    total = 0.0
    for row in z:
        scaled = row / np.sqrt((row**2).sum()) * np.sqrt(len(row))
        total += sum((value - (1 if value > 0 else -1)) ** 2 for value in scaled) / len(row)
    return total / len(z)


def test_the_error_is_that_of_its_formula() -> None:
    z, _ = turned_codes(50, 8, 0.3)
    assert quantisation_error(z) == pytest.approx(error_of(z), abs=1e-12)
    assert quantisation_error([[2.0, -2.0]]) == 0 and quantisation_error([[0.0, 0.0]]) == 1


def test_the_reflections_are_the_product_of_all_of_them() -> None:
    vectors = np.random.default_rng(0).normal(size=(7, 7))
    expected = np.eye(7)
    for v in vectors.T:
        expected = expected @ (np.eye(7) - 2 * np.outer(v, v) / (v @ v))
    found = reflected(torch.from_numpy(vectors)).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-12)
    np.testing.assert_allclose(found @ found.T, np.eye(7), atol=1e-12)


@pytest.mark.parametrize("rotation", [itq_rotation, householder_rotation])
def test_a_rotation_finds_codes_that_were_turned_away(rotation) -> None:  # type: ignore[no-untyped-def]
    z, turn = turned_codes(500, 8, 0.1)
    found = rotation(z)
    np.testing.assert_allclose(found @ found.T, np.eye(8), atol=1e-9)
    before, least = (quantisation_error(z @ r) for r in (np.eye(8), turn.T))
    assert least < 0.02 < 0.2 < before
    after = [quantisation_error(z @ rotation(z, seed=seed)) for seed in range(5)]  # some end in a lesser optimum
    assert max(after) < before and min(after) < 1.05 * least
    np.testing.assert_array_equal(found, rotation(z))
    assert (rotation(z, seed=1) != found).any()


@pytest.mark.parametrize("rotation", [itq_rotation, householder_rotation])
def test_a_rotation_does_not_make_it_worse(rotation) -> None:  # type: ignore[no-untyped-def]
    z = np.random.default_rng(0).normal(size=(600, 16)) * np.linspace(0.2, 3, 16)
    assert quantisation_error(z @ rotation(z)) < quantisation_error(z)


def test_itq_alternates_signs_and_procrustes() -> None:
    """One turn from the start that the seed gives, by the polar decomposition instead of the SVD."""
    z, _ = turned_codes(200, 6, 0.4)
    scaled = z / np.linalg.norm(z, axis=1, keepdims=True) * np.sqrt(6)
    start = itq_rotation(z, iterations=0, seed=3)
    m = scaled.T @ np.where(scaled @ start > 0, 1.0, -1.0)
    values, vectors = np.linalg.eigh(m.T @ m)
    polar = m @ vectors @ np.diag(values**-0.5) @ vectors.T
    np.testing.assert_allclose(itq_rotation(z, iterations=1, seed=3), polar, atol=1e-9)


def test_principal_directions_have_the_largest_variances() -> None:
    x = np.random.default_rng(0).normal(size=(300, 10)) @ np.diag(np.linspace(3, 0.1, 10)) + 5
    directions, mean = principal_directions(x, 4)
    np.testing.assert_allclose(mean, x.mean(0))
    _, _, right = np.linalg.svd(x - x.mean(0), full_matrices=False)
    np.testing.assert_allclose(np.abs(np.sum(directions * right[:4].T, axis=0)), 1, atol=1e-9)
    assert principal_directions(np.arange(4.0)[:, None], 1)[0].shape == (1, 1)


def test_hyperplanes_tell_angles_apart() -> None:
    """Bits differ with the probability angle / pi."""
    normals, mean = random_hyperplanes(np.zeros((1, 3)), 20_000, seed=1)
    assert not mean.any()
    a, b = np.array([1.0, 0, 0]), np.array([1.0, 1.0, 0])
    assert ((a @ normals > 0) != (b @ normals > 0)).mean() == pytest.approx(1 / 4, abs=0.01)
    assert (random_hyperplanes(np.zeros((1, 3)), 8, seed=2)[0] != normals[:, :8]).all()


def test_refusals() -> None:
    for bad, said in (([1.0, 2.0], "matrix"), (np.zeros((0, 4)), "matrix"), ([[1.0, np.nan]], "finite")):
        for call in (quantisation_error, itq_rotation, householder_rotation):
            with pytest.raises(ValueError, match=said):
                call(bad)
    with pytest.raises(ValueError, match="3 rows of 5 features have no 4 directions"):
        principal_directions(np.zeros((3, 5)), 4)
    with pytest.raises(ValueError, match="bits must be at least 1"):
        random_hyperplanes(np.zeros((3, 5)), 0)
