"""Measures of how well codes use their bits: balance, entropy and correlation, buckets, distances, and drift.

Good codes have balanced, pairwise uncorrelated bits ("Spectral Hashing", Weiss, Torralba and Fergus, NIPS 2008).
A bit that is constant, or a copy of another, costs room and tells no two items apart. Codes learned from classes are
seldom ideal, since items of one class are meant to share a code: compare these figures between models, or between two
sets of codes of one model.

Shape suffixes: N codes, K bits, W 64-bit words per code, B buckets, D distance values.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hhnet.codes import pad_bytes, unpack_bits
from hhnet.search.kernels import hamming_distances

_Codes = npt.NDArray[np.uint8]
_Counts = npt.NDArray[np.int64]
_Floats = npt.NDArray[np.float64]

_ROWS_PER_BLOCK = 1 << 9  # of them, rows of the distance matrix held at once


@dataclass(frozen=True, slots=True, eq=False)
class CodeHealth:
    """The figures of one set of codes, made by `code_health`. Bits are counted from 0, as in packed codes."""

    bits: int
    """K."""
    count: int
    """N."""
    balance: _Floats
    """float64 (K,): share of the codes in which the bit is 1; 0.5 is balanced."""
    entropy: _Floats
    """float64 (K,), in bits: of each bit by itself, 0 where it is constant, 1 where it is balanced."""
    correlation: _Floats
    """float64 (K, K), symmetric: phi coefficient, Pearson's correlation of two bits; 0 in the rows and columns
    of constant bits, whose correlation is not defined, on the diagonal as well."""
    bucket_codes: _Codes
    """uint8 (B, bytes): the distinct codes, the most frequent first, equally frequent ones by their bytes."""
    bucket_sizes: _Counts
    """int64 (B,): how often each occurs."""
    distances: _Counts
    """int64 (K + 1,): pairs of two codes at Hamming distance 0, 1, ..., K. All 0 for a single code."""
    sampled: int
    """Number of codes whose pairs `distances` counts: all N up to 8,192, else 8,192 distinct rows drawn with a fixed
    seed."""


@dataclass(frozen=True, slots=True, eq=False)
class CodeDrift:
    """The differences between codes `before` and `after`, made by `code_drift`."""

    balance_change: _Floats
    """float64 (K,): share of ones after, less that before."""
    divergence: _Floats
    """float64 (K,), in bits: Jensen-Shannon divergence of each bit's two distributions, from 0 (equal) to 1
    ("Divergence Measures Based on the Shannon Entropy", Lin, IEEE Transactions on Information Theory 37(1), 1991)."""
    distance_variation: float
    """Total variation distance of the distances within either set, half the sum of the absolute differences of their
    shares, from 0 (equal) to 1. NaN where a set has one code, and so no distances."""
    common: int
    """Distinct codes that occur in both."""
    jaccard: float
    """Share of the common codes among all distinct codes of the two sets."""


def code_health(codes: _Codes, bits: int, sample: int = 1 << 13, block: int = 1 << 15) -> CodeHealth:
    """Measure a set of codes: balance, entropy and correlation of bits, buckets of equal codes, distances of pairs.

    Codes are unpacked block by block, so memory beyond the codes is a few words per code. The result depends on the
    order of the codes only in `distances`, and there only where they are sampled.

    Args:
        codes: uint8 (N, ceil(bits / 8)), packed, N at least 1.
        bits: how many bits of each code count; the others of the last byte must be 0.
        sample: how many codes are drawn for the distances, which are those of all their pairs.
        block: codes that are unpacked at once.

    Raises:
        TypeError: if `codes` is not uint8. ValueError: if there is no code, or the width or the unused bits do not
            fit `bits`.
    """
    codes = np.asarray(codes)
    unpack_bits(codes[:1], bits)  # checks their type and shape
    if not len(codes):
        raise ValueError("codes must hold at least one code: got none")
    if bits % 8 and (codes[:, -1] >> bits % 8).any():
        raise ValueError(f"codes of {bits} bits must end in zero bits, see pack_bits: a bit beyond them is set")
    ones_K, differing_KK = _ones_and_differing(codes, bits, block)
    balance_K = ones_K / len(codes)
    bucket_codes, bucket_sizes = _buckets(codes)
    sampled = _sample_codes(codes, sample)
    return CodeHealth(
        bits=bits,
        count=len(codes),
        balance=balance_K,
        entropy=_entropy(balance_K),
        correlation=_phi(ones_K, differing_KK, len(codes)),
        bucket_codes=bucket_codes,
        bucket_sizes=bucket_sizes,
        distances=_pair_distances(sampled, bits),
        sampled=len(sampled),
    )


def code_drift(before: CodeHealth, after: CodeHealth) -> CodeDrift:
    """Compare codes `after` with codes `before`, each as measured by `code_health`.

    With one model for both, a change means that the images changed; with the same images, that the model did.

    Raises:
        ValueError: if the codes differ in their number of bits.
    """
    if before.bits != after.bits:
        raise ValueError(f"codes must have one number of bits to be compared: got {before.bits} and {after.bits}")
    mixed = _entropy((before.balance + after.balance) / 2)
    divergence = np.maximum(mixed - (before.entropy + after.entropy) / 2, 0)  # rounding may end just below 0
    _, occurrences = _buckets(np.concatenate([before.bucket_codes, after.bucket_codes]))
    common = int((occurrences == 2).sum())
    return CodeDrift(
        balance_change=after.balance - before.balance,
        divergence=divergence,
        distance_variation=_variation(before.distances, after.distances),
        common=common,
        jaccard=common / len(occurrences),
    )


def _ones_and_differing(codes: _Codes, bits: int, block: int) -> tuple[_Counts, _Counts]:
    """Count, over all codes, how often each bit is 1, int64 (K,), and how often two bits differ, int64 (K, K).

    A transposed block is K codes with one bit per row; the Hamming distance of two of these is the number of rows where
    the two bits differ.
    """
    ones_K, differing_KK = np.zeros(bits, np.int64), np.zeros((bits, bits), np.int64)
    for start in range(0, len(codes), block):
        block_NK = unpack_bits(codes[start : start + block], bits)
        turned = np.ascontiguousarray(np.packbits(block_NK, axis=0).T)
        ones_K += block_NK.sum(0)
        differing_KK += hamming_distances(turned, turned)
    return ones_K, differing_KK


def _entropy(share_K: _Floats) -> _Floats:
    """Return the binary entropy in bits; p log p is 0 at p = 0."""
    sides = np.stack([share_K, 1 - share_K])
    logs = np.log2(sides, out=np.zeros_like(sides), where=sides > 0)
    entropy_K: _Floats = np.maximum(-(sides * logs).sum(0), 0)  # no -0.0
    return entropy_K


def _phi(ones_K: _Counts, differing_KK: _Counts, num: int) -> _Floats:
    """Return the phi coefficients. Numerators and variances are whole numbers, so equal bits have exactly 1."""
    both_KK = (ones_K[:, None] + ones_K - differing_KK) // 2
    covariance_KK = (num * both_KK - np.outer(ones_K, ones_K)).astype(np.float64)
    spread_K = (ones_K * (num - ones_K)).astype(np.float64)
    scale_KK = np.sqrt(np.outer(spread_K, spread_K))
    phi_KK: _Floats = np.divide(covariance_KK, scale_KK, out=np.zeros_like(scale_KK), where=scale_KK > 0)
    return phi_KK


def _buckets(codes: _Codes) -> tuple[_Codes, _Counts]:
    """Return the distinct codes and how often each occurs, by falling size, then by bytes."""
    words_NW = pad_bytes(codes, 8).view(">u8").astype(np.uint64)  # big endian: ordered as the bytes are
    order = np.lexsort(words_NW.T[::-1])
    words_NW = words_NW[order]
    first_N = np.concatenate([[True], (words_NW[1:] != words_NW[:-1]).any(1)])
    starts_B = np.flatnonzero(first_N)
    sizes_B = np.diff(starts_B, append=len(codes))
    rank_B = np.argsort(-sizes_B, kind="stable")
    return codes[order[starts_B[rank_B]]], sizes_B[rank_B]


def _sample_codes(codes: _Codes, count: int) -> _Codes:
    if len(codes) <= count:
        return codes
    random = np.random.Generator(np.random.Philox(0))  # a fixed seed: the same codes give the same figures
    return codes[np.sort(random.choice(len(codes), count, replace=False, shuffle=False))]


def _pair_distances(codes: _Codes, bits: int) -> _Counts:
    counts_D = np.zeros(bits + 1, np.int64)
    for start in range(0, len(codes), _ROWS_PER_BLOCK):
        distances = hamming_distances(codes[start : start + _ROWS_PER_BLOCK], codes)
        counts_D += np.bincount(distances.ravel(), minlength=bits + 1)
    counts_D[0] -= len(codes)  # each code with itself
    return counts_D // 2  # each pair was met from both its ends


def _variation(before_D: _Counts, after_D: _Counts) -> float:
    if not before_D.any() or not after_D.any():
        return float("nan")
    return float(np.abs(after_D / after_D.sum() - before_D / before_D.sum()).sum() / 2)
