"""The columns of a Parquet table of images: those with pictures, labels and metadata, and their cells as plain values.

Tables of the Hugging Face Hub name their image columns and classes themselves, as JSON in the schema's metadata.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from pipelines.ingest.classes import label_name

MAX_FEATURES_BYTES = 16 << 20
"""Largest size of the Hub's JSON in bytes; a larger one is ignored."""

_LISTS = ("Sequence", "List", "LargeList")
_SURROGATE = re.compile("[\ud800-\udfff]")
"""A lone surrogate: JSON can spell it, but UTF-8 cannot store it."""


def read_features(schema: pa.Schema) -> Mapping[str, Any]:
    """Return the Hub's description of each column from the schema's metadata, or {} if there is no usable one."""
    text = (schema.metadata or {}).get(b"huggingface", b"")
    try:
        features = json.loads(text)["info"]["features"] if len(text) <= MAX_FEATURES_BYTES else {}
    except (ValueError, KeyError, TypeError, RecursionError):  # anybody may have written it
        return {}
    return features if isinstance(features, dict) else {}


def read_classes(feature: Any) -> list[str] | None:
    """Return the class names of a `ClassLabel` feature, or of a list of `ClassLabel`; None for any other feature."""
    while True:  # no recursion: the depth is set by an untrusted file
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
    """Return the columns that hold images: structs of `bytes` and `path`, and bytes that the Hub calls an image."""
    features = read_features(schema)
    found = []
    for field in schema:
        feature = features.get(field.name)
        image = isinstance(feature, dict) and feature.get("_type") == "Image"
        if _is_image_struct(field.type) or (image and _is_bytes_type(field.type)):
            found.append(field.name)
    return found


def columns_of_bytes(schema: pa.Schema) -> list[str]:
    """Return the columns whose type is bytes."""
    return [field.name for field in schema if _is_bytes_type(field.type)]


def lists_of_images(schema: pa.Schema) -> list[str]:
    """Return the columns with a list of images in each cell; they are not supported."""
    return [field.name for field in schema if _is_list_type(field.type) and _is_image_struct(field.type.value_type)]


def holds_images(kind: pa.DataType) -> bool:
    """Tell whether a column of this type can hold images."""
    return _is_image_struct(kind) or _is_bytes_type(kind)


def _is_image_struct(kind: pa.DataType) -> bool:
    if not pa.types.is_struct(kind):
        return False
    fields = {field.name: field.type for field in kind}
    path = fields.get("path", pa.null())
    return _is_bytes_type(fields.get("bytes", pa.null())) and (pa.types.is_null(path) or _is_text_type(path))


def _is_bytes_type(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def _is_text_type(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


# ----------------------------------------------------------------------------------------------------------- metadata


def metadata_type(kind: pa.DataType) -> pa.DataType | None:
    """Return the type of a column as metadata of shards and codes, or None if it cannot be metadata."""
    if pa.types.is_dictionary(kind):
        return metadata_type(kind.value_type)
    if _is_text_type(kind) or pa.types.is_null(kind):
        return pa.string()
    plain = pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind)
    return kind if plain or _as_text(kind) else None


def json_values(column: pa.Array, kind: pa.DataType) -> list[Any]:
    """Return the cells of a metadata column as JSON values: dates, times and decimals as text, NaN as null."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if _as_text(kind):
        column = column.cast(pa.string())
    return [None if isinstance(v, float) and not math.isfinite(v) else v for v in column.to_pylist()]


def _as_text(kind: pa.DataType) -> bool:
    return (pa.types.is_temporal(kind) and not pa.types.is_interval(kind)) or pa.types.is_decimal(kind)


def bytes_unfolded(column: pa.Array) -> int:
    """Return the bytes of text and pictures in a column; a dictionary's value counts for each cell that has it."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        return bytes_unfolded(column.dictionary_decode()) if _is_text_type(kind.value_type) else 0
    if pa.types.is_struct(kind):
        return sum(map(bytes_unfolded, column.flatten()))
    if _is_list_type(kind):
        return bytes_unfolded(column.flatten())
    return int(column.nbytes) if _is_text_type(kind) or _is_bytes_type(kind) else 0


# ------------------------------------------------------------------------------------------------------------- labels


def label_cells(column: pa.Array, names: Sequence[str] | None) -> list[list[str]]:
    """Return the class names of each row, an empty list for an empty cell. `names` are the names of class numbers.

    A cell may be a list. Raises ValueError if the column cannot be labels; its first argument is the row, from 0, if a
    single cell is the reason.
    """
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    inner = column.type.value_type if _is_list_type(column.type) else column.type
    if not (metadata_type(inner) or pa.types.is_dictionary(inner)):
        raise ValueError("labels are texts, whole numbers or lists of them")
    if pa.types.is_temporal(inner) and inner is column.type:
        column = column.cast(pa.string())
    cells: list[list[str]] = []
    for row, cell in enumerate(column.to_pylist()):
        try:
            values = cell if isinstance(cell, list) else [cell]
            cells.append([name for name in (_class_name_of(value, names) for value in values) if name])
        except ValueError as error:
            raise ValueError(row, str(error)) from None
    return cells


def _is_list_type(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _class_name_of(value: Any, names: Sequence[str] | None) -> str:
    if names is None or not isinstance(value, int) or isinstance(value, bool):
        return label_name(value)
    if value == -1:  # the Hub's number for a picture without a label
        return ""
    if not 0 <= value < len(names):
        raise ValueError(f"{value} is none of the {len(names)} classes that the schema names")
    return names[value]
