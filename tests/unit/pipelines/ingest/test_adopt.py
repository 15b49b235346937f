"""`ingest --adopt`: shards that others wrote become an artifact as they are, or are refused by name."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipelines.artifacts.commit import list_versions
from pipelines.artifacts.manifest import manifest_digest, open_artifact
from pipelines.artifacts.parquet import parquet_bytes, read_parquet, table_of
from pipelines.artifacts.tables import SHARD_INDEX
from pipelines.artifacts.versions import open_current
from pipelines.errors import DamagedArtifact, FingerprintMismatch, InputError
from pipelines.ingest import adopt as adopting
from pipelines.ingest.adopt import Adoption, adopt
from pipelines.shards.index import is_tar, piece_name
from pipelines.shards.shards import open_shards, write_tar
from pipelines.shards.tar import TarLimits, TarReason
from pipelines.storage import Store, canonical_json, sha256_of
from pipelines.verify.gc import gc
from pipelines.verify.verify import verify
from tests.support.foreign import IMAGES, numbered, read_all, skipped, write_foreign

# ---------------------------------------------------------------------------------------------------------- in place


@pytest.mark.parametrize("kind", ["pipe", "folder", "dangling link"])
def test_a_tar_that_is_no_plain_file_is_named(wds: Path, tmp_path: Path, kind: str) -> None:
    path = wds / "train-0002.tar"
    make = {"pipe": os.mkfifo, "folder": Path.mkdir, "dangling link": lambda path: path.symlink_to("nothing")}
    make[kind](path)
    with pytest.raises(InputError, match=r"train-0002\.tar is no plain file"):
        adopt(str(wds), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_tars_are_indexed_where_they_lie(wds: Path) -> None:
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in wds.iterdir()}
    result = adopt(str(wds), str(wds)).as_json()
    assert (result["status"], result["samples"], result["skipped"], result["found"]) == ("done", 12, 0, 12)
    assert result["classes"] == ["0", "1", "2"]
    for name, (data, time) in before.items():
        assert ((wds / name).read_bytes(), (wds / name).stat().st_mtime_ns) == (data, time)
    assert sorted(path.name for path in (wds / "parts").iterdir()) == [
        part.path.removeprefix("parts/") for part in open_artifact(str(wds)).manifest.parts if not is_tar(part)
    ]
    samples = read_all(wds)
    assert [sample.record.key for sample in samples] == [f"{number:05d}" for number in range(12)]
    assert [sample.record.path for sample in samples] == [sample.record.members[0].name for sample in samples]
    assert [sample.image for sample in samples] == IMAGES
    assert [sample.record.labels for sample in samples] == [(number % 3,) for number in range(12)]
    assert [shard.name for shard in open_shards(str(wds)).shards] == ["train-0000.tar", "train-0001.tar"]
    verify(str(wds))


def test_a_copy_elsewhere_holds_the_same_bytes(wds: Path, tmp_path: Path) -> None:
    adopt(str(wds), str(tmp_path / "out"))
    assert not (wds / "manifest.json").exists()
    opened = open_shards(str(tmp_path / "out"))
    for shard in opened.shards:
        assert Path(opened.artifact.uri, shard.part.path).read_bytes() == (wds / shard.name).read_bytes()
    assert [sample.image for sample in read_all(tmp_path / "out")] == IMAGES
    verify(str(tmp_path / "out"))


@pytest.mark.parametrize("name", ["laion+en=1.tar", "train 0 (1).tar", "[x] a,b@2.tar"])
def test_tars_with_names_that_people_give_them(name: str, wds: Path, tmp_path: Path) -> None:
    (wds / "train-0000.tar").rename(wds / name)
    for out in (tmp_path / "copy", wds):
        assert adopt(str(wds), str(out)).samples == 12
        assert name in [shard.name for shard in open_shards(str(out)).shards]
        assert [sample.damage for sample in read_all(out)] == [None] * 12
        verify(str(out))


def test_one_tar_of_a_folder_is_adopted_in_place(wds: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is a tar: give the folder that holds it"):
        adopt(str(wds / "train-0000.tar"), str(wds / "train-0000.tar"))
    assert adopt(str(wds / "train-0000.tar"), str(wds)).samples == 6
    assert [shard.name for shard in open_shards(str(wds)).shards] == ["train-0000.tar"]
    verify(str(wds))


def test_an_adopted_folder_can_be_moved(wds: Path, tmp_path: Path) -> None:
    adopt(str(wds), str(wds))
    shutil.move(wds, tmp_path / "moved")
    assert [sample.damage for sample in read_all(tmp_path / "moved")] == [None] * 12
    verify(str(tmp_path / "moved"))


def test_gc_leaves_the_tars_alone(wds: Path) -> None:
    (wds / "empty.tar").write_bytes(bytes(10240))
    adopt(str(wds), str(wds))
    before = {path.name for path in wds.iterdir()}
    assert gc(str(wds), older_than="0s").deleted == 0
    assert {path.name for path in wds.iterdir()} == before
    verify(str(wds))


def test_the_document_names_every_reason() -> None:
    text = (Path(__file__).parents[4] / "docs" / "adopt.md").read_text()
    assert set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)) == {reason.value for reason in TarReason}


@pytest.mark.parametrize("out", ["wds", "copy"])
def test_a_prefix_that_grows_is_the_next_version(out: str, wds: Path, tmp_path: Path) -> None:
    root = tmp_path / out
    first = adopt(str(wds), str(root)).as_json()
    again = adopt(str(wds), str(root)).as_json()
    assert (again["status"], again["digest"]) == ("unchanged", first["digest"])
    before = {part.path for part in open_artifact(str(root)).manifest.parts if part.path.endswith(".tar")}
    old = read_all(root)
    # Its name comes before the others, it repeats one of their keys, and it has a class that is new.
    write_foreign(wds / "evening.tar", {**numbered(11, 2), "00020.jpg": IMAGES[3], "00020.cls": b"4"})
    second = adopt(str(wds), str(root), allow_degraded=True).as_json()
    assert (second["samples"], second["tars"], second["version"]) == (14, 3, 2)
    assert (second["classes"], skipped(second)) == (["0", "1", "2", "3", "4"], {"evening.tar: 00011": "duplicate_key"})
    assert list_versions(Store(root)) == [1, 2] and open_artifact(str(root)).digest == first["digest"]
    now = {part.path for part in open_current(str(root)).manifest.parts if part.path.endswith(".tar")}
    assert before < now and len(now) == 3
    samples = read_all(root)
    assert [sample.record.key for sample in samples[:2]] == ["00012", "00020"] and samples[2:] == old
    assert [sample.damage for sample in samples] == [None] * 14
    assert verify(str(root)).digest == second["digest"]
    same = adopt(str(wds), str(root), allow_degraded=True).as_json()
    assert (same["digest"], same["version"], list_versions(Store(root))) == (second["digest"], 2, [1, 2])
    write_foreign(wds / "zz.tar", numbered(30, 1))
    assert adopt(str(wds), str(root), allow_degraded=True).version == 3
    assert gc(str(root), older_than="0s").deleted == 0 and verify(str(root)).orphans == []


def test_names_of_classes_that_are_new_come_behind_those_that_were_there(tmp_path: Path) -> None:
    write_foreign(tmp_path / "b.tar", {"b.jpg": IMAGES[0], "b.cls": b"owl", "c.jpg": IMAGES[1], "c.cls": b"yak"})
    adopt(str(tmp_path), str(tmp_path))
    write_foreign(tmp_path / "c.tar", {"d.jpg": IMAGES[2], "d.cls": b"cat", "e.jpg": IMAGES[3], "e.cls": b"7"})
    assert adopt(str(tmp_path), str(tmp_path)).classes == ["owl", "yak", "7", "cat"]
    assert [sample.record.labels for sample in read_all(tmp_path)] == [(0,), (1,), (3,), (2,)]
    with pytest.raises(InputError, match="put new names behind its own"):
        adopt(str(tmp_path), str(tmp_path), Adoption(classes=("cat", "owl", "yak", "7")))


def test_a_prefix_that_was_adopted_with_names_grows_with_the_same_names(wds: Path) -> None:
    named = Adoption(classes=("cat", "dog", "owl"))
    adopt(str(wds), str(wds), named)
    write_foreign(wds / "train-0002.tar", numbered(12, 2))
    with pytest.raises(InputError, match=r"samples of train-0000\.tar would be of other classes .*--classes"):
        adopt(str(wds), str(wds))
    with pytest.raises(FingerprintMismatch):
        adopt(str(wds), str(wds), Adoption(keys_by_tar=True))
    assert adopt(str(wds), str(wds), Adoption(classes=("cat", "dog", "owl", "yak"))).version == 2
    verify(str(wds))


@pytest.mark.parametrize("version", [1, 2])
def test_a_tar_that_changed_or_vanished_is_named(version: int, wds: Path) -> None:
    adopt(str(wds), str(wds))
    if version == 2:
        write_foreign(wds / "train-0002.tar", numbered(12, 2))
        adopt(str(wds), str(wds))
    data = (wds / "train-0001.tar").read_bytes()
    write_foreign(wds / "train-0003.tar", numbered(20, 2))
    write_foreign(wds / "train-0001.tar", numbered(40, 6))
    with pytest.raises(InputError, match=r"train-0001\.tar changed since it was adopted"):
        adopt(str(wds), str(wds))
    (wds / "train-0001.tar").unlink()
    with pytest.raises(InputError, match=r"train-0001\.tar vanished since it was adopted"):
        adopt(str(wds), str(wds))
    (wds / "train-0001.tar").write_bytes(data)
    assert adopt(str(wds), str(wds)).version == version + 1
    verify(str(wds))


@pytest.mark.parametrize("grown", [False, True])
def test_what_is_lost_of_adopted_shards_is_made_again(grown: bool, wds: Path, tmp_path: Path) -> None:
    adopt(str(wds), str(tmp_path / "out"))
    if grown:
        write_foreign(wds / "train-0002.tar", numbered(12, 2))
    result = adopt(str(wds), str(tmp_path / "out")).as_json()
    for part in open_current(str(tmp_path / "out")).manifest.parts:
        if part.path.endswith(".tar") or not grown:
            (tmp_path / "out" / part.path).unlink()
    assert adopt(str(wds), str(tmp_path / "out")).digest == result["digest"]
    verify(str(tmp_path / "out"))


def test_two_adoptions_are_equal_to_the_byte(wds: Path, tmp_path: Path) -> None:
    shutil.copytree(wds, tmp_path / "other")
    assert adopt(str(wds), str(wds)).digest == adopt(str(tmp_path / "other"), str(tmp_path / "other")).digest


def test_shards_that_were_written_here_can_be_adopted_too(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "x.tar", [{"__key__": "a/1", "jpg": IMAGES[0], "json": b'{"labels": [2, 0], "place": "Bonn"}'}]
    )
    adopt(str(tmp_path), str(tmp_path))
    (sample,) = read_all(tmp_path)
    assert sample.record.key == "a/1" and sample.record.labels == (2, 0)
    assert json.loads(sample.metadata or b"")["place"] == "Bonn"


def test_a_tar_that_is_changed_later_is_noticed_sample_by_sample(wds: Path) -> None:
    adopt(str(wds), str(wds))
    data = (wds / "train-0001.tar").read_bytes()
    (wds / "train-0001.tar").write_bytes(data[: len(data) // 2])
    damage = [sample.damage for sample in read_all(wds)]
    assert len(damage) == 12 and damage[:6] == [None] * 6 and damage[-1] is not None
    with pytest.raises(DamagedArtifact, match=r"train-0001\.tar"):
        verify(str(wds))


def test_an_index_that_lists_what_the_tar_does_not_hold_is_noticed(wds: Path) -> None:
    """Every digest fits, but a member is not where the index says."""
    adopt(str(wds), str(wds))
    artifact = open_artifact(str(wds))
    part = artifact.manifest.part(piece_name(0))
    rows = read_parquet(artifact.read(part), "index").to_pylist()
    rows[3]["members"][0]["offset"] += 512
    data = parquet_bytes(table_of(SHARD_INDEX, {name: [row[name] for row in rows] for name in SHARD_INDEX.names}))
    (wds / part.path).write_bytes(data)
    fields = json.loads((wds / "manifest.json").read_bytes())
    for entry in fields["parts"]:
        if entry["path"] == part.path:
            entry.update(bytes=len(data), sha256=sha256_of(data))
    fields["digest"] = manifest_digest(fields)
    (wds / "manifest.json").write_bytes(canonical_json(fields))
    with pytest.raises(DamagedArtifact, match=r"train-0000\.tar does not hold 00003\.jpg"):
        verify(str(wds))


# ---------------------------------------------------------------------------------------------- what cannot be adopted


@pytest.mark.parametrize("name", ["shard.tar.gz", "shard.tgz", "a;b.tar", "ü.tar", "-x.tar"])
def test_tars_that_cannot_be_read_by_place_or_named(name: str, wds: Path) -> None:
    shutil.copy(wds / "train-0000.tar", wds / name)
    with pytest.raises(InputError, match=r"is compressed|cannot name a shard"):
        adopt(str(wds), str(wds))
    assert not (wds / "identity.json").exists()


def test_places_without_anything_to_adopt(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere does not exist: --adopt takes a folder"):
        adopt(str(tmp_path / "nowhere"), str(tmp_path / "out"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"holds no \.tar file"):
        adopt(str(tmp_path / "empty"), str(tmp_path / "out"))
    write_foreign(tmp_path / "in" / "x.tar", {"a.txt": b"x"})
    with pytest.raises(
        InputError, match=r"can be taken \(1 skipped: no_image 1; the first is x\.tar: a: no_image, its members: txt\)"
    ):
        adopt(str(tmp_path / "in"), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_tar_beyond_the_limits_ends_the_run_with_its_name(wds: Path) -> None:
    with pytest.raises(InputError, match=r"train-0000\.tar: the tar has more than 3 entries: move it away"):
        adopt(str(wds), str(wds), Adoption(limits=TarLimits(entries=3)))
    assert not (wds / "identity.json").exists()


def test_a_source_that_changes_while_it_is_copied_ends_the_run(
    wds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = adopting._copied

    def changing(*args: Any) -> Any:
        write_foreign(wds / "train-0001.tar", numbered(50, 6))
        return copied(*args)

    monkeypatch.setattr(adopting, "_copied", changing)
    with pytest.raises(adopting.WorkFailed, match=r"train-0001\.tar changed while it was adopted"):
        adopt(str(wds), str(tmp_path / "out"))
    assert not (tmp_path / "out" / "manifest.json").exists()


# --------------------------------------------------------------------------------------------------- the command line


def hhnet(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "pipelines", *map(str, words)], capture_output=True, text=True)


def test_the_command_line_adopts(wds: Path, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("cat\ndog\nowl\n")
    done = hhnet("ingest", "--adopt", wds, "--out", wds, "--classes", tmp_path / "names.txt", "--json")
    result = json.loads(done.stdout)
    assert (done.returncode, result["verb"], result["status"], result["uri"]) == (0, "ingest", "done", str(wds))
    assert (result["samples"], result["classes"]) == (12, ["cat", "dog", "owl"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--adopt", "--split", "folder"], "leave out --split"),
        (["--classes", "names.txt"], "belong to --adopt"),
        (["--keys-by-tar"], "belong to --adopt"),
        (["--image-member", "jpg"], "belong to --adopt"),
    ],
)
def test_options_that_do_not_go_together(words: list[str], message: str, wds: Path) -> None:
    done = hhnet("ingest", wds, "--out", wds, *words)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
