"""Protocols of MS COCO that are drawn from its annotations: small files in the exact format of the original."""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipelines.errors import FingerprintMismatch, InputError
from pipelines.ingest import protocols
from pipelines.ingest.protocols import coco
from pipelines.ingest.protocols.coco import CLASSES, Coco
from pipelines.verify.verify import verify
from tests.support.plugins import plugged_in
from tests.support.protocols import hhnet, ingested, keys_of, labels_of, warnings_in, write_pictures

SMALL = Coco(name="small", parts={"train": 3, "query": 2, "database": 3}, database=("train", "database"))
ALL = Coco(name="all", parts={"train": 3, "query": 2, "val": 2, "database": 3}, database=("database",), labelled=False)
LABELS = {
    "train2014": [["person", "dog"], ["zebra"], [], ["traffic light", "person"], ["cat", "cat"], ["person"]],
    "val2014": [["dog"], [], ["wine glass", "dog"], ["tv"]],
}
TRAIN, VAL = "annotations/instances_train2014.json", "annotations/instances_val2014.json"

Document = dict[str, Any]


def category_id(name: str) -> int:
    """Ids of COCO have gaps and are in no order of names."""
    return 1 + (37 * CLASSES.index(name)) % 91


def instances(folder: str, labels: list[list[str]]) -> Document:
    """An annotation file: objects with outlines, the second of them a crowd with a run-length mask."""
    numbers = [9 + 21 * place for place in range(len(labels))]
    objects = [(number, name) for number, own in zip(numbers, labels, strict=True) for name in own]
    crowd = {"segmentation": {"counts": [272, 2, 4], "size": [8, 8]}, "iscrowd": 1}
    plain = {"segmentation": [[0.5, 1.25, 3.0, 1.25, 3.0, 4.75]], "iscrowd": 0}
    return {
        "info": {"description": "COCO 2014 Dataset", "year": 2014, "version": "1.0"},
        "images": [
            {
                "license": 5,
                "file_name": f"COCO_{folder}_{number:012d}.jpg",
                "coco_url": f"http://images.cocodataset.org/{folder}/COCO_{folder}_{number:012d}.jpg",
                "height": 8,
                "width": 8,
                "date_captured": "2013-11-14 16:28:13",
                "id": number,
            }
            for number in numbers
        ],
        "licenses": [{"url": "http://creativecommons.org/licenses/by/2.0/", "id": 5, "name": "Attribution License"}],
        "annotations": [
            {
                **(crowd if place == 1 else plain),
                "area": 12.5,
                "image_id": number,
                "bbox": [0.5, 1.25, 2.5, 3.5],
                "category_id": category_id(name),
                "id": 900_100 + place,
            }
            for place, (number, name) in enumerate(objects)
        ],
        "categories": [{"supercategory": "thing", "id": category_id(name), "name": name} for name in reversed(CLASSES)],
    }


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Six and four images, two of them without an object."""
    folder = tmp_path / "coco"
    (folder / "annotations").mkdir(parents=True)
    for name, labels in LABELS.items():
        document = instances(name, labels)
        write_pictures(folder, [f"{name}/{image['file_name']}" for image in document["images"]])
        (folder / f"annotations/instances_{name}.json").write_text(json.dumps(document))
    # Pictures of the two folders are equal without this.
    for place, path in enumerate(sorted((folder / "val2014").iterdir())):
        path.write_bytes(path.read_bytes() + bytes([place]))
    return folder


def expected_labels() -> dict[str, list[str]]:
    return {
        f"{folder}/COCO_{folder}_{9 + 21 * place:012d}": sorted({*own})
        for folder, labels in LABELS.items()
        for place, own in enumerate(labels)
    }


def in_order(keys: list[str]) -> list[str]:
    return sorted(keys, key=lambda key: hashlib.sha256(f"coco draw 1:{key}".encode()).hexdigest())


def test_annotated_images_are_drawn_with_the_categories_of_their_objects(root: Path, tmp_path: Path) -> None:
    result = ingested(root, tmp_path / "out", SMALL)
    labelled = {key: own for key, own in expected_labels().items() if own}
    order = in_order([*labelled])
    for part, keys in (("query", order[:2]), ("train", order[2:5]), ("database", order[5:])):
        assert labels_of(tmp_path / "out", part) == {key: labelled[key] for key in keys}
    assert (result["found"], result["samples"], result["skipped"]) == (10, 8, 2)
    without = {"path": "train2014/COCO_train2014_000000000051.jpg", "reason": "no_label"}
    without["detail"] = "no object annotated"
    assert without in result["skipped_files"]


def test_images_without_an_object_stay_where_the_protocol_has_them(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = ingested(root, tmp_path / "out", ALL)
    order = in_order([*expected_labels()])
    parts = {"query": order[:2], "train": order[2:5], "val": order[5:7], "database": order[7:]}
    for part, keys in parts.items():
        assert labels_of(tmp_path / "out", part) == {key: expected_labels()[key] for key in keys}
    assert (result["found"], result["skipped"]) == (10, 0)
    assert warnings_in(capsys.readouterr().err) == []


def test_every_part_is_proven(root: Path, tmp_path: Path) -> None:
    card = ingested(root, tmp_path / "out", ALL, "ingest.samples_per_shard=2")["protocol"]
    assert card["files"] == {name: hashlib.sha256((root / name).read_bytes()).hexdigest() for name in (TRAIN, VAL)}
    for part in ALL.parts:
        checks = verify(str(tmp_path / "out" / part)).checks
        assert f"keys and images are those of {part} in protocol all, split {card['digest'][:12]}" in checks


def test_a_rerun_is_unchanged_and_other_labels_are_another_split(root: Path, tmp_path: Path) -> None:
    first = ingested(root, tmp_path / "out", SMALL)
    assert ingested(root, tmp_path / "out", SMALL) == {**first, "status": "unchanged"}
    document = json.loads((root / TRAIN).read_text())
    document["annotations"][0]["category_id"] = category_id("book")
    (root / TRAIN).write_text(json.dumps(document))
    second = ingested(root, tmp_path / "other", SMALL)["protocol"]
    assert second["parts"] == first["protocol"]["parts"]
    assert second["digest"] != first["protocol"]["digest"]
    with pytest.raises(FingerprintMismatch):
        ingested(root, tmp_path / "out", SMALL)


def test_what_the_manifests_say_of_the_files_is_part_of_the_fingerprint(root: Path, tmp_path: Path) -> None:
    ingested(root, tmp_path / "out", SMALL)
    with (root / TRAIN).open("a") as stream:
        stream.write("\n")
    with pytest.raises(FingerprintMismatch):
        ingested(root, tmp_path / "out", SMALL)


def test_images_that_two_parts_have_are_warned_of(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ingested(root, tmp_path / "out", ALL)
    query, train = (keys_of(tmp_path / "out", part)[0] for part in ("query", "train"))
    (root / f"{query}.jpg").write_bytes((root / f"{train}.jpg").read_bytes())
    capsys.readouterr()
    assert ingested(root, tmp_path / "other", ALL)["protocol"]["leaks"] == {"query in train": 1}
    (warning,) = warnings_in(capsys.readouterr().err)
    assert "1 query in train" in warning


# ------------------------------------------------------------------------------------------------------- bad files


def text_of(text: str) -> Callable[[Document], str]:
    return lambda document: text


def changed(change: Callable[[Document], object]) -> Callable[[Document], str]:
    def text(document: Document) -> str:
        change(document)
        return json.dumps(document)

    return text


def put(field: str, place: int, **values: Any) -> Callable[[Document], str]:
    return changed(lambda document: document[field][place].update(values))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (text_of(""), " is not JSON: Expecting value"),
        (text_of("{'images': []}"), " is not JSON: "),
        (text_of("[" * 100_000), " is not JSON: "),
        (text_of('{"images": [], "id": ' + "9" * 5000 + "}"), " is not JSON: "),
        (text_of('{"images": "\udcff"}'), " is not JSON: "),
        (text_of("[]"), " is not an object with images, annotations and categories"),
        (text_of('{"images": []}'), " has no list categories"),
        (changed(lambda d: d.pop("images")), " has no list images"),
        (changed(lambda d: d.update(annotations={})), " has no list annotations"),
        (changed(lambda d: d["annotations"].insert(2, None)), ": annotations[2] is not an object"),
        (put("annotations", 3, image_id="30"), ": annotations[3] has no whole number image_id"),
        (put("annotations", 3, category_id=True), ": annotations[3] has no whole number category_id"),
        (put("annotations", 3, category_id=1.0), ": annotations[3] has no whole number category_id"),
        (put("annotations", 3, image_id=77), ": annotations[3] is of image 77, which images does not have"),
        (put("annotations", 3, category_id=92), ": annotations[3] is of category 92, which categories does not have"),
        (put("images", 1, id=None), ": images[1] has no whole number id"),
        (put("images", 1, id=9), ": images[1] has the id 9 of an image before it"),
        (put("images", 1, file_name=7), ": images[1] has no plain file_name"),
        (put("images", 1, file_name="../x.jpg"), ": images[1] has no plain file_name"),
        (put("images", 1, file_name="\ud800.jpg"), ": images[1] has no plain file_name"),
        (put("images", 1, file_name="a\nb.jpg"), ": images[1] has no plain file_name"),
        (put("images", 1, file_name="COCO.jpg"), ": images[1]: cannot read "),
        (put("categories", 4, name="unicorn"), ": categories[4], 'unicorn', is unknown to COCO or comes twice"),
        (put("categories", 4, name="zebra"), ": categories[4], 'zebra', is unknown to COCO or comes twice"),
        (put("categories", 4, name=["zebra"]), "is unknown to COCO or comes twice"),
        (put("categories", 4, id=category_id("zebra")), "is unknown to COCO or comes twice"),
        (changed(lambda d: d["categories"].pop(0)), " has 79 categories of 80, 'zebra' is missing"),
    ],
)
def test_annotations_that_do_not_fit(root: Path, tmp_path: Path, text: Callable[[Document], str], message: str) -> None:
    document = json.loads((root / TRAIN).read_text())
    (root / TRAIN).write_text(text(document), errors="surrogateescape")
    with pytest.raises(InputError) as caught:
        ingested(root, tmp_path / "out", SMALL)
    assert f"{TRAIN}{message}" in str(caught.value) or (message in str(caught.value) and message[0] != " ")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_an_image_listed_twice_under_two_ids(root: Path, tmp_path: Path) -> None:
    document = json.loads((root / TRAIN).read_text())
    document["images"][1]["file_name"] = document["images"][0]["file_name"]
    (root / TRAIN).write_text(json.dumps(document))
    with pytest.raises(InputError, match=r"lists train2014/COCO_train2014_000000000009\.jpg twice"):
        ingested(root, tmp_path / "out", SMALL)


def test_files_that_are_not_there_or_beyond_all_bounds(root: Path, tmp_path: Path) -> None:
    (root / VAL).rename(root / "elsewhere.json")
    with pytest.raises(InputError, match=r"instances_val2014\.json: No such file or directory: --root is the folder"):
        ingested(root, tmp_path / "out", SMALL)
    os.truncate(root / TRAIN, coco.MAX_JSON_BYTES + 1)
    with pytest.raises(InputError, match=rf"instances_train2014\.json is larger than {coco.MAX_JSON_BYTES} bytes"):
        ingested(root, tmp_path / "out", SMALL)


def test_other_counts(root: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="3 images for database, small has 4: it is not the data set"):
        ingested(root, tmp_path / "out", replace(SMALL, parts={**SMALL.parts, "database": 4}))


def test_the_command_line(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with plugged_in(
        protocols, tmp_path / "plugins", "small", f"from {__name__} import SMALL\n\nPROTOCOLS = (SMALL,)\n"
    ):
        words = ["ingest", "--protocol", "small", "--root", str(root), "--out", str(tmp_path / "out"), "--json"]
        code, out, _ = hhnet(words, capsys)
        assert (code, json.loads(out)["protocol"]["name"]) == (0, "small")
        for part in SMALL.parts:
            assert hhnet(["verify", str(tmp_path / "out" / part)], capsys)[0] == 0
        (root / VAL).write_text("{}")
        code, out, errors = hhnet(words, capsys)
        assert (code, out) == (2, "")
        assert errors == f"hhnet: {root / VAL} has no list categories: take the original annotations of COCO\n"
