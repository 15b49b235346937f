"""The corpus that the tests of this folder encode, made once for each process; an S3 server behind a harmful proxy."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.config.loading import load_config
from pipelines.ingest.ingest import ingest
from tests.support.encodes import IMAGES, RUN_LIMIT_S, SETTINGS, SHARDS, Corpus, encode_words
from tests.support.faults import FaultProxy
from tests.support.models import write_model
from tests.support.order import begin_with
from tests.support.pictures import write_folder
from tests.support.rig import DEADLINE_S, Rig, deadline
from tests.support.seaweed import Seaweed, seaweed

LONGEST = (
    *("test_clusters.py", "test_workers.py", "test_secrets.py", "test_status.py", "test_training.py"),
    *("test_decoders.py", "test_encode_on_s3.py", "test_store_faults.py", "test_commit_kills.py", "test_at_once.py"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    begin_with(LONGEST, Path(__file__).parent, items)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("corpus")
    write_folder(folder / "images", classes=8, per_class=SHARDS * IMAGES // 8, size=16)
    shards = str(ingest(str(folder / "images"), str(folder / "shards"), load_config(sets=SETTINGS)).uri)
    model = write_model(folder / "model", shards).uri
    done = subprocess.run(
        encode_words(shards, model, folder / "codes"), capture_output=True, text=True, timeout=RUN_LIMIT_S
    )
    assert done.returncode == 0, done.stderr
    return Corpus(shards, model, (folder / "codes" / "manifest.json").read_bytes())


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Seaweed, FaultProxy]]:
    with seaweed(tmp_path_factory.mktemp("weed")) as server, FaultProxy(server.endpoint) as proxy:
        yield server, proxy


@pytest.fixture
def rig(platform: tuple[Seaweed, FaultProxy], request: pytest.FixtureRequest) -> Iterator[Rig]:
    server, proxy = platform
    proxy.reset()
    name = "".join(c if c.isalnum() else "-" for c in request.node.name)
    with deadline(server, proxy, DEADLINE_S):
        yield Rig(server, proxy, name)
    proxy.reset()
