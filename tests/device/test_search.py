"""Search on a GPU finds what the scan of the CPU finds."""

from typing import Any

import numpy as np
import pytest
import torch

from hhnet import hamming_knn
from hhnet.search.device import DeviceCodes

WHERE = "cuda" if torch.cuda.is_available() else "cpu"


def random_codes(count: int, width: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (count, width), dtype=np.uint8)


def check(parts: list[Any], queries: Any, k: int, places: int = 64, **sizes: int) -> None:
    """Search with so few places that small sets are searched in several chunks."""
    codes = DeviceCodes(parts, WHERE, places=places, **sizes)
    found, wanted = codes.knn(queries, k), hamming_knn(queries, np.concatenate(parts), k)
    for mine, other in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(mine, other)
        assert mine.dtype == other.dtype


@pytest.mark.parametrize("width", [1, 3, 4, 5, 8, 16, 20])
def test_codes_of_any_width(width: int) -> None:
    check([random_codes(700, width)], random_codes(5, width, seed=1), 10)


@pytest.mark.parametrize("k", [1, 7, 100, 600, 5000])
def test_any_number_of_neighbours(k: int) -> None:
    check([random_codes(600, 8)], random_codes(3, 8, seed=1), k)


@pytest.mark.parametrize("count", [1, 15, 16, 17, 64, 65, 130])
def test_any_number_of_queries(count: int) -> None:
    check([random_codes(300, 8)], random_codes(count, 8, seed=1), 3, keys=64)  # the queries go in rounds


def test_parts_are_numbered_one_after_another() -> None:
    check([random_codes(n, 8, seed=n) for n in (1, 130, 0, 70, 129)], random_codes(4, 8, seed=9), 20, rows=50)


def test_equal_codes_come_by_row() -> None:
    check([np.full((1000, 8), 7, np.uint8)], random_codes(2, 8), 30)
    check([np.repeat(random_codes(40, 8), 25, axis=0)], random_codes(2, 8, seed=1), 60)


def test_the_nearest_may_come_last() -> None:
    """Each chunk is full of better ones: it is halved until they find their places."""
    query = random_codes(1, 8, seed=1)
    codes = random_codes(3000, 8)
    distances = np.bitwise_count(codes ^ query).sum(1)
    check([codes[np.argsort(-distances.astype(int), kind="stable")]], query, 12)


def test_the_least_and_the_largest_distance() -> None:
    query = random_codes(1, 16)
    check([np.concatenate([~query, query, ~query])], query, 2)
    check([np.concatenate([~query, query, ~query])], query, 3)


def test_no_queries_and_no_codes() -> None:
    distances, rows = DeviceCodes([random_codes(5, 8)], WHERE).knn(random_codes(0, 8), 2)
    assert distances.shape == rows.shape == (0, 2)
    distances, rows = DeviceCodes([random_codes(0, 8)], WHERE).knn(random_codes(3, 8), 2)
    assert distances.shape == rows.shape == (3, 0)


def test_what_cannot_be_searched() -> None:
    codes = DeviceCodes([random_codes(5, 8)], WHERE)
    with pytest.raises(ValueError, match="k be at least 1: got 8, 0"):
        codes.knn(random_codes(1, 8), 0)
    with pytest.raises(ValueError, match="queries must have 8 bytes"):
        codes.knn(random_codes(1, 16), 1)
    with pytest.raises(TypeError, match="uint8"):
        codes.knn(random_codes(1, 8).astype(np.int64), 1)
    with pytest.raises(ValueError, match=r"of \[8, 9\] bytes: there must be fewer than 2\^31 of one width"):
        DeviceCodes([random_codes(5, 8), random_codes(5, 9)], WHERE)
    with pytest.raises(ValueError, match="of one width"):
        DeviceCodes([], WHERE)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_million_codes_on_a_gpu() -> None:
    for width in (8, 16, 32):
        parts = [random_codes(700_000, width), random_codes(300_001, width, seed=2)]
        check(parts, random_codes(300, width, seed=1), 100, places=4096)
