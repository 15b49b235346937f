"""Encoding on a real Ray: the same bytes however it is run, and nothing lost when a worker dies."""

import os
from pathlib import Path

import duckdb
import numpy as np
import pytest

from pipelines import encode as encode_module
from pipelines.artifacts import open_artifact
from pipelines.cluster.pool import map_items
from pipelines.config import Config, load_config
from pipelines.encode import encode
from pipelines.errors import Degraded, FingerprintMismatch
from pipelines.ingest import ingest
from pipelines.verify import verify
from tests.integration.conftest import SETTINGS
from tests.support.pictures import truncated_jpeg


def tree(root: Path) -> dict[str, bytes]:
    """Every published byte below a root; runs/ and origin.json are outside the promise."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and "runs" not in path.parts and path.name != "origin.json"
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
    result = encode(str(shards / "query"), str(model), str(codes / "query"), config)
    assert result["status"] == "unchanged"
    assert tree(codes / "query") == before


def test_a_part_deleted_by_hand_comes_back(shards: Path, model: Path, tmp_path: Path, config: Config) -> None:
    out = tmp_path / "codes"
    encode(str(shards / "train"), str(model), str(out), config)
    before = tree(out)
    next((out / "parts").iterdir()).unlink()
    result = encode(str(shards / "train"), str(model), str(out), config)
    assert result["status"] == "done"
    assert tree(out) == before


def test_other_settings_are_refused_at_the_same_root(shards: Path, model: Path, codes: Path) -> None:
    config = load_config(sets=[*SETTINGS, "encode.batch_size=4"])
    with pytest.raises(FingerprintMismatch, match="choose another --out"):
        encode(str(shards / "query"), str(model), str(codes / "query"), config)


def test_duckdb_reads_the_codes(codes: Path, shards: Path) -> None:
    table = duckdb.sql(f"select * from '{codes}/train/parts/*.parquet'").arrow().read_all()
    index = duckdb.sql(f"select key, labels from '{shards}/train/parts/index-*.parquet'").fetchall()
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
    config = load_config(sets=[*SETTINGS, "encode.reject_budget=0.01"])
    ingest(str(tmp_path / "photos"), str(tmp_path / "shards"), config)
    arguments = (str(tmp_path / "shards"), str(model), str(tmp_path / "codes"), config)
    with pytest.raises(Degraded, match="2 of 12 samples were rejected"):
        encode(*arguments)
    assert not (tmp_path / "codes" / "manifest.json").exists()
    result = encode(*arguments, allow_degraded=True)
    assert (result["status"], result["codes"], result["rejects"]) == ("degraded", 10, 2)
    rows = duckdb.sql(f"select key, reason from '{tmp_path}/codes/rejects/*.parquet' order by key").fetchall()
    assert rows == [("mixed/short", "truncated"), ("mixed/text", "not_an_image")]
    assert verify(str(tmp_path / "codes"))["status"] == "done"


class DiesOnce:
    """A worker that dies on an item the first time it sees it."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def run(self, item: int) -> int:
        mark = self.folder / str(item)
        if item == 2 and not mark.exists():
            mark.touch()
            os._exit(1)
        if item == 3:
            os._exit(1)
        return item * item


def test_a_worker_that_dies_costs_an_attempt_and_no_item(tmp_path: Path, local_ray: None) -> None:
    found = {o.item: o for o in map_items(DiesOnce, (str(tmp_path),), [1, 2, 3, 4], workers=2, max_attempts=2)}
    assert {item: outcome.result for item, outcome in found.items()} == {1: 1, 2: 4, 3: None, 4: 16}
    assert (found[2].attempts, found[3].attempts) == (2, 2)
    assert found[3].error is not None


def test_a_shard_that_kills_its_workers_becomes_rejects(
    shards: Path, model: Path, tmp_path: Path, local_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Poisoned(encode_module.ShardEncoder):
        def run(self, name: str) -> dict[str, object]:
            if name == "train-000001.tar":
                os._exit(1)
            return super().run(name)

    monkeypatch.setattr(encode_module, "ShardEncoder", Poisoned)
    config = load_config(sets=[*SETTINGS, "encode.max_attempts=2"])
    result = encode(str(shards / "train"), str(model), str(tmp_path / "codes"), config, allow_degraded=True)
    assert (result["status"], result["codes"], result["rejects"]) == ("degraded", 26, 10)
    assert verify(str(tmp_path / "codes"))["status"] == "done"
    reasons = duckdb.sql(f"select distinct reason from '{tmp_path}/codes/rejects/*.parquet'").fetchall()
    assert reasons == [("worker_died",)]


def test_the_run_record_has_rate_and_shares(codes: Path) -> None:
    import json

    (record,) = [json.loads(path.read_bytes()) for path in (codes / "train" / "runs").iterdir()]
    assert record["images"] == open_artifact(str(codes / "train")).manifest.totals["samples"] == 36
    assert record["images_per_second"] > 0
    assert set(record["shares"]) == {"read", "decode", "forward", "write"}
    assert sum(record["shares"].values()) == pytest.approx(1, abs=0.001)
