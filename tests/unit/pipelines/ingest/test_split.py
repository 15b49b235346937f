"""Splits by shares, by folders and by columns."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pipelines.config.loading import load_config
from pipelines.config.settings import Config
from pipelines.errors import FingerprintMismatch, InputError
from pipelines.ingest.ingest import ingest
from pipelines.shards.shards import open_shards
from pipelines.verify.verify import verify
from tests.support import pictures
from tests.support.folders import PATHS, SMALL, expected_images, images_of, tar_of, tree, write_table


def parts_of(result: dict[str, Any]) -> dict[str, dict[str, tuple[bytes, list[str]]]]:
    return {name: images_of(open_shards(part["uri"])) for name, part in result["splits"].items()}


def test_shares_split_each_class_and_lose_nothing(tmp_path: Path) -> None:
    pictures.write_folder(tmp_path / "images", per_class=20, size=8)
    result = ingest(str(tmp_path / "images"), str(tmp_path / "out"), SMALL, "train=.8,query=.1,database=.1").as_json()
    parts = parts_of(result)
    assert list(parts) == ["train", "query", "database"]
    for name, count in [("train", 16), ("query", 2), ("database", 2)]:
        assert Counter(labels[0] for _, labels in parts[name].values()) == dict.fromkeys(result["classes"], count)
        assert result["splits"][name]["samples"] == 3 * count
        shards = open_shards(result["splits"][name]["uri"])
        assert list(shards.classes) == result["classes"]
        assert all(shard.name.startswith(f"{name}-") for shard in shards.shards)
        assert verify(shards.artifact.uri).status == "done"
    every: dict[str, Any] = {}
    for part in parts.values():
        assert not every.keys() & part.keys()
        every |= part
    assert every == expected_images(tmp_path / "images")
    again = ingest(str(tmp_path / "images"), str(tmp_path / "out"), SMALL, "train=.8,query=.1,database=.1").as_json()
    assert (again["status"], again["digest"]) == ("unchanged", result["digest"])


def test_small_classes_are_rounded_fairly(tmp_path: Path) -> None:
    pictures.write_folder(tmp_path / "images", classes=10, per_class=5, size=8)
    result = ingest(
        str(tmp_path / "images"), str(tmp_path / "out"), Config(), "train=.8,query=.1,database=.1"
    ).as_json()
    parts = parts_of(result)
    assert {name: part["samples"] for name, part in result["splits"].items()} == {
        "train": 40,
        "query": 5,
        "database": 5,
    }
    assert Counter(labels[0] for _, labels in parts["train"].values()) == dict.fromkeys(result["classes"], 4)


def test_the_seed_of_a_split(tmp_path: Path) -> None:
    pictures.write_folder(tmp_path / "images", per_class=20, size=8)
    chosen = []
    for number, seed in enumerate((0, 0, 1)):
        config = load_config(sets=[f"ingest.seed={seed}"])
        result = ingest(str(tmp_path / "images"), str(tmp_path / str(number)), config, "a=.5,b=.5").as_json()
        chosen.append(set(parts_of(result)["a"]))
    assert chosen[0] == chosen[1] != chosen[2]


def test_many_labels_split_by_the_rarest(folder: Path, tmp_path: Path) -> None:
    labels = [[f"c{n % 2}", f"odd{n}"] if n % 3 == 0 else [f"c{n % 2}"] for n in range(9)]
    table = write_table(folder / "t.parquet", {"path": PATHS, "labels": labels})
    result = ingest(str(table), str(tmp_path / "out"), Config(), "a=.5,b=.5").as_json()
    assert sorted(part["samples"] for part in result["splits"].values()) == [4, 5]


def test_the_top_folder_can_name_the_split(tmp_path: Path) -> None:
    pictures.write_folder(tmp_path / "images/train", classes=3)
    pictures.write_folder(tmp_path / "images/test", classes=2, per_class=3, first=100)
    for source, out in ((tmp_path / "images", "a"), (tar_of(tmp_path / "images", tmp_path / "x.tar.gz"), "b")):
        result = ingest(str(source), str(tmp_path / out), SMALL, "folder").as_json()
        parts = parts_of(result)
        assert {name: len(part) for name, part in parts.items()} == {"test": 6, "train": 24}
        assert "train/class_00/0000" in parts["train"]
        assert open_shards(result["splits"]["test"]["uri"]).classes == ("class_00", "class_01", "class_02")
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


@pytest.mark.parametrize("name", ["t.csv", "t.parquet"])
def test_a_column_can_name_the_split(folder: Path, tmp_path: Path, name: str) -> None:
    part = ["train", "train", "query"] * 3
    table = write_table(folder / name, {"path": PATHS, "label": ["a", "b", "c"] * 3, "part": part})
    result = ingest(str(table), str(tmp_path / "out"), Config(), "column:part").as_json()
    assert {name: part["samples"] for name, part in result["splits"].items()} == {"query": 3, "train": 6}
    assert open_shards(result["splits"]["query"]["uri"]).classes == ("a", "b", "c")
    write_table(folder / name, {"path": PATHS, "label": ["a", "b", "c"] * 3, "part": part[::-1]})
    with pytest.raises(FingerprintMismatch):
        ingest(str(table), str(tmp_path / "out"), Config(), "column:part")


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("train=.8,query=.1", "sum to 0.9, not 1"),
        ("train=.8,train=.2", "named twice"),
        ("train=1,query=0", "has no share"),
        ("train=.8,../x=.2", "write train="),
        ("train=.8;query=.2", "write train="),
        ("train=-1,query=2", "write train="),
        ("train", "write train="),
        ("", "write train="),
        ("column:", "write train="),
        ("train=.9999,query=.0001", "query would get none"),
        ("column:part", "is not a CSV or Parquet table"),
        ("folder", "SPLIT/CLASS/FILE"),
    ],
)
def test_splits_that_cannot_be_made(folder: Path, tmp_path: Path, split: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ingest(str(folder), str(tmp_path / "out"), Config(), split)
    assert not (tmp_path / "out").exists()
