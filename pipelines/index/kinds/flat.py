"""Exact scan of a memory-mapped part: a safetensors file with `codes`, uint8 (N, bytes), and `ids`, int64 (N,)."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from hhnet import hamming_knn, hamming_range
from hhnet.search.kernels import NO_ROW
from pipelines.config.settings import IndexSettings
from pipelines.index.kinds import NO_ID, Codes, Hits, Ids, IndexKind, Neighbours, Radii
from pipelines.index.mapped import map_tensor


class FlatKind(IndexKind):
    """The exact kind: nothing to learn, nothing to set."""

    suffix = ".safetensors"
    exact = True
    mapped = True

    def parameters(self, settings: IndexSettings, count: int) -> dict[str, int]:
        """Return {}: the kind has no parameters."""
        return {}

    def build(self, codes: Codes, ids: Ids, shared: bytes | None, parameters: Mapping[str, int]) -> bytes:
        """Store codes and ids as they are."""
        assert len(codes) == len(ids) > 0
        assert (np.diff(ids) > 0).all(), "rows must ascend by id: ties are ordered by row"
        return bytes(save({"codes": np.ascontiguousarray(codes), "ids": np.ascontiguousarray(ids)}))

    def part_bytes(self, rows: int, width: int, parameters: Mapping[str, int]) -> int:
        """Return the bytes of the codes and ids."""
        return rows * (width + 8)

    def open(
        self, path: Path, width: int, rows: int, shared: bytes | None, parameters: Mapping[str, int], removed: Ids
    ) -> "FlatSearcher":
        """Map the file; pages are read as the scan passes over them."""
        return FlatSearcher(
            codes=map_tensor(path, "codes", np.dtype("<u1"), "U8", (rows, width)),
            ids=map_tensor(path, "ids", np.dtype("<i8"), "I64", (rows,)),
            removed=removed,
        )


class FlatSearcher:
    """A mapped part and the compiled scan over it."""

    def __init__(self, codes: Codes, ids: Ids, removed: Ids) -> None:
        self.codes, self.ids = codes, ids
        self._allowed = ~np.isin(ids, removed) if len(removed) else None
        self.count = len(codes) if self._allowed is None else int(self._allowed.sum())

    def live(self) -> tuple[Codes, Ids]:
        """Return the codes that can be found, and their ids, which ascend."""
        return (self.codes, self.ids) if self._allowed is None else (self.codes[self._allowed], self.ids[self._allowed])

    def search(self, queries: Codes, k: int, radius: Radii | None = None) -> Neighbours:
        """Return exactly the k nearest, of those within `radius`."""
        distances, rows = hamming_knn(queries, self.codes, k, allowed=self._allowed, radius=radius)
        return distances, np.where(rows == NO_ROW, NO_ID, self.ids[rows])

    def range_search(self, queries: Codes, radius: int) -> Hits:
        """Return exactly the codes within `radius`."""
        offsets, rows, distances = hamming_range(queries, self.codes, radius, allowed=self._allowed)
        return offsets, distances, self.ids[rows]


KIND = FlatKind()
