"""`verify` finds a single flipped bit in any part, receipt or manifest of any artifact, and names the file."""

import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from pipelines.artifacts.commit import ArtifactWriter
from pipelines.artifacts.manifest import Artifact, open_artifact
from pipelines.artifacts.versions import open_current
from pipelines.config.settings import Config, DedupeSettings, IndexSettings
from pipelines.dedupe.dedupe import dedupe
from pipelines.encode.codes import open_codes
from pipelines.errors import HHNetError
from pipelines.index.alias import set_alias
from pipelines.index.build import build_index
from pipelines.index.update import remove_rows
from pipelines.storage import Store, canonical_json
from pipelines.study.grid import Grid, read_description
from pipelines.study.study import Cell, Data, _publish_study
from pipelines.verify.verify import verify
from tests.support.artifacts import MARK, make_codes, make_model
from tests.support.codes import write_shards
from tests.support.inline import InlinePool
from tests.support.report import SEED, report, scaled

INDEXED = Config(index=IndexSettings(workers=1, part_codes=1))
KINDS = ["shards", "model", "codes", "index", "checkpoint", "report", "alias", "duplicates", "study"]


def make_all(folder: Path) -> dict[str, Artifact]:
    """One artifact of each kind, as the verbs write them."""
    shards = open_artifact(write_shards(folder, "shards"))
    model = make_model(folder / "model", shards)
    codes = make_codes(folder / "codes", shards, model)
    index = str(folder / "index")
    build_index([codes.uri], index, INDEXED, pool=InlinePool())
    remove_rows(index, INDEXED, [next(open_codes(codes).tables())["key"][0].as_py()])  # a second version
    set_alias(str(folder / "alias"), index)
    dedupe([codes.uri], str(folder / "duplicates"), Config(dedupe=DedupeSettings(radius=4)))
    return {
        "shards": shards,
        "model": model,
        "codes": codes,
        "index": open_current(index),
        "alias": open_current(folder / "alias"),
        "duplicates": open_current(folder / "duplicates"),
        "checkpoint": make_checkpoint(folder / "checkpoint"),
        "report": make_report(folder / "report"),
        "study": make_study(folder, shards),
    }


def make_study(folder: Path, shards: Artifact) -> Artifact:
    """A study of two cells that both failed, so that nothing was trained: all of its parts are there."""
    (folder / "study.toml").write_text('title = "Failed"\nprotocol = "cifar10"\n[axes]\nmodel.bits = [16, 32]\n')
    grid = Grid.make(read_description(str(folder / "study.toml")))
    cells = [Cell(group, 0, grid.config(group, 0, {}), error="the loss became nan") for group in grid.groups]
    made = _publish_study(grid, str(folder), Data(shards, None, shards, (shards,)), cells, [])
    return open_artifact(made.uri)


def make_checkpoint(root: Path) -> Artifact:
    writer = ArtifactWriter(Store(root), "checkpoint", MARK, (), {})
    state = safetensors.numpy.save({"a": np.arange(2.0), "b": np.ones(300)})
    parts = [
        writer.put_part("state.safetensors", state, 2),
        writer.put_part("progress.json", canonical_json({"best": None}), 1),
    ]
    return writer.commit(parts, {"tensors": 2}, {"step": 1})


def make_report(root: Path) -> Artifact:
    writer = ArtifactWriter(Store(root), "report", MARK, (), {})
    facts = {"map": 0.5, "chance": 0.1, "convention": "", "precision_at": {}, "bits": 16}
    parts = [
        writer.put_part("metrics.json", canonical_json(facts), 1),
        writer.put_part("report.html", b"<!doctype html><p>" + bytes(range(256)), 1),
    ]
    return writer.commit(parts, {}, facts)


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    return make_all(tmp_path_factory.mktemp("artifacts"))


@pytest.mark.parametrize("kind", KINDS)
def test_every_flipped_bit_is_found_and_named(artifacts: dict[str, Artifact], kind: str) -> None:
    artifact, draw = artifacts[kind], random.Random(f"{SEED} {kind}")
    root, flips = Path(artifact.uri), scaled(50, 1000)
    verify(artifact.uri)
    entries = [*artifact.manifest.parts, *artifact.manifest.receipts]
    versions = [*artifact.store.names("versions"), *artifact.store.names("manifests")]
    names = [*(entry.path for entry in entries), *versions, "manifest.json", "identity.json"]
    missed, unnamed, tried = [], [], Counter[str]()
    for _ in range(flips):
        name = draw.choice(names)
        path = root / name
        before = path.read_bytes()
        bit = draw.randrange(len(before) * 8)
        path.write_bytes(flipped(before, bit))
        tried[name.split("/")[0]] += 1
        try:
            verify(artifact.uri)
            missed.append((name, bit))
        except HHNetError as error:
            if name not in str(error):
                unnamed.append((name, bit, str(error)))
        finally:
            path.write_bytes(before)
    verify(artifact.uri)
    report("flipped bits", kind=kind, flips=flips, where=tried, missed=len(missed), unnamed=len(unnamed))
    assert missed == []
    assert unnamed == []


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)
