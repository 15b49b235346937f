"""Loads queries and database of a report: codes, labels under one list of classes, and the place of each row."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.encode.codes import CodesSet, code_array, real_codes_array, require_class_ids
from pipelines.report.pictures import SampleLocation


@dataclass(frozen=True)
class Side:
    """The queries or the database: codes uint8 (N, bytes), labels multi-hot bool (N, C), and the place of each row."""

    codes: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.bool_]
    real_codes: npt.NDArray[np.int8] | None
    """Logits (N, bits), or None where they were not asked for."""
    shard: npt.NDArray[np.int32]
    row: npt.NDArray[np.int32]
    shards: Sequence[str]
    """The sha256 of the tars; `shard` holds positions in this list."""

    def __len__(self) -> int:
        return len(self.codes)

    def rows(self, chosen: npt.NDArray[np.int64]) -> "Side":
        """Return some of the rows, without real codes."""
        return Side(self.codes[chosen], self.labels[chosen], None, self.shard[chosen], self.row[chosen], self.shards)

    def place(self, number: int) -> SampleLocation:
        """Return the place of a row's image."""
        return SampleLocation(self.shards[self.shard[number]], int(self.row[number]))


@dataclass(frozen=True)
class Pair:
    """Both sides under one list of classes."""

    queries: Side
    database: Side
    classes: tuple[str, ...]
    bits: int

    @property
    def real_codes(self) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.int8]] | None:
        """Logits of queries and database, or None where they were not loaded."""
        if self.queries.real_codes is None or self.database.real_codes is None:
            return None
        return self.queries.real_codes, self.database.real_codes

    def findable(self) -> npt.NDArray[np.bool_]:
        """Tell for each query whether an item in the database is relevant to it, bool (Q,)."""
        return np.asarray((self.queries.labels & self.database.labels.any(0)).any(1), np.bool_)

    def arguments(self, rows: npt.NDArray[np.int64] | None = None) -> tuple[Any, Any, Any, Any]:
        """Return codes and labels in the form of the metrics, of all queries or of `rows`.

        Labels are class ids where each sample has exactly one class.
        """
        queries = (self.queries.codes, self.queries.labels)
        if rows is not None:
            queries = queries[0][rows], queries[1][rows]
        sides = [*queries, self.database.codes, self.database.labels]
        if all((side.labels.sum(1) == 1).all() for side in (self.queries, self.database)):
            sides[1], sides[3] = sides[1].argmax(1), sides[3].argmax(1)
        return sides[0], sides[1], sides[2], sides[3]


def load_pair(query_set: CodesSet, sets: Sequence[CodesSet], real_codes: bool = False) -> Pair:
    """Load all codes and labels; class ids are mapped by name to the sorted union of the class lists."""
    classes = tuple(sorted({name for entry in (query_set, *sets) for name in entry.classes}))
    return Pair(_load([query_set], classes, real_codes), _load(sets, classes, real_codes), classes, query_set.bits)


def find_names(sets: Sequence[CodesSet], places: Collection[SampleLocation]) -> dict[SampleLocation, str]:
    """Return the paths of the samples at these places, or their keys; only the shards that hold them are read."""
    wanted = {place.shard_sha256 for place in places}
    names: dict[SampleLocation, str] = {}
    for entry in sets:
        for shard in entry.shards:
            if shard.sha256 in wanted:
                table = entry.read(shard)
                for row, path, key in zip(*(table[name].to_pylist() for name in ("row", "path", "key")), strict=True):
                    if (place := SampleLocation(shard.sha256, row)) in places:
                        names[place] = path or key
    return names


def _load(sets: Sequence[CodesSet], classes: Sequence[str], with_real_codes: bool) -> Side:
    place = {name: number for number, name in enumerate(classes)}
    codes: list[npt.NDArray[np.uint8]] = []
    labels: list[npt.NDArray[np.bool_]] = []
    real_codes: list[npt.NDArray[np.int8]] = []
    shards: list[npt.NDArray[np.int32]] = []
    rows: list[npt.NDArray[np.int32]] = []
    for entry in sets:
        ids = np.array([place.get(name, -1) for name in entry.classes], np.int64)  # -1: no sample has it
        for table in entry.tables():
            codes.append(code_array(table["code"]))
            labels.append(_multi_hot(table["labels"], ids, len(classes), entry))
            real_codes += [real_codes_array(table["real_codes"])] if with_real_codes else []
            shards.append(np.full(len(table), len(shards), np.int32))
            rows.append(table["row"].to_numpy())
    names = [shard.sha256 for entry in sets for shard in entry.shards]
    return Side(
        np.concatenate(codes),
        np.concatenate(labels),
        np.concatenate(real_codes) if with_real_codes else None,
        np.concatenate(shards),
        np.concatenate(rows),
        names,
    )


def _multi_hot(
    column: pa.ChunkedArray, ids: npt.NDArray[np.int64], classes: int, entry: CodesSet
) -> npt.NDArray[np.bool_]:
    flat = pc.list_flatten(column).to_numpy()
    if len(flat):
        require_class_ids([int(flat.min()), int(flat.max())], len(entry.classes), entry.artifact.uri)
    counts = pc.list_value_length(column).to_numpy()
    hot = np.zeros((len(column), classes), np.bool_)
    hot[np.repeat(np.arange(len(column)), counts), ids[flat]] = True
    return hot
