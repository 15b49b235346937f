"""Training on a real Ray Train: kills, restarts and several workers end with the weights of an unbroken run."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from pipelines.artifacts import open_artifact
from pipelines.config import load_config
from pipelines.errors import InputError
from pipelines.train import train
from pipelines.verify import verify
from tests.integration.conftest import SETTINGS


def start(shards: Path, out: Path, *more: str) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-m", "pipelines", "train", "--shards", str(shards), "--out", str(out)]
    for setting in (*SETTINGS, *more):
        words += ["--set", setting]
    return subprocess.Popen(words, start_new_session=True)


def wait_for_checkpoint(out: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while not list(out.glob("checkpoints/*/manifest.json")):
        assert process.poll() is None and time.monotonic() < deadline, "no checkpoint appeared"
        time.sleep(0.05)


def test_killed_at_any_point_it_resumes_to_the_same_weights(shards: Path, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    process = start(shards / "train", out)
    wait_for_checkpoint(out, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / "manifest.json").exists()
    assert start(shards / "train", out).wait(timeout=180) == 0
    assert open_artifact(str(out)).digest == open_artifact(str(model)).digest


def test_a_worker_that_is_killed_is_replaced(shards: Path, tmp_path: Path) -> None:
    """That it ends with the weights of an unbroken run of two workers is shown in tests/chaos/test_training.py."""
    out = tmp_path / "model"
    process = start(shards / "train", out, "train.workers=2")
    wait_for_checkpoint(out, process)
    workers = [p for p in psutil.Process(process.pid).children(recursive=True) if "RayTrainWorker" in p.name()]
    assert len(workers) == 2
    workers[1].kill()
    assert process.wait(timeout=180) == 0
    metrics = open_artifact(str(out)).manifest.meta["metrics"]
    assert (metrics["steps"], metrics["skipped"]) == (6, 0)
    assert verify(str(out))["status"] == "done"


def test_a_second_run_does_nothing_and_says_so(shards: Path, model: Path) -> None:
    result = train(str(shards / "train"), str(model), load_config(sets=SETTINGS))
    assert result["status"] == "unchanged"


def test_too_few_samples_for_the_workers_is_said(shards: Path, tmp_path: Path) -> None:
    config = load_config(sets=[*SETTINGS, "train.workers=16"])
    with pytest.raises(InputError, match="too few for 16 workers"):
        train(str(shards / "train"), str(tmp_path / "model"), config)
