"""Measures how far two codes of the same samples agree on neighbours, and shows the figures on a page."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

import hhnet
from pipelines.artifacts.commit import ArtifactWriter
from pipelines.artifacts.facts import AgreementMeta
from pipelines.artifacts.manifest import Artifact, fingerprint
from pipelines.artifacts.result import Result
from pipelines.artifacts.versions import find_finished
from pipelines.cluster.progress import stage
from pipelines.config.fingerprint import result_settings
from pipelines.config.settings import AgreementSettings, Config
from pipelines.encode.codes import CodesSet, open_codes
from pipelines.errors import InputError
from pipelines.evaluate.overlap import (
    Distances,
    Floats,
    expected_average_precisions,
    expected_overlaps,
    nearest_probabilities,
)
from pipelines.evaluate.pair import Pair, Side, find_names, load_pair
from pipelines.evaluate.rounding import REPORT_DIGITS, round_figure, round_figures
from pipelines.evaluate.subject import describe_change
from pipelines.report import plots as drawings
from pipelines.report.page import GalleryRow, Tile, put_report, render, report_uris
from pipelines.report.pictures import Pictures, find_pictures
from pipelines.storage import Store

DISTANCE_BINS = 32
PAIRS_PER_BLOCK = 1 << 22

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Matched:
    """Samples that both codes hold, row by row: codes uint8 (N, bytes), labels bool (N, C) from the old codes."""

    old: npt.NDArray[np.uint8]
    new: npt.NDArray[np.uint8]
    bits: tuple[int, int]
    labels: npt.NDArray[np.bool_]
    classes: Sequence[str]
    places: Side
    """The samples as the old codes hold them."""
    old_only: int
    new_only: int


@dataclass(frozen=True)
class Movement:
    """Distances of the same pairs before and after, each divided by the number of bits."""

    old: Sequence[float]
    """Share of the pairs in each bin; the bins have equal width from 0 to 1."""
    new: Sequence[float]
    old_mean: float
    new_mean: float


@dataclass(frozen=True)
class ClassOverlap:
    """Mean overlap of the queries with one class."""

    name: str
    queries: int
    overlap: float


@dataclass(frozen=True)
class AgreementFigures:
    """Every number of the report."""

    overlap: float
    """Mean overlap over the queries; see `expected_overlaps`."""
    chance: float
    """Overlap of independent codes: k / (samples - 1)."""
    k: int
    queries: int
    samples: int
    old_only: int
    new_only: int
    bits_old: int
    bits_new: int
    self_overlap: tuple[float, float]
    """Mean overlap of the old codes with themselves, and of the new ones: with two random orders of their ties."""
    map: tuple[float, float] | None
    """The mAP of old and of new codes among these samples, by the classes of the queries; None without classes.

    A query is searched among all others, ties count by their expectation, and queries of which no other sample shares
    a class are left out.
    """
    map_chance: float | None
    """The mAP of codes without information; None where `map` is."""
    quartiles: Sequence[float]
    """Quartiles of the overlap over the queries."""
    correlation: float | None
    """Pearson's correlation of old and new distances, over all pairs of a query and another sample.

    None where all distances of a side are equal.
    """
    pairs: Movement
    """All pairs of a query and another sample."""
    neighbours: Movement
    """Queries and their old neighbours, weighted by the probability that they are among the k nearest."""
    classes: Sequence[ClassOverlap]

    def as_json(self) -> dict[str, Any]:
        """Return the figures as plain JSON values."""
        return asdict(self)


def match_samples(pair: Pair, bits_new: int) -> Matched:
    """Match the old codes (the queries of `pair`) and the new ones (its database) by tar sha256 and row."""
    known = sorted({*pair.queries.shards, *pair.database.shards})
    old_ids, new_ids = _ids(pair.queries, known), _ids(pair.database, known)
    both, old, new = np.intersect1d(old_ids, new_ids, assume_unique=True, return_indices=True)
    return Matched(
        pair.queries.codes[old],
        pair.database.codes[new],
        (pair.bits, bits_new),
        pair.queries.labels[old],
        pair.classes,
        pair.queries.rows(old),
        len(old_ids) - len(both),
        len(new_ids) - len(both),
    )


def _ids(side: Side, known: Sequence[str]) -> npt.NDArray[np.int64]:
    place = {digest: number for number, digest in enumerate(known)}
    ordinals = np.array([place[digest] for digest in side.shards], np.int64)
    return ordinals[side.shard] << 32 | side.row  # one number for tar and row; rows are int32


class _Tally:
    """Sums over blocks of queries: distances of all pairs, and distances of old neighbours by probability."""

    def __init__(self, bits: tuple[int, int]) -> None:
        self.bits = bits
        self.pairs = [np.zeros(b + 1) for b in bits]
        self.near = [np.zeros(b + 1) for b in bits]
        self.product = 0
        self.precisions: list[Floats] = []

    def add(self, both: tuple[Distances, Distances], p_old: Floats, relevant: npt.NDArray[np.bool_]) -> None:
        """Count one block, `relevant` (Q, N - 1) telling which samples share a class with the query."""
        scored = relevant.any(1)
        self.precisions.append(np.stack([_precisions(d[scored], relevant[scored], b) for d, b in self._sides(both)]))
        weights = p_old.ravel()
        for place, (distances, bits) in enumerate(zip(both, self.bits, strict=True)):
            self.pairs[place] += np.bincount(distances.ravel(), minlength=bits + 1)
            self.near[place] += np.bincount(distances.ravel(), weights, minlength=bits + 1)
        # In integers: the sum over all blocks is exact, whatever their size.
        self.product += int((both[0].astype(np.int64) * both[1]).sum())

    def _sides(self, both: tuple[Distances, Distances]) -> list[tuple[Distances, int]]:
        """Return the distances with their largest value; the third, all at 0, are those of codes that say nothing."""
        return [*zip(both, self.bits, strict=True), (np.zeros_like(both[0]), 0)]

    def maps(self) -> list[float] | None:
        """Return the mAP of old codes, of new ones and of chance, or None where no query has a relevant sample."""
        precisions = np.concatenate(self.precisions, axis=1)
        return round_figures(precisions.mean(1)) if precisions.size else None

    def correlation(self) -> float | None:
        """Return Pearson's correlation of the two distances of all pairs."""
        (old, old_square), (new, new_square) = (_moments(counts) for counts in self.pairs)
        spread = (old_square - old * old) * (new_square - new * new)
        mean = self.product / self.pairs[0].sum()
        return round_figure((mean - old * new) / np.sqrt(spread)) if spread > 0 else None


def _precisions(distances: Distances, relevant: npt.NDArray[np.bool_], bits: int) -> Floats:
    """Return the expected AP of each query (Q,) by its distances (Q, N)."""
    rows = np.arange(len(distances))[:, None] * (bits + 1)
    size = len(distances) * (bits + 1)
    places = distances + rows
    found = np.bincount(places.ravel(), minlength=size).reshape(-1, bits + 1).astype(np.float64)
    hits = np.bincount(places[relevant], minlength=size).reshape(-1, bits + 1).astype(np.float64)
    return expected_average_precisions(found, hits)


def _moments(counts: Floats) -> tuple[float, float]:
    places = np.arange(len(counts))
    return float(counts @ places / counts.sum()), float(counts @ (places * places) / counts.sum())


def _movement(counts: Sequence[Floats], bits: tuple[int, int]) -> Movement:
    bins = min(DISTANCE_BINS, *bits)
    shares = []
    for mine, length in zip(counts, bits, strict=True):
        place = np.minimum(np.arange(length + 1) * bins // length, bins - 1)  # the last bin holds `length` too
        shares.append(round_figures(np.bincount(place, mine, minlength=bins) / mine.sum()))
    means = [round_figure(_moments(mine)[0] / length) for mine, length in zip(counts, bits, strict=True)]
    return Movement(shares[0], shares[1], means[0], means[1])


def measure_agreement(matched: Matched, settings: AgreementSettings) -> tuple[AgreementFigures, Floats, Ids]:
    """Return all figures of the report, each query's overlap (Q,), and the rows of the queries (Q,).

    A query is no neighbour of itself, and there are at least 2 samples.
    """
    total = len(matched.old)
    k = min(settings.k, total - 1)
    # Philox by name, so that another default generator of numpy would not change the report.
    random = np.random.Generator(np.random.Philox(settings.seed))
    queries = np.sort(random.permutation(total)[: settings.queries])
    tally, found = _Tally(matched.bits), []
    alone: list[Floats] = []
    labels_NC = matched.labels.astype(np.float32)
    step = max(1, PAIRS_PER_BLOCK // total)
    for start in range(0, len(queries), step):
        block = queries[start : start + step]
        others = np.ones((len(block), total), np.bool_)
        others[np.arange(len(block)), block] = False
        both = _others(matched.old, block, others), _others(matched.new, block, others)
        p_old, p_new = (nearest_probabilities(side, k) for side in both)
        found.append(expected_overlaps(p_old, p_new, k))
        alone.append(np.stack([expected_overlaps(side, side, k) for side in (p_old, p_new)]))
        shared = labels_NC[block] @ labels_NC.T > 0
        tally.add(both, p_old, shared[others].reshape(len(block), -1))
    overlap_Q, (self_old, self_new) = np.concatenate(found), np.concatenate(alone, axis=1).mean(1)
    maps = tally.maps()
    figures = AgreementFigures(
        overlap=round_figure(overlap_Q.mean()),
        chance=round_figure(k / (total - 1)),
        k=k,
        queries=len(queries),
        samples=total,
        old_only=matched.old_only,
        new_only=matched.new_only,
        bits_old=matched.bits[0],
        bits_new=matched.bits[1],
        self_overlap=(round_figure(self_old), round_figure(self_new)),
        map=(maps[0], maps[1]) if maps else None,
        map_chance=maps[2] if maps else None,
        quartiles=round_figures(np.quantile(overlap_Q, (0.25, 0.5, 0.75))),
        correlation=tally.correlation(),
        pairs=_movement(tally.pairs, matched.bits),
        neighbours=_movement(tally.near, matched.bits),
        classes=_by_class(matched, queries, overlap_Q),
    )
    return figures, overlap_Q, queries


def _others(
    codes: npt.NDArray[np.uint8], block: npt.NDArray[np.int64], others: npt.NDArray[np.bool_]
) -> npt.NDArray[np.int32]:
    """Return the distances from the queries of a block to all other samples, int32 (Q, N - 1)."""
    return hhnet.hamming_distances(codes[block], codes)[others].reshape(len(block), -1)


def _by_class(matched: Matched, queries: npt.NDArray[np.int64], overlap_Q: Floats) -> list[ClassOverlap]:
    """Return the mean overlap of each class with a query; a query with several classes counts in each."""
    labels = matched.labels[queries]
    return [
        ClassOverlap(name, int(labels[:, place].sum()), round_figure(overlap_Q[labels[:, place]].mean()))
        for place, name in enumerate(matched.classes)
        if labels[:, place].any()
    ]


def example_rows(
    matched: Matched, overlap_Q: Floats, queries: Ids, pictures: Pictures, codes: CodesSet
) -> list[GalleryRow]:
    """Return queries spread evenly from the lowest overlap to the highest, with old and new neighbours and pictures.

    The names of the files are those in `codes`.
    """
    order = np.argsort(np.round(overlap_Q, REPORT_DIGITS), kind="stable")
    ranks = sorted({round(rank) for rank in np.linspace(0, len(order) - 1, EXAMPLES)})
    chosen = [int(order[rank]) for rank in ranks]
    near = {place: [_nearest_others(side, queries[place]) for side in (matched.old, matched.new)] for place in chosen}
    neighbours = {number for sides in near.values() for side in sides for number, _ in side}
    shown = {int(queries[place]) for place in chosen} | neighbours
    wanted = {matched.places.place(number) for number in shown}
    found, files = pictures.get(wanted), find_names([codes], wanted)

    def tile(number: int, query: int | None = None, distance: int | None = None, remark: str = "") -> Tile:
        names = [matched.classes[n] for n in np.flatnonzero(matched.labels[number]).tolist()]
        right = None
        if query is not None and matched.labels[query].any():
            right = bool((matched.labels[query] & matched.labels[number]).any())
        place = matched.places.place(number)
        return Tile(files[place], names, found.get(place), distance, right, remark)

    rows = []
    for place, sides in near.items():
        query = int(queries[place])
        both = {number for number, _ in sides[0]} & {number for number, _ in sides[1]}
        old, new = ([tile(n, query, d, "in both" if n in both else "") for n, d in side] for side in sides)
        rows.append(GalleryRow(tile(query, remark=f"overlap {overlap_Q[place]:.3f}"), old, new))
    return rows


def _nearest_others(codes: npt.NDArray[np.uint8], query: int) -> list[tuple[int, int]]:
    """Return the nearest other samples of one, with their distances."""
    distances = hhnet.hamming_distances(codes[[query]], codes)[0].astype(np.int64)
    order = [n for n in np.argsort(distances, kind="stable")[: EXAMPLE_NEIGHBOURS + 1].tolist() if n != query]
    return [(n, int(distances[n])) for n in order[:EXAMPLE_NEIGHBOURS]]


PROGRESS_STEPS = 3
OVERLAP_BINS = 20
EXAMPLES = 6
EXAMPLE_NEIGHBOURS = 10
AGREEMENT_VERSION = 3
"""Version of the report format. Bump it when the contents of a report change."""


@dataclass(frozen=True, kw_only=True)
class AgreementResult(Result):
    """The report on two codes, and its main figures."""

    verb: str = "agreement"
    overlap: float
    chance: float
    k: int
    correlation: float | None
    bits_old: int
    bits_new: int
    queries: int
    samples: int
    old_only: int
    new_only: int
    report: str
    metrics: str


def report_agreement(old: str, new: str, out: str, config: Config) -> AgreementResult:
    """Compare the codes `old` and `new` of the same shards into a report at `out`.

    Samples are matched by the sha256 of their tar and their row; samples on one side only are counted and left out. The
    codes may differ in bits. Raises InputError where they share fewer than two samples.
    """
    sides = {"old": open_codes(old), "new": open_codes(new)}
    digests = {role: entry.artifact.digest for role, entry in sides.items()}
    name = fingerprint("report", {**digests, "figures": AGREEMENT_VERSION}, result_settings(config, "agreement"))
    artifact = find_finished(Store(out), "report", name)
    if artifact is not None:
        return _agreement_result(artifact, "unchanged")
    with stage("agreement", PROGRESS_STEPS, unit="steps") as advance:
        matched = _match_codes(sides["old"], sides["new"])
        advance(1, note="codes read")
        named = {role: entry.artifact for role, entry in sides.items()}
        writer = ArtifactWriter.of(Store(out), "report", name, named, result_settings(config, "agreement"))
        artifact = _publish_agreement(writer, matched, sides, config)
        advance(2)
    return _agreement_result(artifact, "done")


def _match_codes(old: CodesSet, new: CodesSet) -> Matched:
    both = f"{old.artifact.uri} and {new.artifact.uri}"
    if not {shard.sha256 for shard in old.shards} & {shard.sha256 for shard in new.shards}:
        raise InputError(f"{both} are codes of different shards: name codes of the same tars")
    matched = match_samples(load_pair(old, [new]), new.bits)
    if len(matched.old) < 2:
        raise InputError(f"{both} share {len(matched.old)} samples: at least 2 are needed")
    return matched


def _publish_agreement(
    writer: ArtifactWriter, matched: Matched, sides: Mapping[str, CodesSet], config: Config
) -> Artifact:
    figures, overlap_Q, queries = measure_agreement(matched, config.agreement)
    counts, _ = np.histogram(overlap_Q, OVERLAP_BINS, (0, 1))
    drawn = {
        "overlap": drawings.overlap_histogram((counts / len(overlap_Q)).tolist()),
        "pair_distances": drawings.moved_distances(figures.pairs.old, figures.pairs.new),
        "neighbour_distances": drawings.moved_distances(figures.neighbours.old, figures.neighbours.new),
    }
    pictures = find_pictures([entry.artifact for entry in sides.values()], ())
    rows = example_rows(matched, overlap_Q, queries, pictures, sides["old"])
    codes = {f"{role} codes": entry.artifact.digest for role, entry in sides.items()}
    page = render(
        "agreement",
        figures=figures,
        drawn=drawn,
        classes=sorted(figures.classes, key=lambda entry: (-entry.overlap, entry.name)),
        subject=describe_change(sides["old"], sides["new"]),
        rows=rows,
        problems=pictures.problems,
        sources={**codes, **{f"{role} model": entry.model for role, entry in sides.items()}},
    )
    parts = put_report(writer, figures.as_json(), page, drawn, figures.queries)
    totals = {name: getattr(figures, name) for name in ("queries", "samples", "old_only", "new_only")}
    return writer.commit(parts, totals, AgreementMeta.model_validate(figures, from_attributes=True))


def _agreement_result(artifact: Artifact, status: str) -> AgreementResult:
    facts = {**artifact.facts(AgreementMeta).as_json(), **artifact.manifest.totals, **report_uris(artifact)}
    return AgreementResult.of(artifact, status, **facts)
