"""Packed codes: bit order, round trip, refusals."""

import numpy as np
import pytest

from hhnet.codes import pack_bits, sign_bits, unpack_bits


def test_bit_order_is_little() -> None:
    bits = np.zeros((3, 16), bool)
    bits[0, 0] = bits[1, 7] = bits[2, 9] = True
    assert pack_bits(bits).tolist() == [[1, 0], [128, 0], [0, 2]]


def test_odd_lengths_are_padded_with_zero_bits() -> None:
    assert pack_bits(np.ones((1, 11), bool)).tolist() == [[255, 0b00000111]]


@pytest.mark.parametrize("bits", [1, 7, 8, 12, 64, 100])
def test_round_trip(bits: int) -> None:
    original = np.random.default_rng(bits).random((20, bits)) < 0.5
    codes = pack_bits(original)
    assert codes.dtype == np.uint8 and codes.shape == (20, -(-bits // 8)) and codes.flags.c_contiguous
    restored = unpack_bits(codes, bits)
    assert restored.dtype == np.bool_
    np.testing.assert_array_equal(restored, original)


def test_no_codes() -> None:
    assert pack_bits(np.zeros((0, 16), bool)).shape == (0, 2)
    assert unpack_bits(np.zeros((0, 2), np.uint8), 16).shape == (0, 16)


def test_zero_is_no_bit() -> None:
    assert sign_bits(np.array([[0.0, -0.0, 1e-30, -1.0]])).tolist() == [[False, False, True, False]]


def test_refusals() -> None:
    with pytest.raises(ValueError, match="NaN"):
        sign_bits(np.array([[np.nan]]))
    with pytest.raises(ValueError, match=r"\(N, K\)"):
        sign_bits(np.zeros(3))
    with pytest.raises(TypeError, match="bool"):
        pack_bits(np.zeros((2, 8), np.int8))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"\(N, K\)"):
        pack_bits(np.zeros(8, bool))
    with pytest.raises(TypeError, match="uint8"):
        unpack_bits(np.zeros((2, 1), np.int8), 8)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="17 bits take 3 bytes: got 2"):
        unpack_bits(np.zeros((2, 2), np.uint8), 17)
    with pytest.raises(ValueError, match="bytes"):
        unpack_bits(np.zeros(2, np.uint8), 8)
