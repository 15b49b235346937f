"""Multi-index hashing of a memory-mapped part: exact, and sublinear for near neighbours of short codes.

A part is a safetensors file with `codes`, uint64 (N, W), the packed codes as little-endian words; `ids`, int64 (N,);
and the tables of `hhnet.search.multi_index`, `starts` and `rows`, uint32. The number of substrings follows from the
part's number of codes. Below some ten thousand codes a scan of the part is faster than its tables.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save

from hhnet.search.kernels import NO_ROW
from hhnet.search.multi_index import (
    COSTS,
    MultiIndexHash,
    ScanCosts,
    TablesDamagedError,
    default_substrings,
    table_length,
)
from pipelines.errors import DamagedArtifact
from pipelines.index.kinds import NO_ID, Codes, Hits, Ids, IndexKind, Neighbours, Radii, ScannedPart, require_ascending
from pipelines.index.mapped import map_tensor

_T = TypeVar("_T")


class MihKind(IndexKind):
    """The exact kind with tables: nothing to learn, nothing to set."""

    suffix = ".safetensors"
    exact = True
    mapped = True
    max_scans = 1.1  # it falls back to a scan

    def __init__(self, costs: ScanCosts = COSTS) -> None:
        self.costs = costs

    def build(self, codes: Codes, ids: Ids, shared: bytes | None, parameters: Mapping[str, int]) -> bytes:
        """Store codes and ids as they are, and the rows sorted by each substring."""
        require_ascending(codes, ids)
        table = MultiIndexHash.build(codes)
        tensors: dict[str, npt.NDArray[Any]] = {
            "codes": np.ascontiguousarray(table.codes).view(np.uint64),
            "ids": np.ascontiguousarray(ids),
            "starts": table.starts,
            "rows": table.rows,
        }
        return bytes(save(tensors))

    def part_bytes(self, rows: int, width: int, parameters: Mapping[str, int]) -> int:
        """Return the bytes of codes in whole words, of ids, and of each substring's rows and pattern starts."""
        bits = 8 * width
        substrings = default_substrings(rows, bits)
        return rows * (8 * ((width + 7) // 8) + 8 + 4 * substrings) + 4 * table_length(bits, substrings)

    def open(
        self, path: Path, width: int, rows: int, shared: bytes | None, parameters: Mapping[str, int], removed: Ids
    ) -> "MihSearcher":
        """Map the file; pages are read as a search touches them.

        Shapes are checked here. The tables' contents are checked when they are used: to check all of them here would
        cost as much as a scan.
        """
        codes = map_tensor(path, "codes", np.dtype("<u8"), "U64", (rows, (width + 7) // 8))
        starts = map_tensor(path, "starts", np.dtype("<u4"), "U32", (None,))
        by_pattern = map_tensor(path, "rows", np.dtype("<u4"), "U32", (None, rows))
        try:
            table = MultiIndexHash(codes.view(np.uint8), 8 * width, starts, by_pattern, self.costs)
        except ValueError as error:
            raise DamagedArtifact(f"{path}: {error}") from None
        return MihSearcher(path, table, map_tensor(path, "ids", np.dtype("<i8"), "I64", (rows,)), removed)


class MihSearcher(ScannedPart):
    """A mapped part and its tables."""

    def __init__(self, path: Path, table: MultiIndexHash, ids: Ids, removed: Ids) -> None:
        super().__init__(table.codes, ids, removed)
        self.table, self._path = table, path

    def search(self, queries: Codes, k: int, radius: Radii | None = None) -> Neighbours:
        """Return exactly the k nearest, of those within `radius`."""
        distances, rows = self._sound(lambda: self.table.knn(queries, k, allowed=self._allowed, radius=radius))
        return distances, np.where(rows == NO_ROW, NO_ID, self.ids[rows])

    def range_search(self, queries: Codes, radius: int) -> Hits:
        """Return exactly the codes within `radius`."""
        offsets, rows, distances = self._sound(lambda: self.table.range_search(queries, radius, allowed=self._allowed))
        return offsets, distances, self.ids[rows]

    def _sound(self, search: Callable[[], _T]) -> _T:
        try:
            return search()
        except TablesDamagedError as error:
            raise DamagedArtifact(f"{self._path}: {error}") from None


KIND = MihKind()
