"""Requests of each verb to an object store, as docs/scale.md says them: so many for each tar and part, and for a run.

Beyond the tables of that page stand here its sentences on large objects, lists, pieces of the shard index and workers.
"""

from dataclasses import astuple, dataclass

from pipelines.artifacts import lists
from pipelines.shards import index
from pipelines.storage.blocks import BLOCK_BYTES

SINGLE_PUT_BYTES = 32 << 20
"""Largest object that one PUT puts."""
UPLOAD_BYTES = 16 << 20
"""Bytes of a larger object that one PUT of its upload puts."""


@dataclass(frozen=True)
class Requests:
    """Number of requests of each kind."""

    get: int = 0
    head: int = 0
    put: int = 0
    list: int = 0

    def __add__(self, other: "Requests") -> "Requests":
        return Requests(*(one + more for one, more in zip(astuple(self), astuple(other), strict=True)))


# ---------------------------------------------------------------------------------------------- tables of the page


def ingest_requests(tars: int) -> Requests:
    """Return the requests of an ingest; its source is no store."""
    return Requests(tars, 1, 3 * tars + 6, 5)


def encode_requests(tars: int) -> Requests:
    """Return the requests of an encode by one worker."""
    return Requests(tars + 12, tars + 4, 2 * tars + 7, 5)


def build_requests(tars: int, parts: int) -> Requests:
    """Return the requests of building an index of so many parts."""
    return Requests(tars + 2 * parts + 5, 2, 3 * parts + 8, 11)


def add_requests(tars: int, parts: int, built: int, merged: int) -> Requests:
    """Return the requests of adding tars to an index.

    It has `parts` afterwards, of which `built` are new, one of them with the codes of each of `merged` old ones.
    """
    return Requests(tars + 2 * parts + merged + 11, 3, 3 * built + 8, 10)


def plan_requests() -> Requests:
    """Return the requests of `plan` for two shards artifacts, their codes and an index."""
    return Requests(12, 3, 0, 7)


def verify_shards_requests(tars: int) -> Requests:
    """Return the requests of the first `verify` of shards."""
    return Requests(tars + 8, 0, 1, 9)


# -------------------------------------------------------------------------------------------------- what is large


def lists_of(*entries: int) -> int:
    """Return the number of lists of an artifact, given the number of its parts and that of its receipts."""
    if sum(entries) <= lists.INLINE_ENTRIES:
        return 0
    return sum(-(-number // lists.LIST_ENTRIES) for number in entries)


def blocks_of(size: float) -> int:
    """Return the GETs that stream an object of so many bytes."""
    return max(1, -(-int(size) // BLOCK_BYTES))


def puts_of(size: float) -> int:
    """Return the PUTs of an object of so many bytes: those that begin and complete an upload count too."""
    return 1 if size <= SINGLE_PUT_BYTES else 2 + -(-int(size) // UPLOAD_BYTES)


def upload_lists_of(size: float) -> int:
    """Return the LISTs of a put of so many bytes: one where parts that broken uploads left are looked for."""
    return int(size > SINGLE_PUT_BYTES)


def pieces_of(tars: int, per_shard: int) -> int:
    """Return the number of pieces of a shard index."""
    return -(-tars // tars_of_piece(per_shard))


def tars_of_piece(per_shard: int) -> int:
    """Return the number of tars whose rows fill a piece of the shard index."""
    return -(-index.PIECE_ROWS // per_shard)


def shard_entries(tars: int, per_shard: int) -> int:
    """Return the number of parts of a shards artifact: its tars, the pieces of its index, and their directory."""
    return tars + pieces_of(tars, per_shard) + 1


def worker_requests(workers: int) -> Requests:
    """Return the requests by which the encode workers after the first one open shards, model and codes."""
    more = max(0, workers - 1)
    return Requests(6 * more, 2 * more, 2 * more, 0)
