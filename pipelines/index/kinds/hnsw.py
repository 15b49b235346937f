"""A graph of near codes (Faiss `IndexBinaryHNSW`) in memory: fast, approximate, and large.

Malkov and Yashunin, "Efficient and robust approximate nearest neighbor search using Hierarchical Navigable Small World
graphs", PAMI 2020, arXiv 1603.09320. A code of 64 bits takes 288 bytes with `m` = 32. Codes in tight clusters, or equal
codes, make a graph that falls apart: the gate shows it, and the planner before that.

A part is an `IndexBinaryIDMap` of the graph. The graph has no range search, no ids of its own and no removal. So ids
are kept beside it in the order of its rows, a range search scans its codes, and a search skips removed rows.
"""

from collections.abc import Mapping
from math import log
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from pipelines.config.settings import IndexSettings
from pipelines.errors import DamagedArtifact
from pipelines.index.faiss_io import faiss_bytes, limit_parsing, one_thread
from pipelines.index.kinds import (
    NO_DISTANCE,
    NO_ID,
    Codes,
    Ids,
    IndexKind,
    Neighbours,
    Radii,
    ScannedPart,
    by_distance,
    require_ascending,
)

_untyped: Any = faiss
"""Faiss without its stubs, which lack the search parameters and the array argument of a selector."""


class HnswKind(IndexKind):
    """Walks from code to nearer code, and keeps the `ef_search` best on the way."""

    suffix = ".faiss"
    exact = False
    mapped = False
    needs_memory_limit = True

    def parameters(self, settings: IndexSettings, count: int) -> dict[str, int]:
        """Return `m` and `ef_search` as they are set."""
        return {"m": settings.m, "ef_search": settings.ef_search}

    def build(self, codes: Codes, ids: Ids, shared: bytes | None, parameters: Mapping[str, int]) -> bytes:
        """Build the graph of the codes in their order.

        It uses one thread, since the links of a code depend on the codes that are already there.
        """
        require_ascending(codes, ids)
        graph = faiss.IndexBinaryHNSW(8 * codes.shape[1], parameters["m"])
        index = faiss.IndexBinaryIDMap(graph)
        with one_thread():
            index.add_with_ids(np.ascontiguousarray(codes), np.ascontiguousarray(ids))
        return faiss_bytes(index)

    def part_bytes(self, rows: int, width: int, parameters: Mapping[str, int]) -> int:
        """Return the bytes of the links, levels, offsets and ids.

        A code has 2m links on the ground floor and m on each floor above; 1 of m codes reaches the next floor.
        """
        m = parameters["m"]
        return round(rows * (width + 8 + 8 + 4 + 4 * (2 * m + m / (m - 1))))

    def build_work(self, count: int) -> float:
        """Return the work of N walks, since a walk finds the place of each code."""
        return count * log(count + 1)

    def query_work(self, count: int) -> float:
        """Return the work of one walk."""
        return log(count)

    def open(
        self, path: Path, width: int, rows: int, shared: bytes | None, parameters: Mapping[str, int], removed: Ids
    ) -> "HnswSearcher":
        """Parse the part into memory."""
        with limit_parsing(str(path), path.stat().st_size):
            index: Any = faiss.read_index_binary(str(path))
        graph = faiss.downcast_IndexBinary(index.index) if type(index) is faiss.IndexBinaryIDMap else index
        if type(graph) is not faiss.IndexBinaryHNSW or graph is index:
            raise DamagedArtifact(f"{path} holds {type(graph).__name__}, expected IndexBinaryHNSW in IndexBinaryIDMap")
        found = graph.d, graph.ntotal, index.id_map.size(), graph.storage.ntotal, graph.storage.code_size
        if found != (8 * width, rows, rows, rows, width):
            raise DamagedArtifact(
                f"{path} holds {found[1]} codes of {found[0]} bits with {found[2]} ids, expected {rows} of {8 * width}"
            )
        return HnswSearcher(index, graph, parameters["ef_search"], removed)


class HnswSearcher(ScannedPart):
    """A part in memory. Its range search is a scan: a walk cannot tell when it has met all codes within a radius."""

    def __init__(self, index: Any, graph: Any, ef_search: int, removed: Ids) -> None:
        self._index, self._graph = index, graph  # keeps both alive: the index owns the graph, the graph its codes
        storage: Any = faiss.downcast_IndexBinary(graph.storage)
        # A view of the graph's own codes, without a copy.
        codes = faiss.rev_swig_ptr(storage.xb.data(), storage.ntotal * storage.code_size)
        super().__init__(codes.reshape(-1, storage.code_size), faiss.vector_to_array(index.id_map), removed)
        self._settings = _untyped.SearchParametersHNSW(efSearch=ef_search)
        if self._allowed is not None:
            # Kept as an attribute too: Faiss holds a bare pointer to the selector.
            self._settings.sel = self._selector = _untyped.IDSelectorBitmap(
                np.packbits(self._allowed, bitorder="little")
            )

    def search(self, queries: Codes, k: int, radius: Radii | None = None) -> Neighbours:
        """Return the k nearest codes that the walk met.

        As with any approximate kind, others of several equals may stand for the last distance; the order of the
        returned ones is (distance, id).
        """
        k = min(k, self.count)
        if not k:
            return np.empty((len(queries), 0), np.int32), np.empty((len(queries), 0), np.int64)
        distances, rows = self._graph.search(np.ascontiguousarray(queries), k, params=self._settings)
        ids = np.where(rows == NO_ID, NO_ID, self.ids[rows])
        distances = np.where(rows == NO_ID, np.int32(NO_DISTANCE), distances)  # Faiss leaves the least int32 there
        return by_distance(distances, ids)


KIND = HnswKind()
