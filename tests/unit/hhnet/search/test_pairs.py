"""Equal codes, near pairs and what they join, against loops over all pairs of small sets."""

import numpy as np
import numpy.typing as npt
import pytest

from hhnet import hamming_distances, pack_bits, unpack_bits
from hhnet.search.multi_index import MultiIndexHash, ScanCosts, padded
from hhnet.search.pairs import UnionFind, equal_groups, near_pairs

Codes = npt.NDArray[np.uint8]


def clustered(count: int, bits: int, centres: int = 40, flip: float = 0.03, seed: int = 0) -> Codes:
    random = np.random.default_rng(seed)
    middle = random.random((centres, bits)) < 0.5
    noise = random.random((count, bits)) < flip
    return pack_bits(middle[random.integers(0, centres, count)] ^ noise)


def found_pairs(
    queries: Codes,
    first: npt.NDArray[np.int64],
    table: MultiIndexHash,
    radius: int,
    threads: int | None = 1,
    **options: int,
) -> list[tuple[int, int, int]]:
    found: list[tuple[int, int, int]] = []
    near_pairs(
        queries,
        first,
        table,
        radius,
        lambda q, r, d: found.extend(zip(q.tolist(), r.tolist(), d.tolist(), strict=True)),
        threads,
        **options,
    )
    return sorted(found)


def all_pairs(queries: Codes, first: npt.NDArray[np.int64], codes: Codes, radius: int) -> list[tuple[int, int, int]]:
    distances = hamming_distances(queries, codes)
    near = (distances <= radius) & (np.arange(len(codes)) >= first[:, None])
    return [(int(q), int(r), int(distances[q, r])) for q, r in zip(*np.nonzero(near), strict=True)]


# ------------------------------------------------------------------------------------------------------- near pairs


TABLES = ScanCosts(compare=1e12)  # all queries are answered from the tables


@pytest.fixture(params=[TABLES, ScanCosts(compare=0.0)], ids=["tables", "scan"])
def costs(request: pytest.FixtureRequest) -> ScanCosts:
    """Answer all queries from the tables, or none."""
    return request.param


@pytest.mark.parametrize("bits", [16, 64, 128, 200])
@pytest.mark.parametrize("radius", [0, 1, 2, 5, 8])
def test_each_near_pair_is_found_once(costs: ScanCosts, bits: int, radius: int) -> None:
    codes = clustered(1200, bits, flip=2 / bits)
    after = np.arange(1, len(codes) + 1)
    expected = all_pairs(codes, after, codes, radius)
    assert expected
    assert found_pairs(codes, after, MultiIndexHash.build(codes, costs=costs), radius) == expected


@pytest.mark.parametrize("count", [40_000, 300_000])
def test_what_the_tables_find_and_what_is_scanned_are_the_same(count: int) -> None:
    codes = clustered(count, 64, centres=count // 20, flip=0.02)
    queries, first = codes[5:45], np.arange(0, count, count // 40)[:40]
    table = MultiIndexHash.build(codes)
    for radius in (2, 4, 20):
        assert found_pairs(queries, first, table, radius, threads=2) == all_pairs(queries, first, codes, radius)


def test_no_query_is_without_an_answer_when_there_is_no_room_for_its_pairs() -> None:
    codes = clustered(2000, 64, centres=3, flip=0.01)
    after = np.arange(1, len(codes) + 1)
    expected = all_pairs(codes, after, codes, 2)
    for room in (7, 100, 700):
        assert found_pairs(codes, after, MultiIndexHash.build(codes, costs=TABLES), 2, room=room) == expected


def test_there_may_be_nothing_to_find() -> None:
    codes = clustered(100, 64)
    table = MultiIndexHash.build(codes)
    assert found_pairs(codes, np.full(100, 100), table, 8) == []
    assert found_pairs(codes[:0], np.empty(0, np.int64), table, 8) == []


# ------------------------------------------------------------------------------------------------------ equal codes


def leaders_by_hand(codes: Codes, known: int) -> list[int]:
    members: dict[bytes, list[int]] = {}
    for number, code in enumerate(codes):
        members.setdefault(code.tobytes(), []).append(number)
    out = [0] * len(codes)
    for numbers in members.values():
        old, new = [n for n in numbers if n < known], [n for n in numbers if n >= known]
        leader = (new or old)[0]
        for n in numbers:
            out[n] = -1 if n in old[1:] else leader
    return out


@pytest.mark.parametrize("known", [0, 1, 700, 2000])
@pytest.mark.parametrize("bits", [8, 64, 128])
def test_equal_codes_have_one_leader(known: int, bits: int) -> None:
    codes = padded(clustered(2000, bits, centres=300, flip=0.004))
    leaders, count, groups = equal_groups(codes, known, 1 << 30)
    expected = leaders_by_hand(codes, known)
    assert leaders.tolist() == expected
    leading = {number for number, leader in enumerate(expected) if number == leader}
    assert count == len(leading)
    assert groups == len({leader for number, leader in enumerate(expected) if leader not in (-1, number)})


def test_a_small_table_is_passed_over_the_codes_several_times() -> None:
    codes = padded(clustered(5000, 64, centres=900, flip=0.01))
    expected = equal_groups(codes, 1000, 1 << 30)
    small = equal_groups(codes, 1000, 256, min_slots=64)
    assert (small[0] == expected[0]).all()
    assert small[1:] == expected[1:]


def test_a_million_equal_codes_are_one_group() -> None:
    leaders, count, groups = equal_groups(np.zeros((1_000_000, 8), np.uint8), 0, 1 << 20)
    assert (leaders == 0).all()
    assert (count, groups) == (1, 1)


def test_no_codes_have_no_leader() -> None:
    leaders, count, groups = equal_groups(np.empty((0, 8), np.uint8), 0, 1 << 20)
    assert (len(leaders), count, groups) == (0, 0, 0)


# ----------------------------------------------------------------------------------------------------------- forest


def test_what_is_joined_has_the_smallest_as_its_root_in_any_order() -> None:
    random = np.random.default_rng(1)
    a, b = random.integers(0, 500, (2, 300))
    by_hand = list(range(500))
    for one, other in zip(a.tolist(), b.tolist(), strict=True):
        low, high = sorted((by_hand[one], by_hand[other]))
        by_hand = [low if root == high else root for root in by_hand]
    for order in (np.arange(300), np.arange(300)[::-1], random.permutation(300)):
        forest = UnionFind(500)
        forest.unite(a[order], b[order])
        roots = np.concatenate([forest.roots(0, 200), forest.roots(200, 500)])
        assert roots.tolist() == by_hand
        assert forest.sizes(roots).tolist() == [by_hand.count(root) for root in by_hand]


def test_bits_beyond_the_last_word_do_not_matter() -> None:
    codes = clustered(300, 24)
    after = np.arange(1, 301)
    same = pack_bits(np.pad(unpack_bits(codes, 24), ((0, 0), (0, 40))))
    assert found_pairs(codes, after, MultiIndexHash.build(codes), 3) == found_pairs(
        same, after, MultiIndexHash.build(same), 3
    )
