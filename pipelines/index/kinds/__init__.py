"""Index kinds: how codes become a searchable part, and how such a part is searched.

A kind is one module in this package, whose `KIND` is an `IndexKind`; its name is the module's.
"""

import difflib
import importlib
import math
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Protocol, cast

import numpy as np
import numpy.typing as npt

from pipelines.config.settings import IndexSettings
from pipelines.errors import ConfigError

Codes = npt.NDArray[np.uint8]
"""Packed codes, uint8 (N, bytes)."""
Ids = npt.NDArray[np.int64]
"""Index ids, int64: shard ordinal << 32 | row."""
Radii = npt.NDArray[np.int32]
"""A distance in bits for each query (Q,), inclusive."""
Neighbours = tuple[npt.NDArray[np.int32], Ids]
"""Distances in bits (Q, k) and ids (Q, k), each row ordered by (distance, id)."""
Hits = tuple[npt.NDArray[np.int64], npt.NDArray[np.int32], Ids]
"""Offsets (Q + 1,), distances and ids of all hits; query q has offsets[q]:offsets[q + 1], by (distance, id)."""

NOTHING_REMOVED: Ids = np.empty(0, np.int64)
NO_ID = -1
NO_DISTANCE = np.iinfo(np.int32).max
"""Distance in the empty places of a row with fewer than k neighbours."""


def by_distance(distances: npt.NDArray[np.int32], ids: Ids, k: int | None = None) -> Neighbours:
    """Order each row by (distance, id), and keep its first `k`."""
    order = np.lexsort((ids, distances), axis=1)[:, :k]
    return np.take_along_axis(distances, order, 1), np.take_along_axis(ids, order, 1)


def require_ascending(codes: Codes, ids: Ids) -> None:
    """Assert that there are codes, each with an id, and that the ids ascend: ties are ordered by row."""
    assert len(codes) == len(ids) > 0 and (np.diff(ids) > 0).all(), "rows must ascend by id"


class PartSearcher(Protocol):
    """One part, opened."""

    count: int
    """Number of codes that can be found: all codes of the part without the removed ones."""

    def search(self, queries: Codes, k: int, radius: Radii | None = None) -> Neighbours:
        """Return the k nearest codes of the part; k is cut to `count`, and empty places are NO_ID, NO_DISTANCE.

        Codes farther than the `radius` of their query may be left out.
        """

    def range_search(self, queries: Codes, radius: int) -> Hits:
        """Return the codes of the part within `radius` bits, inclusive."""


class ScannedPart:
    """A part whose codes can be scanned: `count` and the mask `_allowed` leave out the rows that were removed."""

    def __init__(self, codes: Codes, ids: Ids, removed: Ids) -> None:
        self.codes, self.ids = codes, ids
        self._allowed = ~np.isin(ids, removed) if len(removed) else None
        self.count = len(ids) if self._allowed is None else int(self._allowed.sum())

    def range_search(self, queries: Codes, radius: int) -> Hits:
        """Return exactly the codes within `radius`, by a scan."""
        from hhnet import hamming_range  # compiles on import; only a search needs it

        offsets, rows, distances = hamming_range(queries, self.codes, radius, allowed=self._allowed)
        return offsets, distances, self.ids[rows]


class IndexKind(ABC):
    """One way to lay out and search codes, with the cost figures that the planner needs."""

    suffix: ClassVar[str]
    """Suffix of the parts' file names."""
    exact: ClassVar[bool]
    """Whether a search returns exactly the result of a brute-force scan."""
    mapped: ClassVar[bool]
    """Whether an opened part leaves its bytes in the file; it may then stay open at no cost of memory."""

    def parameters(self, settings: IndexSettings, count: int) -> dict[str, int]:
        """Return the settings that this kind uses, with the unset ones resolved for `count` codes; none by default."""
        return {}

    def sample_size(self, parameters: Mapping[str, int]) -> int:
        """Return the number of codes that `train` wants to see; 0 where the kind learns nothing."""
        return 0

    def train(self, sample: Codes, parameters: Mapping[str, int], seed: int) -> bytes:
        """Train the bytes that all parts share on a sample of the codes; called once, if `sample_size` is above 0."""
        raise AssertionError("a kind that wants no sample is not trained")

    @abstractmethod
    def build(self, codes: Codes, ids: Ids, shared: bytes | None, parameters: Mapping[str, int]) -> bytes:
        """Build one part from at least one code; `ids` ascend."""

    @abstractmethod
    def part_bytes(self, rows: int, width: int, parameters: Mapping[str, int]) -> int:
        """Return approximately the number of bytes that `build` makes of `rows` codes of `width` bytes."""

    @abstractmethod
    def open(
        self, path: Path, width: int, rows: int, shared: bytes | None, parameters: Mapping[str, int], removed: Ids
    ) -> PartSearcher:
        """Open a part whose digest was checked; raise DamagedArtifact unless it holds `rows` codes of `width` bytes.

        The ids in `removed`, which ascend, are never found.
        """

    # -- for the planner, which tries a kind on small parts

    needs_memory_limit: ClassVar[bool] = False
    """Whether `--kind auto` takes this kind only if `index.memory` is set."""
    max_scans: ClassVar[float] = math.inf
    """A query takes at most as long as this many scans of the part."""

    def build_work(self, count: int) -> float:
        """Return the work to build a part of `count` codes, in any unit."""
        return float(count)

    def query_work(self, count: int) -> float:
        """Return the work of a query in a part of `count` codes, in any unit."""
        return float(count)

    def trial_parameters(self, parameters: Mapping[str, int], count: int) -> Mapping[str, int]:
        """Return parameters that are cheap enough to try on `count` codes."""
        return parameters

    def trial_sample_size(self, tried: Mapping[str, int]) -> int:
        """Return how many codes train a trial with the parameters `tried`."""
        return self.sample_size(tried)

    def build_factor(self, parameters: Mapping[str, int], tried: Mapping[str, int]) -> float:
        """Return how many times longer a build with `parameters` takes than with `tried`."""
        return 1.0

    def extra_codes(self, parameters: Mapping[str, int], tried: Mapping[str, int]) -> float:
        """Return the additional time of a query with `parameters` over one with `tried`.

        Its unit is the codes that a scan passes in that time.
        """
        return 0.0


def kind_names() -> list[str]:
    """Return the names of the kinds, sorted; their modules are not imported."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def require_index_kind(name: str, *others: str) -> None:
    """Raise ConfigError, naming the nearest kind, unless `name` is a kind or one of `others`."""
    known = [*others, *kind_names()]
    if name not in known:
        near = difflib.get_close_matches(name.lower(), known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(known)}"
        raise ConfigError(f"index kind {name!r} is unknown: {hint}")


def index_kind(name: str) -> IndexKind:
    """Return the kind of this name; its module, and Faiss where it needs it, is imported only now."""
    require_index_kind(name)
    try:
        return cast(IndexKind, importlib.import_module(f"{__name__}.{name}").KIND)
    except ModuleNotFoundError as error:
        if error.name != "faiss":
            raise
        raise ConfigError(
            f"index kind {name} needs Faiss, which is not installed: pip install 'hhnet[cpu]', or take --kind "
            "flat or multihash"
        ) from None
