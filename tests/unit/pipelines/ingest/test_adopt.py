"""`ingest --adopt`: shards that others wrote become an artifact as they are, and what cannot be taken is named."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from pipelines.artifacts.commit import list_versions
from pipelines.artifacts.manifest import manifest_digest, open_artifact
from pipelines.artifacts.tables import SHARD_INDEX, parquet_bytes, read_parquet, table_of
from pipelines.artifacts.versions import open_current
from pipelines.config.settings import Config, IngestSettings
from pipelines.encode.shard import _metadata_fields, _metadata_text
from pipelines.errors import DamagedArtifact, Degraded, FingerprintMismatch, InputError
from pipelines.ingest import adopt as adopting
from pipelines.ingest.adopt import Adoption, adopt, read_class_names
from pipelines.shards import tar as tars
from pipelines.shards.shards import INDEX_NAME, Sample, open_shards, write_tar
from pipelines.shards.tar import TarLimits, TarReason
from pipelines.storage import Store, canonical_json, sha256_of
from pipelines.verify.gc import gc
from pipelines.verify.verify import verify
from tests.support import pictures
from tests.support.runs import run_record

# Names whose characters are held together by one that has no width.
PERSIAN, SCIENTIST = "\u0645\u06cc\u200c\u062e", "\U0001f469\u200d\U0001f52c"
IMAGES = [pictures.jpeg(pictures.picture(number % 3, number)) for number in range(12)]


def write_foreign(path: Path, members: Mapping[str, bytes], end: bool = True) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        size = archive.offset
    path.write_bytes(sink.getvalue() if end else sink.getvalue()[:size])
    return path


def numbered(first: int, count: int) -> dict[str, bytes]:
    """Samples with an image and a class number."""
    members: dict[str, bytes] = {}
    for number in range(first, first + count):
        members |= {f"{number:05d}.jpg": IMAGES[number % 12], f"{number:05d}.cls": b"%d\n" % (number % 3)}
    return members


@pytest.fixture
def wds(tmp_path: Path) -> Path:
    """Two tars of six samples with class numbers 0 to 2."""
    write_foreign(tmp_path / "wds" / "train-0000.tar", numbered(0, 6))
    write_foreign(tmp_path / "wds" / "train-0001.tar", numbered(6, 6))
    return tmp_path / "wds"


def read_all(uri: str | Path) -> list[Sample]:
    opened = open_shards(str(uri))
    return [sample for shard in opened.shards for sample in opened.read(shard, metadata=True)]


def skipped(result: Mapping[str, Any]) -> dict[str, str]:
    return {entry["path"]: entry["reason"] for entry in result["skipped_files"]}


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
        part.path.removeprefix("parts/") for part in open_artifact(str(wds)).manifest.parts if "index" in part.path
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
    part = artifact.manifest.part(INDEX_NAME)
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


# ---------------------------------------------------------------------------------------------------- what is skipped


def test_what_cannot_be_taken_is_named_with_its_reason_and_counted(tmp_path: Path) -> None:
    good = numbered(0, 2)
    write_foreign(
        tmp_path / "a.tar",
        {
            **good,
            "apart.jpg": IMAGES[0],
            "between.jpg": IMAGES[1],
            "apart.cls": b"0",
            "only.cls": b"1",
            "two.jpg": IMAGES[0],
            "two.png": IMAGES[0],
            "../up.jpg": IMAGES[0],
            "/abs.jpg": IMAGES[0],
            "README": b"x",
            "odd.jpg": IMAGES[0],
            "odd.json": b"[",
            "new\nline.jpg": IMAGES[0],
        },
    )
    with tarfile.open(tmp_path / "a.tar", "a") as archive:
        for name, kind in (
            ("soft.jpg", tarfile.SYMTYPE),
            ("hard.jpg", tarfile.LNKTYPE),
            ("pipe.jpg", tarfile.FIFOTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
    write_foreign(tmp_path / "b.tar", {**numbered(1, 2), "last.jpg": IMAGES[0]}, end=False)
    result = adopt(str(tmp_path), str(tmp_path), allow_degraded=True).as_json()
    assert [sample.record.key for sample in read_all(tmp_path)] == ["00000", "00001", "between", "00002"]
    assert skipped(result) == {
        "a.tar: apart": "interleaved",
        "a.tar: only": "no_image",
        "a.tar: two": "several_images",
        "a.tar: ../up": "unsafe_name",
        "a.tar: /abs": "unsafe_name",
        "a.tar: README": "no_key",
        "a.tar: odd": "bad_metadata",
        "a.tar: new\nline": "bad_name",
        "a.tar: soft": "link",
        "a.tar: hard": "link",
        "a.tar: pipe": "special",
        "b.tar: 00001": "duplicate_key",
        "b.tar: last": "truncated",
        "b.tar": "truncated",
    }
    assert result["found"] == 18 and result["skipped"] == 14
    assert result["skipped_reasons"]["link"] == 2 and sum(result["skipped_reasons"].values()) == 14
    record = run_record(tmp_path)
    assert record["skipped_files"] == result["skipped_files"] and record["skipped_reasons"] == result["skipped_reasons"]
    verify(str(tmp_path))


def test_names_are_cut_to_a_thousand_but_counts_are_not(tmp_path: Path) -> None:
    write_foreign(tmp_path / "a.tar", {**numbered(0, 1), **{f"x{number}.txt": b"" for number in range(1500)}})
    result = adopt(str(tmp_path), str(tmp_path), allow_degraded=True).as_json()
    assert (result["skipped"], len(result["skipped_files"])) == (1500, 1000)
    assert result["skipped_reasons"] == {"no_image": 1500}


def test_keys_that_begin_anew_in_each_tar_can_be_told_apart(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_foreign(tmp_path / "in" / f"{name}.tar", numbered(0, 3))
    with pytest.raises(Degraded, match=r"3 of 6 pictures .*duplicate_key 3; .*--keys-by-tar tells equal keys"):
        adopt(str(tmp_path / "in"), str(tmp_path / "plain"))
    assert not (tmp_path / "plain").exists()
    plain = adopt(str(tmp_path / "in"), str(tmp_path / "plain"), allow_degraded=True).as_json()
    assert (plain["status"], plain["skipped_reasons"]) == ("degraded", {"duplicate_key": 3})
    more = Config(ingest=IngestSettings(skip_budget=0.5))
    assert adopt(str(tmp_path / "in"), str(tmp_path / "plain"), config=more).status == "unchanged"
    result = adopt(str(tmp_path / "in"), str(tmp_path / "out"), Adoption(keys_by_tar=True)).as_json()
    assert result["samples"] == 6
    assert [sample.record.key for sample in read_all(tmp_path / "out")][2:4] == ["a/00002", "b/00000"]


def test_a_tar_without_a_sample_is_named_and_is_no_part(wds: Path) -> None:
    (wds / "empty.tar").write_bytes(bytes(10240))
    (wds / "noise.tar").write_bytes(b"x" * 2000)
    result = adopt(str(wds), str(wds), allow_degraded=True).as_json()
    assert skipped(result) == {"noise.tar": "bad_header"}
    assert result["tars"] == 2 and len(open_shards(str(wds)).shards) == 2


# ------------------------------------------------------------------------------------------------------------ classes


@pytest.mark.parametrize(
    ("members", "classes", "labels"),
    [
        ({"a.cls": b"2", "b.cls": b" 0\n"}, ["0", "1", "2"], [(2,), (0,)]),
        ({"a.cls": b"007", "b.cls": b"7"}, ["007", "7"], [(0,), (1,)]),
        ({"a.json": b'{"label": "owl"}', "b.json": b'{"labels": ["cat", "owl"]}'}, ["cat", "owl"], [(1,), (0, 1)]),
        ({"a.json": b'{"labels": [1, 1, 0]}', "b.json": b"{}"}, ["0", "1"], [(1, 0), ()]),
        ({"a.cls": b"1", "a.json": b'{"label": 0}', "b.cls": b"0"}, ["0", "1"], [(1,), (0,)]),
        ({"a.cls": b"100000", "b.cls": b"5"}, ["100000", "5"], [(0,), (1,)]),
        ({"a.cls": b"3", "b.cls": "\u0663".encode()}, ["3", "\u0663"], [(0,), (1,)]),
        ({}, [], [(), ()]),
        ({"a.json": b'{"label": 3.0}', "b.json": b'{"label": 0.0}'}, ["0", "1", "2", "3"], [(3,), (0,)]),
        ({"a.json": b'{"label": true}', "b.json": b'{"label": false}'}, ["false", "true"], [(1,), (0,)]),
        ({"a.cls": b"", "b.cls": b" \n"}, [], [(), ()]),
        ({"a.json": b'{"label": ""}', "b.json": b'{"labels": ["", null, "owl"]}'}, ["owl"], [(), (0,)]),
        ({"a.cls": PERSIAN.encode(), "b.cls": SCIENTIST.encode()}, [PERSIAN, SCIENTIST], [(0,), (1,)]),
        (
            {"a.cls": "big\u00a0cat".encode(), "b.cls": "\U0001fae8".encode()},
            ["big\xa0cat", "\U0001fae8"],
            [(0,), (1,)],
        ),
        ({"a.cls": b"\xef\xbb\xbf1", "b.cls": b"0"}, ["0", "1"], [(1,), (0,)]),
        # Boxes in a list say nothing of a class, and beside a class they are not even parsed.
        ({"a.cls": b"1", "a.json": b"[[1, 2]]", "b.cls": b"0", "b.json": b"{"}, ["0", "1"], [(1,), (0,)]),
        ({"a.json": b"[[1, 2]]", "b.json": b'{"label": 0}'}, ["0"], [(), (0,)]),
    ],
)
def test_labels_come_from_cls_or_json(
    members: dict[str, bytes], classes: list[str], labels: list[tuple[int, ...]], tmp_path: Path
) -> None:
    both = {"a.jpg": IMAGES[0], "b.jpg": IMAGES[1], **members}
    write_foreign(tmp_path / "x.tar", dict(sorted(both.items())))
    result = adopt(str(tmp_path), str(tmp_path)).as_json()
    assert result["classes"] == classes
    assert [sample.record.labels for sample in read_all(tmp_path)] == labels
    verify(str(tmp_path))


@pytest.mark.parametrize(
    ("member", "content", "detail"),
    [
        ("json", b'{"label": 1.5}', "the label 1.5 is neither a text nor true or false nor a whole number"),
        ("json", b'{"label": {"id": 3}}', 'the label {"id": 3} is neither'),
        ("json", b'{"label": NaN}', "the label NaN is neither"),
        ("json", b"[1", "its json is not JSON"),
        ("json", b"\xff", "its json is not UTF-8"),
        ("json", b'{"label": "a\\tb"}', "the label 'a\\tb' holds the character U+0009"),
        ("cls", "cat\u202egod".encode(), "the label 'cat\\u202egod' holds the character U+202E"),
        ("cls", b"x" * 201, "has more than 200 characters"),
        ("cls", b" " * (1 << 20) + b"1", "its cls has more than 1048576 bytes"),
    ],
)
def test_a_label_that_is_refused_is_named_with_its_value(
    member: str, content: bytes, detail: str, tmp_path: Path
) -> None:
    write_foreign(tmp_path / "x.tar", {"a.jpg": IMAGES[0], f"a.{member}": content, "b.jpg": IMAGES[1]})
    result = adopt(str(tmp_path), str(tmp_path), Adoption(), allow_degraded=True).as_json()
    assert skipped(result) == {"x.tar: a": "bad_metadata"} and detail in result["skipped_files"][0]["detail"]
    assert run_record(tmp_path)["skipped_files"] == result["skipped_files"]


def test_json_of_which_no_label_is_asked_costs_its_metadata_at_most(tmp_path: Path) -> None:
    members = {"a.jpg": IMAGES[0], "a.json": b"[3]", "b.jpg": IMAGES[1], "b.json": b"{" + b" " * (1 << 20)}
    write_foreign(tmp_path / "x.tar", members)
    result = adopt(str(tmp_path), str(tmp_path), Adoption(fields=())).as_json()
    assert (result["samples"], result["skipped"]) == (2, 0)
    assert [sample.metadata for sample in read_all(tmp_path)] == [b"[3]", None]
    verify(str(tmp_path))


def test_a_json_that_is_no_object_carries_nothing_into_the_codes() -> None:
    fields = [_metadata_fields(data) for data in (b'{"age": 3}', b"[3]", b"null", b"{", b"[" * 100_000, b"\xff", None)]
    assert fields == [{"age": 3}, {}, {}, {}, {}, {}, {}]
    assert [_metadata_text(value) for value in ("x", {"b": 1}, "\ud83d", None)] == ["x", '{"b": 1}', "?", None]


def test_the_image_among_several_can_be_named(tmp_path: Path) -> None:
    members = {"a.input.JPG": IMAGES[0], "a.mask.png": IMAGES[1], "a.cls": b"1", "b.jpg": IMAGES[2], "b.png": IMAGES[3]}
    write_foreign(tmp_path / "in" / "x.tar", members)
    with pytest.raises(InputError, match=r"no sample that can be taken .*its members: .*--image-member SUFFIX"):
        adopt(str(tmp_path / "in"), str(tmp_path / "none"))
    for name, key in (("input.jpg", "a"), (".png", "b")):
        out = tmp_path / name
        result = adopt(str(tmp_path / "in"), str(out), Adoption(image_member=name), allow_degraded=True).as_json()
        assert result["samples"] == 1 and result["skipped_reasons"] == {"no_image": 1}
        (sample,) = read_all(out)
        assert sample.record.key == key and sample.image == members[sample.record.members[0].name]
        verify(str(out))
    with pytest.raises(FingerprintMismatch):
        adopt(str(tmp_path / "in"), str(tmp_path / "input.jpg"), Adoption(image_member="png"), allow_degraded=True)


def test_the_label_beside_a_named_image_may_have_a_name_too(tmp_path: Path) -> None:
    members = {
        **{"a.input.jpg": IMAGES[0], "a.output.cls": b"1"},
        **{"b.input.jpg": IMAGES[1], "b.seg.cls": b"5", "b.cls": b"0"},  # the plain one states it
        **{"c.input.jpg": IMAGES[2], "c.seg.cls": b"5", "c.output.cls": b"1"},  # none says which
        **{"d.input.jpg": IMAGES[3], "d.seg.cls": b"x" * (1 << 21)},  # too large for a label
    }
    write_foreign(tmp_path / "in" / "x.tar", members)
    result = adopt(str(tmp_path / "in"), str(tmp_path / "out"), Adoption(image_member="input.jpg")).as_json()
    assert (result["samples"], result["skipped"]) == (4, 0)
    labels = {sample.record.key: sample.record.labels for sample in read_all(tmp_path / "out")}
    assert labels == {"a": (1,), "b": (0,), "c": (), "d": ()}
    verify(str(tmp_path / "out"))


def test_what_is_not_there_is_named(wds: Path, tmp_path: Path) -> None:
    for source, said in (
        (tmp_path / "nowhere", "nowhere does not exist"),
        (wds / "*.tar", r"give the folder for all its tars, or a pattern"),
        (wds / "x.tar.gz", "x.tar.gz is compressed"),
    ):
        with pytest.raises(InputError, match=said):
            adopt(str(source), str(tmp_path / "out"))


def test_a_member_that_nobody_reads_costs_no_sample(tmp_path: Path) -> None:
    write_foreign(tmp_path / "x.tar", {"a.jpg": IMAGES[0], "a.cls": b"0"})
    with tarfile.open(tmp_path / "x.tar", "a") as archive:
        link = tarfile.TarInfo("a.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "b.txt"
        archive.addfile(link)
    result = adopt(str(tmp_path), str(tmp_path)).as_json()
    assert (result["samples"], skipped(result)) == (1, {"x.tar: a.txt": "link"})


def test_a_field_of_the_json_can_be_named_and_labels_can_be_left_out(tmp_path: Path) -> None:
    facts = b'{"species": "lynx", "age": 3, "labels": [9]}'
    write_foreign(tmp_path / "in" / "x.tar", {"a.jpg": IMAGES[0], "a.json": facts, "a.cls": b"5"})
    named = adopt(str(tmp_path / "in"), str(tmp_path / "named"), Adoption(fields=("species", "age"))).as_json()
    assert named["classes"] == ["3", "lynx"]
    left_out = adopt(str(tmp_path / "in"), str(tmp_path / "out"), Adoption(fields=())).as_json()
    assert left_out["classes"] == [] and read_all(tmp_path / "out")[0].record.labels == ()


def test_a_file_names_the_classes_by_number(wds: Path, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("cat\ndog\nowl\nyak\n\n")
    names = read_class_names(tmp_path / "names.txt")
    result = adopt(str(wds), str(tmp_path / "out"), Adoption(classes=names)).as_json()
    assert result["classes"] == ["cat", "dog", "owl", "yak"]
    assert [sample.record.labels for sample in read_all(tmp_path / "out")][:3] == [(0,), (1,), (2,)]
    with pytest.raises(InputError, match="'2' is not among the 2 classes given"):
        adopt(str(wds), str(tmp_path / "short"), Adoption(classes=("cat", "dog")))


@pytest.mark.parametrize("text", ["", "a\n\nb\n", "a\na\n", "\xff"])
def test_class_files_that_cannot_be_used(text: str, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=r"names\.txt"):
        read_class_names(tmp_path / "names.txt")
    with pytest.raises(InputError, match=r"nowhere"):
        read_class_names(tmp_path / "nowhere")


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


def test_a_tar_beyond_the_limits_ends_the_run_with_its_name(wds: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tars, "TarLimits", lambda: TarLimits(entries=3))
    with pytest.raises(InputError, match=r"train-0000\.tar: the tar has more than 3 entries: move it away"):
        adopt(str(wds), str(wds))
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
