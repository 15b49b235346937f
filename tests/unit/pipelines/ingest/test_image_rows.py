"""Tables that hold the images themselves."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.errors import InputError
from pipelines.shards.shards import open_shards
from pipelines.verify.verify import verify
from tests.support import pictures
from tests.support.image_tables import PICTURES, labels_of, parquet_of, samples_of, take, write_pictures


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_pictures(tmp_path / "t")


NUMBERED = [f"data/train-{row}" for row in ("00000-of-00002/000000", "00000-of-00002/000001", "00001-of-00002/000000")]
CLASSES = {"names": ["zebra", "ant"], "_type": "ClassLabel"}


def rows_of(numbers: list[int], path: str | None = None) -> list[dict[str, Any]]:
    return [{"bytes": PICTURES[n], "path": path and path.format(n)} for n in numbers]


@pytest.mark.parametrize(
    ("path", "keys"),
    [
        (None, NUMBERED),
        ("image.png", NUMBERED),
        ("/home/me/{}.jpg", NUMBERED),
        ("img_{}.jpg", ["img_0", "img_1", "img_2"]),
    ],
)
def test_a_folder_of_image_tables(tmp_path: Path, path: str | None, keys: list[str]) -> None:
    hub = {"image": {"_type": "Image"}, "label": CLASSES}
    parquet_of(
        tmp_path / "hub", {"image": rows_of([0, 1], path), "label": [1, 0]}, hub, "data/train-00000-of-00002.parquet"
    )
    parquet_of(tmp_path / "hub", {"image": rows_of([2], path), "label": [1]}, hub, "data/train-00001-of-00002.parquet")
    (tmp_path / "hub" / "README.md").write_text("# hub")
    result = take(tmp_path / "hub", tmp_path)
    found = samples_of(open_shards(result["uri"]))
    assert result["classes"] == ["ant", "zebra"] and result["found"] == 3
    assert sorted(found) == keys
    assert [found[key][:2] for key in keys] == [
        (PICTURES[0], ["ant"]), (PICTURES[1], ["zebra"]), (PICTURES[2], ["ant"]),
    ]  # fmt: skip
    assert verify(result["uri"]).status == "done"
    assert take(tmp_path / "hub", tmp_path)["status"] == "unchanged"


@pytest.mark.parametrize("under", ["", "data/"])
@pytest.mark.parametrize("path", ["im/{}.jpg", None])
def test_a_hub_folder_is_split_by_the_names_of_its_files(tmp_path: Path, under: str, path: str | None) -> None:
    files = {"train-00000-of-00002": [0, 1], "train-00001-of-00002-0a1b2c": [2], "test-00000-of-00001": [3]}
    files["validation-00000-of-00001"] = [4, 5]
    for name, numbers in files.items():
        columns = {"image": rows_of(numbers, path), "label": [number % 2 for number in numbers]}
        parquet_of(tmp_path / "hub", columns, name=f"{under}{name}.parquet")
    result = take(tmp_path / "hub", tmp_path, split="folder")
    sizes = {name: part["samples"] for name, part in result["splits"].items()}
    assert sizes == {"test": 1, "train": 3, "validation": 2} and result["notes"] == []
    (data, _, _) = next(iter(samples_of(open_shards(str(tmp_path / "out" / "test"))).values()))
    assert data == PICTURES[3]

    whole = take(tmp_path / "hub", tmp_path, "whole")
    assert whole["samples"] == 6 and len(whole["notes"]) == 1
    assert "test, train, validation" in whole["notes"][0] and "--split folder" in whole["notes"][0]


def test_tables_that_are_not_called_as_a_split_go_by_the_folders_of_their_images(tmp_path: Path) -> None:
    parquet_of(tmp_path / "hub", {"image": rows_of([0], "train/{}.jpg"), "label": [0]}, name="one.parquet")
    parquet_of(tmp_path / "hub", {"image": rows_of([1], "test/{}.jpg"), "label": [0]}, name="two.parquet")
    assert set(take(tmp_path / "hub", tmp_path, split="folder")["splits"]) == {"train", "test"}
    parquet_of(tmp_path / "hub", {"image": rows_of([2], "{}.jpg"), "label": [0]}, name="three.parquet")
    with pytest.raises(InputError, match=r"2\.jpg lies in no folder"):
        take(tmp_path / "hub", tmp_path, "other", split="folder")


def test_the_columns_of_an_image_table(tmp_path: Path) -> None:
    hub = {"img": {"_type": "Image"}, "fine_label": CLASSES, "tags": {"feature": CLASSES, "_type": "Sequence"}}
    columns = {"img": rows_of([0, 1]), "fine_label": [1, -1], "tags": [[0, 1], []], "caption": ["x", None]}
    table = parquet_of(tmp_path, columns, hub)
    found = samples_of(open_shards(take(table, tmp_path)["uri"]))
    assert found["t/000000"] == (PICTURES[0], ["ant"], {"labels": [0], "caption": "x"})
    assert found["t/000001"][1] == []
    tagged = take(table, tmp_path, "tags", label_columns=["tags"])
    assert labels_of(tagged) == {"t/000000": ["zebra", "ant"], "t/000001": []}


def test_an_image_table_without_labels_is_unlabelled(tmp_path: Path) -> None:
    columns = {"image": rows_of([0, 1]), "mask": rows_of([2, 3]), "caption": ["x", "y"]}
    result = take(parquet_of(tmp_path, columns), tmp_path)
    assert (result["samples"], result["classes"]) == (2, [])
    assert any("unlabelled" in note for note in result["notes"])
    assert samples_of(open_shards(result["uri"]))["t/000000"][0] == PICTURES[0]
    masks = take(str(tmp_path / "t.parquet"), tmp_path, "masks", path_column="mask", label_columns=[])
    assert samples_of(open_shards(masks["uri"]))["t/000000"][0] == PICTURES[2]


def test_rows_without_bytes_name_a_file_or_are_skipped(folder: Path, tmp_path: Path) -> None:
    images = [{"bytes": PICTURES[0], "path": None}, {"bytes": None, "path": "im/1.jpg"}, {"bytes": None, "path": None},
              {"bytes": None, "path": "/etc/hostname.jpg"}, None]  # fmt: skip
    result = take(
        parquet_of(folder, {"image": images, "label": ["a", "b", "c", "d", "e"]}), tmp_path, allow_degraded=True
    )
    found = samples_of(open_shards(result["uri"]))
    assert {key: sample[:2] for key, sample in found.items()} == {
        "t/000000": (PICTURES[0], ["a"]), "im/1": (PICTURES[1], ["b"]),
    }  # fmt: skip
    assert [skip["reason"] for skip in result["skipped_files"]] == ["missing", "unsafe_name", "missing"]


def test_plain_bytes_are_images_where_the_column_is_named(tmp_path: Path) -> None:
    png = pictures.png(pictures.picture(0, 1))
    table = parquet_of(tmp_path, {"jpg": [PICTURES[0], png], "label": ["a", "b"]})
    shards = open_shards(take(table, tmp_path, path_column="jpg")["uri"])
    assert samples_of(shards)["t/000001"][:2] == (png, ["b"])
    assert sorted(record.members[0].name for record in shards.shards[0].records()) == ["t/000000.jpg", "t/000001.png"]


@pytest.mark.parametrize(
    ("columns", "hub", "message"),
    [
        (
            {"image": rows_of([0]), "label": [7]},
            {"label": CLASSES},
            "row 1: the label column 'label' is int64: 7 is none",
        ),
        ({"image": [[1.0]], "label": ["a"]}, None, "has no column 'path'; its columns are image, label"),
        ({"path": [1], "label": ["a"]}, None, "the column 'path' is int64, which is neither paths nor images"),
        ({"path": ["a.jpg"], "label": [{"x": 1}]}, None, "labels are texts, whole numbers or lists of them"),
    ],
)
def test_image_tables_that_cannot_be_used(tmp_path: Path, columns: dict[str, Any], hub: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        take(parquet_of(tmp_path, columns, hub), tmp_path)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"info": 1}', '{"info": {"features": {"label": {"names": [1], "_type": "ClassLabel"}}}}']
)
def test_odd_metadata_of_a_schema_is_passed_over(tmp_path: Path, text: str) -> None:
    table = pa.table({"image": rows_of([0]), "label": [1]}).replace_schema_metadata({"huggingface": text})
    pq.write_table(table, tmp_path / "t.parquet")
    assert take(tmp_path / "t.parquet", tmp_path)["classes"] == ["1"]
