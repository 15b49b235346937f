"""Metrics against enumeration of all orders, random orders, and NumPy sorting."""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from hhnet.codes import unpack_bits
from hhnet.metrics import retrieval as metrics

DENOMINATORS = ["retrieved", "min", "all"]
Array = npt.NDArray[Any]


def relevance(query_labels: Array, database_labels: Array) -> Array:
    if query_labels.ndim == 1:
        return query_labels[:, None] == database_labels[None]
    return (query_labels.astype(int) @ database_labels.astype(int).T) > 0


def hamming(queries: Array, database: Array) -> Array:
    return np.unpackbits(queries[:, None] ^ database[None], axis=2).sum(2)


def plain_ap(relevant: list[bool], at: int, denominator: str) -> float:
    """The definition, for one ranking."""
    hits, total = 0, 0.0
    for rank, is_relevant in enumerate(relevant[:at], start=1):
        if is_relevant:
            hits += 1
            total += hits / rank
    by = {"retrieved": hits, "min": min(at, sum(relevant)), "all": sum(relevant)}[denominator]
    return total / by if by else 0.0


def tied_orders(distances: Array) -> Iterator[list[int]]:
    """Every ranking that the distances allow."""
    groups = [np.flatnonzero(distances == d).tolist() for d in np.unique(distances)]
    for choice in itertools.product(*(itertools.permutations(group) for group in groups)):
        yield [row for group in choice for row in group]


def random_case(seed: int, queries: int, size: int, width: int, classes: int, multi: bool) -> tuple[Array, ...]:
    rng = np.random.default_rng(seed)
    # few distinct codes make ties
    codes = rng.integers(0, 256, (4, width), dtype=np.uint8)
    q, d = codes[rng.integers(0, 4, queries)], codes[rng.integers(0, 4, size)]
    if multi:
        return q, rng.random((queries, classes)) < 0.3, d, rng.random((size, classes)) < 0.3
    return q, rng.integers(0, classes, queries), d, rng.integers(0, classes, size)


@pytest.mark.parametrize("denominator", DENOMINATORS)
@pytest.mark.parametrize("multi", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_expected_ap_is_the_mean_over_all_orders(seed: int, multi: bool, denominator: str) -> None:
    q, ql, d, dl = random_case(seed, 3, 7, 1, 2, multi)
    rel, dist = relevance(ql, dl), hamming(q, d)
    for at in (None, 1, 2, 3, 5, 7, 100):
        found = metrics.average_precisions(q, ql, d, dl, at=at, denominator=denominator)
        cut = min(at or 7, 7)
        expected = [
            np.mean([plain_ap([rel[i][r] for r in order], cut, denominator) for order in tied_orders(dist[i])])
            for i in range(3)
        ]
        np.testing.assert_allclose(found, expected, rtol=1e-13, atol=1e-15)
        mean = metrics.mean_average_precision(q, ql, d, dl, at=at, denominator=denominator)
        assert mean == pytest.approx(np.mean(expected), rel=1e-13)


def test_one_big_tie_is_enumerated() -> None:
    """All codes equal: 8 samples, 3 relevant, every cut."""
    q, d = np.zeros((1, 2), np.uint8), np.zeros((8, 2), np.uint8)
    dl = np.array([1, 0, 0, 1, 0, 1, 0, 0])
    for at in range(1, 9):
        for denominator in DENOMINATORS:
            values = []
            for places in itertools.combinations(range(8), 3):
                values.append(plain_ap([r in places for r in range(8)], at, denominator))
            found = metrics.mean_average_precision(q, np.array([1]), d, dl, at=at, denominator=denominator)
            assert found == pytest.approx(np.mean(values), rel=1e-13)


@pytest.mark.parametrize("denominator", DENOMINATORS)
def test_expected_ap_agrees_with_random_orders(denominator: str) -> None:
    """A mid-sized case, where the cut falls inside a tie of hundreds."""
    rng = np.random.default_rng(1)
    d = np.left_shift(1, rng.integers(0, 3, (900, 1))).astype(np.uint8) * (rng.random((900, 1)) < 0.7)
    d = d.astype(np.uint8)
    dl, q, ql = rng.integers(0, 3, 900), np.zeros((1, 1), np.uint8), np.array([1])
    dist = hamming(q, d)[0]
    found = metrics.mean_average_precision(q, ql, d, dl, at=500, denominator=denominator)
    values = []
    for _ in range(2000):
        order = np.lexsort((rng.random(900), dist))[:500]
        rel = dl[order] == 1
        precision = np.cumsum(rel) / np.arange(1, 501)
        by = {"retrieved": rel.sum(), "min": min(500, (dl == 1).sum()), "all": (dl == 1).sum()}[denominator]
        values.append((precision * rel).sum() / by)
    error = np.std(values) / math.sqrt(len(values))
    assert abs(found - np.mean(values)) < 5 * error


def test_large_ties_stay_accurate() -> None:
    """The hypergeometric weights at the size of a real database, against exact integer arithmetic."""
    size, hits, at = 5000, 1700, 900
    d, dl = np.zeros((size, 1), np.uint8), (np.arange(size) < hits).astype(int)
    found = metrics.mean_average_precision(np.zeros((1, 1), np.uint8), np.array([1]), d, dl, at=at)
    total = math.comb(size, at)
    a = math.fsum(1 / i for i in range(1, at + 1))
    b = at - a
    expected = 0.0
    for x in range(1, at + 1):
        probability = math.comb(hits, x) * math.comb(size - hits, at - x) / total
        expected += probability * (x / at) * (a + (x - 1) / (at - 1) * b) / x
    assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("denominator", DENOMINATORS)
@pytest.mark.parametrize("multi", [False, True])
@pytest.mark.parametrize("width", [1, 3, 8, 16])
def test_stable_and_scores(width: int, multi: bool, denominator: str) -> None:
    q, ql, d, dl = random_case(7, 40, 300, width, 70, multi)
    rng = np.random.default_rng(3)
    q_real, d_real = rng.normal(size=(40, 5)), rng.normal(size=(300, 5))
    d_real[10:20] = d_real[10]  # equal scores fall back to the row
    d_real[30] = 0
    unit_q = q_real / np.linalg.norm(q_real, axis=1, keepdims=True)
    unit_d = d_real / np.maximum(np.linalg.norm(d_real, axis=1, keepdims=True), 1e-300)
    rel, dist = relevance(ql, dl), hamming(q, d)
    for at in (None, 1, 50, 299):
        stable, scored = [], []
        for i in range(40):
            order = np.argsort(dist[i], kind="stable")
            stable.append(plain_ap(rel[i][order].tolist(), min(at or 300, 300), denominator))
            order = np.lexsort((np.arange(300), np.round(-unit_d @ unit_q[i], 12), dist[i]))
            scored.append(plain_ap(rel[i][order].tolist(), min(at or 300, 300), denominator))
        arguments = (q, ql, d, dl, at)
        found = metrics.average_precisions(*arguments, ties="stable", denominator=denominator)
        np.testing.assert_allclose(found, stable, rtol=1e-12)
        found = metrics.average_precisions(
            *arguments, ties="scores", denominator=denominator, tie_scores=(q_real, d_real)
        )
        np.testing.assert_allclose(found, scored, rtol=1e-12)


def test_all_orders_agree_without_ties() -> None:
    bits = np.tril(np.ones((64, 64), bool))  # row i lies at distance i + 1 of the zero code
    d = np.packbits(bits, axis=1, bitorder="little")
    dl = np.random.default_rng(0).integers(0, 2, 64)
    q, ql = np.zeros((1, 8), np.uint8), np.array([1])
    expected = metrics.mean_average_precision(q, ql, d, dl, at=20)
    assert metrics.mean_average_precision(q, ql, d, dl, at=20, ties="stable") == pytest.approx(expected)
    reals = np.ones((1, 2)), np.random.default_rng(1).normal(size=(64, 2))
    scored = metrics.mean_average_precision(q, ql, d, dl, at=20, ties="scores", tie_scores=reals)
    assert scored == pytest.approx(expected)


@pytest.mark.parametrize("ties", ["expected", "stable"])
@pytest.mark.parametrize("denominator", DENOMINATORS)
def test_empty_queries(ties: str, denominator: str) -> None:
    """A query with no relevant sample at all, and one whose only relevant sample lies beyond the cut."""
    q = np.zeros((3, 1), np.uint8)
    d = np.array([[0], [1], [3], [7]], np.uint8)
    ql, dl = np.array([0, 1, 9]), np.array([0, 0, 0, 1])
    kwargs: dict[str, Any] = {"at": 2, "ties": ties, "denominator": denominator}
    zero = metrics.average_precisions(q, ql, d, dl, **kwargs)
    skip = metrics.average_precisions(q, ql, d, dl, empty="skip", **kwargs)
    assert zero[1] == zero[2] == 0 and zero[0] > 0
    np.testing.assert_array_equal(skip, [zero[0], np.nan, np.nan])
    assert metrics.mean_average_precision(q, ql, d, dl, empty="skip", **kwargs) == zero[0]
    assert metrics.mean_average_precision(q, ql, d, dl, **kwargs) == pytest.approx(zero[0] / 3)
    with pytest.raises(ValueError, match="all are skipped"):
        metrics.mean_average_precision(q[1:], ql[1:], d, dl, empty="skip", **kwargs)


def test_skipped_queries_where_the_cut_falls_into_a_tie() -> None:
    """A hit that only some orders bring within the cut keeps the query."""
    q, d = np.zeros((2, 1), np.uint8), np.zeros((4, 1), np.uint8)
    found = metrics.average_precisions(q, np.array([1, 9]), d, np.array([0, 0, 0, 1]), at=1, empty="skip")
    np.testing.assert_allclose(found, [0.25, np.nan])


def test_unlabelled_samples_match_nothing() -> None:
    q, d = np.zeros((2, 1), np.uint8), np.zeros((3, 1), np.uint8)
    ql = np.array([[0, 0], [1, 0]], bool)
    dl = np.array([[0, 0], [1, 1], [0, 1]], bool)
    assert metrics.average_precisions(q, ql, d, dl, at=None)[0] == 0
    assert metrics.relevant_share(ql, dl) == pytest.approx((0 + 1 / 3) / 2)
    assert metrics.chance_map(ql, dl) == pytest.approx((0 + (1 + 1 / 2 + 1 / 3) / 3) / 2)


@pytest.mark.parametrize("denominator", DENOMINATORS)
@pytest.mark.parametrize("multi", [False, True])
@pytest.mark.parametrize("at", [None, 3])
def test_bounds_are_the_extreme_orders_of_the_ties(at: int | None, multi: bool, denominator: str) -> None:
    q, ql, d, dl = random_case(5, 6, 7, 1, 3, multi)
    rel, dist = relevance(ql, dl), hamming(q, d)
    last, first = metrics.tie_bounds(q, ql, d, dl, at=at, denominator=denominator)
    for i in range(len(q)):
        for found, sign in ((last[i], 1), (first[i], -1)):
            order = np.lexsort((sign * rel[i], dist[i]))
            assert found == pytest.approx(plain_ap(rel[i][order].tolist(), at or 7, denominator), abs=1e-12)
        every = [plain_ap(rel[i][order].tolist(), at or 7, denominator) for order in tied_orders(dist[i])]
        if at is None or denominator != "retrieved":
            assert (min(every), max(every)) == pytest.approx((last[i], first[i]), abs=1e-12)
    with pytest.raises(ValueError, match="at must be at least 1"):
        metrics.tie_bounds(q, ql, d, dl, at=0)
    with pytest.raises(ValueError, match="denominator must be one of"):
        metrics.tie_bounds(q, ql, d, dl, denominator="other")


@pytest.mark.parametrize("multi", [False, True])
def test_the_curve_over_ranks_is_the_mean_over_all_orders(multi: bool) -> None:
    q, ql, d, dl = random_case(2, 6, 7, 1, 3, multi)
    ql[0] = False if multi else 99  # nothing is relevant to it, so it is left out
    rel, dist = relevance(ql, dl), hamming(q, d)
    ranks = [1, 2, 5, 7, 30]
    precision, recall = metrics.precision_recall_at(q, ql, d, dl, ranks)
    for place, k in enumerate(ranks):
        found = [
            np.mean([rel[i][order][:k].sum() for order in map(np.array, tied_orders(dist[i]))])
            for i in range(len(q))
            if rel[i].any()
        ]
        every = rel.sum(1)[rel.any(1)]
        assert precision[place] == pytest.approx(np.mean(found) / min(k, 7), abs=1e-12)
        assert recall[place] == pytest.approx(np.mean(np.array(found) / every), abs=1e-12)
    with pytest.raises(ValueError, match="ranks must be numbers from 1"):
        metrics.precision_recall_at(q, ql, d, dl, [0, 1])


@pytest.mark.parametrize("multi", [False, True])
def test_precision_metrics(multi: bool) -> None:
    q, ql, d, dl = random_case(11, 30, 200, 2, 5, multi)
    rng = np.random.default_rng(0)
    d ^= np.packbits(rng.random((200, 16)) < 0.1, axis=1)
    ql[:2] = False if multi else 99  # without a relevant sample
    q[3] = 0b10101010
    rel, dist = relevance(ql, dl), hamming(q, d)
    for radius in (0, 2, 16, 99):
        inside = dist <= radius
        share = (rel & inside).sum(1) / np.maximum(inside.sum(1), 1)
        assert metrics.precision_within_radius(q, ql, d, dl, radius) == pytest.approx(share.mean())
    precision, recall = metrics.precision_recall_curve(q, ql, d, dl)
    assert precision.shape == recall.shape == (17,)
    kept = rel.sum(1) > 0
    for radius in range(17):
        inside = (dist <= radius)[kept]
        hits = (rel[kept] & inside).sum(1)
        assert precision[radius] == pytest.approx((hits / np.maximum(inside.sum(1), 1)).mean())
        assert recall[radius] == pytest.approx((hits / rel[kept].sum(1)).mean())
    assert recall[-1] == pytest.approx(1)
    assert metrics.relevant_share(ql, dl) == pytest.approx(rel.mean())
    for k in (1, 17, 200, 500):
        means = [
            np.mean([rel[i][np.lexsort((rng.random(200), dist[i]))[:k]].mean() for _ in range(200)]) for i in range(30)
        ]
        assert metrics.precision_at(q, ql, d, dl, k) == pytest.approx(np.mean(means), abs=0.02)


def test_precision_at_inside_a_tie_is_exact() -> None:
    q, d = np.zeros((1, 1), np.uint8), np.array([[0], [1], [2], [4], [255]], np.uint8)
    dl = np.array([1, 1, 0, 0, 1])
    # rank 1 is a hit; two of the three at distance 1 follow, one of which is relevant
    assert metrics.precision_at(q, np.array([1]), d, dl, 3) == pytest.approx((1 + 2 / 3) / 3)


def test_no_relevant_sample_at_all() -> None:
    q, d = np.zeros((2, 1), np.uint8), np.zeros((3, 1), np.uint8)
    precision, recall = metrics.precision_recall_curve(q, np.array([5, 6]), d, np.array([1, 2, 3]))
    assert not precision.any() and not recall.any()


@pytest.mark.parametrize("denominator", DENOMINATORS)
@pytest.mark.parametrize("at", [None, 10])
def test_chance_is_the_mean_over_random_orders_in_the_same_convention(at: int | None, denominator: str) -> None:
    rng = np.random.default_rng(0)
    ql, dl = rng.integers(0, 10, 40), rng.integers(0, 10, 300)
    means = []
    for _ in range(300):
        order = rng.permutation(300)  # all codes are equal, and stable ties take the order of the rows
        same = np.zeros((40, 1), np.uint8), np.zeros((300, 1), np.uint8)
        means.append(
            metrics.mean_average_precision(
                same[0], ql, same[1], dl[order], at=at, ties="stable", denominator=denominator
            )
        )
    chance = metrics.chance_map(ql, dl, at, denominator)
    assert chance == pytest.approx(np.mean(means), abs=4 * np.std(means) / np.sqrt(len(means)))
    if at is None:
        assert chance == pytest.approx(metrics.relevant_share(ql, dl), abs=np.log(300) / 300)


def test_single_labels_equal_one_hot_labels_and_unpacked_bits() -> None:
    q, ql, d, dl = random_case(5, 20, 500, 9, 150, False)
    one_hot = np.eye(150, dtype=bool)
    expected = metrics.average_precisions(q, ql, d, dl, at=77)
    np.testing.assert_array_equal(metrics.average_precisions(q, one_hot[ql], d, one_hot[dl], at=77), expected)
    np.testing.assert_array_equal(
        metrics.average_precisions(q, one_hot[ql].astype(np.int64), d, one_hot[dl].astype(np.int64), at=77),
        expected,
    )
    repacked = np.packbits(unpack_bits(q, 72), axis=1, bitorder="little")
    np.testing.assert_array_equal(repacked, q)


def test_many_queries_span_blocks() -> None:
    q, ql, d, dl = random_case(5, 4200, 300, 8, 10, False)
    parts = [metrics.average_precisions(q[part], ql[part], d, dl, at=50) for part in (slice(0, 99), slice(99, 4200))]
    np.testing.assert_array_equal(metrics.average_precisions(q, ql, d, dl, at=50), np.concatenate(parts))


def test_refusals() -> None:
    q, ql, d, dl = random_case(0, 2, 3, 1, 2, False)
    hot = np.eye(2, dtype=bool)
    ap = metrics.mean_average_precision
    for kwargs, message in (
        ({"ties": "random"}, "ties must be one of expected, stable, scores: got 'random'"),
        ({"denominator": "k"}, "denominator must be one of"),
        ({"empty": "drop"}, "empty must be one of"),
        ({"at": 0}, "at must be at least 1"),
        ({"ties": "scores"}, "go together"),
        ({"tie_scores": (q, d)}, "go together"),
        ({"ties": "scores", "tie_scores": (np.zeros((5, 2)), np.zeros((3, 2)))}, r"\(2, K\): got \(5, 2\)"),
        ({"ties": "scores", "tie_scores": (np.zeros((2, 2)), np.zeros((3, 4)))}, "differ in width"),
        ({"ties": "scores", "tie_scores": (np.full((2, 2), np.nan), np.zeros((3, 2)))}, "finite"),
    ):
        with pytest.raises(ValueError, match=message):
            ap(q, ql, d, dl, **kwargs)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="query_labels must have shape"):
        ap(q, ql[:1], d, dl)
    with pytest.raises(TypeError, match="integer class ids: got float64"):
        ap(q, ql.astype(float), d, dl)
    with pytest.raises(ValueError, match="class ids from 0: got -1"):
        ap(q, np.full(2, -1), d, dl)
    with pytest.raises(ValueError, match="one kind"):
        ap(q, hot, d, dl)
    with pytest.raises(ValueError, match="one kind"):
        ap(q, hot, d, np.eye(3, dtype=bool))
    with pytest.raises(ValueError, match="multi-hot"):
        ap(q, hot.astype(int) * 2, d, np.ones((3, 2), bool))
    with pytest.raises(ValueError, match="need queries and a database"):
        ap(q, ql, d[:0], dl[:0])
    with pytest.raises(ValueError, match="k must be at least 1"):
        metrics.precision_at(q, ql, d, dl, 0)
    with pytest.raises(ValueError, match="radius must be at least 0"):
        metrics.precision_within_radius(q, ql, d, dl, -1)


@pytest.mark.parametrize("first", [1, 7, 40, 500])
@pytest.mark.parametrize("at", [None, 10])
def test_the_first_by_distance_are_ordered_by_the_reals(first: int, at: int | None) -> None:
    q, ql, d, dl = random_case(5, 6, 60, 1, 3, multi=False)
    rng = np.random.default_rng(6)
    reals = rng.standard_normal((6, 8)), rng.integers(-127, 128, (60, 8)).astype(np.int8)
    found = metrics.average_precisions(q, ql, d, dl, at=at, ties="scores", tie_scores=reals, rerank=first)
    cosine = reals[0] @ reals[1].T / np.linalg.norm(reals[1].astype(float), axis=1)
    for i in range(6):
        order = np.argsort(hamming(q, d)[i], kind="stable")
        order[:first] = order[:first][np.argsort(-cosine[i][order[:first]], kind="stable")]
        assert found[i] == pytest.approx(plain_ap((dl[order] == ql[i]).tolist(), at or 60, "retrieved"))
    mean = metrics.mean_average_precision(q, ql, d, dl, at=at, ties="scores", tie_scores=reals, rerank=first)
    assert mean == pytest.approx(found.mean())


def test_a_rerank_without_reals_is_refused() -> None:
    q, ql, d, dl = random_case(5, 6, 60, 1, 3, multi=False)
    with pytest.raises(ValueError, match="rerank must be at least 1 and needs tie_scores"):
        metrics.average_precisions(q, ql, d, dl, rerank=5)
    reals = np.ones((6, 8)), np.ones((60, 8))
    with pytest.raises(ValueError, match="got 0"):
        metrics.average_precisions(q, ql, d, dl, ties="scores", tie_scores=reals, rerank=0)
