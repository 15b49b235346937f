"""A cluster begun with `ray start --head` and token authentication takes the verbs as jobs."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.conftest import SETTINGS
from tests.integration.test_encode import tree

BIN = Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def environment(**more: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "COV_"))}
    return {**kept, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "RAY_USAGE_STATS_ENABLED": "0", **more}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Environment of a client of a one-node cluster; its dashboard's address is in TEST_ADDRESS."""
    token = tmp_path_factory.mktemp("token") / "token"
    token.write_text("0123456789abcdef" * 4)
    token.chmod(0o600)
    port, dashboard = free_port(), free_port()
    env = environment(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(token), RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0")
    words = ["start", "--head", "--block", "--num-cpus=2", "--node-ip-address=127.0.0.1", f"--port={port}"]
    words += ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", "--include-dashboard=true"]
    words += ["--object-store-memory=200000000", f"--dashboard-agent-listen-port={free_port()}"]
    head = subprocess.Popen([BIN / "ray", *words], env=env, start_new_session=True, stdout=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{dashboard}"
    try:
        assert wait_until_up(address, env), "the cluster did not come up"
        yield {**env, "TEST_ADDRESS": address}
    finally:
        head.terminate()
        head.wait(timeout=60)


def wait_until_up(address: str, env: dict[str, str]) -> bool:
    """A cluster is up when it has run a job: the agent that runs them comes last."""
    probe = [BIN / "ray", "job", "submit", "--address", address, "--", "python", "-V"]
    return any(subprocess.run(probe, env=env, capture_output=True).returncode == 0 for _ in range(30))


def encode_words(shards: Path, model: Path, out: Path) -> list[str]:
    words = ["encode", "--shards", str(shards / "train"), "--model", str(model), "--out", str(out)]
    for setting in SETTINGS:
        words += ["--set", setting]
    return words


def test_ray_job_submit_makes_the_same_bytes(
    cluster: dict[str, str], shards: Path, model: Path, codes: Path, tmp_path: Path
) -> None:
    out = tmp_path / "codes"
    submit = [BIN / "ray", "job", "submit", "--address", cluster["TEST_ADDRESS"], "--"]
    words = ["python", "-m", "pipelines", *encode_words(shards, model, out), "--set", "ray.address=auto"]
    done = subprocess.run([*submit, *words], env=cluster, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert tree(out) == tree(codes / "train")


def test_an_http_address_submits_the_verb_itself(
    cluster: dict[str, str], shards: Path, model: Path, codes: Path, tmp_path: Path
) -> None:
    out = tmp_path / "codes"
    words = [*encode_words(shards, model, out), "--set", f"ray.address={cluster['TEST_ADDRESS']}", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "pipelines", *words], env=cluster, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["uri"] == str(out)
    assert tree(out) == tree(codes / "train")


def test_a_job_that_fails_fails_here_with_its_own_code(cluster: dict[str, str], shards: Path, tmp_path: Path) -> None:
    words = [*encode_words(shards, tmp_path / "nowhere", tmp_path / "codes")]
    words += ["--set", f"ray.address={cluster['TEST_ADDRESS']}"]
    done = subprocess.run(
        [sys.executable, "-m", "pipelines", *words], env=cluster, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 2
    assert "holds no committed model" in done.stderr.splitlines()[-1]


def test_without_the_token_nothing_is_submitted(cluster: dict[str, str], tmp_path: Path) -> None:
    wrong = tmp_path / "token"
    wrong.write_text("f" * 64)
    wrong.chmod(0o600)
    submit = [BIN / "ray", "job", "submit", "--address", cluster["TEST_ADDRESS"], "--", "python", "-V"]
    env = {**cluster, "RAY_AUTH_TOKEN_PATH": str(wrong)}
    done = subprocess.run(submit, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "401" in done.stdout + done.stderr or "nauthorized" in done.stdout + done.stderr or "nvalid" in done.stderr
