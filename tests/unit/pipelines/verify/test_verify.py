"""`verify` accepts what the verbs write and names every way in which stored bytes can be wrong."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray
import safetensors.numpy

from pipelines.artifacts.commit import ArtifactWriter, publish_version
from pipelines.artifacts.facts import Receipt
from pipelines.artifacts.manifest import Artifact, ArtifactInput, Part, manifest_digest, open_artifact
from pipelines.artifacts.tables import REJECTS, SHARD_INDEX, codes_schema, parquet_bytes, read_parquet, table_of
from pipelines.config.loading import load_config
from pipelines.encode.codes import code_array, open_codes
from pipelines.errors import DamagedArtifact, InputError
from pipelines.index.kinds import index_kind
from pipelines.index.reader import ORDINALS, ORDINALS_NAME, index_id, keys_name, keys_schema, part_stem
from pipelines.ingest.ingest import ingest
from pipelines.shards.shards import INDEX_NAME, open_shards
from pipelines.storage import Store, canonical_json, sha256_of
from pipelines.verify import verify as verify_module
from pipelines.verify.verify import verify, verify_tars
from tests.support import pictures
from tests.support.inline import InlinePool, use_inline_pool

MARK = "f" * 64
BITS = 12
CLASSES = ["class_00", "class_01", "class_02"]
METRICS = {"map": 0.5, "epoch": 1, "steps": 1, "skipped": 0}
MODEL_CARD = {
    **{"format": 1, "backbone": "resnet18", "bits": BITS, "head": "linear", "stem_stride": 4, "preprocess": {}},
    **{"classes": CLASSES, "precision": "fp32", "loss": "csq", "metrics": METRICS, "history": [], "settings": {}},
}

Columns = dict[str, list[Any]]


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


def make_model(root: Path, shards: Artifact, card: Any = MODEL_CARD, weights: bytes | None = None) -> Artifact:
    inputs = (ArtifactInput(role="shards", kind="shards", digest=shards.digest),)
    writer = ArtifactWriter(Store(root), "model", MARK, inputs, {"shards": shards.uri})
    data = safetensors.numpy.save({"w": np.ones(3, np.float32)}) if weights is None else weights
    parts = [
        writer.put_part("model.safetensors", data, 1),
        writer.put_part("model.json", canonical_json(card), 1),
    ]
    return writer.commit(parts, {"parameters": 3}, {"bits": BITS, "classes": CLASSES, "metrics": METRICS})


def make_codes(
    root: Path,
    shards: Artifact,
    model: Artifact,
    change: Callable[[str, Columns, Columns], None] | None = None,
    totals: dict[str, int] | None = None,
    mark: str = MARK,
    leave_out: str = "",
) -> Artifact:
    """Codes in which row 3 of each shard is a reject; `change` alters the columns of codes and rejects by shard."""
    inputs = tuple(ArtifactInput(role=a.manifest.kind, kind=a.manifest.kind, digest=a.digest) for a in (shards, model))
    origin = {"shards": shards.uri, "model": model.uri}
    writer = ArtifactWriter(Store(root), "codes", MARK, inputs, origin)
    parts, receipts = [], {}
    for shard in open_shards(shards).shards:
        if shard.stem == leave_out:
            continue
        records = shard.records()
        codes = [record for record in records if record.row != 3]
        columns: Columns = {
            "key": [record.key for record in codes],
            "shard": [shard.name] * len(codes),
            "row": [record.row for record in codes],
            "path": [record.path for record in codes],
            "code": [bytes([record.row, 1]) for record in codes],
            "labels": [list(record.labels) for record in codes],
        }
        rejects: Columns = {
            "key": [records[3].key],
            "shard": [shard.name],
            "row": [3],
            "stage": ["decode"],
            "reason": ["truncated"],
            "detail": ["x"],
        }
        if change:
            change(shard.stem, columns, rejects)
        table = table_of(codes_schema(BITS, mark, CLASSES), columns)
        part = writer.put_part(f"{shard.stem}.parquet", parquet_bytes(table), table.num_rows)
        lost = table_of(REJECTS, rejects)
        reject = writer.put_part(f"{shard.stem}.parquet", parquet_bytes(lost), lost.num_rows, folder="rejects")
        parts += [part, reject]
        sha256 = shard.part.sha256
        receipt = Receipt(shard=shard.name, shard_sha256=sha256, samples=shard.rows, part=part, rejects=reject)
        receipts[shard.stem] = writer.put_receipt(shard.stem, receipt)
    counts = {"samples": 24, "codes": 21, "rejects": 3}
    meta = {"bits": BITS, "classes": CLASSES, "carried": {}, "settings": {"encode.carry": []}}
    return writer.commit(parts, totals or counts, meta, receipts)


def make_index(root: Path, codes: Artifact) -> Artifact:
    opened = open_codes(codes)
    inputs = (ArtifactInput(role="codes-0", kind="codes", digest=codes.digest),)
    writer = ArtifactWriter(Store(root), "index", MARK, inputs, {"codes-0": codes.uri})
    kind = index_kind("flat")
    parts: list[Part] = []
    ordinals: Columns = {name: [] for name in ORDINALS.names}
    for ordinal, shard in enumerate(opened.shards):
        table = opened.read(shard)
        ids = index_id(ordinal, 0) + table["row"].to_numpy().astype(np.int64)
        data = kind.build(code_array(table["code"]), ids, None, {})
        keys = table_of(keys_schema(BITS), {name: table[name].to_pylist() for name in keys_schema(BITS).names})
        parts.append(writer.put_part(part_stem(ordinal) + kind.suffix, data, len(ids)))
        parts.append(writer.put_part(keys_name(ordinal), parquet_bytes(keys), len(ids)))
        for name, value in zip(
            ORDINALS.names, (ordinal, shard.name, shard.sha256, codes.digest, len(ids)), strict=True
        ):
            ordinals[name].append(value)
    parts.append(writer.put_part(ORDINALS_NAME, parquet_bytes(table_of(ORDINALS, ordinals)), 3))
    card = {"count": opened.rows, "bytes_per_code": 1.0}
    meta = {"kind": "flat", "parameters": {}, "quantizer_sha256": None, "card": card}
    meta |= {"bits": BITS, "classes": CLASSES}
    return writer.commit(parts, {"codes": opened.rows, "shards": 3}, meta)


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


def flip(path: Path, place: int | None = None) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if place is None else place] ^= 1
    path.write_bytes(data)


# --------------------------------------------------------------------------------------------------------- all is well


def test_everything_the_verbs_write_is_proven(tmp_path: Path, shards: Artifact, model: Artifact) -> None:
    codes = make_codes(tmp_path / "codes", shards, model)
    index = make_index(tmp_path / "index", codes)
    publish_version(index.store, 1, "manifest.json", index.digest)
    for artifact in (shards, model, codes, index):
        result = verify(artifact.uri).as_json()
        assert {name: result[name] for name in ("verb", "status", "uri", "digest", "kind", "orphans")} == {
            **{"verb": "verify", "status": "done", "uri": artifact.uri, "digest": artifact.digest},
            **{"kind": artifact.manifest.kind, "orphans": []},
        }
    checks = "\n".join(verify(codes.uri).checks)
    assert "24 samples = 21 codes + 3 rejects" in checks
    assert "with the keys, paths and labels of the shard index" in checks
    assert f"input model: {model.uri}" in checks
    assert "24 samples in 3 tars" in "\n".join(verify(shards.uri).checks)
    assert "21 codes in 3 parts" in "\n".join(verify(index.uri).checks)


def test_a_copied_artifact_is_still_proven(tmp_path: Path, shards: Artifact, model: Artifact) -> None:
    codes = make_codes(tmp_path / "codes", shards, model)
    shutil.copytree(codes.uri, tmp_path / "copy")
    assert verify(str(tmp_path / "copy")).digest == codes.digest


def test_inputs_out_of_reach_are_noted(tmp_path: Path, shards: Artifact, model: Artifact) -> None:
    codes = make_codes(tmp_path / "codes", shards, model)
    (tmp_path / "shards").rename(tmp_path / "moved")
    checks = "\n".join(verify(codes.uri).checks)
    assert "input shards: not checked" in checks
    assert "24 samples = 21 codes + 3 rejects" in checks
    again = "\n".join(verify(codes.uri, shards=str(tmp_path / "moved")).checks)
    assert f"input shards: {tmp_path / 'moved'}" in again
    with pytest.raises(InputError):
        verify(codes.uri, shards=str(tmp_path / "nowhere"))


def test_orphans_are_reported_not_failures(tmp_path: Path, shards: Artifact) -> None:
    (tmp_path / "shards/parts/shard-000000-0123456789abcdef.tar").write_bytes(b"lost race")
    (tmp_path / "shards/receipts").mkdir()
    (tmp_path / "shards/receipts/.tmp-1").write_bytes(b"killed")
    (tmp_path / "shards/versions").mkdir()
    (tmp_path / f"shards/versions/{'9' * 30}.json").write_bytes(b"no version")
    result = verify(shards.uri).as_json()
    assert result["orphans"] == [
        *("parts/shard-000000-0123456789abcdef.tar", "receipts/.tmp-1", f"versions/{'9' * 30}.json")
    ]


def test_an_unknown_kind_is_proven_by_digest(tmp_path: Path) -> None:
    writer = ArtifactWriter(Store(tmp_path), "novel", MARK, (), {})
    part = writer.put_part("x.bin", b"data", 1)
    writer.commit([part], {}, {})
    assert "digests only" in verify(str(tmp_path)).checks[-1]
    flip(tmp_path / part.path)
    with pytest.raises(DamagedArtifact, match="does not match the digest"):
        verify(str(tmp_path))


def test_nothing_committed(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no manifest\.json"):
        verify(str(tmp_path))


# --------------------------------------------------------------------------------------------------------- the envelope


def test_every_flipped_part_receipt_and_manifest_is_noticed(tmp_path: Path, shards: Artifact, model: Artifact) -> None:
    codes = make_codes(tmp_path / "codes", shards, model)
    index = make_index(tmp_path / "index", codes)
    for artifact in (shards, model, codes, index):
        root = Path(artifact.uri)
        files = [entry.path for entry in (*artifact.manifest.parts, *artifact.manifest.receipts)]
        for name in [*files, "manifest.json", "identity.json"]:
            before = (root / name).read_bytes()
            flip(root / name)
            with pytest.raises(DamagedArtifact, match=name.split("/")[-1].split("-")[0]):
                verify(artifact.uri)
            (root / name).write_bytes(before[:-1])
            with pytest.raises(DamagedArtifact):
                verify(artifact.uri)
            if name != "manifest.json":
                (root / name).unlink()
                with pytest.raises(DamagedArtifact, match="missing"):
                    verify(artifact.uri)
            (root / name).write_bytes(before)
        verify(artifact.uri)


def test_several_problems_are_counted_and_named(shards: Artifact) -> None:
    for part in shards.manifest.parts:
        if part.name != INDEX_NAME:
            flip(Path(shards.uri, part.path), 1600)  # in the first image
    with pytest.raises(DamagedArtifact) as caught:
        verify(shards.uri)
    message = str(caught.value)
    assert "; and 5 more: " in message  # three tars, each with a member and a digest that differ
    for number in range(3):
        assert f"shard-00000{number}" in message
    assert "\n" not in message


def test_many_problems_are_cut(tmp_path: Path) -> None:
    writer = ArtifactWriter(Store(tmp_path), "novel", MARK, (), {})
    parts = [writer.put_part(f"p{number}.bin", bytes([number]), 1) for number in range(30)]
    writer.commit(parts, {}, {})
    for part in parts:
        (tmp_path / part.path).unlink()
    with pytest.raises(DamagedArtifact, match=r"and 29 more \(the first 20 are named\)"):
        verify(str(tmp_path))


def test_an_identity_of_another_artifact(shards: Artifact) -> None:
    path = Path(shards.uri, "identity.json")
    path.write_bytes(path.read_bytes().replace(shards.manifest.fingerprint[:8].encode(), b"00000000"))
    with pytest.raises(DamagedArtifact, match=r"identity\.json is not what was published"):
        verify(shards.uri)


def test_a_version_that_names_another_manifest(tmp_path: Path, shards: Artifact) -> None:
    publish_version(shards.store, 1, "manifest.json", "0" * 64)
    with pytest.raises(DamagedArtifact, match=r"versions/1\.json"):
        verify(shards.uri)


# ------------------------------------------------------------------------------------------------------------- shards


def edit_index(shards: Artifact, change: Callable[[list[dict[str, Any]]], None]) -> None:
    part = shards.manifest.part(INDEX_NAME)
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


# ------------------------------------------------------------------------------------------------- the tars of a run


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> InlinePool:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    return use_inline_pool(monkeypatch, verify_module)


def test_a_run_reads_the_tars_that_no_run_proved_before(shards: Artifact, tmp_path: Path, pool: InlinePool) -> None:
    out, config = str(tmp_path / "out"), load_config()
    first = verify_tars(shards.uri, out, config).as_json()
    assert (first["status"], first["tars"], first["proven"], first["known"], first["left"]) == ("done", 3, 3, 0, 0)
    assert len(pool.done) == 3
    again = verify_tars(shards.uri, out, config).as_json()
    assert (again["status"], again["proven"], again["known"], again["damaged"]) == ("unchanged", 0, 3, [])
    assert len(pool.done) == 3
    assert verify_tars(shards.uri, str(tmp_path / "other"), config).proven == 3


def test_a_damaged_tar_is_named_and_looked_at_again(shards: Artifact, tmp_path: Path, pool: InlinePool) -> None:
    out, config = str(tmp_path / "out"), load_config()
    opened = open_shards(shards.uri)
    flip(Path(shards.uri, opened.shards[1].part.path), opened.shards[1].records()[3].members[0].offset + 20)
    Path(shards.uri, opened.shards[2].part.path).unlink()
    for _ in range(2):
        found = verify_tars(shards.uri, out, config).as_json()
        assert len(found["damaged"]) == 2
        assert "is not the" in found["damaged"][0] and found["damaged"][1].endswith("is missing")
    assert (found["known"], found["proven"]) == (1, 0)
    with pytest.raises(DamagedArtifact):  # a damaged tar is a damaged artifact for the proof of an artifact
        verify(shards.uri)


def test_a_share_of_the_tars_is_read_until_all_are_known(shards: Artifact, tmp_path: Path, pool: InlinePool) -> None:
    out, config = str(tmp_path / "out"), load_config(sets=["run.verify=0.3"])
    counts = [verify_tars(shards.uri, out, config).as_json() for _ in range(4)]
    assert [(found["proven"], found["known"], found["left"]) for found in counts] == [
        (1, 0, 2),
        (1, 1, 1),
        (1, 2, 0),
        (0, 3, 0),
    ]
    nothing = verify_tars(shards.uri, str(tmp_path / "other"), load_config(sets=["run.verify=0"])).as_json()
    assert (nothing["status"], nothing["left"]) == ("unchanged", 3)


def test_a_tar_whose_reader_died_is_neither_proven_nor_damaged(
    shards: Artifact, tmp_path: Path, pool: InlinePool
) -> None:
    pool.fatal = lambda name: name.endswith("000001.tar")
    found = verify_tars(shards.uri, str(tmp_path / "out"), load_config()).as_json()
    assert (found["proven"], found["damaged"], found["left"]) == (2, [], 1)


def test_shards_whose_index_is_damaged_are_no_shards(shards: Artifact, tmp_path: Path, pool: InlinePool) -> None:
    flip(Path(shards.uri, shards.manifest.part(INDEX_NAME).path), 40)
    with pytest.raises(DamagedArtifact):
        verify_tars(shards.uri, str(tmp_path / "out"), load_config())
    assert pool.done == []


def test_a_record_of_proven_tars_that_is_none_is_named(shards: Artifact, tmp_path: Path, pool: InlinePool) -> None:
    (tmp_path / "out" / "proven").mkdir(parents=True)
    (tmp_path / "out" / "proven" / "x.json").write_text("[]")
    with pytest.raises(DamagedArtifact, match="is no list of proven tars: delete it"):
        verify_tars(shards.uri, str(tmp_path / "out"), load_config())
