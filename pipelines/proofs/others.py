"""Proofs of index, model, checkpoint and report artifacts."""

import json
from typing import Any

import numpy as np
import safetensors

from pipelines.codes import CodesSet, open_codes
from pipelines.errors import DamagedArtifact
from pipelines.kinds.artifact import IndexReader
from pipelines.proofs.findings import Findings, count
from pipelines.storage import scratch_folder


def prove_index(findings: Findings) -> None:
    """Ordinals, key tables and parts agree on the rows, and each part opens with as many codes."""
    artifact = findings.artifact
    with findings.guard(), scratch_folder() as folder:
        reader = IndexReader(artifact, folder)
        digests = {entry.digest for entry in artifact.manifest.inputs}
        for shard in reader.shards.values():
            findings.require(
                shard.codes_digest in digests, f"{artifact.uri}: {shard.shard} comes from codes that are not its input"
            )
        for shard in reader.filled():
            with findings.guard():
                rows = reader.read_keys(shard.ordinal)["row"].to_numpy()
                if (np.diff(rows) <= 0).any() or rows[0] < 0:
                    raise DamagedArtifact(f"{artifact.uri}: the key table of {shard.shard} is not sorted by row")
                reader.open_part(shard)  # refuses a part that does not hold as many codes
        total = artifact.manifest.totals.get("codes")
        findings.require(total == reader.count, f"{artifact.uri}: the totals say {total} codes, not {reader.count}")
        findings.checks.append(f"{count(reader.count, 'code')} in {count(len(reader.filled()), 'part')} that open")
        found = [findings.input(entry.role) for entry in artifact.manifest.inputs]
        inputs = [entry for entry in found if entry is not None]
        findings.one_model(inputs)
        for codes in inputs:
            if codes.manifest.kind == "codes":
                with findings.guard():
                    _prove_ordinals(findings, reader, open_codes(codes))


def _prove_ordinals(findings: Findings, reader: IndexReader, codes: CodesSet) -> None:
    """The index holds the tars of its codes, each with as many codes."""
    indexed = {
        shard.shard_sha256: shard.rows
        for shard in reader.shards.values()
        if shard.codes_digest == codes.artifact.digest
    }
    encoded = {shard.sha256: shard.rows for shard in codes.shards}
    findings.require(
        indexed == encoded,
        f"{findings.artifact.uri}: the ordinal table does not list the tars of {codes.artifact.uri} with their codes",
    )


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
    for entry in artifact.manifest.inputs:
        findings.input(entry.role)


def prove_checkpoint(findings: Findings) -> None:
    """The state is safetensors with as many tensors as the totals say."""
    artifact = findings.artifact
    _json_object(findings, "progress.json")
    count = _tensors(findings, "state.safetensors")
    total = artifact.manifest.totals.get("tensors")
    findings.require(count == total, f"{artifact.uri}: the totals say {total} tensors, the state has {count}")


def prove_report(findings: Findings) -> None:
    """The metrics are JSON and agree with the manifest."""
    artifact = findings.artifact
    metrics = _json_object(findings, "metrics.json")
    for name in ("map", "chance"):
        findings.require(
            metrics.get(name) == artifact.manifest.meta.get(name),
            f"{artifact.uri}: metrics.json and the manifest differ in {name}",
        )
    inputs = [findings.input(entry.role) for entry in artifact.manifest.inputs]
    findings.one_model(entry for entry in inputs if entry is not None)


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
