"""Folders and archives as people have them: what is skipped, and that nothing is lost."""

import gzip
import io
import os
import random
import stat
import struct
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipelines.config.loading import load_config
from pipelines.config.settings import Config
from pipelines.errors import Degraded, InputError
from pipelines.ingest.bounds import SourceLimits
from pipelines.ingest.ingest import ingest
from pipelines.shards.shards import open_shards
from pipelines.shards.tar import MAX_NAME_BYTES
from tests.support.trees import FORMS, classes_of, made, reasons_of, shot, shots, taken

# ------------------------------------------------------------------------------------------------- what is skipped


@pytest.mark.parametrize("seed", range(30))
def test_any_tree_gives_one_artifact_as_folder_zip_and_tar(seed: int, tmp_path: Path) -> None:
    draw = random.Random(seed)
    folders = ["cat", "Cat", "d\u0301g", "v1.0", ".git", "@eaDir", "sp ace", "00001", "x.jpg", "a\\b/c"]
    names = ["1.jpg", "2.JPEG", "3.txt", ".4.jpg", "5", "000010007.jpg", "000010007.json", "6.png", "Thumbs.db"]
    tree = {}
    for number in range(draw.randrange(1, 40)):
        path = "/".join([*draw.choices(folders, k=draw.choice([0, 1, 1, 1, 2, 3])), draw.choice(names)])
        tree[path] = b"" if draw.random() < 0.1 else shot(number)
    tree = {path: data for path, data in tree.items() if not any(other.startswith(f"{path}/") for other in tree)}
    tree |= shots("one/01.jpg", "two/02.jpg")
    results = [taken(made(form, tree, tmp_path), tmp_path / f"out-{form}", allow_degraded=True) for form in FORMS]
    assert {result["found"] for result in results} == {len(tree)}
    assert len({result["digest"] for result in results}) == 1
    assert [reasons_of(result) for result in results] == [reasons_of(results[0])] * len(FORMS)


HIDDEN = (
    *("cat/.hidden.jpg", ".Trashes/501/old.jpg", "dog/@eaDir/000.jpg/THUMB.jpg", "cat/.ipynb_checkpoints/1.jpg"),
    *("__MACOSX/cat/x.jpg", "lost+found/1.jpg", "cat/Thumbs.db", ".DS_Store", "cat/._1.jpg", "$RECYCLE.BIN/2.png"),
)


def with_faults(form: str, source: Path) -> dict[str, str]:
    """Put a link to nothing and, in all but a tar, a picture that cannot be read into a source: name -> reason."""
    gone, locked = "cat/gone.jpg", "cat/locked.jpg"
    if form == "folder":
        (source / gone).symlink_to("nowhere.jpg")
        (source / locked).write_bytes(shot(9))
        (source / locked).chmod(0)
    elif form.endswith(".zip"):
        with zipfile.ZipFile(source, "a") as archive:
            link = zipfile.ZipInfo(gone)
            link.create_system, link.external_attr = 3, 0o120777 << 16
            archive.writestr(link, "nowhere.jpg")
            archive.writestr(locked, b"as it was written")
        source.write_bytes(source.read_bytes().replace(b"as it was written", b"as it is now read"))
    else:
        sink = io.BytesIO(gzip.decompress(source.read_bytes()) if form.endswith(".gz") else source.read_bytes())
        with tarfile.open(fileobj=sink, mode="a") as tar:
            info = tarfile.TarInfo(gone)
            info.type, info.linkname = tarfile.SYMTYPE, "nowhere.jpg"
            tar.addfile(info)
        source.write_bytes(gzip.compress(sink.getvalue()) if form.endswith(".gz") else sink.getvalue())
        return {gone: "link"}
    return {gone: "link", locked: "unreadable"}


@pytest.mark.parametrize("form", FORMS)
def test_found_is_samples_and_skipped_and_each_skip_is_named(form: str, tmp_path: Path) -> None:
    good = shots("cat/1.jpg", "cat/2.JPEG", "dog/3.jpg")
    bad = {
        "cat/big.jpg": (bytes(5001), "too_large"),
        "cat/none.png": (b"", "empty"),
        "cat/notes.txt": (b"x", "wrong_suffix"),
        "dog/noext": (b"x", "wrong_suffix"),
        f"cat/{'n' * 200}/{'m' * 200}/{'o' * 200}/{'p' * 200}/{'q' * 250}.jpg": (b"x", "unsafe_name"),
        "top.jpg": (b"x", "stray"),
        **dict.fromkeys(HIDDEN, (b"x", "hidden")),
    }
    source = made(form, {**good, **{name: data for name, (data, _) in bad.items()}}, tmp_path)
    reasons = {name[:MAX_NAME_BYTES]: reason for name, (_, reason) in bad.items()} | with_faults(form, source)
    taken(made("folder", good, tmp_path / "root"), tmp_path / "root/out")  # what Python loads late nobody may not find
    for folder in tmp_path.parents[:-2]:
        folder.chmod(folder.stat().st_mode | 0o055)
    tmp_path.chmod(0o777)
    with as_nobody():
        result = taken(source, tmp_path / "out", allow_degraded=True, limits=SourceLimits(file_bytes=5000))
        with pytest.raises(Degraded, match=r"[45] of [78] pictures .*ingest\.skip_budget = 0\.01.*--allow-degraded"):
            ingest(str(source), str(tmp_path / "no"), Config(), limits=SourceLimits(file_bytes=5000))
    assert sorted(classes_of(result["uri"])) == ["cat/1", "cat/2", "dog/3"]
    assert reasons_of(result) == reasons
    assert result["skipped_reasons"] == Counter(reasons.values())
    assert result["found"] == result["samples"] + sum(result["skipped_reasons"].values()) == len(good) + len(reasons)
    assert result["status"] == "degraded"
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("form", FORMS)
def test_ten_thousand_skips_are_counted_truly(form: str, tmp_path: Path) -> None:
    tree = shots("cat/1.jpg", "dog/2.jpg")
    tree |= {f"cat/{number:05d}.txt": b"a caption" for number in range(7000)}
    tree |= {f"cat/.{number:05d}.jpg": b"x" for number in range(3000)}
    result = taken(made(form, tree, tmp_path), tmp_path / "out")
    assert (result["status"], result["found"], result["skipped"]) == ("done", 10_002, 10_000)
    assert result["skipped_reasons"] == {"hidden": 3000, "wrong_suffix": 7000}
    assert len(result["skipped_files"]) == 1000


def test_the_budget_is_a_share_of_the_pictures_that_a_setting_names(tmp_path: Path) -> None:
    tree = shots(*(f"cat/{number}.jpg" for number in range(99))) | {"cat/empty.jpg": b""}
    source = made("folder", tree, tmp_path)
    assert taken(source, tmp_path / "one")["status"] == "done"
    with pytest.raises(Degraded):
        ingest(str(source), str(tmp_path / "none"), load_config(sets=["ingest.skip_budget=0.009"]))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user for a while")
def test_what_may_not_be_read_is_skipped_and_the_rest_taken(tmp_path: Path) -> None:
    source = made("folder", shots("cat/1.jpg", "cat/2.jpg", "dog/3.jpg", "cow/4.jpg", "cow/lost+found/5.jpg"), tmp_path)
    taken(source, tmp_path / "root")  # what Python loads late it may not find as another user
    for folder in tmp_path.parents[:-2]:
        folder.chmod(folder.stat().st_mode | 0o055)
    tmp_path.chmod(0o777)
    (source / "cat/1.jpg").chmod(0)
    (source / "cow/lost+found").chmod(0)
    (source / "dog").chmod(0o744)
    (source / "cow").chmod(0o755)
    (source / "shut.d").mkdir(mode=0)
    with as_nobody():
        result = taken(source, tmp_path / "out", allow_degraded=True)
    assert reasons_of(result) == {
        "cat/1.jpg": "unreadable",
        "dog/3.jpg": "unreadable",
        "shut.d": "unreadable",
        "cow/lost+found": "hidden",
    }
    assert {file.get("detail") for file in result["skipped_files"]} == {"Permission denied"}
    assert classes_of(result["uri"]) == {"cat/2": "cat", "cow/4": "cow"}
    source.chmod(0o700)
    for place in (source, source / "cat"):
        with as_nobody(), pytest.raises(InputError, match="Permission denied"):
            ingest(str(place), str(tmp_path / "no"), Config())


@contextmanager
def as_nobody() -> Iterator[None]:
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


# ------------------------------------------------------------------------------------------------------------- links


def test_linked_folders_and_files_are_followed(tmp_path: Path) -> None:
    made("folder", shots("cat/1.jpg", "dog/a/2.jpg", "own/3.jpg"), tmp_path / "real")
    source = made("folder", shots("own/3.jpg"), tmp_path)
    for name in ("cat", "dog"):
        (source / name).symlink_to(tmp_path / "real/folder" / name)
    (source / "again").symlink_to("own")
    (source / "own/4.jpg").symlink_to(tmp_path / "real/folder/cat/1.jpg")
    (source / ".cache").symlink_to(tmp_path / "real/folder/cat")
    result = taken(source, tmp_path / "out")
    assert classes_of(result["uri"]) == {
        **{"cat/1": "cat", "dog/a/2": "dog", "own/3": "own", "own/4": "own"},
        **{"again/3": "again", "again/4": "again"},
    }
    assert reasons_of(result) == {".cache": "hidden"}


def test_links_that_lead_back_are_noticed_and_cost_nothing(tmp_path: Path) -> None:
    source = made("folder", shots("cat/1.jpg", "dog/2.jpg"), tmp_path)
    (source / "cat/self").symlink_to(".")
    (source / "cat/up.d").symlink_to("../..")
    (source / "dog/root").symlink_to(source)
    (source / "cat/dog").symlink_to("../dog")
    (source / "dog/cat").symlink_to("../cat")
    result = taken(source, tmp_path / "out")
    assert result["status"] == "done"
    assert set(classes_of(result["uri"])) == {"cat/1", "cat/dog/2", "dog/2", "dog/cat/1"}
    assert set(result["skipped_reasons"]) == {"link"}
    assert {file["detail"] for file in result["skipped_files"]} == {"leads back to a folder that holds it"}


def test_links_to_nothing_are_named(tmp_path: Path) -> None:
    source = made("folder", shots("cat/1.jpg"), tmp_path)
    (source / "cat/gone.jpg").symlink_to("nowhere.jpg")
    (source / "cat/ring.jpg").symlink_to("ring.jpg")
    (source / "cat/gone.txt").symlink_to("nowhere.txt")
    result = taken(source, tmp_path / "out", allow_degraded=True)
    assert reasons_of(result) == {"cat/gone.jpg": "link", "cat/ring.jpg": "link", "cat/gone.txt": "wrong_suffix"}


# -------------------------------------------------------------------------------------------------------------- zips


def raw_zip(path: Path, members: list[tuple[bytes, bytes, bytes]], system: int = 3) -> Path:
    """A zip whose names are these bytes without the flag of UTF-8, each with an extra field and its content."""
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        for number, (name, extra, data) in enumerate(members):
            info = zipfile.ZipInfo("QXYZ"[number] * len(name))
            info.extra, info.create_system = extra, system
            archive.writestr(info, data)
    written = sink.getvalue()
    for number, (name, _, _) in enumerate(members):
        placeholder = "QXYZ"[number].encode() * len(name)
        assert written.count(placeholder) == 2
        written = written.replace(placeholder, name)
    path.write_bytes(written)
    return path


def unicode_path(raw: bytes, name: str) -> bytes:
    field = b"\x01" + struct.pack("<I", zlib.crc32(raw)) + name.encode()
    return struct.pack("<HH", 0x7075, len(field)) + field


def test_names_of_zips_are_read_as_they_were_meant(tmp_path: Path) -> None:
    members = [
        ("caf\u00e9/000000001.jpg".encode(), b"", shot(1)),  # macOS: UTF-8 without its flag
        ("caf\u00e9/000000002.jpg".encode("cp437"), b"", shot(2)),  # DOS
        (b"xxxx/000000003.jpg", unicode_path(b"xxxx/000000003.jpg", "\u732b/000000003.jpg"), shot(3)),
        (b"xxxx/000000004.jpg", unicode_path(b"another name", "\u732b/000000004.jpg"), shot(4)),
    ]
    result = taken(raw_zip(tmp_path / "x.zip", members), tmp_path / "out")
    assert classes_of(result["uri"]) == {
        "caf\u00e9/000000001": "caf\u00e9",
        "caf\u00e9/000000002": "caf\u00e9",
        "\u732b/000000003": "\u732b",
        "xxxx/000000004": "xxxx",
    }
    (note,) = result["notes"]
    assert note.startswith("1 names are not UTF-8 and are read as code page 437 (caf\u00e9/000000002.jpg)")


@pytest.mark.parametrize("system", [0, 3, 11])
def test_backslashes_part_folders_in_zips_of_windows(system: int, tmp_path: Path) -> None:
    names = [b"cat\\\\00000000001.jpg", b"dog\\00000000002.jpg", b"..\\cat\\00000000003.jpg", b"dog\\more\\"]
    path = raw_zip(tmp_path / "x.zip", [(name, b"", shot(5)) for name in names], system)
    result = taken(path, tmp_path / "out", allow_degraded=True)
    assert classes_of(result["uri"]) == {"cat/00000000001": "cat", "dog/00000000002": "dog"}
    assert list(result["skipped_reasons"].items()) == [("unsafe_name", 1)]


def test_a_backslash_of_unix_is_a_character(tmp_path: Path) -> None:
    tree = shots("cat/a\\b.jpg", "dog/c.jpg")
    plain = taken(made("folder", tree, tmp_path), tmp_path / "plain")
    assert taken(made("x.zip", tree, tmp_path), tmp_path / "out")["digest"] == plain["digest"]


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("form", FORMS[1:])
def test_a_later_entry_of_a_name_replaces_the_earlier(form: str, tmp_path: Path) -> None:
    old, new = shot(1), shot(2)
    entries = [("cat/1.jpg", old), ("dog/2.jpg", old), ("./cat/1.jpg", new), ("dog/2.jpg", b""), ("dog/3.jpg", new)]
    path = tmp_path / form
    if form.endswith(".zip"):
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in entries:
                archive.writestr(name, data)
    else:
        with tarfile.open(path, "w:gz" if form.endswith(".gz") else "w") as tar:
            for name, data in entries:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    result = taken(path, tmp_path / "out", allow_degraded=True)
    shards = open_shards(result["uri"])
    assert {s.record.key: s.image for s in shards.read(shards.shards[0])} == {"cat/1": new, "dog/3": new}
    assert result["skipped_reasons"] == {"replaced": 2, "empty": 1}
    assert result["found"] == 5


# -------------------------------------------------------------------------------------------------------------- tars


@pytest.mark.parametrize("form", FORMS[2:])
def test_hard_links_of_a_tar_are_the_file_they_link_to(form: str, tmp_path: Path) -> None:
    source = made("folder", shots("cat/0.jpg", "cat/1.jpg", ".trash/2.jpg"), tmp_path)
    (source / "dog").mkdir()
    for name, target in (("dog/0.jpg", "cat/0.jpg"), ("dog/1.jpg", "cat/1.jpg"), ("dog/2.jpg", ".trash/2.jpg")):
        os.link(source / target, source / name)
    with tarfile.open(tmp_path / form, "w:gz" if form.endswith(".gz") else "w") as tar:
        for name in (".trash", "cat", "dog"):
            tar.add(source / name, name)
        assert [member.name for member in tar.getmembers() if member.islnk()] == ["dog/0.jpg", "dog/1.jpg", "dog/2.jpg"]
        info = tarfile.TarInfo("dog/9.jpg")
        info.type, info.linkname = tarfile.LNKTYPE, "dog/nowhere.jpg"
        tar.addfile(info)
    result = taken(tmp_path / form, tmp_path / "out", allow_degraded=True)
    assert sorted(classes_of(result["uri"])) == ["cat/0", "cat/1", "dog/0", "dog/1", "dog/2"]
    assert reasons_of(result) == {".trash/2.jpg": "hidden", "dog/9.jpg": "link"}
    shards = open_shards(result["uri"])
    images = {sample.record.key: sample.image for sample in shards.read(shards.shards[0])}
    assert images["dog/2"] == (source / ".trash/2.jpg").read_bytes()


def test_special_files_are_named(tmp_path: Path) -> None:
    source = made("folder", shots("cat/1.jpg"), tmp_path)
    os.mkfifo(source / "cat/pipe.jpg")
    assert stat.S_ISFIFO((source / "cat/pipe.jpg").stat().st_mode)
    assert reasons_of(taken(source, tmp_path / "out", allow_degraded=True)) == {"cat/pipe.jpg": "special"}
