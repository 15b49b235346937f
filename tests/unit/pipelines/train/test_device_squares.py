"""A GPU that holds the decoded set gets the batches that a CPU gets. Where no GPU is, the CPU stands in for it."""

from pathlib import Path

import numpy as np
import pytest
import torch

import pipelines.train.device_squares
import pipelines.train.worker
from pipelines.artifacts.versions import open_current
from pipelines.config.loading import load_config
from pipelines.config.settings import Config
from pipelines.ingest.ingest import ingest
from pipelines.shards.shards import open_shards
from pipelines.storage import Store
from pipelines.train.batches import TrainData
from pipelines.train.checkpoints import Checkpoints
from pipelines.train.device_squares import DeviceSquares, fits_device
from pipelines.train.prefetch import Position, iterate_batches, iterate_drawn
from pipelines.train.train import plan_training
from pipelines.train.worker import train_worker
from tests.support.pictures import write_folder, write_specimens

SETS = ("ingest.samples_per_shard=7", "data.image_size=32", "data.batch_size=8", "train.epochs=3")
CPU, WHERE = torch.device("cpu"), torch.device("cuda" if torch.cuda.is_available() else "cpu")
BLEND = ("train.mixup=0.4", "train.label_smoothing=0.1")


def configure(*sets: str) -> Config:
    return load_config(sets=[*SETS, *sets])


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Pictures larger than the network's input, and some that do not decode."""
    folder = tmp_path_factory.mktemp("device")
    write_folder(folder / "photos", classes=3, per_class=15, size=48)
    write_specimens(folder / "photos" / "class_00", readable=False)
    ingest(str(folder / "photos"), str(folder / "shards"), configure(), allow_degraded=True)
    return str(folder / "shards")


@pytest.mark.parametrize("augment", ["auto", "flip", "none"])
@pytest.mark.parametrize(("views", "blend"), [(1, ()), (2, BLEND)], ids=["one view", "two views, blended"])
def test_the_batches_are_those_of_a_cpu(augment: str, views: int, blend: tuple[str, ...], shards: str) -> None:
    """As the second of two workers, from the middle of the first of three epochs on; each square is sent once."""
    config = configure(f"data.augment={augment}", "data.batch_size=16", "train.workers=2", *blend)
    data = TrainData.make(open_shards(shards), None, config)
    position = Position(rank=1, world=2, views=views, epoch=0, legs=[(3, 1), (2, 1)])
    drawn = list(iterate_drawn(data, config, position))
    made = list(DeviceSquares(data.samples, 32, views, WHERE).batches(drawn))
    plain = list(iterate_batches(data, config, position))
    assert sum(bad for _, bad in plain) > 0
    for (mine, bad), (other, also_bad) in zip(made, plain, strict=True):
        assert (mine.keys, bad) == (other.keys, also_bad)
        np.testing.assert_array_equal(torch.as_tensor(mine.squares).cpu(), other.squares)
        np.testing.assert_array_equal(mine.labels, other.labels)
    decoded = {key for batch, _ in plain for key in batch.keys}
    assert sum(len(batch.new) for batch, _ in drawn) == len(decoded)


GIB = 1 << 30


@pytest.mark.parametrize(
    ("sets", "free", "fits"),
    [
        ((), GIB, True),
        ((), 0, False),
        (("data.cache=0",), GIB, False),
        (("data.cache=100KiB",), GIB, False),
        ((), 200_000, False),  # more than half of what is free
        (("data.augment=resized_crop",), GIB, False),
        (("data.policy=trivial",), GIB, False),
    ],
)
def test_a_gpu_holds_squares_that_fit_and_are_only_cut_and_mirrored(
    sets: tuple[str, ...], free: int, fits: bool, shards: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure(*sets)
    data = TrainData.make(open_shards(shards), None, config)
    assert 100_000 < data.samples * 32 * 32 * 3 < 200_000
    assert not fits_device(data, config, CPU)
    monkeypatch.setattr(pipelines.train.device_squares, "free_bytes", lambda device: free)
    assert fits_device(data, config, CPU) == fits


def test_steps_are_the_same_however_images_are_kept(
    shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decoded in each epoch, kept in memory, or held by the device: network, loss, averages and optimiser agree.

    The loss has two views of each sample and parameters of its own.
    """
    sets = (
        "model.backbone=test_resnet",
        "model.bits=16",
        "train.epochs=2",
        "train.val_every=2",
        "train.loss=dhd",
        "data.batch_size=16",
    )
    states: dict[str, dict[str, torch.Tensor]] = {}
    made: list[DeviceSquares] = []
    make = pipelines.train.worker.DeviceSquares
    monkeypatch.setattr("pipelines.train.worker.DeviceSquares", lambda *given: made.append(make(*given)) or made[-1])
    for kept in ("nothing", "memory", "device"):
        config = configure(*sets, *BLEND, f"data.cache={0 if kept == 'nothing' else GIB}")
        if kept == "device":
            monkeypatch.setattr(pipelines.train.device_squares, "free_bytes", lambda device: GIB)
        job = plan_training(open_current(shards, "shards"), None, str(tmp_path / kept), config)
        job.writer()
        train_worker(job, lambda *report: None)
        last = Checkpoints(Store(job.out), job.fingerprint).latest()
        assert last is not None and last.progress.skipped > 0
        states[kept] = last.tensors("")
        assert len(made) == (kept == "device")
    assert {name.split(".")[0] for name in states["nothing"]} == {"model", "average", "loss", "optimizer"}
    for kept in ("memory", "device"):
        assert states[kept].keys() == states["nothing"].keys()
        for name, tensor in states["nothing"].items():
            assert torch.equal(states[kept][name], tensor), name
