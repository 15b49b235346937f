"""Small shards and a model of them."""

from pathlib import Path

import pytest

from pipelines.artifacts.manifest import Artifact, open_artifact
from pipelines.config.loading import load_config
from pipelines.ingest.ingest import ingest
from tests.support import pictures
from tests.support.artifacts import make_model


@pytest.fixture
def shards(tmp_path: Path) -> Artifact:
    """24 samples in tars of 10, 10 and 4."""
    pictures.write_folder(tmp_path / "images")
    result = ingest(
        str(tmp_path / "images"), str(tmp_path / "shards"), load_config(sets=["ingest.samples_per_shard=10"])
    ).as_json()
    return open_artifact(result["uri"])


@pytest.fixture
def model(tmp_path: Path, shards: Artifact) -> Artifact:
    return make_model(tmp_path / "model", shards)
