"""`hhnet alias`: a name that stands for a published index, switched in one step, with its history."""

from typing import Any

from pipelines.artifacts.commit import ArtifactWriter, versions
from pipelines.artifacts.manifest import Artifact, fingerprint, open_artifact
from pipelines.artifacts.versions import (
    made_as,
    next_artifact,
    open_version,
    publish_number,
    put_manifest,
    roll_back,
    version_before,
)
from pipelines.errors import InputError
from pipelines.index.aliases import KIND, AliasTarget, current_alias, holds_alias, open_published
from pipelines.storage import Store


def set_alias(alias: str, to: str) -> dict[str, Any]:
    """Have the alias stand for the published index `to`, as its next version; `unchanged` where it does already.

    Whoever searches through the alias meanwhile finishes on the index that was opened. Raises InputError where `to`
    is not a published index, CommitConflict where another run sets the alias meanwhile.
    """
    store, index = Store(alias), Store(to)
    if store.size("manifest.json") is not None:
        open_artifact(store, KIND)
    if holds_alias(index):
        stands_for = AliasTarget.of(current_alias(index)[1]).uri
        raise InputError(f"{index.uri} is an alias itself: name the index that it stands for, {stands_for}")
    target = AliasTarget.of_index(open_published(to)[1])
    root = ArtifactWriter(store, KIND, fingerprint(KIND, {}, {}), (), {}).commit([], {}, {})
    known = versions(store)
    if known:
        current = open_version(store, known[-1], KIND)
        if AliasTarget.of(current) == target:
            return _answer(store, "unchanged", known[-1], current)
    number = known[-1] + 1 if known else 1
    artifact = next_artifact(root, [], [], {}, meta=target.meta(store, number))
    publish_number(artifact, put_manifest(artifact), number)
    return _answer(store, "done", number, artifact)


def rollback_alias(alias: str) -> dict[str, Any]:
    """Have the alias stand again for the index that it stood for before, as a new version.

    Raises InputError where there is none before, or that index is gone; CommitConflict where another run sets the
    alias meanwhile.
    """
    store = Store(alias)
    current_alias(store)
    known = versions(store)
    before = version_before(store, known)
    AliasTarget.of(open_version(store, before, KIND)).open()
    number, artifact = roll_back(store, known, before)
    return {**_answer(store, "done", number, artifact), "to": before}


def alias_history(alias: str) -> dict[str, Any]:
    """What the alias stands for and stood for, newest first; no index is opened."""
    store = Store(alias)
    number, current = current_alias(store)
    return _answer(store, "done", number, current)


def _answer(store: Store, status: str, number: int, artifact: Artifact) -> dict[str, Any]:
    target = AliasTarget.of(artifact)
    listed = {known: open_version(store, known, KIND) for known in reversed(versions(store))}
    return {
        "verb": "alias",
        "status": status,
        "uri": store.uri,
        "digest": artifact.digest,
        "version": number,
        "index": target.uri,
        "bits": target.bits,
        "model": target.model,
        "versions": [_facts(known, version) for known, version in listed.items()],
    }


def _facts(number: int, artifact: Artifact) -> dict[str, Any]:
    target = AliasTarget.of(artifact)
    return {
        "version": number,
        "made_as": made_as(artifact),
        "index": target.uri,
        "bits": target.bits,
        "model": target.model,
        "fingerprint": target.fingerprint,
    }
