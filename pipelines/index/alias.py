"""Aliases: a root whose current version names a published index, and how an index is found through one.

An alias names the root of an index, not a version, so a version that `index add` publishes is found through it at once.
The index is identified by its fingerprint, bits and model; another index at the same place is refused. The place is
stored relative to the alias if both are below one folder or in one bucket, so that a copied tree stays valid.
`manifest.json` of an alias is empty and the same for all; each version has a manifest of its own.
"""

import json
import posixpath
from dataclasses import dataclass, replace
from typing import Any

from pipelines.artifacts.commit import ArtifactWriter, list_versions
from pipelines.artifacts.facts import AliasMeta, IndexMeta
from pipelines.artifacts.manifest import Artifact, Facts, fingerprint, open_artifact
from pipelines.artifacts.result import Result
from pipelines.artifacts.versions import (
    made_as,
    next_artifact,
    open_version,
    publish_manifest,
    put_manifest,
    require_version,
    roll_back,
    version_before,
)
from pipelines.errors import FingerprintMismatch, InputError
from pipelines.storage import Store

KIND = "alias"


@dataclass(frozen=True)
class AliasTarget:
    """The index that a version of an alias names: its present place, and the identity that it must have there."""

    uri: str
    fingerprint: str
    bits: int
    model: str

    @classmethod
    def of(cls, alias: Artifact) -> "AliasTarget":
        """Return the target that a version of an alias names; raises DamagedArtifact where it names none."""
        named = alias.facts(AliasMeta)
        return cls(_locate(named.index, alias.store), named.fingerprint, named.bits, named.model)

    @classmethod
    def of_index(cls, index: Artifact) -> "AliasTarget":
        """Return the target that names this index."""
        bits, model = index.facts(IndexMeta).bits, index.manifest.input("model").digest
        return cls(index.uri, index.manifest.fingerprint, bits, model)

    def meta(self, alias: Store, version: int) -> AliasMeta:
        """Return the facts that version `version` of the alias stores about this index."""
        return AliasMeta(
            version=version,
            index=_place(self.uri, alias),
            fingerprint=self.fingerprint,
            bits=self.bits,
            model=self.model,
        )

    def open(self, version: int | None = None) -> tuple[int, Artifact]:
        """Open a published version of the index, by default the current one; return its number too.

        Raises InputError where the index is gone, FingerprintMismatch where another index is in its place.
        """
        number, index = _open_target(Store(self.uri), version)
        found = AliasTarget.of_index(index)
        for name in ("fingerprint", "bits", "model"):
            mine, theirs = str(getattr(self, name))[:12], str(getattr(found, name))[:12]
            if mine != theirs:
                raise FingerprintMismatch(
                    f"the alias names an index with {name} {mine}, but {index.uri} has {theirs}: set the alias again"
                )
        return number, index


def open_published(uri: str, version: int | None = None) -> tuple[int, Artifact]:
    """Open a published version of the index at `uri`, or of the index that the alias there names now.

    Returns its number too. The alias is read once: the opened artifact stays the same if the alias is set again. Raises
    InputError where nothing is published, or no such version; FingerprintMismatch where another index is at the place
    that the alias names.
    """
    store = Store(uri)
    if not holds_alias(store):
        return _open_target(store, version)
    target = AliasTarget.of(current_alias(store)[1])
    try:
        return target.open(version)
    except InputError as error:
        raise InputError(f"alias {store.uri}: {error}") from None


def index_root(uri: str) -> Store:
    """Return the root of the index at `uri`, or of the index that the alias there names now.

    An index need not exist at `uri`. An alias raises the errors of `open_published` where its index is gone or another
    one.
    """
    store = Store(uri)
    return open_published(uri)[1].store if holds_alias(store) else store


def holds_alias(store: Store) -> bool:
    """Tell whether the root holds an alias; False for an unreadable root, because opening it raises the error."""
    try:
        return bool(json.loads(store.read("identity.json"))["kind"] == KIND)
    except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):
        return False


def current_alias(store: Store) -> tuple[int, Artifact]:
    """Return the number and the artifact of the alias's current version; raises InputError where it was never set."""
    known = list_versions(store)
    if not known:
        open_artifact(store, KIND)
        raise InputError(f"alias {store.uri} was begun and names no index yet: set it with --to")
    return known[-1], open_version(store, known[-1], KIND)


def _open_target(store: Store, version: int | None) -> tuple[int, Artifact]:
    known = list_versions(store)
    if not known:
        open_artifact(store, "index")  # raises its own error if there is no index at all
        raise InputError(f"{store.uri} holds an index that was never published: run `hhnet index publish`")
    number = known[-1] if version is None else version
    require_version(store, number, known)
    return number, open_version(store, number, "index")


def _place(uri: str, alias: Store) -> str:
    """Return a place as the alias stores it: relative if both share a folder or a bucket, else the whole URI."""
    index = Store(uri)
    shared = index.scheme == alias.scheme and posixpath.commonpath([index.root, alias.root]) not in ("", "/")
    return posixpath.relpath(index.root, alias.root) if shared else uri


def _locate(place: str, alias: Store) -> str:
    """Return the URI of a place that an alias names."""
    if place.startswith("/") or "://" in place:
        return place
    root = posixpath.normpath(f"{alias.root}/{place}")
    return root if alias.is_local else f"{alias.scheme}://{root}"


@dataclass(frozen=True, kw_only=True)
class AliasResult(Result):
    """The index that an alias names, and all indexes that it has named, newest first."""

    TABLES = ("versions",)

    verb: str = "alias"
    version: int
    index: str
    bits: int
    model: str
    versions: list[dict[str, Any]]
    to: int | None = None


def set_alias(alias: str, to: str) -> AliasResult:
    """Make the alias name the published index `to`, as a new version; `unchanged` where it already does.

    A search that runs meanwhile finishes on the index that it opened. Raises InputError where `to` is not a published
    index, CommitConflict where another run sets the alias meanwhile.
    """
    store, index = Store(alias), Store(to)
    if store.size("manifest.json") is not None:
        open_artifact(store, KIND)
    if holds_alias(index):
        stands_for = AliasTarget.of(current_alias(index)[1]).uri
        raise InputError(f"{index.uri} is an alias itself: name the index that it stands for, {stands_for}")
    target = AliasTarget.of_index(open_published(to)[1])
    root = ArtifactWriter(store, KIND, fingerprint(KIND, {}, {}), (), {}).commit([], {}, Facts())
    known = list_versions(store)
    if known:
        current = open_version(store, known[-1], KIND)
        if AliasTarget.of(current) == target:
            return _alias_result(store, "unchanged", known[-1], current)
    number = known[-1] + 1 if known else 1
    artifact = next_artifact(root, [], [], {}, meta=target.meta(store, number))
    publish_manifest(artifact, put_manifest(artifact), number)
    return _alias_result(store, "done", number, artifact)


def rollback_alias(alias: str) -> AliasResult:
    """Make the alias name its previous index again, as a new version.

    Raises InputError where there is no previous index, or it is gone; CommitConflict where another run sets the alias
    meanwhile.
    """
    store = Store(alias)
    current_alias(store)
    known = list_versions(store)
    before = version_before(store, known)
    AliasTarget.of(open_version(store, before, KIND)).open()
    number, artifact = roll_back(store, known, before)
    return replace(_alias_result(store, "done", number, artifact), to=before)


def alias_history(alias: str) -> AliasResult:
    """Return the present and past targets of the alias, newest first; opens no index."""
    store = Store(alias)
    number, current = current_alias(store)
    return _alias_result(store, "done", number, current)


def _alias_result(store: Store, status: str, number: int, artifact: Artifact) -> AliasResult:
    listed = [_target_facts(known, open_version(store, known, KIND)) for known in reversed(list_versions(store))]
    target = AliasTarget.of(artifact)
    named = {"index": target.uri, "bits": target.bits, "model": target.model}
    return AliasResult.of(artifact, status, version=number, **named, versions=listed)


def _target_facts(number: int, artifact: Artifact) -> dict[str, Any]:
    target = AliasTarget.of(artifact)
    return {
        "version": number,
        "made_as": made_as(artifact),
        "index": target.uri,
        "bits": target.bits,
        "model": target.model,
        "fingerprint": target.fingerprint,
    }
