"""Versions: the highest is current, an input is found by its digest among them, and only one run publishes the next."""

from pathlib import Path

import numpy as np
import pytest

from pipelines.artifacts.commit import ArtifactWriter, list_versions, publish_version
from pipelines.artifacts.manifest import Artifact, ArtifactInput, open_artifact
from pipelines.artifacts.versions import (
    find_finished,
    list_lost,
    open_current,
    open_input_version,
    open_version,
    publish_next,
    read_all_manifests,
)
from pipelines.encode.codes import open_codes
from pipelines.errors import CommitConflict, DamagedArtifact, FingerprintMismatch, InputError
from pipelines.storage import Store
from tests.support.codes import Rows, random_codes, simple_rows, write_codes


@pytest.fixture
def codes(tmp_path: Path) -> Artifact:
    return write_codes(tmp_path / "codes", {"a-000000.tar": simple_rows("a", 5), "a-000001.tar": simple_rows("b", 5)})


def publish_second(codes: Artifact) -> Artifact:
    """A version in which the second shard has other codes, as after a retry."""
    other = write_codes(
        f"{codes.uri}-other",
        {"a-000000.tar": simple_rows("a", 5), "a-000001.tar": Rows(["x"], random_codes(1), [[0]])},
    )
    for entry in (*other.manifest.parts, *other.manifest.receipts):
        codes.store.put(entry.path.replace("receipts/", "receipts/v2/"), other.store.read(entry.path))
    refs = [
        ref.model_copy(update={"path": ref.path.replace("receipts/", "receipts/v2/")})
        for ref in other.manifest.receipts
    ]
    return publish_next(codes, 2, other.manifest.parts, refs, {"samples": 6})


def test_without_versions_the_manifest_is_current(codes: Artifact) -> None:
    assert open_current(codes.uri, "codes").digest == codes.digest
    assert list(read_all_manifests(codes.store)) == ["manifest.json"]


def test_the_next_version_becomes_current_and_the_first_stays(codes: Artifact) -> None:
    second = publish_second(codes)
    assert second.digest != codes.digest
    assert list_versions(codes.store) == [1, 2]
    assert open_current(codes.uri).digest == second.digest
    assert open_version(codes.store, 1).digest == open_artifact(codes.uri).digest == codes.digest
    assert (open_codes(codes.uri).rows, open_codes(open_artifact(codes.uri)).rows) == (6, 10)
    assert np.concatenate([open_codes(codes.uri).read(s)["row"] for s in open_codes(codes.uri).shards]).size == 6
    assert list(read_all_manifests(codes.store).values())[-1].digest == second.digest


def test_publishing_the_same_version_twice_is_fine_and_another_is_a_conflict(codes: Artifact) -> None:
    second = publish_second(codes)
    again = publish_next(codes, 2, second.manifest.parts, second.manifest.receipts, second.manifest.totals)
    assert again.digest == second.digest
    with pytest.raises(CommitConflict, match="another run published version 2"):
        publish_next(codes, 2, second.manifest.parts, second.manifest.receipts, {"samples": 7})
    assert open_current(codes.uri).digest == second.digest


def test_an_input_is_the_version_that_was_used(codes: Artifact, tmp_path: Path) -> None:
    def user_of(used: Artifact, name: str) -> Artifact:
        inputs = (ArtifactInput(role="codes-0", kind="codes", digest=used.digest),)
        return ArtifactWriter(Store(tmp_path / name), "index", "f" * 64, inputs, {"codes-0": codes.uri}).commit(
            [], {}, {}
        )

    before = user_of(codes, "one")
    second = publish_second(codes)
    after = user_of(second, "two")
    assert open_input_version(before, "codes-0").digest == codes.digest
    assert open_input_version(after, "codes-0").digest == second.digest
    stranger = user_of(write_codes(tmp_path / "x", {"c-000000.tar": simple_rows("c", 3)}), "three")
    with pytest.raises(FingerprintMismatch, match="was made from codes"):
        open_input_version(stranger, "codes-0")


@pytest.mark.parametrize("content", [b"", b"[]", b'{"version": 2, "manifest": "../manifest.json", "digest": "x"}'])
def test_a_version_that_names_no_manifest_is_damage(codes: Artifact, content: bytes) -> None:
    publish_version(codes.store, 1, "manifest.json", codes.digest)
    codes.store.put("versions/2.json", content)
    with pytest.raises(DamagedArtifact, match=r"versions/2\.json"):
        open_current(codes.uri)
    with pytest.raises(InputError, match="not shards"):
        open_version(codes.store, 1, "shards")


@pytest.mark.parametrize("folder", ["parts", "receipts", "identity.json", "manifest.json"])
def test_a_result_deleted_by_hand_is_not_finished(codes: Artifact, folder: str) -> None:
    mark = codes.manifest.fingerprint
    found = find_finished(codes.store, "codes", mark)
    assert found is not None
    assert found.digest == codes.digest
    assert find_finished(codes.store, "codes", "0" * 64) is None
    assert find_finished(codes.store, "index", mark) is None
    path = Path(codes.uri, folder)
    path = path if path.is_file() else sorted(path.iterdir())[0]
    path.unlink()
    assert list_lost(codes) == {str(path.relative_to(codes.uri))}
    assert find_finished(codes.store, "codes", mark) is None


def test_a_part_cut_by_hand_is_not_finished(codes: Artifact) -> None:
    path = next(Path(codes.uri, "parts").iterdir())
    path.write_bytes(path.read_bytes()[:-1])
    assert find_finished(codes.store, "codes", codes.manifest.fingerprint) is None
