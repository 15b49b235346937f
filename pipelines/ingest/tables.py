"""A CSV or Parquet table as a source of `ingest`: image paths or images, labels and metadata in its rows.

Every cell of a CSV is the text in the file; a Parquet column keeps its type.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.errors import InputError
from pipelines.ingest.bounds import LIMITS, SourceLimits, limit_memory, require_bounded
from pipelines.ingest.columns import (
    bytes_unfolded,
    columns_of_bytes,
    holds_images,
    image_columns,
    json_values,
    label_cells,
    lists_of_images,
    metadata_type,
    read_classes,
    read_features,
)
from pipelines.ingest.csv_rows import read_csv
from pipelines.ingest.fetch import UrlReader, find_url_fault, is_url
from pipelines.ingest.image_rows import ImageRows
from pipelines.ingest.path_resolver import FileAt, PathResolver
from pipelines.ingest.samples import sample_key
from pipelines.ingest.skips import SkipReason
from pipelines.ingest.sources import Listing, Source, SourceImage, find_unfit_reason
from pipelines.shards.folders import FolderReader, Read
from pipelines.storage import scratch_folder

TABLE_SUFFIXES = (".csv", ".tsv", ".parquet")
LABEL_COLUMN = re.compile(r"labels?\d*")
PANDAS_INDEX = re.compile(r"__index_level_\d+__")
"""Name of the column in which pandas stores row numbers; it is left out."""
HUB_NAME = re.compile(r"(.+)-\d{5}-of-\d{5}(?:-[0-9a-f]+)?\.parquet")
YES, NO = ("1", "1.0", "true"), ("0", "0.0", "false", "-1", "")
"""Cells of a table with a column for each class, in lower case."""
ROWS_AT_ONCE = 8192
"""Rows that are read from a Parquet table of paths at once."""
COLUMNS_NAMED = 50
"""Number of columns that an error names."""
LISTED = "listed"
"""Stamp of an image at a URL: what was fetched once is not asked for again."""
MAX_URL_KEY = 1000
"""Longest key of a URL: with the suffix of an image it has to fit into the name of a tar's member."""
IMAGES_AT_ONCE = 64
"""Rows that are read from a Parquet table of images at once."""

_UNREADABLE = (pa.ArrowException, OSError, ValueError, ArithmeticError, LookupError)
"""Exceptions from damaged Parquet: the last two from names that are no text, and dates or zones unknown to Python."""


@dataclass(frozen=True)
class TableColumns:
    """The columns that the user asks for. Unset `labels`: those called label, label2, ...; empty: unlabelled."""

    path: str = "path"
    labels: Sequence[str] | None = None
    split: str | None = None
    separator: str | None = None
    """Text between the labels of one cell."""
    multi_hot: bool = False
    """If set, a cell of 1 or true means that the name of its column is a label."""

    def names(self, column: str, cell: str) -> list[str]:
        """Return the labels in a cell of text, without blank ones. ValueError for a multi-hot cell but 1 or 0."""
        if self.multi_hot:
            said = cell.strip().lower()
            if said not in (*NO, *YES):
                raise ValueError(f"--multi-hot takes 1 and 0, not {cell[:40]!r} as in the column {column!r}")
            return [column] if said in YES else []
        if self.separator is None:
            return [cell] if cell.strip() else []
        return [name for name in map(str.strip, cell.split(self.separator)) if name]


@dataclass(frozen=True, slots=True)
class TableRow:
    """A row: its number from 1, its image (path, bytes, or a struct of both), labels, metadata, and part of a split."""

    number: int
    image: Any
    labels: tuple[str, ...]
    metadata: Mapping[str, Any] | None
    group: str | None


@dataclass
class _Found:
    """The content of all tables of a source, gathered while they are read."""

    listing: Listing
    kinds: dict[str, pa.DataType] = field(default_factory=dict)
    """Types of the metadata columns."""
    rows: dict[str, TableRow] = field(default_factory=dict)
    """The first row of each file."""
    stamps: dict[str, str] = field(default_factory=dict)
    """The stamp of each file."""
    other_metadata: int = 0
    label_columns: int = 0

    def keep(self, path: str, row: TableRow, where: str) -> None:
        """Keep a row for a file. A file with several rows gets all their labels, and the metadata of the first."""
        first = self.rows.setdefault(path, row)
        if first is row:
            return
        if first.group != row.group:
            raise InputError(
                f"{where}, row {row.number}: {path} is in the part {row.group!r}, "
                f"but row {first.number} puts it into {first.group!r}: an image is in one part"
            )
        self.other_metadata += first.metadata != row.metadata
        both = tuple(dict.fromkeys((*first.labels, *row.labels)))
        self.rows[path] = replace(first, labels=both)

    def note(self, text: str) -> None:
        """Add a note on the source, once."""
        if text not in self.listing.notes:
            self.listing.notes.append(text)

    def close(self) -> None:
        """Add the files to the listing, with notes on rows that say more than can be kept."""
        if self.other_metadata:
            self.note(
                f"{self.other_metadata} rows name a file again with other metadata: that of its first row is kept"
            )
        if self.label_columns > 1 and {name for row in self.rows.values() for name in row.labels} <= {*YES, *NO}:
            self.note("the label columns say only yes and no: --multi-hot takes the names of the columns as labels")
        for path, row in self.rows.items():
            self.listing.add(SourceImage(path, row.labels, row.metadata, row.group, self.stamps[path]))
        self.rows.clear()
        self.stamps.clear()

    def source(self, read: Read) -> Source:
        """Return the opened source."""
        columns = {name: str(kind) for name, kind in sorted(self.kinds.items())}
        remote = (lambda _: read) if isinstance(read, FolderReader | UrlReader) else None
        return Source(self.listing, read, columns=columns, remote=remote)


def find_tables(path: Path, is_folder: bool) -> list[Path]:
    """Return the tables that make up a source: the file itself, or the Parquet files with images in a folder.

    A folder that also holds an image as a file has no tables in this sense.
    """
    if not is_folder:
        return [path] if path.suffix.lower() in TABLE_SUFFIXES else []
    tables: list[Path] = []
    pending = [str(path)]
    try:
        while pending:
            with os.scandir(pending.pop()) as found:
                for item in found:
                    if item.name.startswith("."):
                        continue
                    if item.is_dir(follow_symlinks=False):
                        pending.append(item.path)
                    elif item.name.lower().endswith(".parquet"):
                        tables.append(Path(item.path))
                    elif find_unfit_reason(item.name, 1) is None:
                        return []
        schemas = {table: pq.read_schema(table) for table in sorted(tables)}
        images = [table for table, schema in schemas.items() if image_columns(schema)]
        if images:
            return images
        # Tables without paths but with one column of bytes, as img2dataset writes them.
        return [one for one, has in schemas.items() if len(columns_of_bytes(has)) == 1 and "path" not in has.names]
    except (pa.ArrowException, OSError, ValueError):
        return []  # it is then listed as a folder, and that error says what is wrong


@contextmanager
def open_table(
    path: Path,
    tables: Sequence[Path],
    columns: TableColumns,
    root: Path | None = None,
    encoding: str | None = None,
    by_file: bool = False,
    limits: SourceLimits = LIMITS,
) -> Iterator[Source]:
    """Open the tables that `find_tables` found at a path as one source, and list the images.

    Paths are below `root`, by default the folder of the table. `encoding` is that of a CSV. With `by_file`, the name of
    a table with images in its rows is their part of a split. Raises InputError for a table that cannot be used.
    """
    found = _Found(Listing(str(path), limits=limits))
    if path.suffix.lower() != ".parquet" and tables == [path]:
        yield found.source(_list_paths(path, root, columns.path, _csv_rows(path, columns, encoding, found), found))
        return
    if encoding is not None:
        raise InputError(f"{path}: --encoding is for a CSV: a Parquet file is UTF-8")
    first = _ParquetTable(tables[0], columns, limits.reading_bytes)
    if not first.with_images:
        yield found.source(_list_paths(path, root, columns.path, first.rows(found), found))
        return
    base = path.parent if tables == [path] else path
    splits = sorted({split for name in tables if (split := _split_of(name))})
    if len(splits) > 1 and not by_file and columns.split is None:
        found.note(f"tables of {', '.join(splits)} are taken together: --split folder makes parts of them")
    with scratch_folder() as scratch, (scratch / "spool").open("w+b") as spool:
        images: ImageRows[TableRow] = ImageRows(spool, root or base)
        for number, name in enumerate(tables):
            table = _ParquetTable(name, columns, limits.reading_bytes) if number else first
            part = _split_of(name) if by_file else None
            for row in table.rows(found):
                row = replace(row, group=part) if part else row
                images.add(row.image, row, f"{name.relative_to(base).with_suffix('')}/{row.number - 1:06d}")
        for file, stamp, row in images.named(found.listing):
            found.stamps.setdefault(file, stamp)
            found.keep(file, row, str(path))
        found.close()
        yield found.source(images.read)


def _split_of(table: Path) -> str | None:
    """Return the part in the Hub's name of a table, `train` for train-00000-of-00002.parquet, or None."""
    named = HUB_NAME.fullmatch(table.name)
    return named[1] if named else None


def _list_paths(path: Path, root: Path | None, column: str, rows: Iterator[TableRow], found: _Found) -> Read:
    """List the files whose paths or URLs are in a column, and return their reader. InputError if none can be found."""
    read, places = list(rows), PathResolver(root or path.parent)
    named = [row for row in read if row.image.strip()]
    if read and not named:
        raise InputError(f"{path}: the column {column!r} is empty in every row: --path-column names another")
    if named and is_url(named[0].image):
        if root is not None:
            raise InputError(f"{path} lists URLs, which lie below no folder: leave out --root")
        _list_urls(path, column, read, found)
        return UrlReader(found.listing.limits.file_bytes)
    at: dict[int, FileAt | SkipReason] = {row.number: places.find(row.image) for row in named}
    lost = [row for row in named if isinstance(at[row.number], SkipReason)]
    if root is not None and lost:
        foreign = places.foreign_folders([row.image for row in lost])
        at |= {row.number: places.find(row.image, foreign) for row in lost} if foreign else {}
        if foreign:
            found.note(f"paths that begin with {'/'.join(foreign)}/ were found below {root} without it")
        lost = [row for row in lost if isinstance(at[row.number], SkipReason)]
    if lost and len(lost) == len(named):
        raise InputError(_nowhere(path, root or path.parent, lost, at[lost[0].number]))
    for row in read:
        place = at.get(row.number)
        if place is None:
            found.listing.skip(path.name, SkipReason.MISSING, f"row {row.number}: the column {column!r} is empty")
        elif isinstance(place, SkipReason):
            found.listing.skip(row.image, place, f"row {row.number}")
        elif place.path not in found.rows and (
            reason := find_unfit_reason(place.path, place.size, found.listing.limits.file_bytes)
        ):
            found.listing.skip(place.path, reason)
        else:
            found.stamps.setdefault(place.path, place.stamp)
            found.keep(place.path, row, str(path))
    found.close()
    return FolderReader(str((root or path.parent).absolute()))


def _list_urls(path: Path, column: str, rows: Sequence[TableRow], found: _Found) -> None:
    """List the URLs in a column; they are not asked for here."""
    for row in rows:
        url = row.image.strip()
        fault = find_url_fault(url) if is_url(url) else "no URL, unlike the first one" if url else ""
        if not url:
            found.listing.skip(path.name, SkipReason.MISSING, f"row {row.number}: the column {column!r} is empty")
        elif fault or len(sample_key(url, whole=True)) > MAX_URL_KEY:
            shown = path.name if "@" in url else url  # what stands before an @ may be a secret
            found.listing.skip(shown, SkipReason.UNSAFE_NAME, f"row {row.number}: {fault or 'too long a URL'}")
        else:
            found.stamps.setdefault(url, LISTED)
            found.keep(url, row, str(path))
    found.close()


def _nowhere(path: Path, root: Path, lost: Sequence[TableRow], reason: object) -> str:
    name, others = lost[0].image, f" (and {len(lost) - 1} more)" if len(lost) > 1 else ""
    what = f"cannot read {root / name}: No such file or directory"
    if reason == SkipReason.UNSAFE_NAME:
        what = f"{name!r}: {'absolute path' if name.startswith('/') else 'path leaves its root'}"
    elif reason == SkipReason.SPECIAL:
        what = f"{root / name} is not a plain file"
    return (
        f"{path}, row {lost[0].number}: {what}{others}: paths are relative to {root}; give --root DIR if they are not"
    )


# --------------------------------------------------------------------------------------------------------------- CSV


def _csv_rows(path: Path, columns: TableColumns, encoding: str | None, found: _Found) -> Iterator[TableRow]:
    lines = read_csv(path, columns.path, encoding)
    names = [name.strip() for name in next(lines, (0, [""]))[1]]
    labels = _chosen(path, names, columns)
    place = {name: number for number, name in enumerate(names)}
    extra = _extra(names, columns, labels, found)
    found.kinds |= dict.fromkeys(extra, pa.string())
    found.label_columns = len(labels)
    for number, (line, cells) in enumerate(lines, 1):
        where = f"{path}, row {number} (line {line})"
        image = cells[place[columns.path]]
        texts = {name: cells[place[name]] for name in labels}
        yield TableRow(
            number,
            image,
            _row_labels(columns, texts.items(), where),
            {name: cells[place[name]] or None for name in extra} if extra else None,
            cells[place[columns.split]] if columns.split else None,
        )


# ----------------------------------------------------------------------------------------------------------- Parquet


class _ParquetTable:
    """One Parquet table: the use of its columns, and its rows, read a few at a time."""

    def __init__(self, path: Path, columns: TableColumns, reading_bytes: int) -> None:
        self._path, self._reading_bytes = path, reading_bytes
        try:
            with limit_memory(path, reading_bytes):
                self._file = pq.ParquetFile(path)
                self._schema = self._file.schema_arrow
            self._choose(columns)
        except FileNotFoundError:
            raise InputError(f"{path} does not exist") from None
        except _UNREADABLE as error:
            raise InputError(f"cannot read {path} as a table: {error}") from None

    def _choose(self, columns: TableColumns) -> None:
        """Choose the columns of images or paths and of labels. InputError if one is missing or of a wrong type."""
        path = self._path
        self._features = read_features(self._schema)
        self._names = [name for name in self._schema.names if not PANDAS_INDEX.fullmatch(name)]
        self._columns = columns
        images = image_columns(self._schema)
        if not images and TableColumns.path not in self._names and len(plain := columns_of_bytes(self._schema)) == 1:
            images = plain
        if images and columns.path == TableColumns.path:
            column = min(images, key=lambda name: name != "image")
            self._columns = replace(columns, path=column, labels=self._hub_labels(columns))
        elif (several := lists_of_images(self._schema)) and columns.path not in self._names:
            raise InputError(f"{path}: the column {several[0]!r} has lists of images: make a row of each image")
        self._labels = _chosen(path, self._names, self._columns)
        kind = self._schema.field(self._columns.path).type
        self.with_images = holds_images(kind)
        if not self.with_images and metadata_type(kind) != pa.string():
            raise InputError(f"{path}: the column {self._columns.path!r} is {kind}, which is neither paths nor images")

    def _hub_labels(self, columns: TableColumns) -> Sequence[str] | None:
        """Return the wanted label columns: the user's, else None if some are named label..., else the Hub's first."""
        labels = columns.labels
        if labels is None and not any(map(LABEL_COLUMN.fullmatch, self._schema.names)):
            labels = [name for name in self._schema.names if read_classes(self._features.get(name))][:1]
        return labels

    def rows(self, found: _Found) -> Iterator[TableRow]:
        """Yield the rows; note in `found` which columns are left out, and the types of the metadata columns."""
        path, split = self._columns.path, self._columns.split
        extra = [name for name in _extra(self._names, self._columns, self._labels, found) if self._keeps(name, found)]
        found.label_columns = len(self._labels)
        if self.with_images and not self._labels and self._columns.labels is not None:
            found.note("no column of labels: the samples are unlabelled; --label COLUMN names one")
        wanted = list(dict.fromkeys([path, *self._labels, *([split] if split else []), *extra]))
        number = 0
        try:
            size = IMAGES_AT_ONCE if self.with_images else ROWS_AT_ONCE
            batches = self._file.iter_batches(size, columns=wanted, use_threads=False)
            unfolded = 0
            while (read := self._next(batches)) is not None:
                batch, more = read
                unfolded += more
                require_bounded(self._path, unfolded)
                found.listing.bound(number + batch.num_rows)
                yield from self._rows_of(batch, extra, number)
                number += batch.num_rows
        except MemoryError:
            raise InputError(
                f"cannot read {self._path} as a table: a few rows take more memory than is given"
            ) from None
        except _UNREADABLE as error:
            raise InputError(f"cannot read {self._path} as a table: {error}") from None

    def _next(self, batches: Iterator[pa.RecordBatch]) -> tuple[pa.RecordBatch, int] | None:
        """Return the next rows and their bytes of unfolded text and pictures, or None at the end."""
        with limit_memory(self._path, self._reading_bytes):
            batch = next(batches, None)
            if batch is None:
                return None
            batch.validate(full=True)  # offsets of a damaged file may point anywhere, and reading them would crash
            return batch, sum(map(bytes_unfolded, batch.columns))

    def _rows_of(self, batch: pa.RecordBatch, extra: Sequence[str], before: int) -> Iterator[TableRow]:
        images = batch[self._columns.path]
        split = self._columns.split
        if not self.with_images:
            images = images.cast(pa.string())
        cells = batch[split].to_pylist() if split else [None] * batch.num_rows
        groups = [None if cell is None else str(cell) for cell in cells]
        labels = [self._label_cells(batch[name], name, before) for name in self._labels]
        values = {name: json_values(batch[name], self._schema.field(name).type) for name in extra}
        for row, image in enumerate(images):
            cell = image.as_py()
            cells = ((own, text) for own, column in zip(self._labels, labels, strict=True) for text in column[row])
            names = _row_labels(self._columns, cells, f"{self._path}, row {before + row + 1}")
            metadata = {name: column[row] for name, column in values.items()} if extra else None
            yield TableRow(before + row + 1, cell if self.with_images else cell or "", names, metadata, groups[row])

    def _label_cells(self, column: pa.Array, name: str, before: int) -> list[list[str]]:
        try:
            return label_cells(column, read_classes(self._features.get(name)))
        except ValueError as error:
            why = error.args[-1]
            row = f", row {before + error.args[0] + 1}" if len(error.args) > 1 else ""
            raise InputError(f"{self._path}{row}: the label column {name!r} is {column.type}: {why}") from None

    def _keeps(self, name: str, found: _Found) -> bool:
        """Tell whether a column becomes metadata; add a note if it does not."""
        own = self._schema.field(name).type
        kind = metadata_type(own)
        if kind is None:
            found.note(f"the column {name!r} is left out: {_shorten_type(own)} cannot be metadata")
            return False
        if found.kinds.setdefault(name, kind) != kind:
            raise InputError(f"{self._path}: the column {name!r} is {kind}, but {found.kinds[name]} in another table")
        return True


def _row_labels(columns: TableColumns, cells: Iterable[tuple[str, str]], where: str) -> tuple[str, ...]:
    """Return the labels of a row from its (column, cell) pairs, each once."""
    try:
        return tuple(dict.fromkeys(name for column, cell in cells for name in columns.names(column, cell)))
    except ValueError as error:
        raise InputError(f"{where}: {error}") from None


def _shorten_type(kind: pa.DataType) -> str:
    text = str(kind)
    return text if len(text) <= 60 else f"{text[:60]} ..."


# ----------------------------------------------------------------------------------------------------------- columns


def _chosen(path: Path, names: Sequence[str], columns: TableColumns) -> list[str]:
    """Return the label columns. Raises InputError if a wanted column is missing, or two have the same name."""
    if len(set(names) - {""}) != len([name for name in names if name]):
        raise InputError(f"{path} has two columns of one name; its columns are {_listed(names)}")
    labels = list(columns.labels) if columns.labels is not None else [n for n in names if LABEL_COLUMN.fullmatch(n)]
    for name in [columns.path, *labels, *([columns.split] if columns.split else [])]:
        if name not in names:
            where = "" if path.suffix.lower() == ".parquet" else " (its first line names them)"
            raise InputError(f"{path} has no column {name!r}; its columns are {_listed(names)}{where}")
    if not labels and columns.labels is None:
        raise InputError(
            f"{path} has no column 'label'; its columns are {_listed(names)}: give --label COLUMN, or --unlabelled"
        )
    return labels


def _extra(names: Sequence[str], columns: TableColumns, labels: Sequence[str], found: _Found) -> list[str]:
    """Return the columns that become metadata. Left out: columns without a name, and `labels`, a key of the shards."""
    used = {columns.path, columns.split, *labels, ""}
    if "" in names:
        found.note("columns without a name are left out")
    if "labels" in names and "labels" not in used:
        found.note("the column 'labels' is left out: a metadata column cannot be called so")
    return [name for name in names if name not in used and name != "labels"]


def _listed(names: Sequence[str]) -> str:
    more = f", ... ({len(names)} in all)" if len(names) > COLUMNS_NAMED else ""
    return ", ".join(name if len(name) <= 60 else f"{name[:60]}..." for name in names[:COLUMNS_NAMED]) + more
