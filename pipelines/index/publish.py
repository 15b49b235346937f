"""`hhnet index publish | rollback | info`: sets the current version of an index, and lists its versions."""

from dataclasses import dataclass
from typing import Any

from pipelines.artifacts.commit import list_versions
from pipelines.artifacts.facts import IndexMeta
from pipelines.artifacts.manifest import Artifact, open_artifact, parse_manifest
from pipelines.artifacts.runs import RunLog
from pipelines.artifacts.versions import (
    made_as,
    open_version,
    publish_manifest,
    read_version,
    roll_back,
    version_before,
)
from pipelines.cluster.submit import on_cluster
from pipelines.config.settings import Config
from pipelines.errors import InputError
from pipelines.index.alias import index_root
from pipelines.index.layout import ORDINALS_NAME, REMOVED_NAME
from pipelines.index.pool import IndexResult, measure_index, pass_gate
from pipelines.storage import Store


@dataclass(frozen=True, kw_only=True)
class PublishResult(IndexResult):
    """The current version; `overtaken` lists indexes made for a version number that was published otherwise since."""

    verb: str = "index publish"
    overtaken: list[str] | None = None


@dataclass(frozen=True, kw_only=True)
class RollbackResult(IndexResult):
    """The new version, with the content of version `to`."""

    verb: str = "index rollback"
    to: int


@dataclass(frozen=True, kw_only=True)
class InfoResult(IndexResult):
    """The current version, and the list of all versions, newest first."""

    TABLES = ("versions",)

    verb: str = "index info"
    versions: list[dict[str, Any]]


@on_cluster("index publish")
def publish_index(index: str, config: Config, digest: str | None = None) -> PublishResult:
    """Pass an unpublished index, or its unpublished next version, through the gate and publish it.

    `digest`, or its first digits, names it where several exist. `unchanged` where there is none; `overtaken` then lists
    those whose number another version has taken. Raises InputError for a digest that cannot be published, WorkFailed
    where it is below `index.gate`, CommitConflict where another run publishes meanwhile.
    """
    store = Store(index)
    first, known = open_artifact(store, "index"), list_versions(store)
    if not known:
        if not first.digest.startswith(digest or ""):
            waits = first.digest[:12]
            raise InputError(f"{store.uri}: {digest} is not there: give {waits}, which waits to be version 1")
        return _pass_and_publish("manifest.json", first, 1, config)
    current, number = open_version(store, known[-1]), known[-1] + 1
    if digest and current.digest.startswith(digest):
        return PublishResult.of(current, "unchanged", version=known[-1])
    named = {path: a for path, a in _unpublished_versions(store).items() if a.digest.startswith(digest or "")}
    due = {path: artifact for path, artifact in named.items() if made_as(artifact) == number}
    late = [
        f"{artifact.digest[:12]} was made as version {made_as(artifact)}, not as {number}: make it again"
        for path, artifact in named.items()
        if path not in due
    ]
    if len(due) > 1:
        listed = ", ".join(sorted(artifact.digest[:12] for artifact in due.values()))
        raise InputError(f"{store.uri}: {len(due)} were made as version {number}: name one with --digest, {listed}")
    for path, artifact in due.items():
        return _pass_and_publish(path, artifact, number, config)
    if digest is not None:
        missing = f"{digest} is not there: `hhnet index info` lists what is"
        raise InputError(f"{store.uri}: {late[0] if late else missing}")
    return PublishResult.of(current, "unchanged", version=known[-1], overtaken=late)


def _pass_and_publish(path: str, artifact: Artifact, number: int, config: Config) -> PublishResult:
    with RunLog(artifact.store, "index publish", config) as log:
        pass_gate(artifact, measure_index(artifact, config), config, log)
        publish_manifest(artifact, path, number)
    return PublishResult.of(artifact, "done", version=number)


def _unpublished_versions(store: Store) -> dict[str, Artifact]:
    """Return the made but unpublished next versions, by the path of their manifest."""
    named = {read_version(store, version)[0] for version in list_versions(store)}
    return {
        path: Artifact(store, parse_manifest(store.read(path), store, path))
        for path in store.names("manifests")
        if path not in named
    }


def rollback_index(index: str, to: int | None = None) -> RollbackResult:
    """Make an older version current again, by default the one before, as a new version; delete nothing.

    It gives the same answers as before, so the gate is not asked again. Raises InputError where there is no such
    version.
    """
    store = Store(index)
    open_artifact(store, "index")
    known = list_versions(store)
    if not known:
        raise InputError(f"{store.uri} was never published: there is nothing to roll back to")
    target = version_before(store, known) if to is None else to
    number, artifact = roll_back(store, known, target)
    status = "unchanged" if number == known[-1] else "done"
    return RollbackResult.of(artifact, status, version=number, to=target)


def describe_index(index: str) -> InfoResult:
    """List the versions of an index, newest first; only manifests are read."""
    store = index_root(index)
    first = open_artifact(store, "index")
    known = list_versions(store)
    published = {number: read_version(store, number)[1] for number in known}
    current = published[known[-1]] if known else first
    listed = [_version_facts(number, artifact) for number, artifact in sorted(published.items(), reverse=True)]
    version = known[-1] if known else None
    return InfoResult.of(current, "done", version=version, versions=listed or [_version_facts(None, first)])


def _version_facts(number: int | None, artifact: Artifact) -> dict[str, Any]:
    manifest = artifact.manifest
    rows = {part.name: part.rows for part in manifest.parts}
    return {
        "version": number,
        "made_as": made_as(artifact) if number is not None else None,
        "digest": artifact.digest,
        "codes": manifest.totals["codes"],
        "removed": rows.get(REMOVED_NAME, 0),
        "shards": manifest.totals["held"],
        "parts": sum(name.startswith("part-") for name in rows),
        "ordinals": rows.get(ORDINALS_NAME, 0),
        "bytes": sum(part.bytes for part in manifest.parts),
        "recall": artifact.facts(IndexMeta).card.recall,
    }
