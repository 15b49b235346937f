"""`verify` accepts what the verbs write and names every part, receipt and manifest that is not as it was written."""

import shutil
from pathlib import Path

import pytest

from pipelines.artifacts.commit import ArtifactWriter, publish_version
from pipelines.artifacts.manifest import Artifact
from pipelines.config.loading import load_config
from pipelines.errors import DamagedArtifact, InputError
from pipelines.shards.index import is_tar, piece_name
from pipelines.shards.shards import open_shards
from pipelines.storage import Store
from pipelines.verify.verify import verify, verify_tars
from tests.support.artifacts import MARK, make_codes, make_index
from tests.support.inline import InlinePool


def flip(path: Path, place: int | None = None) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if place is None else place] ^= 1
    path.write_bytes(data)


# --------------------------------------------------------------------------------------------------------- all is well


def test_everything_the_verbs_write_is_proven(tmp_path: Path, shards: Artifact, model: Artifact) -> None:
    codes = make_codes(tmp_path / "codes", shards, model)
    index = make_index(tmp_path / "index", codes)
    publish_version(index.store, 1, "manifest.json", index.digest)
    for artifact in (shards, model, codes, index):
        result = verify(artifact.uri).as_json()
        assert {name: result[name] for name in ("verb", "status", "uri", "digest", "kind", "orphans")} == {
            **{"verb": "verify", "status": "done", "uri": artifact.uri, "digest": artifact.digest},
            **{"kind": artifact.manifest.kind, "orphans": []},
        }
    checks = "\n".join(verify(codes.uri).checks)
    assert "24 samples = 21 codes + 3 rejects" in checks
    assert "with the keys, paths and labels of the shard index" in checks
    assert f"input model: {model.uri}" in checks
    assert "24 samples in 3 tars" in "\n".join(verify(shards.uri).checks)
    assert "21 codes in 3 parts" in "\n".join(verify(index.uri).checks)


def test_a_copied_artifact_is_still_proven(tmp_path: Path, shards: Artifact, model: Artifact) -> None:
    codes = make_codes(tmp_path / "codes", shards, model)
    shutil.copytree(codes.uri, tmp_path / "copy")
    assert verify(str(tmp_path / "copy")).digest == codes.digest


def test_inputs_out_of_reach_are_noted(tmp_path: Path, shards: Artifact, model: Artifact) -> None:
    codes = make_codes(tmp_path / "codes", shards, model)
    (tmp_path / "shards").rename(tmp_path / "moved")
    checks = "\n".join(verify(codes.uri).checks)
    assert "input shards: not checked" in checks
    assert "24 samples = 21 codes + 3 rejects" in checks
    again = "\n".join(verify(codes.uri, shards=str(tmp_path / "moved")).checks)
    assert f"input shards: {tmp_path / 'moved'}" in again
    with pytest.raises(InputError):
        verify(codes.uri, shards=str(tmp_path / "nowhere"))


def test_orphans_are_reported_not_failures(tmp_path: Path, shards: Artifact) -> None:
    (tmp_path / "shards/parts/shard-000000-0123456789abcdef.tar").write_bytes(b"lost race")
    (tmp_path / "shards/receipts").mkdir()
    (tmp_path / "shards/receipts/.tmp-1").write_bytes(b"killed")
    (tmp_path / "shards/versions").mkdir()
    (tmp_path / f"shards/versions/{'9' * 30}.json").write_bytes(b"no version")
    result = verify(shards.uri).as_json()
    assert result["orphans"] == [
        *("parts/shard-000000-0123456789abcdef.tar", "receipts/.tmp-1", f"versions/{'9' * 30}.json")
    ]


def test_an_unknown_kind_is_proven_by_digest(tmp_path: Path) -> None:
    writer = ArtifactWriter(Store(tmp_path), "novel", MARK, (), {})
    part = writer.put_part("x.bin", b"data", 1)
    writer.commit([part], {}, {})
    assert "digests only" in verify(str(tmp_path)).checks[-1]
    flip(tmp_path / part.path)
    with pytest.raises(DamagedArtifact, match="does not match the digest"):
        verify(str(tmp_path))


def test_nothing_committed(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no manifest\.json"):
        verify(str(tmp_path))


# --------------------------------------------------------------------------------------------------------- the envelope


def test_every_flipped_part_receipt_and_manifest_is_noticed(tmp_path: Path, shards: Artifact, model: Artifact) -> None:
    codes = make_codes(tmp_path / "codes", shards, model)
    index = make_index(tmp_path / "index", codes)
    for artifact in (shards, model, codes, index):
        root = Path(artifact.uri)
        files = [entry.path for entry in (*artifact.manifest.parts, *artifact.manifest.receipts)]
        for name in [*files, "manifest.json", "identity.json"]:
            before = (root / name).read_bytes()
            flip(root / name)
            with pytest.raises(DamagedArtifact, match=name.split("/")[-1].split("-")[0]):
                verify(artifact.uri)
            (root / name).write_bytes(before[:-1])
            with pytest.raises(DamagedArtifact):
                verify(artifact.uri)
            if name != "manifest.json":
                (root / name).unlink()
                with pytest.raises(DamagedArtifact, match="missing"):
                    verify(artifact.uri)
            (root / name).write_bytes(before)
        verify(artifact.uri)


def test_several_problems_are_counted_and_named(shards: Artifact) -> None:
    for part in shards.manifest.parts:
        if is_tar(part):
            flip(Path(shards.uri, part.path), 1600)  # in the first image
    with pytest.raises(DamagedArtifact) as caught:
        verify(shards.uri)
    message = str(caught.value)
    assert "; and 5 more: " in message  # three tars, each with a member and a digest that differ
    for number in range(3):
        assert f"shard-00000{number}" in message
    assert "\n" not in message


def test_many_problems_are_cut(tmp_path: Path) -> None:
    writer = ArtifactWriter(Store(tmp_path), "novel", MARK, (), {})
    parts = [writer.put_part(f"p{number}.bin", bytes([number]), 1) for number in range(30)]
    writer.commit(parts, {}, {})
    for part in parts:
        (tmp_path / part.path).unlink()
    with pytest.raises(DamagedArtifact, match=r"and 29 more \(the first 20 are named\)"):
        verify(str(tmp_path))


def test_an_identity_of_another_artifact(shards: Artifact) -> None:
    path = Path(shards.uri, "identity.json")
    path.write_bytes(path.read_bytes().replace(shards.manifest.fingerprint[:8].encode(), b"00000000"))
    with pytest.raises(DamagedArtifact, match=r"identity\.json is not what was published"):
        verify(shards.uri)


def test_a_version_that_names_another_manifest(tmp_path: Path, shards: Artifact) -> None:
    publish_version(shards.store, 1, "manifest.json", "0" * 64)
    with pytest.raises(DamagedArtifact, match=r"versions/1\.json"):
        verify(shards.uri)


# ------------------------------------------------------------------------------------------------- the tars of a run


@pytest.fixture
def pool() -> InlinePool:
    return InlinePool()


def test_a_run_reads_the_tars_that_no_run_proved_before(shards: Artifact, tmp_path: Path, pool: InlinePool) -> None:
    out, config = str(tmp_path / "out"), load_config()
    first = verify_tars(shards.uri, out, config, pool=pool).as_json()
    assert (first["status"], first["tars"], first["proven"], first["known"], first["left"]) == ("done", 3, 3, 0, 0)
    assert len(pool.done) == 3
    again = verify_tars(shards.uri, out, config, pool=pool).as_json()
    assert (again["status"], again["proven"], again["known"], again["damaged"]) == ("unchanged", 0, 3, [])
    assert len(pool.done) == 3
    assert verify_tars(shards.uri, str(tmp_path / "other"), config, pool=pool).proven == 3


def test_a_damaged_tar_is_named_and_looked_at_again(shards: Artifact, tmp_path: Path, pool: InlinePool) -> None:
    out, config = str(tmp_path / "out"), load_config()
    opened = open_shards(shards.uri)
    flip(Path(shards.uri, opened.shards[1].part.path), opened.shards[1].records()[3].members[0].offset + 20)
    Path(shards.uri, opened.shards[2].part.path).unlink()
    for _ in range(2):
        found = verify_tars(shards.uri, out, config, pool=pool).as_json()
        assert len(found["damaged"]) == 2
        assert "is not the" in found["damaged"][0] and found["damaged"][1].endswith("is missing")
    assert (found["known"], found["proven"]) == (1, 0)
    with pytest.raises(DamagedArtifact):  # a damaged tar is a damaged artifact for the proof of an artifact
        verify(shards.uri)


def test_a_share_of_the_tars_is_read_until_all_are_known(shards: Artifact, tmp_path: Path, pool: InlinePool) -> None:
    out, config = str(tmp_path / "out"), load_config(sets=["run.verify=0.3"])
    counts = [verify_tars(shards.uri, out, config, pool=pool).as_json() for _ in range(4)]
    assert [(found["proven"], found["known"], found["left"]) for found in counts] == [
        (1, 0, 2),
        (1, 1, 1),
        (1, 2, 0),
        (0, 3, 0),
    ]
    nothing = verify_tars(shards.uri, str(tmp_path / "other"), load_config(sets=["run.verify=0"]), pool=pool).as_json()
    assert (nothing["status"], nothing["left"]) == ("unchanged", 3)


def test_a_tar_whose_reader_died_is_neither_proven_nor_damaged(
    shards: Artifact, tmp_path: Path, pool: InlinePool
) -> None:
    pool.fatal = lambda name: name.endswith("000001.tar")
    found = verify_tars(shards.uri, str(tmp_path / "out"), load_config(), pool=pool).as_json()
    assert (found["proven"], found["damaged"], found["left"]) == (2, [], 1)


def test_shards_whose_index_is_damaged_are_no_shards(shards: Artifact, tmp_path: Path, pool: InlinePool) -> None:
    flip(Path(shards.uri, shards.manifest.part(piece_name(0)).path), 40)
    with pytest.raises(DamagedArtifact):
        verify_tars(shards.uri, str(tmp_path / "out"), load_config(), pool=pool)
    assert pool.done == []


def test_a_record_of_proven_tars_that_is_none_is_named(shards: Artifact, tmp_path: Path, pool: InlinePool) -> None:
    (tmp_path / "out" / "proven").mkdir(parents=True)
    (tmp_path / "out" / "proven" / "x.json").write_text("[]")
    with pytest.raises(DamagedArtifact, match="is no list of proven tars: delete it"):
        verify_tars(shards.uri, str(tmp_path / "out"), load_config(), pool=pool)
