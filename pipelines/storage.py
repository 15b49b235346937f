"""The only module that writes bytes which outlive a process, and the only way to read them back.

A `Store` is a root, on a local path or under `s3://bucket/prefix`, whose objects are put once and never changed.
"""

import errno
import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, TypeVar, cast

import fsspec

from pipelines.errors import (
    CommitConflict,
    CommitUnknown,
    ConfigError,
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
