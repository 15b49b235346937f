"""The corpus that the tests of this folder encode, made once for each process."""

import subprocess

import pytest

from pipelines.config.loading import load_config
from pipelines.ingest.ingest import ingest
from tests.support.encodes import IMAGES, RUN_LIMIT_S, SETTINGS, SHARDS, Corpus, encode_words
from tests.support.models import write_model
from tests.support.pictures import write_folder


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
