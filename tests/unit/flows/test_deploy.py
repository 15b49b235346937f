"""`python -m flows.deploy` refuses what it cannot serve, with the exit codes of every verb."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def deploy(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    command = [sys.executable, "-m", "flows.deploy", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=clean | env, timeout=120)


@pytest.fixture
def config(tmp_path: Path) -> str:
    (tmp_path / "c.toml").write_text("[run]\nout = 'out'\n")
    return str(tmp_path / "c.toml")


def test_without_a_server_it_says_which_variable_is_missing(config: str) -> None:
    done = deploy("--config", config, "--cron", "0 2 * * *")
    assert done.returncode == 2
    assert done.stderr.startswith("flows.deploy: PREFECT_API_URL is not set") and done.stderr.count("\n") == 1


def test_a_configuration_that_does_not_exist_is_bad_usage(tmp_path: Path) -> None:
    done = deploy("--config", str(tmp_path / "none.toml"), PREFECT_API_URL="http://127.0.0.1:9/api")
    assert done.returncode == 2
    assert "none.toml does not exist" in done.stderr


def test_a_server_that_nobody_runs_is_out_of_reach(config: str, tmp_path: Path) -> None:
    done = deploy("--config", config, PREFECT_API_URL="http://127.0.0.1:9/api", PREFECT_HOME=str(tmp_path / "home"))
    assert done.returncode == 3, done.stderr
    assert done.stderr.splitlines()[-1].startswith("flows.deploy: cannot serve at http://127.0.0.1:9/api")
