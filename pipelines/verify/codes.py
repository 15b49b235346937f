"""Proves a codes artifact: schema, order, labels, conservation, and the samples of its input shards."""

import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.artifacts.facts import CodesMeta, ModelMeta, Receipt, ShardsMeta
from pipelines.artifacts.manifest import Artifact, Part
from pipelines.artifacts.tables import REJECTS, Reason, codes_schema, parse_column_type, read_table
from pipelines.encode.codes import require_signs
from pipelines.errors import DamagedArtifact
from pipelines.shards.shards import Shard, open_shards
from pipelines.storage import map_in_order
from pipelines.verify.findings import Findings, check_distinct_keys

PARTS_AT_ONCE = 4
"""Number of parts that are read and parsed side by side; all of them are in memory."""

_T = TypeVar("_T")
_R = TypeVar("_R")
_PLACES = pa.schema(
    [("key", pa.string()), ("row", pa.int32()), ("path", pa.string()), ("labels", pa.list_(pa.int32()))]
)


def prove_codes(findings: Findings) -> None:
    """Check schema, order, labels and conservation: each sample of each shard is a code or a reject, once."""
    artifact = findings.artifact
    manifest = artifact.manifest
    source = findings.input("shards")
    model = findings.input("model")
    shards: dict[str, Shard] = {}
    if source is not None:
        with findings.guard():
            shards = {shard.name: shard for shard in open_shards(source).shards}
    with findings.guard():
        meta = artifact.facts(CodesMeta)
        if source is not None:
            with findings.guard():
                findings.require_split("protocol", meta.protocol, source.facts(ShardsMeta).split_part)
        if model is not None:
            with findings.guard():
                findings.require_split("trained_on", meta.trained_on, model.facts(ModelMeta).protocol)
        try:
            # In the order of the setting, which is the order of the columns: the manifest sorts its keys.
            columns = {name: parse_column_type(meta.carried[name]) for name in meta.config.encode.carry}
        except (KeyError, TypeError, ValueError):
            raise DamagedArtifact(f"{artifact.uri}: the codes manifest does not say its carried columns") from None
        schema = codes_schema(meta.bits, manifest.fingerprint, meta.classes, columns, meta.has_real_codes)
        _prove_receipts(findings, schema, shards, len(meta.classes))


def _prove_receipts(findings: Findings, schema: pa.Schema, shards: dict[str, Shard], classes: int) -> None:
    """Check the parts of every receipt, and that together they are what the manifest promises."""
    artifact, manifest = findings.artifact, findings.artifact.manifest
    receipts = list(_receipts(findings))
    keys: list[pa.Array] = []

    def prove(receipt: Receipt) -> pa.Table:
        return _prove_shard(artifact, receipt, schema, classes)

    for receipt, found in zip(receipts, map_in_order(partial(_outcome, prove), receipts, PARTS_AT_ONCE), strict=True):
        with findings.guard():
            places = found()
            keys += places["key"].chunks
            if receipt.shard in shards:
                _require_same_samples(artifact, receipt, shards[receipt.shard], places)
    check_distinct_keys(findings, pa.chunked_array(keys, pa.string()))
    claimed = {part.path for receipt in receipts for part in receipt.parts}
    for part in manifest.parts:
        findings.require(part.path in claimed, f"{artifact.uri}/{part.path} belongs to no receipt")
    if shards and set(shards) != {receipt.shard for receipt in receipts}:
        findings.note_problem(f"{artifact.uri}: the receipts are not of the {len(shards)} shards of its input")
    rejected = sum(receipt.rejects.rows for receipt in receipts if receipt.rejects)
    counts = {
        "samples": sum(receipt.samples for receipt in receipts),
        "codes": sum(part.rows for receipt in receipts for part in receipt.codes),
        "rejects": rejected,
    }
    findings.require(
        counts == manifest.totals, f"{artifact.uri}: the totals are {manifest.totals}, the receipts add up to {counts}"
    )
    findings.checks.append(
        f"conservation: {counts['samples']} samples = {counts['codes']} codes + {rejected} rejects, shard by shard"
        + (", with the keys, paths and labels of the shard index" if shards else "")
    )


def _receipts(findings: Findings) -> Iterator[Receipt]:
    artifact, manifest = findings.artifact, findings.artifact.manifest
    listed = frozenset(manifest.parts)
    read = map_in_order(partial(_outcome, artifact.read), manifest.receipts)
    for ref, found in zip(manifest.receipts, read, strict=True):
        where = f"{artifact.uri}/{ref.path}"
        with findings.guard():
            receipt = Receipt.parse(found(), where, "encode to another --out")
            if receipt.shard.removesuffix(".tar") != ref.shard:
                raise DamagedArtifact(f"{where} is the receipt of {receipt.shard}")
            for part in receipt.parts:
                if part not in listed:
                    raise DamagedArtifact(f"{where} names {part.path}, which the manifest does not list")
            yield receipt


def _outcome(work: Callable[[_T], _R], item: _T) -> Callable[[], _R]:
    """Run `work` now and return a function that returns its result or raises its error.

    So damage of one item does not end the work on the others.
    """
    try:
        result = work(item)
    except DamagedArtifact as damage:
        error = damage

        def fail() -> _R:
            raise error

        return fail
    return lambda: result


def _prove_shard(artifact: Artifact, receipt: Receipt, schema: pa.Schema, classes: int) -> pa.Table:
    """Check one shard's codes and rejects.

    Returns key, row, path and labels of its samples; path and labels are null for a reject.
    """
    columns = [_prove_codes(artifact, receipt, part, schema, classes) for part in receipt.codes]
    if receipt.rejects is not None:
        where = f"{artifact.uri}/{receipt.rejects.path}"
        rejects = read_table(artifact.store, receipt.rejects, REJECTS)
        _require_rows(rejects, receipt, where)
        unknown = set(rejects["reason"].to_pylist()) - {str(reason) for reason in Reason}
        if unknown:
            raise DamagedArtifact(f"{where} has the reason {min(unknown)!r}, which is not one of the list")
        nothing = {name: pa.nulls(rejects.num_rows, _PLACES.field(name).type) for name in ("path", "labels")}
        columns.append(pa.table({"key": rejects["key"], "row": rejects["row"], **nothing}))
    places = pa.concat_tables([table.cast(_PLACES) for table in columns]).sort_by("row")
    if places["row"].to_pylist() != list(range(receipt.samples)):
        raise DamagedArtifact(
            f"{artifact.uri}: {receipt.shard} has {receipt.samples} samples, but its codes and rejects together "
            f"have {places.num_rows} rows that are not 0 to {receipt.samples - 1} once each"
        )
    return places


def _prove_codes(artifact: Artifact, receipt: Receipt, part: Part, schema: pa.Schema, classes: int) -> pa.Table:
    """Check one part of a shard's codes; return key, row, path and labels of its samples."""
    where = f"{artifact.uri}/{part.path}"
    codes = read_table(artifact.store, part, schema)
    facts = {name: value for name, value in (codes.schema.metadata or {}).items() if name.startswith(b"hhnet.")}
    if codes.schema.names != schema.names or not _same_facts(facts, schema.metadata):
        raise DamagedArtifact(f"{where}: columns or schema metadata are not those of the manifest")
    _require_rows(codes, receipt, where)
    labels = codes["labels"].combine_chunks().flatten() if codes.num_rows else pa.array([], pa.int32())
    if len(labels) and not 0 <= pc.min(labels).as_py() <= pc.max(labels).as_py() < classes:
        raise DamagedArtifact(f"{where} has labels outside the {classes} classes of the manifest")
    bits = int(schema.metadata[b"hhnet.bits"])
    if bits % 8 and any(code[-1] >> (bits % 8) for code in codes["code"].to_pylist()):
        raise DamagedArtifact(f"{where} has bits set beyond the {bits} that count")
    if b"hhnet.real_codes" in schema.metadata:
        require_signs(codes, bits, where)
    return codes.select(_PLACES.names)


def _require_rows(table: pa.Table, receipt: Receipt, where: str) -> None:
    rows = table["row"].to_numpy()
    if (np.diff(rows) <= 0).any():
        raise DamagedArtifact(f"{where} is not sorted by row")
    if any(table[name].null_count for name in table.schema.names if not table.schema.field(name).nullable):
        raise DamagedArtifact(f"{where} has empty cells in a column that has none")
    if set(table["shard"].unique().to_pylist()) - {receipt.shard}:
        raise DamagedArtifact(f"{where} has rows of another shard than {receipt.shard}")


def _same_facts(facts: dict[bytes, bytes], expected: dict[bytes, bytes]) -> bool:
    """Tell whether a part's metadata agrees with the manifest.

    Its class list may be shorter: the list from before the shards grew.
    """
    if {**facts, b"hhnet.classes": b""} != {**expected, b"hhnet.classes": b""}:
        return False
    try:
        classes = json.loads(facts[b"hhnet.classes"])
    except (KeyError, ValueError):
        return False
    return isinstance(classes, list) and json.loads(expected[b"hhnet.classes"])[: len(classes)] == classes


def _require_same_samples(artifact: Artifact, receipt: Receipt, shard: Shard, places: pa.Table) -> None:
    where = f"{artifact.uri}: the codes of {receipt.shard}"
    if receipt.shard_sha256 != shard.part.sha256 or receipt.samples != shard.rows:
        raise DamagedArtifact(f"{where} are of another tar than the one in its input")
    index = shard.table()
    if places["key"].to_pylist() != index["key"].to_pylist():
        raise DamagedArtifact(f"{where} have other keys than the shard index")
    for name, what in (("path", "paths"), ("labels", "labels")):
        pairs = zip(places[name].to_pylist(), index[name].to_pylist(), strict=True)
        if any(value is not None and value != expected for value, expected in pairs):
            raise DamagedArtifact(f"{where} have other {what} than the shard index")
