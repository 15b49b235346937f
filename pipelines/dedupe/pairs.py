"""The pairs within a radius, unit by unit of the samples, each unit with a receipt.

Equal codes are found first, so that only one code of each kind is searched for, and the pairs of a million equal ones
are a million. The tables of substrings are built over as many codes as the memory allows, one block after another; the
units are searched for in every block from their own on. Pairs wait in a file per unit and are put in order once all
blocks were searched, so neither the order nor the size of the blocks shows in what is written.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hhnet.search.multi_index import MultiIndexHash, default_substrings, table_length
from hhnet.search.pairs import MOST_CODES, equal_groups, near_pairs
from pipelines.artifacts.commit import ArtifactWriter
from pipelines.artifacts.facts import PairsReceipt
from pipelines.artifacts.tables import parquet_bytes, table_of
from pipelines.cluster.progress import stage
from pipelines.config.settings import DedupeSettings
from pipelines.dedupe import tables as artifact
from pipelines.dedupe.corpus import Corpus, Numbers
from pipelines.dedupe.external_sort import ExternalSort, cut
from pipelines.dedupe.tables import PAIRS_SCHEMA, pairs_name, unit_name
from pipelines.errors import ConfigError, InputError, WorkFailed
from pipelines.storage import Entry

DISTANCE_BITS, NUMBER_BITS = 13, 31  # of a pair as one integer: below them the distance, above them the place in UNIT
QUERIES = 1 << 16
LEAST_BLOCK = 1 << 10


@dataclass(frozen=True)
class Leaders:
    """Who of the samples leads, in files that are mapped."""

    of: npt.NDArray[np.int32]
    """int32 (N,), as `equal_groups` returns them."""
    numbers: npt.NDArray[np.int32]
    """int32 (D,), the numbers of those that lead, ascending."""
    groups: int
    """How many of them lead another."""


def require_memory(count: int, settings: DedupeSettings) -> None:
    """InputError or ConfigError, with the figures, where so many samples cannot be searched in the memory allowed."""
    if count > MOST_CODES:
        raise InputError(f"{count} samples are too many for one search, which takes {MOST_CODES}: give fewer --codes")
    least = 5 * count  # 4 to say which is joined with which, and room for a hash table that is passed over a few times
    if least > settings.memory:
        raise ConfigError(
            f"dedupe.memory = {settings.memory} bytes: {count} samples take {least} at least, 5 for each; "
            f"give --memory {-(-least // (1 << 20))}MiB or more, or fewer --codes"
        )


def find_leaders(corpus: Corpus, memory: int, folder: Path) -> Leaders:
    """Find equal codes; the arrays are moved to files, so that the search has the memory."""
    leaders, count, groups = equal_groups(corpus.codes, corpus.known, memory - 4 * corpus.count)
    leaders.tofile(folder / "leaders")
    with (folder / "leading").open("wb") as stream:
        for start in range(0, len(leaders), artifact.UNIT):
            part = leaders[start : start + artifact.UNIT]
            numbers = np.arange(start, start + len(part), dtype=np.int32)
            stream.write(numbers[part == numbers].tobytes())
    return Leaders(_mapped(folder / "leaders", corpus.count), _mapped(folder / "leading", count), groups)


def _mapped(path: Path, count: int) -> npt.NDArray[np.int32]:
    return np.memmap(path, np.int32, "r", shape=(count,)) if count else np.empty(0, np.int32)


class PairSearch:
    """Finds and writes the pairs of the units that have no receipt yet."""

    def __init__(
        self, writer: ArtifactWriter, corpus: Corpus, leaders: Leaders, settings: DedupeSettings, folder: Path
    ) -> None:
        self._writer, self._corpus, self._leaders, self._settings = writer, corpus, leaders, settings
        self._folder, self._lock = folder, threading.Lock()
        self._spools: dict[int, ExternalSort] = {}
        size = _block_size(settings.memory // 2, corpus.codes.shape[1])
        total = len(leaders.numbers)
        self._blocks = [slice(start, min(start + size, total)) for start in range(0, total, size)]
        self._new = int(np.searchsorted(leaders.numbers, corpus.known))
        self._built: tuple[slice, MultiIndexHash] | None = None
        self._pairs = 0

    def run(self) -> dict[str, PairsReceipt]:
        """The receipts of all units, by name. WorkFailed where there are more pairs than `dedupe.max_pairs`."""
        units = [unit_name(unit) for unit in range(-(-self._corpus.count // artifact.UNIT))]
        there = self._writer.store.entries("parts")
        found = self._writer.receipts(PairsReceipt, units)
        receipts = {name: receipt for name, receipt in found.items() if _is_whole(receipt, there)}
        self._pairs = sum(receipt.pairs for receipt in receipts.values())
        missing = [unit for unit, name in enumerate(units) if name not in receipts]
        runs = list(self._runs(missing))
        total = sum(len(self._steps(run)) * len(run) for run in runs)
        with stage("dedupe", total, unit="searches") as advance:
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
        """Where the leading samples of a unit lie among all that lead."""
        ends = np.searchsorted(self._leaders.numbers, [unit * artifact.UNIT, (unit + 1) * artifact.UNIT])
        return slice(int(ends[0]), int(ends[1]))

    def _runs(self, units: Sequence[int]) -> Iterator[list[int]]:
        """Units that are searched for together: as many as fill a block, but one where only one block is searched."""
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
        """The blocks in which a run is searched for."""
        return [block for block in self._blocks if block.stop > self._span(run[0]).start]

    # --------------------------------------------------------------------------------------------------- search

    def _search(self, unit: int, block: slice) -> None:
        """Find the pairs of the leading samples of a unit with those of a block that come after them."""
        span = self._span(unit)
        numbers = self._leaders.numbers
        for start in range(span.start, min(span.stop, block.stop), QUERIES):
            stop = min(start + QUERIES, span.stop, block.stop)
            first = np.arange(start + 1, stop + 1)
            first[: max(self._new - start, 0)] = self._new  # a sample of the index finds new ones only
            if first[0] >= block.stop:
                continue

            def emit(queries: Numbers, rows: Numbers, distances: Any, start: int = start) -> None:
                self._add(unit, numbers[queries + start], numbers[rows + block.start], distances)

            near_pairs(
                self._corpus.codes[numbers[start:stop]],
                np.maximum(first - block.start, 0),
                self._table(block),
                self._settings.radius,
                emit,
                self._settings.threads,
            )

    def _table(self, block: slice) -> MultiIndexHash:
        """The tables of a block; those of the block before are gone."""
        if self._built is None or self._built[0] != block:
            self._built = None
            self._built = block, MultiIndexHash.build(self._corpus.codes[self._leaders.numbers[block]])
        return self._built[1]

    def _link(self, unit: int) -> None:
        """Add the pairs of a unit with those that have the same code."""
        low = unit * artifact.UNIT
        for start in range(low, self._corpus.count, artifact.UNIT):
            leaders = self._leaders.of[start : start + artifact.UNIT]
            numbers = np.arange(start, start + len(leaders), dtype=np.int32)
            first, last = np.minimum(leaders, numbers), np.maximum(leaders, numbers)
            mine = (leaders >= 0) & (first < last) & (first >= low) & (first < low + artifact.UNIT)
            self._add(unit, first[mine], last[mine], np.zeros(int(mine.sum()), np.int32))

    def _add(self, unit: int, a: npt.NDArray[Any], b: npt.NDArray[Any], distances: npt.NDArray[Any]) -> None:
        low = unit * artifact.UNIT
        places = (a.astype(np.uint64) - np.uint64(low)) << np.uint64(NUMBER_BITS) | b.astype(np.uint64)
        keys = places << np.uint64(DISTANCE_BITS) | distances.astype(np.uint64)
        with self._lock:
            self._pairs += len(keys)
            pairs = self._pairs
        if pairs > self._settings.max_pairs:
            raise WorkFailed(
                f"{self._writer.store.uri}: {pairs} pairs within radius {self._settings.radius} so far, in unit "
                f"{unit + 1} of {-(-self._corpus.count // artifact.UNIT)}: take a smaller --radius, or raise "
                f"dedupe.max_pairs = {self._settings.max_pairs}"
            )
        if len(keys):
            self._spool(unit).add(keys)

    # ---------------------------------------------------------------------------------------------------- write

    def _spool(self, unit: int) -> ExternalSort:
        """The pairs found so far of a unit, in one object for all threads, since it has the lock on their file."""
        with self._lock:
            if unit not in self._spools:
                self._spools[unit] = ExternalSort(self._folder / unit_name(unit), self._settings.memory // 4 // 8)
            return self._spools[unit]

    def _write(self, unit: int) -> PairsReceipt:
        """Put a unit's pairs in order into its parts, then its receipt."""
        parts, low = [], unit * artifact.UNIT
        for number, keys in enumerate(cut(self._spool(unit).in_order(), artifact.PART_ROWS)):
            places = keys >> np.uint64(DISTANCE_BITS)
            a = (places >> np.uint64(NUMBER_BITS)).astype(np.int64) + low
            b = (places & np.uint64((1 << NUMBER_BITS) - 1)).astype(np.int64)
            distances = (keys & np.uint64((1 << DISTANCE_BITS) - 1)).astype(np.int32)
            columns = {**self._corpus.columns(a, "_a"), **self._corpus.columns(b, "_b"), "distance": distances}
            data = parquet_bytes(table_of(PAIRS_SCHEMA, columns))
            parts.append(self._writer.put_part(pairs_name(unit, number), data, len(keys)))
        receipt = PairsReceipt(unit=unit, pairs=sum(part.rows for part in parts), parts=tuple(parts))
        return self._writer.put_receipt(unit_name(unit), receipt)


def _block_size(memory: int, width: int) -> int:
    """How many codes of `width` bytes have tables that fit."""
    size = LEAST_BLOCK
    while size < MOST_CODES and _table_bytes(2 * size, width) <= memory:
        size *= 2
    return size


def _table_bytes(count: int, width: int) -> int:
    substrings = default_substrings(count, 8 * width)
    return count * (width + 4 * substrings) + 4 * table_length(8 * width, substrings)


def _is_whole(receipt: PairsReceipt, there: Mapping[str, Entry]) -> bool:
    """The parts of a receipt are in the listing `there`."""
    return all(part.path in there and there[part.path].size == part.bytes for part in receipt.parts)
