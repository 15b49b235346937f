"""Columns of a table name labels, metadata and the part of the split."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset

from pipelines.config.settings import Config
from pipelines.errors import FingerprintMismatch, InputError
from pipelines.ingest.ingest import ingest
from pipelines.shards.shards import open_shards
from pipelines.verify.verify import verify
from tests.support.folders import PATHS, images_of, write_table


@pytest.mark.parametrize("name", ["t.csv", "t.parquet"])
def test_a_table_gives_labels_and_metadata(folder: Path, tmp_path: Path, name: str) -> None:
    table = write_table(
        folder / name,
        {
            "path": PATHS,
            "label": ["cat", "dog", None, "NA", "cat", "dog", "cat", "dog", "cat"],
            "label2": ["pet", None, None, "pet", "pet", "pet", "pet", "cat", "cat"],
            "stars": [1, 2, 3, None, 5, 6, 7, 8, 9],
            "place": ["Rome", "Oslo", "", *["x"] * 6],
        },
    )
    result = ingest(str(table), str(tmp_path / "out"), Config()).as_json()
    assert result["classes"] == ["NA", "cat", "dog", "pet"]
    shards = open_shards(result["uri"])
    found = images_of(shards)
    assert found["class_00/0000"] == ((folder / PATHS[0]).read_bytes(), ["cat", "pet"])
    assert found["class_00/0002"][1] == []
    assert found["class_01/0000"][1] == ["NA", "pet"]
    assert found["class_02/0002"][1] == ["cat"]
    url = str(Path(result["uri"], shards.shards[0].part.path))
    stock = {sample["__key__"]: sample for sample in webdataset.WebDataset(url, shardshuffle=False)}
    stars = "1" if name == "t.csv" else 1
    assert json.loads(stock["class_00/0000"]["json"]) == {"labels": [1, 3], "place": "Rome", "stars": stars}
    assert json.loads(stock["class_01/0000"]["json"])["stars"] is None
    assert "cls" not in stock["class_00/0000"]
    assert verify(result["uri"]).status == "done"


def test_one_label_without_metadata_is_a_cls_member(folder: Path, tmp_path: Path) -> None:
    table = write_table(folder / "t.csv", {"path": PATHS[:2], "label": ["7", "10"]})
    result = ingest(str(table), str(tmp_path / "out"), Config()).as_json()
    assert result["classes"] == ["7", "10"]
    url = str(Path(result["uri"], open_shards(result["uri"]).shards[0].part.path))
    stock = {sample["__key__"]: sample for sample in webdataset.WebDataset(url, shardshuffle=False)}
    assert stock["class_00/0000"]["cls"] == b"0"
    assert stock["class_00/0001"]["cls"] == b"1"


def test_parquet_lists_are_labels(folder: Path, tmp_path: Path) -> None:
    table = write_table(folder / "t.parquet", {"path": PATHS[:3], "labels": [["a", "b"], [], None]})
    result = ingest(str(table), str(tmp_path / "out"), Config()).as_json()
    found = images_of(open_shards(result["uri"]))
    assert [found[path.removesuffix(".jpg")][1] for path in PATHS[:3]] == [["a", "b"], [], []]


def test_columns_can_be_named_and_labels_left_out(folder: Path, tmp_path: Path) -> None:
    table = write_table(folder / "t.csv", {"file": PATHS[:3], "kind": ["a", "b", "a"], "label": ["x", "y", "z"]})
    result = ingest(str(table), str(tmp_path / "a"), Config(), path_column="file", label_columns=["kind"]).as_json()
    assert result["classes"] == ["a", "b"]
    result = ingest(str(table), str(tmp_path / "b"), Config(), path_column="file", label_columns=[]).as_json()
    assert result["classes"] == []
    assert {tuple(labels) for _, labels in images_of(open_shards(result["uri"])).values()} == {()}


def test_metadata_of_a_row_belongs_to_the_fingerprint(folder: Path, tmp_path: Path) -> None:
    table = write_table(folder / "t.csv", {"path": PATHS[:2], "label": ["a", "b"], "n": [1, 2]})
    ingest(str(table), str(tmp_path / "out"), Config())
    write_table(folder / "t.csv", {"path": PATHS[:2], "label": ["a", "b"], "n": [1, 3]})
    with pytest.raises(FingerprintMismatch):
        ingest(str(table), str(tmp_path / "out"), Config())


def test_dates_become_text_and_nan_null(folder: Path, tmp_path: Path) -> None:
    day = pa.array([86_400_000_000, None], pa.timestamp("us"))
    pq.write_table(
        pa.table({"path": PATHS[:2], "label": ["a", "b"], "day": day, "x": [float("nan"), 1.5]}), folder / "t.parquet"
    )
    result = ingest(str(folder / "t.parquet"), str(tmp_path / "out"), Config()).as_json()
    shards = open_shards(result["uri"])
    facts = {s.record.key: json.loads(s.metadata or b"") for s in shards.read(shards.shards[0], metadata=True)}
    assert facts["class_00/0000"] == {"labels": [0], "day": "1970-01-02 00:00:00.000000", "x": None}
    assert facts["class_00/0001"] == {"labels": [1], "day": None, "x": 1.5}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"file": PATHS[:1], "label": ["a"]}, "has no column 'path'; its columns are file, label"),
        ({"path": PATHS[:1], "kind": ["a"]}, "has no column 'label'; its columns are path, kind"),
        ({"path": ["class_00/none.jpg"], "label": ["a"]}, "row 1: cannot read .*none.jpg: No such file"),
        ({"path": ["../class_00/0000.jpg"], "label": ["a"]}, "path leaves its root"),
        ({"path": ["/etc/passwd"], "label": ["a"]}, "absolute path"),
        ({"path": ["class_00"], "label": ["a"]}, "is not a plain file"),
        ({"path": [], "label": []}, "holds no images"),
        ({"path": PATHS[:1], "label": [b"\xff"]}, "label column 'label' is binary"),
        ({"path": PATHS[:1], "label": [1.5]}, "label column 'label' is double"),
    ],
)
def test_tables_that_cannot_be_used(folder: Path, tmp_path: Path, columns: dict[str, list[Any]], message: str) -> None:
    table = write_table(folder / "t.parquet", columns)
    with pytest.raises(InputError, match=message):
        ingest(str(table), str(tmp_path / "out"), Config())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("data", [b"", b"path,label\na.jpg\n", b"\x00\xff\xfe", b"path,path,label\na,b,c\n"])
def test_bytes_that_are_no_table(tmp_path: Path, data: bytes) -> None:
    for name in ("t.csv", "t.parquet"):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match=name):
            ingest(str(tmp_path / name), str(tmp_path / "out"), Config())
