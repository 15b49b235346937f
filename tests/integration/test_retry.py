"""Rejects whose cause is gone become codes in the next version; nothing that had a code ever loses it."""

import time
from pathlib import Path

import pyarrow as pa
import pytest

from pipelines.artifacts.commit import list_versions
from pipelines.artifacts.manifest import Artifact, open_artifact
from pipelines.artifacts.versions import open_current, open_version
from pipelines.config.loading import load_config
from pipelines.config.settings import Config
from pipelines.encode.codes import open_codes
from pipelines.encode.encode import encode
from pipelines.encode.job import ShardTask
from pipelines.encode.retry_rejects import retry_rejects
from pipelines.encode.workers import ShardEncoder
from pipelines.errors import Degraded, InputError
from pipelines.index.build import build_index
from pipelines.storage import Store
from pipelines.verify.gc import gc
from pipelines.verify.verify import verify
from tests.integration.conftest import SETTINGS
from tests.support.checker import client_of
from tests.support.corpus import Corpus
from tests.support.inline import InlinePool, ray_pool_of
from tests.support.seaweed import BUCKET, Seaweed, seaweed


@pytest.fixture
def corpus(shards: Path, tmp_path: Path, local_ray: None) -> Corpus:
    return Corpus(shards / "train", tmp_path)


def parts_of(artifact: Artifact, folder: str = "") -> dict[str, str]:
    return {part.path: part.sha256 for part in artifact.manifest.parts if part.path.startswith(folder)}


def rows_of(codes: str) -> list[dict[str, object]]:
    return pa.concat_tables(open_codes(codes).tables()).to_pylist()


def test_from_degraded_to_mended(corpus: Corpus, model: Path, codes: Path, config: Config, tmp_path: Path) -> None:
    corpus.damage(0, [1, 4])
    corpus.damage(2, [0])
    arguments = (corpus.uri, str(model), corpus.out, config)
    with pytest.raises(Degraded, match="3 of 36 samples were rejected"):
        encode(*arguments)
    with pytest.raises(InputError, match="holds no committed codes"):
        retry_rejects(corpus.out, config)
    first = encode(*arguments, allow_degraded=True).as_json()
    assert (first["status"], first["rejects"]) == ("degraded", 3)

    still = retry_rejects(corpus.out, config).as_json()
    assert (still["status"], still["digest"], still["version"]) == ("unchanged", first["digest"], 1)
    assert list_versions(Store(corpus.out)) == []

    corpus.mend()
    mended = retry_rejects(corpus.out, config).as_json()
    assert (mended["status"], mended["version"]) == ("done", 2)
    assert (mended["codes"], mended["rejects"], mended["recovered"]) == (36, 0, 3)
    assert mended["digest"] != first["digest"]
    # What an undisturbed run makes, row for row; what is left of the first version stays.
    assert rows_of(corpus.out) == rows_of(str(codes / "train"))
    assert parts_of(open_artifact(corpus.out), "parts/").items() <= parts_of(open_current(corpus.out)).items()
    old = open_version(Store(corpus.out), 1)
    assert (old.digest, open_codes(old).rows) == (first["digest"], 33)

    proof = verify(corpus.out).as_json()
    assert (proof["digest"], proof["orphans"]) == (mended["digest"], [])
    again = encode(*arguments).as_json()
    assert (again["status"], again["digest"]) == ("unchanged", mended["digest"])
    nothing = retry_rejects(corpus.out, config).as_json()
    assert (nothing["status"], nothing["version"], nothing["digest"]) == ("unchanged", 2, mended["digest"])
    built = build_index([corpus.out], str(tmp_path / "index"), config).as_json()
    assert built["card"]["count"] == 36
    assert f"input codes-0: {corpus.out} has the digest" in "\n".join(verify(str(tmp_path / "index")).checks)
    gc(corpus.out, older_than="0s")
    assert verify(corpus.out).digest == mended["digest"]


def test_a_shard_that_got_stuck_is_tried_again(corpus: Corpus, model: Path) -> None:
    config = load_config(sets=[*SETTINGS, "encode.max_attempts=1", "encode.stuck_s=10"])

    class Hanging(ShardEncoder):
        def run(self, task: ShardTask) -> object:  # type: ignore[override]
            if task.shard == "train-000001.tar":
                time.sleep(600)
            return super().run(task)

    hanging = ray_pool_of(Hanging)
    first = encode(corpus.uri, str(model), corpus.out, config, allow_degraded=True, pool=hanging).as_json()
    assert first["rejects"] == 10
    import duckdb

    found = duckdb.sql(f"select distinct reason, detail from '{corpus.out}/rejects/*.parquet'").fetchall()
    assert [row[0] for row in found] == ["stuck"]
    assert verify(corpus.out).status == "done"
    mended = retry_rejects(corpus.out, config).as_json()
    assert (mended["status"], mended["rejects"], mended["recovered"]) == ("done", 0, 10)
    assert verify(corpus.out).digest == mended["digest"]


def test_on_s3_too(corpus: Corpus, model: Path, config: Config, tmp_path: Path) -> None:
    corpus.damage(1, [2, 3])
    with seaweed(tmp_path / "weed") as server, server.environment():
        shards, out = server.uri("shards"), server.uri("codes")
        copy_to_s3(server, corpus.uri, "shards")
        assert encode(shards, str(model), out, config, allow_degraded=True, pool=InlinePool()).rejects == 2
        corpus.mend()
        copy_to_s3(server, corpus.uri, "shards")
        mended = retry_rejects(out, config, pool=InlinePool()).as_json()
        assert (mended["status"], mended["version"], mended["rejects"], mended["recovered"]) == ("done", 2, 0, 2)
        assert verify(out).digest == mended["digest"]
        assert retry_rejects(out, config, pool=InlinePool()).status == "unchanged"
        found = rows_of(out)
    encode(corpus.uri, str(model), corpus.out, config, pool=InlinePool())
    assert found == rows_of(corpus.out), "as on a disk, and as if nothing had been damaged"


def copy_to_s3(server: Seaweed, folder: str, prefix: str) -> None:
    """Put every file of a folder below a prefix, over what is there."""
    for path in Path(folder).rglob("*"):
        if path.is_file():
            client_of(server).pipe_file(f"{BUCKET}/{prefix}/{path.relative_to(folder)}", path.read_bytes())
