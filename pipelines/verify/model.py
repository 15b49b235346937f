"""Proves a model and a checkpoint."""

import safetensors

from pipelines.artifacts.facts import ModelCard, ModelMeta, ShardsMeta
from pipelines.errors import DamagedArtifact, format_count
from pipelines.train.curve import CURVE_TABLE, curve_table
from pipelines.verify.findings import Findings, json_object


def prove_model(findings: Findings) -> None:
    """Check that the weights are safetensors, and that the card agrees with the manifest and the learning curve."""
    artifact = findings.artifact
    card = None
    with findings.guard():
        card = ModelCard.of(artifact)
        findings.checks.append("model.json is a JSON object")
    _tensors(findings, "model.safetensors")
    if card is not None and (curve := artifact.parts.get(CURVE_TABLE)) is not None:  # other layers learnt no epochs
        with findings.guard():
            same = artifact.read(curve) == curve_table(card.history)
            findings.require(same, f"{artifact.uri}: model.json and {CURVE_TABLE} differ")
            findings.checks.append(f"{CURVE_TABLE} has the figures of model.json")
    inputs = {entry.role: findings.input(entry.role) for entry in artifact.manifest.inputs}
    with findings.guard():
        meta = artifact.facts(ModelMeta)
        for name in ("bits", "classes") if card else ():
            same = getattr(card, name) == getattr(meta, name)
            findings.require(same, f"{artifact.uri}: model.json and the manifest differ in {name}")
        if (shards := inputs.get("shards")) is not None:
            findings.require_split("protocol", meta.protocol, shards.facts(ShardsMeta).split_part)


def prove_checkpoint(findings: Findings) -> None:
    """Check that the state is safetensors with as many tensors as the totals say."""
    artifact = findings.artifact
    json_object(findings, "progress.json")
    count = _tensors(findings, "state.safetensors")
    total = artifact.manifest.totals.get("tensors")
    findings.require(count == total, f"{artifact.uri}: the totals say {total} tensors, the state has {count}")


def _tensors(findings: Findings, name: str) -> int:
    artifact = findings.artifact
    with findings.guard():
        try:
            found = safetensors.deserialize(artifact.read(artifact.manifest.part(name)))  # type: ignore[no-untyped-call]
        except safetensors.SafetensorError as error:
            raise DamagedArtifact(f"{artifact.uri}: {name} is not safetensors: {error}") from None
        findings.checks.append(f"{name} is safetensors with {format_count(len(found), 'tensor')}")
        return len(found)
    return 0
