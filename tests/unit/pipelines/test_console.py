"""What is logged on stderr: today's lines by default, retries from `info` on, and JSON with the fields."""

import asyncio
import json
import logging
import subprocess
import sys
from collections.abc import Iterator

import pytest

from pipelines.console import show_log
from pipelines.storage.clock import Clock, Transient


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
