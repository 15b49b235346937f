"""The tables of a study artifact: one row per cell, one per candidate of a search, and the summary over the seeds."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import pyarrow as pa

from pipelines.artifacts.parquet import schema_of, table_of

AXIS_PREFIX = "axis."
"""Prefix of the columns with the labels of an axis; the axis's name follows."""

CELLS = pa.schema(
    [
        *schema_of(group=pa.string(), seed=pa.int64()),
        *pa.schema({"map": pa.float64(), "chance": pa.float64(), "val_map": pa.float64()}),
        *schema_of(backbone=pa.string(), loss=pa.string(), bits=pa.int32(), image_size=pa.int32(), lr=pa.float64()),
        *pa.schema({"steps": pa.int64(), "images": pa.int64(), "parameters": pa.int64(), "flops": pa.int64()}),
        *pa.schema({"model": pa.string(), "report": pa.string(), "error": pa.string()}),
    ]
)
"""Columns of every study; one of strings for each axis follows.

`flops` count one image's forward pass, `images` those seen in training; `model` and `report` are digests. A cell that
failed has an error instead of figures.
"""

SEARCHES = pa.schema(
    [
        *schema_of(group=pa.string(), seed=pa.int64(), candidate=pa.string()),
        *pa.schema({"val_map": pa.float64(), "model": pa.string()}),
        *schema_of(chosen=pa.bool_()),
        *pa.schema({"error": pa.string()}),
    ]
)


@dataclass(frozen=True)
class Trial:
    """The outcome of one candidate of a search."""

    group: str
    seed: int
    candidate: str
    val_map: float | None
    model: str | None
    chosen: bool
    error: str | None


def cells_schema(axes: Sequence[str]) -> pa.Schema:
    """Return the schema of the cells of a study with these axes."""
    return pa.schema([*CELLS, *(pa.field(AXIS_PREFIX + name, pa.string(), nullable=False) for name in axes)])


def cells_table(axes: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Return the cells as a table; values that a row lacks are null."""
    schema = cells_schema(axes)
    return table_of(schema, {name: [row.get(name) for row in rows] for name in schema.names})


def summarise_groups(cells: pa.Table) -> list[dict[str, Any]]:
    """Summarise each group over its seeds: mean and sample deviation of the mAP.

    A single seed has no deviation. Failed cells are counted but not averaged; a group whose cells all failed has no
    mean. The other figures are those that its cells share.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in cells.to_pylist():
        groups.setdefault(row["group"], []).append(row)
    return [_summary(rows) for rows in groups.values()]


def _summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    done = [row for row in rows if None not in (row["map"], row["val_map"])]
    maps = [row["map"] for row in done]
    shared = (done or rows)[0]
    return {
        **{name: value for name, value in shared.items() if name.startswith(AXIS_PREFIX)},
        "map": fmean(maps) if maps else None,
        "deviation": stdev(maps) if len(maps) > 1 else None,
        "seeds": len(done),
        "failed": len(rows) - len(done),
        "val_map": fmean(row["val_map"] for row in done) if done else None,
        **{name: shared[name] for name in ("lr", "bits", "image_size", "images", "parameters", "flops")},
    }


def group_chances(cells: pa.Table) -> list[float | None]:
    """Return the mAP of a random order for each group, in the order of the summary; None if all its cells failed."""
    found: dict[str, float | None] = {}
    for group, chance in zip(cells["group"].to_pylist(), cells["chance"].to_pylist(), strict=True):
        found[group] = chance if found.get(group) is None else found[group]
    return list(found.values())


@dataclass(frozen=True)
class RankedGroup:
    """A row of the summary with its group's chance and what its distance from the best is worth."""

    row: Mapping[str, Any]
    chance: float | None
    note: str


def sort_groups(summary: Sequence[Mapping[str, Any]], chances: Sequence[float | None]) -> list[RankedGroup]:
    """Return the groups, best mAP first.

    A group is within the noise of the seeds if its mAP differs from the best by no more than the deviation of such a
    difference from seed to seed, sqrt(a^2 + b^2).
    """
    rows = sorted(zip(summary, chances, strict=True), key=lambda pair: -(pair[0]["map"] or 0.0))
    return [RankedGroup(row, chance, _note(row, rows[0][0])) for row, chance in rows]


def rank_groups(summary: Sequence[Mapping[str, Any]], chances: Sequence[float | None]) -> list[dict[str, Any]]:
    """Return the groups as rows for a terminal, best mAP first."""
    return [_ranked(group) for group in sort_groups(summary, chances)]


def _ranked(group: RankedGroup) -> dict[str, Any]:
    row = group.row
    deviation = f" ± {row['deviation']:.4f}" if row["deviation"] is not None else ""
    return {
        "mAP": None if row["map"] is None else f"{row['map']:.4f}{deviation}",
        "chance": group.chance,
        "seeds": row["seeds"],
        "failed": row["failed"] or None,
        **{name.removeprefix(AXIS_PREFIX): label for name, label in row.items() if name.startswith(AXIS_PREFIX)},
        "val_map": row["val_map"],
        "bits": row["bits"],
        "note": group.note,
    }


def _note(row: Mapping[str, Any], best: Mapping[str, Any]) -> str:
    if row is best and row["map"] is not None:
        return "best"
    if row["deviation"] is None or best["deviation"] is None:
        return ""
    close = best["map"] - row["map"] <= math.hypot(best["deviation"], row["deviation"])
    return f"within the noise of {min(row['seeds'], best['seeds'])} seeds" if close else ""
