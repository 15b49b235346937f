"""Code health against the definitions, on unpacked bits."""

import math
from collections import Counter

import numpy as np
import numpy.typing as npt
import pytest

from hhnet import code_drift, code_health, pack_bits
from hhnet.health import CodeHealth

Bits = npt.NDArray[np.bool_]

WIDTHS = [1, 5, 8, 24, 64, 100, 256]


def lopsided(num: int, bits: int, seed: int = 0) -> Bits:
    """Bits of all shares of ones, correlated, with repeated codes and, where there is room, constant and equal bits."""
    random = np.random.default_rng([seed, bits])
    shared = random.random((num, 1)) < 0.3
    out = (random.random((num, bits)) < random.random(bits)) ^ (shared & (random.random(bits) < 0.5))
    out[num // 2 : num // 2 + num // 5] = out[0]
    if bits >= 5:
        out[:, 1], out[:, 2], out[:, 3], out[:, 4] = False, True, out[:, 0], ~out[:, 0]
    return out


def entropy(share: float) -> float:
    return -sum(p * math.log2(p) for p in (share, 1 - share) if p > 0)


@pytest.fixture(params=WIDTHS)
def bits(request: pytest.FixtureRequest) -> Bits:
    return lopsided(700, request.param)


def measured(bits: Bits, **options: int) -> CodeHealth:
    """The health of codes that are unpacked in blocks which do not divide them."""
    return code_health(pack_bits(bits), bits.shape[1], block=256, **options)


def test_balance_and_entropy(bits: Bits) -> None:
    found = measured(bits)
    assert (found.bits, found.count) == (bits.shape[1], 700)
    np.testing.assert_allclose(found.balance, bits.mean(0), atol=1e-15)
    np.testing.assert_allclose(found.entropy, [entropy(share) for share in bits.mean(0)], atol=1e-12)
    constant = bits.all(0) | ~bits.any(0)
    assert (found.entropy[constant] == 0).all() and not np.signbit(found.entropy).any()
    assert bits.shape[1] < 5 or constant.sum() >= 2


def test_correlation_is_pearsons_and_0_for_constant_bits(bits: Bits) -> None:
    found = measured(bits).correlation
    moving = bits.any(0) & ~bits.all(0)
    expected = np.zeros((bits.shape[1],) * 2)
    expected[np.ix_(moving, moving)] = np.corrcoef(bits[:, moving].astype(float), rowvar=False)
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert (found.diagonal() == moving).all()
    if bits.shape[1] >= 5:  # equal and opposite bits, to the last digit
        assert (found[0, 3], found[4, 0]) == (1, -1)


def test_buckets(bits: Bits) -> None:
    codes = pack_bits(bits)
    found = code_health(codes, bits.shape[1])
    expected = sorted(Counter(code.tobytes() for code in codes).items(), key=lambda entry: (-entry[1], entry[0]))
    assert [code.tobytes() for code in found.bucket_codes] == [code for code, _ in expected]
    assert found.bucket_sizes.tolist() == [size for _, size in expected]
    assert found.bucket_sizes.dtype == np.int64 and found.bucket_codes.shape[1] == codes.shape[1]


def test_codes_that_share_a_word_are_distinct() -> None:
    codes = np.zeros((5, 16), np.uint8)
    codes[1:3, 0], codes[3, 15] = 7, 7
    found = code_health(codes, 128)
    assert found.bucket_sizes.tolist() == [2, 2, 1]
    np.testing.assert_array_equal(found.bucket_codes, codes[[0, 1, 3]])


def pair_counts(bits: Bits) -> list[int]:
    different = (bits[:, None] ^ bits[None]).sum(2)[np.triu_indices(len(bits), 1)]
    return np.bincount(different, minlength=bits.shape[1] + 1).tolist()


def test_distances_of_all_pairs(bits: Bits) -> None:
    found = measured(bits)
    assert found.distances.tolist() == pair_counts(bits)
    assert found.sampled == 700 and found.distances.sum() == 700 * 699 // 2


def test_distances_of_many_codes_are_sampled() -> None:
    """The same sample each time, none twice, and near to all pairs."""
    bits = lopsided(2000, 32)
    bits[:, :11] = np.arange(2000)[:, None] >> np.arange(11) & 1  # no two codes are equal
    whole = code_health(pack_bits(bits), 32)
    found = measured(bits, sample=500)
    assert found.sampled == 500 and found.distances.sum() == 500 * 499 // 2
    assert found.distances[0] == whole.distances[0] == 0
    assert found.distances.tolist() == measured(bits, sample=500).distances.tolist()
    shares = found.distances / found.distances.sum(), whole.distances / whole.distances.sum()
    assert 0 < np.abs(shares[0] - shares[1]).sum() / 2 < 0.05
    assert found.bucket_sizes.sum() == found.count == 2000  # everything else counts all codes


def test_one_code() -> None:
    found = code_health(pack_bits(np.array([[True, False, True]])), 3)
    assert found.balance.tolist() == [1, 0, 1] and found.entropy.tolist() == [0, 0, 0]
    assert not found.correlation.any() and found.bucket_sizes.tolist() == [1]
    assert found.distances.tolist() == [0, 0, 0, 0] and found.sampled == 1


def test_all_equal() -> None:
    found = code_health(pack_bits(np.tile([True, False, True], (9, 1))), 3)
    assert not found.correlation.any() and not found.entropy.any()
    assert (found.bucket_codes.tolist(), found.bucket_sizes.tolist()) == ([[5]], [9])
    assert found.distances.tolist() == [36, 0, 0, 0]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one code"):
        code_health(np.empty((0, 2), np.uint8), 16)
    with pytest.raises(ValueError, match="codes of 17 bits take 3 bytes: got 2 bytes"):
        code_health(np.zeros((4, 2), np.uint8), 17)
    with pytest.raises(ValueError, match="codes of 13 bits must end in zero bits"):
        code_health(np.array([[0, 31], [0, 32]], np.uint8), 13)
    with pytest.raises(TypeError, match="uint8"):
        code_health(np.zeros((4, 2), np.int64), 16)  # type: ignore[arg-type]
    two = [code_health(np.zeros((4, 1), np.uint8), bits) for bits in (7, 8)]
    with pytest.raises(ValueError, match="got 7 and 8"):
        code_drift(*two)


# ----------------------------------------------------------------------------------------------------------- drift


@pytest.mark.parametrize("width", WIDTHS)
def test_drift(width: int) -> None:
    before, after = lopsided(400, width), lopsided(300, width, seed=1)
    after[:50] = before[:50]
    sides = [pack_bits(before), pack_bits(after)]
    found = code_drift(*(code_health(codes, width) for codes in sides))
    np.testing.assert_allclose(found.balance_change, after.mean(0) - before.mean(0), atol=1e-15)
    for place, (p, q) in enumerate(zip(before.mean(0), after.mean(0), strict=True)):
        mixed = entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2
        assert found.divergence[place] == pytest.approx(mixed, abs=1e-12)
    shares = [np.array(pair_counts(bits)) / (len(bits) * (len(bits) - 1) / 2) for bits in (before, after)]
    assert found.distance_variation == pytest.approx(np.abs(shares[0] - shares[1]).sum() / 2, abs=1e-12)
    first, second = ({code.tobytes() for code in codes} for codes in sides)
    assert found.common == len(first & second) > 0
    assert found.jaccard == pytest.approx(len(first & second) / len(first | second))


def test_no_drift_of_equal_codes() -> None:
    codes = code_health(pack_bits(lopsided(90, 24)), 24)
    found = code_drift(codes, codes)
    assert not found.balance_change.any() and not found.divergence.any()
    assert (found.distance_variation, found.jaccard, found.common) == (0, 1, len(codes.bucket_sizes))


def test_the_largest_drift() -> None:
    zeros, ones = (code_health(np.full((5, 1), value, np.uint8), 8) for value in (0, 255))
    found = code_drift(zeros, ones)
    assert found.balance_change.tolist() == [1] * 8 and found.divergence.tolist() == [1] * 8
    assert (found.common, found.jaccard, found.distance_variation) == (0, 0, 0)  # each has distance 0 only


def test_a_single_code_has_no_distances_to_drift() -> None:
    one, two = (code_health(np.zeros((num, 1), np.uint8), 8) for num in (1, 2))
    assert math.isnan(code_drift(one, two).distance_variation)
    assert math.isnan(code_drift(two, one).distance_variation)
