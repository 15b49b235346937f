"""A Ray that does not start or answer is said; ending one ends Ray's own processes and no other child of ours."""

import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.exceptions import RaySystemError

from pipelines.cluster.session import is_rays, ray_session
from pipelines.config.loading import load_config
from pipelines.errors import ClusterUnavailable

RAY = Path(ray.__file__).parent


@pytest.mark.parametrize(
    ("words", "rays"),
    [
        (["ray::IDLE", ""], True),
        ([f"{RAY}/core/src/ray/raylet/raylet", "--raylet_socket_name=/tmp/x"], True),
        (["/venv/bin/python", "-u", f"{RAY}/_private/log_monitor.py"], True),
        # The user's home in Ray's container images; this is how the temporary Prefect server begins there.
        (["/home/ray/anaconda3/bin/python", "-m", "prefect", "server", "start"], False),
        (["python", "/data/ray/train.py"], False),
        ([], False),
    ],
)
def test_only_rays_own_processes_are_taken_for_rays(words: list[str], rays: bool) -> None:
    assert is_rays(words) is rays


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            Exception("The current node timed out during startup.\nThis could happen because ..."),
            "The current node timed out during startup",
        ),
        (
            RaySystemError("Failed to connect to GCS. Please check"),
            "System error: Failed to connect to GCS. Please check",
        ),
    ],
)
def test_a_ray_that_does_not_start_in_time_is_said(
    monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    def init(**_: Any) -> None:
        raise error

    monkeypatch.setattr("ray.init", init)
    complaint = f"^Ray does not start on this machine: {said}: the machine may be too busy: run the same command again$"
    with pytest.raises(ClusterUnavailable, match=complaint), ray_session(load_config()):
        pass


@pytest.fixture
def silent() -> Iterator[int]:
    """A port that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield int(listener.getsockname()[1])


@pytest.fixture
def closed() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.mark.timeout(60)
@pytest.mark.parametrize("port", ["silent", "closed"])
@pytest.mark.parametrize("by", ["setting", "variable"])
def test_a_head_that_does_not_answer_is_said_in_time(
    port: str, by: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    address = f"127.0.0.1:{request.getfixturevalue(port)}"
    sets = ["ray.wait_s=2", *([f"ray.address={address}"] if by == "setting" else [])]
    monkeypatch.setenv("RAY_ADDRESS", address if by == "variable" else "")
    with (
        pytest.raises(ClusterUnavailable, match=r"^no Ray head answers at .* within 2 s \(ray.wait_s\)"),
        ray_session(load_config(sets=sets)),
    ):
        pass


def test_too_little_address_space_is_said_before_ray_starts() -> None:
    script = (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))\n"
        "from pipelines.config.loading import load_config\n"
        "from pipelines.cluster.session import ray_session\n"
        "with ray_session(load_config()): pass\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    complaint = "the limit on address space (ulimit -v) is 6.0 GiB and a local Ray needs 8 GiB: raise it"
    assert done.returncode == 1 and complaint in done.stderr.splitlines()[-1]
