"""Proves a report and an alias."""

from pipelines.artifacts.commit import list_versions
from pipelines.artifacts.facts import AgreementMeta, ReportMeta
from pipelines.artifacts.manifest import Artifact
from pipelines.artifacts.versions import read_version
from pipelines.errors import InputError, StoreUnavailable
from pipelines.index.alias import AliasTarget
from pipelines.verify.findings import Findings, json_object


def prove_report(findings: Findings) -> None:
    """Check that the metrics are JSON and agree with the manifest.

    Only a report on agreement may compare codes of several models.
    """
    artifact = findings.artifact
    metrics = json_object(findings, "metrics.json")
    on_agreement = [entry.role for entry in artifact.manifest.inputs] == ["old", "new"]
    with findings.guard():
        for name, value in _headline(artifact, on_agreement).items():
            same = metrics.get(name) == value
            findings.require(same, f"{artifact.uri}: metrics.json and the manifest differ in {name}")
    inputs = findings.inputs()
    if not on_agreement:
        findings.require_one_model(inputs)


def _headline(artifact: Artifact, on_agreement: bool) -> dict[str, float | None]:
    """Return the figures that are both in the manifest and in the metrics."""
    if on_agreement:
        told = artifact.facts(AgreementMeta)
        return {"overlap": told.overlap, "chance": told.chance, "correlation": told.correlation}
    meta = artifact.facts(ReportMeta)
    return {"map": meta.map, "chance": meta.chance}


def prove_alias(findings: Findings) -> None:
    """Check that the version names a published index at its place, unless that is out of reach.

    The manifest of the root names none.
    """
    artifact, store = findings.artifact, findings.artifact.store
    if not artifact.manifest.meta:
        empty = [n for n in list_versions(store) if read_version(store, n)[1].digest == artifact.digest]
        findings.require(not empty, f"{artifact.uri}: versions {empty} name no index")
        return
    with findings.guard():
        target = AliasTarget.of(artifact)
        try:
            _, index = target.open()
        except (InputError, StoreUnavailable) as error:
            findings.checks.append(f"index {target.uri}: not checked ({error})")
            findings.out_of_reach.add(artifact.digest)
        else:
            findings.checks.append(f"index {index.uri} is published, with the fingerprint, bits and model named here")
