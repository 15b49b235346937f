"""One small pipeline, built once with a real Ray, that the integration tests look at from all sides."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.cluster.session import ray_session
from pipelines.config import Config, load_config
from pipelines.encode import encode
from pipelines.ingest import ingest
from pipelines.train import train
from tests.support.pictures import write_folder

SETTINGS = (
    "ingest.samples_per_shard=10",
    "data.image_size=32",
    "data.batch_size=12",
    "model.backbone=test_resnet",  # half a million weights: what these tests wait for is Ray
    "model.stem_stride=4",
    "model.bits=16",
    "train.epochs=2",
    "train.checkpoint_steps=2",
    "encode.batch_size=8",
)


@pytest.fixture(scope="session")
def config() -> Config:
    return load_config(sets=SETTINGS)


@pytest.fixture(scope="session")
def local_ray(config: Config) -> Iterator[None]:
    with ray_session(config):
        yield


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures") / "photos"
    write_folder(folder, classes=3, per_class=20)
    return folder


@pytest.fixture(scope="session")
def shards(pictures: Path, tmp_path_factory: pytest.TempPathFactory, config: Config) -> Path:
    out = tmp_path_factory.mktemp("shards") / "shards"
    ingest(str(pictures), str(out), config, split="train=.6,query=.2,database=.2")
    return out


@pytest.fixture(scope="session")
def model(shards: Path, tmp_path_factory: pytest.TempPathFactory, config: Config, local_ray: None) -> Path:
    out = tmp_path_factory.mktemp("model") / "model"
    train(str(shards / "train"), str(out), config)
    return out


@pytest.fixture(scope="session")
def codes(shards: Path, model: Path, tmp_path_factory: pytest.TempPathFactory, config: Config, local_ray: None) -> Path:
    out = tmp_path_factory.mktemp("codes")
    for split in ("train", "query", "database"):
        encode(str(shards / split), str(model), str(out / split), config)
    return out
