"""A local Ray that does not start is said; ending one ends Ray's own processes and no other child of ours."""

from pathlib import Path
from typing import Any

import pytest
import ray

from pipelines.cluster.session import is_rays, ray_session
from pipelines.config import load_config
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


def test_a_ray_that_does_not_start_in_time_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_: Any) -> None:
        raise Exception("The current node timed out during startup.\nThis could happen because ...")

    monkeypatch.setattr("ray.init", init)
    complaint = "^cannot reach Ray at local: The current node timed out during startup.$"
    with pytest.raises(ClusterUnavailable, match=complaint), ray_session(load_config()):
        pass
