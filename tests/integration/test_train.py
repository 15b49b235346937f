"""Training on a real Ray Train: kills, restarts and several workers end with the weights of an unbroken run."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from pipelines.artifacts.manifest import open_artifact
from pipelines.cluster.progress import reporting
from pipelines.config.loading import load_config
from pipelines.encode.codes import code_array, open_codes
from pipelines.encode.encode import encode
from pipelines.errors import InputError
from pipelines.evaluate.evaluate import evaluate
from pipelines.index.build import build_index
from pipelines.search.search import search
from pipelines.train.rehead import rotate
from pipelines.train.train import train
from pipelines.verify.verify import verify
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


FIRST = """
import sys
import pipelines.train.fit
pipelines.train.fit.MOST_EPOCHS = 2  # these pictures are so few that the recipe would pass over them forty times
from pipelines.cli.main import build_app
build_app()(sys.argv[1:])
"""


def test_a_first_training_without_settings_tells_what_it_took_and_each_epoch(shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    words = [sys.executable, "-c", FIRST, "train", "--shards", str(shards / "train"), "--out", str(out)]
    no_gpu = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(words, capture_output=True, text=True, timeout=280, env=no_gpu)
    assert done.returncode == 0, done.stderr
    first, second, *lines = done.stderr.splitlines()
    taken = (
        r"recipe auto for 36 images on \d+ CPUs?, to take minutes: "
        "image_size 32, hrnet_w18_small, batch 32, 2 epochs"
    )
    assert re.fullmatch(taken, first) and second == "starting Ray, reading 36 images"
    epochs = [line for line in lines if line.startswith("epoch ")]
    for number, line in enumerate(epochs, 1):
        told = r"loss \d+\.\d{4}, validation mAP [01]\.\d{4} \(\d\d images, chance 0\.\d{4}\)"
        assert re.fullmatch(rf"epoch {number}/2: {told}", line)
    assert len(epochs) == 2
    bars = [line for line in lines if line.startswith("train: ")]
    bar = r"train: 2/2 steps in \d+ (s|min).*  epoch 2/2  mAP [01]\.\d{4}  loss \d+\.\d{4}  [\d.,]+ images/s"
    assert re.fullmatch(bar, bars[-1]), done.stderr
    assert {part.suffix for part in out.glob("parts/learning_curve-*")} == {".csv", ".png"}


def test_its_progress_reaches_a_reporter(shards: Path, tmp_path: Path, local_ray: None) -> None:
    """The board of the workers is read in a thread, which knows the reporter of the one that began it."""
    seen: list[tuple[str, int, int]] = []
    with reporting(lambda stage, done, total, _note: seen.append((stage, done, total))):
        train(str(shards / "train"), str(tmp_path / "model"), load_config(sets=SETTINGS))
    steps = [(done, total) for stage, done, total in seen if stage == "train"]
    assert steps and steps[-1][0] == steps[-1][1] > 0


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
    assert verify(str(out)).status == "done"


def test_a_second_run_does_nothing_and_says_so(shards: Path, model: Path) -> None:
    result = train(str(shards / "train"), str(model), load_config(sets=SETTINGS)).as_json()
    assert result["status"] == "unchanged"


def test_too_few_samples_for_the_workers_is_said(shards: Path, tmp_path: Path) -> None:
    config = load_config(sets=[*SETTINGS, "train.workers=16"])
    with pytest.raises(InputError, match="too few for 16 workers"):
        train(str(shards / "train"), str(tmp_path / "model"), config)


def test_a_trained_model_gets_another_hash_layer(shards: Path, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    words = ["train", "--rotate", "h2q", "--model", str(model), "--out", str(out), "--json"]
    said = subprocess.run([sys.executable, "-m", "pipelines", *words], check=True, stdout=subprocess.PIPE, timeout=240)
    found = json.loads(said.stdout)
    assert (found["status"], found["rotated"], found["bits"]) == ("done", "h2q", 16)
    assert found["error"] < found["error_before"]
    assert verify(str(out)).status == "done"
    assert open_artifact(str(out)).manifest.input("model").digest == open_artifact(str(model)).digest
    again = rotate(str(model), str(out), load_config(sets=["train.rotate=h2q"])).as_json()
    assert (again["status"], again["digest"]) == ("unchanged", found["digest"])


def test_codes_of_a_class_index_are_shorter_than_a_byte(shards: Path, tmp_path: Path, local_ray: None) -> None:
    """Through every verb that takes codes: three classes are two bits."""
    settings = load_config(sets=[*SETTINGS, "train.loss=ce", "train.epochs=1", "train.rotate=classes"])
    base = train(str(shards / "train"), str(tmp_path / "base"), settings).uri
    made = rotate(base, str(tmp_path / "model"), settings).as_json()
    assert made["bits"] == 2
    query, database = (
        encode(str(shards / part), made["uri"], str(tmp_path / part), settings).uri for part in ("query", "database")
    )
    codes = np.concatenate([code_array(table["code"]) for table in open_codes(database).tables()])
    assert codes.shape[1] == 1 and set(codes.ravel().tolist()) <= {0, 1, 2}
    report = evaluate(query, [database], str(tmp_path / "report"), settings).as_json()
    assert report["bits"] == 2
    index = build_index([database], str(tmp_path / "index"), settings).uri
    found = search(index, settings, codes=[query]).as_json()
    nearest = [neighbour["distance"] for answer in found["results"] for neighbour in answer["neighbours"][:1]]
    assert len(nearest) == 12 and max(nearest) <= 2
    for uri in (made["uri"], database, index, report["uri"]):
        assert verify(uri).status == "done"
