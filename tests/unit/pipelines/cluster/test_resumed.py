"""A resumed run says on stderr what earlier runs have done."""

import shutil
from pathlib import Path

import pytest

from pipelines.config.loading import load_config
from pipelines.encode.encode import encode
from pipelines.index.build import build_index
from pipelines.ingest.ingest import ingest
from pipelines.train.job import TrainJob
from pipelines.train.train import train
from tests.support.inline import InlinePool
from tests.support.models import write_model
from tests.support.pictures import write_folder

CONFIG = load_config(
    sets=(
        *("ingest.samples_per_shard=10", "data.image_size=32", "data.batch_size=8", "data.workers=1"),
        *("model.backbone=test_resnet", "model.bits=16", "train.epochs=2", "train.checkpoint_steps=1"),
        "index.part_codes=1",
    )
)


class Broken(Exception):
    """Ends a run before its end."""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resumed")
    write_folder(folder / "photos", classes=3, per_class=10)
    ingest(str(folder / "photos"), str(folder / "shards"), CONFIG)
    return folder / "shards"


def test_a_resumed_training_says_how_many_steps_were_done(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from pipelines.train.worker import train_worker

    def broken_after_three(job: TrainJob, *_: object) -> None:
        def post(step: int, _note: str) -> None:
            if step == 4:
                raise Broken

        train_worker(job, post)

    with pytest.raises(Broken):
        train(str(shards), str(tmp_path / "model"), CONFIG, run=broken_after_three)
    assert "done before" not in capsys.readouterr().err
    train(str(shards), str(tmp_path / "model"), CONFIG, run=lambda job, *_: train_worker(job, lambda *_: None))
    assert "train: 3 of 8 steps done before" in capsys.readouterr().err.splitlines()


def test_a_resumed_encode_and_build_say_what_was_done(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    write_model(model, str(shards))
    words = str(shards), str(model), str(tmp_path / "codes"), CONFIG
    encode(*words, pool=InlinePool())
    (tmp_path / "codes" / "manifest.json").unlink()
    shutil.rmtree(tmp_path / "codes" / "versions", ignore_errors=True)
    next((tmp_path / "codes" / "receipts").iterdir()).unlink()
    assert "done before" not in capsys.readouterr().err
    encode(*words, pool=InlinePool())
    assert "encode: 20 of 30 images done before" in capsys.readouterr().err.splitlines()

    index = tmp_path / "index"
    build_index([words[2]], str(index), CONFIG, publish=False, pool=InlinePool())
    (index / "manifest.json").unlink()
    next((index / "receipts").iterdir()).unlink()
    assert "done before" not in capsys.readouterr().err
    build_index([words[2]], str(index), CONFIG, publish=False, pool=InlinePool())
    assert "index: 2 of 3 parts done before" in capsys.readouterr().err.splitlines()


def test_a_resumed_ingest_says_how_many_images_were_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_folder(tmp_path / "photos", classes=2, per_class=10)
    words = str(tmp_path / "photos"), str(tmp_path / "shards"), CONFIG
    ingest(*words, split="train=.6,query=.2,database=.2")
    assert "done before" not in capsys.readouterr().err
    (tmp_path / "shards" / "query" / "manifest.json").unlink()
    ingest(*words, split="train=.6,query=.2,database=.2")
    assert "ingest: 16 of 20 images done before" in capsys.readouterr().err.splitlines()
