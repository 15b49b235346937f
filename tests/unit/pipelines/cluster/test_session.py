"""Ending a local Ray ends Ray's own processes and no other child of ours."""

from pathlib import Path

import pytest
import ray

from pipelines.cluster.session import is_rays

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
