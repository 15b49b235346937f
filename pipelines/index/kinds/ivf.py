"""Inverted lists (Faiss `IndexBinaryIVF`) under one quantizer that all parts share.

Parts with quantizers of their own would merge and search without any error and find almost nothing. So the quantizer is
trained once, every part is built from it, and every part is compared with it when it is opened.
"""

from collections.abc import Mapping
from math import isqrt
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from pipelines.config.settings import IndexSettings
from pipelines.errors import ConfigError, DamagedArtifact
from pipelines.index.faiss_io import faiss_bytes, limit_parsing, one_thread
from pipelines.index.kinds import Codes, Hits, Ids, IndexKind, Neighbours, Radii, by_distance
from pipelines.storage import sha256_of

SAMPLES_PER_LIST = 64
TRAINING_ROUNDS = 10
TRIAL_LISTS, TRIAL_SAMPLES_PER_LIST = 512, 16
"""Largest number of lists that the planner tries, and the codes that train each of them."""
CODES_PER_CENTRE = 5
"""Codes that a scan passes in the time that a query takes for one centre."""


class IvfKind(IndexKind):
    """Searches the `nprobe` lists whose centres are nearest to the query."""

    suffix = ".faiss"
    exact = False
    mapped = False

    def parameters(self, settings: IndexSettings, count: int) -> dict[str, int]:
        """Return `nlist`, by default the square root of the number of codes, and `nprobe`, at most `nlist`."""
        nlist = settings.nlist or max(1, isqrt(count))
        if nlist > count:
            raise ConfigError(
                f"index.nlist = {nlist} is more than the number of codes, {count:,}: choose a smaller one"
            )
        return {"nlist": nlist, "nprobe": min(settings.nprobe, nlist)}

    def sample_size(self, parameters: Mapping[str, int]) -> int:
        """Return enough codes for a stable centre in each list."""
        return SAMPLES_PER_LIST * parameters["nlist"]

    def train(self, sample: Codes, parameters: Mapping[str, int], seed: int) -> bytes:
        """Return the empty trained index; one thread, since sums of floats in another order give other centres."""
        bits = 8 * sample.shape[1]
        index = faiss.IndexBinaryIVF(faiss.IndexBinaryFlat(bits), bits, parameters["nlist"])
        index.cp.seed = seed % (1 << 31)  # a C int in Faiss
        index.cp.niter = TRAINING_ROUNDS
        index.cp.min_points_per_centroid = 1  # Faiss would print a warning for a small corpus
        index.cp.max_points_per_centroid = SAMPLES_PER_LIST
        with one_thread():
            index.train(np.ascontiguousarray(sample))
        return faiss_bytes(index)

    def build(self, codes: Codes, ids: Ids, shared: bytes | None, parameters: Mapping[str, int]) -> bytes:
        """Add the codes, in their order, to a copy of the empty trained index."""
        index = _parse(shared)
        with one_thread():
            index.add_with_ids(np.ascontiguousarray(codes), np.ascontiguousarray(ids))
        return faiss_bytes(index)

    def part_bytes(self, rows: int, width: int, parameters: Mapping[str, int]) -> int:
        """Return the bytes of codes and ids, and of the centres and list lengths that each part holds."""
        nlist = parameters["nlist"]
        return rows * (width + 8) + nlist * width + 8 * min(nlist, 2 * rows)

    def trial_parameters(self, parameters: Mapping[str, int], count: int) -> Mapping[str, int]:
        """Take at most `TRIAL_LISTS` lists and probe the same share, since training grows with lists times samples.

        Finer lists find more at an equal share, so the recall of a trial is a lower bound.
        """
        lists, most = parameters["nlist"], min(TRIAL_LISTS, count)
        if lists <= most:
            return parameters
        return {"nlist": most, "nprobe": max(1, parameters["nprobe"] * most // lists)}

    def trial_sample_size(self, tried: Mapping[str, int]) -> int:
        """Return fewer codes for a list than `train` takes."""
        return TRIAL_SAMPLES_PER_LIST * tried["nlist"]

    def build_factor(self, parameters: Mapping[str, int], tried: Mapping[str, int]) -> float:
        """Return the ratio of the lists: the time to train and the time to place a code both grow with it."""
        return parameters["nlist"] / tried["nlist"]

    def extra_codes(self, parameters: Mapping[str, int], tried: Mapping[str, int]) -> float:
        """Return the cost of the additional centres, since a query looks at all centres."""
        return CODES_PER_CENTRE * (parameters["nlist"] - tried["nlist"])

    def open(
        self, path: Path, width: int, rows: int, shared: bytes | None, parameters: Mapping[str, int], removed: Ids
    ) -> "IvfSearcher":
        """Parse the part, and check that its codes and its quantizer are those of the index."""
        with limit_parsing(str(path), path.stat().st_size):
            index: Any = faiss.read_index_binary(str(path))
        found = type(index), index.d, index.ntotal
        if found != (faiss.IndexBinaryIVF, 8 * width, rows):
            raise DamagedArtifact(
                f"{path} holds {found[0].__name__} of {found[2]} codes of {found[1]} bits, expected IndexBinaryIVF "
                f"of {rows} codes of {8 * width} bits"
            )
        trained = _parse(shared)  # owns its quantizer, so it has to outlive the comparison
        centres, own = sha256_of(faiss_bytes(index.quantizer)), sha256_of(faiss_bytes(trained.quantizer))
        if centres != own:
            raise DamagedArtifact(
                f"{path} was built with another quantizer than the index's own: its centres are {centres[:12]}, not "
                f"{own[:12]}"
            )
        if len(removed):  # only in memory: a search of binary lists in Faiss takes no selector
            index.remove_ids(np.ascontiguousarray(removed))
        return IvfSearcher(index, parameters["nprobe"])


class IvfSearcher:
    """A part in memory."""

    def __init__(self, index: Any, nprobe: int) -> None:
        self._index, self.count = index, int(index.ntotal)
        self._index.nprobe = nprobe

    def search(self, queries: Codes, k: int, radius: Radii | None = None) -> Neighbours:
        """Return the k nearest in the probed lists.

        Faiss keeps whichever of several equal distances it met first, so the last distance may be represented by other
        ids than an exact scan would return; the order of the returned ones is (distance, id). Faiss marks empty places
        by NO_ID and NO_DISTANCE itself.
        """
        k = min(k, self.count)
        distances, ids = self._index.search(np.ascontiguousarray(queries), k)
        return by_distance(distances, ids)

    def range_search(self, queries: Codes, radius: int) -> Hits:
        """Return the codes within `radius` in the probed lists."""
        # Faiss excludes codes at exactly its radius, and `radius` here is inclusive.
        limits, distances, ids = self._index.range_search(np.ascontiguousarray(queries), radius + 1)
        offsets = limits.astype(np.int64)
        query = np.repeat(np.arange(len(queries)), np.diff(offsets))
        order = np.lexsort((ids, distances, query))
        return offsets, distances[order].astype(np.int32), ids[order]


def _parse(shared: bytes | None) -> Any:
    """Parse the empty trained index that the parts share."""
    assert shared is not None, "an ivf part needs the shared quantizer"
    with limit_parsing("the index's quantizer", len(shared)):
        index = faiss.deserialize_index_binary(np.frombuffer(shared, np.uint8))
    if type(index) is not faiss.IndexBinaryIVF:
        raise DamagedArtifact(f"the index's quantizer is {type(index).__name__}, expected IndexBinaryIVF")
    return index


KIND = IvfKind()
