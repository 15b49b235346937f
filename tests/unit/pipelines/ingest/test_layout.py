"""Which class a picture of a folder or archive has."""

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from pipelines.config.settings import Config
from pipelines.errors import Degraded, FingerprintMismatch, InputError
from pipelines.ingest.ingest import ingest
from pipelines.shards.shards import open_shards
from tests.support.trees import FORMS, classes_of, made, reasons_of, shot, shots, taken


def metadata_of(uri: str) -> dict[str, Any]:
    shards = open_shards(uri)
    return {
        sample.record.key: json.loads(sample.metadata or b"null")
        for shard in shards.shards
        for sample in shards.read(shard, metadata=True)
    }


# ------------------------------------------------------------------------------------------------- which class it is


DEEP = shots("cat/2020/01/a.jpg", "cat/b.jpg", "dog/images/c.jpg", "cow/images/d.jpg")


@pytest.mark.parametrize("form", FORMS)
def test_the_class_is_the_first_folder_however_deep_the_picture_lies(form: str, tmp_path: Path) -> None:
    source = made(form, DEEP, tmp_path)
    result = taken(source, tmp_path / "out")
    assert classes_of(result["uri"]) == {
        "cat/2020/01/a": "cat",
        "cat/b": "cat",
        "dog/images/c": "dog",
        "cow/images/d": "cow",
    }
    (note,) = result["notes"]
    assert "of 3 pictures" in note and "--class-from parent" in note and "\n" not in note
    result = taken(source, tmp_path / "parent", class_from="parent")
    assert classes_of(result["uri"]) == {
        "cat/2020/01/a": "01",
        "cat/b": "cat",
        "dog/images/c": "images",
        "cow/images/d": "images",
    }
    assert "of 3 pictures" in result["notes"][0]
    assert taken(made(form, shots("a/1.jpg", "b/2.jpg"), tmp_path / "plain"), tmp_path / "o")["notes"] == []


@pytest.mark.parametrize("form", FORMS)
def test_below_the_folder_of_a_split_the_class_is_the_first_one_too(form: str, tmp_path: Path) -> None:
    tree = shots("train/n1/images/a.jpg", "train/n2/images/b.jpg", "test/n1/c.jpg")
    result = taken(made(form, tree, tmp_path), tmp_path / "out", split="folder")
    assert result["classes"] == ["n1", "n2"]
    assert classes_of(result["splits"]["train"]["uri"]) == {"train/n1/images/a": "n1", "train/n2/images/b": "n2"}


@pytest.mark.parametrize("form", FORMS[1:])
@pytest.mark.parametrize("wrapper", ["photos/", "./photos/", "home/me/photos/"])
def test_an_archive_that_wraps_all_in_a_folder_is_read_from_there(form: str, wrapper: str, tmp_path: Path) -> None:
    tree = {**DEEP, "stray.jpg": shot(9), "README.md": b"x"}
    wrapped = {wrapper + name: data for name, data in tree.items()} | {"__MACOSX/photos/._a.jpg": b"x"}
    plain = taken(made("folder", {**tree, "__MACOSX/a.jpg": b"x"}, tmp_path), tmp_path / "plain")
    result = taken(made(form, wrapped, tmp_path), tmp_path / "out")
    assert result["digest"] == plain["digest"]
    assert f"all files lie in {wrapper.removeprefix('./')}," in result["notes"][0]
    assert result["skipped_reasons"] == {"hidden": 1, "stray": 1, "wrong_suffix": 1}


@pytest.mark.parametrize("form", FORMS[1:])
def test_the_only_folder_of_an_archive_is_a_class_unless_it_is_named_as_the_archive(form: str, tmp_path: Path) -> None:
    result = taken(made(form, shots("cat/1.jpg", "cat/2.jpg"), tmp_path), tmp_path / "class")
    assert classes_of(result["uri"]) == {"cat/1": "cat", "cat/2": "cat"}
    result = taken(made(form, shots("x/1.jpg", "x/2.jpg"), tmp_path / "flat"), tmp_path / "out")
    assert classes_of(result["uri"]) == {"1": "", "2": ""}


@pytest.mark.parametrize("form", FORMS)
def test_names_that_look_alike_are_classes_of_their_own(form: str, tmp_path: Path) -> None:
    names = [*(unicodedata.normalize(kind, "caf\u00e9") for kind in ("NFC", "NFD")), "Cat", "cat", "CAT"]
    tree = shots(*(f"{name}/{file}.JPG" for name in names for file in ("x", "X")))
    result = taken(made(form, tree, tmp_path), tmp_path / "out")
    assert result["classes"] == sorted(names)
    assert classes_of(result["uri"]) == {path.removesuffix(".JPG"): path.partition("/")[0] for path in tree}


def test_the_rule_belongs_to_the_fingerprint(tmp_path: Path) -> None:
    source = made("folder", DEEP, tmp_path)
    taken(source, tmp_path / "out")
    assert taken(source, tmp_path / "out")["status"] == "unchanged"
    for options in ({"class_from": "parent"}, {"label_columns": []}):
        with pytest.raises(FingerprintMismatch):
            ingest(str(source), str(tmp_path / "out"), Config(), **options)


def test_a_table_has_no_folders_to_be_classes(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("path,label\na.jpg,x\n")
    with pytest.raises(InputError, match="labels are columns"):
        ingest(str(tmp_path / "t.csv"), str(tmp_path / "out"), Config(), class_from="first")


# ---------------------------------------------------------------------------------------- pictures without a class


@pytest.mark.parametrize("form", FORMS)
def test_pictures_in_no_folder_are_unlabelled_and_that_is_said(form: str, tmp_path: Path) -> None:
    result = taken(made(form, shots("1.jpg", "2.jpg", "3.jpg"), tmp_path), tmp_path / "out")
    assert classes_of(result["uri"]) == {"1": "", "2": "", "3": ""}
    assert result["classes"] == []
    assert result["notes"] == ["there are no class folders: all 3 pictures are taken unlabelled"]


@pytest.mark.parametrize("form", FORMS)
def test_a_few_pictures_beside_class_folders_are_skipped(form: str, tmp_path: Path) -> None:
    tree = shots("preview.jpg", "cat/1.jpg", "cat/2.jpg", "dog/3.jpg")
    result = taken(made(form, tree, tmp_path), tmp_path / "out")
    assert (result["status"], result["samples"], reasons_of(result)) == ("done", 3, {"preview.jpg": "stray"})
    unlabelled = taken(made(form, tree, tmp_path), tmp_path / "unlabelled", label_columns=[])
    assert classes_of(unlabelled["uri"]) == {"preview": "", "cat/1": "", "cat/2": "", "dog/3": ""}


def test_more_stray_pictures_than_others_end_the_run(tmp_path: Path) -> None:
    source = made("folder", shots("1.jpg", "2.jpg", "3.jpg", "cat/4.jpg"), tmp_path)
    with pytest.raises(Degraded, match=r"3 of 4 pictures .* stray 3"):
        ingest(str(source), str(tmp_path / "out"), Config())
    assert taken(source, tmp_path / "out", allow_degraded=True)["status"] == "degraded"


@pytest.mark.parametrize("form", FORMS)
def test_strays_and_parts_without_classes_of_a_split_by_folder(form: str, tmp_path: Path) -> None:
    tree = shots("a.jpg", "train/b.jpg", "train/cat/c.jpg", "train/dog/d.jpg", "test/e.jpg", "test/f.jpg")
    result = taken(made(form, tree, tmp_path), tmp_path / "out", split="folder")
    assert reasons_of(result) == {"a.jpg": "stray", "train/b.jpg": "stray"}
    assert classes_of(result["splits"]["test"]["uri"]) == {"test/e": "", "test/f": ""}
    assert result["notes"] == ["test has no class folders: its 2 pictures are taken unlabelled"]
    flat = made(form, shots("train/1.jpg", "test/2.jpg"), tmp_path / "flat")
    with pytest.raises(InputError, match=r"SPLIT/CLASS/FILE.*--unlabelled"):
        ingest(str(flat), str(tmp_path / "no"), Config(), split="folder")
    result = taken(flat, tmp_path / "yes", split="folder", label_columns=[])
    assert {name: part["samples"] for name, part in result["splits"].items()} == {"test": 1, "train": 1}


# ---------------------------------------------------------------------------------------------- img2dataset's files


def downloads() -> dict[str, bytes]:
    tree = {}
    for shard in range(2):
        for number in range(3):
            stem = f"{shard:05d}/{shard:05d}{number:04d}"
            facts = {"caption": f"caption {number}", "url": f"http://x/{number}", "key": stem, "width": 8}
            tree |= {f"{stem}.jpg": shot(3 * shard + number), f"{stem}.json": json.dumps(facts).encode()}
            tree[f"{stem}.txt"] = f"text {number}".encode()
        tree |= {f"{shard:05d}.parquet": b"PAR1", f"{shard:05d}_stats.json": b"{}"}
    return tree


@pytest.mark.parametrize("form", FORMS)
def test_what_img2dataset_wrote_is_unlabelled_with_its_metadata(form: str, tmp_path: Path) -> None:
    tree = downloads()
    tree["00001/000010000.json"] = b"[1, 2]"
    tree["00001/000010001.json"] = b'{"caption": null, "labels": 3, "size": NaN, "who": "\\ud800"}'
    del tree["00001/000010002.json"], tree["00001/000010002.txt"]
    tree["00001/000010009.txt"] = b"a caption without its picture"
    result = taken(made(form, tree, tmp_path), tmp_path / "out")
    assert (result["samples"], result["classes"]) == (6, [])
    assert result["skipped_reasons"] == {"wrong_suffix": 5}
    assert "img2dataset" in result["notes"][0]
    facts = metadata_of(result["uri"])
    assert facts["00000/000000001"] == {
        **{"caption": "caption 1", "url": "http://x/1", "key": "00000/000000001", "width": 8},
        **{"labels": []},
    }
    assert facts["00001/000010000"] == {"caption": "text 0", "labels": []}
    assert facts["00001/000010001"] == {"caption": "text 1", "labels": []}
    assert facts["00001/000010002"] == {"labels": []}
    result = taken(made(form, tree, tmp_path), tmp_path / "first", class_from="first")
    assert result["classes"] == ["00000", "00001"]


@pytest.mark.parametrize("form", FORMS)
def test_numbers_as_classes_are_classes(form: str, tmp_path: Path) -> None:
    tree = shots("0/0.jpg", "0/1.jpg", "1/10.jpg", "007/8.jpg") | {"0/0.txt": b"x", "007/0071.json": b"{}"}
    result = taken(made(form, tree, tmp_path), tmp_path / "out")
    assert result["classes"] == ["0", "007", "1"]
    assert result["skipped_reasons"] == {"wrong_suffix": 2}
