"""An index over drawn codes, and a model that stands in for a network."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest

from hhnet import unpack_bits
from pipelines.artifacts.commit import ArtifactWriter
from pipelines.config.settings import Config, IndexSettings, SearchSettings
from pipelines.index.build import build_index
from pipelines.storage import Store
from tests.support.codes import class_codes, simple_rows, write_codes
from tests.support.inline import InlinePool
from tests.support.pictures import picture

CONFIG = Config(index=IndexSettings(workers=1, part_codes=1), search=SearchSettings(k=4))


@pytest.fixture
def build(tmp_path):

    def build(*codes, name="index", config=CONFIG):
        return build_index(list(codes), str(tmp_path / name), config, pool=InlinePool()).uri

    return build


class MeanColourEncoder:
    """Stands in for a network: the code is the class whose colour the picture has."""

    @classmethod
    def open(cls, source):
        return cls()

    def real_codes(self, images):
        from pipelines.shards.images import decode_image

        colours = np.stack([decode_image(image).mean((0, 1)) for image in images])
        known = np.stack([picture(klass, 0).mean((0, 1)) for klass in range(3)])
        labels = ((colours[:, None] - known[None]) ** 2).sum(2).argmin(1)
        return 2.0 * unpack_bits(class_codes(labels.tolist(), flip=0.0), 64) - 1


def commit_model(root):
    writer = ArtifactWriter(Store(root), "model", "e" * 64, (), {})
    return writer.commit([], {}, {})


@pytest.fixture
def with_model(tmp_path, monkeypatch, build):
    monkeypatch.setitem(sys.modules, "pipelines.encode.encoder", SimpleNamespace(Encoder=MeanColourEncoder))
    model = commit_model(tmp_path / "model")
    rows = {"x-000000.tar": simple_rows("x", 30, flip=0.1)}
    codes = write_codes(tmp_path / "codes", rows, model=model.digest, origin={"model": model.uri}).uri
    return build(codes), model
