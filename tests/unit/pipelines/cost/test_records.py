"""Constants of the cost model from finished artifacts: the newest run that worked counts, on GPUs or without."""

import time
from pathlib import Path

import pytest

from pipelines.artifacts.commit import ArtifactWriter
from pipelines.artifacts.facts import StudyMeta
from pipelines.artifacts.runs import RunLog, closed_records
from pipelines.cluster.attempts import Attempt, End
from pipelines.config.loading import load_config
from pipelines.cost.model import Constants
from pipelines.cost.records import read_constants
from pipelines.errors import InputError
from pipelines.index.build import build_index
from pipelines.ingest.ingest import ingest
from pipelines.storage import Store
from tests.support.codes import simple_rows, write_codes, write_shards
from tests.support.drivers import run, verb
from tests.support.inline import InlinePool
from tests.support.pictures import write_folder

STEPS = {"read": 0.5, "decode": 2.0, "forward": 30.0, "write": 0.5, "samples": 10, "rejects": 0}
"""Figures of a tar of ten images."""


def record(codes: str, gpu: str | None, cpu: float = 4.0, done: int = 20) -> None:
    """Record an encode of two tars that kept a worker for 40 seconds each."""
    with RunLog(Store(codes), "encode", total=20, unit="images") as log:
        for number in range(done // 10):
            attempt = Attempt(100.0, 140.0, "host", 7, gpu, End.DONE)
            log.record_attempts(f"a-{number}.tar", (attempt,), {**STEPS, "cpu": cpu})
            log.record_attempts(f"a-{number}.tar", (Attempt(0.0, 99.0, "host", 8, gpu, End.NODE_LOST),), {})
            log.advance(10)


def test_an_encode_on_gpus_tells_their_seconds(tmp_path: Path) -> None:
    codes = write_codes(tmp_path / "codes", {"a-000000.tar": simple_rows("a", 20)}).uri
    record(codes, gpu="0,1")
    found, named = read_constants([codes])
    assert {"forward_gpu_s", "decode_cpu_s", "driver_cpu_s", "code_bytes", "receipt_bytes"} == set(named)
    assert found.forward_gpu_s == 2 * 80 / 20  # two GPUs for 40 s at each tar
    assert found.decode_cpu_s == 2 * 3.0 / 20
    assert found.forward_cpu_s == Constants.forward_cpu_s


def test_an_encode_without_gpus_tells_what_the_network_took(tmp_path: Path) -> None:
    codes = write_codes(tmp_path / "codes", {"a-000000.tar": simple_rows("a", 20)}).uri
    record(codes, gpu=None)
    found, named = read_constants([codes])
    assert "forward_gpu_s" not in named
    assert (found.decode_cpu_s, found.forward_cpu_s) == (2 * 3.0 / 20, 2 * 1.0 / 20)


def test_the_newest_run_that_worked_counts(tmp_path: Path) -> None:
    codes = write_codes(tmp_path / "codes", {"a-000000.tar": simple_rows("a", 20)}).uri
    record(codes, gpu=None, cpu=9.0)
    record(codes, gpu=None, cpu=5.0)
    record(codes, gpu=None, done=0)  # all was done before
    with pytest.raises(RuntimeError), RunLog(Store(codes), "encode", total=20) as log:
        log.advance(10)
        raise RuntimeError
    assert read_constants([codes])[0].forward_cpu_s == 2 * 2.0 / 20


def test_shards_and_an_index_tell_sizes_and_rates(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, "photos", classes=2, per_class=5)
    codes = write_codes(tmp_path / "codes", {"a-000000.tar": simple_rows("a", 400)}).uri
    index = build_index([codes], str(tmp_path / "index"), load_config(sets=["index.kind=flat"]), pool=InlinePool()).uri
    found, named = read_constants([shards, index])
    assert set(named) == {
        *("image_bytes", "ingest_cpu_s", "row_bytes", "sample_overhead_bytes"),
        *("index_cpu_s", "key_bytes", "part_code_bytes"),
    }
    pictures = [path.stat().st_size for path in (tmp_path / "photos-images").rglob("*.*")]
    assert len(pictures) == 10 and found.image_bytes == sum(pictures) / 10
    assert 16 <= found.part_code_bytes < 17  # an id and a code of 8 bytes each, and a header


def test_the_parts_of_a_split_share_the_cpu_seconds_of_their_ingest(tmp_path: Path) -> None:
    write_folder(tmp_path / "images", classes=2, per_class=100)
    sizes = load_config(sets=["ingest.samples_per_shard=20"])
    begun = time.process_time()
    out = ingest(str(tmp_path / "images"), str(tmp_path / "out"), sizes, split="train=.8,query=.1,database=.1")
    spent = time.process_time() - begun
    assert out.splits is not None
    rates = {name: read_constants([part["uri"]])[0].ingest_cpu_s for name, part in out.splits.items()}
    assert max(rates.values()) < 1.2 * min(rates.values())
    assert sum(rates[name] * part["samples"] for name, part in out.splits.items()) < 1.05 * spent


def test_an_ingest_that_goes_on_tells_the_rate_of_what_it_wrote_itself(
    tmp_path: Path,
) -> None:
    write_folder(tmp_path / "images", classes=2, per_class=20)
    words = "ingest", str(tmp_path / "images"), "--out", str(tmp_path / "out"), "--set", "ingest.samples_per_shard=10"
    assert run(verb, *words, failpoints="receipt.put.after=kill@2").code == -9
    left = 40 - 10 * len(list(tmp_path.glob("out/receipts/*.json")))
    assert 0 < left < 40
    assert run(verb, *words).code == 0
    spent = [one["cpu_seconds"] for one in closed_records(Store(tmp_path / "out")) if one["end"] == "done"]
    assert read_constants([str(tmp_path / "out")])[0].ingest_cpu_s == pytest.approx(sum(spent) / left)


def test_a_kind_that_tells_nothing_is_refused(tmp_path: Path) -> None:
    writer = ArtifactWriter(Store(tmp_path), "study", "a" * 64, (), {})
    writer.commit([], {}, StudyMeta(title="", axes=()))
    with pytest.raises(InputError, match=r"is study, which tells no costs: name shards, a model, codes or an index"):
        read_constants([str(tmp_path)])
