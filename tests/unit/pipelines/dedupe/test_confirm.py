"""Duplicates are confirmed by pictures: what may go, what stays, and what is said about it."""

import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.artifacts.manifest import open_artifact
from pipelines.config.settings import Config, DedupeSettings, IndexSettings, IngestSettings
from pipelines.dedupe.dedupe import DedupeResult, dedupe
from pipelines.dedupe.tables import Sizes
from pipelines.errors import DamagedArtifact, FingerprintMismatch, InputError
from pipelines.index.build import build_index
from pipelines.index.update import remove_rows
from pipelines.ingest.ingest import ingest
from pipelines.shards.shards import open_shards
from pipelines.verify.verify import verify
from tests.support.codes import Rows, write_codes
from tests.support.inline import InlinePool
from tests.support.models import write_model
from tests.unit.pipelines.dedupe.test_dedupe import rows_of
from tests.unit.pipelines.dedupe.test_looks import saved, scene

FLAT = Config(index=IndexSettings(workers=1))
CONFIG, ALL = Config(), Config(dedupe=DedupeSettings(same_code=True))
FAMILY = {"first.jpg", "same.jpg", "again.jpg", "half.png"}
"""Files of one picture: two have the same bytes, the others were saved again."""


def write_pictures(root: Path) -> Path:
    """A family of duplicates of one picture, and five others of the same class."""
    folder = root / "photos" / "cat"
    folder.mkdir(parents=True)
    one = scene(0)
    (folder / "first.jpg").write_bytes(saved(one, quality=95))
    (folder / "same.jpg").write_bytes(saved(one, quality=95))
    (folder / "again.jpg").write_bytes(saved(one, quality=60))
    (folder / "half.png").write_bytes(saved(one.resize((120, 90)), "PNG"))
    for number in range(1, 6):
        (folder / f"other{number}.jpg").write_bytes(saved(scene(number), quality=90))
    return root / "photos"


def shards_of(photos: Path, out: Path, seed: int = 0) -> str:
    return str(ingest(str(photos), str(out), Config(ingest=IngestSettings(samples_per_shard=4, seed=seed))).uri)


def equal_codes(out: Path, shards: str, **options: Any) -> str:
    """Codes that are equal within a class, as a network gives that has learnt the class and nothing else."""
    opened = open_shards(shards)
    contents = {}
    for shard in opened.shards:
        records = shard.records()
        codes = np.repeat(np.array([record.labels for record in records], np.uint8), 8, axis=1)
        keys = [record.key for record in records]
        contents[shard.name] = Rows(keys, codes, [record.labels for record in records], shard.part.sha256)
    origin = {"shards": shards, **options.pop("origin", {})}
    return write_codes(
        out, contents, 64, opened.classes, shards_digest=opened.artifact.digest, origin=origin, **options
    ).uri


def file_of(key: str) -> str:
    """The file that `write_pictures` made for a key."""
    names = [*FAMILY, *(f"other{number}.jpg" for number in range(1, 6))]
    return next(name for name in names if key.split("/")[-1] == name.rsplit(".", 1)[0])


def figures(result: DedupeResult) -> tuple[int, int, int, int, int]:
    return result.droppable, result.same_bytes, result.look_alike, result.same_code_only, result.unread


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return write_pictures(tmp_path)


@pytest.fixture
def shards(photos: Path, tmp_path: Path) -> str:
    return shards_of(photos, tmp_path / "shards")


@pytest.fixture
def codes(shards: str, tmp_path: Path) -> str:
    return equal_codes(tmp_path / "codes", shards)


# --------------------------------------------------------------------------------------------------- what may go


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_only_what_the_pictures_confirm_is_droppable(photos: Path, tmp_path: Path, seed: int) -> None:
    """Whichever sample comes first, of the family one stays, and the others go with it as their twin."""
    codes = equal_codes(tmp_path / "codes", shards_of(photos, tmp_path / "shards", seed))
    result = dedupe([codes], str(tmp_path / "out"), CONFIG)
    rows = rows_of(result.uri, "components-")
    family = [row for row in rows if file_of(row["key"]) in FAMILY]
    stays = family[0]
    assert [row["keep"] for row in family] == [True, False, False, False]
    assert {row["twin"] for row in family[1:]} == {stays["id"]}
    pair = {"first.jpg", "same.jpg"}
    for row in family[1:]:
        assert row["match"] == ("bytes" if {file_of(row["key"]), file_of(stays["key"])} == pair else "picture")
    assert all(row["keep"] for row in rows if row not in family)
    equal = file_of(stays["key"]) in pair
    assert figures(result) == (3, int(equal), 3 - equal, 5, 0)
    assert Counter(row["match"] for row in rows)["none"] == 1
    assert "the pictures of 3 samples match those of their twins" in verify(result.uri).checks


def test_the_parts_may_end_inside_a_component(codes: str, tmp_path: Path) -> None:
    whole = dedupe([codes], str(tmp_path / "whole"), CONFIG)
    cut = dedupe([codes], str(tmp_path / "cut"), CONFIG, sizes=Sizes(unit=2, part_rows=2))
    assert figures(cut) == figures(whole)
    assert rows_of(cut.uri, "components-") == rows_of(whole.uri, "components-")


def test_each_component_keeps_its_own(photos: Path, tmp_path: Path) -> None:
    """A picture that is also in a component of another code is no twin there."""
    shutil.copytree(photos / "cat", photos / "dog")
    codes = equal_codes(tmp_path / "codes", shards_of(photos, tmp_path / "shards"))
    result = dedupe([codes], str(tmp_path / "out"), CONFIG)
    assert (result.components, result.droppable, result.same_code_only) == (2, 6, 10)
    component = {row["id"]: row["component"] for row in rows_of(result.uri, "components-")}
    assert all(component[row["twin"]] == row["component"] for row in rows_of(result.uri, "components-"))
    assert verify(result.uri).status == "done"


def test_different_pictures_of_one_code_all_stay(tmp_path: Path) -> None:
    folder = tmp_path / "photos" / "cat"
    folder.mkdir(parents=True)
    for number in range(20):
        (folder / f"{number}.jpg").write_bytes(saved(scene(number), quality=80))
    codes = equal_codes(tmp_path / "codes", shards_of(tmp_path / "photos", tmp_path / "shards"))
    result = dedupe([codes], str(tmp_path / "out"), CONFIG)
    assert figures(result) == (0, 0, 0, 19, 0)
    assert all(row["keep"] for row in rows_of(result.uri, "components-"))


def test_same_code_drops_all_but_the_first(codes: str, tmp_path: Path) -> None:
    result = dedupe([codes], str(tmp_path / "out"), ALL)
    assert (result.droppable, result.same_code_only) == (8, 5)
    rows = rows_of(result.uri, "components-")
    assert [row["keep"] for row in rows] == [True] + [False] * 8
    assert verify(result.uri).status == "done"


def test_what_is_dropped_leaves_one_of_each_picture(codes: str, tmp_path: Path) -> None:
    result = dedupe([codes], str(tmp_path / "out"), CONFIG)
    index = str(build_index([codes], str(tmp_path / "index"), FLAT, pool=InlinePool()).uri)
    keys = [row["key"] for row in rows_of(result.uri, "components-") if not row["keep"]]
    assert remove_rows(index, FLAT, [*keys, "cat/of-another-index"], ignore_missing=True).removed == 3


def test_new_samples_have_old_ones_as_twins_and_those_stay(photos: Path, codes: str, tmp_path: Path) -> None:
    index = str(build_index([codes], str(tmp_path / "index"), FLAT, pool=InlinePool()).uri)
    new = tmp_path / "new" / "cat"
    new.mkdir(parents=True)
    shutil.copy(photos / "cat" / "other1.jpg", new / "copy.jpg")
    (new / "unseen.jpg").write_bytes(saved(scene(77), quality=90))
    tonight = equal_codes(tmp_path / "tonight", shards_of(tmp_path / "new", tmp_path / "new-shards"))
    # Of old samples with equal codes only the first takes part: let it be the one that was copied.
    old = [row["key"] for row in rows_of(dedupe([codes], str(tmp_path / "old"), CONFIG).uri, "components-")]
    remove_rows(index, FLAT, [key for key in old if file_of(key) != "other1.jpg"])
    result = dedupe([tonight], str(tmp_path / "out"), CONFIG, against=index)
    by_name = {row["key"].split("/")[-1]: row for row in rows_of(result.uri, "components-")}
    assert by_name["copy"] | {"match": "bytes", "keep": False, "twin": by_name["other1"]["id"]} == by_name["copy"]
    assert (by_name["unseen"]["match"], by_name["unseen"]["keep"]) == ("code", True)
    assert (by_name["other1"]["match"], by_name["other1"]["keep"]) == ("none", True)
    assert verify(result.uri).status == "done"


# ------------------------------------------------------------------------------------------ pictures out of reach


def test_without_the_shards_nothing_is_confirmed(
    codes: str, shards: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    moved = str(tmp_path / "moved")
    shutil.move(shards, moved)
    blind = dedupe([codes], str(tmp_path / "blind"), CONFIG)
    assert figures(blind) == (0, 0, 0, 8, 8)
    assert all(row["keep"] for row in rows_of(blind.uri, "components-"))
    assert f"8 pictures cannot be read, so they confirm no duplicate: {shards} holds no committed shards" in caplog.text
    assert verify(blind.uri).status == "done"
    seen = dedupe([codes], str(tmp_path / "seen"), CONFIG, shards=[moved])
    assert (seen.droppable, seen.unread) == (3, 0)
    assert dedupe([codes], str(tmp_path / "seen"), CONFIG, shards=[moved]).status == "unchanged"
    with pytest.raises(FingerprintMismatch, match="choose another --out"):
        dedupe([codes], str(tmp_path / "blind"), CONFIG, shards=[moved])


def test_other_shards_are_refused(codes: str, tmp_path: Path) -> None:
    other = tmp_path / "other" / "cat"
    other.mkdir(parents=True)
    (other / "x.jpg").write_bytes(saved(scene(9)))
    wrong = shards_of(tmp_path / "other", tmp_path / "other-shards")
    with pytest.raises(FingerprintMismatch, match="none of the codes came from these shards: name theirs"):
        dedupe([codes], str(tmp_path / "out"), CONFIG, shards=[wrong])
    with pytest.raises(InputError, match="holds no committed shards"):
        dedupe([codes], str(tmp_path / "out"), CONFIG, shards=[str(tmp_path / "nowhere")])


def test_a_damaged_picture_confirms_nothing(codes: str, shards: str, tmp_path: Path) -> None:
    """The other of two equal files must not go because of a twin that is damaged."""
    opened = open_shards(shards)
    for shard in opened.shards:
        path = Path(shards, shard.part.path)
        data = bytearray(path.read_bytes())
        for record in shard.records():
            if file_of(record.key) != "same.jpg":
                data[record.members[0].offset + 200] ^= 1
        path.write_bytes(data)
    result = dedupe([codes], str(tmp_path / "out"), CONFIG)
    assert (result.droppable, result.same_code_only) == (0, 8)
    assert result.unread >= 7


def test_verify_finds_pictures_that_are_no_twins(codes: str, shards: str, tmp_path: Path) -> None:
    result = dedupe([codes], str(tmp_path / "out"), CONFIG)
    for shard in open_shards(shards).shards:
        path = Path(shards, shard.part.path)
        data = bytearray(path.read_bytes())
        for record in shard.records():
            data[record.members[0].offset + 200] ^= 1
        path.write_bytes(data)
    with pytest.raises(DamagedArtifact, match=r"do not have the same (bytes|picture), as the components say"):
        verify(result.uri)


# -------------------------------------------------------------------------------------------------------- warnings


def test_codes_learned_from_classes_and_many_droppable_samples_are_warned_of(shards: str, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", shards)
    codes = equal_codes(tmp_path / "codes", shards, model=model.digest, origin={"model": model.uri})
    many, learned = dedupe([codes], str(tmp_path / "out"), CONFIG).warnings or []
    assert many == "3 of 9 samples are droppable (33%): look at some of them before you remove any"
    assert learned == (
        "the model learned 1 class with the loss csq, so different pictures of a class may have the same code: "
        "the 5 are kept; look at the column match before you remove any"
    )
    _, asked = dedupe([codes], str(tmp_path / "all"), ALL).warnings or []
    assert "these 5 are droppable because of dedupe.same_code" in asked


def test_few_droppable_samples_are_not_warned_of(tmp_path: Path) -> None:
    folder = tmp_path / "photos" / "cat"
    folder.mkdir(parents=True)
    for number in range(39):
        (folder / f"{number}.jpg").write_bytes(saved(scene(number, 40, 30), quality=90))
    shutil.copy(folder / "0.jpg", folder / "copy.jpg")
    codes = equal_codes(tmp_path / "codes", shards_of(tmp_path / "photos", tmp_path / "shards"))
    result = dedupe([codes], str(tmp_path / "out"), CONFIG)
    assert (result.droppable, result.samples, result.warnings) == (1, 40, None)


def test_the_command_says_what_it_found_and_warns(codes: str, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "pipelines", "dedupe", "--codes", codes, "--out", str(tmp_path / "out")]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    facts = [line.split() for line in done.stdout.splitlines()]
    assert ["droppable", "3"] in facts
    head = next(
        number for number, line in enumerate(done.stdout.splitlines()) if line.split() == ["drop", "like", "match"]
    )
    listed = [line.split() for line in done.stdout.splitlines()[head + 1 : head + 4]]
    assert {match for _, _, match in listed} <= {"bytes", "picture"} and all(drop != like for drop, like, _ in listed)
    assert ["same", "code", "only", "5"] in facts
    assert "hhnet: warning: 3 of 9 samples are droppable (33%)" in done.stderr
    found = json.loads(subprocess.run([*words, "--json"], capture_output=True, text=True).stdout)
    assert {"status": "unchanged", "droppable": 3, "same_code_only": 5, "unread": 0}.items() <= found.items()
    assert found["same_bytes"] + found["look_alike"] == 3
    refused = subprocess.run([*words, "--same-code"], capture_output=True, text=True)
    assert refused.returncode == 2
    assert "holds another run's duplicates" in refused.stderr
    assert open_artifact(str(tmp_path / "out")).digest == found["digest"]
