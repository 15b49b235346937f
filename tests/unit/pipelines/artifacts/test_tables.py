"""The Parquet tables of the contract."""

import io
import json
import subprocess
import sys
from pathlib import Path

import duckdb
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.artifacts.parquet import (
    ParquetRows,
    parquet_bytes,
    parquet_groups,
    read_parquet,
    require_schema,
    table_of,
)
from pipelines.artifacts.tables import REJECTS, SHARD_INDEX, Reason, codes_schema
from pipelines.errors import DamagedArtifact


def codes_table(bits: int = 16) -> pa.Table:
    schema = codes_schema(bits, "f" * 64, ["cat", "dög"], {"caption": pa.string()})
    width = (bits + 7) // 8
    return table_of(
        schema,
        {
            "key": ["a", "b"],
            "shard": ["shard-000000.tar"] * 2,
            "row": [0, 1],
            "path": ["a.jpg", "b.tif"],
            "code": [bytes([1] * width), bytes([2] * width)],
            "labels": [[0, 1], []],
            "caption": ["x", None],
        },
    )


@pytest.mark.parametrize(("bits", "width"), [(8, 1), (12, 2), (16, 2), (64, 8)])
def test_codes_are_plain_fixed_size_binary(bits: int, width: int) -> None:
    field = codes_schema(bits, "", []).field("code")
    assert str(field.type) == f"fixed_size_binary[{width}]"


def test_a_lone_codes_file_says_what_it_holds() -> None:
    found = pq.read_schema(io.BytesIO(parquet_bytes(codes_table()))).metadata
    assert found[b"hhnet.bits"] == b"16"
    assert found[b"hhnet.bit_order"] == b"little"
    assert found[b"hhnet.fingerprint"] == b"f" * 64
    assert json.loads(found[b"hhnet.classes"]) == ["cat", "dög"]


def test_equal_tables_give_equal_bytes() -> None:
    assert parquet_bytes(codes_table()) == parquet_bytes(codes_table())


def test_duckdb_and_pandas_read_codes(tmp_path: Path) -> None:
    path = tmp_path / "codes.parquet"
    path.write_bytes(parquet_bytes(codes_table()))
    rows = duckdb.sql(f"select key, shard, code, labels from '{path}' order by key").fetchall()
    assert rows[0] == ("a", "shard-000000.tar", b"\x01\x01", [0, 1])
    frame = pandas.read_parquet(path)
    assert frame["code"].tolist() == [b"\x01\x01", b"\x02\x02"]
    assert frame["labels"][1].tolist() == []


def test_tables_survive_parquet() -> None:
    member = {"name": "a.jpg", "offset": 512, "size": 3, "sha256": bytes(32)}
    index = {"key": ["a"], "shard": ["s.tar"], "row": [0], "path": ["a.jpg"], "labels": [[1]], "members": [[member]]}
    rejects = {
        "key": ["a"],
        "shard": ["s.tar"],
        "row": [0],
        "stage": ["decode"],
        "reason": ["truncated"],
        "detail": [""],
    }
    for schema, columns in ((SHARD_INDEX, index), (REJECTS, rejects)):
        table = read_parquet(parquet_bytes(table_of(schema, columns)), "here")
        require_schema(table, schema, "here")
        assert table.to_pydict() == columns


def test_bytes_that_are_no_parquet_are_damage() -> None:
    data = parquet_bytes(codes_table())
    for broken in (b"", b"PAR1", data[: len(data) // 2], data[4:]):
        with pytest.raises(DamagedArtifact, match="here is not readable as Parquet"):
            read_parquet(broken, "here")


# ---------------------------------------------------------------------------------------------------- ranges of rows


def numbered(name: str, count: int) -> pa.Table:
    columns = {"key": [f"{name}/{n}" for n in range(count)], "shard": [name] * count, "row": list(range(count))}
    columns["path"] = [f"{n}.jpg" for n in range(count)]
    members = [[{"name": "a.jpg", "offset": n, "size": 3, "sha256": bytes(32)}] for n in range(count)]
    return table_of(SHARD_INDEX, {**columns, "labels": [[n] for n in range(count)], "members": members})


def rows_of(path: Path, data: bytes) -> ParquetRows:
    path.write_bytes(data)
    return ParquetRows(path, SHARD_INDEX, "here")


@pytest.mark.parametrize("group", [1, 3, 4, 100])
def test_any_range_of_rows_is_that_slice_of_the_table(tmp_path: Path, group: int) -> None:
    tables = [numbered("a.tar", 7), numbered("b.tar", 1), numbered("c.tar", 4)]
    whole = pa.concat_tables(tables).to_pylist()
    for data in (parquet_groups(SHARD_INDEX, tables, group), parquet_bytes(pa.concat_tables(tables))):
        rows = rows_of(tmp_path / "rows", data)
        assert rows.rows == 12
        for start in range(13):
            for stop in range(start, 13):
                assert rows.read(start, stop).to_pylist() == whole[start:stop]


def test_rows_are_read_after_the_file_lost_its_name(tmp_path: Path) -> None:
    rows = rows_of(tmp_path / "rows", parquet_groups(SHARD_INDEX, [numbered("a.tar", 5)], 2))
    (tmp_path / "rows").unlink()
    assert rows.read(3, 5).to_pylist() == numbered("a.tar", 5).to_pylist()[3:]


def test_some_columns_of_some_row_groups_are_read(tmp_path: Path) -> None:
    tables = [numbered("a.tar", 7), numbered("b.tar", 4)]
    rows = rows_of(tmp_path / "rows", parquet_groups(SHARD_INDEX, tables, 3))
    assert rows.least("row") == [0, 3, 6, 0, 3]
    whole = pa.concat_tables(tables).select(["key", "labels"]).to_pylist()
    assert rows.read_groups([1, 4], ["key", "labels"]).to_pylist() == [*whole[3:6], *whole[10:]]


def test_row_groups_that_do_not_say_their_least_value_are_damage(tmp_path: Path) -> None:
    pq.write_table(numbered("a.tar", 7), tmp_path / "plain", write_statistics=False)
    with pytest.raises(DamagedArtifact, match="here has no statistics of row"):
        rows_of(tmp_path / "rows", (tmp_path / "plain").read_bytes()).least("row")


def test_tables_share_no_row_group() -> None:
    data = parquet_groups(SHARD_INDEX, (numbered(name, 5) for name in ("a.tar", "b.tar")), 3)
    metadata = pq.read_metadata(io.BytesIO(data))
    assert [metadata.row_group(n).num_rows for n in range(metadata.num_row_groups)] == [3, 2, 3, 2]


def test_rows_that_are_no_parquet_are_damage(tmp_path: Path) -> None:
    data = parquet_groups(SHARD_INDEX, [numbered("a.tar", 50)], 10)
    for broken in (b"", b"PAR1", data[: len(data) // 2], data[4:]):
        with pytest.raises(DamagedArtifact, match="here is not readable as Parquet"):
            rows_of(tmp_path / "rows", broken).read(0, 50)
    with pytest.raises(DamagedArtifact, match="here is not readable as Parquet"):
        rows_of(tmp_path / "rows", data[:4] + bytes(len(data) // 3) + data[4 + len(data) // 3 :]).read(0, 50)
    with pytest.raises(DamagedArtifact, match="expected key: string"):
        rows_of(tmp_path / "rows", parquet_bytes(codes_table().drop(["key"])))


# -------------------------------------------------------------------------------------------------------------- schemas


@pytest.mark.parametrize(
    "change",
    [
        lambda table: table.drop(["labels"]),
        lambda table: table.select(["shard", "key", "row", "code", "labels"]),
        lambda table: table.set_column(2, "row", table["row"].cast(pa.int64())),
        lambda table: table.set_column(3, "code", table["code"].cast(pa.binary())),
    ],
)
def test_another_schema_is_damage(change) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(DamagedArtifact, match="expected"):
        require_schema(change(codes_table()), codes_schema(16, "", []), "here")


def test_another_code_length_is_damage() -> None:
    with pytest.raises(DamagedArtifact, match="code"):
        require_schema(codes_table(16), codes_schema(64, "", []), "here")


def test_the_reasons_are_closed() -> None:
    assert [str(reason) for reason in Reason] == [
        *("damaged", "not_an_image", "truncated", "too_large", "undecodable", "worker_died", "out_of_memory", "stuck")
    ]


def test_reading_parquet_leaves_no_thread(tmp_path: Path) -> None:
    """A thread of Arrow's that lets go of the bytes while the interpreter ends aborts the process."""
    (tmp_path / "table.parquet").write_bytes(parquet_bytes(pa.table({"a": list(range(1000)), "b": ["x"] * 1000})))
    code = """
import os, sys
import pyarrow.parquet
from pipelines.artifacts.parquet import read_parquet
data = open(sys.argv[1], "rb").read()
before = set(os.listdir("/proc/self/task"))
assert read_parquet(data, "table", ["b"]).num_rows == 1000
print(len(set(os.listdir("/proc/self/task")) - before))
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "table.parquet"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr
