"""The flow's own decisions: who plays which part, what is retried, what is reported. No server, no job."""

import re
import subprocess
import sys

import pytest

from flows.checks import assign_roles
from flows.pipeline import codes_name, settings_of, shorten_uri
from flows.reporting import artifact_key
from flows.stages import parse_settings, retry_if_it_may_heal
from flows.summary import StageLog, encode_rate, run_page, stage_rows
from pipelines.config.settings import Config, RunSettings
from pipelines.errors import ClusterUnavailable, ConfigError, HHNetError, InputError, StoreRefused, StoreUnavailable

SPLITS = {name: {"uri": f"/out/shards/{name}", "digest": name} for name in ("train", "query", "database")}


def roles(splits: dict[str, dict[str, str]] = SPLITS, **run: object) -> object:
    return assign_roles(RunSettings(**run), splits)  # type: ignore[arg-type]


def test_after_an_ingest_each_part_is_played_by_the_split_of_its_name() -> None:
    found = assign_roles(RunSettings(), SPLITS)
    assert (found.train, found.query, found.val) == ("/out/shards/train", "/out/shards/query", None)
    assert found.database == ("/out/shards/database",)
    assert found.all() == ["/out/shards/train", "/out/shards/query", "/out/shards/database"]


def test_a_split_can_play_two_parts_and_be_proved_once() -> None:
    run = RunSettings(query="database", database=("train", "s3://bucket/more"))
    found = assign_roles(run, SPLITS)
    assert found.query == "/out/shards/database"
    assert found.database == ("/out/shards/train", "s3://bucket/more")
    assert found.all() == ["/out/shards/train", "/out/shards/database", "s3://bucket/more"]


def test_codes_of_a_database_keep_their_name_whatever_else_is_in_it() -> None:
    assert codes_name(SPLITS["database"], SPLITS) == "database"
    assert codes_name(SPLITS["train"], SPLITS) == "database-train"
    tonight = {"uri": "s3://bucket/tonight", "digest": "0123456789abcdef"}
    assert codes_name(tonight, SPLITS) == codes_name(tonight, {}) == "database-0123456789ab"


def test_a_part_that_nothing_plays_is_bad_configuration() -> None:
    with pytest.raises(ConfigError, match=r"run\.query is not set.*splits are database, train"):
        roles({name: SPLITS[name] for name in ("train", "database")})
    with pytest.raises(ConfigError, match=r"run\.train is not set"):
        roles({}, query="q", database=("d",))


@pytest.mark.parametrize(
    ("error", "retried"),
    [
        (StoreUnavailable("x"), True),
        (ClusterUnavailable("x"), True),
        (StoreRefused("x"), False),
        (InputError("x"), False),
        (OSError("x"), False),
    ],
)
def test_only_what_is_out_of_reach_is_tried_again(
    error: Exception, retried: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    class State:
        data = error

    assert retry_if_it_may_heal(None, None, State()) is retried  # type: ignore[arg-type]
    assert ("trying again" in capsys.readouterr().err) is retried


def test_the_failure_of_a_submitted_job_is_retried_by_its_exit_code() -> None:
    class State:
        data = HHNetError("job: the store does not answer")

    State.data.exit_code = 3
    assert retry_if_it_may_heal(None, None, State())  # type: ignore[arg-type]


def test_parameters_are_validated_like_any_configuration() -> None:
    config = Config(run=RunSettings(database=("a", "b")))
    assert parse_settings(config.model_dump(mode="json")) == config
    with pytest.raises(ConfigError, match=r"train\.epochs"):
        parse_settings({"train": {"epochs": 0}})
    with pytest.raises(ConfigError, match="index kind 'hsnw' is unknown: did you mean hnsw"):
        parse_settings({"index": {"kind": "hsnw"}})


def result(verb: str, status: str = "done", **more: object) -> dict[str, object]:
    return {"verb": verb, "status": status, "uri": f"/out/{verb}", "digest": "d" * 64, **more}


REPORT = result("evaluate", map=0.8125, chance=0.1, convention="all", report="/out/report/report.html")


def test_a_run_is_unchanged_when_all_stages_but_the_proofs_are() -> None:
    def status(*stages: dict[str, object]) -> str:
        log = StageLog()
        for stage in stages:
            log.add(lambda name, stage=stage: stage, str(stage["verb"]))
        return log.summary(REPORT, "/out").status

    assert status(result("verify"), result("train", "unchanged"), result("encode query", "unchanged")) == "unchanged"
    assert status(result("verify"), result("train", "unchanged"), result("encode query")) == "done"


def test_the_rate_counts_images_and_not_stages() -> None:
    fast = result("encode query", samples=100, images_per_second=100.0)
    slow = result("encode database", samples=900, images_per_second=300.0)
    assert encode_rate([fast, slow, result("index")]) == 250.0
    assert encode_rate([result("index")]) is None


def test_the_page_names_every_stage_and_the_figures() -> None:
    log = StageLog()
    for name in ("ingest", "train", "encode query"):
        log.add(lambda name: result(name), name)
    page = run_page(log.stages, log.summary(REPORT, "/out"), {"report": "/out/report.html"})
    for expected in (
        "| ingest | done | `/out/ingest` | `dddddddddddd` |",
        "| train |",
        "0.8125",
        "0.1000",
        "- report: [/out/report.html](/out/report.html)",
    ):
        assert expected in page


def test_a_stage_that_failed_has_its_row_and_its_reason() -> None:
    log = StageLog()
    log.add(lambda name: result("train"), "train model")

    def fail(name: str) -> None:
        raise InputError("no images")

    with pytest.raises(InputError):
        log.add(fail, "encode query")
    rows = [(row["stage"], row["status"], row["detail"]) for row in stage_rows(log.stages)]
    assert rows == [("train model", "done", ""), ("encode query", "failed", "no images")]
    assert "**encode query failed:** no images" in run_page(log.stages, None, {})


def test_what_a_run_is_asked_lies_over_what_its_deployment_says() -> None:
    base = {"train": {"epochs": 20, "lr": 0.1}, "run": {"out": "/out", "database": ["a"]}}
    found = settings_of({"train": {"epochs": 3}}, ("train.epochs=2", "model.bits=32"), None, base)
    assert found == {
        "train": {"epochs": 2, "lr": 0.1},
        "run": {"out": "/out", "database": ["a"]},
        "model": {"bits": 32},
    }
    assert base["train"] == {"epochs": 20, "lr": 0.1}
    assert settings_of({"run": {"database": ["b"]}}, (), "/other", base)["run"] == {"out": "/other", "database": ["b"]}
    assert settings_of(sets=("train.recipe=plain",))["train"] == {"recipe": "plain"}


def test_every_stage_has_one_artifact_key_that_prefect_takes() -> None:
    assert artifact_key("encode query") == "hhnet-encode-query"
    assert artifact_key("verify shards/train") == "hhnet-verify-shards-train"
    odd = [artifact_key(f"encode {name}") for name in ("Query 1", "query.1", "query 1", "Ünïcode", "---")]
    assert len(set(odd)) == len(odd)
    for key in odd:
        assert set(key) <= set("abcdefghijklmnopqrstuvwxyz0123456789-") and "--" not in key


def test_an_artifact_is_named_by_its_last_two_parts() -> None:
    assert shorten_uri("s3://bucket/photos/shards/train") == "shards/train"
    assert shorten_uri("/data/shards/") == "data/shards"


def test_the_verbs_are_imported_without_prefect_torch_or_ray() -> None:
    code = (
        "import sys, flows.verbs, flows.server, flows.deploy, flows.lifeline; "
        "print([m for m in ('prefect', 'torch', 'ray', 'faiss', 'pyarrow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_run_ends_with_a_table_of_its_stages() -> None:
    log = StageLog()
    log.add(lambda name: result("ingest", samples=6000, splits={"train": {"uri": "x"}}), "ingest shards")
    log.add(lambda name: result("train", map=0.5, uri="/out/model"), "train model")
    text = log.summary(REPORT, "/out").as_text()
    head, table = text.split("\n\n")
    assert "mAP" in head and "stages" not in head
    heading, *rows = [re.split(r"  +", line.strip()) for line in table.splitlines()]
    assert heading == ["stage", "status", "figures", "time", "uri"]
    assert [(row[0], row[1], row[2], row[-1]) for row in rows] == [
        ("ingest shards", "done", "samples 6,000", "ingest"),
        ("train model", "done", "mAP 0.5000", "model"),
    ]
    assert not set("{}'[]") & set(text)
