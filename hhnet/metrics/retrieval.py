"""Retrieval metrics over packed codes, with ties treated exactly.

A sample is relevant to a query if they share a class. Samples at one Hamming distance are tied, and the order
inside a tie changes AP: where nothing else is said, a metric is its expectation over all orders inside the
ties, as in "Hashing as Tie-Aware Learning to Rank" (CVPR 2018), so it depends on no file order.

Labels are int (N,), class ids from 0, or multi-hot (N, C); a row of zeros is an unlabelled sample, which is
relevant to nothing.

Shape suffixes: Q queries, N database samples, C classes, W and L 64-bit words per code and label, D
    distances.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from hhnet.metrics._relevance import Codes, Labels, Task, label_pair, make_task
from hhnet.search import _ranking
from hhnet.search.kernels import run_blocks

_DENOMINATORS = {"retrieved": _ranking.RETRIEVED, "min": _ranking.MINIMUM, "all": _ranking.ALL}
_SCORED_QUERIES_PER_BLOCK = 32  # queries whose real-valued scores against the whole database are held at once

_Floats = npt.NDArray[np.float64]


def _normalised(tie_scores: tuple[npt.ArrayLike, npt.ArrayLike], task: Task) -> tuple[_Floats, _Floats]:
    query, database = (np.asarray(reals, np.float64) for reals in tie_scores)
    for name, reals, num in (("query", query, len(task.queries)), ("database", database, len(task.database))):
        if reals.ndim != 2 or len(reals) != num:
            raise ValueError(f"{name} reals of tie_scores must have shape ({num}, K): got {reals.shape}")
        if not np.isfinite(reals).all():
            raise ValueError(f"{name} reals of tie_scores must be finite")
    if query.shape[1] != database.shape[1]:
        raise ValueError(f"tie_scores differ in width: got {query.shape} and {database.shape}")
    norms = (np.linalg.norm(reals, axis=1, keepdims=True) for reals in (query, database))
    query_norm, database_norm = (np.where(norm > 0, norm, 1) for norm in norms)
    return query / query_norm, database / database_norm


def _expected(task: Task, cut: int, kind: int) -> tuple[_Floats, npt.NDArray[np.bool_]]:
    ap_Q, hit_Q = np.empty(len(task.queries)), np.empty(len(task.queries), np.bool_)
    # The differences of harmonic numbers taken from this table are exact to about 1e-16.
    terms = 1 / np.arange(1, len(task.database) + 1, dtype=np.longdouble)
    harmonic = np.concatenate([[0.0], np.cumsum(terms).astype(np.float64)])
    start = 0
    for total_QD, hits_QD in task.histograms():
        part = slice(start, start + len(total_QD))
        _ranking.expected_ap(total_QD, hits_QD, cut, kind, harmonic, ap_Q[part], hit_Q[part])
        start = part.stop
    return ap_Q, hit_Q


def _ranked(
    task: Task, cut: int, kind: int, reals: tuple[_Floats, _Floats] | None, first: int
) -> tuple[_Floats, npt.NDArray[np.bool_]]:
    """Rank by distance and row; with `reals`, the first `first` samples (or for 0 those of a tie) by their distance."""
    ap_Q, hit_Q = np.empty(len(task.queries)), np.empty(len(task.queries), np.bool_)

    def rank(part: slice) -> None:
        queries = task.queries[part], task.database, task.query_labels[part], task.labels, task.single
        if reals is None:
            _ranking.stable_ap(*queries, cut, kind, ap_Q[part], hit_Q[part])
        else:
            scores_QN = -(reals[0][part] @ reals[1].T)  # the squared distance of unit vectors is 2 - 2 cos
            _ranking.scored_ap(*queries, scores_QN, first, cut, kind, ap_Q[part], hit_Q[part])

    run_blocks(rank, len(task.queries), task.cost, **({} if reals is None else {"block": _SCORED_QUERIES_PER_BLOCK}))
    return ap_Q, hit_Q


def _choice(value: str, known: tuple[str, ...], name: str) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}: got {value!r}")


def _cut(task: Task, at: int | None, denominator: str) -> int:
    """Return K, cut to the database. Raises ValueError for a wrong `at` or `denominator`."""
    _choice(denominator, tuple(_DENOMINATORS), "denominator")
    if at is not None and at < 1:
        raise ValueError(f"at must be at least 1, or None for the whole database: got {at}")
    return min(at or len(task.database), len(task.database))


def average_precisions(
    query_codes: Codes,
    query_labels: Labels,
    database_codes: Codes,
    database_labels: Labels,
    at: int | None = None,
    ties: str = "expected",
    denominator: str = "retrieved",
    empty: str = "zero",
    tie_scores: tuple[npt.ArrayLike, npt.ArrayLike] | None = None,
    rerank: int | None = None,
) -> _Floats:
    """Compute AP@K of each query: the sum over ranks i <= K of rel_i x precision_i, divided by the denominator.

    Args:
        query_codes, database_codes: uint8 (Q, bytes) and (N, bytes).
        query_labels, database_labels: int (Q,) and (N,), or multi-hot (Q, C) and (N, C).
        at: K; None for the whole database; cut to N.
        ties: "expected" = expectation of the whole quotient over all orders inside ties; where K cuts a tie, the
            denominator is random too. "stable" = by database row; "scores" = by squared Euclidean distance of the
            normalised reals in `tie_scores`, then by row.
        denominator: "retrieved" = relevant samples within the first K, most papers' choice; "min" = the
            smaller of K and all relevant samples; "all" = all relevant samples.
        empty: for a query that has no relevant sample within the first K in any order: "zero" counts it as 0, "skip"
            gives NaN.
        tie_scores: real codes of queries and database, (Q, K) and (N, K), for ties="scores" only.
        rerank: for ties="scores" only: the first `rerank` samples by (distance, row) are ordered by the distance of
            the reals whatever their codes, and the others stay by (distance, row). Cut to N, which orders all of
            them; None = only ties are broken by the reals.

    Returns:
        float64 (Q,).

    Raises:
        TypeError, ValueError: for arguments that do not fit, naming them.

    Source: conventions as listed in thuml/HashNet `test.py` (skip) and swuxyj/DeepHash-pytorch (zero).
    """
    task = make_task(query_codes, query_labels, database_codes, database_labels)
    _choice(ties, ("expected", "stable", "scores"), "ties")
    cut = _cut(task, at, denominator)
    _choice(empty, ("zero", "skip"), "empty")
    if (tie_scores is not None) != (ties == "scores"):
        raise ValueError(f"ties='scores' and tie_scores go together: got ties={ties!r}")
    if rerank is not None and (rerank < 1 or tie_scores is None):
        raise ValueError(f"rerank must be at least 1 and needs tie_scores: got {rerank} with ties={ties!r}")
    kind = _DENOMINATORS[denominator]
    if ties == "expected":
        ap_Q, hit_Q = _expected(task, cut, kind)
    else:
        reals = None if tie_scores is None else _normalised(tie_scores, task)
        ap_Q, hit_Q = _ranked(task, cut, kind, reals, min(rerank or 0, len(task.database)))
    if empty == "skip":
        ap_Q[~hit_Q] = np.nan
    return ap_Q


def mean_average_precision(
    query_codes: Codes,
    query_labels: Labels,
    database_codes: Codes,
    database_labels: Labels,
    at: int | None = None,
    ties: str = "expected",
    denominator: str = "retrieved",
    empty: str = "zero",
    tie_scores: tuple[npt.ArrayLike, npt.ArrayLike] | None = None,
    rerank: int | None = None,
) -> float:
    """Return the mean of `average_precisions` over the queries that are not skipped; the arguments are explained there.

    Raises:
        TypeError, ValueError: as there, and ValueError if every query is skipped.
    """
    ap_Q = average_precisions(
        query_codes, query_labels, database_codes, database_labels, at, ties, denominator, empty, tie_scores, rerank
    )
    kept = ap_Q[~np.isnan(ap_Q)]
    if len(kept) == 0:
        raise ValueError("no query has a relevant sample in reach, so all are skipped: use empty='zero'")
    return float(kept.mean())


def tie_bounds(
    query_codes: Codes,
    query_labels: Labels,
    database_codes: Codes,
    database_labels: Labels,
    at: int | None = None,
    denominator: str = "retrieved",
) -> tuple[_Floats, _Floats]:
    """Compute AP@K of each query with the relevant samples last, and with them first, inside every tie.

    Over the whole ranking, and at K with the denominators "min" and "all", every order of the ties lies between the
    two. At K with "retrieved" it need not: a hit beyond the cut lowers the denominator too.

    Returns:
        `(last, first)`, float64 (Q,) each; 0 for a query that finds nothing. Arguments and errors otherwise as for
        `average_precisions`.
    """
    task = make_task(query_codes, query_labels, database_codes, database_labels)
    cut = _cut(task, at, denominator)
    harmonic = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, len(task.database) + 1))])
    bounds: tuple[list[_Floats], list[_Floats]] = [], []
    for total_QD, hits_QD in task.histograms():
        before_QD, found_QD = np.cumsum(total_QD, axis=1) - total_QD, np.cumsum(hits_QD, axis=1) - hits_QD
        every_Q = hits_QD.sum(1)
        for part, others_QD in zip(bounds, (total_QD - hits_QD, np.zeros_like(total_QD)), strict=True):
            first_QD = np.minimum(before_QD + others_QD, cut)  # ranks before the first hit of the tie
            taken_QD = np.minimum(hits_QD, cut - first_QD)
            # The j-th of them has precision (found + j) / (first + j), which is 1 + (found - first) / (first + j).
            sums_QD = taken_QD + (found_QD - first_QD) * (harmonic[first_QD + taken_QD] - harmonic[first_QD])
            by = {"retrieved": taken_QD.sum(1), "min": np.minimum(every_Q, cut), "all": every_Q}[denominator]
            part.append(sums_QD.sum(1) / np.maximum(by, 1))
    return np.concatenate(bounds[0]), np.concatenate(bounds[1])


def precision_at(
    query_codes: Codes, query_labels: Labels, database_codes: Codes, database_labels: Labels, k: int
) -> float:
    """Return the share of relevant samples among the first k, expected over the order inside ties, mean over queries.

    k is cut to N. Arguments and errors otherwise as for `average_precisions`.
    """
    task = make_task(query_codes, query_labels, database_codes, database_labels)
    if k < 1:
        raise ValueError(f"k must be at least 1: got {k}")
    k = min(k, len(task.database))
    total = 0.0
    for total_QD, hits_QD in task.histograms():
        before_QD = np.cumsum(total_QD, axis=1) - total_QD
        taken_QD = np.clip(k - before_QD, 0, total_QD)
        total += float((hits_QD * (taken_QD / np.maximum(total_QD, 1))).sum())
    return total / (k * len(task.queries))


def precision_within_radius(
    query_codes: Codes, query_labels: Labels, database_codes: Codes, database_labels: Labels, radius: int = 2
) -> float:
    """Return P@H<=radius: the share of relevant samples within the Hamming radius (inclusive), averaged over queries.

    A query with nothing inside counts 0 (thulab/DeepHash `evaluation/__init__.py`).
    """
    task = make_task(query_codes, query_labels, database_codes, database_labels)
    if radius < 0:
        raise ValueError(f"radius must be at least 0: got {radius}")
    total = 0.0
    for total_QD, hits_QD in task.histograms():
        inside_Q = total_QD[:, : radius + 1].sum(1)
        total += float((hits_QD[:, : radius + 1].sum(1) / np.maximum(inside_Q, 1)).sum())
    return total / len(task.queries)


def precision_recall_curve(
    query_codes: Codes, query_labels: Labels, database_codes: Codes, database_labels: Labels
) -> tuple[_Floats, _Floats]:
    """Return precision and recall within every Hamming radius 0, 1, ..., K, averaged over queries.

    A curve over radii, not over ranks, needs no order inside ties. Queries without a relevant sample are left out; a
    query with nothing within a radius counts precision 0 there (thulab/DeepHash `evaluation/__init__.py`).

    Returns:
        `(precision, recall)`, float64 (K + 1,) each, K = 8 x bytes per code. All 0 if no query has a relevant
        sample.
    """
    task = make_task(query_codes, query_labels, database_codes, database_labels)
    precision, recall, kept = np.zeros(task.bits + 1), np.zeros(task.bits + 1), 0
    for total_QD, hits_QD in task.histograms():
        some_Q = hits_QD.sum(1) > 0
        inside_QD, found_QD = np.cumsum(total_QD[some_Q], axis=1), np.cumsum(hits_QD[some_Q], axis=1)
        precision += (found_QD / np.maximum(inside_QD, 1)).sum(0)
        recall += (found_QD / found_QD[:, -1:]).sum(0)
        kept += int(some_Q.sum())
    return precision / max(kept, 1), recall / max(kept, 1)


def precision_recall_at(
    query_codes: Codes, query_labels: Labels, database_codes: Codes, database_labels: Labels, ranks: Sequence[int]
) -> tuple[_Floats, _Floats]:
    """Return precision and recall among the first k for each k of `ranks`, averaged over queries at equal rank.

    The curve over ranks (swuxyj/DeepHash-pytorch `utils/tools.py`), expected over the order inside ties. Queries
    without a relevant sample are left out, as in `precision_recall_curve`. A rank beyond N counts as N.

    Returns:
        `(precision, recall)`, float64 (len(ranks),) each. All 0 if no query has a relevant sample.
    """
    task = make_task(query_codes, query_labels, database_codes, database_labels)
    cuts = np.minimum(np.asarray(ranks, np.int64), len(task.database))
    if cuts.ndim != 1 or (cuts < 1).any():
        raise ValueError(f"ranks must be numbers from 1: got {list(ranks)}")
    precision, recall, kept = np.zeros(len(cuts)), np.zeros(len(cuts)), 0
    for total_QD, hits_QD in task.histograms():
        some_Q = hits_QD.sum(1) > 0
        total_QD, hits_QD = total_QD[some_Q], hits_QD[some_Q]
        before_QD = np.cumsum(total_QD, axis=1) - total_QD
        share_QD, every_Q = hits_QD / np.maximum(total_QD, 1), hits_QD.sum(1)
        for place, k in enumerate(cuts.tolist()):
            found_Q = (share_QD * np.clip(k - before_QD, 0, total_QD)).sum(1)
            precision[place] += (found_Q / k).sum()
            recall[place] += (found_Q / every_Q).sum()
        kept += int(some_Q.sum())
    return precision / max(kept, 1), recall / max(kept, 1)


def chance_map(
    query_labels: Labels,
    database_labels: Labels,
    at: int | None = None,
    denominator: str = "retrieved",
    empty: str = "zero",
) -> float:
    """Return the mAP of codes without information: the expectation over all orders of the database.

    Over the whole database it is about the share of relevant samples. Among the first K it is higher with
    denominator="retrieved", which counts only the relevant samples among those K, and lower with "all".

    Arguments, which choose the convention, and errors are as for `average_precisions`.
    """
    return mean_average_precision(*_saying_nothing(query_labels, database_labels), at, "expected", denominator, empty)


def relevant_share(query_labels: Labels, database_labels: Labels) -> float:
    """Return the mean relevant share of the database over queries: the precision of codes without information."""
    return precision_within_radius(*_saying_nothing(query_labels, database_labels), 0)


def _saying_nothing(query_labels: Labels, database_labels: Labels) -> tuple[Codes, Labels, Codes, Labels]:
    """Return equal codes for all samples, with their labels."""
    label_pair(query_labels, len(query_labels), database_labels, len(database_labels))
    queries, database = (np.zeros((len(labels), 1), np.uint8) for labels in (query_labels, database_labels))
    return queries, query_labels, database, database_labels
