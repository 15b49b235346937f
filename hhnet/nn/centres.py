"""Binary codes that lie far apart: targets for centre-based losses, and the margin such codes allow.

Shape suffixes: C classes, K bits.
"""

import math

import numpy as np
import numpy.typing as npt

from hhnet.nn._linear_codes import MAX_TABLE_DIMENSION, as_bits, generator, minimum_distance

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
_MAX_BITS = 128
_MAX_SHUFFLED_BITS = 20  # dimension up to which all words are held in memory
_MAX_LEXICODE_CHECK_BITS = 16  # check bits up to which all sums of check columns are held in memory
_MAX_GREEDY_DIMENSION = 14  # a greedy code of more takes seconds and is no better than a random one
_RANDOM_CODES_TRIED = 16  # random codes tried for a large distance
_WORDS_PER_CHUNK = 1 << 16  # words made at once


def code_distance(bits: int, dimension: int) -> int:
    """Return a minimum distance that a binary linear [bits, dimension] code is known to reach.

    It is the best known value for multiples of 8 up to 128 bits and dimensions up to 16. Other lengths are put together
    from shorter codes side by side, whose distances add up; larger dimensions use the Gilbert-Varshamov bound. Both are
    lower bounds.
    """
    if not 1 <= dimension <= bits:
        raise ValueError(f"a code of {bits} bits has a dimension from 1 to {bits}: got {dimension}")
    if dimension > len(_BEST_DISTANCE[_MAX_BITS]) or bits < 8:
        return _gilbert_varshamov(bits, dimension)
    whole, rest = divmod(bits, _MAX_BITS)
    rest -= rest % 8
    distance = whole * _BEST_DISTANCE[_MAX_BITS][dimension - 1]
    if rest and dimension <= rest:
        distance += _BEST_DISTANCE[rest][dimension - 1]
    return max(distance, _gilbert_varshamov(bits, dimension))


def _gilbert_varshamov(bits: int, dimension: int) -> int:
    """Return the largest d with sum over i < d - 1 of binomial(bits - 1, i) < 2^(bits - dimension)."""
    total, term, distance = 1, 1, 1
    while distance < bits and total < 2 ** (bits - dimension):
        term = term * (bits - distance) // distance
        total += term
        distance += 1
    return distance


def margin(bits: int, classes: int) -> float:
    """Return the cosine below which two different classes need not be pushed further apart.

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


def hash_centres(classes: int, bits: int, seed: int = 0, *, orthogonal: bool = False) -> npt.NDArray[np.int8]:
    """Return distinct codes of +-1, one per class, with a large minimum Hamming distance.

    Up to 2^10 classes they are words of the best binary linear code [K, ceil(log2 C)] known here. Where classes <= 2 K
    and a Hadamard matrix H of order K is at hand, they are rows of [H; -H] if these are farther apart: any two rows
    differ in K / 2 bits or in all. H is at hand for powers of two, for p + 1 with primes p = 3 mod 4, and for doublings
    of both. The distance is at least the Gilbert-Varshamov bound; `docs/losses.md` compares it with the best known.
    Without a Hadamard matrix, CSQ (yuanli2333/Hadamard-Matrix-for-hashing README) takes random codes, which lie closer
    together.

    Beyond 2^10 classes the code is a lexicode, if K exceeds ceil(log2 C) by at most 16; it reaches the bound too.
    Otherwise its columns are chosen greedily, up to 2^14 classes and 128 bits, or it is a random linear code, the best
    of several up to 2^20 classes.

    Args:
        classes: C, at most 2^bits.
        bits: K, any number.
        seed: chooses the words and their order, not the code; the same arguments always give the same centres.
        orthogonal: prefer rows of a Hadamard matrix, as CSQ and OrthoHash do, even where a code would be farther apart:
            for 16 classes at 64 bits by a bit.

    Returns:
        int8 (C, K) of -1 and +1.

    Raises:
        ValueError: if `bits` cannot tell `classes` apart.
    """
    _check(classes, bits)
    rng = np.random.default_rng(seed)
    hadamard = _hadamard(bits) if classes <= 2 * bits else None
    if hadamard is not None and orthogonal:
        return _hadamard_rows(hadamard, classes, rng)
    dimension = max(1, (classes - 1).bit_length())
    if dimension > MAX_TABLE_DIMENSION and 0 < bits - dimension <= _MAX_LEXICODE_CHECK_BITS:
        code = _lexicode(bits, dimension)
    elif dimension <= MAX_TABLE_DIMENSION or (dimension <= _MAX_GREEDY_DIMENSION and bits <= _MAX_BITS):
        code = generator(bits, dimension)
    else:
        code = _random_code(bits, dimension)
    if hadamard is not None and bits // 2 > minimum_distance(code):
        return _hadamard_rows(hadamard, classes, rng)
    return _words(_messages(classes, dimension, rng), code)


def _hadamard_rows(hadamard: npt.NDArray[np.int64], classes: int, rng: np.random.Generator) -> npt.NDArray[np.int8]:
    """Return `classes` rows of [H; -H] in a random order, of H alone where there are enough."""
    rows = hadamard[rng.permutation(len(hadamard))]
    return np.concatenate([rows, -rows])[:classes].astype(np.int8)


def _hadamard(order: int) -> npt.NDArray[np.int64] | None:
    """Return a Hadamard matrix of that order by Sylvester's doubling or Paley's first construction, or None."""
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


def _messages(classes: int, dimension: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Return distinct numbers of `dimension` bits, in a random order."""
    if dimension <= _MAX_SHUFFLED_BITS:
        return rng.permutation(2**dimension)[:classes]
    # XOR with a constant keeps the numbers distinct and, in a linear code, all distances between their words. There are
    # more classes than 2^(dimension - 1): the lower half is permuted, and another part of the upper half is taken.
    return np.arange(classes) ^ int(rng.integers(2 ** (dimension - 1)))


def _lexicode(bits: int, dimension: int) -> npt.NDArray[np.int64]:
    """Return a generator of the code whose check columns are chosen greedily, int64 (k, K).

    The distance is d if no d - 1 columns of the check matrix add up to 0. So after the unit columns, each column is the
    first number that is not a sum of up to d - 2 earlier ones. This is the proof of the Gilbert-Varshamov bound; d
    begins above it and falls until there are enough columns.
    """
    checks, least = bits - dimension, _gilbert_varshamov(bits, dimension)
    tries = (_independent(dimension, checks, wanted - 2) for wanted in range(least + 2, least - 1, -1))
    columns = next(found for found in tries if found is not None)  # the bound promises one
    return np.concatenate([np.eye(dimension, dtype=np.int64), as_bits(np.array(columns), checks)], axis=1)


def _independent(num: int, checks: int, sums: int) -> list[int] | None:
    """Choose `num` columns of `checks` bits, none a sum of up to `sums` others or unit columns; None if there are
    none."""
    reached = np.zeros((sums + 1, 2**checks), dtype=bool)  # [s, x]: whether x is a sum of up to s columns
    reached[:, 0] = True
    numbers = np.arange(2**checks)
    columns: list[int] = []
    for place in range(checks + num):
        free = np.flatnonzero(~reached[sums]) if place >= checks else [1 << place]
        if not len(free):
            return None
        column = int(free[0])
        columns.append(column)
        for count in range(sums, 0, -1):
            reached[count] |= reached[count - 1][numbers ^ column]
    return columns[checks:]


def _random_code(bits: int, dimension: int) -> npt.NDArray[np.int64]:
    """Return a systematic generator with random further columns, int64 (k, K).

    Of several draws the best is kept, where the distance can be computed.
    """
    rng, wanted = np.random.default_rng(0), _gilbert_varshamov(bits, dimension)
    unit = np.eye(dimension, dtype=np.int64)
    best, reached = unit, -1
    for _ in range(_RANDOM_CODES_TRIED):
        draw = np.concatenate([unit, rng.integers(0, 2, (dimension, bits - dimension))], axis=1)
        found = minimum_distance(draw) if dimension <= _MAX_SHUFFLED_BITS else wanted
        if found > reached:
            best, reached = draw, found
        if reached >= wanted:
            break
    return best


def _words(messages: npt.NDArray[np.int64], code: npt.NDArray[np.int64]) -> npt.NDArray[np.int8]:
    """Return the words of the messages as +-1, int8 (C, K)."""
    words = np.empty((len(messages), code.shape[1]), np.int8)
    # As float32 the product is one of BLAS, which numpy lacks for integers; sums of up to 2^24 ones are exact.
    factor = code.astype(np.float32)
    for start in range(0, len(messages), _WORDS_PER_CHUNK):
        chunk = as_bits(messages[start : start + _WORDS_PER_CHUNK], len(code)).astype(np.float32) @ factor
        words[start : start + _WORDS_PER_CHUNK] = chunk.astype(np.int16) % 2 * 2 - 1
    return words
