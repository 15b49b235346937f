"""The columns of a Parquet table of images: which hold pictures, labels and metadata, and their cells as plain values.

What the Hugging Face Hub serves says of itself which column is an image and what the classes are called, as JSON in the
metadata of the schema.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from pipelines.ingest.classes import label_name

MAX_FEATURES_BYTES = 16 << 20

_LISTS = ("Sequence", "List", "LargeList")
_SURROGATE = re.compile("[\ud800-\udfff]")
"""Half a character, which JSON can spell and nothing can store."""


def features_of(schema: pa.Schema) -> Mapping[str, Any]:
    """Return what the schema's metadata says of each column in the Hub's way; {} where it says nothing usable."""
    text = (schema.metadata or {}).get(b"huggingface", b"")
    try:
        features = json.loads(text)["info"]["features"] if len(text) <= MAX_FEATURES_BYTES else {}
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
    return features if isinstance(features, dict) else {}


def classes_of(feature: Any) -> list[str] | None:
    """Return the class names of a `ClassLabel`, or of a list of them; None for any other feature."""
    while True:  # and no recursion: a stranger says how deep it is
        if isinstance(feature, list) and len(feature) == 1:
            feature = feature[0]
        elif isinstance(feature, dict) and feature.get("_type") in _LISTS:
            feature = feature.get("feature")
        else:
            break
    named = isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
    names = feature.get("names") if named else None
    usable = isinstance(names, list) and all(map(_is_class_name, names))
    return names if usable else None


def _is_class_name(name: Any) -> bool:
    return isinstance(name, str) and bool(name.strip()) and _SURROGATE.search(name) is None


def image_columns(schema: pa.Schema) -> list[str]:
    """Return the columns that hold images as bytes: structs of `bytes` and `path`, and what the Hub calls an image."""
    features = features_of(schema)
    found = []
    for field in schema:
        feature = features.get(field.name)
        image = isinstance(feature, dict) and feature.get("_type") == "Image"
        if _is_image_struct(field.type) or (image and _is_bytes(field.type)):
            found.append(field.name)
    return found


def columns_of_bytes(schema: pa.Schema) -> list[str]:
    """Return the columns of bytes, whatever they mean."""
    return [field.name for field in schema if _is_bytes(field.type)]


def lists_of_images(schema: pa.Schema) -> list[str]:
    """Return the columns that hold several images in a cell, which are not read."""
    return [field.name for field in schema if _is_list(field.type) and _is_image_struct(field.type.value_type)]


def holds_images(kind: pa.DataType) -> bool:
    """Whether images can be in the cells of a column of this type."""
    return _is_image_struct(kind) or _is_bytes(kind)


def _is_image_struct(kind: pa.DataType) -> bool:
    if not pa.types.is_struct(kind):
        return False
    fields = {field.name: field.type for field in kind}
    path = fields.get("path", pa.null())
    return _is_bytes(fields.get("bytes", pa.null())) and (pa.types.is_null(path) or _is_text(path))


def _is_bytes(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


# ----------------------------------------------------------------------------------------------------------- metadata


def metadata_type(kind: pa.DataType) -> pa.DataType | None:
    """Return the type that a column keeps as metadata and in codes; None where it cannot be metadata."""
    if pa.types.is_dictionary(kind):
        return metadata_type(kind.value_type)
    if _is_text(kind) or pa.types.is_null(kind):
        return pa.string()
    plain = pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind)
    return kind if plain or _as_text(kind) else None


def json_values(column: pa.Array, kind: pa.DataType) -> list[Any]:
    """Return the cells of a metadata column as JSON has them: dates, times and decimals as text, NaN as null."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if _as_text(kind):
        column = column.cast(pa.string())
    return [None if isinstance(v, float) and not math.isfinite(v) else v for v in column.to_pylist()]


def _as_text(kind: pa.DataType) -> bool:
    return (pa.types.is_temporal(kind) and not pa.types.is_interval(kind)) or pa.types.is_decimal(kind)


def bytes_unfolded(column: pa.Array) -> int:
    """Return how many bytes of text and pictures the cells of a column have, each counted as often as it is there."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        return bytes_unfolded(column.dictionary_decode()) if _is_text(kind.value_type) else 0
    if pa.types.is_struct(kind) or _is_list(kind):
        return (
            sum(map(bytes_unfolded, column.flatten())) if pa.types.is_struct(kind) else bytes_unfolded(column.flatten())
        )
    return int(column.nbytes) if _is_text(kind) or _is_bytes(kind) else 0


# ------------------------------------------------------------------------------------------------------------- labels


def label_cells(column: pa.Array, names: Sequence[str] | None) -> list[list[str]]:
    """Return the class names of each row, none where the cell is empty; `names` are those of class numbers.

    A cell may be a list. Raises ValueError where the column cannot be labels, with the row from 0 if one is to blame.
    """
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    inner = column.type.value_type if _is_list(column.type) else column.type
    if not (metadata_type(inner) or pa.types.is_dictionary(inner)):
        raise ValueError("labels are texts, whole numbers or lists of them")
    if pa.types.is_temporal(inner) and inner is column.type:
        column = column.cast(pa.string())
    cells: list[list[str]] = []
    for row, cell in enumerate(column.to_pylist()):
        try:
            values = cell if isinstance(cell, list) else [cell]
            cells.append([name for name in (_named(value, names) for value in values) if name])
        except ValueError as error:
            raise ValueError(row, str(error)) from None
    return cells


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _named(value: Any, names: Sequence[str] | None) -> str:
    if names is None or not isinstance(value, int) or isinstance(value, bool):
        return label_name(value)
    if value == -1:  # the Hub's way to say that a picture has no label
        return ""
    if not 0 <= value < len(names):
        raise ValueError(f"{value} is none of the {len(names)} classes that the schema names")
    return names[value]
