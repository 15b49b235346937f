"""Prove an artifact from its stored bytes alone: digests, counts, schemas, conservation, and its chain of inputs."""

import hashlib
import json
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath
from typing import Any

from pipelines.artifacts import Artifact, Part, ReceiptRef, open_artifact, parse_manifest, versions
from pipelines.cluster.progress import stage
from pipelines.errors import DamagedArtifact
from pipelines.proofs import PROOFS
from pipelines.proofs.findings import MAX_PROBLEMS, Findings
from pipelines.proofs.shards import prove_shards, prove_tar
from pipelines.shards import Shard
from pipelines.storage import Store, canonical_json

THREADS = 4


def verify(uri: str, shards: str | None = None, model: str | None = None) -> dict[str, Any]:
    """Check everything that the artifact at `uri` claims.

    Inputs are followed to `shards` and `model` where given, else to where they lay; one that is out of reach is
    noted, not a failure. So are orphans, files that nothing refers to. Raises DamagedArtifact naming the first
    problem and the number of others; InputError where nothing was committed.
    """
    artifact = open_artifact(uri)
    given = {role: where for role, where in (("shards", shards), ("model", model)) if where is not None}
    findings = Findings(artifact, given)
    _check_envelope(findings)
    kind = artifact.manifest.kind
    tars = prove_shards(findings) if kind == "shards" else []
    _check_bytes(findings, tars)
    if kind in PROOFS:
        PROOFS[kind](findings)
    elif kind != "shards":
        findings.checks.append(f"kind {kind!r} is not known here: digests only")
    _check_versions(findings)
    if findings.problems:
        raise DamagedArtifact(_summary(findings))
    return {
        "verb": "verify",
        "status": "done",
        "uri": artifact.uri,
        "digest": artifact.digest,
        "kind": kind,
        "checks": findings.checks,
        "orphans": _orphans(artifact),
    }


def _summary(findings: Findings) -> str:
    first, *others = findings.problems
    if not others:
        return first
    more = f"; and {findings.found - 1} more"
    listed = "; ".join(others)
    cut = f" (the first {MAX_PROBLEMS} are named)" if findings.found > MAX_PROBLEMS else ""
    return f"{first}{more}{cut}: {listed}"


def _check_envelope(findings: Findings) -> None:
    """The manifest and the identity are the canonical bytes, and agree. (Opening checked the manifest's digest.)"""
    artifact = findings.artifact
    manifest = artifact.manifest
    identity = {"format": manifest.format, "kind": manifest.kind, "fingerprint": manifest.fingerprint}
    expected = {"manifest.json": manifest.to_bytes(), "identity.json": canonical_json(identity)}
    for name, data in expected.items():
        where = f"{artifact.uri}/{name}"
        try:
            same = artifact.store.read(name) == data
        except FileNotFoundError:
            findings.problem(f"{where} is missing")
        else:
            findings.require(same, f"{where} is not what was published with fingerprint {manifest.fingerprint[:12]}")
    findings.checks.append("the manifest matches its own digest, and identity.json agrees with it")


def _check_bytes(findings: Findings, tars: list[Shard]) -> None:
    """Size and sha256 of all parts and receipts; a tar's members in the same pass."""
    artifact = findings.artifact
    manifest = artifact.manifest
    classes = len(manifest.meta["classes"]) if tars else 0
    streamed = {shard.part.path for shard in tars}
    rest = [entry for entry in _referenced(artifact) if entry.path not in streamed]
    tasks: list[Callable[[], Iterable[str]]] = [
        *(lambda shard=shard: prove_tar(artifact, shard, classes) for shard in tars),
        *(lambda entry=entry: _damage(artifact, entry) for entry in rest),
    ]
    with (
        ThreadPoolExecutor(THREADS, "verify") as pool,
        stage("verify", len(tasks), unit="parts") as advance,
    ):
        for problems in pool.map(lambda task: list(task()), tasks):
            for problem in problems:
                findings.problem(problem)
            advance(1)
    size = sum(part.bytes for part in manifest.parts)
    findings.checks.append(
        f"{len(manifest.parts)} parts ({size} bytes) and {len(manifest.receipts)} receipts match their sha256"
    )


def _referenced(artifact: Artifact) -> list[Part | ReceiptRef]:
    return [*artifact.manifest.parts, *artifact.manifest.receipts]


def _damage(artifact: Artifact, entry: Part | ReceiptRef) -> list[str]:
    where = f"{artifact.uri}/{entry.path}"
    try:
        with artifact.store.open(entry.path) as stream:
            digest, size = hashlib.sha256(), 0
            while data := stream.read(1 << 20):
                digest.update(data)
                size += len(data)
    except FileNotFoundError:
        return [f"{where} is missing"]
    if (size, digest.hexdigest()) != (entry.bytes, entry.sha256):
        return [f"{where} does not match the digest in its manifest"]
    return []


def _check_versions(findings: Findings) -> None:
    store = findings.artifact.store
    numbers = versions(store)
    for number in numbers:
        with findings.guard():
            _check_version(store, number)
    if numbers:
        findings.checks.append(f"versions 1 to {numbers[-1]} name manifests that are there")
        findings.require(numbers == list(range(1, len(numbers) + 1)), f"{store.uri}: version numbers leave a gap")


def _check_version(store: Store, number: int) -> None:
    where = f"{store.uri}/versions/{number}.json"
    try:
        record = json.loads(store.read(f"versions/{number}.json"))
        path, digest = str(record["manifest"]), str(record["digest"])
        if path.startswith("/") or ".." in PurePosixPath(path).parts:
            raise ValueError(path)
        manifest = parse_manifest(store.read(path), f"{store.uri}/{path}")
    except (ValueError, KeyError, TypeError, FileNotFoundError):
        raise DamagedArtifact(f"{where} does not name a manifest that is there") from None
    if manifest.digest != digest:
        raise DamagedArtifact(f"{where} names manifest {digest[:12]}, but {path} is {manifest.digest[:12]}")


def _orphans(artifact: Artifact) -> list[str]:
    """Files that the manifest does not refer to: what a lost race or a killed run leaves behind."""
    referenced = {entry.path for entry in _referenced(artifact)}
    return [
        name
        for folder in ("parts", "rejects", "receipts")
        for name in artifact.store.names(folder)
        if name not in referenced
    ]
