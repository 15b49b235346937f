"""Hash centres and the margin of the best known codes."""

import hashlib
from itertools import product

import numpy as np
import pytest

from hhnet.nn._linear_codes import MAX_TABLE_DIMENSION, generator, minimum_distance
from hhnet.nn.centres import _BEST_DISTANCE, _gilbert_varshamov, _hadamard, code_distance, hash_centres, margin

# d by dimension k of the codes [K, k] that are not as good as the best known.
SHORT_OF_BEST: dict[int, dict[int, int]] = {
    16: {8: 4},
    24: {7: 9},
    32: {8: 12},
    40: {5: 19},
    64: {8: 28},
    72: {6: 34},
    80: {6: 39, 10: 34},
    88: {6: 42, 8: 40},
    96: {8: 44},
    104: {7: 50, 8: 48},
    112: {8: 53, 10: 50},
    120: {8: 56},
    128: {10: 58},
}


def least_distance(classes: int, bits: int, *, orthogonal: bool = False) -> int:
    centres = hash_centres(classes, bits, orthogonal=orthogonal).astype(np.float32)
    assert centres.shape == (classes, bits) and set(np.unique(centres)) <= {-1, 1}
    distances = (bits - centres @ centres.T) / 2
    np.fill_diagonal(distances, bits)
    return int(distances.min())


@pytest.mark.parametrize(
    ("classes", "margins"),
    [
        (10, {16: 0, 32: 0, 48: 0, 64: -0.03125}),
        (21, {16: 0, 32: 0, 48: 0, 64: 0}),
        (80, {16: 0.25, 32: 0.125, 48: 1 / 12, 64: 0}),
        (100, {16: 0.25, 32: 0.125, 48: 1 / 12, 64: 0}),
    ],
)
def test_published_margins(classes: int, margins: dict[int, float]) -> None:
    for bits, expected in margins.items():
        assert margin(bits, classes) == pytest.approx(expected)


def test_margin_of_any_size() -> None:
    assert margin(16, 1) == margin(16, 2) == -1
    assert margin(8, 256) == pytest.approx(0.75)
    for bits in (8, 12, 20, 64, 100, 128, 136, 256, 512, 4096):
        previous = -1.0
        for dimension in range(1, min(bits, 24)):
            value = margin(bits, 2**dimension)
            assert -1 <= value < 1
            if dimension <= 16:
                assert value >= previous  # more classes never allow a wider margin
                previous = value


def test_code_distance_is_a_lower_bound_of_known_values() -> None:
    # d of [136, 7] and [256, 8] in the code table; ours is pieced together from shorter codes
    assert 60 <= code_distance(136, 7) <= 66
    assert code_distance(256, 8) == 128
    assert code_distance(12, 4) <= 6
    assert _gilbert_varshamov(16, 7) == 4 and _gilbert_varshamov(64, 7) == 24  # as for 100 classes in MDSH


@pytest.mark.parametrize(("classes", "bits"), [(1, 1), (2, 1), (8, 4), (10, 16), (32, 16), (100, 64), (128, 64)])
def test_orthogonal_centres_are_hadamard_rows(classes: int, bits: int) -> None:
    hadamard = np.array([[1]])
    while len(hadamard) < bits:
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    rows = {tuple(row) for row in np.concatenate([hadamard, -hadamard])}
    assert {tuple(row) for row in hash_centres(classes, bits, orthogonal=True)} <= rows
    assert least_distance(classes, bits, orthogonal=True) >= bits // 2


def test_hadamard_matrices() -> None:
    found = [order for order in range(1, 130) if _hadamard(order) is not None]
    assert {8, 12, 16, 20, 24, 32, 40, 48, 64, 72, 80, 88, 96, 104, 120, 128} <= set(found)
    for order in found:
        matrix = _hadamard(order)
        assert matrix is not None
        np.testing.assert_array_equal(matrix @ matrix.T, order * np.eye(order))


@pytest.mark.parametrize(
    ("classes", "bits", "distance"),
    [
        *((2, 64, 64), (4, 64, 42), (8, 64, 36), (10, 64, 33), (21, 64, 32), (80, 64, 32), (100, 64, 32)),
        *((10, 12, 6), (24, 12, 6), (10, 48, 24), (96, 48, 24), (100, 16, 6), (100, 32, 14), (100, 48, 22)),
        *((128, 48, 22), (200, 48, 22), (1000, 16, 4), (1000, 48, 20), (1000, 64, 28), (1000, 128, 58)),
        *((2000, 64, 24), (4000, 32, 9), (4000, 48, 16), (4000, 64, 23), (10000, 64, 20)),
        *((37, 56, 28), (2**5, 5, 1), (7, 3, 1), (3, 2, 1), (1, 7, 7), (5, 300, 170), (500, 200, 90)),
    ],
)
def test_distance_between_all_pairs(classes: int, bits: int, distance: int) -> None:
    assert least_distance(classes, bits) >= distance


@pytest.mark.parametrize("bits", _BEST_DISTANCE)
def test_codes_are_as_far_apart_as_the_best_known(bits: int) -> None:
    """Save for those that are named, for every dimension of the table of codes."""
    best = _BEST_DISTANCE[bits][:MAX_TABLE_DIMENSION]
    reached = [minimum_distance(generator(bits, k)) for k in range(1, len(best) + 1)]
    assert reached == [SHORT_OF_BEST.get(bits, {}).get(k, d) for k, d in enumerate(best, 1)]
    assert all(d >= _gilbert_varshamov(bits, k) for k, d in enumerate(reached, 1))


@pytest.mark.parametrize("bits", [1, 2, 5, 7, 9, 12, 15, 17, 20, 23, 33, 45, 60, 65, 100, 127, 130, 200, 500])
def test_codes_of_any_length_reach_the_gilbert_varshamov_bound(bits: int) -> None:
    for k in (k for k in (1, 2, 3, 4, 6, 7, 9, 10) if k <= bits):
        code = generator(bits, k)
        assert code.shape == (k, bits) and set(np.unique(code)) <= {0, 1}
        assert minimum_distance(code) >= _gilbert_varshamov(bits, k), k


@pytest.mark.parametrize(
    ("bits", "dimension", "distance"),
    [
        *((17, 11, 4), (23, 12, 7), (33, 11, 10), (48, 14, 14)),
        *((17, 17, 1), (20, 17, 2), (24, 17, 4), (33, 18, 6), (35, 17, 6), (40, 17, 8), (64, 18, 16)),
    ],
)
def test_codes_of_many_classes_reach_the_gilbert_varshamov_bound(bits: int, dimension: int, distance: int) -> None:
    centres = hash_centres(2**dimension, bits)
    # A linear code and its translates look the same from every word: here from the first.
    others = (centres[1:] != centres[0]).sum(1)
    assert others.min() == distance >= _gilbert_varshamov(bits, dimension)
    sums = (centres[:500] * centres[0] * centres[500:1000]).astype(np.int8)
    words = {word.tobytes() for word in np.packbits(centres > 0, axis=1)}
    assert all(word.tobytes() in words for word in np.packbits(sums > 0, axis=1))


@pytest.mark.parametrize(
    ("classes", "bits"), [(40000, 48), (65536, 16), (70000, 24), (131000, 17), (9, 4), (1100000, 64), (1100000, 30)]
)
def test_many_classes_are_distinct(classes: int, bits: int) -> None:
    centres = hash_centres(classes, bits)
    assert centres.dtype == np.int8 and len(np.unique(np.packbits(centres > 0, axis=1), axis=0)) == classes


@pytest.mark.parametrize(("classes", "bits"), [(10, 16), (100, 48), (70000, 20), (65537, 24)])
def test_seed(classes: int, bits: int) -> None:
    np.testing.assert_array_equal(hash_centres(classes, bits, 3), hash_centres(classes, bits, 3))
    assert (hash_centres(classes, bits, 3) != hash_centres(classes, bits, 4)).any()
    hash_centres(classes, bits)[:] = 0  # the caller owns the array
    assert hash_centres(classes, bits).all()


def test_centres_of_all_that_is_used_stay() -> None:
    """Every number of classes that a protocol, a recipe or a study has, up to the 1,000 of ImageNet."""
    said = hashlib.sha256()
    for bits, classes in product(range(16, 129, 8), (2, 3, 10, 21, 38, 80, 81, 100, 124, 1000)):
        for orthogonal in (False, True):
            said.update(hash_centres(classes, bits, orthogonal=orthogonal).tobytes())
    assert said.hexdigest() == "a9f7fc59414767862b98348b76a937740a3a3ea87a115d97f465a1e61ab42cc4"


def test_refusals() -> None:
    with pytest.raises(ValueError, match="3 bits tell at most 8 classes apart: got 9; use more bits"):
        hash_centres(9, 3)
    with pytest.raises(ValueError, match="tell at most 8"):
        margin(3, 9)
    for classes, bits in ((0, 8), (8, 0)):
        with pytest.raises(ValueError, match="at least 1 class and 1 bit"):
            hash_centres(classes, bits)
    with pytest.raises(ValueError, match="a dimension from 1 to 8: got 9"):
        code_distance(8, 9)
