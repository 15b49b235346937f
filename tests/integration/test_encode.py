"""Encoding on a real Ray: the same bytes however it is run, and nothing lost when a worker dies."""

import os
import shutil
from pathlib import Path

import duckdb
import numpy as np
import pytest

from pipelines.artifacts.commit import ArtifactWriter
from pipelines.artifacts.manifest import open_artifact
from pipelines.config.loading import load_config
from pipelines.config.settings import Config
from pipelines.encode.encode import encode
from pipelines.encode.job import ShardTask, plan_encode
from pipelines.encode.workers import ShardEncoder
from pipelines.errors import DamagedArtifact, Degraded, FingerprintMismatch
from pipelines.ingest.ingest import ingest
from pipelines.shards.index import put_index
from pipelines.shards.shards import open_shards
from pipelines.storage import Store
from pipelines.verify import spread
from pipelines.verify.verify import verify
from tests.integration.conftest import SETTINGS
from tests.support.inline import InlinePool, ray_pool_of
from tests.support.pictures import animated_gif, truncated_jpeg
from tests.support.runs import run_record


def tree(root: Path) -> dict[str, bytes]:
    """Every published byte below a root; runs/, proofs/ and origin.json are outside the promise."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and not {"runs", "proofs"} & {*path.parts} and path.name != "origin.json"
    }


@pytest.mark.parametrize("workers", [1, 2])
def test_the_number_of_workers_does_not_change_a_byte(
    workers: int, shards: Path, model: Path, codes: Path, tmp_path: Path
) -> None:
    config = load_config(sets=[*SETTINGS, f"encode.workers={workers}", f"data.workers={3 - workers}"])
    encode(str(shards / "train"), str(model), str(tmp_path / "codes"), config)
    assert tree(tmp_path / "codes") == tree(codes / "train")


def test_a_second_run_does_nothing_and_says_so(shards: Path, model: Path, codes: Path, config: Config) -> None:
    before = tree(codes / "query")
    result = encode(str(shards / "query"), str(model), str(codes / "query"), config).as_json()
    assert result["status"] == "unchanged"
    assert tree(codes / "query") == before


def test_a_part_deleted_by_hand_comes_back(shards: Path, model: Path, tmp_path: Path, config: Config) -> None:
    out = tmp_path / "codes"
    encode(str(shards / "train"), str(model), str(out), config)
    before = tree(out)
    next((out / "parts").iterdir()).unlink()
    result = encode(str(shards / "train"), str(model), str(out), config).as_json()
    assert result["status"] == "done"
    assert tree(out) == before


def test_other_settings_are_refused_at_the_same_root(shards: Path, model: Path, codes: Path) -> None:
    config = load_config(sets=[*SETTINGS, "encode.batch_size=4"])
    with pytest.raises(FingerprintMismatch, match="choose another --out"):
        encode(str(shards / "query"), str(model), str(codes / "query"), config)


def test_duckdb_reads_the_codes(codes: Path, shards: Path) -> None:
    table = duckdb.sql(f"select * from '{codes}/train/parts/*.parquet'").arrow().read_all()
    index = duckdb.sql(f"select key, labels from '{shards}/train/parts/index-*.parquet'").fetchall()
    paths = duckdb.sql(f"select key, path from '{shards}/train/parts/index-*.parquet'").fetchall()
    assert dict(zip(table["key"].to_pylist(), table["path"].to_pylist(), strict=True)) == dict(paths)
    assert table.num_rows == 36
    assert len(set(table["key"].to_pylist())) == 36
    assert {len(code) for code in table["code"].to_pylist()} == {2}
    assert dict(zip(table["key"].to_pylist(), table["labels"].to_pylist(), strict=True)) == dict(index)
    assert np.unique(table["row"].to_numpy()).size <= 10


def test_rejects_are_rows_with_reasons_and_the_budget_holds(
    pictures: Path, model: Path, tmp_path: Path, local_ray: None
) -> None:
    source = tmp_path / "photos" / "mixed"
    source.mkdir(parents=True)
    for number, path in enumerate(sorted(pictures.rglob("*.*"))[:10]):
        (source / f"{number}{path.suffix}").write_bytes(path.read_bytes())
    (source / "text.jpg").write_text("this is no picture")
    (source / "short.jpg").write_bytes(truncated_jpeg())
    (source / "moving.gif").write_bytes(animated_gif())
    config = load_config(sets=[*SETTINGS, "encode.reject_budget=0.01"])
    ingest(str(tmp_path / "photos"), str(tmp_path / "shards"), config)
    arguments = (str(tmp_path / "shards"), str(model), str(tmp_path / "codes"), config)
    with pytest.raises(Degraded, match="2 of 13 samples were rejected"):
        encode(*arguments)
    assert not (tmp_path / "codes" / "manifest.json").exists()
    result = encode(*arguments, allow_degraded=True).as_json()
    assert (result["status"], result["codes"], result["rejects"]) == ("degraded", 11, 2)
    assert result["animated"] == 1
    rows = duckdb.sql(f"select key, reason from '{tmp_path}/codes/rejects/*.parquet' order by key").fetchall()
    assert rows == [("mixed/short", "truncated"), ("mixed/text", "not_an_image")]
    assert verify(str(tmp_path / "codes")).status == "done"


def test_nothing_is_published_of_a_tar_that_the_index_lies_about(
    shards: Path, model: Path, tmp_path: Path, config: Config
) -> None:
    """Every digest fits, but the second of three tars has its rows in another order."""
    true = open_shards(str(shards / "train"))
    tables = [shard.table() for shard in true.shards]
    tables[1] = tables[1].take(list(reversed(range(10))))
    writer = ArtifactWriter(Store(tmp_path / "shards"), "shards", "1" * 64, (), {})
    parts = [writer.put_part(shard.name, Path(true.artifact.uri, shard.part.path), shard.rows) for shard in true.shards]
    parts += put_index(writer, tables)
    writer.commit(parts, true.artifact.manifest.totals, true.artifact.manifest.meta)
    with pytest.raises(DamagedArtifact, match=r"does not number the rows of train-000001\.tar"):
        encode(str(tmp_path / "shards"), str(model), str(tmp_path / "codes"), config, pool=InlinePool())
    assert not (tmp_path / "codes" / "manifest.json").exists()
    assert sorted(path.name[:12] for path in (tmp_path / "codes" / "parts").iterdir()) == ["train-000000"]


def test_a_shard_that_kills_its_workers_becomes_rejects(
    shards: Path, model: Path, tmp_path: Path, local_ray: None
) -> None:
    class Poisoned(ShardEncoder):
        def run(self, task: ShardTask) -> object:  # type: ignore[override]
            if task.shard == "train-000001.tar":
                os._exit(1)
            return super().run(task)

    config = load_config(sets=[*SETTINGS, "encode.max_attempts=2"])
    result = encode(
        str(shards / "train"),
        str(model),
        str(tmp_path / "codes"),
        config,
        allow_degraded=True,
        pool=ray_pool_of(Poisoned),
    ).as_json()
    assert (result["status"], result["codes"], result["rejects"]) == ("degraded", 26, 10)
    assert verify(str(tmp_path / "codes")).status == "done"
    reasons = duckdb.sql(f"select distinct reason from '{tmp_path}/codes/rejects/*.parquet'").fetchall()
    assert reasons == [("worker_died",)]
    record = run_record(tmp_path / "codes")
    attempts = {shard["shard"]: shard["attempts"] for shard in record["shards"]}
    assert attempts.pop("train-000001.tar") == 2
    assert set(attempts.values()) == {1}, "a death is charged to the shard of the worker that died, and to no other"


def test_a_shard_that_was_claimed_meanwhile_is_not_encoded_again(
    shards: Path, model: Path, tmp_path: Path, config: Config
) -> None:
    job = plan_encode(open_artifact(shards / "train"), open_artifact(model), str(tmp_path / "codes"), config)
    worker = ShardEncoder(job)
    task = ShardTask("train-000000.tar", "train-000000")
    receipt, figures = worker.run(task)
    assert figures["forward"] > 0
    again, saved = worker.run(task)
    assert again == receipt
    assert saved == {"samples": 10, "rejects": 0}
    next((tmp_path / "codes" / "parts").iterdir()).unlink()
    assert worker.run(task)[1]["forward"] > 0


def test_the_run_record_has_rate_and_shares(codes: Path) -> None:
    record = run_record(codes / "train")
    assert record["images"] == open_artifact(str(codes / "train")).manifest.totals["samples"] == 36
    assert record["images_per_second"] > 0
    assert set(record["shares"]) == {"read", "decode", "forward", "write"}
    assert sum(record["shares"].values()) == pytest.approx(1, abs=0.001)


def test_verify_on_ray_finds_what_verify_in_one_process_finds(
    shards: Path, codes: Path, tmp_path: Path, local_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy, roots = tmp_path / "codes", [tmp_path / "shards", tmp_path / "codes"]
    for source, root in zip((shards, codes), roots, strict=True):
        shutil.copytree(source / "train", root)
    here = [verify(str(root), full=True, pool=None).as_json() for root in roots]
    monkeypatch.setattr(spread, "RAY_FROM_BYTES", 0)
    assert [verify(str(root), full=True).as_json() for root in roots] == here
    part = next((copy / "parts").iterdir())
    part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(DamagedArtifact, match=rf"{part.name} does not match the digest"):
        verify(str(copy))
