"""What is logged on stderr: today's lines by default, retries from `info` on, and JSON with the fields."""

import asyncio
import json
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.cluster.progress import stage
from pipelines.console import log_variables, logged_in_worker, relay, show_log
from pipelines.storage.clock import Clock, Transient
from tests.support.pictures import write_folder


@pytest.fixture(autouse=True)
def usual_log() -> Iterator[None]:
    yield
    show_log()


async def fails_once(clock: Clock) -> str:
    answers = [Transient("503 SlowDown"), None]

    async def call() -> str:
        if (problem := answers.pop(0)) is not None:
            raise problem
        return "bytes"

    return await clock.persist(call)


def lines_of_a_retry(capsys: pytest.CaptureFixture[str]) -> list[str]:
    assert asyncio.run(fails_once(Clock("read s3://b/part", 60))) == "bytes"
    return capsys.readouterr().err.splitlines()


def test_a_retry_of_the_store_is_logged_once_with_its_fields(capsys: pytest.CaptureFixture[str]) -> None:
    assert lines_of_a_retry(capsys) == []
    show_log("info")
    assert lines_of_a_retry(capsys) == ["hhnet: cannot read s3://b/part: 503 SlowDown; trying again"]
    show_log("info", as_json=True)
    (line,) = map(json.loads, lines_of_a_retry(capsys))
    assert line.pop("time").endswith("Z")
    assert line == {
        **{"level": "info", "logger": "pipelines.storage.clock", "tries": 1},
        "message": "cannot read s3://b/part: 503 SlowDown; trying again",
    }


def test_a_retry_in_a_worker_names_worker_and_shard(capsys: pytest.CaptureFixture[str]) -> None:
    show_log("info", as_json=True)
    with logged_in_worker("a-000001.tar"):
        (line,) = map(json.loads, lines_of_a_retry(capsys))
    assert (line["shard"], line["worker"]) == ("a-000001.tar", f"{socket.gethostname()}:{os.getpid()}")
    (line,) = map(json.loads, lines_of_a_retry(capsys))
    assert "shard" not in line and "worker" not in line


def test_fields_that_are_no_json_are_shown_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    show_log("info", as_json=True)
    logging.getLogger("flows.stages").info("two\nlines", extra={"shard": "a.tar", "worker": object})
    (line,) = map(json.loads, capsys.readouterr().err.splitlines())
    assert (line["message"], line["shard"], line["worker"]) == ("two\nlines", "a.tar", "<class 'object'>")


def test_the_command_line_logs_its_error_in_the_form_asked_for(tmp_path: object) -> None:
    command = [sys.executable, "-m", "pipelines", "verify", f"{tmp_path}/none"]
    plain = subprocess.run(command, capture_output=True, text=True)
    asked = subprocess.run([*command, "--log-json", "--log-level", "error"], capture_output=True, text=True)
    line = json.loads(asked.stderr)
    assert (plain.returncode, asked.returncode) == (2, 2)
    assert plain.stderr == f"hhnet: {line['message']}\n" and line["level"] == "error"
    wrong = subprocess.run([*command, "--log-level", "loud"], capture_output=True, text=True)
    assert wrong.returncode == 2 and "debug" in wrong.stderr


def shown(capsys: pytest.CaptureFixture[str]) -> list[str]:
    log = logging.getLogger("pipelines.some.module")
    log.debug("one")
    log.info("two")
    log.warning("three")
    with stage("encode", 1) as advance:
        advance()
    log.error("five")
    return capsys.readouterr().err.splitlines()


def test_each_level_shows_what_is_above_it_and_error_leaves_errors_alone(capsys: pytest.CaptureFixture[str]) -> None:
    progress = "encode: 1/1 items in 0 s"
    whole = ["hhnet: one", "hhnet: two", "hhnet: three", progress, "hhnet: five"]
    for level, left_out in (("debug", 0), ("info", 1), ("warning", 2)):
        show_log(level)  # type: ignore[arg-type]
        assert shown(capsys) == whole[left_out:]
    show_log("error")
    assert shown(capsys) == ["hhnet: five"]


def test_progress_is_a_record_with_its_figures(capsys: pytest.CaptureFixture[str]) -> None:
    show_log(as_json=True)
    with stage("encode", 4, "images") as advance:
        advance(4, "fast")
    (line,) = map(json.loads, capsys.readouterr().err.splitlines())
    facts = {"stage": "encode", "done": 4, "total": 4, "unit": "images", "left_s": None, "note": "fast"}
    assert facts.items() <= line.items() and line["level"] == "notice"
    assert line["rate"] > 0 and line["seconds"] >= 0


def test_a_line_of_another_process_stays_as_it_is_or_becomes_a_record(capsys: pytest.CaptureFixture[str]) -> None:
    log = logging.getLogger("pipelines.cluster.jobs")
    lines = ["Running entrypoint", '{"logger": "pipelines", "message": "done"}', "[]", '{"verb": "liar"}']
    for line in lines:
        relay(line, log, job="hhnet-1")
    assert capsys.readouterr().err.splitlines() == lines
    show_log(as_json=True)
    for line in lines:
        relay(line, log, job="hhnet-1")
    entrypoint, done, *others = map(json.loads, capsys.readouterr().err.splitlines())
    assert (entrypoint["message"], entrypoint["job"]) == ("Running entrypoint", "hhnet-1")
    assert done == {"logger": "pipelines", "message": "done"}
    assert [other["message"] for other in others] == lines[2:]


def test_another_process_can_be_told_to_log_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    assert log_variables() == {}
    show_log("debug", as_json=True)
    told = log_variables()
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    show_log()
    assert told == log_variables() == {"HHNET_LOG_LEVEL": "debug", "HHNET_LOG_JSON": "1"}
    monkeypatch.setenv("HHNET_LOG_LEVEL", "loud")
    show_log(as_json=False)
    assert log_variables() == {}


def test_a_warning_of_python_is_a_record_too() -> None:
    program = "import warnings; from pipelines.console import show_log; show_log(as_json=True); warnings.warn('slow')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    (line,) = map(json.loads, done.stderr.splitlines())
    assert "UserWarning: slow" in line["message"] and line["level"] == "warning"


def test_every_line_of_a_verb_is_json_if_asked_for(tmp_path: Path) -> None:
    write_folder(tmp_path / "photos", classes=2, per_class=3)
    (tmp_path / "photos" / "class_00" / "notes.txt").write_text("no picture")
    command = [sys.executable, "-m", "pipelines", "ingest", str(tmp_path / "photos")]
    command += ["--out", str(tmp_path / "shards"), "--log-level", "debug", "--log-json"]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert done.returncode == 0
    assert [(line["path"], line["reason"]) for line in lines if "skipped" in line["message"]] == [
        ("class_00/notes.txt", "wrong_suffix")
    ]
    assert [(line["stage"], line["done"]) for line in lines if "stage" in line][-1][1] == 6
