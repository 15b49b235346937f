"""Exact search against NumPy on the whole distance matrix."""

import threading
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from hhnet.search import kernels
from hhnet.search.kernels import NO_DISTANCE, NO_ROW, hamming_distances, hamming_knn, hamming_range

WIDTHS = [3, 8, 12, 32]  # each is compiled for itself
THREADS = [1, 2, 9]  # 9 is more than the queries, which shares out the database instead

Codes = npt.NDArray[np.uint8]


def codes(num: int, width: int, seed: int = 0) -> Codes:
    return np.random.default_rng([seed, width]).integers(0, 256, (num, width), dtype=np.uint8)


def matrix(queries: Codes, database: Codes) -> npt.NDArray[np.int32]:
    different = np.unpackbits(queries[:, None] ^ database[None], axis=2)
    return different.sum(axis=2, dtype=np.int32)


@pytest.fixture(scope="module", params=WIDTHS)
def case(request: pytest.FixtureRequest) -> tuple[Codes, Codes, npt.NDArray[np.int32]]:
    queries, database = codes(7, request.param, 1), codes(9001, request.param, 2)
    database[5000:5050] = queries[0]  # exact hits, tied, across chunks
    return queries, database, matrix(queries, database)


def test_distances(case: tuple[Codes, Codes, npt.NDArray[np.int32]]) -> None:
    queries, database, expected = case
    found = hamming_distances(queries, database)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("k", [1, 10, 4097, 9001, 20000])
def test_knn(case: tuple[Codes, Codes, npt.NDArray[np.int32]], k: int, threads: int) -> None:
    queries, database, all_distances = case
    distances, rows = hamming_knn(queries, database, k, threads=threads)
    order = np.argsort(all_distances, axis=1, kind="stable")[:, :k]
    assert distances.dtype == np.int32 and rows.dtype == np.int64
    np.testing.assert_array_equal(rows, order)
    np.testing.assert_array_equal(distances, np.take_along_axis(all_distances, order, 1))


@pytest.mark.parametrize("order", ["falling", "rising"])
def test_knn_in_sorted_databases(order: str) -> None:
    """Falling distances admit every row as a candidate, which is the most the buffers must hold."""
    database = codes(30000, 8)
    query = codes(1, 8, 5)
    distances = matrix(query, database)[0]
    database = database[np.argsort(-distances if order == "falling" else distances, kind="stable")]
    expected = matrix(query, database)
    for k in (1, 100, 5000):
        found, rows = hamming_knn(query, database, k, threads=1)
        np.testing.assert_array_equal(rows, np.argsort(expected, axis=1, kind="stable")[:, :k])
        np.testing.assert_array_equal(found[0], np.sort(expected[0])[:k])


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("radius", [0, 2, 4, 30, 9999])
def test_range(case: tuple[Codes, Codes, npt.NDArray[np.int32]], radius: int, threads: int) -> None:
    queries, database, all_distances = case
    offsets, rows, distances = hamming_range(queries, database, radius, threads=threads)
    assert (offsets.dtype, rows.dtype, distances.dtype) == (np.int64, np.int64, np.int32)
    assert offsets[0] == 0 and offsets[-1] == len(rows) == len(distances)
    for q in range(len(queries)):
        order = np.argsort(all_distances[q], kind="stable")
        order = order[all_distances[q][order] <= radius]
        np.testing.assert_array_equal(rows[offsets[q] : offsets[q + 1]], order)
        np.testing.assert_array_equal(distances[offsets[q] : offsets[q + 1]], all_distances[q][order])


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 1.0])
def test_only_allowed_rows_are_found(
    case: tuple[Codes, Codes, npt.NDArray[np.int32]], share: float, threads: int
) -> None:
    queries, database, all_distances = case
    allowed = np.random.default_rng(3).random(len(database)) < share
    order = np.argsort(all_distances, axis=1, kind="stable")
    order = order[allowed[order]].reshape(len(queries), -1)
    for k in (1, 100, 20000):
        distances, rows = hamming_knn(queries, database, k, threads=threads, allowed=allowed)
        np.testing.assert_array_equal(rows, order[:, :k])
        np.testing.assert_array_equal(distances, np.take_along_axis(all_distances, order[:, :k], 1))
    offsets, rows, distances = hamming_range(queries, database, 4, threads=threads, allowed=allowed)
    for q in range(len(queries)):
        near = order[q][all_distances[q][order[q]] <= 4]
        np.testing.assert_array_equal(rows[offsets[q] : offsets[q + 1]], near)
        np.testing.assert_array_equal(distances[offsets[q] : offsets[q + 1]], all_distances[q][near])


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("k", [1, 10, 9001])
def test_nothing_beyond_the_radius_of_its_query_is_found(
    case: tuple[Codes, Codes, npt.NDArray[np.int32]], k: int, threads: int
) -> None:
    queries, database, all_distances = case
    bits = 8 * queries.shape[1]
    radius = np.array([0, 1, bits // 4, bits // 2, bits - 1, bits, 9999])
    distances, rows = hamming_knn(queries, database, k, threads=threads, radius=radius)
    order = np.argsort(all_distances, axis=1, kind="stable")[:, :k]
    expected = np.take_along_axis(all_distances, order, 1)
    beyond = expected > radius[:, None]
    assert beyond[1].any() and not beyond[-2:].any()
    np.testing.assert_array_equal(rows, np.where(beyond, NO_ROW, order))
    np.testing.assert_array_equal(distances, np.where(beyond, NO_DISTANCE, expected))


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.uint64, np.int64])
def test_a_radius_may_be_of_any_integer_type(dtype: Any) -> None:
    queries, database = codes(3, 32), codes(50, 32, 1)
    radius = np.array([0, 127, np.iinfo(dtype).max], dtype)
    wide = np.array([0, 127, min(int(radius[2]), 256)])
    np.testing.assert_array_equal(
        hamming_knn(queries, database, 9, radius=radius)[1], hamming_knn(queries, database, 9, radius=wide)[1]
    )


@pytest.mark.parametrize("radius", [np.array([1, 2]), np.array([1.0, 2.0, 3.0]), np.array([1, -1, 2]), 5])
def test_a_radius_is_a_whole_number_for_each_query(radius: Any) -> None:
    with pytest.raises(ValueError, match=r"radius must be whole numbers from 0 on of shape \(3,\)"):
        hamming_knn(codes(3, 8), codes(9, 8), 2, radius=radius)


def test_many_queries_on_threads() -> None:
    """Enough work for the pool: several blocks of queries."""
    queries, database = codes(300, 8, 1), codes(5000, 8, 2)
    expected = np.argsort(matrix(queries, database), axis=1, kind="stable")[:, :5]
    np.testing.assert_array_equal(hamming_knn(queries, database, 5, threads=3)[1], expected)


@pytest.mark.parametrize("threads", [2, 9])
@pytest.mark.parametrize("width", WIDTHS)
def test_a_large_database_is_shared_out_between_threads(width: int, threads: int) -> None:
    """Fewer queries than threads; only from 2^21 words on is the database cut into parts for them."""
    words = (width + 7) // 8
    queries, database = codes(1, width, 1), codes((1 << 21) // words + 77, width, 2)
    middle = len(database) // 2
    database[middle - 25 : middle + 25] = queries[0]  # exact hits, tied, across parts
    some = np.random.default_rng(3).random(len(database)) < 0.5
    for allowed in (None, some):
        for k, radius in ((1, None), (10, np.array([2 * width])), (4097, None)):
            shared, alone = (
                hamming_knn(queries, database, k, threads=count, allowed=allowed, radius=radius)
                for count in (threads, 1)
            )
            for found, wanted in zip(shared, alone, strict=True):
                np.testing.assert_array_equal(found, wanted)
        shared, alone = (
            hamming_range(queries, database, 2 * width, threads=count, allowed=allowed) for count in (threads, 1)
        )
        for found, wanted in zip(shared, alone, strict=True):
            np.testing.assert_array_equal(found, wanted)


def test_two_callers_at_once() -> None:
    queries, database = codes(200, 8, 1), codes(5000, 8, 2)
    expected = hamming_knn(queries, database, 5, threads=1)[1]
    found: list[npt.NDArray[np.int64]] = []
    callers = [
        threading.Thread(target=lambda: found.append(hamming_knn(queries, database, 5, threads=2)[1])) for _ in range(4)
    ]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(found) == 4
    for rows in found:
        np.testing.assert_array_equal(rows, expected)


@pytest.mark.parametrize("threads", [1, 4])
def test_empty(threads: int) -> None:
    some, none = codes(3, 8), np.zeros((0, 8), np.uint8)
    for queries, database, shape in ((some, none, (3, 0)), (none, some, (0, 2)), (none, none, (0, 0))):
        distances, rows = hamming_knn(queries, database, 2, threads=threads)
        assert distances.shape == rows.shape == shape
        offsets, rows, distances = hamming_range(queries, database, 3, threads=threads)
        assert offsets.tolist() == [0] * (len(queries) + 1) and rows.size == distances.size == 0
        assert hamming_distances(queries, database).shape == (len(queries), len(database))


def test_any_memory_layout() -> None:
    """Read-only, strided and misaligned codes give what a plain array gives."""
    plain = codes(100, 8)
    readonly = plain.copy()
    readonly.flags.writeable = False
    strided = np.repeat(plain, 2, axis=0)[::2]
    shifted = np.frombuffer(b"x" + plain.tobytes(), np.uint8)[1:].reshape(100, 8)
    expected = hamming_knn(plain[:5], plain, 9)
    for other in (readonly, strided, shifted, np.asfortranarray(plain)):
        for found, wanted in zip(hamming_knn(other[:5], other, 9), expected, strict=True):
            np.testing.assert_array_equal(found, wanted)
    assert plain.flags.writeable


@pytest.mark.parametrize("width", [1, 2, 3, 4, 6, 8, 12, 16, 20, 32])
def test_codes_of_any_width_are_read_where_they_lie(width: int) -> None:
    """A database may be a memory map larger than RAM, so nothing may copy it."""
    database = codes(50, width)
    assert np.shares_memory(kernels.as_words(database, "database"), database)


def test_refusals() -> None:
    a, b = codes(2, 8), codes(2, 16)
    with pytest.raises(ValueError, match="got 8 and 16 bytes"):
        hamming_knn(a, b, 1)
    # 7 and 8 bytes fill the same 64-bit word, and still are not comparable
    with pytest.raises(ValueError, match="got 7 and 8 bytes"):
        hamming_distances(codes(2, 7), a)
    with pytest.raises(TypeError, match=r"queries must be packed codes of dtype uint8.*float64"):
        hamming_knn(a.astype(np.float64), a, 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"database must have shape \(N, bytes\)"):
        hamming_knn(a, a[0], 1)
    with pytest.raises(ValueError, match="k must be at least 1: got 0"):
        hamming_knn(a, a, 0)
    for mask in (np.ones(3, np.bool_), np.ones(2, np.int64)):
        with pytest.raises(ValueError, match=r"allowed must be bool of shape \(2,\)"):
            hamming_knn(a, a, 1, allowed=mask)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="radius must be at least 0: got -1"):
        hamming_range(a, a, -1)
    for search in (hamming_knn, hamming_range):
        with pytest.raises(ValueError, match="threads must be at least 1: got 0"):
            search(a, a, 1, threads=0)
