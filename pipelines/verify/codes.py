"""Proves a codes artifact: schema, order, labels, conservation, and the samples of its input shards."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Self, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.artifacts.facts import CodesMeta, ModelMeta, Receipt, ShardsMeta
from pipelines.artifacts.manifest import Artifact, Part, ReceiptRef
from pipelines.artifacts.parquet import table_digest
from pipelines.artifacts.tables import REJECTS, Reason, codes_schema, parse_column_type, read_table
from pipelines.artifacts.versions import open_known
from pipelines.encode.codes import require_signs
from pipelines.errors import DamagedArtifact
from pipelines.shards.shards import Shard, ShardSet, open_shards
from pipelines.verify.findings import Findings, check_distinct_keys

_T = TypeVar("_T")
_R = TypeVar("_R")
_PLACES = pa.schema(
    [("key", pa.string()), ("row", pa.int32()), ("path", pa.string()), ("labels", pa.list_(pa.int32()))]
)


def prove_codes(findings: Findings) -> None:
    """Check schema, order, labels and conservation: each sample of each shard is a code or a reject, once."""
    artifact, source, model = findings.artifact, findings.input("shards"), findings.input("model")
    opened: ShardSet | None = None
    if source is not None:
        with findings.guard():
            opened = open_shards(source)
    with findings.guard():
        meta = artifact.facts(CodesMeta)
        if source is not None:
            with findings.guard():
                findings.require_split("protocol", meta.protocol, source.facts(ShardsMeta).split_part)
        if model is not None:
            with findings.guard():
                findings.require_split("trained_on", meta.trained_on, model.facts(ModelMeta).protocol)
        _prove_receipts(findings, CodesProver(artifact, opened))


class CodesProver:
    """Proves the codes and rejects of single shards, each with its rows of the shard index where that is at hand."""

    def __init__(self, artifact: Artifact, source: ShardSet | None) -> None:
        """Take the codes and their shards; raises DamagedArtifact where the manifest lacks facts of codes."""
        meta = artifact.facts(CodesMeta)
        try:
            # In the order of the setting, which is the order of the columns: the manifest sorts its keys.
            columns = {name: parse_column_type(meta.carried[name]) for name in meta.config.encode.carry}
        except (KeyError, TypeError, ValueError):
            raise DamagedArtifact(f"{artifact.uri}: the codes manifest does not say its carried columns") from None
        fingerprint = artifact.manifest.fingerprint
        self.schema = codes_schema(meta.bits, fingerprint, meta.classes, columns, meta.has_real_codes)
        self.shards = {shard.name: shard for shard in source.shards} if source else {}
        self._artifact, self._source, self._classes = artifact, source, len(meta.classes)

    @classmethod
    def open(cls, uri: str, digest: str, shards_uri: str | None, shards_digest: str) -> Self:
        """Open codes, and their shards if they are at hand, each in the version of a digest."""
        source = open_shards(shards_uri, shards_digest) if shards_uri else None
        return cls(open_known(uri, "codes", digest), source)

    @property
    def args(self) -> tuple[str, str, str | None, str]:
        """The arguments of `open` that make the same prover."""
        mine = self._artifact.uri, self._artifact.digest
        return (*mine, self._source.artifact.uri, self._source.artifact.digest) if self._source else (*mine, None, "")

    def claim(self, reference: ReceiptRef, receipt: Receipt) -> tuple[object, ...]:
        """Return what `prove` would prove of a shard; raises DamagedArtifact where its rows cannot be read."""
        schema = hashlib.sha256(self.schema.serialize().to_pybytes()).hexdigest()
        shard = self.shards.get(receipt.shard)
        rows = [shard.part.sha256, table_digest(shard.table())] if shard else None
        return "codes", reference.sha256, schema, rows

    def prove(self, work: tuple[Receipt, bool]) -> tuple[pa.ChunkedArray | None, str | None]:
        """Prove a shard, or with False only read its keys; return the keys, and the problem if there is one."""
        receipt, whole = work
        try:
            if not whole:
                return self._read_keys(receipt), None
            places = _prove_shard(self._artifact, receipt, self.schema, self._classes)
        except DamagedArtifact as damage:
            return None, str(damage)
        try:
            if receipt.shard in self.shards:
                _require_same_samples(self._artifact, receipt, self.shards[receipt.shard], places)
        except DamagedArtifact as damage:
            return places["key"], str(damage)
        return places["key"], None

    def run(self, items: Sequence[tuple[Receipt, bool]]) -> list[tuple[pa.ChunkedArray | None, str | None]]:
        """Prove several shards."""
        return [self.prove(item) for item in items]

    def _read_keys(self, receipt: Receipt) -> pa.ChunkedArray:
        """Return the keys of a shard's samples, in any order."""
        store = self._artifact.store
        tables = [read_table(store, part, self.schema, ["key"]) for part in receipt.codes]
        if receipt.rejects is not None:
            tables.append(read_table(store, receipt.rejects, REJECTS, ["key"]))
        return pa.chunked_array([chunk for table in tables for chunk in table["key"].chunks], pa.string())


def _prove_receipts(findings: Findings, prover: CodesProver) -> None:
    """Check the parts of every receipt, and that together they are what the manifest promises."""
    artifact, manifest = findings.artifact, findings.artifact.manifest
    receipts = list(_receipts(findings))
    _prove_parts(findings, prover, receipts)
    claimed = {part.path for _, receipt in receipts for part in receipt.parts}
    for part in manifest.parts:
        findings.require(part.path in claimed, f"{artifact.uri}/{part.path} belongs to no receipt")
    if prover.shards and set(prover.shards) != {receipt.shard for _, receipt in receipts}:
        findings.note_problem(f"{artifact.uri}: the receipts are not of the {len(prover.shards)} shards of its input")
    rejected = sum(receipt.rejects.rows for _, receipt in receipts if receipt.rejects)
    counts = {
        "samples": sum(receipt.samples for _, receipt in receipts),
        "codes": sum(part.rows for _, receipt in receipts for part in receipt.codes),
        "rejects": rejected,
    }
    findings.require(
        counts == manifest.totals, f"{artifact.uri}: the totals are {manifest.totals}, the receipts add up to {counts}"
    )
    findings.checks.append(
        f"conservation: {counts['samples']} samples = {counts['codes']} codes + {rejected} rejects, shard by shard"
        + (", with the keys, paths and labels of the shard index" if prover.shards else "")
    )


def _prove_parts(findings: Findings, prover: CodesProver, receipts: Sequence[tuple[ReceiptRef, Receipt]]) -> None:
    """Prove the shards that no verification has proven, and that no key stands for two samples."""
    claims: dict[str, tuple[object, ...]] = {}
    for reference, receipt in receipts:
        with findings.guard():
            claims[receipt.shard] = prover.claim(reference, receipt)
    new = {shard for shard, claim in claims.items() if not findings.proofs.holds(*claim)}
    distinct = ("distinct keys", sorted(map(repr, claims.values())))
    if not new and findings.proofs.holds(*distinct):
        return
    work = [(receipt, receipt.shard in new) for _, receipt in receipts if receipt.shard in claims]
    sizes = [sum(part.bytes for part in receipt.parts) for receipt, _ in work]
    paths = {receipt.shard: [part.path for part in receipt.parts] for _, receipt in receipts}
    keys, complete = list[pa.Array](), len(claims) == len(receipts)
    for (receipt, whole), (found, problem) in findings.spread.run(prover, prover.args, work, sizes, "shards"):
        keys += found.chunks if found is not None else []
        complete = complete and found is not None
        if problem is not None:
            findings.note_problem(problem)
        elif whole:
            findings.proofs.add(paths[receipt.shard], *claims[receipt.shard])
    if check_distinct_keys(findings, pa.chunked_array(keys, pa.string())) and complete:
        findings.proofs.add((), *distinct)


def _receipts(findings: Findings) -> Iterator[tuple[ReceiptRef, Receipt]]:
    artifact, manifest = findings.artifact, findings.artifact.manifest
    listed = frozenset(manifest.parts)
    for ref in manifest.receipts:
        where = f"{artifact.uri}/{ref.path}"
        with findings.guard():
            receipt = ref.parse(Receipt, artifact.uri, "encode to another --out")
            if receipt.shard.removesuffix(".tar") != ref.shard:
                raise DamagedArtifact(f"{where} is the receipt of {receipt.shard}")
            for part in receipt.parts:
                if part not in listed:
                    raise DamagedArtifact(f"{where} names {part.path}, which the manifest does not list")
            yield ref, receipt


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
