"""The commit protocol: how a verb publishes an artifact at a root.

An artifact is a root that was committed in this order, so that a kill at any byte leaves nothing half-published:

    identity.json -> parts/<name>-<sha256[:16]><suffix> -> receipts/<shard>.json -> manifest.json

The existence of the manifest is success. Readers start there, never list, and check size and digest of a part
before anything parses it.
"""

import re
import threading
from collections.abc import Container, Mapping, Sequence
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any, Self

from pipelines.artifacts.differences import describe_differences
from pipelines.artifacts.manifest import (
    MANIFEST_FORMAT,
    PART_DIGEST_CHARS,
    PART_NAME,
    Artifact,
    ArtifactInput,
    F,
    Facts,
    Part,
    ReceiptRef,
    inputs_of,
    make_manifest,
    read_identity,
)
from pipelines.errors import FingerprintMismatch, InputError
from pipelines.storage import Store, canonical_json, map_in_order, sha256_of

_begun = threading.Event()


def note_begun() -> None:
    """Note that this process, or a job that it follows, has begun to write an artifact."""
    _begun.set()


def has_begun() -> bool:
    """Tell whether this process has begun to write an artifact; that stays when the process ends."""
    return _begun.is_set()


def require_identity(
    store: Store,
    kind: str,
    fingerprint: str,
    settings: Mapping[str, Any],
    inputs: Sequence[ArtifactInput],
    origin: Mapping[str, str],
) -> None:
    """Raise FingerprintMismatch, naming inputs and `settings` that differ, where a root was begun with something else.

    A root that was never begun is fine.
    """
    try:
        found, other = read_identity(store)
    except FileNotFoundError:
        return
    if (found, other) != (kind, fingerprint):
        raise mismatch(store, (found, other), kind, settings, inputs, origin)


def mismatch(
    store: Store,
    begun: tuple[str, str],
    kind: str,
    settings: Mapping[str, Any],
    inputs: Sequence[ArtifactInput],
    origin: Mapping[str, str],
) -> FingerprintMismatch:
    """Return the error of a root that was `begun` with another kind and fingerprint, with what differs."""
    found, other = begun
    if found != kind:
        return FingerprintMismatch(f"{store.uri} holds {found}, and this run would make {kind}: choose another --out")
    differs = describe_differences(store, other, settings, inputs, origin)
    return FingerprintMismatch(
        f"{store.uri} holds another run's {found} ({differs}): choose another --out, or what it was begun with"
    )


def read_claim(store: Store, path: str, model: type[F]) -> F:
    """Read a receipt, whether or not a manifest names it; raise DamagedArtifact where it does not fit the model."""
    return model.parse(store.read(path), f"{store.uri}/{path}", "delete it to have its shard done again")


class ArtifactWriter:
    """Publishes one artifact at a root by the commit protocol; safe to kill and to run again at any point."""

    def __init__(
        self,
        store: Store,
        kind: str,
        fingerprint: str,
        inputs: tuple[ArtifactInput, ...],
        origin: Mapping[str, str],
        settings: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """Begin an artifact; an error about a root that another run began names those `settings` that differ."""
        self.store, self.kind, self.fingerprint, self.inputs = store, kind, fingerprint, inputs
        identity = {"format": MANIFEST_FORMAT, "kind": kind, "fingerprint": fingerprint}
        if not store.put("identity.json", canonical_json(identity), "identity.put"):
            require_identity(store, kind, fingerprint, settings, inputs, origin)
        note_begun()
        if origin:
            store.put("origin.json", canonical_json(dict(origin)))

    @classmethod
    def of(
        cls,
        store: Store,
        kind: str,
        fingerprint: str,
        named: Mapping[str, Artifact],
        settings: Mapping[str, Any] = MappingProxyType({}),
    ) -> Self:
        """Begin an artifact that is made from `named` artifacts, by role; it remembers where each of them lies."""
        return cls(store, kind, fingerprint, inputs_of(named), {role: one.uri for role, one in named.items()}, settings)

    def put_part(self, name: str, data: bytes | Path, rows: int, folder: str = "parts") -> Part:
        """Put one part under its content-addressed path. `name` is logical, such as `shard-000000.tar`."""
        digest = sha256_of(data)
        path = PurePosixPath(name)
        if not re.fullmatch(PART_NAME, name):
            raise InputError(
                f"{name!r} cannot name a part: use letters, digits, space and any of . _ - + = , @ ( ) [ ]"
            )
        target = f"{folder}/{path.stem}-{digest[:PART_DIGEST_CHARS]}{path.suffix}"
        size = len(data) if isinstance(data, bytes) else data.stat().st_size
        self.store.put_same(target, data, "part.put")
        return Part(path=target, bytes=size, sha256=digest, rows=rows)

    def put_receipt(self, shard: str, receipt: F) -> F:
        """Claim a shard's result. The first receipt wins and is returned, whichever run wrote it."""
        if self.store.put(f"receipts/{shard}.json", canonical_json(receipt), "receipt.put"):
            return receipt
        return read_claim(self.store, f"receipts/{shard}.json", type(receipt))

    def receipts(self, model: type[F], among: Container[str] | None = None) -> dict[str, F]:
        """Return the receipts put so far, by shard, or those `among` these shards: work that is done already."""
        named = {}
        for name in self.store.names("receipts"):
            shard = PurePosixPath(name).name.removesuffix(".json")
            if name.endswith(".json") and not shard.startswith(".") and (among is None or shard in among):
                named[shard] = name
        found = map_in_order(lambda name: read_claim(self.store, name, model), named.values())
        return dict(zip(named, found, strict=True))

    def commit(
        self,
        parts: list[Part],
        totals: Mapping[str, int],
        meta: Facts,
        receipts: Mapping[str, Facts] | None = None,
        point: str = "manifest.put",
    ) -> Artifact:
        """Publish the manifest. If another one with a different digest is already there, raise CommitConflict.

        `point` names the failpoints of that last step.
        """
        artifact = self.draft(parts, totals, meta, receipts)
        artifact.manifest.put_lists(self.store)
        self.store.put_same("manifest.json", artifact.manifest.to_bytes(), point)
        return artifact

    def draft(
        self, parts: Sequence[Part], totals: Mapping[str, int], meta: Facts, receipts: Mapping[str, Facts] | None = None
    ) -> Artifact:
        """Return the artifact as `commit` would publish it; its parts can be read already."""
        refs = [ReceiptRef.of(shard, receipt) for shard, receipt in (receipts or {}).items()]
        fields = {
            "kind": self.kind,
            "fingerprint": self.fingerprint,
            "inputs": [entry.model_dump() for entry in self.inputs],
            "totals": dict(totals),
            "meta": meta,
        }
        return Artifact(self.store, make_manifest(self.store, fields, parts, refs))


# -------------------------------------------------------------------------------------------------------- versions


def list_versions(store: Store) -> list[int]:
    """Return the published version numbers, ascending; other files there, such as `01.json`, are ignored."""
    numbers = (re.fullmatch(r"versions/([1-9]\d{0,8})\.json", name) for name in store.names("versions"))
    return sorted(int(match.group(1)) for match in numbers if match)


def publish_version(store: Store, number: int, manifest_path: str, digest: str) -> bool:
    """Put `versions/<number>.json`; return False if another run took that number. Publishing the same again is fine."""
    record = canonical_json({"version": number, "manifest": manifest_path, "digest": digest})
    name = f"versions/{number}.json"
    note_begun()
    return store.put(name, record, "version.put") or store.read(name) == record
