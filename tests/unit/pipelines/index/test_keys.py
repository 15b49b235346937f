"""Key tables: equal rows give equal bytes, are read by shard and by id, and refused where they lie."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipelines.artifacts.parquet import parquet_groups, table_of
from pipelines.errors import DamagedArtifact
from pipelines.index.keys import KEY_GROUP_ROWS, KeyTable, keys_bytes
from pipelines.index.layout import index_id, keys_schema

SIZES = {2: 10, 5: 3 * KEY_GROUP_ROWS, 6: 1, 9: KEY_GROUP_ROWS // 2}
"""Codes of each ordinal; every second row of a tar is a reject."""


def ids_of(ordinal: int) -> list[int]:
    return index_id(ordinal, 2 * np.arange(SIZES[ordinal])).tolist()


def keys(ids: list[int]) -> pa.Table:
    columns = {"id": ids, "key": [f"k{n}" for n in ids], "path": [f"{n}.jpg" for n in ids]}
    return table_of(keys_schema(8), {**columns, "code": [bytes([n % 251]) for n in ids], "labels": [[0]] * len(ids)})


def whole() -> pa.Table:
    return keys([number for ordinal in SIZES for number in ids_of(ordinal)])


def opened(path: Path, data: bytes, rows: int = sum(SIZES.values())) -> KeyTable:
    path.write_bytes(data)
    return KeyTable(path, 8, False, rows, "here")


def test_the_bytes_do_not_depend_on_the_chunks() -> None:
    chunks = pa.concat_tables([whole().slice(0, 5), whole().slice(5, 7000), whole().slice(7005)])
    assert keys_bytes(chunks) == keys_bytes(whole())


def test_a_shard_and_columns_of_it_are_its_rows(tmp_path: Path) -> None:
    table = opened(tmp_path / "keys", keys_bytes(whole()))
    assert table.read().equals(whole()) and table.read(["key"]).equals(whole().select(["key"]))
    for ordinal in SIZES:
        rows = keys(ids_of(ordinal))
        assert table.read_shard(ordinal).equals(rows)
        assert table.read_shard(ordinal, ["code", "key"]).equals(rows.select(["code", "key"]))
    for absent in (0, 3, 7, 11):
        assert len(table.read_shard(absent)) == 0


def test_ids_are_looked_for_in_the_row_groups_that_can_hold_them(tmp_path: Path) -> None:
    table = opened(tmp_path / "keys", keys_bytes(whole()))
    ids = whole()["id"].to_numpy()
    for wanted in (ids, ids[::700], ids[:0], ids[-1:]):
        found = [(group, chunk.tolist()) for group, chunk in table.locate(wanted)]
        assert [number for _, chunk in found for number in chunk] == wanted.tolist()
        for group, chunk in found:
            assert set(chunk) <= set(table.read_group(group, ("id",))["id"].to_pylist())
    assert [group for group, _ in table.locate(np.array([0, 5]))] == [0], "before the first id there is no group"


def test_a_table_that_is_not_what_it_says_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DamagedArtifact, match=rf"here has {len(whole())} rows, expected 9"):
        opened(tmp_path / "keys", keys_bytes(whole()), 9)
    backwards = whole().take(pa.array(np.arange(len(whole()))[::-1]))
    with pytest.raises(DamagedArtifact, match="here is not sorted by id"):
        opened(tmp_path / "keys", keys_bytes(backwards))
    other = whole().select(["key"])
    with pytest.raises(DamagedArtifact, match=r"here: column 0 is .*expected id: int64"):
        opened(tmp_path / "keys", parquet_groups(other.schema, [other], 9))
