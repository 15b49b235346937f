"""`verify` reads what is new or has changed since it last looked; all of it when asked to; on Ray where it is much."""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipelines.artifacts.commit import ArtifactWriter
from pipelines.artifacts.manifest import Artifact, Facts
from pipelines.artifacts.versions import publish_next
from pipelines.errors import DamagedArtifact, StoreRefused, WorkFailed
from pipelines.shards.index import DIRECTORY_NAME
from pipelines.storage import Store
from pipelines.storage.local import LocalObjects
from pipelines.verify import proofs, spread
from pipelines.verify.verify import BytesProver, verify
from tests.support.artifacts import MARK, Columns, make_codes, make_index
from tests.support.inline import InlinePool

HOUR_AGO = time.time() - 3600


def settle(root: str | Path, when: float = HOUR_AGO) -> None:
    """Give all files below a folder a time at which clocks have no more say."""
    for path in Path(root).rglob("*"):
        os.utime(path, (when, when))


def flip_unseen(path: Path) -> None:
    """Flip a bit as a bad disk does: size and time stay."""
    before, data = path.stat(), bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, (before.st_atime, before.st_mtime))


def records(root: str | Path) -> list[Path]:
    return sorted(Path(root, "proofs").glob("*.json"))


@pytest.fixture
def novel(tmp_path: Path) -> Artifact:
    """Four parts of no known kind, proven by their digests alone."""
    writer = ArtifactWriter(Store(tmp_path / "novel"), "novel", MARK, (), {})
    artifact = writer.commit([writer.put_part(f"p{n}.bin", bytes([n]) * 9, 1) for n in range(4)], {}, Facts())
    settle(artifact.uri)
    return artifact


def test_nothing_is_read_twice(tmp_path: Path, shards: Artifact, model: Artifact) -> None:
    codes = make_codes(tmp_path / "codes", shards, model)
    index = make_index(tmp_path / "index", codes)
    settle(tmp_path)
    for artifact in (shards, model, codes, index):
        first, again = verify(artifact.uri), verify(artifact.uri)
        assert (first.known, again.read, again.known) == (0, 0, first.read)
        before = f"; {first.read} of these are unchanged since an earlier verify"
        assert [check.replace(before, "") for check in again.checks] == first.checks
        assert len(records(artifact.uri)) == 1


def test_only_what_a_version_adds_is_read(novel: Artifact) -> None:
    assert (verify(novel.uri).read, verify(novel.uri).read) == (4, 0)
    writer = ArtifactWriter(novel.store, "novel", MARK, (), {})
    publish_next(novel, 2, [*novel.manifest.parts, writer.put_part("p4.bin", b"more", 1)], (), {})
    settle(novel.uri)
    result = verify(novel.uri)
    assert (result.read, result.known) == (1, 4)
    assert (verify(novel.uri).read, len(records(novel.uri))) == (0, 2)


def test_a_file_that_was_written_again_is_read_again(novel: Artifact) -> None:
    path = Path(novel.uri, novel.manifest.parts[1].path)
    verify(novel.uri)
    settle(path.parent, HOUR_AGO + 60)
    assert verify(novel.uri).read == 4
    data = path.read_bytes()
    path.write_bytes(data[:-1] + b"!")
    with pytest.raises(DamagedArtifact, match=r"p1-.*does not match the digest"):
        verify(novel.uri)
    path.write_bytes(data)
    assert verify(novel.uri).read == 1


def test_a_lie_whose_digests_fit_is_found_each_time(tmp_path: Path, shards: Artifact, model: Artifact) -> None:
    def lie(shard: str, codes: Columns, rejects: Columns) -> None:
        if shard == "shard-000001":
            codes["path"][0] = "class_00/none.png"

    codes = make_codes(tmp_path / "codes", shards, model, lie)
    settle(tmp_path)
    for _ in range(2):
        with pytest.raises(DamagedArtifact, match=r"shard-000001\.tar have other paths than the shard index$"):
            verify(codes.uri)


def test_full_finds_what_no_time_tells(novel: Artifact) -> None:
    verify(novel.uri)
    flip_unseen(Path(novel.uri, novel.manifest.parts[2].path))
    assert verify(novel.uri).read == 0
    for full in (True, False):  # once found, it is not forgotten
        with pytest.raises(DamagedArtifact, match=r"p2-.*does not match the digest"):
            verify(novel.uri, full=full)
    assert len(records(novel.uri)) == 1


def test_a_share_reads_everything_in_turn(novel: Artifact) -> None:
    verify(novel.uri)
    flip_unseen(Path(novel.uri, novel.manifest.parts[3].path))
    shares = [verify(novel.uri, sample=0.2).read for _ in range(4)]
    assert shares == [0, 1, 1, 1]  # the manifest is an object like the four parts
    with pytest.raises(DamagedArtifact, match="p3-"):
        verify(novel.uri, sample=0.2)


def test_what_was_put_just_now_is_not_trusted(novel: Artifact) -> None:
    path = Path(novel.uri, novel.manifest.parts[0].path)
    os.utime(path)
    assert [verify(novel.uri).read for _ in range(2)] == [4, 1]
    settle(path.parent)
    assert [verify(novel.uri).read for _ in range(2)] == [1, 0]


def test_a_copy_is_proven_anew_though_it_keeps_the_times(novel: Artifact, tmp_path: Path) -> None:
    verify(novel.uri)
    shutil.copytree(novel.uri, tmp_path / "copy")
    assert verify(str(tmp_path / "copy")).read == 4
    assert verify(str(tmp_path / "copy")).read == 0


def test_a_damaged_record_proves_nothing(novel: Artifact, caplog: pytest.LogCaptureFixture) -> None:
    verify(novel.uri)
    for damaged in (b"{}", records(novel.uri)[0].read_bytes().replace(b"size", b"sise")):
        records(novel.uri)[0].write_bytes(damaged)
        assert verify(novel.uri).read == 4
        assert "does not match the digest in its name" in caplog.text
        records(novel.uri)[-1].unlink()


def test_a_root_that_takes_no_record_is_valid_all_the_same(novel: Artifact, caplog: pytest.LogCaptureFixture) -> None:
    Path(novel.uri, "proofs").write_bytes(b"in the way")
    assert [verify(novel.uri).read for _ in range(2)] == [4, 4]
    assert "what was proven is not remembered" in caplog.text


def test_many_records_become_one(novel: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proofs, "RECORDS_KEPT", 2)
    paths = [Path(novel.uri, part.path) for part in novel.manifest.parts]
    counts = []
    for number, path in enumerate(paths):
        os.utime(path, (HOUR_AGO + 60 * number,) * 2)
        counts.append((verify(novel.uri).read, len(records(novel.uri))))
    assert counts == [(4, 1), (1, 2), (1, 1), (1, 2)]
    assert verify(novel.uri).read == 0


def test_a_killed_verification_loses_little(novel: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proofs, "SAVE_EVERY_S", 0.0)
    proven = proofs.Proofs(novel.store, novel.store.entries())
    for part in novel.manifest.parts[:3]:
        proven.add([part.path], "bytes", part.path, part.bytes, part.sha256)  # and no save: the process dies here
    assert verify(novel.uri).read == 1


def test_a_flipped_receipt_is_found_each_time(tmp_path: Path, shards: Artifact, model: Artifact) -> None:
    """The proof of the codes does not read it, so that must not make it look proven."""
    codes = make_codes(tmp_path / "codes", shards, model)
    settle(tmp_path)
    verify(codes.uri)
    path = Path(codes.uri, codes.manifest.receipts[0].path)
    path.write_bytes(path.read_bytes().replace(b"s", b"z", 1))
    settle(tmp_path, HOUR_AGO + 60)
    for _ in range(3):
        with pytest.raises(DamagedArtifact, match=r"receipts/.*does not match the digest"):
            verify(codes.uri)


def test_a_store_that_deletes_nothing_hides_nothing(novel: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Store, name: str) -> None:
        raise StoreRefused(f"cannot delete {name}")

    verify(novel.uri)
    monkeypatch.setattr(Store, "delete", refuse)
    flip_unseen(Path(novel.uri, novel.manifest.parts[2].path))
    for full in (True, False):
        with pytest.raises(DamagedArtifact, match=r"p2-.*does not match the digest"):
            verify(novel.uri, full=full)


def test_an_interrupted_full_verification_forgets_nothing(novel: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    verify(novel.uri)
    with monkeypatch.context() as patch:
        patch.setattr(BytesProver, "prove", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            verify(novel.uri, full=True)
    assert verify(novel.uri).read == 0


def test_other_files_beside_the_records_stay(novel: Artifact) -> None:
    verify(novel.uri)
    notes = Path(novel.uri, "proofs/notes.txt")
    notes.write_text("mine")
    verify(novel.uri, full=True)
    assert notes.read_text() == "mine"


def test_versions_are_read_once_for_all_of_an_index(
    tmp_path: Path, shards: Artifact, model: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each night more is two requests more, its version and its manifest; all others are of the newest version."""
    counts = []
    for nights in (4, 16):
        codes = make_codes(tmp_path / f"codes-{nights}", shards, model)
        for number in range(2, nights + 2):
            totals = codes.manifest.totals
            codes = publish_next(
                codes, number, codes.manifest.parts, codes.manifest.receipts, totals, meta=noted(codes)
            )
        settle(tmp_path)
        verify(codes.uri)
        counts.append(reads_of(monkeypatch, lambda uri=codes.uri: verify(uri)))  # type: ignore[misc]
    assert counts[1] - counts[0] == 2 * 12, counts


def test_older_versions_are_proven_once(tmp_path: Path, shards: Artifact, model: Artifact) -> None:
    known = "2 older versions proven before, with manifests as they were"
    codes = make_codes(tmp_path / "codes", shards, model)
    totals = codes.manifest.totals
    for number in (2, 3):
        codes = publish_next(codes, number, codes.manifest.parts, codes.manifest.receipts, totals, meta=noted(codes))
    settle(tmp_path)
    shutil.move(shards.uri, tmp_path / "away")
    assert any("not checked" in check for check in verify(codes.uri).checks)
    shutil.move(tmp_path / "away", shards.uri)
    assert known not in verify(codes.uri).checks  # nobody has seen their inputs before
    assert known in verify(codes.uri).checks
    settle(Path(codes.uri, "manifests"), HOUR_AGO + 60)
    assert "1 older version proven before, with manifests as they were" in verify(codes.uri).checks
    assert not any("older version" in check for check in verify(codes.uri, full=True).checks)
    part = Path(codes.uri, codes.manifest.parts[0].path)
    part.write_bytes(part.read_bytes()[:-1] + b"?")
    settle(part.parent, HOUR_AGO + 120)
    with pytest.raises(DamagedArtifact, match=part.name):
        verify(codes.uri)


def noted(codes: Artifact) -> dict[str, object]:
    """The facts of codes, other than those of the version before."""
    return {**codes.manifest.meta, "animated": int(codes.manifest.meta.get("animated", 0)) + 1}


def reads_of(monkeypatch: pytest.MonkeyPatch, work: Callable[[], object]) -> int:
    """How many objects `work` reads."""
    count, plain = 0, LocalObjects.read

    def read(self: LocalObjects, name: str, limit: int | None = None) -> bytes:
        nonlocal count
        count += 1
        return plain(self, name, limit)

    with monkeypatch.context() as patch:
        patch.setattr(LocalObjects, "read", read)
        work()
    return count


# ------------------------------------------------------------------------------------------------------------- on Ray


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[InlinePool]:
    """A pool that has to be used, one item in each batch."""
    monkeypatch.setattr(spread, "RAY_FROM_BYTES", 0)
    monkeypatch.setattr(spread, "BATCH_BYTES", 1)
    pool = InlinePool()
    yield pool
    assert pool.done


def test_workers_find_what_this_process_finds(
    tmp_path: Path, shards: Artifact, model: Artifact, pool: InlinePool
) -> None:
    codes = make_codes(tmp_path / "codes", shards, model)
    index = make_index(tmp_path / "index", codes)
    settle(tmp_path)
    for artifact in (shards, model, codes, index):
        here = verify(artifact.uri, pool=None)
        there = verify(artifact.uri, full=True, pool=pool)
        assert (there.checks, there.read) == (here.checks, here.read)
    victim = next(part for part in codes.manifest.parts if part.path.startswith("rejects/"))
    for damaged in (Path(shards.uri, shards.manifest.parts[1].path), Path(codes.uri, victim.path)):
        flip_unseen(damaged)
        messages = []
        for where in (None, pool):
            with pytest.raises(DamagedArtifact) as caught:
                verify(str(damaged.parent.parent), full=True, pool=where)
            messages.append(str(caught.value))
        assert messages[0] == messages[1]


def test_dead_workers_leave_the_rest_proven(novel: Artifact, pool: InlinePool) -> None:
    pool.fatal = lambda batch: "p3-" in batch[0].path
    with pytest.raises(WorkFailed, match="all workers died: verify again, it goes on from here"):
        verify(novel.uri, pool=pool)
    pool.fatal = lambda batch: False
    assert verify(novel.uri, pool=pool).read == 1


def test_workers_name_all_damage_though_the_directory_is_damaged_too(shards: Artifact, pool: InlinePool) -> None:
    for name in (DIRECTORY_NAME, "shard-000001.tar"):
        flip_unseen(Path(shards.uri, shards.manifest.part(name).path))
    with pytest.raises(DamagedArtifact, match=r"tars-.*shard-000001-.*does not match the digest"):
        verify(shards.uri, pool=pool)
