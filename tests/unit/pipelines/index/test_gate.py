"""The gate: what it measures, what it refuses, and where the figures are kept."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from hhnet import hamming_distances
from pipelines.artifacts.commit import list_versions
from pipelines.artifacts.manifest import Artifact, open_artifact
from pipelines.config.loading import load_config
from pipelines.config.settings import Config, GateSettings
from pipelines.errors import ConfigError, WorkFailed
from pipelines.index import gate
from pipelines.index.build import build_index
from pipelines.index.gate import probe_index
from pipelines.index.kinds.flat import FlatKind, FlatSearcher
from pipelines.index.layout import IndexedPart
from pipelines.index.reader import IndexReader, open_index
from pipelines.search.search import search
from pipelines.storage import Store
from tests.support.codes import Rows, random_codes, simple_rows, write_codes
from tests.support.inline import InlinePool
from tests.support.runs import run_record


def settings(*sets: str) -> Config:
    return load_config(sets=["index.workers=1", *sets])


def build(root: Path, *sets: str, rows: dict[str, Rows] | None = None, publish: bool = True) -> dict[str, Any]:
    contents = rows or {f"x-{n:06d}.tar": simple_rows(f"x{n}", 80, seed=n, flip=0.2) for n in range(3)}
    uri = write_codes(root / "codes", contents).uri
    return build_index([uri], str(root / "index"), settings(*sets), publish=publish, pool=InlinePool()).as_json()


IVF = ("index.kind='ivf'", "index.nlist=12", "index.nprobe=1")


def test_the_recalls_are_those_of_a_scan(tmp_path: Path) -> None:
    """Every code is a probe here, so an independent computation has the same."""
    gate_settings = GateSettings(probes=240, k=7, radius=20)
    index = build(tmp_path, *IVF, "index.gate.min_recall=0", "index.gate.min_recall_within=0")["uri"]
    with open_index(index) as reader:
        figures = probe_index(reader, gate_settings, seed=3)
        codes = np.concatenate([all_codes(reader, part) for part in reader.searched()])
        distances, _ = reader.search(codes, 7)
        parts = [reader.open_part(part) for part in reader.searched()]
        found = sum(int(part.range_search(codes, 20)[0][-1]) for part in parts)
    exact = hamming_distances(codes, codes)
    kth = np.sort(exact, axis=1)[:, 6:7]
    assert figures.recall == pytest.approx((distances <= kth).mean())
    assert figures.recall_within == pytest.approx(found / (exact <= 20).sum())
    assert 0 < figures.recall < 1 and 0 < figures.recall_within < 1 == figures.self_recall
    assert (figures.wrong, figures.duplicates, figures.opened, figures.codes) == (0, 0, 240, 240)
    assert 0 < figures.p50_ms <= figures.p99_ms


def all_codes(reader: IndexReader, part: IndexedPart) -> Any:
    return np.array([list(code) for code in reader.read_keys(part, ["code"])["code"].to_pylist()], np.uint8)


def test_what_is_below_a_threshold_is_refused_with_the_figures(tmp_path: Path) -> None:
    with pytest.raises(WorkFailed) as refusal:
        build(tmp_path, *IVF, "index.gate.min_recall=0.999", "index.gate.k=20")
    text = str(refusal.value)
    recall = open_artifact(str(tmp_path / "index")).manifest.meta["card"]["recall"]
    assert f"not published: recall {recall:.6g} is below 0.999" in text
    assert f"recall@20 {recall:.6g}" in text and "p50" in text and "p99" in text
    assert list_versions(Store(tmp_path / "index")) == []
    assert build(tmp_path, *IVF, "index.gate.min_recall=0.1", "index.gate.k=20")["version"] == 1


def test_a_figure_just_below_its_threshold_is_not_shown_as_if_it_reached_it() -> None:
    low = gate.GateFigures(True, 10, 2, 10, 10, 0.99999, 0.99998, 0.99997, 0, 0, 1.0, 1.0)
    with pytest.raises(WorkFailed) as refusal:
        gate.require_limits(low, GateSettings(), "index")
    text = str(refusal.value)
    assert "self_recall 0.99999 is below 1" in text and "recall 0.99998 is below 1" in text
    assert "self-recall 0.99999, recall@10 0.99998, recall within 2 bits 0.99997," in text


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        ("index.gate.max_p99_ms=1e-9", r"p99_ms .* is above 1e-09"),
        ("index.gate.max_p50_ms=1e-9", r"p50_ms .* is above 1e-09"),
    ],
)
def test_a_time_limit_refuses_what_is_slower(tmp_path: Path, setting: str, complaint: str) -> None:
    with pytest.raises(WorkFailed, match=complaint):
        build(tmp_path, setting)


def test_an_exact_kind_must_find_everything_whatever_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(self: FlatSearcher, queries: Any, k: int) -> Any:
        distances, ids = search_all(self, queries, k + 1)
        return np.delete(distances, 1, axis=1), np.delete(ids, 1, axis=1)

    search_all = FlatSearcher.search
    monkeypatch.setattr(FlatSearcher, "search", forgetful)
    with pytest.raises(WorkFailed, match=r"recall 0\.\d+ is below 1"):
        build(tmp_path, "index.gate.min_recall=0")


@pytest.mark.parametrize("places", [(0, 1), (57, 58)])
def test_an_id_twice_is_refused_wherever_it_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, places: tuple[int, int]
) -> None:
    def twice(self: FlatKind, codes: Any, ids: Any, shared: bytes | None, parameters: Any) -> bytes:
        codes, ids = codes.copy(), ids.copy()
        codes[places[1]], ids[places[1]] = codes[places[0]], ids[places[0]]
        return bytes(safetensors.numpy.save({"codes": codes, "ids": ids}))

    monkeypatch.setattr(FlatKind, "build", twice)
    with pytest.raises(WorkFailed, match=r"[1-9]\d* ids come twice"):
        build(tmp_path, "index.gate.probes=3")


def test_a_code_under_anothers_id_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = FlatKind.build

    def swapped(self: FlatKind, codes: Any, ids: Any, shared: bytes | None, parameters: Any) -> bytes:
        codes = codes.copy()
        codes[[40, 41]] = codes[[41, 40]]
        return original(self, codes, ids, shared, parameters)

    monkeypatch.setattr(FlatKind, "build", swapped)
    with pytest.raises(WorkFailed, match=r"[1-9]\d* answers are not what their codes say"):
        build(tmp_path, "index.gate.probes=3")


def test_totals_that_promise_more_than_the_parts_hold_are_refused(tmp_path: Path) -> None:
    index = build(tmp_path)["uri"]
    artifact = open_artifact(index)
    manifest = artifact.manifest.model_copy(update={"totals": {"codes": 300, "shards": 3}})
    figures = probe_index(IndexReader(Artifact(artifact.store, manifest), tmp_path), GateSettings(), 0)
    with pytest.raises(WorkFailed, match="240 codes of 300 opened"):
        gate.require_limits(figures, GateSettings(), index)


def test_the_card_keeps_the_recalls_and_the_run_record_the_times(tmp_path: Path) -> None:
    result = build(tmp_path)
    assert set(result["card"]) == {
        *("count", "bytes_per_code", "recall", "recall_at", "self_recall", "recall_within", "radius")
    }
    record = run_record(result["uri"])
    assert record["verb"] == "index build" and record["digest"] == result["digest"]
    assert 0 < record["gate"]["p50_ms"] <= record["gate"]["p99_ms"] and record["machine"]["cpus"] >= 1
    assert record["gate"]["recall"] == 1.0 and record["asked"]["min_self_recall"] == 1.0


@pytest.mark.parametrize("kind", [(), IVF], ids=["flat", "ivf"])
def test_equal_codes_and_fewer_codes_than_k_pass(tmp_path: Path, kind: tuple[str, ...]) -> None:
    kind = tuple(setting.replace("12", "1") for setting in kind)
    equal = Rows([f"k{n}" for n in range(50)], np.repeat(random_codes(1), 50, axis=0), [[0]] * 50)
    result = build(tmp_path / "equal", *kind, rows={"x-000000.tar": equal})
    assert (result["version"], result["card"]["recall"], result["card"]["recall_within"]) == (1, 1.0, 1.0)
    few = {"x-000000.tar": simple_rows("x", 2), "x-000001.tar": simple_rows("y", 1)}
    result = build(tmp_path / "few", *kind, rows=few)
    assert (result["version"], result["card"]["recall"]) == (1, 1.0)
    (answer,) = search(result["uri"], settings(), keys=["x/00000"], k=10).results
    assert len(answer["neighbours"]) == 3


def test_a_misspelt_threshold_names_the_right_one() -> None:
    with pytest.raises(ConfigError, match=r"setting index.gate.min_recal: did you mean index.gate.min_recall\?"):
        load_config(sets=["index.gate.min_recal=0.9"])
    with pytest.raises(ConfigError, match=r"index.gate.min_recall = 2"):
        load_config(sets=["index.gate.min_recall=2"])
