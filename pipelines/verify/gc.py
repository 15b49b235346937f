"""`hhnet gc`: deletes unreferenced objects below an artifact's root, once they are older than a grace period.

Attempts that lost a race or were killed leave parts, rejects, receipts and manifests that no version names, temporary
files and unfinished uploads; a finished training leaves its checkpoints. Objects that any version names are never
touched, nor are files that this project did not name; old versions go only on request. On a root without a manifest
only temporary files and uploads go: a run will be resumed from its parts and receipts.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import PurePosixPath

from pipelines.artifacts.commit import list_versions
from pipelines.artifacts.manifest import Artifact
from pipelines.artifacts.result import Result
from pipelines.artifacts.versions import NAMED_FOLDERS, each_referenced, open_current, open_version, read_all_manifests
from pipelines.config.values import parse_duration
from pipelines.errors import ConfigError, InputError, StoreUnavailable
from pipelines.index.reader import find_newest_made
from pipelines.storage import ObjectInfo, Store
from pipelines.storage.failpoints import failpoint

TEMPORARY_PREFIX = ".tmp-"
CHECKPOINTS_PREFIX = "checkpoints/"
MAX_NAMES = 1000
"""Largest number of names in a result."""


@dataclass(frozen=True, kw_only=True)
class GcResult(Result):
    """The deleted versions and files.

    `uploads` were begun on S3 and never ended; `young` counts the garbage that stays because of its age. The digest is
    None for a root without manifest.
    """

    verb: str = "gc"
    collected: list[int]
    deleted: int
    bytes: int
    uploads: int
    young: int
    dry_run: bool
    names: list[str]
    note: str


def gc(uri: str | Store, older_than: str = "24h", dry_run: bool = False, keep: int | None = None) -> GcResult:
    """Delete the garbage below the root `uri` that was put more than `older_than` (such as 90m, 24h, 7d) ago.

    The grace period has to be longer than any run that may still be writing there: until a run publishes, its objects
    look like garbage. With `keep` only that many versions stay, and those that were current within the grace period.
    The newest ordinal table of an index stays too, so that no ordinal is given twice.

    With `dry_run` nothing is deleted, and the figures describe a real run. Raises InputError where the root holds
    nothing.
    """
    if keep is not None and keep < 1:
        raise ConfigError(f"--keep {keep} is below 1: at least the current version stays, so give 1 or more")
    before = time.time() - _parse_grace(older_than)
    store = uri if isinstance(uri, Store) else Store(uri)
    # List first, then read the manifests: an object that is published in between then counts as in use.
    there, uploads = store.entries(), store.uploads()
    if not there and not uploads:
        raise InputError(f"{store.uri} holds nothing: name the root of an artifact")
    published = read_all_manifests(store) if "manifest.json" in there or list_versions(store) else {}
    collected = _superseded(store, there, keep, before) if keep is not None else []
    records = [f"versions/{number}.json" for number in collected]
    if not dry_run:
        # Ascending, and before the objects that they name: a version that can still be opened is then complete.
        for name in records:
            _delete(store, name)
    left = read_all_manifests(store, but=collected) if collected else published  # a rollback may name one of them again
    garbage = {name: there[name] for name in [*records, *_garbage(there, left)]}
    old = {name: entry for name, entry in garbage.items() if _put_at(name, garbage) < before}
    abandoned = [name for name, entry in uploads.items() if entry.modified < before]
    if not dry_run:
        for name in old:
            _delete(store, name)
        for name in abandoned:
            store.abort(name)
    return GcResult(
        status="done" if old or abandoned else "unchanged",
        uri=store.uri,
        digest=open_current(store).digest if published else None,
        collected=collected,
        deleted=len(old),
        bytes=sum(entry.size for entry in old.values()),
        uploads=len(abandoned),
        young=len(garbage) - len(old) + len(uploads) - len(abandoned),
        dry_run=dry_run,
        names=list(old)[:MAX_NAMES],
        note="" if published else "no manifest: a run can go on from the parts and receipts here, so they stay",
    )


def _parse_grace(text: str) -> float:
    try:
        return float(parse_duration(text))
    except ValueError as error:
        raise ConfigError(f"--older-than {text!r}: {error}") from None


def _superseded(store: Store, there: Mapping[str, ObjectInfo], keep: int, before: float) -> list[int]:
    """Return the oldest versions that may go.

    They are not among the last `keep`, and each was followed by another before the grace period. They go from the
    oldest on, so that the numbers of the remaining versions leave no gap.
    """
    known = list_versions(store)
    stays = known[-keep:]
    if stays and open_version(store, stays[-1]).manifest.kind == "index":
        stays = [find_newest_made(store)[0], *stays]
    found = []
    for number, following in pairwise(known):
        entry = there.get(f"versions/{following}.json")
        if number >= min(stays) or entry is None or entry.modified >= before:
            break
        found.append(number)
    return found


def _garbage(there: Mapping[str, ObjectInfo], published: Mapping[str, Artifact]) -> list[str]:
    """Return the names of unreferenced objects.

    A checkpoint's manifest comes first, so that a half-deleted checkpoint is not opened as one.
    """
    temporary = [name for name in there if PurePosixPath(name).name.startswith(TEMPORARY_PREFIX)]
    if not published:
        return temporary
    used = set(published)
    for artifact in published.values():
        used |= {entry.path for entry in each_referenced(artifact)}
    unused = [name for name in there if name.partition("/")[0] in NAMED_FOLDERS and "/" in name and name not in used]
    is_model = any(artifact.manifest.kind == "model" for artifact in published.values())
    checkpoints = [name for name in there if is_model and name.startswith(CHECKPOINTS_PREFIX)]
    checkpoints.sort(key=lambda name: (not name.endswith("/manifest.json"), name))
    return list(dict.fromkeys([*temporary, *unused, *checkpoints]))


def _put_at(name: str, garbage: Mapping[str, ObjectInfo]) -> float:
    """Return the time of an object's put; a checkpoint is deleted as a whole, so its youngest object counts."""
    if not name.startswith(CHECKPOINTS_PREFIX):
        return garbage[name].modified
    folder = "/".join(name.split("/")[:2]) + "/"
    return max(entry.modified for other, entry in garbage.items() if other.startswith(folder))


def _delete(store: Store, name: str) -> None:
    try:
        failpoint("gc.delete.before")
        store.delete(name)
        failpoint("gc.delete.after")
    except OSError as error:
        raise StoreUnavailable(f"cannot delete {store.uri}/{name}: {error}") from error
