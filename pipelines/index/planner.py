"""Predicts the cost of each kind of index for these codes before any work, and chooses one.

Bytes are those of the parts, by each kind's own formula. Seconds and recalls are measured: each kind builds and
searches parts of 1,024, 4,096, ... codes of a seeded sample, up to the largest part or until its share of time is used
up. Queries are codes of the sample outside these parts. Real codes have real duplicates and clusters, which decide the
buckets of multihash, the lists of ivf and the links of hnsw.

Parts larger than the tried ones are predicted from the last two sizes, as a + b W(N): the kind declares how its work W
grows with the N codes of a part. A recall is assumed to go on falling with log N as between the last two sizes, and
never to rise.

The time of a query covers all parts, one after another, opened and in memory, as in the gate.

Shape suffixes: N codes, B bytes of a code, Q queries.
"""

import io
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from math import log
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ByteSize

from hhnet import hamming_knn
from pipelines.artifacts.host import allowed_cpus
from pipelines.cluster.progress import stage
from pipelines.config.settings import Config, IndexSettings
from pipelines.console import NOTICE, draws_on_terminal
from pipelines.errors import ConfigError, format_count
from pipelines.index.gate import search_one_by_one, six_digits, tie_aware_recall
from pipelines.index.kinds import NOTHING_REMOVED, Codes, index_kind, kind_names
from pipelines.index.parts import PartTask, read_shard_codes
from pipelines.storage import scratch_folder

_log = logging.getLogger(__name__)

MIN_SAMPLE_CODES, MAX_SAMPLE_CODES = 1 << 15, 1 << 18
"""Bounds of the sample size in codes.

Between them it is the size of the largest part; the codes come from as few shards as hold them.
"""
TRIAL_QUERIES = 64
FIRST_TRIAL_CODES, TRIAL_GROWTH = 1024, 4
"""Codes of the first part that is tried, and the factor from one trial to the next."""
TRIAL_BUDGET_S = 0.7
"""Approximate time budget in seconds for trial builds and searches of one kind."""

Growth = Callable[[int], float]
Curve = Callable[[int], float]
"""Function from the number of codes of a part to seconds, or to a recall."""


@dataclass(frozen=True)
class TriedPart:
    """A part that was built and searched: its codes, seconds to build, median seconds of a query, and recalls."""

    codes: int
    build_s: float
    query_s: float
    recall: float
    self_recall: float


@dataclass(frozen=True)
class Prediction:
    """Predicted index of one kind: bytes of its parts, seconds to build it and of a query, and two recalls.

    `recall` is measured at k. `self_recall` is the share of codes that find themselves.
    """

    kind: str
    exact: bool
    bytes: int
    build_s: float
    query_s: float
    recall: float
    self_recall: float


@dataclass(frozen=True)
class Plan:
    """The chosen kind, the reason, and the predictions; `sample` describes the codes that were measured."""

    kind: str
    why: str
    predictions: tuple[Prediction, ...]
    sample: Mapping[str, float]

    def facts(self) -> dict[str, Any]:
        """Return the plan as plain JSON values, for a result or a run record."""
        kinds = [six_digits(asdict(entry)) for entry in self.predictions]
        return {"why": self.why, "kinds": kinds, "sample": six_digits(self.sample)}


def plan_kind(tasks: Sequence[PartTask], config: Config) -> Plan:
    """Predict every kind for the codes of `tasks`, show the table on stderr, and choose.

    Raises ConfigError, with the figures, where no kind keeps within `index.memory`, `index.latency` and `index.recall`.
    """
    codes_NB = _draw_sample(tasks, config.index.seed)
    sizes = [task.rows for task in tasks]
    predictions = predict_kinds(codes_NB, sizes, config)
    sample = _duplicates(codes_NB)
    show_predictions(predictions, sample, sizes, config)
    kind, why = choose_kind(predictions, config.index)
    return Plan(kind, why, tuple(predictions), sample)


# --------------------------------------------------------------------------------------------------------- choice


def choose_kind(predictions: Sequence[Prediction], settings: IndexSettings) -> tuple[str, str]:
    """Return the kind to build and the reason: of the kinds within the budget, exact first, then fewest bytes.

    Raises ConfigError, with all figures, where none is.
    """
    passed: list[str] = []
    for entry in sorted(predictions, key=lambda entry: (not entry.exact, entry.bytes)):
        problems = list_objections(entry, settings)
        if not problems:
            merit = "exact" if entry.exact else "approximate"
            return entry.kind, "; ".join([f"{entry.kind} is {merit} and keeps within the budget", *passed])
        passed.append(f"{entry.kind} not: {', '.join(problems)}")
    raise ConfigError(
        f"no kind of index keeps within the budget: {'; '.join(passed)}: raise --memory or --latency, lower --recall, "
        "or name a --kind"
    )


def list_objections(entry: Prediction, settings: IndexSettings) -> list[str]:
    """List the limits that a kind breaks, each with its figure."""
    found = []
    if settings.memory is None and index_kind(entry.kind).needs_memory_limit:
        found.append(f"{readable_bytes(entry.bytes)} without --memory")
    elif settings.memory is not None and entry.bytes > settings.memory:
        found.append(f"{readable_bytes(entry.bytes)} are more than {readable_bytes(settings.memory)}")
    if settings.latency is not None and entry.query_s > settings.latency:
        found.append(f"{readable_time(entry.query_s)} are longer than {readable_time(settings.latency)}")
    if not entry.exact and entry.recall < settings.recall:
        found.append(f"recall {entry.recall:.3f} is below {settings.recall:g}")
    if entry.self_recall < settings.gate.min_self_recall:
        found.append(f"self-recall {entry.self_recall:.3f} is below the gate's {settings.gate.min_self_recall:g}")
    return found


# ----------------------------------------------------------------------------------------------------- prediction


def predict_kinds(codes_NB: Codes, sizes: Sequence[int], config: Config) -> list[Prediction]:
    """Predict each kind for parts of these sizes, measured on a sample of their codes in random order."""
    held = min(TRIAL_QUERIES, len(codes_NB) // 4)
    queries_QB = codes_NB[:held] if held else codes_NB
    codes_NB = codes_NB[held:]
    found: list[Prediction] = []
    scan: Curve | None = None
    with scratch_folder() as folder, stage("index: trying kinds", len(names := kind_names()), unit="kinds") as advance:
        for name in sorted(names, key=lambda name: (name != "flat", name)):  # the others need the scan of flat
            trials = _Trials(name, codes_NB, queries_QB, sizes, config, folder)
            scan = scan or trials.query_s
            found.append(trials.prediction(scan))
            advance(1)
    return found


class _Trials:
    """Tried parts of one kind, and predictions from them for parts of other sizes."""

    def __init__(
        self, name: str, codes_NB: Codes, queries_QB: Codes, sizes: Sequence[int], config: Config, folder: Path
    ) -> None:
        self.name, self.kind, self._sizes, self._config = name, index_kind(name), sizes, config
        self._width, count = codes_NB.shape[1], sum(sizes)
        self.parameters = self.kind.parameters(config.index, count)
        self.tried = self.kind.trial_parameters(self.parameters, len(codes_NB))
        self._build_factor = self.kind.build_factor(self.parameters, self.tried)
        shared, self._train_s = self._train(codes_NB, count)
        largest = min(max(sizes), len(codes_NB))
        self._made: list[TriedPart] = []
        for size in _trial_sizes(largest):
            if (
                len(self._made) > 1
                and _trial_seconds(self._made) + TRIAL_GROWTH * _trial_seconds(self._made[-1:]) > TRIAL_BUDGET_S
            ):
                break
            if not self._made:
                self.kind.build(codes_NB[:size], np.arange(size), shared, self.tried)  # compiles before the first trial
            self._made.append(self._try(codes_NB[:size], queries_QB, shared, folder / f"{name}-{size}"))

    def prediction(self, scan: Curve) -> Prediction:
        """Predict an index with parts of all the sizes."""
        workers = min(self._config.index.workers or allowed_cpus(), len(self._sizes))
        sizes, times = np.unique(self._sizes, return_counts=True)
        parts = list(zip(sizes.tolist(), times.tolist(), strict=True))
        built = partial(self._at, "build_s", growth=self.kind.build_work)
        return Prediction(
            kind=self.name,
            exact=self.kind.exact,
            bytes=sum(n * self.kind.part_bytes(size, self._width, self.parameters) for size, n in parts),
            build_s=self._train_s + self._build_factor * sum(n * built(size) for size, n in parts) / workers,
            query_s=sum(n * self._query_of_all(size, scan) for size, n in parts),
            recall=max(0.0, self._at("recall", max(self._sizes), log, falls=True)),
            self_recall=max(0.0, self._at("self_recall", max(self._sizes), log, falls=True)),
        )

    def query_s(self, size: int) -> float:
        """Return the seconds of a query in a part of `size` codes, with the parameters of the trials."""
        return self._at("query_s", size, self.kind.query_work)

    def _at(self, figure: str, size: int, growth: Growth, falls: bool = False) -> float:
        return interpolate([(trial.codes, getattr(trial, figure)) for trial in self._made], size, growth, falls)

    def _query_of_all(self, size: int, scan: Curve) -> float:
        per_code = (scan(2 * MAX_SAMPLE_CODES) - scan(MAX_SAMPLE_CODES)) / MAX_SAMPLE_CODES
        seconds = self.query_s(size) + per_code * self.kind.extra_codes(self.parameters, self.tried)
        return min(seconds, self.kind.max_scans * scan(size))

    def _train(self, codes_NB: Codes, count: int) -> tuple[bytes | None, float]:
        """Train the bytes that the tried parts share; also return the predicted seconds of the index's own training."""
        wanted = self.kind.sample_size(self.parameters)
        if not wanted:
            return None, 0.0
        sample = codes_NB[: self.kind.trial_sample_size(self.tried)]
        begun = time.perf_counter()
        shared = self.kind.train(sample, self.tried, self._config.index.seed)
        seconds = time.perf_counter() - begun
        return shared, seconds * min(wanted, count) / len(sample) * self._build_factor

    def _try(self, codes_NB: Codes, queries_QB: Codes, shared: bytes | None, path: Path) -> TriedPart:
        begun = time.perf_counter()
        data = self.kind.build(codes_NB, np.arange(len(codes_NB)), shared, self.tried)
        build_s = time.perf_counter() - begun
        path.write_bytes(data)
        part = self.kind.open(path, self._width, len(codes_NB), shared, self.tried, NOTHING_REMOVED)
        k = self._config.search.k
        (distances, _), seconds_Q = search_one_by_one(part, queries_QB, k)
        exact = 1.0 if self.kind.exact else tie_aware_recall(distances, hamming_knn(queries_QB, codes_NB, k)[0])
        itself = part.search(codes_NB[:TRIAL_QUERIES], 1)[0] == 0
        return TriedPart(len(codes_NB), build_s, float(np.median(seconds_Q)), exact, float(itself.mean()))


def interpolate(tried: Sequence[tuple[int, float]], size: int, growth: Growth, falls: bool = False) -> float:
    """Interpolate the value at `size`; beyond the tried sizes extrapolate by a + b growth(N) through the last two.

    b is at least 0; with `falls` it is at most 0.
    """
    sizes, values = [growth(count) for count, _ in tried], [value for _, value in tried]
    place = growth(size)
    if len(tried) == 1 or place <= sizes[-1]:
        return float(np.interp(place, sizes, values))
    slope = (values[-1] - values[-2]) / (sizes[-1] - sizes[-2])
    return values[-1] + (min(slope, 0.0) if falls else max(slope, 0.0)) * (place - sizes[-1])


def _trial_sizes(largest: int) -> Iterator[int]:
    size = FIRST_TRIAL_CODES
    while size < largest:
        yield size
        size *= TRIAL_GROWTH
    yield largest


def _trial_seconds(trials: Sequence[TriedPart]) -> float:
    return sum(trial.build_s + TRIAL_QUERIES * trial.query_s for trial in trials)


# --------------------------------------------------------------------------------------------------------- sample


def _draw_sample(tasks: Sequence[PartTask], seed: int) -> Codes:
    """Read shards in a seeded order until there are enough codes, and return the sample in a seeded order."""
    wanted = min(MAX_SAMPLE_CODES, max(MIN_SAMPLE_CODES, TRIAL_QUERIES + max(task.rows for task in tasks)))
    random = np.random.Generator(np.random.Philox(seed))
    sources = [source for task in tasks for source in task.sources]
    drawn: list[Codes] = []
    for place in random.permutation(len(sources)):
        drawn.append(read_shard_codes(sources[place]))
        if sum(map(len, drawn)) >= wanted:
            break
    codes_NB = np.concatenate(drawn)
    return np.ascontiguousarray(codes_NB[random.permutation(len(codes_NB))[:wanted]])


def _duplicates(codes_NB: Codes) -> dict[str, float]:
    """Return the number of codes, the share of distinct ones, and the share of the most common one."""
    _, counts = np.unique(codes_NB.view(f"V{codes_NB.shape[1]}"), return_counts=True)
    total = len(codes_NB)
    return {"codes": total, "distinct": len(counts) / total, "commonest": int(counts.max()) / total}


# ---------------------------------------------------------------------------------------------------------- table


def show_predictions(
    predictions: Sequence[Prediction], sample: Mapping[str, float], sizes: Sequence[int], config: Config
) -> None:
    """Print the table of predictions on stderr."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    summary = (
        f"{sum(sizes):,} codes in {format_count(len(sizes), 'part')}; of {sample['codes']:,.0f} looked at "
        f"{sample['distinct']:.1%} differ, the commonest is {sample['commonest']:.2%}"
    )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("kind", "bytes", "build", "query", f"recall@{config.search.k}", "objection"):
        table.add_column(heading, justify="left" if heading in ("kind", "objection") else "right")
    for entry in predictions:
        recall = "1 (exact)" if entry.exact else f"{entry.recall:.3f}"
        figures = readable_bytes(entry.bytes), readable_time(entry.build_s), readable_time(entry.query_s), recall
        table.add_row(entry.kind, *figures, "; ".join(list_objections(entry, config.index)) or "-")
    # In a file or a pipe rich would assume 80 columns and fold the table.
    if draws_on_terminal():
        console = Console(stderr=True, highlight=False)
    else:
        console = Console(file=io.StringIO(), width=160, highlight=False)
    console.print(summary)
    console.print(table)
    if isinstance(console.file, io.StringIO):
        for line in console.file.getvalue().splitlines():
            _log.log(NOTICE, "%s", line)


def readable_bytes(count: int) -> str:
    """Format a number of bytes, such as 1.5GiB."""
    return ByteSize(count).human_readable()


def readable_time(seconds: float) -> str:
    """Format seconds, such as 1.5 ms."""
    for unit, size in (("h", 3600.0), ("min", 60.0), ("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"
