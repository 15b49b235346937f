"""The batches that a process of its own makes are those that this process would make."""

from pathlib import Path

import numpy as np
import pytest

from pipelines.artifacts.manifest import ArtifactInput
from pipelines.artifacts.versions import open_current
from pipelines.config.loading import load_config
from pipelines.config.settings import Config
from pipelines.errors import InputError
from pipelines.ingest.ingest import ingest
from pipelines.shards.shards import open_shards
from pipelines.train.batches import TrainData
from pipelines.train.job import TrainJob
from pipelines.train.prefetch import Position, iterate_batches, prefetch_batches
from pipelines.train.train import plan_training
from tests.support.pictures import write_folder

SETS = ("ingest.samples_per_shard=7", "data.image_size=32", "data.batch_size=8", "train.val_share=0.2")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("feed")
    write_folder(folder / "photos", classes=3, per_class=15)
    ingest(str(folder / "photos"), str(folder / "shards"), configure())
    return str(folder / "shards")


def configure(*sets: str) -> Config:
    return load_config(sets=[*SETS, "train.epochs=3", *sets])


def test_a_process_of_its_own_makes_the_same_batches(shards: str) -> None:
    """From the middle of the second of three epochs to the end, as the second of two workers."""
    config = configure("train.workers=2")
    position = Position(rank=1, world=2, views=2, epoch=1, legs=[(3, 1), (2, 1)])
    here = list(iterate_batches(TrainData.make(open_shards(shards), None, config), config, position))
    job = plan_training(open_current(shards, "shards"), None, "model", config)
    apart = list(prefetch_batches(job, position, iterate_batches))
    assert len(apart) == len(here) == (5 - 2) + 5
    for (mine, bad), (other, _) in zip(apart, here, strict=True):
        assert mine.keys == other.keys and bad == 0
        np.testing.assert_array_equal(mine.squares, other.squares)
        np.testing.assert_array_equal(mine.labels, other.labels)


def test_an_error_of_that_process_is_raised_in_one_line(shards: str, tmp_path: Path) -> None:
    position = Position(rank=0, world=1, views=1, epoch=0, legs=[(1, 0)])
    inputs = (ArtifactInput(role="shards", kind="shards", digest="0" * 64),)
    with pytest.raises(InputError, match=f"^{tmp_path}/none holds no committed shards"):
        job = TrainJob(f"{tmp_path}/none", None, "model", "", inputs, configure())
        next(prefetch_batches(job, position, iterate_batches))
