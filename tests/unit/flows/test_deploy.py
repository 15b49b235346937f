"""`python -m flows.deploy` refuses what it cannot serve, with the exit codes of every verb."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def deploy(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "RAY_"))}
    command = [sys.executable, "-m", "flows.deploy", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=clean | env, timeout=120)


@pytest.fixture
def config(tmp_path: Path) -> str:
    (tmp_path / "c.toml").write_text("[run]\nout = 'out'\n")
    return str(tmp_path / "c.toml")


def test_without_a_server_it_says_which_variable_is_missing(config: str) -> None:
    done = deploy("--config", config, "--cron", "0 2 * * *", PREFECT_HOME=str(Path(config).parent))
    assert done.returncode == 2
    assert done.stderr.startswith("flows.deploy: PREFECT_API_URL is not set") and done.stderr.count("\n") == 1


def test_a_configuration_that_does_not_exist_is_bad_usage(tmp_path: Path) -> None:
    done = deploy("--config", str(tmp_path / "none.toml"), PREFECT_API_URL="http://127.0.0.1:9/api")
    assert done.returncode == 2
    assert "none.toml does not exist" in done.stderr


def test_a_server_that_nobody_runs_is_out_of_reach(config: str, tmp_path: Path) -> None:
    done = deploy("--config", config, PREFECT_API_URL="http://127.0.0.1:9/api", PREFECT_HOME=str(tmp_path / "home"))
    assert done.returncode == 3, done.stderr
    assert (
        done.stderr.startswith("flows.deploy: cannot reach Prefect at http://127.0.0.1:9/api")
        and done.stderr.count("\n") == 1
    )


@pytest.mark.parametrize(
    ("env", "reason"),
    [
        ({"PREFECT_API_URL": "http://prefect:4200/api"}, "without a password: set PREFECT_API_AUTH_STRING"),
        (
            {"PREFECT_API_URL": "http://127.0.0.1:9/api", "RAY_ADDRESS": "http://ray-head:8265"},
            "without a token: set RAY_AUTH_MODE=token",
        ),
        ({"PREFECT_API_URL": "http://user:secret@127.0.0.1:9/api"}, "must not carry credentials"),
        (
            {"PREFECT_API_URL": "http://127.0.0.1:9/api", "RAY_ADDRESS": "http://user:secret@ray-head:8265"},
            "must not carry credentials",
        ),
    ],
)
def test_servers_elsewhere_are_not_spoken_to_without_authentication(
    config: str, env: dict[str, str], reason: str
) -> None:
    done = deploy("--config", config, **env)
    assert done.returncode == 2
    assert done.stderr.startswith("flows.deploy: ") and done.stderr.count("\n") == 1
    assert reason in done.stderr and "secret" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--cron", "0 25 * * *"], "--cron '0 25 * * *': '25' is not a valid hour"),
        (["--cron", "0 2 * * * *"], "has 6 fields instead of five"),
        (["--cron", "0 2 * * mon-sunday"], "'mon-sunday' is not a valid day of the week"),
        (["--timezone", "Europe/Atlantis", "--cron", "0 2 * * *"], "--timezone 'Europe/Atlantis' is not a time zone"),
        (["--interval", "1h", "--cron", "0 2 * * *"], "--cron and --interval are two ways to set the schedule"),
        (["--interval", "soon"], "--interval 'soon': write a number and"),
        (["--interval", "10s"], "--interval '10s' is shorter than 60 s: give at least that"),
        (["--lost-after", "10s"], "--lost-after '10s' is shorter than 90 s: give at least that"),
        (["--name", "a/b"], "--name 'a/b' holds /"),
        (["--name", " "], "--name ' ' is empty"),
        (["--tag", "50%"], "--tag '50%' holds %"),
    ],
)
def test_schedules_and_names_that_prefect_refuses_are_refused_at_once(
    config: str, arguments: list[str], reason: str
) -> None:
    done = deploy("--config", config, *arguments, PREFECT_API_URL="http://127.0.0.1:9/api")
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("flows.deploy: ") and done.stderr.count("\n") == 1
    assert reason in done.stderr


def test_parameters_that_the_server_keeps_hold_no_secret(config: str) -> None:
    done = deploy("--config", config, "--out", "s3://key:secret@bucket/x", PREFECT_API_URL="http://127.0.0.1:9/api")
    assert (done.returncode, "secret" in done.stderr) == (2, False)
    assert "must not carry credentials" in done.stderr
