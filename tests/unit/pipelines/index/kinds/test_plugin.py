"""An index kind is one module of the package: a toy one is built, searched and planned for by its name."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hhnet import hamming_knn
from pipelines.cli.index import BuildFlags
from pipelines.config.loading import load_config
from pipelines.errors import ConfigError
from pipelines.index import kinds
from pipelines.index.build import build_index
from pipelines.index.reader import open_index
from tests.support.codes import random_codes, simple_rows, write_codes
from tests.support.inline import InlinePool
from tests.support.plugins import plugged_in

TOY = """
import numpy as np

from hhnet import hamming_knn, hamming_range
from pipelines.index.kinds import IndexKind


class ToyKind(IndexKind):
    suffix = ".npy"
    exact = True
    mapped = False

    def parameters(self, settings, count):
        return {"most": count}

    def build(self, codes, ids, shared, parameters):
        return codes.tobytes() + ids.tobytes()

    def part_bytes(self, rows, width, parameters):
        return rows * (width + 8)

    def open(self, path, width, rows, shared, parameters, removed):
        data = np.fromfile(path, np.uint8)
        return ToySearcher(data[: rows * width].reshape(rows, width), data[rows * width :].view(np.int64))


class ToySearcher:
    def __init__(self, codes, ids):
        self.codes, self.ids, self.count = codes, ids, len(ids)

    def search(self, queries, k, radius=None):
        distances, rows = hamming_knn(queries, self.codes, k)
        return distances, self.ids[rows]

    def range_search(self, queries, radius):
        offsets, rows, distances = hamming_range(queries, self.codes, radius)
        return offsets, distances, self.ids[rows]


KIND = ToyKind()
"""


def built(uri: str, out: str, **flags: Any) -> dict[str, Any]:
    """What `hhnet index build` gives with these flags."""
    given = BuildFlags(codes=[uri], out=out, **flags)
    config = load_config(flags=given.settings())
    return build_index(given.codes, given.out, config, dry_run=given.dry_run, pool=InlinePool()).as_json()


def test_a_kind_is_one_module(tmp_path: Path) -> None:
    contents = {f"x-{n:06d}.tar": simple_rows(f"x{n}", 40, seed=n) for n in range(2)}
    uri, out = write_codes(tmp_path / "codes", contents).uri, str(tmp_path / "index")
    with plugged_in(kinds, tmp_path / "plugins", "toy", TOY):
        toy = built(uri, out, kind="toy")
        assert (toy["kind"], toy["version"], toy["card"]["recall"]) == ("toy", 1, 1.0)
        queries = random_codes(5, seed=9)
        with open_index(out) as reader:
            distances, _ = reader.search(queries, 7)
        every = np.concatenate([rows.codes for rows in contents.values()])
        assert distances.tolist() == hamming_knn(queries, every, 7)[0].tolist()
        planned = built(uri, str(tmp_path / "planned"), kind="auto", dry_run=True)
        assert [entry["kind"] for entry in planned["kinds"]] == ["flat", "hnsw", "ivf", "multihash", "toy"]
        with pytest.raises(ConfigError, match="index kind 'toi' is unknown: did you mean toy") as refusal:
            built(uri, out, kind="toi")
        assert refusal.value.exit_code == 2
    with pytest.raises(ConfigError, match="'toy' is unknown: choose one of auto, flat, hnsw, ivf, multihash"):
        built(uri, out, kind="toy")
