"""An index on a GPU answers as it does on the CPUs."""

from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.config.settings import Config, IndexSettings
from pipelines.errors import ConfigError
from pipelines.index.build import build_index
from pipelines.index.reader import open_index
from pipelines.index.update import remove_rows
from pipelines.search.gpu import on_gpu
from tests.support.codes import random_codes, simple_rows, write_codes
from tests.support.inline import InlinePool

WHERE = "cuda" if torch.cuda.is_available() else "cpu"
CONFIG = Config(index=IndexSettings(workers=1, part_codes=1))


def build(root: Path, config: Config = CONFIG) -> str:
    rows = {f"{name}-000000.tar": simple_rows(name, 40, 16, seed=seed) for seed, name in enumerate(("one", "two"))}
    return str(
        build_index([write_codes(root / "codes", rows, 16).uri], str(root / "index"), config, pool=InlinePool()).uri
    )


@pytest.mark.parametrize("k", [1, 9, 1000])
def test_answers_are_those_of_the_parts(k: int, tmp_path: Path) -> None:
    index = build(tmp_path)
    remove_rows(index, CONFIG, ["one/00003", "two/00000"])
    queries = random_codes(20, 16, seed=3)
    with open_index(index) as reader:
        for found, wanted in zip(on_gpu(reader, WHERE)(queries, k), reader.search(queries, k), strict=True):
            np.testing.assert_array_equal(found, wanted)


def test_other_kinds_stay_on_the_cpu(tmp_path: Path) -> None:
    index = build(tmp_path, Config(index=IndexSettings(kind="multihash", workers=1)))
    with (
        open_index(index) as reader,
        pytest.raises(ConfigError, match="is of kind multihash: a GPU searches kind flat"),
    ):
        on_gpu(reader, WHERE)


def test_codes_for_which_the_gpu_has_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **options: object) -> None:
        raise torch.OutOfMemoryError

    index = build(tmp_path)
    with open_index(index) as reader:
        monkeypatch.setattr(torch, "empty", full)
        with pytest.raises(ConfigError, match=r"its codes take 0\.0 GiB, more than the GPU has free"):
            on_gpu(reader, WHERE)
