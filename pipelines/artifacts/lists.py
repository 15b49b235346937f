"""Lists: Parquet files in which a large artifact keeps its parts and receipts, named by its manifest.

A list never changes. The next version of an artifact names those whose entries all stay, and puts new ones for the rest
of its entries, so what a version writes depends on what it changes. Small lists are made anew with the rest: otherwise
every night would leave another.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from pipelines.errors import DamagedArtifact
from pipelines.storage import sha256_of

if TYPE_CHECKING:
    import pyarrow as pa

INLINE_ENTRIES = 1_000
"""Largest number of parts and receipts that a manifest names itself."""
LIST_ENTRIES = 10_000
"""Largest number of entries of a list."""
LIST_DIGEST_CHARS = 16

Holds = Literal["parts", "receipts"]


class ListRef(BaseModel):
    """A list, as the manifest names it; `first` and `last` are the first column of its first and last row."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    holds: Holds
    path: str
    bytes: int = Field(ge=0)
    sha256: str
    entries: int = Field(ge=1)
    first: str
    last: str

    def may_hold(self, prefix: str) -> bool:
        """Tell whether a row whose first column begins with `prefix` may be in the list."""
        return self.first[: len(prefix)] <= prefix <= self.last[: len(prefix)]


E = TypeVar("E")


def list_schema(holds: Holds) -> "pa.Schema":
    """Return the columns of a list; its rows are sorted by the first one."""
    import pyarrow as pa  # most manifests have no lists, and a command that reads one of them does without Arrow

    from pipelines.artifacts.parquet import schema_of

    if holds == "parts":
        return schema_of(path=pa.string(), bytes=pa.int64(), sha256=pa.string(), rows=pa.int64())
    return schema_of(shard=pa.string(), path=pa.string(), data=pa.binary())


def pack_lists(
    holds: Holds, entries: Sequence[E], before: Sequence[tuple[ListRef, Sequence[E]]]
) -> tuple[list[ListRef], dict[str, bytes]]:
    """Put entries, sorted, into lists: those from `before` that can stay, with what they hold, and new ones.

    Returns the lists in the order of their first entries, and the bytes of the new ones by path.
    """
    from pipelines.artifacts.parquet import parquet_bytes, table_of_rows

    wanted, schema = frozenset(entries), list_schema(holds)
    kept = [(ref, held) for ref, held in before if 2 * len(held) >= LIST_ENTRIES and wanted.issuperset(held)]
    covered = frozenset(entry for _, held in kept for entry in held)
    rest, new = [entry for entry in entries if entry not in covered], dict[str, bytes]()
    refs = [ref for ref, _ in kept]
    for start in range(0, len(rest), LIST_ENTRIES):
        table = table_of_rows(schema, rest[start : start + LIST_ENTRIES])
        data = parquet_bytes(table)
        path, names = f"manifests/list-{sha256_of(data)[:LIST_DIGEST_CHARS]}.parquet", table.column(0)
        new[path] = data
        ends = {"first": names[0].as_py(), "last": names[-1].as_py()}
        refs.append(
            ListRef(holds=holds, path=path, bytes=len(data), sha256=sha256_of(data), entries=len(table), **ends)
        )
    return sorted(refs, key=lambda ref: (ref.first, ref.last)), new


def parse_list(data: bytes, ref: ListRef, model: type[E], where: str) -> tuple[E, ...]:
    """Return the entries of a list whose digest was checked; raises DamagedArtifact unless they are as `ref` says."""
    from pipelines.artifacts.parquet import read_parquet, require_schema

    table = read_parquet(data, where)
    require_schema(table, list_schema(ref.holds), where)
    if any(column.null_count for column in table.columns):
        raise DamagedArtifact(f"{where} has empty cells")
    names = table.column(0).to_pylist()
    rising = all(one < other for one, other in pairwise(names))
    if not rising or len(names) != ref.entries or (names[0], names[-1]) != (ref.first, ref.last):
        raise DamagedArtifact(f"{where} does not hold the {ref.entries} entries that its manifest says, in order")
    entry: TypeAdapter[E] = TypeAdapter(model)
    try:
        return tuple(map(entry.validate_python, table.to_pylist()))
    except ValidationError as error:
        raise DamagedArtifact(f"{where} has an entry that cannot be used: {str(error).splitlines()[0]}") from None
