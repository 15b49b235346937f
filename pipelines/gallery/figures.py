"""Every number of a report: codes and labels in memory, and what is measured on them."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

import hhnet
from pipelines.codes import CodesSet, class_names, code_array, logits_array
from pipelines.config import EvaluateSettings
from pipelines.errors import InputError
from pipelines.gallery.health import Examined, HealthFigures, health_figures
from pipelines.gallery.pictures import Place
from pipelines.gallery.rounding import all_rounded, rounded

RANKS = (10, 100, 1000)
CURVE_RANKS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000)
CURVE_QUERIES = 1000
PAIRS = 30_000_000
BLOCK_PAIRS = 1 << 22


@dataclass(frozen=True)
class Side:
    """The queries or the database: codes uint8 (N, bytes), multi-hot labels bool (N, C), and where each row lies."""

    codes: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.bool_]
    logits: npt.NDArray[np.int8] | None
    """(N, bits), or None where they are not asked for."""
    shard: npt.NDArray[np.int32]
    row: npt.NDArray[np.int32]
    shards: Sequence[str]
    """sha256 of the tars that `shard` counts."""

    def __len__(self) -> int:
        return len(self.codes)

    def place(self, number: int) -> Place:
        """Where the image of a row lies."""
        return Place(self.shards[self.shard[number]], int(self.row[number]))


@dataclass(frozen=True)
class Pair:
    """Both sides under one list of classes."""

    queries: Side
    database: Side
    classes: tuple[str, ...]
    bits: int

    def arguments(self, rows: npt.NDArray[np.int64] | None = None) -> tuple[Any, Any, Any, Any]:
        """Codes and labels as the metrics take them, of all queries or of some; class ids where each has just one."""
        queries = (self.queries.codes, self.queries.labels)
        if rows is not None:
            queries = queries[0][rows], queries[1][rows]
        sides = [*queries, self.database.codes, self.database.labels]
        if all((side.labels.sum(1) == 1).all() for side in (self.queries, self.database)):
            sides[1], sides[3] = sides[1].argmax(1), sides[3].argmax(1)
        return sides[0], sides[1], sides[2], sides[3]


@dataclass(frozen=True)
class ClassFigures:
    """One class: its queries, its database items, and the mAP of its queries (None where none counts)."""

    name: str
    queries: int
    database: int
    map: float | None


@dataclass(frozen=True)
class Reranked:
    """The mAP of what `hhnet search --rerank` gives, the rest of the ranking behind it.

    Ties in distance stand in database order by that convention; else in one seeded random order, so that the figure is
    to be compared with the expectation over all orders.
    """

    first: int
    """Nearest codes of a query that are ordered by their logits; the others stay."""
    map: float


@dataclass(frozen=True)
class Curve:
    """Points of a curve; `queries` is how many queries it averages."""

    x: Sequence[float]
    y: Sequence[float]
    queries: int


@dataclass(frozen=True)
class Figures:
    """Every number of a report. Precisions are expectations over the order inside ties."""

    convention: Mapping[str, Any]
    """The settings `at`, `ties`, `denominator`, `empty`."""
    map: float
    reranked: Reranked | None
    map_min: float
    """The same with AP divided by min(relevant, K), which cannot fall when a better ranking finds more."""
    chance: float
    bits: int
    queries: int
    database: int
    skipped: int
    """Queries that the convention leaves out."""
    distinct: int
    """Different codes in the database."""
    precision_at: Mapping[str, float]
    within_radius_2: float
    pr_curve: Curve
    """x = recall, y = precision, at the Hamming radii 0, 1, ..., bits."""
    precision_at_n: Curve
    distances_relevant: Curve
    """x = distance, y = share of the pairs that share a class."""
    distances_other: Curve
    classes: Sequence[ClassFigures]
    health: HealthFigures
    notes: Sequence[str] = field(default_factory=tuple)

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values; what was not asked for is left out."""
        return {name: value for name, value in asdict(self).items() if name != "reranked" or value}


# -------------------------------------------------------------------------------------------------------- loading


def load_pair(query_set: CodesSet, sets: Sequence[CodesSet], logits: bool = False) -> Pair:
    """All codes and labels in memory, class ids mapped by name to the sorted union of the class lists."""
    classes = tuple(sorted({name for entry in sets for name in entry.classes}))
    return Pair(_load([query_set], classes, logits), _load(sets, classes, logits), classes, query_set.bits)


def _load(sets: Sequence[CodesSet], classes: Sequence[str], with_logits: bool) -> Side:
    place = {name: number for number, name in enumerate(classes)}
    codes: list[npt.NDArray[np.uint8]] = []
    labels: list[npt.NDArray[np.bool_]] = []
    logits: list[npt.NDArray[np.int8]] = []
    shards: list[npt.NDArray[np.int32]] = []
    rows: list[npt.NDArray[np.int32]] = []
    for entry in sets:
        ids = np.array([place[name] for name in entry.classes], np.int64)
        for table in entry.tables():
            codes.append(code_array(table["code"]))
            labels.append(_multi_hot(table["labels"], ids, len(classes), entry))
            logits += [logits_array(table["logits"])] if with_logits else []
            shards.append(np.full(len(table), len(shards), np.int32))
            rows.append(table["row"].to_numpy())
    names = [shard.sha256 for entry in sets for shard in entry.shards]
    return Side(
        np.concatenate(codes),
        np.concatenate(labels),
        np.concatenate(logits) if with_logits else None,
        np.concatenate(shards),
        np.concatenate(rows),
        names,
    )


def _multi_hot(
    column: pa.ChunkedArray, ids: npt.NDArray[np.int64], classes: int, entry: CodesSet
) -> npt.NDArray[np.bool_]:
    flat = pc.list_flatten(column).to_numpy()
    if len(flat):
        class_names([int(flat.min()), int(flat.max())], entry.classes, entry.artifact.uri)
    counts = pc.list_value_length(column).to_numpy()
    hot = np.zeros((len(column), classes), np.bool_)
    hot[np.repeat(np.arange(len(column)), counts), ids[flat]] = True
    return hot


# ------------------------------------------------------------------------------------------------------ measuring


def measure(pair: Pair, examined: Examined, settings: EvaluateSettings) -> tuple[Figures, npt.NDArray[np.float64]]:
    """All figures of the report, and the AP of every query (NaN where the convention leaves it out).

    `examined` is what was found in the codes of the same pair.
    """
    arguments = pair.arguments()
    convention = settings.model_dump(include={"at", "ties", "denominator", "empty"})
    ap_Q = hhnet.average_precisions(*arguments, **convention)
    kept = ap_Q[~np.isnan(ap_Q)]
    if not len(kept):
        raise InputError("no query has a relevant item in reach, and evaluate.empty=skip leaves all of them out")
    map_min = float(kept.mean())
    if settings.at is not None and settings.denominator != "min":
        map_min = hhnet.mean_average_precision(*arguments, **{**convention, "denominator": "min"})
    precision, recall = hhnet.precision_recall_curve(*arguments)
    relevant, other = _distances(pair)
    health = health_figures(examined)
    figures = Figures(
        convention=convention,
        map=rounded(kept.mean()),
        reranked=_reranked(pair, settings),
        map_min=rounded(map_min),
        chance=rounded(hhnet.chance_map(arguments[1], arguments[3])),
        bits=pair.bits,
        queries=len(pair.queries),
        database=len(pair.database),
        skipped=len(ap_Q) - len(kept),
        distinct=health.database.distinct,
        precision_at={str(k): rounded(hhnet.precision_at(*arguments, k)) for k in _ranks(RANKS, pair)},
        within_radius_2=rounded(hhnet.precision_within_radius(*arguments, 2)),
        pr_curve=Curve(all_rounded(recall[: pair.bits + 1]), all_rounded(precision[: pair.bits + 1]), len(ap_Q)),
        precision_at_n=_precision_at_n(pair),
        distances_relevant=relevant,
        distances_other=other,
        classes=_per_class(pair, ap_Q),
        health=health,
        notes=_notes(pair),
    )
    return figures, ap_Q


def _reranked(pair: Pair, settings: EvaluateSettings) -> Reranked | None:
    queries, database = pair.queries.logits, pair.database.logits
    if settings.rerank is None or queries is None or database is None:
        return None
    first = min(settings.rerank, len(pair.database))
    convention = settings.model_dump(include={"at", "denominator", "empty"})
    order = np.arange(len(database))
    if settings.ties == "expected":
        order = np.random.Generator(np.random.Philox(2)).permutation(order)
    query_codes, query_labels, codes, labels = pair.arguments()
    value = hhnet.mean_average_precision(
        *(query_codes, query_labels, codes[order], labels[order]),
        **convention,
        ties="scores",
        tie_scores=(hhnet.saturate(queries), hhnet.saturate(database[order])),
        rerank=first,
    )
    return Reranked(first, rounded(value))


def _ranks(wanted: Sequence[int], pair: Pair) -> list[int]:
    """The ranks that the database is long enough for."""
    return [k for k in wanted if k <= len(pair.database)] or [len(pair.database)]


def _some_queries(pair: Pair, count: int) -> npt.NDArray[np.int64]:
    """At most `count` queries, seeded, in their order."""
    total = len(pair.queries)
    random = np.random.Generator(np.random.Philox(0))
    return np.sort(random.permutation(total)[:count])


def _precision_at_n(pair: Pair) -> Curve:
    rows = _some_queries(pair, CURVE_QUERIES)
    ranks = _ranks(CURVE_RANKS, pair)
    arguments = pair.arguments(rows)
    return Curve(ranks, [rounded(hhnet.precision_at(*arguments, k)) for k in ranks], len(rows))


def _distances(pair: Pair) -> tuple[Curve, Curve]:
    """Histograms of the distances of relevant and of other pairs, over as many queries as PAIRS allows."""
    rows = _some_queries(pair, min(CURVE_QUERIES, max(1, PAIRS // len(pair.database))))
    step = max(1, BLOCK_PAIRS // len(pair.database))
    counts = np.zeros((2, pair.bits + 1), np.int64)
    database_NC = pair.database.labels.astype(np.float32)
    for start in range(0, len(rows), step):
        block = rows[start : start + step]
        distances = hhnet.hamming_distances(pair.queries.codes[block], pair.database.codes)
        shared = pair.queries.labels[block].astype(np.float32) @ database_NC.T > 0
        for place, chosen in enumerate((shared, ~shared)):
            counts[place] += np.bincount(distances[chosen], minlength=pair.bits + 1)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    places = list(range(pair.bits + 1))
    return Curve(places, all_rounded(shares[0]), len(rows)), Curve(places, all_rounded(shares[1]), len(rows))


def _per_class(pair: Pair, ap_Q: npt.NDArray[np.float64]) -> list[ClassFigures]:
    """Classes that either side uses; a query of several classes counts in each."""
    figures = []
    queries, database = pair.queries.labels.sum(0), pair.database.labels.sum(0)
    for number, name in enumerate(pair.classes):
        mine = ap_Q[pair.queries.labels[:, number]]
        mine = mine[~np.isnan(mine)]
        if queries[number] or database[number]:
            mean = rounded(mine.mean()) if len(mine) else None
            figures.append(ClassFigures(name, int(queries[number]), int(database[number]), mean))
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
