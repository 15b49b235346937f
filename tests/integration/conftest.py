"""One small pipeline, built once with a real Ray, that the integration tests look at from all sides."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock

from pipelines.cluster.session import ray_session
from pipelines.config.loading import load_config
from pipelines.config.settings import Config
from pipelines.encode.encode import encode
from pipelines.ingest.ingest import ingest
from pipelines.train.train import train
from tests.support.order import begin_with
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

LONGEST = (
    *("test_flow.py", "test_serving.py", "test_ray_job.py", "test_signals.py", "test_study.py", "test_train.py"),
    *("test_metrics.py", "test_leftovers.py", "test_platform.py", "test_benches.py", "test_retry.py", "test_pool.py"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    begin_with(LONGEST, Path(__file__).parent, items)


@pytest.fixture(scope="session")
def config() -> Config:
    return load_config(sets=SETTINGS)


@pytest.fixture(scope="session")
def local_ray(config: Config) -> Iterator[None]:
    with ray_session(config):
        yield


@pytest.fixture(scope="session")
def common(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A folder that the processes of one test run share: what a verb made there once is unchanged for the others."""
    own = tmp_path_factory.getbasetemp()
    return own if worker_id == "master" else own.parent


@pytest.fixture(scope="session")
def pictures(common: Path) -> Path:
    folder = common / "photos"
    with FileLock(common / "photos.lock"):
        if not folder.exists():
            write_folder(folder, classes=3, per_class=20)
    return folder


@pytest.fixture(scope="session")
def shards(pictures: Path, common: Path, config: Config) -> Path:
    out = common / "shards"
    with FileLock(common / "shards.lock"):
        ingest(str(pictures), str(out), config, split="train=.6,query=.2,database=.2")
    return out


@pytest.fixture(scope="session")
def model(shards: Path, common: Path, config: Config, local_ray: None) -> Path:
    out = common / "model"
    with FileLock(common / "model.lock"):
        train(str(shards / "train"), str(out), config)
    return out


@pytest.fixture(scope="session")
def codes(shards: Path, model: Path, common: Path, config: Config, local_ray: None) -> Path:
    out = common / "codes"
    with FileLock(common / "codes.lock"):
        for split in ("train", "query", "database"):
            encode(str(shards / split), str(model), str(out / split), config)
    return out
