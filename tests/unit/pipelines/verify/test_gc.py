"""gc deletes what no version refers to and is old enough, and nothing else."""

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from pipelines.artifacts.commit import ArtifactWriter, list_versions
from pipelines.artifacts.facts import QuantizerReceipt
from pipelines.artifacts.manifest import Artifact, open_artifact
from pipelines.artifacts.versions import open_current, publish_next, read_all_manifests
from pipelines.config.settings import Config, IndexSettings
from pipelines.errors import ConfigError, DamagedArtifact, InputError
from pipelines.index.build import build_index
from pipelines.index.publish import describe_index, rollback_index
from pipelines.index.reader import open_index
from pipelines.index.update import add_codes, remove_rows
from pipelines.storage import Store, canonical_json
from pipelines.storage.local import LocalObjects
from pipelines.verify.gc import gc
from pipelines.verify.verify import _orphans as orphans_of  # the codes here have no shards to verify against
from pipelines.verify.verify import verify
from tests.support.codes import simple_rows, write_codes
from tests.support.inline import InlinePool

DAY = 86_400


@pytest.fixture
def codes(tmp_path: Path) -> Artifact:
    return write_codes(tmp_path / "codes", {"a-000000.tar": simple_rows("a", 5), "a-000001.tar": simple_rows("b", 5)})


def litter(root: Path, *names: str, age: float = 2 * DAY) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"litter")
        os.utime(path, (time.time() - age, time.time() - age))


def age_all(root: Path) -> None:
    for path in root.rglob("*"):
        os.utime(path, (time.time() - 2 * DAY, time.time() - 2 * DAY))


def files(root: str | Path) -> set[str]:
    return {str(path.relative_to(root)) for path in Path(root).rglob("*") if path.is_file()}


ORPHANS = (
    "parts/a-000000-0123456789abcdef.parquet",
    "rejects/a-000001-0123456789abcdef.parquet",
    "receipts/v2/a-000001.json",
    "manifests/0123456789abcdef.json",
    "parts/.tmp-1",
    ".tmp-2",
)


def test_what_nothing_refers_to_goes_and_all_else_stays(codes: Artifact) -> None:
    before = files(codes.uri)
    age_all(Path(codes.uri))
    litter(Path(codes.uri), *ORPHANS, "runs/1.json", "notes.txt", "mine/parts/x.bin")
    planned = gc(codes.uri, dry_run=True).as_json()
    assert (planned["status"], planned["deleted"], planned["bytes"]) == ("done", 6, 36)
    assert set(planned["names"]) == set(ORPHANS)
    assert files(codes.uri) > before | set(ORPHANS)
    done = gc(codes.uri).as_json()
    assert {**planned, "dry_run": False} == done
    assert done["digest"] == codes.digest
    assert files(codes.uri) == before | {"runs/1.json", "notes.txt", "mine/parts/x.bin"}
    again = gc(codes.uri).as_json()
    assert (again["status"], again["deleted"], again["note"]) == ("unchanged", 0, "")


def test_the_grace_period_protects_what_a_run_may_still_publish(codes: Artifact) -> None:
    litter(Path(codes.uri), "parts/old-0123456789abcdef.bin", age=3 * 3600)
    litter(Path(codes.uri), "parts/new-0123456789abcdef.bin", age=3600)
    assert gc(codes.uri).deleted == 0
    result = gc(codes.uri, older_than="2h").as_json()
    assert (result["names"], result["young"]) == (["parts/old-0123456789abcdef.bin"], 1)
    assert gc(codes.uri, older_than="30m").names == ["parts/new-0123456789abcdef.bin"]


def test_what_any_version_refers_to_stays(codes: Artifact) -> None:
    receipt = codes.manifest.receipts[1]
    codes.store.put("receipts/v2/a-000001.json", codes.store.read(receipt.path))
    moved = receipt.model_copy(update={"path": "receipts/v2/a-000001.json"})
    part = codes.manifest.parts[1]
    refs = [codes.manifest.receipts[0], moved]
    codes.store.put("parts/b-0123456789abcdef.parquet", codes.store.read(part.path))
    parts = [codes.manifest.parts[0], replace(part, path="parts/b-0123456789abcdef.parquet")]
    second = publish_next(codes, 2, parts, refs, {"samples": 10})
    before = files(codes.uri)
    age_all(Path(codes.uri))
    result = gc(codes.uri).as_json()
    assert (result["deleted"], result["digest"]) == (0, second.digest)
    assert files(codes.uri) == before
    assert open_current(codes.uri).digest == second.digest


def test_an_unfinished_run_keeps_what_it_will_resume_from(tmp_path: Path) -> None:
    writer = ArtifactWriter(Store(tmp_path), "codes", "f" * 64, (), {})
    part = writer.put_part("a.parquet", b"rows", 1)
    writer.put_receipt("a", QuantizerReceipt(part=part))
    age_all(tmp_path)
    before = files(tmp_path)
    litter(tmp_path, "parts/.tmp-1")
    result = gc(str(tmp_path)).as_json()
    assert (result["names"], result["digest"]) == (["parts/.tmp-1"], None)
    assert "no manifest" in result["note"]
    assert files(tmp_path) == before


def model_with_checkpoints(root: Path, finished: bool) -> Artifact | None:
    for step in (1, 2):
        below = ArtifactWriter(Store(root / f"checkpoints/{step:09d}-x"), "checkpoint", "f" * 64, (), {})
        below.commit([below.put_part("state.safetensors", b"state", 1)], {"tensors": 1}, {"step": step})
    writer = ArtifactWriter(Store(root), "model", "f" * 64, (), {})
    part = writer.put_part("model.json", canonical_json({}), 1)
    return writer.commit([part], {}, {}) if finished else None


def test_a_finished_training_gives_up_its_checkpoints_whole(tmp_path: Path) -> None:
    model_with_checkpoints(tmp_path, finished=True)
    age_all(tmp_path)
    young = tmp_path / "checkpoints/000000002-x/manifest.json"
    os.utime(young)
    result = gc(str(tmp_path)).as_json()
    assert result["deleted"] == 3
    assert result["names"][0] == "checkpoints/000000001-x/manifest.json"
    assert {name.split("/")[1] for name in files(tmp_path) if name.startswith("checkpoints/")} == {"000000002-x"}
    assert len(files(tmp_path / "checkpoints")) == 3


def test_an_unfinished_training_keeps_its_checkpoints(tmp_path: Path) -> None:
    model_with_checkpoints(tmp_path, finished=False)
    age_all(tmp_path)
    before = files(tmp_path)
    assert gc(str(tmp_path)).deleted == 0
    assert files(tmp_path) == before


def test_a_damaged_version_stops_it_before_anything_is_deleted(codes: Artifact) -> None:
    litter(Path(codes.uri), *ORPHANS, "versions/1.json")
    before = files(codes.uri)
    with pytest.raises(DamagedArtifact, match=r"versions/1\.json"):
        gc(codes.uri)
    Path(codes.uri, "versions/1.json").unlink()
    Path(codes.uri, "manifest.json").write_bytes(b"{}")
    with pytest.raises(DamagedArtifact, match=r"manifest\.json"):
        gc(codes.uri)
    assert files(codes.uri) == before - {"versions/1.json"}


def test_a_lost_first_manifest_beside_versions_stops_it(codes: Artifact) -> None:
    publish_next(codes, 2, codes.manifest.parts, codes.manifest.receipts, {"samples": 11})
    litter(Path(codes.uri), *ORPHANS)
    Path(codes.uri, "manifest.json").unlink()
    before = files(codes.uri)
    with pytest.raises(InputError, match=r"no manifest\.json"):
        gc(codes.uri)
    assert files(codes.uri) == before


def test_the_figures_agree_with_what_verify_calls_orphans(codes: Artifact) -> None:
    litter(Path(codes.uri), *ORPHANS[:4])
    orphans = gc(codes.uri, dry_run=True).names
    assert sorted(orphans_of(read_all_manifests(codes.store))) == sorted(orphans)


@pytest.mark.parametrize("text", ["", "24", "h", "-1h", "1w", "24 hours"])
def test_a_grace_period_that_is_none(codes: Artifact, text: str) -> None:
    with pytest.raises(ConfigError, match="write a number and ms, s, m, h or d"):
        gc(codes.uri, older_than=text)


def test_an_empty_root(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds nothing"):
        gc(str(tmp_path / "nowhere"))
    assert not (tmp_path / "nowhere").exists()


# --------------------------------------------------------------------------------------------------------- versions

CONFIG = Config(index=IndexSettings(workers=1))


@pytest.fixture
def index(tmp_path: Path) -> str:
    """Versions 1 to 4: 30 codes, two keys removed, 5 codes added, a tar removed; all of them two days old."""
    base = {f"b-{n:06d}.tar": simple_rows(f"b{n}", 10, seed=n) for n in range(3)}
    uri = str(
        build_index([write_codes(tmp_path / "b", base).uri], str(tmp_path / "index"), CONFIG, pool=InlinePool()).uri
    )
    remove_rows(uri, CONFIG, ["b0/00000", "b1/00000"])
    add_codes(
        uri, [write_codes(tmp_path / "c", {"c-000000.tar": simple_rows("c", 5, seed=9)}).uri], CONFIG, pool=InlinePool()
    )
    remove_rows(uri, CONFIG, shards=["b-000002.tar"])
    age_all(Path(uri))
    return uri


def test_all_versions_stay_unless_asked(index: str) -> None:
    before = files(index)
    result = gc(index).as_json()
    assert (result["status"], result["collected"]) == ("unchanged", [])
    assert gc(index, keep=4).collected == gc(index, keep=9).collected == []
    assert files(index) == before
    with pytest.raises(ConfigError, match="at least the current version stays"):
        gc(index, keep=0)


def test_the_last_versions_stay_whole_and_the_others_fail_clearly(index: str) -> None:
    planned = gc(index, keep=2, dry_run=True).as_json()
    assert (planned["collected"], len(list_versions(Store(index)))) == ([1, 2], 4)
    done = gc(index, keep=2).as_json()
    assert {**planned, "dry_run": False} == done
    assert done["names"][:2] == ["versions/1.json", "versions/2.json"]
    assert list_versions(Store(index)) == [3, 4]
    for number in (3, 4):
        with open_index(index, number) as reader:
            assert reader.search(bytes_of(), 40)[1].shape == (1, {3: 33, 4: 23}[number])
    with pytest.raises(InputError, match="no version 2, it was collected by gc: name one of its versions 3, 4"):
        rollback_index(index, 2)
    with pytest.raises(InputError, match="was collected by gc"), open_index(index, 1):
        pass
    checks = verify(index).as_json()
    assert checks["orphans"] == []
    assert any("versions 3 to 4 name" in check for check in checks["checks"])
    assert [entry["version"] for entry in describe_index(index).versions] == [4, 3]
    assert gc(index, keep=2).status == "unchanged"
    base = open_artifact(index).origin("codes-0")
    assert build_index([str(base)], index, CONFIG, pool=InlinePool()).version == 4
    assert remove_rows(index, CONFIG, ["c/00000"]).version == 5
    assert gc(index, keep=1, older_than="0s").collected == [3, 4]
    assert verify(index).orphans == []
    with pytest.raises(InputError, match="content is that of version 5: there is no older one"):
        rollback_index(index)


def bytes_of() -> npt.NDArray[np.uint8]:
    return simple_rows("q", 1).codes


def test_a_version_that_was_current_within_the_grace_period_stays(index: str) -> None:
    os.utime(Path(index, "versions/3.json"))
    assert gc(index, keep=1).collected == [1]
    assert list_versions(Store(index)) == [2, 3, 4]


def test_the_version_that_knows_all_ordinals_stays(index: str, tmp_path: Path) -> None:
    rollback_index(index, 1)
    age_all(Path(index))
    assert gc(index, keep=1).collected == [1, 2, 3]
    with open_index(index) as reader:
        assert (reader.version, reader.count) == (5, 30)
    add_codes(
        index,
        [write_codes(tmp_path / "d", {"d-000000.tar": simple_rows("d", 4, seed=5)}).uri],
        CONFIG,
        pool=InlinePool(),
    )
    with open_index(index) as reader:
        assert [shard.ordinal for shard in reader.shards.values() if shard.shard == "d-000000.tar"] == [4]
    assert verify(index).orphans == []


class Interrupted(LocalObjects):
    """A folder that does `what` before the delete of that number."""

    def __init__(self, root: str, after: int, what: Callable[[], object]) -> None:
        super().__init__(Path(root))
        self.left, self.what = after, what

    def delete(self, name: str) -> None:
        self.left -= 1
        if not self.left:
            self.what()
        super().delete(name)


def interrupt() -> None:
    raise KeyboardInterrupt


def test_a_collection_that_was_cut_off_leaves_whole_versions(index: str) -> None:
    for hit in range(1, 9):
        try:
            gc(Store(index, Interrupted(index, hit, interrupt)), keep=1)
        except KeyboardInterrupt:
            assert verify(index).status == "done"
    gc(index, keep=1)
    assert list_versions(Store(index)) == [4]
    assert verify(index).orphans == []


def test_a_rollback_while_versions_are_collected_keeps_what_it_names(index: str) -> None:
    gc(Store(index, Interrupted(index, 1, lambda: rollback_index(index, 2))), keep=1)
    with open_index(index) as reader:
        assert (reader.version, reader.count) == (5, 28)
    assert verify(index).status == "done"
