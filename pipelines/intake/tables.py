"""A CSV or Parquet table of image paths, labels and metadata as a source of `ingest`."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pc
import pyarrow.parquet as pq

from pipelines.errors import InputError
from pipelines.intake.folders import folder_reader
from pipelines.intake.sources import Entry, Listing, Source, file_size, inside, unfit

TABLE_SUFFIXES = (".csv", ".parquet")
LABEL_COLUMN = re.compile(r"labels?\d*")


def open_table(
    path: Path,
    path_column: str = "path",
    label_columns: Sequence[str] | None = None,
    split_column: str | None = None,
) -> Source:
    """List a table of images. Unset `label_columns` = those called label, label2, ...; none of them = unlabelled.

    Every listed file must be there, below the table's folder. A cell without text is no label; a Parquet cell may
    be a list. Columns that are neither path, label nor split become metadata. Raises InputError.
    """
    table = _read(path)
    labels = _label_columns(table, path, label_columns)
    for name in [path_column, *labels, *([split_column] if split_column else [])]:
        if name not in table.column_names:
            raise InputError(f"{path} has no column {name!r}; its columns are {', '.join(table.column_names)}")
    used = {path_column, split_column, *labels}
    extra = {name: _json_values(table, name, path) for name in table.column_names if name not in used}
    paths = [_plain_path(name, row, path) for row, name in enumerate(_texts(table, path_column, path))]
    groups = _texts(table, split_column, path) if split_column else [None] * len(paths)
    cells = [_label_cells(table, name, path) for name in labels]
    listing = Listing(str(path))
    for row, name in enumerate(paths):
        if reason := unfit(name, file_size(f"{path.parent}/{name}", f"{path}, row {row + 1}")):
            listing.skip(name, reason)
            continue
        names = dict.fromkeys(label for column in cells for label in column[row])
        metadata = {column: values[row] for column, values in extra.items()} if extra else None
        listing.add(Entry(name, tuple(names), metadata, groups[row]))
    return Source(listing, folder_reader(path.parent))


def _read(path: Path) -> pa.Table:
    try:
        if path.suffix.lower() == ".parquet":
            table = pq.read_table(path, partitioning=None)
            table.validate(full=True)
        else:
            # Only an empty cell is null: NA, null and None are words that a class may be called.
            convert = pc.ConvertOptions(null_values=[""], strings_can_be_null=True, timestamp_parsers=[])
            table = pc.read_csv(path, convert_options=convert)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InputError(f"cannot read {path} as a table: {error}") from None
    if len(set(table.column_names)) != len(table.column_names):
        raise InputError(f"{path} has two columns of one name; its columns are {', '.join(table.column_names)}")
    return table


def _label_columns(table: pa.Table, path: Path, chosen: Sequence[str] | None) -> list[str]:
    if chosen is not None:
        return list(chosen)
    found = [name for name in table.column_names if LABEL_COLUMN.fullmatch(name)]
    if not found:
        raise InputError(f"{path} has no column 'label'; its columns are {', '.join(table.column_names)}")
    return found


def _texts(table: pa.Table, name: str, path: Path) -> list[str]:
    values = [_as_text(value) for value in table[name].to_pylist()]
    for row, value in enumerate(values):
        if not value:
            raise InputError(f"{path}, row {row + 1}: the column {name!r} is empty")
    return values


def _label_cells(table: pa.Table, name: str, path: Path) -> list[list[str]]:
    """Class names by row: an empty list where the cell is empty."""
    kind = table.schema.field(name).type
    if pa.types.is_binary(kind) or pa.types.is_struct(kind) or pa.types.is_floating(kind):
        raise InputError(f"{path}: the label column {name!r} is {kind}; labels are texts, integers or lists of them")
    cells = ([cell] if not isinstance(cell, list) else cell for cell in table[name].to_pylist())
    return [[text for text in map(_as_text, cell) if text] for cell in cells]


def _as_text(value: Any) -> str:
    return "" if value is None else str(value)


def _json_values(table: pa.Table, name: str, path: Path) -> list[Any]:
    """A metadata column as JSON values; dates, times and decimals become text, NaN becomes null."""
    kind = table.schema.field(name).type
    column = table[name]
    if name == "labels":
        raise InputError(f"{path}: a metadata column cannot be called 'labels': rename it")
    if pa.types.is_dictionary(kind):
        column = column.cast(kind.value_type)
    elif pa.types.is_temporal(kind) or pa.types.is_decimal(kind):
        column = column.cast(pa.string())
    elif pa.types.is_nested(kind) or pa.types.is_binary(kind) or isinstance(kind, pa.BaseExtensionType):
        raise InputError(f"{path}: the column {name!r} is {kind}, which cannot be metadata: drop it or make it text")
    return [None if isinstance(v, float) and not math.isfinite(v) else v for v in column.to_pylist()]


def _plain_path(name: str, row: int, table: Path) -> str:
    path, refusal = inside(name)
    if refusal:
        raise InputError(f"{table}, row {row + 1}: {name!r}: {refusal}; paths are relative to the table's folder")
    return path
