"""The planner: what it predicts of bytes, what it chooses and refuses, and that the choice is remembered. No times."""

import json
from collections.abc import Callable, Sequence
from math import log
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.artifacts.manifest import open_artifact
from pipelines.artifacts.result import Result
from pipelines.artifacts.runs import closed_records
from pipelines.cli.index import BuildFlags, index_build_command
from pipelines.config.loading import load_config
from pipelines.config.settings import Config, IndexSettings
from pipelines.errors import ConfigError, FingerprintMismatch, UsageError, WorkFailed
from pipelines.index.build import build_index
from pipelines.index.kinds import kind_names
from pipelines.index.planner import Plan, Prediction, choose_kind, interpolate, predict_kinds
from pipelines.storage import Store
from tests.support.codes import Rows, class_codes, random_codes, simple_rows, write_codes
from tests.support.inline import InlinePool

AUTO = ("index.kind=auto", "index.workers=1")


def settings(*sets: str) -> Config:
    return load_config(sets=[*AUTO, *sets])


def some_codes(root: Path, name: str = "codes") -> str:
    return write_codes(root / name, {f"x-{n:06d}.tar": simple_rows(f"x{n}", 60, seed=n) for n in range(3)}).uri


# --------------------------------------------------------------------------------------------------------- choice

MIB = 1 << 20
FIGURES = (
    Prediction("flat", True, 100 * MIB, 1.0, 0.010, 1.0, 1.0),
    Prediction("multihash", True, 250 * MIB, 9.0, 0.004, 1.0, 1.0),
    Prediction("ivf", False, 101 * MIB, 20.0, 0.001, 0.97, 1.0),
    Prediction("hnsw", False, 1800 * MIB, 90.0, 0.0005, 0.99, 1.0),
)


@pytest.mark.parametrize(
    ("asked", "kind"),
    [
        ({}, "flat"),
        ({"memory": "4GiB", "latency": "10ms"}, "flat"),
        ({"latency": "5ms"}, "multihash"),
        ({"latency": "5ms", "memory": "200MiB"}, "ivf"),
        ({"latency": "2ms"}, "ivf"),
        ({"latency": "2ms", "recall": 0.98, "memory": "4GiB"}, "hnsw"),
        ({"latency": "0.6ms", "memory": "4GiB"}, "hnsw"),
    ],
)
def test_exact_kinds_win_then_small_ones_of_those_within_the_budget(asked: dict[str, Any], kind: str) -> None:
    for figures in (FIGURES, FIGURES[::-1]):
        assert choose_kind(figures, IndexSettings.model_validate(asked))[0] == kind


def test_why_names_what_was_passed_over_with_its_figure() -> None:
    _, why = choose_kind(FIGURES, IndexSettings.model_validate({"latency": "2ms"}))
    assert why == (
        "ivf is approximate and keeps within the budget; flat not: 10 ms are longer than 2 ms; "
        "multihash not: 4 ms are longer than 2 ms"
    )


@pytest.mark.parametrize(
    ("asked", "complaint"),
    [
        ({"memory": "50MiB"}, r"flat not: 100.0MiB are more than 50.0MiB; .*hnsw not: 1.8GiB are more than 50.0MiB"),
        ({"latency": "2ms", "recall": 0.98}, r"ivf not: recall 0.970 is below 0.98; hnsw not: 1.8GiB without --memory"),
        ({"latency": "1e0ms"}, None),
        ({"latency": "0.1ms", "memory": "4GiB"}, r"flat not: 10 ms are longer than 100 us; .*hnsw not: 500 us are"),
    ],
)
def test_what_cannot_be_is_refused_with_all_figures(asked: dict[str, Any], complaint: str | None) -> None:
    if complaint is None:
        with pytest.raises(ConfigError, match=r"index.latency = '1e0ms': write a number and ms, s, m, h or d"):
            load_config(sets=[f"index.latency={asked['latency']}"])
        return
    with pytest.raises(ConfigError, match=f"no kind of index keeps within the budget: .*{complaint}") as refusal:
        choose_kind(FIGURES, IndexSettings.model_validate(asked))
    assert refusal.value.exit_code == 2 and "raise --memory or --latency" in str(refusal.value)


def test_what_the_gate_would_refuse_is_not_chosen() -> None:
    broken = Prediction("hnsw", False, MIB, 1.0, 1e-4, 0.99, 0.4)
    asked = IndexSettings.model_validate({"memory": "4GiB", "latency": "1ms"})
    with pytest.raises(ConfigError, match=r"hnsw not: self-recall 0\.400 is below the gate's 1"):
        choose_kind([*FIGURES[:2], broken], asked)


# ----------------------------------------------------------------------------------------------------- prediction


def equals(count: int, seed: int) -> Any:
    """Codes of three classes, most of them equal."""
    return class_codes([number % 3 for number in range(count)], flip=0.002, seed=seed)


@pytest.mark.parametrize("draw", [random_codes, equals], ids=["uniform", "duplicated"])
def test_the_predicted_bytes_are_those_that_are_built(
    tmp_path: Path, pool: InlinePool, draw: Callable[..., Any]
) -> None:
    sizes = (1500, 1500, 700)
    contents = {
        f"x-{n:06d}.tar": Rows([f"{n}/{i}" for i in range(size)], draw(size, seed=n), [[0]] * size)
        for n, size in enumerate(sizes)
    }
    uri = write_codes(tmp_path / "codes", contents).uri
    config = settings("index.part_codes=1", "index.gate.min_self_recall=0", "index.gate.min_recall=0", "index.nprobe=4")
    sample = np.concatenate([rows.codes for rows in contents.values()])
    sample = sample[np.random.default_rng(0).permutation(len(sample))]
    predictions = predict_kinds(sample, sizes, config)
    assert {entry.kind for entry in predictions} == set(kind_names())
    for entry in predictions:
        named = config.model_copy(update={"index": config.index.model_copy(update={"kind": entry.kind})})
        parts = open_artifact(build_index([uri], str(tmp_path / entry.kind), named, pool=pool).uri).manifest.parts
        built = sum(part.bytes for part in parts if part.name.startswith("part-"))
        assert entry.bytes == pytest.approx(built, rel=0.03), entry.kind
        assert entry.build_s > 0 < entry.query_s
        assert entry.recall == 1.0 if entry.exact else 0 < entry.recall <= 1.0


def test_more_codes_than_were_tried_follow_the_growth_of_the_work() -> None:
    scan = [(1000, 11.0), (4000, 14.0)]
    assert interpolate(scan, 2500, float) == pytest.approx(12.5)
    assert interpolate(scan, 101_000, float) == pytest.approx(111.0)
    assert interpolate(scan, 10, float) == 11.0 and interpolate(scan[:1], 10, float) == 11.0
    assert interpolate(scan, 16_000, log) == pytest.approx(17.0)
    recall = [(1000, 0.9), (4000, 0.8)]
    assert interpolate(recall, 16_000, log, falls=True) == pytest.approx(0.7)
    assert interpolate(recall, 16_000, log) == interpolate([(1000, 0.5), (4000, 0.8)], 16_000, log, falls=True) == 0.8


@pytest.mark.parametrize("count", [1, 3, 130])
def test_few_codes_are_enough(tmp_path: Path, pool: InlinePool, count: int) -> None:
    uri = write_codes(tmp_path / "codes", {"x-000000.tar": simple_rows("x", count)}).uri
    assert build_index([uri], str(tmp_path / "index"), settings(), pool=pool).kind == "flat"


def test_as_many_lists_as_codes_can_be_tried_although_some_codes_are_queries(tmp_path: Path, pool: InlinePool) -> None:
    uri = write_codes(tmp_path / "codes", {"x-000000.tar": simple_rows("x", 100)}).uri
    assert build_index([uri], str(tmp_path / "index"), settings("index.nlist=100"), pool=pool).kind == "flat"


# --------------------------------------------------------------------------------------------------- the same kind


def choosing(kind: str) -> Callable[..., Plan]:
    return lambda tasks, config: Plan(kind, "as the test asks", FIGURES, {"codes": 1})


def asked_again(*_: object) -> Plan:
    raise AssertionError("a second run plans anew")


def test_auto_makes_what_the_chosen_kind_makes_by_name(tmp_path: Path, pool: InlinePool, capsys: Any) -> None:
    uri = some_codes(tmp_path)
    auto = build_index([uri], str(tmp_path / "auto"), settings(), pool=pool).as_json()
    table = capsys.readouterr().err
    assert (
        all(kind in table for kind in kind_names()) and "180 codes in 1 part; of 180" in table and "recall@10" in table
    )
    named = build_index([uri], str(tmp_path / "named"), settings("index.kind=flat"), pool=pool).as_json()
    assert (auto["kind"], auto["digest"]) == ("flat", named["digest"])
    assert auto["why"].startswith("flat is exact") and {entry["kind"] for entry in auto["kinds"]} == set(kind_names())
    records = closed_records(Store(tmp_path / "auto"))
    (record,) = (record for record in records if record["verb"] == "index plan")
    assert record["kinds"] == auto["kinds"] and record["sample"]["codes"] == 180 and record["machine"]["cpus"] >= 1


@pytest.mark.parametrize("kind", ["multihash", "ivf", "hnsw"])
def test_a_rerun_stays_with_the_kind_that_was_chosen(tmp_path: Path, pool: InlinePool, kind: str) -> None:
    """As `hhnet run` does: built unpublished, then published by a second call."""
    uri, out = some_codes(tmp_path), str(tmp_path / "index")
    first = build_index(
        [uri], out, settings("index.latency=3ms"), publish=False, pool=pool, plan=choosing(kind)
    ).as_json()
    second = build_index([uri], out, settings("index.memory=1KiB"), pool=pool, plan=asked_again).as_json()
    assert (second["status"], second["kind"], second["version"]) == ("done", kind, 1)
    assert second["digest"] == first["digest"]
    (tmp_path / "index/identity.json").unlink()
    assert build_index([uri], out, settings(), pool=pool, plan=asked_again).digest == first["digest"]
    assert build_index([uri], out, settings(f"index.kind={kind}"), pool=pool, plan=asked_again).status == "unchanged"


def test_a_build_broken_off_after_the_choice_goes_on_with_it(tmp_path: Path, pool: InlinePool) -> None:
    uri, out = some_codes(tmp_path), str(tmp_path / "index")
    pool.fatal = lambda task: True
    with pytest.raises(WorkFailed, match="run again to resume"):
        build_index([uri], out, settings(), pool=pool, plan=choosing("multihash"))
    pool.fatal = lambda task: False
    assert build_index([uri], out, settings(), pool=pool, plan=asked_again).kind == "multihash"


def test_of_two_runs_that_choose_otherwise_the_first_wins(tmp_path: Path, pool: InlinePool) -> None:
    uri, out = some_codes(tmp_path), str(tmp_path / "index")

    def overtaken(tasks: Sequence[Any], config: Config) -> Plan:
        build_index([uri], out, settings("index.kind=multihash"), pool=pool)
        return choosing("flat")(tasks, config)

    result = build_index([uri], out, settings(), pool=pool, plan=overtaken).as_json()
    assert (result["kind"], result["status"]) == ("multihash", "unchanged")


def test_a_root_of_other_codes_is_refused_before_anything_is_tried(tmp_path: Path, pool: InlinePool) -> None:
    build_index([some_codes(tmp_path)], str(tmp_path / "index"), settings("index.kind=flat"), pool=pool)
    other = write_codes(tmp_path / "other", {"y-000000.tar": simple_rows("y", 9)}).uri
    with pytest.raises(FingerprintMismatch, match=r"codes-0 = \S+/codes there, \S+/other here.*: choose another --out"):
        build_index([other], str(tmp_path / "index"), settings(), pool=pool, plan=asked_again)


# --------------------------------------------------------------------------------------------- nothing is written


def dry_run(uri: str, folder: Path, **flags: Any) -> Result:
    asked = BuildFlags(codes=[uri], out=str(folder / "index"), kind="auto", dry_run=True, **flags)
    return index_build_command(asked, load_config(flags=asked.settings()))


def test_a_dry_run_shows_the_figures_and_writes_nothing(tmp_path: Path, pool: InlinePool, capsys: Any) -> None:
    uri = some_codes(tmp_path)
    result = dry_run(uri, tmp_path, memory="4GiB", latency="1h").as_json()
    assert (result["status"], result["kind"], result["digest"], result["begun_as"]) == ("planned", "flat", None, None)
    assert len(result["kinds"]) == len(kind_names()) and json.dumps(result)
    assert "hnsw" in capsys.readouterr().err and not (tmp_path / "index").exists() and pool.done == []
    build_index([uri], str(tmp_path / "index"), settings("index.kind=ivf"), pool=pool)
    again = dry_run(uri, tmp_path).as_json()
    assert (again["kind"], again["begun_as"]) == ("flat", "ivf")


def test_what_cannot_fit_is_refused_before_anything_is_written(tmp_path: Path, pool: InlinePool, capsys: Any) -> None:
    with pytest.raises(ConfigError, match=r"flat not: 2.8KiB are more than 1.0KiB"):
        build_index([some_codes(tmp_path)], str(tmp_path / "index"), settings("index.memory=1KiB"), pool=pool)
    assert "2.8KiB are more than 1.0KiB" in capsys.readouterr().err and not (tmp_path / "index").exists()


@pytest.mark.parametrize("flag", [{"memory": "4GiB"}, {"latency": "5ms"}, {"recall": 0.9}, {"dry_run": True}])
def test_a_budget_without_auto_is_a_usage_error(flag: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="add --kind auto"):
        index_build_command(BuildFlags(codes=["codes"], out="index", **flag), load_config())


def test_sizes_and_times_are_read_with_clear_errors() -> None:
    index = load_config(sets=["index.memory=4GiB", "index.latency=5ms"]).index
    assert (index.memory, index.latency) == (4 << 30, 0.005)
    for text, complaint in (
        ("index.memory=4 parsecs", "index.memory = '4 parsecs': could not interpret byte unit: parsecs"),
        ("index.memory=0", "index.memory = 0: Input should be greater than 0"),
        ("index.latency=5 parsecs", "index.latency = '5 parsecs': write a number and ms, s, m, h or d"),
    ):
        with pytest.raises(ConfigError, match=complaint):
            load_config(sets=[text])
