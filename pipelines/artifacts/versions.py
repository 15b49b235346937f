"""Versions of an artifact: finds the current manifest of a root, publishes the next, and tells finished from lost.

`versions/<n>.json` names a manifest below the root; the highest n is current. A root without versions has one manifest,
`manifest.json`, which counts as version 1. `hhnet gc` may have collected the oldest versions; the numbers of the others
do not change.
"""

import json
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import ConfigDict

from pipelines.artifacts.commit import list_versions, publish_version
from pipelines.artifacts.manifest import (
    PART_DIGEST_CHARS,
    Artifact,
    Entry,
    Facts,
    Part,
    ReceiptRef,
    make_manifest,
    open_artifact,
    parse_manifest,
    require_kind,
)
from pipelines.errors import CommitConflict, DamagedArtifact, FingerprintMismatch, HHNetError, InputError
from pipelines.storage import ObjectInfo, Store, canonical_json

NAMED_FOLDERS = ("parts", "rejects", "receipts", "manifests")
"""Folders of a root that hold the objects named by its manifests and versions."""


def open_version(store: Store, number: int, kind: str | None = None) -> Artifact:
    """Open the artifact that `versions/<number>.json` names; raises DamagedArtifact unless it is as published."""
    _, artifact = read_version(store, number)
    require_kind(store, artifact.manifest, kind)
    return artifact


def manifest_path(artifact: Artifact) -> str:
    """Return the path of an open artifact's manifest below its root."""
    path = f"manifests/{artifact.digest[:PART_DIGEST_CHARS]}.json"
    return path if artifact.store.size(path) is not None else "manifest.json"


def read_version(store: Store, number: int) -> tuple[str, Artifact]:
    """Return the path of a version's manifest, and the artifact; raises DamagedArtifact unless it is as published."""
    where = f"{store.uri}/versions/{number}.json"
    try:
        data = store.read(f"versions/{number}.json")
        record = json.loads(data)
        path, digest = str(record["manifest"]), str(record["digest"])
        if path.startswith("/") or ".." in PurePosixPath(path).parts:
            raise ValueError(path)
        manifest = parse_manifest(store.read(path), store, path)
    except (ValueError, KeyError, TypeError, FileNotFoundError):
        raise DamagedArtifact(f"{where} does not name a manifest that is there") from None
    if manifest.digest != digest:
        raise DamagedArtifact(f"{where} names manifest {digest[:12]}, but {path} is {manifest.digest[:12]}")
    if data != canonical_json({"version": number, "manifest": path, "digest": digest}):
        raise DamagedArtifact(f"{where} is not what was published")
    return path, Artifact(store, manifest)


def open_current(uri: str | Path | Store, kind: str | None = None) -> Artifact:
    """Open the current version of the artifact at `uri`; raises InputError where there is none of this kind."""
    store = uri if isinstance(uri, Store) else Store(uri)
    known = list_versions(store)
    return open_version(store, known[-1], kind) if known else open_artifact(store, kind)


def open_known(uri: str, kind: str, digest: str) -> Artifact:
    """Open the version with this digest of the artifact at `uri`; raises FingerprintMismatch where there is none."""
    with suppress(InputError):  # the first version needs no listing, and most artifacts have no other
        if (first := open_artifact(uri, kind)).digest == digest:
            return first
    current = open_current(uri, kind)
    if current.digest == digest:
        return current
    for version in read_all_manifests(current.store).values():
        if version.digest == digest:
            return version
    raise FingerprintMismatch(
        f"{current.uri} is {kind} {current.digest[:12]}, and no version of it is {digest[:12]}: name the one that was "
        "used"
    )


def require_version(store: Store, number: int, known: Sequence[int]) -> None:
    """Raise InputError where the version is not among the `known`; it says whether gc collected it."""
    if number not in known:
        gone = "was collected by gc" if 0 < number < known[0] else "is not there"
        raise InputError(
            f"{store.uri} has no version {number}, it {gone}: name one of its versions {', '.join(map(str, known))}"
        )


def read_all_manifests(store: Store, but: Container[int] = ()) -> dict[str, Artifact]:
    """Return every published manifest of the root by its path, in the order of the versions that first name it.

    Versions in `but` are left out. Raises InputError where nothing was published, or where the first manifest is gone.
    """
    first, known = open_artifact(store), [number for number in list_versions(store) if number not in but]
    named = dict(read_version(store, number) for number in known)
    return named if known and known[0] > 1 else {"manifest.json": first, **named}


class VersionsRead:
    """The versions of artifacts that were read for one command, so that each is read once."""

    def __init__(self) -> None:
        self._by_root: dict[str, dict[str, Artifact]] = {}

    def find(self, first: Artifact, digest: str) -> Artifact | None:
        """Return the version with this digest at the root of `first`, or None if there is none."""
        if first.uri not in self._by_root:
            self._by_root[first.uri] = {one.digest: one for one in read_all_manifests(first.store).values()}
        return self._by_root[first.uri].get(digest)


def open_input_version(
    artifact: Artifact, role: str, uri: str | None = None, read: VersionsRead | None = None
) -> Artifact:
    """Open the input of `role` in the version that was used, from `uri` or else from its remembered place.

    A caller with many inputs keeps what was `read`.
    Raises FingerprintMismatch where no version there has the digest that was used.
    """
    expected = artifact.manifest.input(role)
    where = uri or artifact.origin(role)
    if where is None:
        raise InputError(f"{artifact.uri} does not remember where its {role} lies: name it with --{expected.kind}")
    found = open_artifact(where, expected.kind)
    if found.digest == expected.digest:
        return found
    if (version := (read or VersionsRead()).find(found, expected.digest)) is not None:
        return version
    raise FingerprintMismatch(
        f"{artifact.uri} was made from {expected.kind} {expected.digest[:12]}, but {found.uri} is "
        f"{found.digest[:12]}: name the right one with --{expected.kind}"
    )


def open_inputs_of_kind(artifact: Artifact, kind: str, problems: list[str]) -> Iterator[Artifact]:
    """Open the inputs of one kind, each in the version that was used; add to `problems` why some cannot be opened."""
    for entry in artifact.manifest.inputs:
        if entry.kind == kind:
            try:
                yield open_input_version(artifact, entry.role)
            except HHNetError as error:
                problems.append(str(error))


def publish_next(
    base: Artifact,
    number: int,
    parts: Sequence[Part],
    receipts: Sequence[ReceiptRef],
    totals: dict[str, int],
    **changed: Any,
) -> Artifact:
    """Publish version `number`, made from `base`, the one before; raise CommitConflict if another run was first."""
    require_parts(base, parts, number)
    artifact = next_artifact(base, parts, receipts, totals, **changed)
    path = put_manifest(artifact)
    # A root without versions is at version 1 unnamed: name it before a second one exists.
    if number == 2 and not publish_version(base.store, 1, "manifest.json", base.digest):
        raise _overtaken(base.store, number)
    publish_manifest(artifact, path, number)
    return artifact


def require_parts(base: Artifact, parts: Iterable[Entry], number: int) -> None:
    """Raise DamagedArtifact where a part for version `number` is missing or cut."""
    for path in missing_paths(base.store.entries(), parts):
        raise DamagedArtifact(
            f"{base.uri}/{path} is gone, so version {number} cannot name it: the verb that made it restores it"
        )


def missing_paths(there: Mapping[str, ObjectInfo], named: Iterable[Entry]) -> list[str]:
    """Return the paths of named objects that are missing or cut in a listing of the root."""
    return [entry.path for entry in named if entry.path not in there or there[entry.path].size != entry.bytes]


def next_artifact(
    base: Artifact, parts: Sequence[Part], receipts: Sequence[ReceiptRef], totals: Mapping[str, int], **changed: Any
) -> Artifact:
    """Return the next version as it will be published, without putting anything.

    Fields of `base` (`inputs`, `meta`) that are not in `changed` stay.
    """
    fields = {
        **base.manifest.model_dump(mode="json", include={"kind", "fingerprint", "inputs", "meta"}),
        "totals": dict(totals),
        **changed,
    }
    return Artifact(base.store, make_manifest(base.store, fields, parts, receipts, base.manifest))


def put_manifest(artifact: Artifact) -> str:
    """Put the manifest of a version that is not published yet; return its path."""
    path = f"manifests/{artifact.digest[:PART_DIGEST_CHARS]}.json"
    artifact.manifest.put_lists(artifact.store)
    artifact.store.put_same(path, artifact.manifest.to_bytes(), "manifest.put")
    return path


def publish_manifest(artifact: Artifact, path: str, number: int) -> None:
    """Publish the manifest at `path` as version `number`.

    Raises CommitConflict if another run took that number, DamagedArtifact where an object that the manifest names is
    gone: `gc` may at any moment delete an old object that no version names.
    """
    for gone in _unpublishable(artifact, path):
        raise DamagedArtifact(f"{artifact.uri}/{gone} is gone, so version {number} cannot name it: run again")
    if not publish_version(artifact.store, number, path, artifact.digest):
        raise _overtaken(artifact.store, number)
    # Look again: gc may have deleted objects between the first look and the publication.
    gone_now = _unpublishable(artifact, path)
    if {path, *(ref.path for ref in artifact.manifest.lists)} & {*gone_now}:
        put_manifest(artifact)
        gone_now = _unpublishable(artifact, path)
    for gone in gone_now:
        raise DamagedArtifact(
            f"{artifact.uri}/{gone} was deleted while version {number}, which names it, was published: publish the "
            "version before again (an index by `hhnet index rollback`), then run again"
        )


def _unpublishable(artifact: Artifact, path: str) -> list[str]:
    """Return the paths that are missing: the manifest at `path` itself, and the objects that it names."""
    there = artifact.store.entries()
    return [*([] if path in there else [path]), *missing_paths(there, each_referenced(artifact))]


class _Made(Facts):
    """The version number in a manifest of any kind."""

    model_config = ConfigDict(extra="ignore")

    version: int = 1


def made_as(artifact: Artifact) -> int:
    """Return the version number that this manifest was made for; a rollback gives it another one as well."""
    return artifact.facts(_Made).version


def version_before(store: Store, known: Sequence[int]) -> int:
    """Return the number of the known version before the current content.

    After a rollback the content is older than its number says, so the number that it was made for counts.
    """
    try:
        current = made_as(open_version(store, known[-1]))
    except DamagedArtifact:  # a damaged version is a reason to go back, not an obstacle
        current = known[-1]
    older = [number for number in known if number < current]
    if not older:
        raise InputError(
            f"{store.uri}: the current content is that of version {current}: there is no older one to take"
        )
    return older[-1]


def roll_back(store: Store, known: Sequence[int], to: int) -> tuple[int, Artifact]:
    """Make version `to` of the `known` current again, as the next version; return the new number and the artifact.

    A current version that cannot be opened does not matter. Raises InputError where there is no version `to`,
    CommitConflict where another run publishes, or gc collects, meanwhile.
    """
    require_version(store, to, known)
    number = known[-1] + 1
    path, artifact = read_version(store, to)
    with suppress(DamagedArtifact):
        current = open_version(store, known[-1])
        if artifact.digest == current.digest:
            return known[-1], current
    if not publish_version(store, number, path, artifact.digest):
        raise CommitConflict(f"{store.uri}: another run published version {number} meanwhile: look at it first")
    if store.size(f"versions/{to}.json") is None:
        raise CommitConflict(
            f"{store.uri}: gc collected version {to} while version {number} named it again: roll back to another one"
        )
    return number, artifact


def _overtaken(store: Store, number: int) -> CommitConflict:
    return CommitConflict(f"{store.uri}: another run published version {number} meanwhile: run again from there")


def each_referenced(artifact: Artifact) -> Iterator[Entry]:
    """Yield the parts and receipts of an artifact, and the lists that name them."""
    yield from artifact.manifest.lists
    yield from artifact.manifest.parts
    yield from artifact.manifest.each_receipt()


def list_lost(artifact: Artifact) -> set[str]:
    """Return the names of published objects that are missing or cut in one listing of the root.

    Where lists are, these alone: only they can tell what else there was.
    """
    there = artifact.store.entries()
    if lists := missing_paths(there, artifact.manifest.lists):
        return set(lists)
    return {*missing_paths(there, each_referenced(artifact))} | {
        name for name in ("identity.json", "manifest.json") if name not in there
    }


def find_finished(store: Store, kind: str, fingerprint: str) -> Artifact | None:
    """Return the artifact that a run of this fingerprint published at the root, or None unless all of it exists.

    Costs a stat, two listings and the read of a manifest (and of its version record), however many parts there are.
    """
    if store.size("manifest.json") is None:  # versions may still name it, but it is gone
        return None
    try:
        artifact = open_current(store, kind)
    except InputError:
        return None
    return artifact if artifact.manifest.fingerprint == fingerprint and not list_lost(artifact) else None
