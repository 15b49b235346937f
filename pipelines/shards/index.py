"""The shard index: one row per sample in tar order, in pieces of some tars each, and a directory of the tars.

`index-<n>.parquet` holds the rows of some tars, so a worker reads what its tars need and the next version of grown
shards keeps the pieces it has. `tars.parquet` says for each tar in which piece its rows are, and from which row on.
"""

import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import pyarrow as pa

from pipelines.artifacts.commit import ArtifactWriter
from pipelines.artifacts.manifest import Artifact, Part
from pipelines.artifacts.parquet import (
    ParquetRows,
    parquet_bytes,
    parquet_groups,
    rows_of,
    schema_of_rows,
    table_of_rows,
)
from pipelines.artifacts.tables import SHARD_INDEX, read_table
from pipelines.errors import DamagedArtifact

DIRECTORY_NAME = "tars.parquet"
ROW_GROUP_ROWS = 1024
"""Largest number of rows in a row group of a piece, the unit in which it is read."""
PIECE_ROWS = 1 << 14
"""Number of rows from which on a piece takes no further tar: about a megabyte, one request to an object store."""
PIECES_KEPT = 16
"""Number of pieces that stay in memory."""


@dataclass(frozen=True, slots=True)
class IndexedTar:
    """A row of the directory: the piece with the rows of a tar, the first of them, and their number."""

    shard: str
    piece: int
    start: int
    rows: int


DIRECTORY = schema_of_rows(IndexedTar)


def piece_name(number: int) -> str:
    """Return the name of a piece."""
    return f"index-{number:06d}.parquet"


def is_tar(part: Part) -> bool:
    """Tell whether a part of shards is a tar: all others are of the index."""
    return part.name != DIRECTORY_NAME and re.fullmatch(r"index-[0-9]{6,9}\.parquet", part.name) is None


def put_index(writer: ArtifactWriter, tables: Iterable[pa.Table], before: "ShardIndex | None" = None) -> list[Part]:
    """Put the rows of tars, one table for each; return the parts of the whole index, with those of `before`."""
    parts: list[Part] = list(before.pieces.values()) if before else []
    tars: list[IndexedTar] = list(before.tars.values()) if before else []
    for number, piece in enumerate(_pieces(tables), len(parts)):
        start = 0
        for table in piece:
            tars.append(IndexedTar(table["shard"][0].as_py(), number, start, len(table)))
            start += len(table)
        parts.append(writer.put_part(piece_name(number), parquet_groups(SHARD_INDEX, piece, ROW_GROUP_ROWS), start))
    tars.sort(key=lambda tar: tar.shard)
    directory = table_of_rows(DIRECTORY, tars)
    return [*parts, writer.put_part(DIRECTORY_NAME, parquet_bytes(directory), len(tars))]


def _pieces(tables: Iterable[pa.Table]) -> Iterator[list[pa.Table]]:
    piece, rows = list[pa.Table](), 0
    for table in tables:
        piece.append(table)
        rows += len(table)
        if rows >= PIECE_ROWS:
            yield piece
            piece, rows = [], 0
    if piece:
        yield piece


@dataclass
class _Piece:
    """A piece that may be in memory; whoever comes first reads it."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    rows: ParquetRows | None = None


class ShardIndex:
    """The index of opened shards. Pieces are read when they are needed, whole and against their digest."""

    def __init__(self, artifact: Artifact) -> None:
        """Read the directory; raises DamagedArtifact unless it covers each piece without gap or overlap."""
        self._artifact = artifact
        numbered = sorted(
            (int(part.name[6:].removesuffix(".parquet")), part)
            for part in artifact.manifest.parts
            if not is_tar(part) and part.name != DIRECTORY_NAME
        )
        self.pieces: Mapping[int, Part] = dict(numbered)
        directory = artifact.manifest.part(DIRECTORY_NAME)
        table = read_table(artifact.store, directory, DIRECTORY)
        tars = rows_of(table, IndexedTar, f"{artifact.uri}/{directory.path}")
        self.tars: Mapping[str, IndexedTar] = {tar.shard: tar for tar in tars}
        ends = dict.fromkeys(self.pieces, 0)
        for tar in sorted(self.tars.values(), key=lambda tar: (tar.piece, tar.start)):
            if ends.get(tar.piece) != tar.start or tar.rows < 1:
                raise DamagedArtifact(f"{artifact.uri}/{directory.path} gives {tar.shard} rows that are not its own")
            ends[tar.piece] += tar.rows
        for number, part in self.pieces.items():
            if part.rows != ends[number]:
                raise DamagedArtifact(f"{artifact.uri}/{part.path} has {part.rows} rows, the directory {ends[number]}")
        self._kept: dict[int, _Piece] = {}
        self._lock = threading.Lock()

    def where(self, tar: IndexedTar) -> str:
        """Return the URI of the piece with the rows of a tar."""
        return f"{self._artifact.uri}/{self.pieces[tar.piece].path}"

    def read(self, tar: IndexedTar) -> pa.Table:
        """Return the rows of a tar; raises DamagedArtifact where the piece does not have them."""
        return self._open(tar.piece).read(tar.start, tar.start + tar.rows)

    def _open(self, number: int) -> ParquetRows:
        with self._lock:
            piece = self._kept.pop(number, None) or _Piece()
            self._kept[number] = piece  # the one used last is at the end
            if len(self._kept) > PIECES_KEPT:
                del self._kept[next(iter(self._kept))]
        with piece.lock:
            if piece.rows is None:
                part = self.pieces[number]
                where = f"{self._artifact.uri}/{part.path}"
                piece.rows = ParquetRows(self._artifact.read(part), SHARD_INDEX, where)
                if piece.rows.rows != part.rows:
                    raise DamagedArtifact(f"{where} has {piece.rows.rows} rows, the manifest {part.rows}")
            return piece.rows
