"""`verify` accepts what `dedupe` writes, and names what is wrong in a duplicates artifact whose digests are right."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hhnet import pack_bits
from pipelines.artifacts.commit import ArtifactWriter
from pipelines.artifacts.manifest import Artifact, ArtifactInput, open_artifact
from pipelines.artifacts.parquet import parquet_bytes, read_parquet, table_of
from pipelines.config.settings import Config, DedupeSettings
from pipelines.dedupe.dedupe import dedupe
from pipelines.dedupe.tables import (
    COMPONENTS_SCHEMA,
    PAIRS_SCHEMA,
    SHARDS_NAME,
    SHARDS_SCHEMA,
    components_name,
    pairs_name,
)
from pipelines.errors import DamagedArtifact
from pipelines.storage import Store
from pipelines.verify.verify import verify
from tests.support.codes import Rows, write_codes

RADIUS = 4
Rows_ = list[dict[str, Any]]
SCHEMAS = {"pairs": PAIRS_SCHEMA, "components": COMPONENTS_SCHEMA, "shards": SHARDS_SCHEMA}
NAMES = {"pairs": pairs_name(0, 0), "components": components_name(0), "shards": SHARDS_NAME}


@pytest.fixture
def made(tmp_path: Path) -> Artifact:
    """Three clusters of ten codes each, of which some are equal, and five codes near nothing: fewer than the probes."""
    random = np.random.default_rng(3)
    middle = random.random((8, 64)) < 0.5
    bits = middle[[*([0] * 10), *([1] * 10), *([2] * 10), 3, 4, 5, 6, 7]] ^ (random.random((35, 64)) < 0.02)
    bits[[3, 4, 25]] = bits[[1, 1, 22]]
    codes = pack_bits(bits)
    contents = {
        f"a-{n}.tar": Rows([f"a/{n}/{k}" for k in range(7)], codes[7 * n : 7 * n + 7], [[0]] * 7) for n in range(5)
    }
    uri = write_codes(tmp_path / "codes", contents).uri
    dedupe([uri], str(tmp_path / "out"), Config(dedupe=DedupeSettings(radius=RADIUS)))
    return open_artifact(str(tmp_path / "out"))


class Forged:
    """The tables of an artifact as rows, to be changed and committed with digests that are right."""

    def __init__(self, artifact: Artifact) -> None:
        self.artifact = artifact
        self.tables = {
            name: read_parquet(artifact.read(artifact.manifest.part(part)), "").to_pylist()
            for name, part in NAMES.items()
        }
        self.totals = dict(artifact.manifest.totals)
        self.receipt: dict[str, Any] = {}
        self.inputs = artifact.manifest.inputs

    def commit(self, root: Path) -> str:
        manifest = self.artifact.manifest
        origin = json.loads(self.artifact.store.read("origin.json"))
        writer = ArtifactWriter(Store(root), "duplicates", manifest.fingerprint, self.inputs, origin)
        parts = {}
        for name, rows in self.tables.items():
            columns = {field.name: [row[field.name] for row in rows] for field in SCHEMAS[name]}
            data = parquet_bytes(table_of(SCHEMAS[name], columns))
            parts[name] = writer.put_part(NAMES[name], data, len(rows))
        receipt = {"unit": 0, "pairs": parts["pairs"].rows, "parts": [asdict(parts["pairs"])], **self.receipt}
        receipts = {"pairs-000000": writer.put_receipt("pairs-000000", receipt)}
        return writer.commit(list(parts.values()), self.totals, manifest.meta, receipts).uri

    def drop(self, pair: dict[str, Any]) -> None:
        """Leave a pair out, everywhere."""
        self.tables["pairs"].remove(pair)
        self.totals["pairs"] -= 1
        if pair["distance"] == 0:  # the one pair of its second sample
            gone = next(row for row in self.tables["components"] if row["id"] == pair["id_b"])
            self.tables["components"].remove(gone)
            for row in self.tables["components"]:
                row["size"] -= row["component"] == gone["component"]
            self.totals["same_code_only"] -= 1
            self.totals["unread"] -= 1


def near(forged: Forged) -> dict[str, Any]:
    """A pair of a cluster that stays whole without it."""
    return next(row for row in forged.tables["pairs"] if row["distance"] == RADIUS)


def test_a_forgery_without_a_change_is_what_was_made(made: Artifact, tmp_path: Path) -> None:
    assert open_artifact(Forged(made).commit(tmp_path / "same")).digest == made.digest


def test_what_is_proven_is_said(made: Artifact) -> None:
    checks = verify(made.uri).checks
    assert f"{made.manifest.totals['pairs']} pairs in order, once each, and the 3 components that they join" in checks
    leading = 35 - sum(row["distance"] == 0 for row in Forged(made).tables["pairs"])
    said = f"the codes have these distances, and no other pairs of equal codes, or of {leading} samples"
    assert f"{said} compared with all" in checks


def test_codes_out_of_reach_are_noted(made: Artifact, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "codes")
    assert "distances: not checked, since not all codes are within reach" in verify(made.uri).checks


def change_distance(forged: Forged) -> None:
    near(forged)["distance"] -= 1


def change_to_another_code(forged: Forged) -> None:
    """A pair of equal codes that are not."""
    lonely = [row for row in forged.tables["pairs"] if row["distance"] == 1]
    lonely[0]["distance"] = 0


def swap(forged: Forged) -> None:
    pair = forged.tables["pairs"][-1]
    for name in ("id", "key", "shard", "row"):
        pair[f"{name}_a"], pair[f"{name}_b"] = pair[f"{name}_b"], pair[f"{name}_a"]


def set_field(table: str, name: str, value: Any, row: int = -1) -> Callable[[Forged], None]:
    def change(forged: Forged) -> None:
        forged.tables[table][row][name] = value

    return change


def say_same_bytes(twin: int | None) -> Callable[[Forged], None]:
    """Say that the last sample has the bytes of another, by default the first of its component."""

    def change(forged: Forged) -> None:
        last = forged.tables["components"][-1]
        last.update(match="bytes", keep=False, twin=last["component"] if twin is None else twin)
        forged.totals.update(same_bytes=1, droppable=1)
        for name in ("same_code_only", "unread"):
            forged.totals[name] -= 1

    return change


def drop_sample(forged: Forged) -> None:
    forged.tables["components"].pop()


CHANGES: dict[str, tuple[Callable[[Forged], None], str]] = {
    "a pair is gone": (lambda f: f.tables["pairs"].remove(near(f)), "the totals are"),
    "a pair is gone, also from the totals": (lambda f: f.drop(near(f)), "lacks the pair of the ids"),
    "a pair of equal codes is gone, also from the totals and components": (
        lambda f: f.drop(next(row for row in f.tables["pairs"] if row["distance"] == 0)),
        "lacks the pair of the ids",
    ),
    "a pair comes twice": (lambda f: f.tables["pairs"].append(f.tables["pairs"][-1]), "not in order, or one comes"),
    "pairs are not sorted": (lambda f: f.tables["pairs"].reverse(), "not in order"),
    "a pair is the other way round": (swap, "not in order"),
    "another distance": (change_distance, "pairs whose codes differ in another number of bits"),
    "a distance beyond the radius": (set_field("pairs", "distance", RADIUS + 1), "outside the radius of 4"),
    "a negative distance": (set_field("pairs", "distance", -1), "outside the radius of 4"),
    "equal codes with more pairs": (change_to_another_code, "has more pairs than that one"),
    "another key in a pair": (set_field("pairs", "key_b", "x"), "other keys than the components"),
    "another shard in a pair": (set_field("pairs", "shard_a", "x.tar"), "another shard or row than its id"),
    "another row in a pair": (set_field("pairs", "row_b", 3), "another shard or row than its id"),
    "a tar that took no part": (set_field("pairs", "id_b", 9 << 32), "tars that did not take part"),
    "another key in a component": (set_field("components", "key", "x"), "other keys than the components"),
    "another row in a component": (set_field("components", "row", 99), "another shard or row"),
    "another component": (set_field("components", "component", 1, 3), "not those of the pairs, see component"),
    "another size": (set_field("components", "size", 11), "not those of the pairs, see size"),
    "nothing is kept": (set_field("components", "keep", False, 0), "keep does not follow from match"),
    "a sample goes that shares only the code": (set_field("components", "keep", False), "keep does not follow"),
    "the first of a component has a twin": (set_field("components", "match", "code", 0), "not those of the pairs"),
    "a match that nobody knows": (set_field("components", "match", "smell"), "a match that is not known"),
    "the first has another one as twin": (set_field("components", "twin", 1, 0), "without a twin names one"),
    "another twin by the code": (set_field("components", "twin", 1), "is not the first one"),
    "a twin that is nowhere": (say_same_bytes(9 << 32), "does not stay in its component"),
    "a twin in another component": (say_same_bytes(0), "does not stay in its component"),
    "a twin by pictures that nobody named": (say_same_bytes(None), "but it names no shards"),
    "a sample is in no component": (drop_sample, "has samples that are in no component"),
    "components are not sorted": (lambda f: f.tables["components"].reverse(), "not those of the pairs"),
    "another tar": (set_field("shards", "shard_sha256", "0" * 64), "does not list the tars of its inputs"),
    "other rows": (set_field("shards", "rows", 8), "the totals are"),
    "tars are not sorted": (lambda f: f.tables["shards"].reverse(), "not sorted by ordinal"),
    "totals of samples": (lambda f: f.totals.update(samples=36), "the totals are"),
    "totals of groups": (lambda f: f.totals.update(groups=9), "the totals are"),
    "totals of what can go": (lambda f: f.totals.update(droppable=1), "the totals are"),
    "totals of the same code": (lambda f: f.totals.update(same_code_only=1), "the totals are"),
    "a receipt of another unit": (lambda f: f.receipt.update(unit=1), "is not the receipt of unit 0"),
    "a receipt without its part": (lambda f: f.receipt.update(parts=[]), "the receipts do not name the parts"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_each_thing_that_is_wrong_is_noticed(made: Artifact, tmp_path: Path, name: str) -> None:
    change, complaint = CHANGES[name]
    forged = Forged(made)
    change(forged)
    with pytest.raises(DamagedArtifact, match=complaint):
        verify(forged.commit(tmp_path / "forged"))


def test_codes_of_another_digest_are_noticed(made: Artifact, tmp_path: Path) -> None:
    forged = Forged(made)
    forged.inputs = (ArtifactInput(role="codes-0", kind="codes", digest="0" * 64),)
    with pytest.raises(DamagedArtifact, match="was made from codes 000000000000"):
        verify(forged.commit(tmp_path / "forged"))
