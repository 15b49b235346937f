"""`verify` proves what an artifact of each kind says of itself."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import safetensors.numpy

from pipelines.artifacts.commit import ArtifactWriter
from pipelines.artifacts.facts import ShardsMeta
from pipelines.artifacts.manifest import Artifact, manifest_digest
from pipelines.artifacts.parquet import parquet_bytes, read_parquet
from pipelines.artifacts.tables import SHARD_INDEX
from pipelines.errors import DamagedArtifact
from pipelines.index.kinds import index_kind
from pipelines.shards.index import piece_name, put_index
from pipelines.shards.shards import open_shards, scan_tar, write_tar
from pipelines.storage import Store, canonical_json, sha256_of
from pipelines.verify.verify import verify
from tests.support.artifacts import BITS, CLASSES, MARK, MODEL_CARD, Columns, make_codes, make_index, make_model


def resign(root: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite a manifest with a digest that fits again."""
    path = root / "manifest.json"
    fields = json.loads(path.read_bytes())
    change(fields)
    fields["digest"] = manifest_digest(fields)
    path.write_bytes(canonical_json(fields))


def replace_part(root: Path, name: str, data: bytes) -> None:
    """Put other bytes under a part, with size, sha256 and the manifest's digest fitting again."""

    def change(fields: dict[str, Any]) -> None:
        for part in fields["parts"]:
            if part["path"].startswith(f"parts/{name}"):
                (root / part["path"]).write_bytes(data)
                part.update(bytes=len(data), sha256=sha256_of(data))

    resign(root, change)


# ------------------------------------------------------------------------------------------------------------- shards


def edit_index(shards: Artifact, change: Callable[[list[dict[str, Any]]], None]) -> None:
    part = shards.manifest.part(piece_name(0))
    rows = read_parquet(shards.read(part), "index").to_pylist()
    change(rows)
    data = parquet_bytes(pa.Table.from_pylist(rows, schema=SHARD_INDEX))
    replace_part(Path(shards.uri), "index", data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[1].update(key=rows[0]["key"]), "1 key stand"),
        (lambda rows: rows[4].update(labels=[2 - rows[4]["labels"][0] or 1]), "says labels"),
        (lambda rows: rows[4].update(labels=[7]), "class id 7"),
        (lambda rows: rows[4]["members"].pop(), "is not the"),
        (lambda rows: rows[9]["members"].pop(), "which the index does not list|is not the"),
        (lambda rows: rows[4]["members"][0].update(sha256=bytes(32)), "is not the"),
        (lambda rows: rows[4]["members"][0].update(offset=512 * 3 + 1), "is not the"),
        (lambda rows: rows[4].update(row=5), "does not number the rows"),
        (lambda rows: rows[23].update(row=9), "does not number the rows of shard-000002.tar"),
        (lambda rows: rows[4].update(members=[]), "samples without a member"),
        (lambda rows: rows[4]["members"][1].update(sha256=None), "or empty cells"),
        (lambda rows: rows[4]["members"][0].update(offset=-1), "negative offset"),
        (lambda rows: rows[23]["members"][1].update(size=-1), "negative size"),
        (lambda rows: rows[4].update(shard="shard-000001.tar"), "does not hold the 10 rows"),
        (lambda rows: rows.pop(), "has 23 rows, the manifest 24"),
    ],
)
def test_an_index_that_lies(shards: Artifact, change: Callable[[list[dict[str, Any]]], None], message: str) -> None:
    edit_index(shards, change)
    with pytest.raises(DamagedArtifact, match=message):
        verify(shards.uri)


def test_a_tar_without_its_end_is_noticed_though_its_digest_fits(shards: Artifact) -> None:
    part = next(part for part in shards.manifest.parts if part.name == "shard-000002.tar")
    data = Path(shards.uri, part.path).read_bytes().rstrip(b"\0")
    replace_part(Path(shards.uri), "shard-000002", data + bytes(-len(data) % 512))
    with pytest.raises(DamagedArtifact, match="the tar ends inside a header"):
        verify(shards.uri)


def test_a_tar_without_its_last_sample_is_noticed_though_its_digest_fits(shards: Artifact) -> None:
    shard = open_shards(shards).shards[2]
    data = Path(shards.uri, shard.part.path).read_bytes()
    first = min(member.offset for member in shard.records()[-1].members) - 512
    replace_part(Path(shards.uri), "shard-000002", data[:first] + bytes(1024))
    with pytest.raises(DamagedArtifact, match=r"ends before .*, which the index lists"):
        verify(shards.uri)


@pytest.mark.parametrize("content", [b'{"labels": [1e400]}', b"[" * 100_000, b'{"labels": null}', b'{"labels": ["x"]}'])
def test_labels_in_a_tar_that_nobody_can_read(tmp_path: Path, content: bytes) -> None:
    write_tar(tmp_path / "a.tar", [{"__key__": "k", "png": b"x", "json": content}])
    rows = scan_tar(tmp_path / "a.tar", "a.tar", {"k": [0]}, {"k": "k.png"}, {"k": "k.png"})
    writer = ArtifactWriter(Store(tmp_path / "shards"), "shards", MARK, (), {})
    parts = [writer.put_part("a.tar", tmp_path / "a.tar", 1), *put_index(writer, [rows])]
    totals = {"samples": 1, "skipped": 0, "found": 1}
    shards = writer.commit(parts, totals, ShardsMeta(classes=("one",), source="", split=None))
    with pytest.raises(DamagedArtifact, match=r"k\.json says labels \[-1\], the index \[0\]"):
        verify(shards.uri)


@pytest.mark.parametrize(
    ("name", "message"), [("samples", "totals say 25"), ("skipped", "are not samples plus skipped")]
)
def test_totals_that_do_not_add_up(shards: Artifact, name: str, message: str) -> None:
    resign(Path(shards.uri), lambda fields: fields["totals"].update({name: fields["totals"][name] + 1}))
    with pytest.raises(DamagedArtifact, match=message):
        verify(shards.uri)


# ------------------------------------------------------------------------------------------------------------- codes


def drop_row(shard: str, codes: Columns, rejects: Columns) -> None:
    for column in codes.values():
        del column[0]


def double_row(shard: str, codes: Columns, rejects: Columns) -> None:
    for name, column in codes.items():
        column.insert(0, 3 if name == "row" else column[0])
    for column in codes.values():
        column[0:4] = [*column[1:4], column[0]]


def swap_rows(shard: str, codes: Columns, rejects: Columns) -> None:
    for column in codes.values():
        column[0], column[1] = column[1], column[0]


def set_code(name: str, value: Any) -> Callable[[str, Columns, Columns], None]:
    def change(shard: str, codes: Columns, rejects: Columns) -> None:
        codes[name][0] = value

    return change


def set_reject(name: str, value: Any) -> Callable[[str, Columns, Columns], None]:
    def change(shard: str, codes: Columns, rejects: Columns) -> None:
        rejects[name][0] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_row, "has 10 samples, but its codes and rejects together have 9 rows"),
        (double_row, "together have 11 rows"),
        (swap_rows, "is not sorted by row"),
        (set_code("key", "class_00/none"), "keys? stand for several|other keys than the shard index"),
        (set_code("labels", [3]), "labels outside the 3 classes"),
        (set_code("labels", [-1]), "labels outside the 3 classes"),
        (set_code("labels", []), "other labels than the shard index"),
        (set_code("path", "class_00/none.png"), "other paths than the shard index"),
        (set_code("shard", "shard-000009.tar"), "rows of another shard"),
        (set_code("code", b"\x00\x10"), "bits set beyond the 12"),
        (set_reject("reason", "bad luck"), "the reason 'bad luck'"),
        (set_reject("row", 4), "together have 10 rows that are not 0 to 9"),
        (set_reject("shard", "shard-000009.tar"), "rows of another shard"),
        (set_reject("key", "x"), "other keys than the shard index"),
    ],
)
def test_codes_that_break_the_law(
    tmp_path: Path,
    shards: Artifact,
    model: Artifact,
    change: Callable[[str, Columns, Columns], None],
    message: str,
) -> None:
    codes = make_codes(tmp_path / "codes", shards, model, change)
    with pytest.raises(DamagedArtifact, match=message):
        verify(codes.uri)


def test_the_law_holds_without_the_shards_at_hand(tmp_path: Path, shards: Artifact, model: Artifact) -> None:
    codes = make_codes(tmp_path / "codes", shards, model, drop_row)
    (tmp_path / "shards").rename(tmp_path / "moved")
    with pytest.raises(DamagedArtifact, match="together have 9 rows"):
        verify(codes.uri)


def test_totals_schema_metadata_and_missing_shards(tmp_path: Path, shards: Artifact, model: Artifact) -> None:
    wrong = make_codes(tmp_path / "a", shards, model, totals={"samples": 24, "codes": 24, "rejects": 0})
    with pytest.raises(DamagedArtifact, match="the receipts add up to"):
        verify(wrong.uri)
    wrong = make_codes(tmp_path / "b", shards, model, mark="e" * 64)
    with pytest.raises(DamagedArtifact, match="columns or schema metadata"):
        verify(wrong.uri)
    wrong = make_codes(
        tmp_path / "c", shards, model, totals={"samples": 14, "codes": 12, "rejects": 2}, leave_out="shard-000001"
    )
    with pytest.raises(DamagedArtifact, match="the receipts are not of the 3 shards"):
        verify(wrong.uri)


def test_a_manifest_that_lacks_the_facts_of_its_kind(tmp_path: Path, shards: Artifact, model: Artifact) -> None:
    codes = make_codes(tmp_path / "codes", shards, model)
    index = make_index(tmp_path / "index", codes)
    for artifact in (codes, index, model, shards):
        resign(Path(artifact.uri), lambda fields: fields["meta"].clear())
        with pytest.raises(DamagedArtifact):
            verify(artifact.uri)


def test_a_part_without_a_receipt(tmp_path: Path, shards: Artifact, model: Artifact) -> None:
    codes = make_codes(tmp_path / "codes", shards, model)
    resign(Path(codes.uri), lambda fields: fields["receipts"].pop())
    with pytest.raises(DamagedArtifact, match="belongs to no receipt"):
        verify(codes.uri)


def test_an_input_replaced_by_another(tmp_path: Path, shards: Artifact, model: Artifact) -> None:
    codes = make_codes(tmp_path / "codes", shards, model)
    other = make_model(tmp_path / "other", shards, weights=b"")
    with pytest.raises(DamagedArtifact, match=f"but {other.uri} is"):
        verify(codes.uri, model=other.uri)


# ------------------------------------------------------------------------------------------------------ the other kinds


@pytest.mark.parametrize(
    ("card", "weights", "message"),
    [
        ({**MODEL_CARD, "bits": 16}, None, "differ in bits"),
        ({**MODEL_CARD, "classes": CLASSES[::-1]}, None, "differ in classes"),
        ([], None, r"model.json cannot be used \(is wrong: Input should be an object\)"),
        (MODEL_CARD, b"\x80\x04pickle", "model.safetensors is not safetensors"),
    ],
)
def test_models(tmp_path: Path, shards: Artifact, card: Any, weights: bytes | None, message: str) -> None:
    made = make_model(tmp_path / "model", shards, card, weights)
    with pytest.raises(DamagedArtifact, match=message):
        verify(made.uri)


def test_an_index_whose_totals_lie(tmp_path: Path, shards: Artifact, model: Artifact) -> None:
    index = make_index(tmp_path / "index", make_codes(tmp_path / "codes", shards, model))
    resign(Path(index.uri), lambda fields: fields["totals"].update(codes=20))
    with pytest.raises(DamagedArtifact, match="the totals say 20 codes, not 21"):
        verify(index.uri)


def test_an_index_part_with_fewer_codes(tmp_path: Path, shards: Artifact, model: Artifact) -> None:
    index = make_index(tmp_path / "index", make_codes(tmp_path / "codes", shards, model))
    data = index_kind("flat").build(np.zeros((2, 2), np.uint8), np.arange(2), None, {})
    replace_part(Path(index.uri), "part-000001", data)
    with pytest.raises(DamagedArtifact, match="part"):
        verify(index.uri)


def test_an_index_of_other_codes(tmp_path: Path, shards: Artifact, model: Artifact) -> None:
    index = make_index(tmp_path / "index", make_codes(tmp_path / "codes", shards, model))
    resign(Path(index.uri), lambda fields: fields["inputs"][0].update(digest="0" * 64))
    with pytest.raises(DamagedArtifact, match="comes from codes that are not its input"):
        verify(index.uri)


def test_checkpoints(tmp_path: Path) -> None:
    writer = ArtifactWriter(Store(tmp_path), "checkpoint", MARK, (), {})
    state = safetensors.numpy.save({"a": np.ones(2), "b": np.ones(3)})
    parts = [
        writer.put_part("state.safetensors", state, 2),
        writer.put_part("progress.json", canonical_json({"best": None}), 1),
    ]
    writer.commit(parts, {"tensors": 2}, {"step": 1})
    assert verify(str(tmp_path)).kind == "checkpoint"
    resign(tmp_path, lambda fields: fields["totals"].update(tensors=3))
    with pytest.raises(DamagedArtifact, match="the totals say 3 tensors, the state has 2"):
        verify(str(tmp_path))


def test_reports(tmp_path: Path) -> None:
    writer = ArtifactWriter(Store(tmp_path), "report", MARK, (), {})
    parts = [
        writer.put_part("metrics.json", canonical_json({"map": 0.5, "chance": 0.1}), 1),
        writer.put_part("report.html", b"<!doctype html>", 1),
    ]
    writer.commit(parts, {}, {"map": 0.5, "chance": 0.1, "convention": "", "precision_at": {}, "bits": BITS})
    assert verify(str(tmp_path)).kind == "report"
    resign(tmp_path, lambda fields: fields["meta"].update(map=0.9))
    with pytest.raises(DamagedArtifact, match="differ in map"):
        verify(str(tmp_path))
