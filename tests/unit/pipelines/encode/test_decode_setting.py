"""`data.decode` travels with the model: whatever it encodes is decoded as its training images were."""

from pathlib import Path

import numpy as np
import pytest

import hhnet
from pipelines.config.loading import load_config
from pipelines.encode.encoder import Encoder, Encoding
from pipelines.encode.feed import Shaping, thread_batches
from pipelines.ingest.ingest import ingest
from pipelines.shards.images import decode_image
from pipelines.shards.shards import open_shards
from tests.support.models import train_model
from tests.support.pictures import jpeg, picture

SETS = ("model.backbone=test_resnet", "model.bits=16", "data.image_size=32", "data.batch_size=8", "train.epochs=1")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("decode")
    for klass in ("a", "b"):
        (root / "photos" / klass).mkdir(parents=True)
        for number in range(8):
            (root / "photos" / klass / f"{number}.jpg").write_bytes(jpeg(picture(ord(klass), number, 256), 60))
    ingest(str(root / "photos"), str(root / "shards"), load_config())
    for decode in ("scaled", "exact"):
        train_model(str(root / "shards"), root / decode, load_config(sets=[*SETS, f"data.decode={decode}"]))
    return root


@pytest.mark.parametrize(("decode", "least_side"), [("scaled", 64), ("exact", 0)])
def test_a_model_decodes_what_it_encodes_as_its_training_images(root: Path, decode: str, least_side: int) -> None:
    encoder = Encoder.open(str(root / decode))
    _, preprocess = hhnet.load_model(root / decode)
    assert (preprocess, preprocess.decode) == (encoder.preprocess, decode)
    shards = open_shards(str(root / "shards"))
    images = [sample.image for shard in shards.shards for sample in shards.read(shard)]
    squares = [preprocess.resize_crop(decode_image(data, least_side)) for data in images]
    others = [preprocess.resize_crop(decode_image(data, 64 - least_side)) for data in images]
    expected = encoder.outputs(squares)
    np.testing.assert_array_equal(encoder.real_codes(images), expected)
    assert (encoder.outputs(others) != expected).any()
    samples = (sample for shard in shards.shards for sample in shards.read(shard))
    batches = thread_batches(samples, Shaping(encoder.preprocess, 16, 1))
    encoded = Encoding(encoder, batches, 16).finish()
    np.testing.assert_array_equal(encoded.codes, hhnet.pack_bits(expected > 0))
    assert not encoded.rejects


def test_the_setting_names_another_model(root: Path) -> None:
    marks = {Encoder.open(str(root / decode)).digest for decode in ("scaled", "exact")}
    assert len(marks) == 2
