"""Each image is read once: what a later run reads again, what it takes as it is, and what it refuses."""

import json
import os
import shutil
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.config.loading import load_config
from pipelines.errors import Degraded, FingerprintMismatch, InputError, UsageError, WorkFailed
from pipelines.ingest.ingest import ingest
from pipelines.shards.folders import FolderReader
from pipelines.verify.verify import verify
from tests.support.drivers import run, verb
from tests.support.folders import SMALL, tar_of, tree, zip_of
from tests.support.inline import InlinePool

WORDS = ("--set", "ingest.samples_per_shard=10")
OTHER = r"holds shards of other images: those for shard-00000\d.tar have other bytes now.*: choose another --out"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """How often each image of a folder was read in this process."""
    found: Counter[str] = Counter()
    real = FolderReader.__call__

    def count(reader: FolderReader, path: str, stamp: str = "", /) -> bytes:
        found[path] += 1
        return real(reader, path, stamp)

    monkeypatch.setattr(FolderReader, "__call__", count)
    yield found


def edit(path: Path) -> None:
    """Other bytes of the same size, with the old time of change."""
    before = path.stat()
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_each_image_is_read_once_and_none_on_a_rerun(folder: Path, tmp_path: Path, reads: Counter[str]) -> None:
    ingest(str(folder), str(tmp_path / "out"), SMALL)
    assert len(reads) == 24 and set(reads.values()) == {1}
    reads.clear()
    assert ingest(str(folder), str(tmp_path / "out"), SMALL).status == "unchanged"
    assert not reads


def test_a_touched_image_is_read_again_and_a_changed_one_refused(
    folder: Path, tmp_path: Path, reads: Counter[str]
) -> None:
    first = ingest(str(folder), str(tmp_path / "out"), SMALL)
    before = tree(tmp_path / "out")
    (folder / "class_00/0000.jpg").touch()
    reads.clear()
    again = ingest(str(folder), str(tmp_path / "out"), SMALL)
    assert (again.status, again.digest, len(reads)) == ("unchanged", first.digest, 24)
    reads.clear()
    assert ingest(str(folder), str(tmp_path / "out"), SMALL).status == "unchanged" and not reads
    edit(folder / "class_01/0001.jpg")
    with pytest.raises(FingerprintMismatch, match=OTHER):
        ingest(str(folder), str(tmp_path / "out"), SMALL)
    assert tree(tmp_path / "out") == before


def test_a_copy_or_an_archive_of_the_source_is_the_same_source(folder: Path, tmp_path: Path) -> None:
    first = ingest(str(folder), str(tmp_path / "out"), SMALL)
    shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copyfile)
    for source in (tmp_path / "copy", zip_of(folder, tmp_path / "x.zip"), tar_of(folder, tmp_path / "x.tar")):
        result = ingest(str(source), str(tmp_path / "out"), SMALL)
        assert (result.status, result.digest) == ("unchanged", first.digest)
    edit(tmp_path / "copy/class_02/0003.png")
    with pytest.raises(FingerprintMismatch, match=OTHER):
        ingest(str(tmp_path / "copy"), str(tmp_path / "out"), SMALL)


def test_a_killed_run_reads_only_what_it_had_not_written(folder: Path, tmp_path: Path, reads: Counter[str]) -> None:
    ingest(str(folder), str(tmp_path / "whole"), SMALL)
    words = "ingest", str(folder), "--out", str(tmp_path / "cut"), *WORDS
    killed = run(verb, *words, failpoints="receipt.put.after=kill@2")
    assert killed.code == -9
    receipts = [json.loads(path.read_bytes()) for path in tmp_path.glob("cut/receipts/*.json")]
    assert len(receipts) >= 2  # the other thread may have come to its own before the process was gone
    reads.clear()
    assert ingest(str(folder), str(tmp_path / "cut"), SMALL).status == "done"
    assert len(reads) == 24 - sum(receipt["part"]["rows"] for receipt in receipts)
    assert tree(tmp_path / "cut") == tree(tmp_path / "whole")
    assert verify(str(tmp_path / "cut")).orphans == []


def test_an_image_that_changed_between_a_kill_and_the_rerun_is_refused(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "cut"
    killed = run(verb, "ingest", str(folder), "--out", str(out), *WORDS, failpoints="manifest.put.before=kill")
    assert killed.code == -9
    edit(folder / "class_01/0001.jpg")
    before = tree(out)
    for _ in range(2):
        with pytest.raises(FingerprintMismatch, match=OTHER):
            ingest(str(folder), str(out), SMALL)
    assert tree(out) == before and not (out / "manifest.json").exists()


def test_an_image_that_is_readable_again_is_taken_by_the_rerun(folder: Path, tmp_path: Path) -> None:
    path = zip_of(folder, tmp_path / "x.zip", method=zipfile.ZIP_STORED)
    whole = ingest(str(path), str(tmp_path / "whole"), SMALL)
    data = path.read_bytes()
    place = data.find((folder / "class_01/0002.jpg").read_bytes())
    path.write_bytes(data[: place + 50] + bytes([data[place + 50] ^ 1]) + data[place + 51 :])
    with pytest.raises(Degraded, match=r"class_01/0002\.jpg: unreadable"):
        ingest(str(path), str(tmp_path / "out"), SMALL)
    path.write_bytes(data)
    again = ingest(str(path), str(tmp_path / "out"), SMALL)
    assert (again.status, again.digest, again.skipped) == ("done", whole.digest, 0)
    assert (tmp_path / "out/manifest.json").read_bytes() == (tmp_path / "whole/manifest.json").read_bytes()


def test_a_source_that_was_unreadable_throughout_is_read_again(folder: Path, tmp_path: Path) -> None:
    path = zip_of(folder, tmp_path / "x.zip", method=zipfile.ZIP_STORED)
    data = path.read_bytes()
    broken = bytearray(data)
    for picture in folder.rglob("*.*g"):
        broken[data.find(picture.read_bytes()) + 50] ^= 1
    path.write_bytes(broken)
    for _ in range(2):
        with pytest.raises(InputError, match=r"holds no images \(24 skipped: unreadable 24"):
            ingest(str(path), str(tmp_path / "out"), SMALL, allow_degraded=True)
    path.write_bytes(data)
    assert ingest(str(path), str(tmp_path / "out"), SMALL, allow_degraded=True).status == "done"


def test_a_rerun_of_a_degraded_ingest_names_what_was_skipped(folder: Path, tmp_path: Path) -> None:
    path = zip_of(folder, tmp_path / "x.zip", method=zipfile.ZIP_STORED)
    data = bytearray(path.read_bytes())
    data[data.find((folder / "class_01/0002.jpg").read_bytes()) + 50] ^= 1
    path.write_bytes(data)
    first = ingest(str(path), str(tmp_path / "out"), SMALL, allow_degraded=True).as_json()
    assert (first["status"], first["samples"], first["skipped"]) == ("degraded", 23, 1)
    again = ingest(str(path), str(tmp_path / "out"), SMALL, allow_degraded=True).as_json()
    assert again == first
    with pytest.raises(Degraded, match=r"1 of 24 pictures"):
        ingest(str(path), str(tmp_path / "out"), SMALL)


# -------------------------------------------------------------------------------------------------------- on a pool


def test_a_local_source_on_several_nodes_is_refused_unless_it_is_shared(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True}, {"Alive": True}, {"Alive": False}])
    pool = InlinePool()
    with pytest.raises(UsageError, match=r"images is a local path and the Ray cluster has 2 nodes: set store.shared"):
        ingest(str(folder), str(tmp_path / "out"), load_config(sets=["ingest.workers=2"]), pool=pool)
    assert not pool.done and not (tmp_path / "out/manifest.json").exists()
    shared = load_config(sets=["ingest.workers=2", "store.shared=true"])
    assert ingest(str(folder), str(tmp_path / "out"), shared, pool=pool).status == "done" and len(pool.done) == 1


def test_what_a_worker_cannot_reach_stays_in_the_process(folder: Path, tmp_path: Path) -> None:
    pool = InlinePool()
    config = load_config(sets=["ingest.workers=2", "ingest.samples_per_shard=10"])
    ingest(str(tar_of(folder, tmp_path / "x.tar")), str(tmp_path / "tar"), config, pool=pool)
    far = load_config(sets=["ray.address=http://127.0.0.1:1", "ingest.workers=2"])
    ingest(str(folder), str(tmp_path / "far"), far, pool=pool)
    assert ingest(str(folder), str(tmp_path / "few"), SMALL, pool=pool).status == "done" and not pool.done


def test_a_tar_that_ends_its_workers_ends_the_run_and_the_rest_is_kept(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True}])
    pool, config = InlinePool(), load_config(sets=["ingest.workers=2", "ingest.samples_per_shard=10"])
    pool.fatal = lambda task: task.tar == "shard-000002.tar"
    with pytest.raises(WorkFailed, match=r"all workers died; what was written is kept, run again to resume"):
        ingest(str(folder), str(tmp_path / "out"), config, pool=pool)
    pool.fatal = lambda task: False
    assert ingest(str(folder), str(tmp_path / "out"), config, pool=pool).status == "done"
    assert [task.tar for task in pool.done] == [f"shard-{number:06d}.tar" for number in (0, 1, 2)]
