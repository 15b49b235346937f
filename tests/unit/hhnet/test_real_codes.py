"""Real codes keep the side of zero that their bit says; distances are those of plain floats."""

import math

import numpy as np
import pytest

from hhnet import asymmetric_distances, quantise_real_codes, saturate
from hhnet.codes import sign_bits


def outputs(rows: int, bits: int, seed: int = 0) -> np.ndarray:
    """Outputs of very different sizes: most of a row would be rounded to 0."""
    random = np.random.default_rng(seed)
    return random.standard_normal((rows, bits)) * 10.0 ** random.integers(-12, 6, (rows, bits))


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_every_real_code_is_on_the_side_of_its_bit(kind: type) -> None:
    z = outputs(300, 40).astype(kind)
    z[:, 0] = 0.0
    z[0] = [np.finfo(kind).tiny, -np.finfo(kind).tiny] * 20
    codes = quantise_real_codes(z)
    assert codes.dtype == np.int8
    assert ((codes > 0) == sign_bits(z)).all()
    assert ((codes < 0) == (z < 0)).all() and (codes[1:, 0] == 0).all()


def test_each_row_has_its_own_scale_and_the_nearest_step() -> None:
    z = np.random.default_rng(1).standard_normal((50, 16))
    codes = quantise_real_codes(z)
    assert (np.abs(codes).max(1) == 127).all()
    large = np.abs(z) * 127 > np.abs(z).max(1, keepdims=True)
    error = codes / 127 - z / np.abs(z).max(1, keepdims=True)
    assert np.abs(error[large]).max() <= 0.5 / 127 + 1e-12
    assert (quantise_real_codes(z * 1e-30) == codes).all()


def test_real_codes_of_real_codes_are_the_same() -> None:
    codes = quantise_real_codes(outputs(100, 24))
    assert (quantise_real_codes(codes) == codes).all()


def test_no_outputs_have_no_direction() -> None:
    assert (quantise_real_codes(np.zeros((2, 8))) == 0).all()
    assert quantise_real_codes(np.empty((0, 8))).shape == (0, 8)
    assert asymmetric_distances(np.ones(8), np.zeros((2, 8), np.int8)).tolist() == [1, 1]
    assert asymmetric_distances(np.zeros(8), np.ones((2, 8), np.int8)).tolist() == [1, 1]


def squashed(row: list[float]) -> list[float]:
    size = math.sqrt(math.fsum(z * z for z in row) / len(row))
    return [math.tanh(z / size) for z in row]


def test_distances_are_one_less_the_cosine_of_what_is_saturated() -> None:
    query = np.random.default_rng(2).standard_normal(12).astype(np.float32)
    codes = np.random.default_rng(3).integers(-127, 128, (40, 12)).astype(np.int8)
    found = asymmetric_distances(query, codes)
    assert found.dtype == np.float32
    first = squashed(query.tolist())
    for distance, row in zip(found.tolist(), map(squashed, codes.tolist()), strict=True):
        dot = math.fsum(a * b for a, b in zip(first, row, strict=True))
        norms = math.sqrt(math.fsum(a * a for a in first) * math.fsum(b * b for b in row))
        assert distance == pytest.approx(1 - dot / norms, abs=1e-6)
    assert 0 <= asymmetric_distances(codes[3], codes)[3] < 1e-6
    assert 2 - 1e-6 < asymmetric_distances(-codes[3], codes)[3] <= 2


def test_saturation_knows_no_scale() -> None:
    z = np.random.default_rng(7).standard_normal((30, 24))
    np.testing.assert_allclose(saturate(1e9 * z), saturate(z))
    np.testing.assert_allclose(saturate(quantise_real_codes(z)), saturate(z), atol=0.02)
    assert (saturate(np.zeros((2, 8))) == 0).all()


def test_equal_real_codes_are_equally_far_wherever_they_stand() -> None:
    query, row = np.random.default_rng(4).standard_normal(19), quantise_real_codes(outputs(1, 19))
    found = asymmetric_distances(query, np.repeat(row, 1001, axis=0))
    assert len(set(found.tolist())) == 1
    assert asymmetric_distances(query, row)[0] == found[0]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(N, K\)"):
        quantise_real_codes(np.zeros(3))
    for bad in (np.nan, np.inf):
        with pytest.raises(ValueError, match="must be finite"):
            quantise_real_codes(np.array([[1.0, bad]]))
        with pytest.raises(ValueError, match="must be finite"):
            asymmetric_distances(np.array([1.0, bad]), np.zeros((1, 2), np.int8))
    with pytest.raises(ValueError, match=r"got \(3,\) and \(1, 2\)"):
        asymmetric_distances(np.zeros(3), np.zeros((1, 2), np.int8))
    with pytest.raises(TypeError, match="must be int8"):
        asymmetric_distances(np.zeros(2), np.zeros((1, 2), np.uint8))
