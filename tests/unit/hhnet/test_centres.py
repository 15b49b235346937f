"""Hash centres and the margin of the best known codes."""

import numpy as np
import pytest

from hhnet.centres import _gilbert_varshamov, _hadamard, code_distance, hash_centres, margin


def least_distance(classes: int, bits: int) -> int:
    centres = hash_centres(classes, bits).astype(int)
    assert centres.shape == (classes, bits) and set(np.unique(centres)) <= {-1, 1}
    distances = (bits - centres @ centres.T) // 2
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
def test_powers_of_two_use_hadamard_rows(classes: int, bits: int) -> None:
    hadamard = np.array([[1]])
    while len(hadamard) < bits:
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    rows = {tuple(row) for row in np.concatenate([hadamard, -hadamard])}
    assert {tuple(row) for row in hash_centres(classes, bits)} <= rows
    assert least_distance(classes, bits) >= bits // 2


def test_hadamard_matrices() -> None:
    found = [order for order in range(1, 130) if _hadamard(order) is not None]
    assert {8, 12, 16, 20, 24, 32, 40, 48, 64, 72, 80, 88, 96, 104, 120, 128} <= set(found)
    for order in found:
        matrix = _hadamard(order)
        assert matrix is not None
        np.testing.assert_array_equal(matrix @ matrix.T, order * np.eye(order))


@pytest.mark.parametrize(
    ("classes", "bits", "distance"),
    [(10, 12, 6), (10, 48, 24), (96, 48, 24), (100, 16, 6), (100, 32, 14), (100, 48, 22), (128, 48, 22)],
)
def test_distance_of_the_usual_sizes(classes: int, bits: int, distance: int) -> None:
    """As far apart as the best known linear code allows, or further."""
    assert least_distance(classes, bits) >= distance


@pytest.mark.parametrize(
    ("classes", "bits", "distance"),
    [(1000, 16, 4), (1000, 48, 16), (1000, 64, 24), (37, 56, 26), (2**5, 5, 1), (7, 3, 1), (3, 2, 1)],
)
def test_distance_of_larger_sets(classes: int, bits: int, distance: int) -> None:
    assert least_distance(classes, bits) >= distance


@pytest.mark.parametrize(("classes", "bits"), [(40000, 48), (65536, 16), (70000, 24), (131000, 17), (9, 4)])
def test_many_classes_are_distinct(classes: int, bits: int) -> None:
    centres = hash_centres(classes, bits)
    assert centres.dtype == np.int8 and len(np.unique(np.packbits(centres > 0, axis=1), axis=0)) == classes


@pytest.mark.parametrize(("classes", "bits"), [(10, 16), (100, 48), (70000, 20), (65537, 24)])
def test_seed(classes: int, bits: int) -> None:
    np.testing.assert_array_equal(hash_centres(classes, bits, 3), hash_centres(classes, bits, 3))
    assert (hash_centres(classes, bits, 3) != hash_centres(classes, bits, 4)).any()
    hash_centres(classes, bits)[:] = 0  # the caller owns the array
    assert hash_centres(classes, bits).all()


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
