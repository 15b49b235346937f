"""The pairs within a radius, unit by unit of the samples, each unit with a receipt.

Equal codes are found first, and only their leader is searched for; so a million equal codes give a million pairs and
not all pairs among them. The tables of substrings are built over as many codes as the memory allows, one block after
another; each unit is searched for in every block from its own on. The pairs of a unit wait in a file and are sorted
once all blocks were searched, so the written bytes depend neither on the order nor on the size of the blocks.
"""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from hhnet.search.multi_index import MultiIndexHash, default_substrings, table_length
from hhnet.search.pairs import MAX_CODES, equal_groups, near_pairs
from pipelines.artifacts.commit import ArtifactWriter
from pipelines.artifacts.facts import PairsReceipt
from pipelines.artifacts.parquet import parquet_bytes, table_of
from pipelines.artifacts.versions import missing_paths
from pipelines.cluster.progress import stage
from pipelines.config.settings import DedupeSettings
from pipelines.dedupe.corpus import Corpus, Numbers
from pipelines.dedupe.external_sort import ExternalSort, cut_blocks
from pipelines.dedupe.tables import PAIRS_SCHEMA, Sizes, pairs_name, unit_name
from pipelines.errors import ConfigError, InputError, WorkFailed

N = TypeVar("N", bound=np.generic)

# A pair is one integer: from the top the first sample's place in its unit, the second's number, and the distance.
DISTANCE_BITS, SAMPLE_NUMBER_BITS = 13, 31
MIN_BLOCK_CODES = 1 << 10
"""Codes of the smallest block, taken even if its tables exceed the memory."""


@dataclass(frozen=True)
class Leaders:
    """The leaders among equal codes, in mapped files."""

    of: npt.NDArray[np.int32]
    """int32 (N,), the leader of each sample, as `equal_groups` returns them."""
    numbers: npt.NDArray[np.int32]
    """int32 (D,), the numbers of the leaders, ascending."""
    groups: int
    """Number of leaders that lead another sample."""


def require_memory(count: int, settings: DedupeSettings) -> None:
    """Raise InputError or ConfigError, with the figures, if the samples are too many for the allowed memory."""
    if count > MAX_CODES:
        raise InputError(f"{count} samples are too many for one search, which takes {MAX_CODES}: give fewer --codes")
    least = 5 * count  # bytes: 4 per sample for the union-find, and a hash table that needs a few passes
    if least > settings.memory:
        problem = f"dedupe.memory = {settings.memory} bytes: {count} samples take {least} at least, 5 for each"
        raise ConfigError(f"{problem}; give --memory {-(-least // (1 << 20))}MiB or more, or fewer --codes")


def find_leaders(corpus: Corpus, memory: int, folder: Path, unit: int) -> Leaders:
    """Find equal codes, and move the resulting arrays to files to free their memory for the search."""
    leaders, _, groups = equal_groups(corpus.codes, corpus.known, memory - 4 * corpus.count)
    leaders.tofile(folder / "leaders")
    with (folder / "leading").open("wb") as stream:
        for start in range(0, len(leaders), unit):
            part = leaders[start : start + unit]
            numbers = np.arange(start, start + len(part), dtype=np.int32)
            stream.write(numbers[part == numbers].tobytes())
    return Leaders(map_numbers(folder / "leaders", np.int32), map_numbers(folder / "leading", np.int32), groups)


def map_numbers(path: Path, kind: type[N]) -> npt.NDArray[N]:
    """Map a file of numbers of a kind."""
    # An empty file cannot be mapped.
    return np.memmap(path, kind, "r") if path.stat().st_size else np.empty(0, kind)


class PairSearch:
    """The search for the pairs of all units that have no receipt yet."""

    def __init__(
        self,
        writer: ArtifactWriter,
        corpus: Corpus,
        leaders: Leaders,
        settings: DedupeSettings,
        folder: Path,
        sizes: Sizes,
    ) -> None:
        self._writer, self._corpus, self._leaders, self._settings = writer, corpus, leaders, settings
        self._folder, self._lock, self._sizes = folder, threading.Lock(), sizes
        self._spools: dict[int, ExternalSort] = {}
        size = sizes.block or _block_size(settings.memory // 2, corpus.codes.shape[1])
        total = len(leaders.numbers)
        self._blocks = [slice(start, min(start + size, total)) for start in range(0, total, size)]
        self._new = int(np.searchsorted(leaders.numbers, corpus.known))
        self._built: tuple[slice, MultiIndexHash] | None = None
        self._pairs = 0

    def run(self) -> dict[str, PairsReceipt]:
        """Find the pairs of all units without a receipt, and return the receipts of all units by name.

        Raises WorkFailed if there are more pairs than `dedupe.max_pairs`.
        """
        units = [unit_name(unit) for unit in range(-(-self._corpus.count // self._sizes.unit))]
        there = self._writer.store.entries("parts")
        found = self._writer.receipts(PairsReceipt, units)
        receipts = {name: receipt for name, receipt in found.items() if not missing_paths(there, receipt.parts)}
        self._pairs = sum(receipt.pairs for receipt in receipts.values())
        missing = [unit for unit, name in enumerate(units) if name not in receipts]
        runs = list(self._runs(missing))
        total = sum(len(self._steps(run)) * len(run) for run in runs)
        with stage("dedupe: comparing", total, unit="searches") as advance:
            for run in runs:
                for unit in run:
                    self._link(unit)
                for block in self._steps(run):
                    for unit in run:
                        self._search(unit, block)
                        advance(1, note=f"{self._pairs:,} pairs")
                receipts |= {unit_name(unit): self._write(unit) for unit in run}
        return receipts

    # ---------------------------------------------------------------------------------------------------- order

    def _span(self, unit: int) -> slice:
        """Return the range of a unit's leaders among all leaders."""
        ends = np.searchsorted(self._leaders.numbers, [unit * self._sizes.unit, (unit + 1) * self._sizes.unit])
        return slice(int(ends[0]), int(ends[1]))

    def _runs(self, units: Sequence[int]) -> Iterator[list[int]]:
        """Yield units that are searched for together: as many as fill a block, or one if only one block is searched."""
        run: list[int] = []
        for unit in units:
            run.append(unit)
            first, last = self._span(run[0]).start, self._span(unit).stop
            if not self._blocks or first >= self._blocks[-1].start or last - first >= self._blocks[0].stop:
                yield run
                run = []
        if run:
            yield run

    def _steps(self, run: Sequence[int]) -> list[slice]:
        """Return the blocks to search for the units of a run."""
        return [block for block in self._blocks if block.stop > self._span(run[0]).start]

    # --------------------------------------------------------------------------------------------------- search

    def _search(self, unit: int, block: slice) -> None:
        """Find the pairs of a unit's leaders with the later leaders of a block."""
        span = self._span(unit)
        numbers = self._leaders.numbers
        for start in range(span.start, min(span.stop, block.stop), self._sizes.queries):
            stop = min(start + self._sizes.queries, span.stop, block.stop)
            first = np.arange(start + 1, stop + 1)
            first[: max(self._new - start, 0)] = self._new  # a sample of the index finds new ones only
            if first[0] >= block.stop:
                continue

            def emit(queries: Numbers, rows: Numbers, distances: Any, start: int = start) -> None:
                self._add(unit, numbers[queries + start], numbers[rows + block.start], distances)

            codes, rows_from = self._corpus.codes[numbers[start:stop]], np.maximum(first - block.start, 0)
            radius, threads = self._settings.radius, self._settings.threads
            near_pairs(codes, rows_from, self._table(block), radius, emit, threads)

    def _table(self, block: slice) -> MultiIndexHash:
        """Return the tables of a block; those of the previous block are dropped."""
        if self._built is None or self._built[0] != block:
            self._built = None
            self._built = block, MultiIndexHash.build(self._corpus.codes[self._leaders.numbers[block]])
        return self._built[1]

    def _link(self, unit: int) -> None:
        """Add the pairs at distance 0 whose first sample is in the unit: each follower with its leader."""
        low = unit * self._sizes.unit
        for start in range(low, self._corpus.count, self._sizes.unit):
            leaders = self._leaders.of[start : start + self._sizes.unit]
            numbers = np.arange(start, start + len(leaders), dtype=np.int32)
            first, last = np.minimum(leaders, numbers), np.maximum(leaders, numbers)
            mine = (leaders >= 0) & (first < last) & (first >= low) & (first < low + self._sizes.unit)
            self._add(unit, first[mine], last[mine], np.zeros(int(mine.sum()), np.int32))

    def _add(self, unit: int, a: npt.NDArray[Any], b: npt.NDArray[Any], distances: npt.NDArray[Any]) -> None:
        low = unit * self._sizes.unit
        # Casts throughout: numpy makes floats of uint64 and int64, which would lose the low bits.
        places = (a.astype(np.uint64) - np.uint64(low)) << np.uint64(SAMPLE_NUMBER_BITS) | b.astype(np.uint64)
        keys = places << np.uint64(DISTANCE_BITS) | distances.astype(np.uint64)
        with self._lock:
            self._pairs += len(keys)
            pairs = self._pairs
        if pairs > self._settings.max_pairs:
            found = f"{self._writer.store.uri}: {pairs} pairs within radius {self._settings.radius} so far"
            where = f"in unit {unit + 1} of {-(-self._corpus.count // self._sizes.unit)}"
            remedy = f"take a smaller --radius, or raise dedupe.max_pairs = {self._settings.max_pairs}"
            raise WorkFailed(f"{found}, {where}: {remedy}")
        if len(keys):
            self._spool(unit).add(keys)

    # ---------------------------------------------------------------------------------------------------- write

    def _spool(self, unit: int) -> ExternalSort:
        """Return the unit's pairs so far; all threads share one object, since it holds the lock on the file."""
        with self._lock:
            if unit not in self._spools:
                at_once = self._sizes.sorted_at_once or self._settings.memory // 4 // 8
                self._spools[unit] = ExternalSort(self._folder / unit_name(unit), at_once)
            return self._spools[unit]

    def _write(self, unit: int) -> PairsReceipt:
        """Write a unit's pairs in order as parts, then put its receipt."""
        parts, low = [], unit * self._sizes.unit
        for number, keys in enumerate(cut_blocks(self._spool(unit).in_order(), self._sizes.part_rows)):
            places = keys >> np.uint64(DISTANCE_BITS)
            a = (places >> np.uint64(SAMPLE_NUMBER_BITS)).astype(np.int64) + low
            b = (places & np.uint64((1 << SAMPLE_NUMBER_BITS) - 1)).astype(np.int64)
            distances = (keys & np.uint64((1 << DISTANCE_BITS) - 1)).astype(np.int32)
            columns = {**self._corpus.columns(a, "_a"), **self._corpus.columns(b, "_b"), "distance": distances}
            data = parquet_bytes(table_of(PAIRS_SCHEMA, columns))
            parts.append(self._writer.put_part(pairs_name(unit, number), data, len(keys)))
        receipt = PairsReceipt(unit=unit, pairs=sum(part.rows for part in parts), parts=tuple(parts))
        return self._writer.put_receipt(unit_name(unit), receipt)


def _block_size(memory: int, width: int) -> int:
    """Return the largest number of codes of `width` bytes, by doubling, whose tables fit the memory."""
    size = MIN_BLOCK_CODES
    while size < MAX_CODES and _table_bytes(2 * size, width) <= memory:
        size *= 2
    return size


def _table_bytes(count: int, width: int) -> int:
    substrings = default_substrings(count, 8 * width)
    return count * (width + 4 * substrings) + 4 * table_length(8 * width, substrings)
