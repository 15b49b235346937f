"""Real codes: a network's outputs as int8, stored beside the bits to re-rank a short list of Hamming neighbours.

A code says on which side of zero each output lies, a real code also how far. The distance is asymmetric: the query's
outputs at full precision are compared with the stored real codes of the database.

Shape suffixes: N samples, Q queries, K bits.
"""

import numpy as np
import numpy.typing as npt

MAX_REAL_CODE = 127
"""Magnitude of the largest quantised output of each row."""

RealCodes = npt.NDArray[np.int8]


def quantise_real_codes(z_NK: npt.ArrayLike) -> RealCodes:
    """Quantise outputs to int8, each row by its own scale: round(127 z / max |z|), and never to 0 where z is not 0.

    So value j is > 0 exactly where bit j of `sign_bits` is set. The scale of a row is not kept: the losses here train
    angles, and an angle does not depend on it.

    Args:
        z_NK: real codes, shape (N, K), any float dtype.

    Returns:
        int8 (N, K) from -127 to 127; a row of zeros stays one.

    Raises:
        ValueError: if `z_NK` is not two-dimensional or not finite.
    """
    array_NK = np.asarray(z_NK, np.float64)
    if array_NK.ndim != 2:
        raise ValueError(f"real codes must have shape (N, K): got {array_NK.shape}")
    if not np.isfinite(array_NK).all():
        raise ValueError("real codes must be finite to become int8: check the model's weights and the images")
    largest_N1 = np.abs(array_NK).max(axis=1, keepdims=True, initial=0.0)
    scaled_NK = np.rint(MAX_REAL_CODE * (array_NK / np.where(largest_N1 > 0, largest_N1, 1)))
    return np.where(scaled_NK == 0, np.sign(array_NK), scaled_NK).astype(np.int8)


def saturate(z_NK: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Compress outputs or real codes for comparison: tanh(z / r), with r the root mean square of the row.

    An output far from zero says little more than its bit. Without the tanh, the few largest outputs of a row decide the
    order, and long lists come out worse than by the bits alone (`docs/experiments.md` has the figures).

    Args:
        z_NK: outputs, or int8 of them, shape (N, K).

    Returns:
        float64 (N, K) from -1 to 1; a row of zeros stays one.
    """
    array_NK = np.asarray(z_NK, np.float64)
    size_N1 = np.sqrt((array_NK * array_NK).mean(axis=1, keepdims=True))
    return np.tanh(array_NK / np.where(size_N1 > 0, size_N1, 1))


def asymmetric_distances(query_K: npt.ArrayLike, codes_NK: RealCodes) -> npt.NDArray[np.float32]:
    """Return 1 - cos of the angle between one query's outputs and each row of real codes, both saturated, from 0 to 2.

    The distance depends on the two rows alone: equal rows have equal distances wherever they stand. A row of zeros has
    no direction and is at 1.

    Args:
        query_K: the query's outputs, or int8 of them, shape (K,).
        codes_NK: int8 (N, K).

    Returns:
        float32 (N,).

    Raises:
        TypeError: if `codes_NK` is not int8. ValueError: if the shapes do not fit or the query is not finite.

    Source: "Asymmetric Distances for Binary Embeddings" (Gordo et al., TPAMI 2014), with 8 bits instead of one for
    each output of the database.
    """
    query, codes = np.asarray(query_K, np.float64), np.asarray(codes_NK)
    if codes.dtype != np.int8:
        raise TypeError(f"real codes must be int8: got {codes.dtype}")
    if query.ndim != 1 or codes.ndim != 2 or codes.shape[1] != len(query):
        raise ValueError(f"a query (K,) and real codes (N, K) are needed: got {query.shape} and {codes.shape}")
    if not np.isfinite(query).all():
        raise ValueError("the query's outputs must be finite")
    query, rows_NK = saturate(query[None])[0], saturate(codes)
    norm_N = np.linalg.norm(query) * np.sqrt((rows_NK * rows_NK).sum(1))
    # Rounded to float32, which hides in what order the products were added.
    cosine_N: npt.NDArray[np.float64] = (rows_NK * query).sum(1) / np.where(norm_N > 0, norm_N, 1)
    return np.clip(1 - cosine_N, 0, 2).astype(np.float32)
