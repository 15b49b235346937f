"""Proofs of index, model, checkpoint, report and alias artifacts."""

import json
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import safetensors

from pipelines.artifacts.commit import versions
from pipelines.artifacts.splits import carried
from pipelines.artifacts.versions import made_as, named_version
from pipelines.encode.codes import CodesSet, CodesShard, open_codes, require_signs
from pipelines.errors import DamagedArtifact, InputError, StoreUnavailable
from pipelines.index.aliases import AliasTarget
from pipelines.index.kinds import NOTHING_REMOVED
from pipelines.index.reader import IndexedShard, IndexReader, keys_name, part_receipt
from pipelines.storage import scratch_folder
from pipelines.verify.findings import Findings, count


def prove_index(findings: Findings) -> None:
    """Ordinals, key tables, parts and codes agree on the rows, and each part opens with those that are not removed."""
    artifact = findings.artifact
    with findings.guard(), scratch_folder() as folder:
        reader = IndexReader(artifact, folder)
        digests = {entry.digest for entry in artifact.manifest.inputs}
        filled = reader.filled()
        for shard in filled if made_as(artifact) > 1 else reader.shards.values():
            findings.require(
                shard.codes_digest in digests, f"{artifact.uri}: {shard.shard} comes from codes that are not its input"
            )
        paths: dict[str, list[str]] = {}
        for part in artifact.manifest.parts:
            paths.setdefault(PurePosixPath(part.name).stem, []).append(part.path)
        for shard in filled:
            with findings.guard():
                own = [path for name in ("keys", "part") for path in paths.get(f"{name}-{shard.ordinal:06d}", ())]
                _prove_part(findings, reader, shard, own)
        stems = {f"{name}-{shard.ordinal:06d}" for shard in filled for name in ("part", "keys")}
        for part in artifact.manifest.parts:
            stem = PurePosixPath(part.name).stem
            owned = stem in stems or not stem.startswith(("part-", "keys-"))
            findings.require(owned, f"{artifact.uri} lists {part.path}, but the ordinal table gives it no rows")
        total = artifact.manifest.totals.get("codes")
        findings.require(total == reader.count, f"{artifact.uri}: the totals say {total} codes, not {reader.count}")
        gone = sum(len(rows) for rows in reader.removed.values())
        findings.checks.append(
            f"{count(reader.count, 'code')} in {count(len(filled), 'part')} that open"
            + (f", {gone} of their rows removed" if gone else "")
        )
        found = [findings.input(entry.role) for entry in artifact.manifest.inputs]
        inputs = [entry for entry in found if entry is not None]
        findings.one_model(inputs)
        for codes in inputs:
            if codes.manifest.kind == "codes":
                with findings.guard():
                    _prove_shards(findings, reader, open_codes(codes))


def _prove_part(findings: Findings, reader: IndexReader, shard: IndexedShard, paths: Sequence[str]) -> None:
    """The rows ascend, the removed ones are among them, and the part opens with the others; its files are `paths`."""
    mark = (*paths, shard.rows, reader.removed.get(shard.ordinal, NOTHING_REMOVED).tobytes())
    if mark in findings.proven:  # as a part of another version
        return
    keys = reader.read_keys(shard.ordinal)
    rows = keys["row"].to_numpy()
    if (np.diff(rows) <= 0).any() or rows[0] < 0:
        raise DamagedArtifact(f"{reader.artifact.uri}: the key table of {shard.shard} is not sorted by row")
    if reader.logits:
        require_signs(keys, reader.bits, f"{reader.artifact.uri}/{keys_name(shard.ordinal)}")
    reader.live_keys(shard.ordinal)
    reader.open_part(shard)  # refuses a part that does not hold as many codes
    findings.proven.add(mark)


def _prove_shards(findings: Findings, reader: IndexReader, codes: CodesSet) -> None:
    """The index holds the tars of its codes with their keys and codes, less the rows that were compacted away."""
    uri, later = findings.artifact.uri, made_as(findings.artifact) > 1
    if codes.logits != reader.logits:
        findings.problem(f"{uri}: one of the index and its input {codes.artifact.uri} has logits, the other has none")
        return
    encoded = {shard.sha256: shard for shard in codes.shards}
    indexed = [shard for shard in reader.shards.values() if shard.codes_digest == codes.artifact.digest]
    if later:  # which may have removed whole tars
        indexed = [shard for shard in indexed if shard.rows]
    found = {shard.shard_sha256 for shard in indexed}
    same = found <= encoded.keys() if later else found == encoded.keys()
    for shard in indexed if same else ():
        source = encoded[shard.shard_sha256]
        gone = source.rows - shard.rows
        explained = part_receipt(findings.artifact, shard.ordinal).get("compacted", 0) if gone and later else 0
        same = same and gone == explained
        if same and shard.rows:
            _prove_rows(findings, reader, shard, codes, source)
    findings.require(same, f"{uri}: the ordinal table does not list the tars of {codes.artifact.uri} with their codes")


def _prove_rows(
    findings: Findings, reader: IndexReader, shard: IndexedShard, codes: CodesSet, source: CodesShard
) -> None:
    """Key, code, labels and any logits of every row are those of the codes."""
    part = reader.part(keys_name(shard.ordinal))
    mark = (part.path, ",".join(held.sha256 for held in source.parts))
    if mark in findings.proven:
        return
    keys = reader.read_keys(shard.ordinal)
    table = codes.read(source).select(keys.column_names)
    table = table.filter(pa.array(np.isin(table["row"].to_numpy(), keys["row"].to_numpy())))
    findings.require(
        len(table) == len(keys) and table.cast(keys.schema).equals(keys),
        f"{reader.artifact.uri}/{part.path} has other rows than {codes.artifact.uri}/{source.parts[0].path}",
    )
    findings.proven.add(mark)


def prove_model(findings: Findings) -> None:
    """The weights are safetensors and the card agrees with the manifest."""
    artifact = findings.artifact
    card = _json_object(findings, "model.json")
    _tensors(findings, "model.safetensors")
    for name in ("bits", "classes"):
        findings.require(
            card.get(name) == artifact.manifest.meta.get(name),
            f"{artifact.uri}: model.json and the manifest differ in {name}",
        )
    inputs = {entry.role: findings.input(entry.role) for entry in artifact.manifest.inputs}
    if (shards := inputs.get("shards")) is not None:
        findings.split(carried(shards.manifest))


def prove_checkpoint(findings: Findings) -> None:
    """The state is safetensors with as many tensors as the totals say."""
    artifact = findings.artifact
    _json_object(findings, "progress.json")
    count = _tensors(findings, "state.safetensors")
    total = artifact.manifest.totals.get("tensors")
    findings.require(count == total, f"{artifact.uri}: the totals say {total} tensors, the state has {count}")


def prove_report(findings: Findings) -> None:
    """The metrics are JSON and agree with the manifest; only a report on agreement compares codes of several models."""
    artifact = findings.artifact
    metrics = _json_object(findings, "metrics.json")
    on_agreement = [entry.role for entry in artifact.manifest.inputs] == ["old", "new"]
    for name in ("overlap", "chance", "correlation") if on_agreement else ("map", "chance"):
        findings.require(
            metrics.get(name) == artifact.manifest.meta.get(name),
            f"{artifact.uri}: metrics.json and the manifest differ in {name}",
        )
    inputs = [findings.input(entry.role) for entry in artifact.manifest.inputs]
    if not on_agreement:
        findings.one_model(entry for entry in inputs if entry is not None)


def prove_alias(findings: Findings) -> None:
    """The version names an index that is published where it says, unless that is out of reach; the root names none."""
    artifact = findings.artifact
    if not artifact.manifest.meta:
        empty = [n for n in versions(artifact.store) if named_version(artifact.store, n)[1].digest == artifact.digest]
        findings.require(not empty, f"{artifact.uri}: versions {empty} name no index")
        return
    with findings.guard():
        target = AliasTarget.of(artifact)
        try:
            _, index = target.open()
        except (InputError, StoreUnavailable) as error:
            findings.checks.append(f"index {target.uri}: not checked ({error})")
        else:
            findings.checks.append(f"index {index.uri} is published, with the fingerprint, bits and model named here")


def _json_object(findings: Findings, name: str) -> dict[str, Any]:
    artifact = findings.artifact
    with findings.guard():
        try:
            value = json.loads(artifact.read(artifact.manifest.part(name)))
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise DamagedArtifact(f"{artifact.uri}: {name} is not a JSON object")
        findings.checks.append(f"{name} is a JSON object")
        return value
    return {}


def _tensors(findings: Findings, name: str) -> int:
    artifact = findings.artifact
    with findings.guard():
        try:
            found = safetensors.deserialize(artifact.read(artifact.manifest.part(name)))  # type: ignore[no-untyped-call]
        except safetensors.SafetensorError as error:
            raise DamagedArtifact(f"{artifact.uri}: {name} is not safetensors: {error}") from None
        findings.checks.append(f"{name} is safetensors with {count(len(found), 'tensor')}")
        return len(found)
    return 0
