"""Versions of an artifact: which manifest of a root is current, how the next is published, and what is finished.

`versions/<n>.json` names a manifest below the root; the highest n is current. A root without versions has one
manifest, `manifest.json`, which counts as version 1.
"""

import json
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from pipelines import artifacts
from pipelines.artifacts import (
    DIGEST_CHARS,
    Artifact,
    Manifest,
    Part,
    ReceiptRef,
    manifest_digest,
    open_artifact,
    parse_manifest,
    publish_version,
    versions,
)
from pipelines.errors import CommitConflict, DamagedArtifact, FingerprintMismatch, InputError
from pipelines.storage import Store, canonical_json

FOLDERS = ("parts", "rejects", "receipts", "manifests")
"""Where a root keeps what its manifests, and the versions that name those, refer to."""


def open_version(store: Store, number: int, kind: str | None = None) -> Artifact:
    """The artifact as `versions/<number>.json` names it; DamagedArtifact where that is not what was published."""
    _, artifact = named_version(store, number)
    if kind is not None and artifact.manifest.kind != kind:
        raise InputError(f"{store.uri} is a {artifact.manifest.kind} artifact, not {kind}")
    return artifact


def named_version(store: Store, number: int) -> tuple[str, Artifact]:
    """The path of a version's manifest, and the artifact; DamagedArtifact where that is not what was published."""
    where = f"{store.uri}/versions/{number}.json"
    try:
        data = store.read(f"versions/{number}.json")
        record = json.loads(data)
        path, digest = str(record["manifest"]), str(record["digest"])
        if path.startswith("/") or ".." in PurePosixPath(path).parts:
            raise ValueError(path)
        manifest = parse_manifest(store.read(path), f"{store.uri}/{path}")
    except (ValueError, KeyError, TypeError, FileNotFoundError):
        raise DamagedArtifact(f"{where} does not name a manifest that is there") from None
    if manifest.digest != digest:
        raise DamagedArtifact(f"{where} names manifest {digest[:12]}, but {path} is {manifest.digest[:12]}")
    if data != canonical_json({"version": number, "manifest": path, "digest": digest}):
        raise DamagedArtifact(f"{where} is not what was published")
    return path, Artifact(store, manifest)


def open_current(uri: str | Path | Store, kind: str | None = None) -> Artifact:
    """The current version of what was committed at `uri`. InputError where nothing was, or of another kind."""
    store = uri if isinstance(uri, Store) else Store(uri)
    known = versions(store)
    return open_version(store, known[-1], kind) if known else open_artifact(store, kind)


def all_versions(store: Store) -> dict[str, Artifact]:
    """Every manifest that the root has published, by its path, oldest first. InputError where nothing was."""
    return {"manifest.json": open_artifact(store), **dict(named_version(store, number) for number in versions(store))}


def open_input(artifact: Artifact, role: str, uri: str | None = None) -> Artifact:
    """The input of `role` from `uri`, else from where it lay: the version that was used, known by its digest."""
    try:
        return artifacts.open_input(artifact, role, uri)
    except FingerprintMismatch:
        expected = artifact.manifest.input(role)
        where = uri or artifact.origin(role)
        for version in all_versions(Store(where)).values() if where else ():
            if version.digest == expected.digest:
                return version
        raise


def publish_next(
    base: Artifact, number: int, parts: Sequence[Part], receipts: Sequence[ReceiptRef], totals: dict[str, int]
) -> Artifact:
    """Publish version `number`, made from `base`, the version before it. CommitConflict if another run was first."""
    store = base.store
    fields = {
        **base.manifest.model_dump(mode="json"),
        "parts": [part.model_dump() for part in sorted(parts, key=lambda part: part.path)],
        "receipts": [ref.model_dump() for ref in sorted(receipts, key=lambda ref: ref.shard)],
        "totals": totals,
    }
    manifest = Manifest.model_validate({**fields, "digest": manifest_digest(fields)})
    path = f"manifests/{manifest.digest[:DIGEST_CHARS]}.json"
    store.put_same(path, manifest.to_bytes())
    first = number > 2 or publish_version(store, 1, "manifest.json", base.digest)
    if not first or not publish_version(store, number, path, manifest.digest):
        raise CommitConflict(f"{store.uri}: another run published version {number} meanwhile: run again from there")
    return Artifact(store, manifest)


def referenced(artifact: Artifact) -> list[Part | ReceiptRef]:
    """The parts and receipts that a manifest names."""
    return [*artifact.manifest.parts, *artifact.manifest.receipts]


def lost(artifact: Artifact) -> set[str]:
    """Names of published objects that are gone or cut, as one listing of the root shows."""
    there = artifact.store.entries()
    expected = {entry.path: entry.bytes for entry in referenced(artifact)}
    gone = {path for path, size in expected.items() if path not in there or there[path].size != size}
    return gone | {name for name in ("identity.json", "manifest.json") if name not in there}


def finished(store: Store, kind: str, fingerprint: str) -> Artifact | None:
    """What a run of this fingerprint published at the root, if all of it is still there; else None.

    Costs a stat, two listings and the read of a manifest (and of its version record), however many parts there are.
    """
    if store.size("manifest.json") is None:  # although versions may name it
        return None
    try:
        artifact = open_current(store, kind)
    except InputError:
        return None
    return artifact if artifact.manifest.fingerprint == fingerprint and not lost(artifact) else None
