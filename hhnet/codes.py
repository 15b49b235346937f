"""Packed binary codes.

Bit j of a code lies in byte j // 8 at place j % 8 counted from the least significant bit, the order of
`numpy.packbits(..., bitorder="little")`. Codes whose length is no multiple of 8 end in zero bits.

Shape suffixes: N samples, K bits.
"""

import numpy as np
import numpy.typing as npt


def sign_bits(z_NK: npt.ArrayLike) -> npt.NDArray[np.bool_]:
    """Binarise real codes: bit j is set where output j is > 0, so exactly zero gives an unset bit.

    Args:
        z_NK: real codes, shape (N, K), any float dtype.

    Returns:
        bool (N, K).

    Raises:
        ValueError: if `z_NK` is not two-dimensional or holds NaN (a NaN would silently become 0).
    """
    array = np.asarray(z_NK)
    if array.ndim != 2:
        raise ValueError(f"real codes must have shape (N, K): got {array.shape}")
    if np.isnan(array).any():
        raise ValueError("real codes must be numbers: got NaN; check the model's weights and the images")
    return array > 0


def pack_bits(bits: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint8]:
    """Pack bits into bytes, little bit order.

    Args:
        bits: bool (N, K).

    Returns:
        uint8 (N, ceil(K / 8)), C-contiguous; the unused high bits of the last byte are zero.

    Raises:
        TypeError: if `bits` is not bool. ValueError: if it is not two-dimensional.
    """
    bits = np.asarray(bits)
    if bits.dtype != np.bool_:
        raise TypeError(f"bits must be bool, for instance reals > 0: got {bits.dtype}")
    if bits.ndim != 2:
        raise ValueError(f"bits must have shape (N, K): got {bits.shape}")
    return np.packbits(bits, axis=1, bitorder="little")


def unpack_bits(codes: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.bool_]:
    """Unpack bytes into bits, the inverse of `pack_bits`.

    Args:
        codes: uint8 (N, ceil(bits / 8)).
        bits: how many bits of each code count.

    Returns:
        bool (N, bits).

    Raises:
        TypeError: if `codes` is not uint8. ValueError: if the width of `codes` does not fit `bits`.
    """
    codes = np.asarray(codes)
    if codes.dtype != np.uint8:
        raise TypeError(f"codes must be uint8: got {codes.dtype}")
    if codes.ndim != 2:
        raise ValueError(f"codes must have shape (N, bytes): got {codes.shape}")
    if bits < 1 or codes.shape[1] != (bits + 7) // 8:
        raise ValueError(f"codes of {bits} bits take {(bits + 7) // 8} bytes: got {codes.shape[1]} bytes")
    return np.unpackbits(codes, axis=1, count=bits, bitorder="little").astype(np.bool_)


def pad_bytes(rows: npt.NDArray[np.uint8], size: int) -> npt.NDArray[np.uint8]:
    """Return uint8 (N, bytes) with zero bytes appended to each row, up to a multiple of `size` bytes."""
    return np.pad(np.ascontiguousarray(rows), ((0, 0), (0, -rows.shape[1] % size)))
