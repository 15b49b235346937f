"""What is read from Ray's private interfaces without a Ray that runs: a new version that changes it is noticed here."""

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import ray

from pipelines.cluster import ray_private

ROOT = Path(__file__).parents[4]
PRIVATE = re.compile(
    r"ray\.(_private|_raylet|core\.generated|dashboard)\b|\"_(temp_dir|system_config|metrics_export_port)"
)


def test_private_interfaces_are_named_in_one_file() -> None:
    named = [
        path.name
        for folder in ("hhnet", "pipelines", "flows")
        for path in (ROOT / folder).rglob("*.py")
        if PRIVATE.search(path.read_text())
    ]
    assert named == ["ray_private.py"]


@pytest.mark.parametrize(
    ("switch", "file"),
    [
        (ray_private.HEAD_TIMEOUT_VARIABLE.removeprefix("RAY_"), "_raylet.so"),
        (ray_private.HEAD_METHOD.split("/")[1], "core/generated/gcs_service_pb2.py"),
        (ray_private.JOB_CONFIG_VARIABLE, "_private/runtime_env/constants.py"),
        (ray_private.CLUSTERS_VARIABLE, "_private/ray_constants.py"),
        (ray_private.ACCELERATORS_VARIABLE, "_private/accelerators/accelerator.py"),
        (ray_private.PREEMPTION_VARIABLE, "train/v2/_internal/constants.py"),
        (ray_private.START_TIMEOUT_VARIABLE, "train/v2/_internal/constants.py"),
    ],
)
def test_ray_still_reads_the_switch(switch: str, file: str) -> None:
    assert switch.removeprefix("ray.rpc.").encode() in (Path(ray.__file__).parent / file).read_bytes()


def test_the_options_of_a_private_ray_are_options_of_ray() -> None:
    ours = ray_private.private_options(Path("/tmp"), 9999)
    source = inspect.getsource(inspect.unwrap(ray.init))
    assert len(ours) == 3 and [name for name in ours if name not in source] == []


# In a process of its own, since Ray reads its mode once.
TOKENS = """
import os
from pipelines.cluster.ray_private import forget_token, token_headers
for text in ("first-" * 8, "other-" * 8):
    os.environ["RAY_AUTH_TOKEN"] = text
    forget_token()
    print(*(value.endswith(text) for value in token_headers().values()))
"""


@pytest.mark.parametrize(("mode", "sent"), [("disabled", "\n\n"), ("token", "True\nTrue\n")])
def test_the_token_of_the_moment_is_sent_where_one_is_asked_for(mode: str, sent: str) -> None:
    command, environment = [sys.executable, "-c", TOKENS], os.environ | {"RAY_AUTH_MODE": mode}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == sent, done.stderr


def test_loopback_becomes_an_address_of_this_machine() -> None:
    assert ray_private.dialled_address("10.1.2.3:6379") == "10.1.2.3:6379"
    assert ray_private.dialled_address("127.0.0.1:6379").endswith(":6379")
