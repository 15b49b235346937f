"""Exact scan of a memory-mapped part: a safetensors file with `codes`, uint8 (N, bytes), and `ids`, int64 (N,)."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from hhnet import hamming_knn
from hhnet.search.kernels import NO_ROW
from pipelines.index.kinds import NO_ID, Codes, Ids, IndexKind, Neighbours, Radii, ScannedPart, require_ascending
from pipelines.index.mapped import map_tensor


class FlatKind(IndexKind):
    """The exact kind: nothing to learn, nothing to set."""

    suffix = ".safetensors"
    exact = True
    mapped = True

    def build(self, codes: Codes, ids: Ids, shared: bytes | None, parameters: Mapping[str, int]) -> bytes:
        """Store codes and ids as they are."""
        require_ascending(codes, ids)
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


class FlatSearcher(ScannedPart):
    """A mapped part and the compiled scan over it."""

    def live(self) -> tuple[Codes, Ids]:
        """Return the codes that can be found, and their ids, which ascend."""
        return (self.codes, self.ids) if self._allowed is None else (self.codes[self._allowed], self.ids[self._allowed])

    def search(self, queries: Codes, k: int, radius: Radii | None = None) -> Neighbours:
        """Return exactly the k nearest, of those within `radius`."""
        distances, rows = hamming_knn(queries, self.codes, k, allowed=self._allowed, radius=radius)
        return distances, np.where(rows == NO_ROW, NO_ID, self.ids[rows])


KIND = FlatKind()
