"""Rejects whose cause is gone become codes in the next version; nothing that had a code ever loses it."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest

from pipelines import encode as encode_module
from pipelines import retry as retry_module
from pipelines.artifacts import Artifact, open_artifact, versions
from pipelines.codes import open_codes
from pipelines.config import Config, load_config
from pipelines.encode import encode
from pipelines.encoding import ShardEncoder, ShardTask
from pipelines.errors import CommitConflict, Degraded, FingerprintMismatch, InputError
from pipelines.gc import gc
from pipelines.index import build_index
from pipelines.retry import retry_rejects
from pipelines.shards import open_shards
from pipelines.storage import Store
from pipelines.verify import verify
from pipelines.versions import open_current, open_version
from tests.integration.conftest import SETTINGS


class Corpus:
    """Shards of which some tars can be damaged and mended, and a folder for codes of them."""

    def __init__(self, shards: Path, folder: Path) -> None:
        self.uri = str(shutil.copytree(shards / "train", folder / "shards"))
        self.out = str(folder / "codes")
        self._whole: dict[Path, bytes] = {}

    def damage(self, number: int, rows: list[int]) -> None:
        """Flip a byte in the images of these rows of the tar."""
        shard = open_shards(self.uri).shards[number]
        path = Path(self.uri, shard.part.path)
        data = bytearray(self._whole.setdefault(path, path.read_bytes()))
        for row in rows:
            data[shard.records()[row].members[0].offset + 20] ^= 1
        path.write_bytes(data)

    def remove(self, number: int) -> None:
        """Take a tar away."""
        path = Path(self.uri, open_shards(self.uri).shards[number].part.path)
        self._whole.setdefault(path, path.read_bytes())
        path.unlink()

    def mend(self) -> None:
        """Bring the bytes back that were published."""
        for path, data in self._whole.items():
            path.write_bytes(data)


@pytest.fixture
def corpus(shards: Path, tmp_path: Path, local_ray: None) -> Corpus:
    return Corpus(shards, tmp_path)


def parts_of(artifact: Artifact) -> dict[str, str]:
    return {part.path: part.sha256 for part in artifact.manifest.parts}


def test_from_degraded_to_mended(corpus: Corpus, model: Path, codes: Path, config: Config, tmp_path: Path) -> None:
    corpus.damage(0, [1, 4])
    corpus.damage(2, [0])
    arguments = (corpus.uri, str(model), corpus.out, config)
    with pytest.raises(Degraded, match="3 of 36 samples were rejected"):
        encode(*arguments)
    with pytest.raises(InputError, match="holds no committed codes"):
        retry_rejects(corpus.out, config)
    first = encode(*arguments, allow_degraded=True)
    assert (first["status"], first["rejects"]) == ("degraded", 3)

    still = retry_rejects(corpus.out, config)
    assert (still["status"], still["digest"], still["version"]) == ("unchanged", first["digest"], 1)
    assert versions(Store(corpus.out)) == []

    corpus.mend()
    mended = retry_rejects(corpus.out, config)
    assert (mended["status"], mended["version"]) == ("done", 2)
    assert (mended["codes"], mended["rejects"], mended["recovered"]) == (36, 0, 3)
    assert mended["digest"] != first["digest"]
    # What an undisturbed run makes, byte for byte.
    assert parts_of(open_current(corpus.out)) == parts_of(open_artifact(str(codes / "train")))
    old = open_version(Store(corpus.out), 1)
    assert (old.digest, open_codes(old).rows) == (first["digest"], 33)

    proof = verify(corpus.out)
    assert (proof["digest"], proof["orphans"]) == (mended["digest"], [])
    again = encode(*arguments)
    assert (again["status"], again["digest"]) == ("unchanged", mended["digest"])
    nothing = retry_rejects(corpus.out, config)
    assert (nothing["status"], nothing["version"], nothing["digest"]) == ("unchanged", 2, mended["digest"])
    built = build_index([corpus.out], str(tmp_path / "index"), config)
    assert built["card"]["count"] == 36
    assert f"input codes-0: {corpus.out} has the digest" in "\n".join(verify(str(tmp_path / "index"))["checks"])
    gc(corpus.out, older_than="0s")
    assert verify(corpus.out)["digest"] == mended["digest"]


def test_an_index_of_the_first_version_is_still_proven_after_a_retry(
    corpus: Corpus, model: Path, config: Config, tmp_path: Path
) -> None:
    corpus.damage(0, [1, 4])
    encode(corpus.uri, str(model), corpus.out, config, allow_degraded=True)
    build_index([corpus.out], str(tmp_path / "index"), config)
    corpus.mend()
    retry_rejects(corpus.out, config)
    assert f"input codes-0: {corpus.out} has the digest" in "\n".join(verify(str(tmp_path / "index"))["checks"])


def test_a_partly_mended_corpus_makes_a_version_and_stays_degraded(corpus: Corpus, model: Path, config: Config) -> None:
    corpus.damage(0, [1, 4])
    corpus.damage(2, [0, 1])
    encode(corpus.uri, str(model), corpus.out, config, allow_degraded=True)
    corpus.mend()
    corpus.damage(2, [0, 1])
    corpus.damage(0, [4])
    result = retry_rejects(corpus.out, config)
    assert (result["status"], result["version"], result["rejects"]) == ("degraded", 2, 3)
    corpus.mend()
    last = retry_rejects(corpus.out, config)
    assert (last["status"], last["version"], last["rejects"]) == ("done", 3, 0)
    assert verify(corpus.out)["digest"] == last["digest"]


def test_a_code_is_never_lost_to_a_retry(corpus: Corpus, model: Path, config: Config) -> None:
    corpus.damage(0, [1])
    encode(corpus.uri, str(model), corpus.out, config, allow_degraded=True)
    corpus.mend()
    corpus.remove(0)
    result = retry_rejects(corpus.out, config)
    assert (result["status"], result["codes"], result["rejects"]) == ("unchanged", 35, 1)
    corpus.mend()
    corpus.damage(0, [2])  # another row than before
    assert retry_rejects(corpus.out, config)["status"] == "unchanged"


@pytest.mark.parametrize(("cause", "reason"), [("dies", "worker_died"), ("hangs", "stuck")])
def test_shards_given_up_are_tried_again(
    cause: str, reason: str, corpus: Corpus, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(sets=[*SETTINGS, "encode.max_attempts=1", "encode.stuck_s=10"])

    class Poisoned(ShardEncoder):
        def run(self, task: ShardTask) -> object:  # type: ignore[override]
            if task.shard == "train-000001.tar":
                if cause == "dies":
                    os._exit(1)
                time.sleep(600)
            return super().run(task)

    with monkeypatch.context() as patch:
        patch.setattr(encode_module, "ShardEncoder", Poisoned)
        first = encode(corpus.uri, str(model), corpus.out, config, allow_degraded=True)
    assert first["rejects"] == 10
    import duckdb

    found = duckdb.sql(f"select distinct reason, detail from '{corpus.out}/rejects/*.parquet'").fetchall()
    assert [row[0] for row in found] == [reason]
    assert verify(corpus.out)["status"] == "done"
    mended = retry_rejects(corpus.out, config)
    assert (mended["status"], mended["rejects"], mended["recovered"]) == ("done", 0, 10)
    assert verify(corpus.out)["digest"] == mended["digest"]


def test_a_retry_that_was_cut_off_goes_on_from_its_receipts(
    corpus: Corpus, model: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus.damage(0, [1, 4])
    corpus.damage(2, [0])
    encode(corpus.uri, str(model), corpus.out, config, allow_degraded=True)
    corpus.mend()

    def cut_off(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(retry_module, "publish_next", cut_off)
        with pytest.raises(KeyboardInterrupt):
            retry_rejects(corpus.out, config)
    before = set(Path(corpus.out, "runs").iterdir())
    assert versions(Store(corpus.out)) == []
    result = retry_rejects(corpus.out, config)
    assert (result["status"], result["rejects"]) == ("done", 0)
    assert set(Path(corpus.out, "runs").iterdir()) == before  # nothing was encoded
    assert verify(corpus.out)["orphans"] == []


def test_of_two_retries_with_other_results_one_publishes(
    corpus: Corpus, model: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus.damage(0, [1, 4])
    corpus.damage(2, [0])
    encode(corpus.uri, str(model), corpus.out, config, allow_degraded=True)
    corpus.mend()
    publish = retry_module.publish_next

    def overtaken(*arguments: object) -> Artifact:
        base, number, parts, refs, totals = arguments
        publish(base, number, parts, refs, {**totals, "codes": 0})  # type: ignore[arg-type,dict-item]
        return publish(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(retry_module, "publish_next", overtaken)
        with pytest.raises(CommitConflict, match="another run published version 2 meanwhile"):
            retry_rejects(corpus.out, config)
    assert versions(Store(corpus.out)) == [1, 2]


def test_moved_inputs_are_named_and_others_refused(
    corpus: Corpus, model: Path, config: Config, tmp_path: Path, shards: Path
) -> None:
    corpus.damage(0, [1])
    encode(corpus.uri, str(model), corpus.out, config, allow_degraded=True)
    corpus.mend()
    moved = str(shutil.move(corpus.uri, tmp_path / "moved"))
    with pytest.raises(InputError, match="holds no committed shards"):
        retry_rejects(corpus.out, config)
    with pytest.raises(FingerprintMismatch, match="was made from shards"):
        retry_rejects(corpus.out, config, shards=str(shards / "query"))
    assert retry_rejects(corpus.out, config, shards=moved, model=str(model))["status"] == "done"


def test_the_settings_are_those_that_made_the_codes(corpus: Corpus, model: Path, config: Config) -> None:
    corpus.damage(0, [1])
    encode(corpus.uri, str(model), corpus.out, config, allow_degraded=True)
    corpus.mend()
    other = load_config(sets=["encode.batch_size=5", "encode.carry=['author']", "encode.workers=1"])
    result = retry_rejects(corpus.out, other)
    assert (result["status"], result["rejects"]) == ("done", 0)
    assert verify(corpus.out)["digest"] == result["digest"]
    identity = json.loads(Path(corpus.out, "identity.json").read_bytes())
    assert open_current(corpus.out).manifest.fingerprint == identity["fingerprint"]
