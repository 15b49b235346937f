"""Computes every number of a report."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

import hhnet
from hhnet.metrics.retrieval import relevant_share
from pipelines.config.settings import EvaluateSettings
from pipelines.errors import InputError
from pipelines.evaluate.conventions import (
    ConventionFigures,
    average_precisions_of_pair,
    chance_of_pair,
    map_by_convention,
)
from pipelines.evaluate.health import Examined, HealthFigures, health_figures
from pipelines.evaluate.overlap import nearest_probabilities
from pipelines.evaluate.pair import Pair
from pipelines.evaluate.rounding import REPORT_DIGITS, round_figure, round_figures

PRECISION_RANKS = (10, 100, 1000)
CURVE_RANKS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000)
MAX_CURVE_QUERIES = 1000
RANK_POINTS = 60  # points of the curve over ranks, in equal ratios
MAX_HISTOGRAM_PAIRS = 30_000_000
PAIRS_PER_BLOCK = 1 << 22
CHANCE_MARGIN = 0.05
CONFUSION_NEIGHBOURS = 10
CONFUSIONS_LISTED = 10
MAX_TABLE_CLASSES = 20
"""Number of classes up to which the confusion of all pairs of classes is in the report."""


@dataclass(frozen=True)
class ClassFigures:
    """One class: number of queries and of database items, and the mAP of its queries (None if none counts)."""

    name: str
    queries: int
    database: int
    map: float | None
    chance: float | None
    """The mAP of the same queries under codes without information; None where `map` is."""

    @property
    def at_chance(self) -> bool:
        """Whether the codes hardly help: the mAP covers less than CHANCE_MARGIN of the way from chance to 1."""
        if self.map is None or self.chance is None:
            return False
        return self.map - self.chance < CHANCE_MARGIN * (1 - self.chance)


@dataclass(frozen=True)
class Confused:
    """Two classes: the share that `neighbour` has in the nearest neighbours of the queries of `query`."""

    query: str
    neighbour: str
    share: float


@dataclass(frozen=True)
class ConfusionFigures:
    """Classes of the `neighbours` nearest of each query, over a seeded sample of the queries.

    Ties at the last distance count by their expectation over every order.
    """

    neighbours: int
    queries: int
    classes: Sequence[str]
    """Classes of the table; none where there are more than MAX_TABLE_CLASSES."""
    shares: Sequence[Sequence[float] | None]
    """By class of the query: the share of each class among the neighbours; None for a class without a query."""
    most: Sequence[Confused]
    """The largest shares of a class other than the query's, largest first."""


@dataclass(frozen=True)
class RerankedFigures:
    """The mAP of the ranking of `hhnet search --rerank`, followed by the rest of the plain ranking.

    By the convention `stable`, ties in distance are in database order. Otherwise they are in one seeded random order,
    so that the figure can be compared with the expectation over all orders.
    """

    first: int
    """Number of nearest codes of a query that are ordered by their real codes; the others keep their order."""
    map: float


@dataclass(frozen=True)
class Curve:
    """Points of a curve; `queries` is the number of queries in its average."""

    x: Sequence[float]
    y: Sequence[float]
    queries: int


@dataclass(frozen=True)
class RankCurve:
    """Precision and recall among the first of each number in `ranks`, averaged over `queries` queries."""

    ranks: Sequence[int]
    recall: Sequence[float]
    precision: Sequence[float]
    queries: int


@dataclass(frozen=True)
class ReportFigures:
    """Every number of a report. Precisions are expectations over the order inside ties."""

    convention: Mapping[str, Any]
    """The settings `at`, `ties`, `denominator`, `empty`, `unlabelled`."""
    map: float
    tie_bounds: tuple[float, float]
    """The mAP with the relevant items last and first inside every tie."""
    by_convention: Sequence[ConventionFigures]
    """The mAP of the same ranking in each code base of the field."""
    reranked: RerankedFigures | None
    map_min: float
    """The mAP with AP divided by min(relevant, K), which cannot fall when a better ranking finds more."""
    chance: float
    """The mAP of codes without information, in the same convention."""
    relevant_share: float
    """Share of the database that is relevant to a query, mean over the queries."""
    bits: int
    queries: int
    database: int
    skipped: int
    """Number of queries that the convention leaves out."""
    distinct: int
    """Number of distinct codes in the database."""
    precision_at: Mapping[str, float]
    within_radius_2: float
    pr_curve: Curve
    """x = recall, y = precision, at the Hamming radii 0, 1, ..., bits."""
    pr_by_rank: RankCurve
    precision_at_n: Curve
    distances_relevant: Curve
    """x = distance, y = share of the pairs that share a class."""
    distances_other: Curve
    classes: Sequence[ClassFigures]
    confusion: ConfusionFigures
    health: HealthFigures
    notes: Sequence[str] = field(default_factory=tuple)

    def as_json(self) -> dict[str, Any]:
        """Return plain JSON values; figures that were not asked for are left out."""
        return {name: value for name, value in asdict(self).items() if name != "reranked" or value}


# ------------------------------------------------------------------------------------------------------ measuring


def require_findable(pair: Pair) -> None:
    """Raise InputError where nothing is relevant to any query, and say why."""
    if pair.findable().any():
        return
    for side, name in ((pair.queries, "queries"), (pair.database, "database")):
        if not side.labels.any():
            raise InputError(f"no image of the {name} has a label, so nothing is relevant to any query: ingest labels")
    raise InputError("queries and database share no class, so nothing is relevant: name codes of one data set")


def measure_pair(
    pair: Pair, examined: Examined, settings: EvaluateSettings
) -> tuple[ReportFigures, npt.NDArray[np.float64]]:
    """Return all figures of the report, and the AP of every query (NaN where the convention leaves it out).

    `examined` comes from the codes of the same pair; at least one query must have a relevant item.
    """
    arguments = pair.arguments()
    findable = pair.findable()
    convention = settings.model_dump(include={"at", "ties", "denominator", "empty", "unlabelled"})
    ap_Q = average_precisions_of_pair(pair, settings)
    kept = ~np.isnan(ap_Q)
    if not kept.any():
        problem = f"no query finds anything relevant among the first {settings.at}"
        raise InputError(f"{problem}, and evaluate.empty=skip leaves all out: set it to zero, or raise --at")
    bounds = hhnet.tie_bounds(*arguments, at=settings.at, denominator=settings.denominator)
    map_min = float(ap_Q[kept].mean())
    if settings.at is not None and settings.denominator != "min":
        least = average_precisions_of_pair(pair, settings.model_copy(update={"denominator": "min"}))
        map_min = float(least[~np.isnan(least)].mean())
    precision, recall = hhnet.precision_recall_curve(*arguments)
    relevant, other, confusion = _distances(pair)
    some = int(findable.sum())
    health = health_figures(examined)
    figures = ReportFigures(
        convention=convention,
        map=round_figure(ap_Q[kept].mean()),
        tie_bounds=(round_figure(bounds[0][kept].mean()), round_figure(bounds[1][kept].mean())),
        by_convention=map_by_convention(pair, settings.at),
        reranked=_reranked(pair, settings),
        map_min=round_figure(map_min),
        chance=round_figure(chance_of_pair(pair, settings)),
        relevant_share=round_figure(relevant_share(arguments[1], arguments[3])),
        bits=pair.bits,
        queries=len(pair.queries),
        database=len(pair.database),
        skipped=int((~kept).sum()),
        distinct=health.database.distinct,
        precision_at={str(k): round_figure(hhnet.precision_at(*arguments, k)) for k in _ranks(PRECISION_RANKS, pair)},
        within_radius_2=round_figure(hhnet.precision_within_radius(*arguments, 2)),
        pr_curve=Curve(round_figures(recall[: pair.bits + 1]), round_figures(precision[: pair.bits + 1]), some),
        pr_by_rank=_pr_by_rank(pair, some),
        precision_at_n=_precision_at_n(pair),
        distances_relevant=relevant,
        distances_other=other,
        classes=_per_class(pair, ap_Q, settings),
        confusion=confusion,
        health=health,
        notes=_notes(pair),
    )
    return figures, ap_Q


def _pr_by_rank(pair: Pair, queries: int) -> RankCurve:
    size = len(pair.database)
    ranks = sorted({round(size ** (place / RANK_POINTS)) for place in range(RANK_POINTS + 1)})
    precision, recall = hhnet.precision_recall_at(*pair.arguments(), ranks)
    return RankCurve(ranks, round_figures(recall), round_figures(precision), queries)


def _reranked(pair: Pair, settings: EvaluateSettings) -> RerankedFigures | None:
    if settings.rerank is None or pair.real_codes is None:
        return None
    queries, database = pair.real_codes
    first = min(settings.rerank, len(pair.database))
    convention = settings.model_dump(include={"at", "denominator", "empty"})
    order = np.arange(len(database))
    if settings.ties == "expected":
        # Moving the database moves its ties, since the ranking leaves equal scores in database order.
        order = np.random.Generator(np.random.Philox(2)).permutation(order)
    query_codes, query_labels, codes, labels = pair.arguments()
    arguments = query_codes, query_labels, codes[order], labels[order]
    scores = hhnet.saturate(queries), hhnet.saturate(database[order])
    value = hhnet.mean_average_precision(*arguments, **convention, ties="scores", tie_scores=scores, rerank=first)
    return RerankedFigures(first, round_figure(value))


def _ranks(wanted: Sequence[int], pair: Pair) -> list[int]:
    """Return the ranks up to the length of the database, or that length alone if all are larger."""
    return [k for k in wanted if k <= len(pair.database)] or [len(pair.database)]


def _some_queries(pair: Pair, count: int) -> npt.NDArray[np.int64]:
    """Draw at most `count` seeded queries, in their order."""
    total = len(pair.queries)
    # A fixed seed: every report of the same codes shows the same queries.
    random = np.random.Generator(np.random.Philox(0))
    return np.sort(random.permutation(total)[:count])


def _precision_at_n(pair: Pair) -> Curve:
    rows = _some_queries(pair, MAX_CURVE_QUERIES)
    ranks = _ranks(CURVE_RANKS, pair)
    arguments = pair.arguments(rows)
    return Curve(ranks, [round_figure(hhnet.precision_at(*arguments, k)) for k in ranks], len(rows))


def _distances(pair: Pair) -> tuple[Curve, Curve, ConfusionFigures]:
    """Count the distances of relevant and other pairs, and the classes of the nearest neighbours.

    As many queries are taken as MAX_HISTOGRAM_PAIRS allows.
    """
    rows = _some_queries(pair, min(MAX_CURVE_QUERIES, max(1, MAX_HISTOGRAM_PAIRS // len(pair.database))))
    step = max(1, PAIRS_PER_BLOCK // len(pair.database))
    counts = np.zeros((2, pair.bits + 1), np.int64)
    asked = np.flatnonzero(pair.queries.labels[rows].any(0))  # not all classes: there may be many thousands
    near_AC = np.zeros((len(asked), len(pair.classes)))
    k = min(CONFUSION_NEIGHBOURS, len(pair.database))
    database_NC = pair.database.labels.astype(np.float32)
    for start in range(0, len(rows), step):
        block = rows[start : start + step]
        labels_QC = pair.queries.labels[block].astype(np.float32)
        distances = hhnet.hamming_distances(pair.queries.codes[block], pair.database.codes)
        shared = labels_QC @ database_NC.T > 0
        for place, chosen in enumerate((shared, ~shared)):
            counts[place] += np.bincount(distances[chosen], minlength=pair.bits + 1)
        near_AC += labels_QC[:, asked].T.astype(np.float64) @ (nearest_probabilities(distances, k) @ database_NC)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    places = list(range(pair.bits + 1))
    relevant, other = (Curve(places, round_figures(side), len(rows)) for side in shares)
    return relevant, other, _confusion(pair, near_AC, asked, rows, k)


def _confusion(
    pair: Pair, near_AC: npt.NDArray[np.float64], asked: npt.NDArray[np.int64], rows: npt.NDArray[np.int64], k: int
) -> ConfusionFigures:
    """Turn the counts of neighbours into shares, by class of the query (one of `asked`) and class of the neighbour."""
    queries_A = pair.queries.labels[rows][:, asked].sum(0)
    shares_AC = np.round(near_AC / (k * queries_A)[:, None], REPORT_DIGITS)
    others_AC = shares_AC.copy()
    others_AC[np.arange(len(asked)), asked] = 0
    order = np.argsort(-others_AC, axis=None, kind="stable")[:CONFUSIONS_LISTED].tolist()
    places = [divmod(place, len(pair.classes)) for place in order]
    most = [Confused(pair.classes[asked[a]], pair.classes[b], round_figure(others_AC[a, b])) for a, b in places]
    used = [n for n in range(len(pair.classes)) if n in asked or pair.database.labels[:, n].any()]
    used = used if len(used) <= MAX_TABLE_CLASSES else []
    row = {int(n): place for place, n in enumerate(asked)}
    return ConfusionFigures(
        neighbours=k,
        queries=len(rows),
        classes=[pair.classes[n] for n in used],
        shares=[round_figures(shares_AC[row[n], used]) if n in row else None for n in used],
        most=[confused for confused, place in zip(most, places, strict=True) if others_AC[place] > 0],
    )


def _per_class(pair: Pair, ap_Q: npt.NDArray[np.float64], settings: EvaluateSettings) -> list[ClassFigures]:
    """Return the figures of classes on either side; a query with several classes counts in each."""
    figures = []
    _, query_labels, _, database_labels = pair.arguments()
    queries, database = pair.queries.labels.sum(0), pair.database.labels.sum(0)
    convention = settings.at, settings.denominator, settings.empty
    for number, name in enumerate(pair.classes):
        mine = ap_Q[pair.queries.labels[:, number]]
        mine = mine[~np.isnan(mine)]
        if queries[number] or database[number]:
            mean = round_figure(mine.mean()) if len(mine) else None
            chance = None
            if mean is not None:
                labels = query_labels[pair.queries.labels[:, number]]
                chance = round_figure(hhnet.chance_map(labels, database_labels, *convention))
            figures.append(ClassFigures(name, int(queries[number]), int(database[number]), mean, chance))
    return figures


def _notes(pair: Pair) -> list[str]:
    notes = []
    shared = set(pair.queries.shards) & set(pair.database.shards)
    if shared:
        notes.append("Some queries are in the database too: each of them finds itself at distance 0, which raises mAP.")
    unlabelled = int((~pair.queries.labels.any(1)).sum())
    if unlabelled:
        notes.append(f"{unlabelled:,} queries have no label, so that nothing is relevant to them.")
    return notes
