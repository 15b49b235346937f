"""Training under kills and damage: it goes on from a checkpoint that verifies, to the weights of an unbroken run.

R8 and R9 of docs/reliability: checkpoints torn while they are saved, flipped and cut; kills and another number of
workers in the middle of an epoch.
"""

import json
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.artifacts.facts import BestEpoch, Progress
from pipelines.artifacts.manifest import open_artifact
from pipelines.config.loading import load_config
from pipelines.ingest.ingest import ingest
from pipelines.shards.shards import open_shards
from pipelines.storage import Store
from pipelines.train.batches import TrainData
from pipelines.train.checkpoints import Checkpoints
from pipelines.train.train import plan_training
from tests.support.drivers import begin
from tests.support.pictures import write_folder
from tests.support.report import SEED, report, scaled
from tests.support.seaweed import seaweed

ROOT = Path(__file__).parents[2]
MARK = "c" * 64
EPOCH_STEPS = 10

pytestmark = pytest.mark.timeout(3600)


# ------------------------------------------------------------------------------------------------- R8: checkpoints


def save_for_ever(root: Path, log: Path) -> None:
    """Save a checkpoint after the other, from the newest on, and write down each step that is saved."""
    store = Checkpoints(Store(root), MARK)
    last = store.latest()
    step = last.step if last else 0
    assert last is None or last.tensors("")["weight"][0].item() == step
    with log.open("w", buffering=1) as stream:
        while True:
            step += 1
            tensors = {"weight": torch.full((200_000,), float(step))}
            store.save(store.new_name(step), step, tensors, Progress.new())
            stream.write(f"{step}\n")


def test_a_checkpoint_torn_while_it_is_saved_is_never_resumed_from(tmp_path: Path) -> None:
    choose = random.Random(SEED)
    kills = scaled(20, 200)
    acknowledged = lost = 0
    for number in range(kills):
        log = tmp_path / f"said-{number}"
        saver = begin(save_for_ever, tmp_path / "model", log)
        while not (log.exists() and log.read_text()):
            assert saver.is_alive(), f"seed {SEED}"
            time.sleep(0.005)
        time.sleep(choose.uniform(0, 0.2))
        saver.kill()
        saver.join()
        acknowledged = max([acknowledged, *map(int, log.read_text().split())])
        found = Checkpoints(Store(tmp_path / "model"), MARK).latest()
        assert found is not None, f"seed {SEED}"
        assert found.tensors("")["weight"].eq(found.step).all(), f"seed {SEED}"
        lost += found.step < acknowledged
    report("R8 torn", kills=kills, saves=acknowledged, acknowledged_but_lost=lost)
    assert lost == 0, f"seed {SEED}"


@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(damage: str, tmp_path: Path) -> None:
    """In its manifest or parts. Its identity.json only keeps writers apart and is not read on the way back."""
    choose = random.Random(SEED)
    store = Checkpoints(Store(tmp_path / "model"), MARK)
    for step in (1, 2):
        store.save(store.new_name(step), step, {"weight": torch.randn(300)}, Progress.new())
    older, newer = sorted((tmp_path / "model" / "checkpoints").iterdir())
    tries = scaled(64, 1000)
    detected = 0
    for number in range(tries):
        broken = tmp_path / "broken"
        shutil.copytree(tmp_path / "model", broken)
        files = [path for path in (broken / "checkpoints" / newer.name).rglob("*") if path.is_file()]
        victim = choose.choice([path for path in files if path.name != "identity.json"])
        data = bytearray(victim.read_bytes())
        place = choose.randrange(len(data))
        if damage == "flip":
            data[place] ^= 1 << choose.randrange(8)
            victim.write_bytes(data)
        else:
            victim.write_bytes(data[:place])
        found = Checkpoints(Store(broken), MARK).latest()
        assert found is not None, f"seed {SEED}, try {number}: {victim.name} at {place}"
        detected += found.name == older.name
        shutil.rmtree(broken)
    report(f"R8 {damage}", tries=tries, detected=detected)
    assert detected == tries, f"seed {SEED}"


def test_the_last_checkpoint_that_verifies_outlives_a_store_that_spoils_new_ones(tmp_path: Path) -> None:
    """Old checkpoints go only once the new one was read back."""
    store = Checkpoints(Store(tmp_path / "model"), MARK)
    store.save(store.new_name(1), 1, {"weight": torch.ones(10)}, Progress.new())

    class Spoiling(Store):
        def put(self, name: str, data: bytes | Path, point: str = "put") -> bool:
            if name.endswith(".safetensors") and isinstance(data, bytes):
                data = data[:-1] + b"\0"
            return super().put(name, data, point)

        def child(self, name: str) -> "Store":
            return Spoiling(f"{self.uri}/{name}")

    spoiling = Checkpoints(Spoiling(tmp_path / "model"), MARK)
    for step in (2, 3, 4, 5):
        with pytest.raises(Exception, match="does not match the digest"):
            spoiling.save(spoiling.new_name(step), step, {"weight": torch.ones(10)}, Progress.new())
    found = store.latest()
    assert found is not None and found.step == 1


def test_two_runs_at_once_drop_none_of_what_the_other_needs(tmp_path: Path) -> None:
    """One is behind the other, and another epoch is its best, as on accelerators whose sums differ."""

    def save(run: Checkpoints, step: int, best: str | None) -> str:
        name = run.new_name(step)
        progress = Progress.new()
        progress.best = BestEpoch(map=0.5, epoch=1, checkpoint=best or name)
        run.save(name, step, {"weight": torch.full((10,), float(step))}, progress)
        return name

    ahead, behind = (Checkpoints(Store(tmp_path), MARK) for _ in range(2))
    assert ahead.latest() is behind.latest() is None
    save(behind, 10, None)
    bests = [save(ahead, 10, None), save(behind, 20, None)]
    for step in (20, 30, 40, 50):
        save(ahead, step, bests[0])
    for step in (30, 40):
        save(behind, step, bests[1])
    resumed = Checkpoints(Store(tmp_path), MARK)
    last = resumed.latest()
    assert last is not None and last.step == 50
    for step in (60, 70, 80, 90):
        save(resumed, step, None)
    for name in bests:
        assert resumed.open_named(name).best == name
    kept = sorted(path.name[:9] for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["000000010", "000000020", "000000080", "000000090"], "what nobody can need is gone"


# ------------------------------------------------------------------------------------- R9: kills and elastic restarts


Out = Path | str
"""The root of a model, which may lie on S3."""


@dataclass(frozen=True)
class Training:
    """A training without Ray whose workers are processes of this test."""

    folder: Path
    shards: Path
    sets: tuple[str, ...]

    def start(self, out: Out, run: Path, world: int) -> list[subprocess.Popen[bytes]]:
        job = self.folder / f"{run.name}.json"
        job.write_text(json.dumps({"shards": str(self.shards), "out": str(out), "sets": self.sets}))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        words = [sys.executable, "-m", "tests.support.training", str(job)]
        return [
            subprocess.Popen([*words, str(rank), str(world), str(port), str(run)], cwd=ROOT) for rank in range(world)
        ]

    def finish(self, out: Out, run: Path, world: int) -> None:
        for worker in self.start(out, run, world):
            assert worker.wait(timeout=600) == 0

    def kill_at(self, out: Out, run: Path, world: int, step: int) -> None:
        """Start, wait until a worker begins `step`, and kill all of them at once."""
        workers = self.start(out, run, world)
        while not any(entry["step"] >= step for entry in said(run, world, "keys")):
            assert all(worker.poll() is None for worker in workers), "the training ended before it was killed"
            time.sleep(0.002)
        for worker in workers:
            worker.send_signal(signal.SIGKILL)
        for worker in workers:
            worker.wait()

    def checkpoints(self, out: Out) -> Checkpoints:
        job = plan_training(open_artifact(str(self.shards), "shards"), None, str(out), load_config(sets=self.sets))
        return Checkpoints(Store(out), job.fingerprint)

    def state(self, out: Out) -> dict[str, torch.Tensor]:
        last = self.checkpoints(out).latest()
        assert last is not None
        return last.tensors("")


def said(run: Path, world: int, what: str) -> list[dict[str, Any]]:
    """What the workers of a run wrote down about `keys` or `loss`, whole lines only."""
    entries = []
    for rank in range(world):
        path = Path(f"{run}.{rank}.jsonl")
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        entries += [json.loads(line) for line in lines if line.endswith("\n")]
    return [entry for entry in entries if what in entry]


def losses(runs: Sequence[tuple[Path, int]]) -> dict[int, set[str]]:
    """Every loss that worker 0 of these runs saw at a step; a step that was done again is to have the same."""
    seen: dict[int, set[str]] = {}
    for run, _ in runs:
        for entry in said(run, 1, "loss"):
            seen.setdefault(entry["step"], set()).add(entry["loss"])
    return seen


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> Training:
    folder = tmp_path_factory.mktemp("training")
    epochs = scaled(4, 40)
    sets = (
        *("ingest.samples_per_shard=9", "data.image_size=32", "data.batch_size=8", "data.shuffle_buffer=16"),
        *("model.backbone=test_convnext", "model.bits=16", "model.head=ln", "train.val_share=0.1"),
        *(f"train.epochs={epochs}", "train.val_every=1000", "train.checkpoint_steps=3"),
    )
    write_folder(folder / "photos", classes=3, per_class=29)
    ingest(str(folder / "photos"), str(folder / "shards"), load_config(sets=sets))
    made = Training(folder, folder / "shards", sets)
    made.finish(folder / "unbroken", folder / "unbroken-0", 1)
    return made


def killed_run(training: Training, name: str, worlds: Sequence[int]) -> tuple[Path, list[tuple[Path, int]]]:
    """Train with a kill at a random step in each part of the way, each part with its number of workers."""
    choose = random.Random(f"{SEED}-{name}")
    total = TrainData.make(open_shards(str(training.shards)), None, load_config(sets=training.sets)).total_steps(
        load_config(sets=training.sets)
    )
    out = training.folder / name
    runs = []
    for number, world in enumerate(worlds):
        run = training.folder / f"{name}-{number}"
        runs.append((run, world))
        if number == len(worlds) - 1:
            training.finish(out, run, world)
        else:
            share = total // len(worlds)
            training.kill_at(out, run, world, number * share + choose.randrange(4, share))
    return out, runs


def learnt(runs: Sequence[tuple[Path, int]]) -> Counter[tuple[int, str]]:
    """How often each (epoch, key) went into the weights: what a run redid after a kill counts once."""
    entries = [said(run, world, "keys") for run, world in runs]
    begins = [min(entry["step"] for entry in run) for run in entries]
    counts: Counter[tuple[int, str]] = Counter()
    for number, run in enumerate(entries):
        end = begins[number + 1] if number + 1 < len(runs) else sys.maxsize
        for entry in run:
            if entry["step"] < end:
                counts.update((entry["step"] // EPOCH_STEPS, key) for key in entry["keys"])
    return counts


def lost_and_doubled(training: Training, runs: Sequence[tuple[Path, int]]) -> tuple[int, int]:
    """Samples of an epoch that no step learnt from, and those that more than one did, over all epochs."""
    config = load_config(sets=training.sets)
    data = TrainData.make(open_shards(str(training.shards)), None, config)
    assert data.epoch_steps(config) == EPOCH_STEPS
    keys = [
        shard.table()["key"][int(row)].as_py()
        for shard, rows in zip(data.train.shards, data.rows, strict=True)
        for row in rows
    ]
    expected = Counter({(epoch, key): 1 for epoch in range(config.train.epochs) for key in keys})
    found = learnt(runs)
    return (expected - found).total(), (found - expected).total()


def test_kills_do_not_change_a_weight(training: Training) -> None:
    out, runs = killed_run(training, "killed", [1, 1, 1, 1])
    expected, found = training.state(training.folder / "unbroken"), training.state(out)
    assert found.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    lost, doubled = lost_and_doubled(training, runs)
    steps = scaled(4, 40) * EPOCH_STEPS
    unbroken, broken = losses([(training.folder / "unbroken-0", 1)]), losses(runs)
    other = [step for step in range(steps) if len(unbroken[step]) != 1 or broken[step] != unbroken[step]]
    figures = {"tensors_that_differ": len(different), "losses_that_differ": len(other)}
    report("R9 kills", kills=3, steps=steps, **figures, lost=lost, duplicated=doubled)
    assert (different, other, lost, doubled) == ([], [], 0, 0), f"seed {SEED}"


def test_a_training_on_s3_goes_on_from_its_checkpoint(training: Training, tmp_path: Path) -> None:
    """Killed in the second epoch; the weights are those of a training on a disk that nobody killed."""
    with seaweed(tmp_path / "weed") as server, server.environment():
        out = server.uri("model")
        training.kill_at(out, training.folder / "s3-0", 1, EPOCH_STEPS + 4)
        last = training.checkpoints(out).latest()
        assert last is not None and last.step >= EPOCH_STEPS
        training.finish(out, training.folder / "s3-1", 1)
        found = training.state(out)
    assert min(entry["step"] for entry in said(training.folder / "s3-1", 1, "keys")) == last.step
    expected = training.state(training.folder / "unbroken")
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    report("R9 on S3", kills=1, begun_again_at=last.step, tensors_that_differ=0)


def test_another_number_of_workers_keeps_every_epoch_whole(training: Training) -> None:
    _, runs = killed_run(training, "elastic", [2, 1, 2])
    lost, doubled = lost_and_doubled(training, runs)
    steps = scaled(4, 40) * EPOCH_STEPS
    report("R9 elastic", worlds=[2, 1, 2], steps=steps, lost=lost, duplicated=doubled)
    assert (lost, doubled) == (0, 0), f"seed {SEED}"
