"""Multi-index hashing against the scan and against NumPy, with the buckets taken and not taken."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest

from hhnet import hamming_knn, hamming_range, pack_bits
from hhnet.search import _buckets
from hhnet.search import multi_index as mih
from hhnet.search.multi_index import MultiIndexHash, ScanCosts, TablesDamagedError, default_substrings, substring_widths

Codes = npt.NDArray[np.uint8]


def clustered(num: int, bits: int, seed: int = 0, centres: int = 40, flip: float = 0.1) -> Codes:
    """Codes near random centres that do not depend on `seed`."""
    middle = np.random.default_rng(bits).random((centres, bits)) < 0.5
    draw = np.random.default_rng([seed, bits])
    return pack_bits(middle[draw.integers(0, centres, num)] ^ (draw.random((num, bits)) < flip))


def all_by_distance(queries: Codes, codes: Codes, allowed: npt.NDArray[np.bool_] | None) -> list[list[tuple[int, int]]]:
    """Per query, (distance, row) of every allowed row in order: brute force."""
    found = []
    for query in queries:
        distances = np.unpackbits(query ^ codes, axis=1).sum(1, dtype=np.int64)
        rows = np.arange(len(codes)) if allowed is None else np.flatnonzero(allowed)
        found.append(sorted(zip(distances[rows].tolist(), rows.tolist(), strict=True)))
    return found


# Small cases would all be scanned: make everything but the scan free, leave the choice, or make it dear.
BUCKETS = ScanCosts(compare=1e18, least=0)
WAYS = {"buckets": BUCKETS, "weighed": ScanCosts(least=0), "scan": ScanCosts()}


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def check(
    table: MultiIndexHash,
    queries: Codes,
    codes: Codes,
    way: str,
    ks: tuple[int, ...],
    radii: tuple[int, ...],
    allowed: npt.NDArray[np.bool_] | None = None,
    threads: int | None = None,
) -> None:
    table = replace(table, costs=WAYS[way])
    expected = all_by_distance(queries, codes, allowed)
    for k in ks:
        distances, rows, scanned = table._knn(queries, k, threads, allowed)
        assert (distances.dtype, rows.dtype) == (np.int32, np.int64)
        assert distances.shape == rows.shape == (len(queries), min(k, len(expected[0])))
        for q, best in enumerate(expected):
            assert list(zip(distances[q].tolist(), rows[q].tolist(), strict=True)) == best[:k], (k, q)
        if way != "weighed" and distances.size:
            assert (scanned == (way == "scan")).all(), k
    for radius in radii:
        offsets, rows, distances, scanned = table._range(queries, radius, threads, allowed)
        assert (offsets.dtype, rows.dtype, distances.dtype) == (np.int64, np.int64, np.int32)
        assert offsets[0] == 0 and offsets[-1] == len(rows) == len(distances)
        for q, (start, stop) in enumerate(pairwise(offsets.tolist())):
            near = [entry for entry in expected[q] if entry[0] <= radius]
            assert list(zip(distances[start:stop].tolist(), rows[start:stop].tolist(), strict=True)) == near, radius
        if way != "weighed":
            assert (scanned == (way == "scan")).all(), radius


@pytest.mark.parametrize("bits", [12, 16, 32, 48, 64, 100, 128])
@pytest.mark.parametrize("num", [1, 2, 300, 4000])
def test_every_width_and_size(bits: int, num: int, way: str) -> None:
    codes, queries = clustered(num, bits), clustered(6, bits, seed=1)
    queries[0] = codes[num // 2]
    check(MultiIndexHash.build(codes), queries, codes, way, (1, 10, 100), (0, 1, 2, 3, 5, 8))


@pytest.mark.parametrize(
    "bits, substrings", [(16, 1), (16, 2), (16, 5), (16, 16), (64, 3), (64, 9), (128, 6), (128, 11)]
)
def test_any_number_of_substrings(bits: int, substrings: int, way: str) -> None:
    """Unequal substrings, those that lie in two words, and those of a single bit."""
    codes, queries = clustered(900, bits), clustered(4, bits, seed=1)
    radii = (0, 1, 2, 4, 7) if bits > 16 else tuple(range(18))
    check(MultiIndexHash.build(codes, substrings=substrings), queries, codes, way, (1, 20), radii)


def test_all_of_a_small_space(way: str) -> None:
    """As many neighbours as there are and more, and every radius to beyond the last bit."""
    codes, queries = clustered(400, 16), clustered(3, 16, seed=1)
    check(MultiIndexHash.build(codes), queries, codes, way, (399, 400, 5000), (0, 8, 15, 16, 17, 99))


@pytest.mark.parametrize("bits", [16, 64, 100])
def test_nothing_beyond_the_radius_of_its_query_is_found(bits: int, way: str) -> None:
    codes, queries = clustered(1500, bits), clustered(6, bits, seed=1)
    allowed = np.random.default_rng(4).random(1500) < 0.7
    table, radius = MultiIndexHash.build(codes, costs=WAYS[way]), np.array([0, 1, 3, 6, bits, 9999])
    for k in (1, 10, 1500):
        for mask in (None, allowed):
            expected = hamming_knn(queries, codes, k, allowed=mask, radius=radius)
            distances, rows, scanned = table._knn(queries, k, None, mask, radius)
            np.testing.assert_array_equal(distances, expected[0])
            np.testing.assert_array_equal(rows, expected[1])
            assert way == "weighed" or (scanned == (way == "scan")).all()
    with pytest.raises(ValueError, match=r"radius must be whole numbers from 0 on of shape \(6,\)"):
        table.knn(queries, 1, radius=radius[:2])


def test_equal_codes_are_ordered_by_row(way: str) -> None:
    same = np.repeat(clustered(1, 64), 2500, axis=0)
    check(MultiIndexHash.build(same), np.concatenate([same[:2], ~same[:1]]), same, way, (1, 7, 2500), (0, 3))
    few = clustered(2500, 64, centres=3, flip=0.01)  # many equal, and many at an equal distance
    check(MultiIndexHash.build(few), clustered(3, 64, seed=1, centres=3, flip=0.01), few, way, (1, 50, 900), (0, 1, 2))


@pytest.mark.parametrize("share", [0.0, 0.02, 0.6])
def test_only_allowed_rows_are_found(share: float, way: str) -> None:
    codes, queries = clustered(1500, 32), clustered(5, 32, seed=1)
    allowed = np.random.default_rng(4).random(1500) < share
    table = MultiIndexHash.build(codes)
    check(table, queries, codes, way, (1, 10, 1500), (0, 2, 5), allowed)
    with pytest.raises(ValueError, match=r"allowed must be bool of shape \(1500,\): got bool \(3,\)"):
        table.knn(queries, 1, allowed=allowed[:3])
    with pytest.raises(ValueError, match="got int64"):
        table.range_search(queries, 1, allowed=np.arange(1500))  # type: ignore[arg-type]


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_change_nothing(threads: int, way: str) -> None:
    codes, queries = clustered(3600, 64), clustered(150, 64, seed=1)  # enough work to be shared out
    check(MultiIndexHash.build(codes), queries, codes, way, (5,), (3,), threads=threads)
    check(MultiIndexHash.build(codes), queries[:2], codes, way, (5,), (3,), threads=threads)


def test_no_codes_and_no_queries(way: str) -> None:
    some, none = clustered(3, 64), np.zeros((0, 8), np.uint8)
    for codes, queries, shape in ((none, some, (3, 0)), (some, none, (0, 2)), (none, none, (0, 0))):
        table = MultiIndexHash.build(codes, costs=WAYS[way])
        distances, rows = table.knn(queries, 2)
        assert distances.shape == rows.shape == shape
        offsets, rows, distances = table.range_search(queries, 3)
        assert offsets.tolist() == [0] * (len(queries) + 1) and rows.size == distances.size == 0


def test_each_query_chooses_its_own_way() -> None:
    """Queries near their neighbours are answered from the buckets, others by a scan, in one call."""
    costs = ScanCosts(compare=0.31, least=0)  # as if no CPU could scan faster
    codes = clustered(60_000, 64, centres=6000, flip=0.03)
    near, far = codes[:20] ^ np.uint8(0), clustered(20, 64, seed=9, flip=0.5)
    queries = np.stack([near, far], axis=1).reshape(40, 8)
    table = MultiIndexHash.build(codes, costs=costs)
    distances, rows, scanned = table._knn(queries, 1, 2, None)
    assert scanned[1::2].all() and scanned[::2].mean() < 0.5
    np.testing.assert_array_equal(rows, hamming_knn(queries, codes, 1)[1])
    np.testing.assert_array_equal(distances, hamming_knn(queries, codes, 1)[0])
    middle = np.concatenate([codes[:1], np.zeros((1, 8), np.uint8)])
    crowded = np.concatenate([codes, np.zeros((60_000, 8), np.uint8)])  # half of it is one bucket
    offsets, rows, distances, scanned = MultiIndexHash.build(crowded, costs=costs)._range(middle, 2, 2, None)
    assert scanned.tolist() == [False, True]
    for found, wanted in zip((offsets, rows, distances), hamming_range(middle, crowded, 2), strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_building_is_reproducible_and_sorted() -> None:
    codes = clustered(5000, 64)
    first, again = MultiIndexHash.build(codes), MultiIndexHash.build(codes.copy())
    for one, other in ((first.starts, again.starts), (first.rows, again.rows)):
        np.testing.assert_array_equal(one, other)
    widths = substring_widths(64, len(first.rows))
    assert sum(widths) == 64 and max(widths) - min(widths) <= 1
    low = codes.view(np.uint64)[:, 0] & np.uint64((1 << widths[0]) - 1)
    np.testing.assert_array_equal(first.rows[0], np.argsort(low, kind="stable"))


def test_the_tables_stay_small_beside_the_codes() -> None:
    for num, bits, substrings in ((1, 64, 8), (1000, 64, 8), (10**6, 64, 4), (10**7, 64, 3), (10**9, 64, 3)):
        assert default_substrings(num, bits) == substrings
        entries = mih.table_length(bits, substrings)
        assert entries <= max(substrings * num, 300 * substrings)
    assert default_substrings(10**7, 12) == 1


def test_other_layouts_of_memory_and_padded_queries(way: str) -> None:
    codes, queries = clustered(600, 32), clustered(3, 32, seed=1)
    table = MultiIndexHash.build(codes)
    assert table.codes.shape == (600, 8)
    mapped = MultiIndexHash(table.codes, 32, table.starts.copy(), np.asfortranarray(table.rows))
    check(mapped, mih.padded(queries)[::-1][::-1], mih.padded(codes), way, (4,), (3,))
    check(mapped, queries, codes, way, (4,), (3,))


@pytest.mark.parametrize("seed", range(40))
def test_damaged_tables_never_read_outside(seed: int) -> None:
    """Any bytes as tables: an answer that may be wrong, or one clear error; never a crash or an endless loop."""
    draw = np.random.default_rng(seed)
    codes = clustered(500, 32)
    table = MultiIndexHash.build(codes)
    starts, rows = table.starts.copy(), table.rows.copy()
    for array in (starts, rows.reshape(-1)):
        places = draw.integers(0, len(array), draw.choice([0, 1, 50, len(array)]))
        array[places] = draw.integers(0, draw.choice([600, 1 << 32]), len(places), dtype=np.uint32)
    broken = MultiIndexHash(table.codes, 32, starts, rows, BUCKETS)
    for search in (lambda: broken.knn(codes[:40], 9), lambda: broken.range_search(codes[:40], 4)):
        try:
            found = search()
        except TablesDamagedError as error:
            assert "outside the codes" in str(error)
        else:
            assert found[1].min() >= 0 and found[1].max() < 500


def test_a_table_that_points_outside_is_said() -> None:
    codes = clustered(500, 32)
    table = MultiIndexHash.build(codes)
    for starts, rows in (
        (table.starts, np.full_like(table.rows, 500)),
        (np.full_like(table.starts, 501), table.rows),
        (table.starts[::-1], table.rows),
    ):
        broken = MultiIndexHash(table.codes, 32, starts, rows, BUCKETS)
        for search in (
            lambda table=broken: table.knn(codes[:4], 9),
            lambda table=broken: table.range_search(codes, 2),
        ):
            with pytest.raises(TablesDamagedError, match="point outside the codes"):
                search()


def test_refusals() -> None:
    codes = clustered(10, 64)
    table = MultiIndexHash.build(codes)
    with pytest.raises(ValueError, match="k must be at least 1: got 0"):
        table.knn(codes, 0)
    with pytest.raises(ValueError, match="radius must be at least 0: got -1"):
        table.range_search(codes, -1)
    with pytest.raises(ValueError, match="queries must have codes of 64 bits: got 4 bytes"):
        table.knn(codes[:, :4], 1)
    with pytest.raises(TypeError, match="dtype uint8"):
        table.knn(codes.astype(np.float32), 1)  # type: ignore[arg-type]
    for threads in (0, -1):
        with pytest.raises(ValueError, match="threads must be at least 1"):
            table.knn(codes, 1, threads=threads)
        with pytest.raises(ValueError, match="threads must be at least 1"):
            table.range_search(codes, 1, threads=threads)
    with pytest.raises(ValueError, match="64 bits can be cut into 3 to 64 substrings"):
        MultiIndexHash.build(codes, substrings=2)
    with pytest.raises(ValueError, match="bits must be from 1 to 64: got 65"):
        MultiIndexHash.build(codes, bits=65)
    with pytest.raises(ValueError, match="tables must have shapes"):
        MultiIndexHash(table.codes, 64, table.starts[:-1], table.rows)
    with pytest.raises(ValueError, match="codes must have whole words"):
        MultiIndexHash(codes[:, :5], 40, table.starts, table.rows)
    with pytest.raises(TypeError, match="tables must be uint32"):
        MultiIndexHash(table.codes, 64, table.starts.astype(np.int64), table.rows)  # type: ignore[arg-type]
    assert _buckets.PROBE_COST_SHARE + _buckets.SIZING_COST_SHARE < 0.1
