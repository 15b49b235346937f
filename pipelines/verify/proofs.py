"""Remembers what verifications of an artifact proved, so that the next one reads only what is new or was changed.

A record `proofs/<UTC time>-<sha256[:16]>.json`, outside every digest, holds claims, each with the objects that it rests
on; and of each object the size and time that the store gave it then. A claim holds while its objects are as they were
when its own record was made.
"""

import logging
import math
import re
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import PurePosixPath

from pydantic import Field

from pipelines.artifacts.manifest import PART_DIGEST_CHARS, Facts
from pipelines.console import NOTICE
from pipelines.errors import DamagedArtifact, ReadOnlyStore, StoreUnavailable
from pipelines.storage import ObjectInfo, Store, canonical_json, map_in_order, sha256_of

_log = logging.getLogger(__name__)

PROOFS_VERSION = 1
"""Version of all proofs, part of every claim. Raise it when a proof finds more than before: nothing is known then."""
FOLDER = "proofs"
SETTLED_S = 2.0
"""Age in seconds from which on the time of an object is trusted: within one tick of the clock it may change again."""
SAVE_EVERY_S = 300.0
"""Seconds after which new claims are saved: a verification that is killed loses no more."""
RECORDS_KEPT = 64
"""Number of records that are put into one when another would be added."""
CLAIM_CHARS = 32
_RECORD = re.compile(FOLDER + r"/\d{8}T\d{6}\.\d{6}Z-[0-9a-f]{16}\.json")


class SeenObject(Facts):
    """The size of an object, the time of its put, and the time of its proof, both in seconds since the epoch."""

    size: int
    modified: float
    proven: float


class ProofRecord(Facts):
    """The contents of one record: the paths that each claim rests on, and the objects at these paths."""

    root: str
    """URI of the artifact. A copy may keep the times of its files, and is proven anew all the same."""
    whole: bool = False
    """Whether all records before this one count no more."""
    claims: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    objects: dict[str, SeenObject] = Field(default_factory=dict)


class Proofs:
    """The claims that hold at an artifact's root: those of earlier verifications, and those of this one.

    With `again` = 1 no earlier claim counts. A smaller share takes that share of the known objects, those proven
    longest ago, and drops each claim that rests on one of them.
    """

    def __init__(self, store: Store, there: Mapping[str, ObjectInfo], again: float = 0.0) -> None:
        """Read the records in `there`, a listing of the root made before anything else is read.

        So what is changed while it is read has another time in the next listing.
        """
        self._store, self._there, self._again = store, there, again
        self._names = sorted(filter(_RECORD.fullmatch, there))
        self._begun, self._saved = time.time(), time.monotonic()
        self._new = ProofRecord(root=store.uri)
        self._earlier = self._without_oldest(self._read())

    def holds(self, *claim: object) -> bool:
        """Tell whether this was proven, and nothing that it rests on has changed since."""
        name = _name(claim)
        return name in self._earlier.claims or name in self._new.claims

    def add(self, paths: Iterable[str], *claim: object) -> None:
        """Add a claim that was proven now, from the objects at these paths; from time to time save what was added."""
        self._new.claims[_name(claim)] = tuple(paths)
        if time.monotonic() - self._saved >= SAVE_EVERY_S:
            self._put(self._to_keep(whole=False))

    def save(self, ended: bool) -> None:
        """Put a record of the new claims. If it cannot be put, the next verification reads all of this again.

        Where earlier claims are to count no more, or the records are many, the new record replaces all others; but not
        of a verification that has not `ended`.
        """
        whole = ended and (self._again > 0 or len(self._names) >= RECORDS_KEPT)
        record = self._to_keep(whole)
        if (record.claims or whole) and self._put(record) and whole:
            with suppress(StoreUnavailable):  # they count no more in any case
                for older in self._names[:-1]:
                    self._store.delete(older)

    def _put(self, record: ProofRecord) -> bool:
        """Put a record, as the newest of the names; return False, and say so, where the store does not take it."""
        data = canonical_json(record)
        name = f"{FOLDER}/{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}-{sha256_of(data)[:PART_DIGEST_CHARS]}.json"
        try:
            self._store.put(name, data)
        except (StoreUnavailable, ReadOnlyStore) as error:
            _log.log(NOTICE, "what was proven is not remembered: %s", error)
            return False
        self._names.append(name)
        self._earlier.claims.update(record.claims)
        self._earlier.objects.update(record.objects)
        self._new, self._saved = ProofRecord(root=self._store.uri), time.monotonic()
        return True

    def _to_keep(self, whole: bool) -> ProofRecord:
        """Return what to put: new claims on settled objects, and in a `whole` record the earlier ones that hold."""
        claims = dict(self._earlier.claims) if whole else {}
        objects = {path: self._earlier.objects[path] for paths in claims.values() for path in paths}
        for name, paths in self._new.claims.items():
            found = [self._there.get(path) for path in paths]
            if all(info is not None and info.modified <= self._begun - SETTLED_S for info in found):
                claims[name] = paths
                objects |= {path: self._seen(info) for path, info in zip(paths, found, strict=True) if info}
        return ProofRecord(root=self._store.uri, whole=whole, claims=claims, objects=objects)

    def _seen(self, info: ObjectInfo) -> SeenObject:
        return SeenObject(size=info.size, modified=info.modified, proven=self._begun)

    def _read(self) -> ProofRecord:
        """Return all claims that hold, with their objects as one record."""
        merged = ProofRecord(root=self._store.uri)
        for record in map_in_order(self._read_one, self._names if self._again < 1 else ()):
            if record is None or record.root != merged.root:
                continue
            if record.whole:
                merged = ProofRecord(root=merged.root)
            same = {path: seen for path, seen in record.objects.items() if self._is_as_seen(path, seen)}
            merged.objects.update(same)
            merged.claims.update({name: paths for name, paths in record.claims.items() if same.keys() >= {*paths}})
        return merged

    def _is_as_seen(self, path: str, seen: SeenObject) -> bool:
        info = self._there.get(path)
        return info is not None and (info.size, info.modified) == (seen.size, seen.modified)

    def _read_one(self, name: str) -> ProofRecord | None:
        """Read a record; return None for one that is damaged or gone, which proves nothing."""
        try:
            data = self._store.read(name)
            if sha256_of(data)[:PART_DIGEST_CHARS] != PurePosixPath(name).stem.rpartition("-")[2]:
                raise DamagedArtifact(f"{self._store.uri}/{name} does not match the digest in its name")
            return ProofRecord.parse(data, f"{self._store.uri}/{name}", "what it proved is proven again")
        except FileNotFoundError:
            return None
        except DamagedArtifact as error:
            _log.warning("%s", error)
            return None

    def _without_oldest(self, known: ProofRecord) -> ProofRecord:
        """Return the claims without those on the objects that are to be proven again."""
        oldest = sorted(known.objects, key=lambda path: (known.objects[path].proven, path))
        again = set(oldest[: math.ceil(self._again * len(oldest))])
        claims = {name: paths for name, paths in known.claims.items() if again.isdisjoint(paths)}
        objects = {path: seen for path, seen in known.objects.items() if path not in again}
        return ProofRecord(root=known.root, claims=claims, objects=objects)


def _name(claim: tuple[object, ...]) -> str:
    return sha256_of(canonical_json([PROOFS_VERSION, *claim]))[:CLAIM_CHARS]
