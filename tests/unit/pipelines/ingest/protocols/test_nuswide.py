"""Protocols of NUS-WIDE that are drawn from its label files: small files in the exact format of the original."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipelines.errors import InputError
from pipelines.ingest import protocols
from pipelines.ingest.protocols.base import REST
from pipelines.ingest.protocols.nuswide import CLASSES, NusWide
from pipelines.verify.verify import verify
from tests.support.plugins import plugged_in
from tests.support.protocols import hhnet, ingested, keys_of, labels_of, warnings_in, write_pictures

IMAGES, LABELLED = 180, 170
SMALL = NusWide(
    name="small",
    parts={"train": 42, "query": 21, "database": 107},
    database=("train", "database"),
    images=IMAGES,
    labelled=LABELLED,
)
PARTIAL = NusWide(
    name="partial",
    parts={"train": 20, "query": 10, "val": 10, "database": REST},
    database=("database",),
    images=IMAGES,
    labelled=LABELLED,
    by_class=False,
    partial=True,
)
LIST = "ImageList/Imagelist.txt"


def line_of(number: int) -> str:
    """A line of the image list, with the folder of its search word."""
    return f"{('actor', 'adult', 'airplane_flying')[number // 60]}\\{number % 60 + 1:04d}_{2124494179 + number}.jpg"


def labels_of_line(number: int) -> list[str]:
    """None for the last ten; else a concept in turn, with a second one for every third image."""
    if number >= LABELLED:
        return []
    first = CLASSES[number % 21]
    return [first, CLASSES[(number // 3) % 21]] if number % 3 == 0 else [first]


def label_file(folder: Path, concept: str) -> Path:
    return folder / f"Groundtruth/AllLabels/Labels_{concept}.txt"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """180 images, 170 of them with one or two of the 21 concepts, in Flickr/<word>."""
    folder = tmp_path / "nuswide"
    lines = [line_of(number) for number in range(IMAGES)]
    write_pictures(folder, ["Flickr/" + line.replace("\\", "/") for line in lines])
    (folder / "ImageList").mkdir()
    (folder / LIST).write_bytes("".join(f"{line}\r\n" for line in lines).encode())
    (folder / "Groundtruth/AllLabels").mkdir(parents=True)
    for concept in (*CLASSES, "airport", "zebra"):
        flags = [int(concept in labels_of_line(number)) for number in range(IMAGES)]
        label_file(folder, concept).write_text("".join(f"{flag}\n" for flag in flags))
    return folder


def expected_labels() -> dict[str, list[str]]:
    keys = [line_of(number).replace("\\", "/").removesuffix(".jpg") for number in range(LABELLED)]
    return {key: sorted({*labels_of_line(number)}) for number, key in enumerate(keys)}


def in_order(keys: list[str]) -> list[str]:
    return sorted(keys, key=lambda key: hashlib.sha256(f"nuswide draw 1:{key}".encode()).hexdigest())


def filled() -> dict[str, list[str]]:
    """The parts as data/nuswide_21/code.py fills them: per concept first two for training, then one query."""
    left = {part: np.full(21, share) for part, share in (("train", 2), ("query", 1))}
    parts: dict[str, list[str]] = {"train": [], "query": [], "database": []}
    for key in in_order([*expected_labels()]):
        seats = [(part, c) for c, name in enumerate(CLASSES) if name in expected_labels()[key] for part in left]
        part, column = next((seat for seat in seats if left[seat[0]][seat[1]]), ("database", 0))
        if part in left:
            left[part][column] -= 1
        parts[part].append(key)
    return parts


def test_each_concept_has_its_share_of_queries_and_of_training_images(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = ingested(root, tmp_path / "out", SMALL)
    for part, keys in filled().items():
        assert labels_of(tmp_path / "out", part) == {key: expected_labels()[key] for key in keys}
    assert (result["found"], result["samples"], result["skipped"]) == (180, 170, 10)
    detail = "none of the 21 concepts"
    skipped = {"path": "airplane_flying/0051_2124494349.jpg", "reason": "no_label", "detail": detail}
    assert skipped in result["skipped_files"] and result["skipped_reasons"] == {"no_label": 10}
    (warning,) = warnings_in(capsys.readouterr().err)
    assert "the 42 training images are in the database, by design of the protocol" in warning


def test_every_part_is_proven(root: Path, tmp_path: Path) -> None:
    card = ingested(root, tmp_path / "out", SMALL, "ingest.samples_per_shard=9")["protocol"]
    assert len(card["files"]) == 22
    assert card["files"][LIST] == hashlib.sha256((root / LIST).read_bytes()).hexdigest()
    sky = hashlib.sha256(label_file(root, "sky").read_bytes()).hexdigest()
    assert card["files"]["AllLabels/Labels_sky.txt"] == sky
    for part in SMALL.parts:
        checks = verify(str(tmp_path / "out" / part)).checks
        assert f"keys and images are those of {part} in protocol small, split {card['digest'][:12]}" in checks


def test_other_places_of_the_same_files(root: Path, tmp_path: Path) -> None:
    first = ingested(root, tmp_path / "out", SMALL)
    (root / "images").mkdir()
    for path in sorted(root.glob("Flickr/*/*.jpg")):
        path.rename(root / "images" / path.name)
        if not any(path.parent.iterdir()):
            path.parent.rmdir()
    (root / "Flickr").rmdir()
    (root / "Groundtruth/AllLabels").rename(root / "AllLabels")
    (root / "Groundtruth").rmdir()
    assert ingested(root, tmp_path / "out", SMALL) == {**first, "status": "unchanged"}


def test_images_that_cannot_be_had_any_more(root: Path, tmp_path: Path) -> None:
    gone = [line_of(number).replace("\\", "/") for number in (0, 41, 99, 175)]
    for path in gone:
        (root / "Flickr" / path).unlink()
    result = ingested(root, tmp_path / "out", PARTIAL)
    order = in_order([key for key in expected_labels() if f"{key}.jpg" not in gone])
    parts = {"query": order[:10], "train": order[10:30], "val": order[30:40], "database": order[40:]}
    for part, keys in parts.items():
        assert keys_of(tmp_path / "out", part) == sorted(keys)
    assert (result["found"], result["samples"], result["skipped"]) == (180, 167, 13)
    assert [{"path": path, "reason": "missing"} for path in gone[:3]] == [
        file for file in result["skipped_files"] if file["reason"] == "missing"
    ]
    with pytest.raises(InputError, match=r"Imagelist\.txt, line 1: cannot read .*/Flickr/actor/0001_2124494179\.jpg"):
        ingested(root, tmp_path / "other", SMALL)


# ------------------------------------------------------------------------------------------------------- bad files


def lines_of(name: str, change: Callable[[list[str]], object]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        lines = (folder / name).read_text().splitlines()
        change(lines)
        (folder / name).write_text("".join(f"{line}\n" for line in lines))

    return spoil


def put(place: int, line: str) -> Callable[[list[str]], object]:
    return lambda lines: lines.__setitem__(place, line)


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


LAKE = "Groundtruth/AllLabels/Labels_lake.txt"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (remove(LIST), "Imagelist.txt: No such file or directory: --root is the folder that holds ImageList"),
        (remove(LAKE), "Labels_lake.txt: No such file or directory"),
        (lines_of(LIST, list.pop), "Imagelist.txt has 179 lines, 180 expected: one for each image"),
        (lines_of(LIST, put(3, line_of(1))), "Imagelist.txt, line 4: actor/0002_2124494180.jpg is in line 2 too"),
        (lines_of(LIST, put(3, "0004.jpg")), "Imagelist.txt, line 4: '0004.jpg' is not <folder>\\<name>"),
        (lines_of(LIST, put(3, "..\\0004.jpg")), "Imagelist.txt, line 4: '../0004.jpg' is not <folder>\\<name>"),
        (lines_of(LIST, put(3, "")), "Imagelist.txt, line 4: '' is not <folder>\\<name>"),
        (lines_of(LIST, put(3, "a\\" + "x" * 300)), "is not <folder>\\<name>"),
        (lines_of(LIST, put(3, "actor\\9.jpg")), "Imagelist.txt, line 4: cannot read"),
        (lines_of(LAKE, list.pop), "Labels_lake.txt has 179 lines, 180 expected: one for each image"),
        (lines_of(LAKE, lambda lines: lines.append("0")), "Labels_lake.txt has 181 lines, 180 expected"),
        (lines_of(LAKE, lambda lines: lines.extend(["0"] * 300)), "Labels_lake.txt is larger than 720 bytes"),
        (lines_of(LAKE, put(7, "-1")), "Labels_lake.txt, line 8 is not 0 or 1"),
        (lines_of(LAKE, put(175, "1")), "171 images have one of the 21 concepts, 170 expected"),
    ],
)
def test_label_files_that_do_not_fit(root: Path, tmp_path: Path, spoil: Callable[[Path], None], message: str) -> None:
    spoil(root)
    with pytest.raises(InputError) as caught:
        ingested(root, tmp_path / "out", SMALL)
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_other_counts(root: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="107 images for database, small has 106: it is not the data set"):
        ingested(root, tmp_path / "out", replace(SMALL, parts={**SMALL.parts, "database": 106}))


def test_the_command_line(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with plugged_in(
        protocols, tmp_path / "plugins", "partial", f"from {__name__} import PARTIAL\n\nPROTOCOLS = (PARTIAL,)\n"
    ):
        words = ["ingest", "--protocol", "partial", "--root", str(root), "--out", str(tmp_path / "out"), "--json"]
        code, out, _ = hhnet(words, capsys)
        assert (code, json.loads(out)["protocol"]["database"]) == (0, ["database"])
        for part in PARTIAL.parts:
            assert hhnet(["verify", str(tmp_path / "out" / part)], capsys)[0] == 0
        remove(LAKE)(root)
        code, out, errors = hhnet(words, capsys)
        assert (code, out, len(errors.splitlines())) == (2, "", 1)
