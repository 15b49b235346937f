"""Binary codes that lie far apart: targets for centre-based losses, and the margin such codes allow.

Shape suffixes: C classes, K bits, M messages of a linear code, P candidate columns.
"""

import math

import numpy as np
import numpy.typing as npt

# Best known minimum distance d of a binary linear [K, k] code, k = 1, 2, ... 16 (as far as k <= K), for every
# K that is a multiple of 8 up to 128 (Grassl's codetables.de, after the copy in Lucas-Schwengber/h2q
# `data/codetable.csv`, which stores 1 - 2 d / K).
_BEST_DISTANCE: dict[int, tuple[int, ...]] = {
    8: (8, 5, 4, 4, 2, 2, 2, 1),
    16: (16, 10, 8, 8, 8, 6, 6, 5, 4, 4, 4, 2, 2, 2, 2, 1),
    24: (24, 16, 13, 12, 12, 10, 10, 8, 8, 8, 8, 8, 6, 6, 4, 4),
    32: (32, 21, 18, 16, 16, 16, 14, 13, 12, 12, 12, 10, 10, 8, 8, 8),
    40: (40, 26, 22, 20, 20, 18, 18, 16, 16, 16, 15, 14, 14, 12, 12, 12),
    48: (48, 32, 27, 24, 24, 24, 22, 22, 20, 20, 18, 18, 17, 16, 16, 16),
    56: (56, 37, 32, 29, 28, 28, 26, 24, 24, 24, 23, 22, 21, 20, 20, 20),
    64: (64, 42, 36, 33, 32, 32, 32, 29, 28, 28, 26, 26, 25, 24, 24, 24),
    72: (72, 48, 40, 38, 36, 35, 34, 32, 32, 32, 32, 30, 29, 28, 28, 27),
    80: (80, 53, 45, 42, 40, 40, 38, 37, 36, 36, 34, 33, 33, 32, 32, 31),
    88: (88, 58, 50, 46, 44, 44, 42, 41, 40, 40, 39, 38, 37, 36, 35, 34),
    96: (96, 64, 54, 50, 48, 48, 48, 46, 44, 44, 42, 41, 41, 40, 39, 38),
    104: (104, 69, 59, 55, 52, 52, 51, 49, 48, 48, 46, 45, 45, 44, 43, 42),
    112: (112, 74, 64, 59, 56, 56, 56, 54, 52, 52, 50, 49, 49, 48, 46, 46),
    120: (120, 80, 68, 64, 61, 60, 60, 58, 56, 56, 55, 53, 52, 52, 51, 50),
    128: (128, 85, 72, 68, 64, 64, 64, 64, 60, 60, 58, 57, 57, 56, 56, 54),
}
_LONGEST = 128
_MAX_DIMENSION = 16
_MAX_SHUFFLED_BITS = 20  # all codes of this length fit into memory
# Above this dimension a code has too many words to weigh all of them against all columns.
_SEARCH_CELLS = 1 << 22


def code_distance(bits: int, dimension: int) -> int:
    """Minimum distance that a binary linear [bits, dimension] code is known to reach.

    The best known value for multiples of 8 up to 128 bits and dimension up to 16. Other lengths are put
    together from shorter codes side by side, whose distances add up, and larger dimensions use the
    Gilbert-Varshamov bound: both are lower bounds.
    """
    if not 1 <= dimension <= bits:
        raise ValueError(f"a code of {bits} bits has a dimension from 1 to {bits}: got {dimension}")
    if dimension > _MAX_DIMENSION or bits < 8:
        return _gilbert_varshamov(bits, dimension)
    whole, rest = divmod(bits, _LONGEST)
    rest -= rest % 8
    distance = whole * _BEST_DISTANCE[_LONGEST][dimension - 1]
    if rest and dimension <= rest:
        distance += _BEST_DISTANCE[rest][dimension - 1]
    return max(distance, _gilbert_varshamov(bits, dimension))


def _gilbert_varshamov(bits: int, dimension: int) -> int:
    """Largest d with sum over i < d - 1 of binomial(bits - 1, i) < 2^(bits - dimension)."""
    total, term, distance = 1, 1, 1
    while distance < bits and total < 2 ** (bits - dimension):
        term = term * (bits - distance) // distance
        total += term
        distance += 1
    return distance


def margin(bits: int, classes: int) -> float:
    """Cosine below which two different classes need not be pushed further apart.

    zeta = 1 - 2 d / K with d the minimum distance of the best known [K, ceil(log2 C)] code, as in HyP2, HHF
    and CEL (Lucas-Schwengber/h2q `losses.py`). -1 for one or two classes, which may be opposite.

    Raises:
        ValueError: if `bits` cannot tell `classes` apart.
    """
    _check(classes, bits)
    return 1 - 2 * code_distance(bits, max(1, (classes - 1).bit_length())) / bits


def _check(classes: int, bits: int) -> None:
    if bits < 1 or classes < 1:
        raise ValueError(f"there must be at least 1 class and 1 bit: got classes={classes}, bits={bits}")
    if classes > 2**bits:
        raise ValueError(f"{bits} bits tell at most {2**bits} classes apart: got {classes}; use more bits")


def hash_centres(classes: int, bits: int, seed: int = 0) -> npt.NDArray[np.int8]:
    """Distinct codes of +-1, one per class, with a large minimum Hamming distance.

    Where a Hadamard matrix H of order `bits` is at hand (powers of two, and p + 1 for primes p = 3 mod 4, and
    doublings of both) and classes <= 2 * bits, the centres are rows of [H; -H], of H alone if classes <=
    bits: any two differ in bits / 2 or in all bits, as in CSQ (yuanli2333/Hadamard-Matrix-for-hashing
    README). Otherwise they are words of a linear code whose columns are chosen greedily to leave no word
    light, and beyond 2^16 classes distinct random codes. CSQ falls back to random codes in both cases, which
    lie closer together.

    Args:
        classes: C, at most 2^bits.
        bits: K, any number.
        seed: chooses among equivalent results; the same arguments always give the same centres.

    Returns:
        int8 (C, K) of -1 and +1.

    Raises:
        ValueError: if `bits` cannot tell `classes` apart.
    """
    _check(classes, bits)
    rng = np.random.default_rng(seed)
    hadamard = _hadamard(bits) if classes <= 2 * bits else None
    dimension = max(1, (classes - 1).bit_length())
    if hadamard is not None:
        rows = hadamard[rng.permutation(bits)]
        centres = np.concatenate([rows, -rows])[:classes]
    elif dimension <= _MAX_DIMENSION:
        generator = _search_generator(bits, dimension, rng)
        messages = rng.permutation(2**dimension)[:classes]
        words = _messages_as_bits(messages, dimension) @ generator % 2
        centres = words * 2 - 1
    else:
        centres = _random_rows(classes, bits, rng)
    return centres.astype(np.int8)


def _hadamard(order: int) -> npt.NDArray[np.int64] | None:
    """A Hadamard matrix of that order by Sylvester's doubling or Paley's first construction, or None."""
    if order in (1, 2):
        return np.array([[1, 1], [1, -1]])[:order, :order]
    if order % 4:
        return None
    half = _hadamard(order // 2)
    if half is not None:
        return np.block([[half, half], [half, -half]])
    prime = order - 1
    if any(prime % factor == 0 for factor in range(2, math.isqrt(prime) + 1)):
        return None
    residue = np.full(prime, -1)
    residue[np.arange(1, prime) ** 2 % prime] = 1
    residue[0] = 0
    skew = np.zeros((order, order), np.int64)
    skew[0, 1:], skew[1:, 0] = 1, -1
    skew[1:, 1:] = residue[np.subtract.outer(np.arange(prime), np.arange(prime)) % prime]
    return skew + np.eye(order, dtype=np.int64)


def _messages_as_bits(messages: npt.NDArray[np.int64], dimension: int) -> npt.NDArray[np.int64]:
    return messages[:, None] >> np.arange(dimension) & 1


def _search_generator(bits: int, dimension: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Columns of a [bits, dimension] code, int64 (dimension, bits) of 0 and 1.

    The distance of a linear code is the least weight of its words. Starting from the unit columns, which keep
    all words distinct, each further column is the one that lowers sum over words of 2^-weight most: light
    words count most. Then columns are exchanged while that helps.
    """
    if dimension == bits:
        return np.eye(bits, dtype=np.int64)
    words_M = _messages_as_bits(np.arange(1, 2**dimension), dimension)
    num = min(2**dimension - 1, max(dimension, _SEARCH_CELLS >> dimension))
    candidates = rng.permutation(np.arange(1, 2**dimension))[:num]
    candidates = np.concatenate([1 << np.arange(dimension), candidates])
    # bool (M, P): the bit that candidate column p adds to word m.
    adds_MP = words_M.astype(np.float32) @ _messages_as_bits(candidates, dimension).T.astype(np.float32) % 2
    chosen = list(range(dimension))
    weight_M = adds_MP[:, chosen].sum(1)
    while len(chosen) < bits:
        chosen.append(_best_column(adds_MP, weight_M))
        weight_M += adds_MP[:, chosen[-1]]
    for _ in range(2):
        _exchange(adds_MP, weight_M, chosen, dimension)
    return _messages_as_bits(candidates[np.array(chosen)], dimension).T


def _best_column(adds_MP: npt.NDArray[np.float32], weight_M: npt.NDArray[np.float32]) -> int:
    light_M = np.exp2(weight_M.min() - weight_M)
    return int(np.argmax(light_M @ adds_MP))


def _exchange(
    adds_MP: npt.NDArray[np.float32], weight_M: npt.NDArray[np.float32], chosen: list[int], fixed: int
) -> None:
    """One pass over the columns after the first `fixed`: replace each by the best one; changes both in
    place."""
    for place in range(fixed, len(chosen)):
        weight_M -= adds_MP[:, chosen[place]]
        chosen[place] = _best_column(adds_MP, weight_M)
        weight_M += adds_MP[:, chosen[place]]


def _random_rows(classes: int, bits: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Distinct random rows of +-1."""
    if bits <= _MAX_SHUFFLED_BITS:
        return _messages_as_bits(rng.permutation(2**bits)[:classes], bits) * 2 - 1
    packed = np.empty((0, (bits + 7) // 8), np.uint8)
    while len(packed) < classes:  # draws repeat seldom here: keep the first of each
        more = np.packbits(rng.integers(0, 2, (classes, bits), np.uint8), axis=1)
        packed = np.concatenate([packed, more])
        _, first = np.unique(packed, axis=0, return_index=True)
        packed = packed[np.sort(first)]
    rows = np.unpackbits(packed[:classes], axis=1, count=bits)
    return rows.astype(np.int64) * 2 - 1
