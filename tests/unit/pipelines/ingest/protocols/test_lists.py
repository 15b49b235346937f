"""Protocols that are lists of the field: small lists in the format and with the oddities of those that are shipped."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from pipelines.artifacts.manifest import open_artifact
from pipelines.errors import FingerprintMismatch, InputError
from pipelines.ingest import protocols
from pipelines.ingest.protocols import coco, imagenet100, lists, nuswide
from pipelines.ingest.protocols.base import REST
from pipelines.ingest.protocols.imagenet100 import Imagenet100
from pipelines.ingest.protocols.lists import Listed
from pipelines.verify.verify import verify
from tests.support.plugins import plugged_in
from tests.support.protocols import hhnet, ingested, keys_of, labels_of, warnings_in, write_pictures

SYNSETS = ("n01514668", "n01537544", "n01560419", "n01629819")
SMALL = Imagenet100(name="small", parts={"train": 8, "query": 6, "database": 12}, classes=SYNSETS)
MULTI = Listed(name="multi", parts={"train": 4, "query": 2, "database": 3}, classes=("sky", "clouds", "person"))

TRAIN = [(f"image/{synset}_{number}.JPEG", klass) for klass, synset in enumerate(SYNSETS) for number in (10, 2)]
OTHERS = [(f"image/{synset}_{number}.JPEG", klass) for klass, synset in enumerate(SYNSETS) for number in (3, 4, 5)]
QUERY = [(f"val_image/ILSVRC2012_val_{number:08d}.JPEG", number % 4) for number in (7, 21, 1, 34, 50000, 2)]


def write_list(path: Path, rows: Sequence[tuple[str, Sequence[int]]], columns: int, prefix: str = "") -> None:
    """A line an image as the field writes it: path, 0 or 1 for each class, and a blank at the end in some lists."""
    flags = [" ".join(str(int(column in labels)) for column in range(columns)) for _, labels in rows]
    path.write_text("".join(f"{prefix}{image} {flag} \n" for (image, _), flag in zip(rows, flags, strict=True)))


def write_imagenet(root: Path, prefix: str) -> None:
    for name, rows in (("train", TRAIN), ("test", QUERY), ("database", [*OTHERS, *TRAIN])):
        write_list(root / f"{name}.txt", [(image, [klass]) for image, klass in rows], 4, prefix)


@pytest.fixture
def imagenet(tmp_path: Path) -> Path:
    """ImageNet of four classes with HashNet's lists: all training images are in the database."""
    root = tmp_path / "imagenet"
    write_pictures(root, [image for image, _ in [*TRAIN, *OTHERS, *QUERY]])
    write_imagenet(root, "/home/somebody/run/dataset/imagenet/")
    return root


MULTI_TRAIN = [(f"images/{number}_{number * 7}_m.jpg", labels) for number, labels in enumerate(([0], [0, 1], [2], []))]
MULTI_QUERY = [("images/8_1.jpg", [0, 1, 2]), ("images/9_1.jpg", [1])]
MULTI_OTHERS = [("images/5_1.jpg", [0, 2]), ("images/6_1.jpg", []), ("images/7_1.jpg", [2])]


@pytest.fixture
def multi(tmp_path: Path) -> Path:
    """Several labels an image, or none, and a database without training images or queries."""
    root = tmp_path / "multi"
    write_pictures(root, [image for image, _ in [*MULTI_TRAIN, *MULTI_QUERY, *MULTI_OTHERS]])
    write_list(root / "train.txt", MULTI_TRAIN, 3)
    write_list(root / "test.txt", MULTI_QUERY, 3)
    write_list(root / "database.txt", MULTI_OTHERS, 3)
    return root


# ---------------------------------------------------------------------------------------------------------- counts


@pytest.mark.parametrize(
    ("name", "parts", "images"),
    [
        ("imagenet100", {"train": 13_000, "query": 5_000, "database": 115_503}, 128_503 + 5_000),
        ("imagenet100-h2q", {"train": 13_000, "query": 2_500, "val": 2_500, "database": 115_503}, 128_503 + 5_000),
        ("nuswide21", {"train": 10_500, "query": 2_100, "database": 183_234}, 195_834),
        ("nuswide21-list", {"train": 10_500, "query": 2_100, "database": 183_234}, 193_734 + 2_100),
        ("nuswide21-m", {"train": 10_500, "query": 2_100, "database": REST}, None),
        ("nuswide21-h2q", {"train": 10_500, "query": 2_100, "val": 2_100, "database": REST}, None),
        ("coco", {"train": 10_000, "query": 5_000, "database": 107_218}, 122_218),
        ("coco-hashnet", {"train": 10_000, "query": 5_000, "database": 107_218}, 112_218 + 10_000),
        ("coco-deephash", {"train": 10_000, "query": 5_000, "database": 107_218}, 122_218),
        ("coco-h2q", {"train": 10_000, "query": 5_000, "val": 5_000, "database": 103_287}, 82_783 + 40_504),
    ],
)
def test_protocols_have_the_counts_of_the_field(name: str, parts: dict[str, int], images: int | None) -> None:
    protocol = protocols.find_protocol(name)
    assert protocol.parts == parts
    assert images is None or sum(parts.values()) == images


def test_the_classes_are_those_of_the_field() -> None:
    assert len(imagenet100.SYNSETS) == 100 == len({*imagenet100.SYNSETS})
    assert len(coco.CLASSES) == 80
    assert coco.CLASSES.index("person") == 49
    assert len({*nuswide.CLASSES}) == 21
    assert [*imagenet100.SYNSETS] == sorted(imagenet100.SYNSETS)
    assert [*coco.CLASSES] == sorted(coco.CLASSES)


# ----------------------------------------------------------------------------------------------------------- lists


def test_each_image_is_in_the_part_and_the_class_that_the_lists_say(
    imagenet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = ingested(imagenet, tmp_path / "out", SMALL)
    for part, rows in (("train", TRAIN), ("query", QUERY), ("database", OTHERS)):
        expected = {image.removesuffix(".JPEG"): [SYNSETS[klass]] for image, klass in rows}
        assert labels_of(tmp_path / "out", part) == expected
    assert (result["found"], result["samples"], result["skipped"]) == (26, 26, 0)
    assert result["protocol"]["database"] == ["train", "database"]
    (warning,) = warnings_in(capsys.readouterr().err)
    assert warning.startswith("small: the 8 training images are in the database, by design of the protocol")


def test_several_labels_or_none(multi: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = ingested(multi, tmp_path / "out", MULTI)
    assert labels_of(tmp_path / "out", "query") == {"images/8_1": ["clouds", "person", "sky"], "images/9_1": ["clouds"]}
    assert labels_of(tmp_path / "out", "train")["images/3_21_m"] == []
    assert result["protocol"]["database"] == ["database"]
    assert warnings_in(capsys.readouterr().err) == []
    for part in MULTI.parts:
        checks = verify(str(tmp_path / "out" / part)).checks
        assert (
            f"keys and images are those of {part} in protocol multi, split {result['protocol']['digest'][:12]}"
            in checks
        )


def test_queries_that_the_list_of_the_database_has_too(
    multi: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_list(multi / "database.txt", [*MULTI_QUERY, *MULTI_OTHERS], 3)
    result = ingested(multi, tmp_path / "out", MULTI)
    assert result["protocol"]["database"] == ["query", "database"]
    assert result["protocol"]["parts"]["database"]["samples"] == 3
    (warning,) = warnings_in(capsys.readouterr().err)
    assert warning == "multi: the 2 queries are in the database, by the list of the protocol: each finds itself first"
    assert verify(str(tmp_path / "out/query")).status == "done"


def test_every_other_line_of_the_test_list_is_for_validation(imagenet: Path, tmp_path: Path) -> None:
    halves = replace(SMALL, parts={"train": 8, "query": 3, "val": 3, "database": 12}, halves=True)
    ingested(imagenet, tmp_path / "out", halves)
    names = [image.removesuffix(".JPEG") for image, _ in QUERY]
    assert keys_of(tmp_path / "out", "query") == sorted(names[0::2])
    assert keys_of(tmp_path / "out", "val") == sorted(names[1::2])


def test_the_folders_before_the_paths_do_not_matter(imagenet: Path, tmp_path: Path) -> None:
    first = ingested(imagenet, tmp_path / "out", SMALL)
    for prefix in ("", "./data/imagenet/", "data/imagenet/"):
        write_imagenet(imagenet, prefix)
        assert ingested(imagenet, tmp_path / "out", SMALL) == {**first, "status": "unchanged"}
    for name in ("train.txt", "test.txt"):
        (imagenet / name).write_bytes((imagenet / name).read_bytes().replace(b" \n", b"\r\n"))
    assert ingested(imagenet, tmp_path / "out", SMALL) == {**first, "status": "unchanged"}


def test_images_in_the_folders_of_ilsvrc_are_the_same(imagenet: Path, tmp_path: Path) -> None:
    first = ingested(imagenet, tmp_path / "out", SMALL)
    for image, klass in [*TRAIN, *OTHERS]:
        (imagenet / "train" / SYNSETS[klass]).mkdir(parents=True, exist_ok=True)
        (imagenet / image).rename(imagenet / "train" / SYNSETS[klass] / Path(image).name)
    (imagenet / "val_image").rename(imagenet / "val")
    (imagenet / "image").rmdir()
    assert ingested(imagenet, tmp_path / "out", SMALL) == {**first, "status": "unchanged"}


# ----------------------------------------------------------------------------------------------------------- proof


def test_the_digest_of_the_split_holds_the_lists_with_their_labels(multi: Path, tmp_path: Path) -> None:
    first = ingested(multi, tmp_path / "out", MULTI)["protocol"]
    for name in ("train.txt", "test.txt", "database.txt"):
        text = (multi / name).read_text().replace(" \n", "\n")
        assert first["files"][name] == hashlib.sha256(text.encode()).hexdigest()
    assert open_artifact(str(tmp_path / "out/query")).manifest.meta["protocol"] == first
    write_list(multi / "test.txt", [MULTI_QUERY[0], ("images/9_1.jpg", [0])], 3)
    second = ingested(multi, tmp_path / "other", MULTI)["protocol"]
    assert first["parts"] == second["parts"]
    assert first["digest"] != second["digest"]
    with pytest.raises(FingerprintMismatch):
        ingested(multi, tmp_path / "out", MULTI)


def test_images_other_than_those_that_the_field_has_published(imagenet: Path, tmp_path: Path) -> None:
    names = sorted(image.removesuffix(".JPEG") for image, _ in TRAIN)
    published = hashlib.sha256("".join(f"{name}\n" for name in names).encode()).hexdigest()
    ingested(imagenet, tmp_path / "out", replace(SMALL, keys={"train": published}))
    with pytest.raises(InputError, match=f"the sha256 of their keys is {published[:12]}, 000000000000 expected"):
        ingested(imagenet, tmp_path / "other", replace(SMALL, keys={"train": "0" * 64}))


def test_leaks_are_counted_by_bytes(multi: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (multi / "images/8_1.jpg").write_bytes((multi / "images/0_0_m.jpg").read_bytes())
    assert ingested(multi, tmp_path / "out", MULTI)["protocol"]["leaks"] == {"query in train": 1}
    (warning,) = warnings_in(capsys.readouterr().err)
    assert warning == "multi: the data set has images twice, and so two parts have them: 1 query in train"


# ------------------------------------------------------------------------------------------------------- bad files


def change(name: str, old: str, new: str) -> Callable[[Path], None]:
    def spoil(root: Path) -> None:
        text = (root / name).read_text()
        assert old in text
        (root / name).write_text(text.replace(old, new, 1))

    return spoil


def append(name: str, text: str) -> Callable[[Path], None]:
    def spoil(root: Path) -> None:
        with (root / name).open("a") as stream:
            stream.write(text)

    return spoil


def remove(name: str) -> Callable[[Path], None]:
    return lambda root: (root / name).unlink()


def empty(root: Path) -> None:
    (root / "test.txt").write_text("")


def folder_for_image(root: Path) -> None:
    (root / "images/9_1.jpg").unlink()
    (root / "images/9_1.jpg").mkdir()


PLAIN = "is not a path <folder>/<name> and 3 times 0 or 1, one for each class"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (remove("train.txt"), "train.txt: No such file or directory: --root is the folder that holds train.txt"),
        (empty, f"test.txt, line 1 {PLAIN}"),
        (append("train.txt", "\n\nimages/10_1.jpg 0 0 0\n"), f"train.txt, line 5 {PLAIN}"),
        (append("train.txt", "images/10_1.jpg 0 0 0 0\n"), f"train.txt, line 5 {PLAIN}"),
        (append("train.txt", "images/10_1.jpg 0 0\n"), f"train.txt, line 5 {PLAIN}"),
        (append("train.txt", "images/10_1.jpg 0 0 2\n"), f"train.txt, line 5 {PLAIN}"),
        (append("train.txt", "10_1.jpg 0 0 0\n"), f"train.txt, line 5 {PLAIN}"),
        (append("train.txt", "../10_1.jpg 0 0 0\n"), f"train.txt, line 5 {PLAIN}"),
        (append("train.txt", "images/.. 0 0 0\n"), f"train.txt, line 5 {PLAIN}"),
        (append("train.txt", "images/a\0b.jpg 0 0 0\n"), f"train.txt, line 5 {PLAIN}"),
        (append("train.txt", "images/0_0_m.jpg 1 0 0\n"), "train.txt, line 5: images/0_0_m.jpg is in line 1 too"),
        (append("train.txt", "x/images/0_0_m.jpg 1 0 0\n"), "train.txt, line 5: images/0_0_m.jpg is in line 1 too"),
        (append("train.txt", "images/10_1.jpg 0 0 0\n"), "train.txt, line 5: cannot read"),
        (append("train.txt", "images/9_1.jpg 0 1 0\n"), "test.txt, line 2 too: what is trained on cannot be a query"),
        (append("database.txt", "images/9_1.jpg 0 1 0\n"), "database.txt has 1 of the 2 images for query: all or none"),
        (append("database.txt", "images/0_0_m.jpg 1 1 0\n"), "images/0_0_m.jpg has other labels than in"),
        (folder_for_image, "images/9_1.jpg is not a plain file"),
        (remove("images/7_1.jpg"), "database.txt, line 3: cannot read"),
    ],
)
def test_lists_that_do_not_fit(multi: Path, tmp_path: Path, spoil: Callable[[Path], None], message: str) -> None:
    spoil(multi)
    with pytest.raises(InputError) as caught:
        ingested(multi, tmp_path / "out", MULTI)
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (change("train.txt", "1 0 0 0", "0 1 0 0"), "image/n01514668_10.JPEG is labelled n01537544: the classes are"),
        (change("test.txt", "0 0 0 1", "0 0 1 1"), "val_image/ILSVRC2012_val_00000007.JPEG with 2 labels, expected"),
        (change("test.txt", "0 0 0 1", "0 0 0 0"), "val_image/ILSVRC2012_val_00000007.JPEG with 0 labels, expected"),
        (change("test.txt", "val_image/", "vals/"), "vals/ILSVRC2012_val_00000007.JPEG with 1 labels, expected"),
    ],
)
def test_lists_of_other_classes(imagenet: Path, tmp_path: Path, spoil: Callable[[Path], None], message: str) -> None:
    spoil(imagenet)
    if "labelled" in message:
        change("database.txt", "image/n01514668_10.JPEG 1 0 0 0", "image/n01514668_10.JPEG 0 1 0 0")(imagenet)
    with pytest.raises(InputError) as caught:
        ingested(imagenet, tmp_path / "out", SMALL)
    assert message in str(caught.value)


def test_what_is_listed_but_is_no_image(multi: Path, tmp_path: Path) -> None:
    (multi / "images/7_1.txt").write_text("no picture")
    change("database.txt", "images/7_1.jpg", "images/7_1.txt")(multi)
    with pytest.raises(InputError, match=r"database\.txt, line 3: images/7_1\.txt cannot be a sample: wrong_suffix"):
        ingested(multi, tmp_path / "out", MULTI)


def test_lists_of_other_counts(multi: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="4 images for train, multi has 5: it is not the data set of this protocol"):
        ingested(multi, tmp_path / "out", replace(MULTI, parts={**MULTI.parts, "train": 5}))
    ingested(multi, tmp_path / "out", replace(MULTI, parts={**MULTI.parts, "database": REST}))
    write_list(multi / "database.txt", MULTI_TRAIN, 3)
    with pytest.raises(InputError, match="0 images for database, multi has some"):
        ingested(multi, tmp_path / "other", replace(MULTI, parts={**MULTI.parts, "database": REST}))


def test_a_list_beyond_all_bounds(multi: Path, tmp_path: Path) -> None:
    os.truncate(multi / "train.txt", lists.MAX_LIST_BYTES + 1)
    with pytest.raises(InputError, match=rf"train\.txt is larger than {lists.MAX_LIST_BYTES} bytes"):
        ingested(multi, tmp_path / "out", MULTI)


def test_a_pipe_in_place_of_a_list_is_not_waited_for(multi: Path, tmp_path: Path) -> None:
    (multi / "test.txt").unlink()
    os.mkfifo(multi / "test.txt")
    with pytest.raises(InputError, match=r"test\.txt is not a plain file"):
        ingested(multi, tmp_path / "out", MULTI)


def test_the_command_line(multi: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with plugged_in(
        protocols, tmp_path / "plugins", "multi", f"from {__name__} import MULTI\n\nPROTOCOLS = (MULTI,)\n"
    ):
        words = ["ingest", "--protocol", "multi", "--root", str(multi), "--out", str(tmp_path / "out"), "--json"]
        code, out, _ = hhnet(words, capsys)
        assert (code, json.loads(out)["status"]) == (0, "done")
        assert hhnet(["verify", str(tmp_path / "out/query")], capsys)[0] == 0
        remove("images/7_1.jpg")(multi)
        code, out, errors = hhnet([*words[:-2], str(tmp_path / "other")], capsys)
        assert (code, out, len(errors.splitlines())) == (2, "", 1)
        assert "database.txt, line 3: cannot read" in errors
