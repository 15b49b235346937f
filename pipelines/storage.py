"""The only module that writes bytes which outlive a process, and the only way to read them back.

A `Store` is a root, on a local path or under `s3://bucket/prefix`, whose objects are put once and never changed.
An artifact is a root that was committed in this order, so that a kill at any byte leaves nothing half-published:

    identity.json -> parts/<name>-<sha256[:16]><suffix> -> receipts/<shard>.json -> manifest.json

The existence of the manifest is success. Readers start there, never list, and check size and digest of a part
before anything parses it.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, TypeVar, cast

import fsspec
from pydantic import BaseModel, ConfigDict, ValidationError

from pipelines.errors import (
    CommitConflict,
    CommitUnknown,
    ConfigError,
    DamagedArtifact,
    FingerprintMismatch,
    InputError,
    StoreUnavailable,
)

FORMAT = 1
DIGEST_CHARS = 16
COPY_BYTES = 1 << 20
JSON_LIMIT = 256 << 20

_T = TypeVar("_T")


def canonical_json(value: Any) -> bytes:
    """The one byte form of a JSON value: sorted keys, UTF-8, indented, one trailing newline."""
    return (json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def sha256_of(data: bytes | Path) -> str:
    """Hex sha256 of bytes or of a file's content."""
    if isinstance(data, bytes):
        return hashlib.sha256(data).hexdigest()
    with data.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fingerprint(kind: str, inputs: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """Hex sha256 that names the result of `kind` made from `inputs` (digests) under `settings`."""
    return sha256_of(canonical_json({"format": FORMAT, "kind": kind, "inputs": inputs, "settings": settings}))


# --------------------------------------------------------------------------------------------------------- store


class Store:
    """Objects under one root, put if absent.

    Errors: ConfigError for a URI that is neither a path nor s3://; StoreUnavailable when the store does not
    answer or refuses; FileNotFoundError for an object that is not there.
    """

    def __init__(self, uri: str | Path) -> None:
        text = str(uri)
        scheme, separator, rest = text.partition("://")
        if separator and scheme not in ("s3", "file"):
            raise ConfigError(f"{text}: only local paths and s3:// URIs are stores")
        if separator and "@" in rest.split("/")[0]:
            raise ConfigError("a store URI must not carry credentials: use the standard credential chain")
        self.is_local = scheme != "s3" or not separator
        if self.is_local:
            self.root = str(Path(rest if separator else text).expanduser().resolve())
            self.uri = self.root
            self._fs = fsspec.filesystem("file")
        else:
            self.root = rest.rstrip("/")
            self.uri = f"s3://{self.root}"
            self._fs = fsspec.filesystem("s3", default_cache_type="readahead", use_listings_cache=False)

    def __repr__(self) -> str:
        return f"Store({self.uri!r})"

    def child(self, name: str) -> "Store":
        """The store below `name`."""
        return Store(f"{self.uri}/{name}")

    def path(self, name: str) -> str:
        """Full path of an object inside the file system."""
        return f"{self.root}/{name}"

    def read(self, name: str) -> bytes:
        """The whole object."""
        return cast(bytes, self._ask("read", name, lambda: self._fs.cat_file(self.path(name))))

    def open(self, name: str) -> "ObjectStream":
        """A stream over the object, from its start."""
        raw = self._ask("open", name, lambda: self._fs.open(self.path(name), "rb"))
        return ObjectStream(raw, f"{self.uri}/{name}")

    def size(self, name: str) -> int | None:
        """Bytes of the object, or None where there is none."""
        try:
            return int(self._ask("stat", name, lambda: self._fs.info(self.path(name)))["size"])
        except FileNotFoundError:
            return None

    def names(self, prefix: str) -> list[str]:
        """Sorted names of the objects below `prefix`, relative to the root. Only writers and gc list."""
        try:
            found = self._ask("list", prefix, lambda: self._fs.find(self.path(prefix)))
        except FileNotFoundError:  # not even the bucket is there
            return []
        return sorted(str(name)[len(self.root) + 1 :] for name in found)

    def delete(self, name: str) -> None:
        """Delete an object that nothing refers to any more; one that is gone already is fine."""
        with suppress(FileNotFoundError):
            self._ask("delete", name, lambda: self._fs.rm_file(self.path(name)))

    def discard(self, prefix: str) -> None:
        """Delete an artifact below `prefix` that nothing refers to, its manifest first so that no half of it counts."""
        self.delete(f"{prefix}/manifest.json")
        with suppress(FileNotFoundError):
            self._ask("delete", prefix, lambda: self._fs.rm(self.path(prefix), recursive=True))

    def put(self, name: str, data: bytes | Path) -> bool:
        """Put an object if there is none of that name. True if this call made it, False if one was there."""
        return self._put_local(name, data) if self.is_local else self._put_s3(name, data)

    def put_same(self, name: str, data: bytes | Path) -> None:
        """Put an object, or find the same bytes there already; other bytes raise CommitConflict."""
        if not self.put(name, data) and sha256_of(self.read(name)) != sha256_of(data):
            raise CommitConflict(f"{self.uri}/{name} exists with other bytes; nothing was overwritten")

    def _put_local(self, name: str, data: bytes | Path) -> bool:
        target = Path(self.path(name))
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = target.parent / f".tmp-{uuid.uuid4().hex}"
            try:
                _write_durably(temporary, data)
                os.link(temporary, target)
            except FileExistsError:
                return False
            finally:
                temporary.unlink(missing_ok=True)
            _sync_folder(target.parent)
        except OSError as error:
            raise StoreUnavailable(f"cannot write {target}: {error.strerror or error}") from error
        return True

    def _put_s3(self, name: str, data: bytes | Path) -> bool:
        try:
            if isinstance(data, bytes):
                self._fs.pipe_file(self.path(name), data, mode="create")
            else:
                self._fs.put_file(str(data), self.path(name), mode="create")
        except FileExistsError:
            return False
        except Exception as error:  # the answer may be lost although the object landed: read back to settle it
            if isinstance(error, OSError) and error.errno == errno.EINVAL and self.size(name) is not None:
                return False
            return self._settle(name, data, error)
        return True

    def _settle(self, name: str, data: bytes | Path, error: Exception) -> bool:
        try:
            found = self.read(name)
        except FileNotFoundError:
            raise StoreUnavailable(f"cannot write {self.uri}/{name}: {error}") from error
        except StoreUnavailable as unknown:
            raise CommitUnknown(f"{self.uri}/{name} may or may not have been written: {error}") from unknown
        return sha256_of(found) == sha256_of(data)

    def _ask(self, verb: str, name: str, call: Callable[[], _T]) -> _T:
        try:
            return call()
        except FileNotFoundError:
            raise
        except (IsADirectoryError, NotADirectoryError):
            raise FileNotFoundError(f"{self.uri}/{name}") from None
        except Exception as error:  # s3fs lets botocore's and aiohttp's own exceptions through
            raise StoreUnavailable(f"cannot {verb} {self.uri}/{name}: {error}") from error


class ObjectStream:
    """An object that is being read. A store that fails on the way is StoreUnavailable, as it is at the start."""

    def __init__(self, raw: IO[bytes], where: str) -> None:
        self._raw, self._where = raw, where

    def read(self, size: int = -1, /) -> bytes:
        """At most `size` bytes, none at the end."""
        try:
            return self._raw.read(size)
        except Exception as error:  # s3fs lets botocore's and aiohttp's own exceptions through
            raise StoreUnavailable(f"cannot read {self._where}: {error}") from error

    def seek(self, offset: int) -> None:
        """Go to a byte, counted from the start."""
        self._raw.seek(offset)

    def __enter__(self) -> "ObjectStream":
        return self

    def __exit__(self, *_: object) -> None:
        self._raw.close()


def _write_durably(path: Path, data: bytes | Path) -> None:
    with path.open("xb") as stream:
        if isinstance(data, bytes):
            stream.write(data)
        else:
            with data.open("rb") as source:
                shutil.copyfileobj(source, stream, COPY_BYTES)
        stream.flush()
        os.fsync(stream.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A local folder for bytes under construction, gone at the end."""
    with tempfile.TemporaryDirectory(prefix="hhnet-") as folder:
        yield Path(folder)


def write_output(path: str | Path, data: bytes) -> None:
    """Write a local file that a user named, whole or not at all, replacing what was there."""
    target = Path(path).expanduser()
    temporary = target.parent / f".tmp-{uuid.uuid4().hex}"
    try:
        _write_durably(temporary, data)
        temporary.replace(target)
    except OSError as error:
        raise StoreUnavailable(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------------ manifest


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Part(_Record):
    """One immutable object of an artifact: its path below the root, size, digest and number of rows."""

    path: str
    bytes: int
    sha256: str
    rows: int

    @property
    def name(self) -> str:
        """The logical name, without digest: `shard-000000.tar`."""
        path = PurePosixPath(self.path)
        return path.stem[: -DIGEST_CHARS - 1] + path.suffix


class ArtifactInput(_Record):
    """An upstream artifact: its role here, its kind and its digest. Never where it lay."""

    role: str
    kind: str
    digest: str


class ReceiptRef(_Record):
    """A shard's receipt, as the manifest lists it."""

    shard: str
    path: str
    bytes: int
    sha256: str


class Manifest(_Record):
    """What was published. `meta` holds the kind's own facts (classes, bits, card, settings)."""

    format: int
    kind: str
    fingerprint: str
    inputs: tuple[ArtifactInput, ...]
    parts: tuple[Part, ...]
    receipts: tuple[ReceiptRef, ...]
    totals: dict[str, int]
    meta: dict[str, Any]
    digest: str

    def part(self, name: str) -> Part:
        """The part of this logical name; DamagedArtifact where there is none."""
        for part in self.parts:
            if part.name == name:
                return part
        raise DamagedArtifact(f"the {self.kind} manifest lists no part {name}")

    def input(self, role: str) -> ArtifactInput:
        """The input of this role; DamagedArtifact where there is none."""
        for entry in self.inputs:
            if entry.role == role:
                return entry
        raise DamagedArtifact(f"the {self.kind} manifest names no input {role}")

    def to_bytes(self) -> bytes:
        """Canonical JSON, digest included."""
        return canonical_json(self.model_dump(mode="json"))


def manifest_digest(fields: Mapping[str, Any]) -> str:
    """sha256 of the canonical manifest without its own digest."""
    return sha256_of(canonical_json({key: value for key, value in fields.items() if key != "digest"}))


def parse_manifest(data: bytes, where: str) -> Manifest:
    """Check and parse a manifest's bytes; DamagedArtifact or ConfigError (newer format) otherwise."""
    try:
        fields = json.loads(data)
        if isinstance(fields, dict) and isinstance(fields.get("format"), int) and fields["format"] > FORMAT:
            raise ConfigError(f"{where} has format {fields['format']}, newer than {FORMAT}: upgrade hhnet")
        manifest = Manifest.model_validate(fields)
    except (ValueError, ValidationError, RecursionError) as error:
        raise DamagedArtifact(f"{where} is not a manifest: {str(error).splitlines()[0]}") from None
    if manifest.digest != manifest_digest(manifest.model_dump(mode="json")):
        raise DamagedArtifact(f"{where} does not match its own digest")
    for path in [*(part.path for part in manifest.parts), *(ref.path for ref in manifest.receipts)]:
        if path.startswith("/") or ".." in PurePosixPath(path).parts:
            raise DamagedArtifact(f"{where} names a path outside its artifact: {path!r}")
    return manifest


# ------------------------------------------------------------------------------------------------------ artifact


@dataclass(frozen=True)
class Artifact:
    """A committed artifact, opened at its manifest."""

    store: Store
    manifest: Manifest

    @property
    def uri(self) -> str:
        """Where it lies."""
        return self.store.uri

    @property
    def digest(self) -> str:
        """The manifest's digest, which names the artifact wherever it lies."""
        return self.manifest.digest

    def read(self, part: Part | ReceiptRef) -> bytes:
        """All bytes of a part, checked against size and sha256 before they are returned."""
        try:
            size = self.store.size(part.path)
            data = self.store.read(part.path) if size == part.bytes else b""
        except FileNotFoundError:
            size, data = None, b""
        if size is None:
            raise DamagedArtifact(f"{self.uri}/{part.path} is missing")
        if size != part.bytes or sha256_of(data) != part.sha256:
            raise DamagedArtifact(f"{self.uri}/{part.path} does not match the digest in its manifest")
        return data

    def fetch(self, part: Part, folder: Path) -> Path:
        """A local file with the part's checked bytes: the stored file itself on a local store, else a copy."""
        if self.store.is_local:
            path = Path(self.store.path(part.path))
            if not path.is_file() or path.stat().st_size != part.bytes or sha256_of(path) != part.sha256:
                raise DamagedArtifact(f"{path} is missing or does not match the digest in its manifest")
            return path
        copy = folder / PurePosixPath(part.path).name
        copy.write_bytes(self.read(part))
        return copy

    def origin(self, role: str) -> str | None:
        """Where the input of `role` lay when this artifact was made, if that was remembered."""
        try:
            return cast("str | None", json.loads(self.store.read("origin.json")).get(role))
        except (FileNotFoundError, ValueError, AttributeError):
            return None


def open_artifact(uri: str | Path | Store, kind: str | None = None) -> Artifact:
    """Open what was committed at `uri`. InputError where nothing was, or where it is of another kind."""
    store = uri if isinstance(uri, Store) else Store(uri)
    try:
        data = store.read("manifest.json")
    except FileNotFoundError:
        raise InputError(f"{store.uri} holds no committed {kind or 'artifact'} (no manifest.json)") from None
    manifest = parse_manifest(data, f"{store.uri}/manifest.json")
    if kind is not None and manifest.kind != kind:
        raise InputError(f"{store.uri} is a {manifest.kind} artifact, not {kind}")
    return Artifact(store, manifest)


def open_input(artifact: Artifact, role: str, uri: str | None = None) -> Artifact:
    """The input of `role` from `uri`, else from where it lay; its digest is checked either way."""
    expected = artifact.manifest.input(role)
    where = uri or artifact.origin(role)
    if where is None:
        raise InputError(f"{artifact.uri} does not remember where its {role} lies: name it with --{expected.kind}")
    found = open_artifact(where, expected.kind)
    if found.digest != expected.digest:
        raise FingerprintMismatch(
            f"{artifact.uri} was made from {expected.kind} {expected.digest[:12]}, but {found.uri} is "
            f"{found.digest[:12]}"
        )
    return found


class ArtifactWriter:
    """Publishes one artifact at a root by the commit protocol; safe to kill and to run again at any point."""

    def __init__(
        self,
        store: Store,
        kind: str,
        fingerprint: str,
        inputs: tuple[ArtifactInput, ...],
        origin: Mapping[str, str],
    ) -> None:
        self.store, self.kind, self.fingerprint, self.inputs = store, kind, fingerprint, inputs
        identity = {"format": FORMAT, "kind": kind, "fingerprint": fingerprint}
        if not store.put("identity.json", canonical_json(identity)):
            self._check_identity()
        if origin:
            store.put("origin.json", canonical_json(dict(origin)))

    def _check_identity(self) -> None:
        try:
            found = json.loads(self.store.read("identity.json"))
            kind, other = str(found["kind"]), str(found["fingerprint"])
        except (ValueError, KeyError, TypeError):
            raise DamagedArtifact(f"{self.store.uri}/identity.json is not readable") from None
        if (kind, other) != (self.kind, self.fingerprint):
            raise FingerprintMismatch(
                f"{self.store.uri} holds {kind} {other[:12]}, this run would make {self.kind} "
                f"{self.fingerprint[:12]}: choose another --out, or the inputs and settings it was begun with"
            )

    def committed(self) -> Artifact | None:
        """The artifact, if it was committed before."""
        return open_artifact(self.store, self.kind) if self.store.size("manifest.json") is not None else None

    def put_part(self, name: str, data: bytes | Path, rows: int, folder: str = "parts") -> Part:
        """Put one part under its content-addressed path. `name` is logical, such as `shard-000000.tar`."""
        digest = sha256_of(data)
        path = PurePosixPath(name)
        if not re.fullmatch(r"[A-Za-z0-9._-]+", name):
            raise InputError(f"{name!r} cannot name a part: use letters, digits, dot, dash and underscore")
        target = f"{folder}/{path.stem}-{digest[:DIGEST_CHARS]}{path.suffix}"
        size = len(data) if isinstance(data, bytes) else data.stat().st_size
        if not self.store.put(target, data) and self.store.size(target) != size:
            raise CommitConflict(f"{self.store.uri}/{target} exists with another size; nothing was overwritten")
        return Part(path=target, bytes=size, sha256=digest, rows=rows)

    def put_receipt(self, shard: str, receipt: Mapping[str, Any]) -> dict[str, Any]:
        """Claim a shard's result. The first receipt wins; the winner's is returned, whoever wrote it."""
        data = canonical_json(receipt)
        if self.store.put(f"receipts/{shard}.json", data):
            return dict(receipt)
        return cast("dict[str, Any]", json.loads(self.store.read(f"receipts/{shard}.json")))

    def receipts(self) -> dict[str, dict[str, Any]]:
        """The receipts put so far, by shard; what a resumed run need not do again."""
        found: dict[str, dict[str, Any]] = {}
        for name in self.store.names("receipts"):
            if name.endswith(".json") and not PurePosixPath(name).name.startswith("."):
                shard = PurePosixPath(name).name.removesuffix(".json")
                found[shard] = json.loads(self.store.read(name))
        return found

    def commit(
        self,
        parts: list[Part],
        totals: Mapping[str, int],
        meta: Mapping[str, Any],
        receipts: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> Artifact:
        """Publish the manifest. If one is there already its digest must be the same (CommitConflict)."""
        refs = [
            ReceiptRef(shard=shard, path=f"receipts/{shard}.json", bytes=len(data), sha256=sha256_of(data))
            for shard, data in sorted((s, canonical_json(r)) for s, r in (receipts or {}).items())
        ]
        fields: dict[str, Any] = {
            "format": FORMAT,
            "kind": self.kind,
            "fingerprint": self.fingerprint,
            "inputs": [entry.model_dump() for entry in self.inputs],
            "parts": [part.model_dump() for part in sorted(parts, key=lambda part: part.path)],
            "receipts": [ref.model_dump() for ref in refs],
            "totals": dict(totals),
            "meta": json.loads(canonical_json(meta)),
        }
        manifest = Manifest.model_validate({**fields, "digest": manifest_digest(fields)})
        self.store.put_same("manifest.json", manifest.to_bytes())
        return Artifact(self.store, manifest)


# ---------------------------------------------------------------------------------------- versions and run records


def versions(store: Store) -> list[int]:
    """The published version numbers, ascending."""
    numbers = (re.fullmatch(r"versions/(\d+)\.json", name) for name in store.names("versions"))
    return sorted(int(match.group(1)) for match in numbers if match)


def publish_version(store: Store, number: int, manifest_path: str, digest: str) -> bool:
    """Put `versions/<number>.json`; False if another run took that number. Publishing the same again is fine."""
    record = canonical_json({"version": number, "manifest": manifest_path, "digest": digest})
    return store.put(f"versions/{number}.json", record) or store.read(f"versions/{number}.json") == record


def write_run_record(store: Store, record: Mapping[str, Any]) -> str:
    """Keep clocks, hosts, timings and attempts of a run outside every digest; returns the record's name."""
    name = f"runs/{uuid.uuid4().hex}.json"
    store.put(name, canonical_json(record))
    return name
