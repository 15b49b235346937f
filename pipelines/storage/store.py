"""A store: objects below one root, put once and never changed: on a local path, or under `s3://bucket/prefix`, `gs://`,
`az://` or, for reading, `hf://`.

Access to S3 is configured by the environment of each process, as usual there: AWS_ENDPOINT_URL has the endpoint, the
standard credential chain the keys, HHNET_STORE_UNSIGNED the buckets that are asked without keys, and
HHNET_STORE_DEADLINE_S the seconds that an operation is tried again before it fails (60 by default).
"""

import errno
import hashlib
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, TypeVar

from pipelines.errors import CommitConflict, ConfigError, HHNetError, InputError, StoreRefused, StoreUnavailable
from pipelines.storage.digests import sha256_of
from pipelines.storage.failpoints import failpoint
from pipelines.storage.local import LocalObjects
from pipelines.storage.objects import ObjectInfo, Objects

_T = TypeVar("_T")

READ_BYTES = 1 << 20
"""Bytes read at a time to compute a digest."""
FORMS = {
    "s3": "s3://bucket/prefix",
    "gs": "gs://bucket/prefix",
    "az": "az://container/prefix",
    "hf": "hf://datasets/owner/name/prefix",
}
"""How a store of each scheme is written."""
_KNOWN = (
    f"{FORMS['s3']}, {FORMS['gs']} (pip install 'hhnet[gs]'), {FORMS['az']} (pip install 'hhnet[az]') or, to read, "
    f"{FORMS['hf']} (pip install 'hhnet[hf]')"
)
_BUCKET = r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}"
_REPOSITORY = r"((datasets|spaces)/)?[\w.-]+/[\w.-]+(@[^/]+)?(/.*)?"
LASTING_ERRORS = (
    *(errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG),
)
"""Error numbers of a file system that do not go away by waiting."""


class Store:
    """Objects under one root, put if absent.

    Errors: ConfigError for a URI of another scheme, or one whose library is missing; StoreUnavailable, naming the
    operation and the object, when the store does not answer or refuses; ReadOnlyStore when one for reading is to be
    written; FileNotFoundError for a missing object.
    """

    def __init__(self, uri: str | Path, objects: Objects | None = None) -> None:
        """Open the store at `uri`, on `objects` instead of those that its scheme means if they are given."""
        text = str(uri)
        if not text:
            raise ConfigError("a store URI is empty: name a folder or s3://bucket/prefix")
        scheme, separator, rest = text.partition("://")
        if separator and scheme not in ("file", *FORMS):  # the rest is not printed: it may hold a secret
            raise ConfigError(f"{scheme}://... is no store: give a local path or {_KNOWN}")
        authority = rest.split("/")[0]
        if separator and ("@" in authority or ":" in authority):  # a secret key may hold the slash, a bucket no colon
            raise ConfigError(
                "a store URI must not carry credentials: give them by files or variables, as AWS tools do"
            )
        self.scheme = scheme if separator else "file"
        self.is_local = self.scheme == "file"
        if self.is_local:
            self.root = self.uri = str(_expanded(Path(rest if separator else text)).resolve())
            self._objects = objects or LocalObjects(Path(self.root))
        else:
            if not (re.fullmatch(_REPOSITORY, rest) if scheme == "hf" else re.fullmatch(_BUCKET, authority)):
                raise ConfigError(f"{scheme}://... does not name a bucket: write {FORMS[scheme]}")
            self.root = rest.rstrip("/")
            self.uri = f"{scheme}://{self.root}"
            self._objects = objects or _distant(scheme, self.root)

    def __repr__(self) -> str:
        return f"Store({self.uri!r})"

    def child(self, name: str) -> "Store":
        """Return the store below `name`."""
        return Store(f"{self.uri}/{name}")

    def path(self, name: str) -> str:
        """Return the full path of an object: of its file, or bucket and key."""
        return f"{self.root}/{name}"

    def read(self, name: str, limit: int | None = None) -> bytes:
        """Read a whole object; if it has more than `limit` bytes, only the first `limit` + 1 are fetched."""
        return self._ask("read", name, lambda: self._objects.read(name, limit))

    def open(self, name: str, block: int | None = None, start: int = 0) -> "ObjectStream":
        """Open a stream over an object at byte `start`; an object store is asked for `block` bytes at a time."""
        raw = self._ask("open", name, lambda: self._objects.open(name, block, start))
        return ObjectStream(raw, f"{self.uri}/{name}")

    def size(self, name: str) -> int | None:
        """Return the bytes of an object, or None if it is missing."""
        try:
            return self._ask("stat", name, lambda: self._objects.size(name))
        except FileNotFoundError:
            return None

    def names(self, prefix: str) -> list[str]:
        """List the sorted names of the objects below `prefix`, relative to the root. Only writers and gc list."""
        return list(self.entries(prefix))

    def entries(self, prefix: str = "") -> dict[str, ObjectInfo]:
        """List the objects below `prefix` with size and time, sorted by name. Only writers and gc list."""
        return dict(sorted(self._ask("list", prefix, lambda: self._objects.entries(prefix)).items()))

    def folders(self, prefix: str = "") -> list[str]:
        """List the sorted names of the folders directly below `prefix`, without listing their contents."""
        return sorted(self._ask("list", prefix, lambda: self._objects.folders(prefix)))

    def require_bucket(self) -> None:
        """Raise InputError if the store's bucket does not exist; for callers that found nothing in the store."""
        try:
            self._ask("list", "", self._objects.require)
        except FileNotFoundError:
            bucket = f"the bucket {self.scheme}://{self.root.partition('/')[0]}"
            where = f"the repository of {self.uri}" if self.scheme == "hf" else bucket
            check = "its name and AWS_ENDPOINT_URL" if self.scheme == "s3" else "its name and the keys"
            raise InputError(f"{where} does not exist: check {check}") from None

    def delete(self, name: str) -> None:
        """Delete an object that nothing refers to any more; one that is gone already is no error."""
        with suppress(FileNotFoundError):
            self._ask("delete", name, lambda: self._objects.delete(name))

    def discard(self, prefix: str) -> None:
        """Delete an artifact below `prefix` that nothing refers to, its manifest first so that no half of it counts."""
        self.delete(f"{prefix}/manifest.json")
        with suppress(FileNotFoundError):
            self._ask("delete", prefix, lambda: self._objects.delete_all(prefix))

    def uploads(self) -> dict[str, ObjectInfo]:
        """List the unfinished uploads by name: their parts are in no other listing, but cost space."""
        return dict(sorted(self._ask("list the uploads of", "", self._objects.uploads).items()))

    def abort(self, name: str) -> None:
        """Free the parts of unfinished uploads of an object; the object itself stays."""
        self._ask("abort the uploads of", name, lambda: self._objects.abort(name))

    def put(self, name: str, data: bytes | Path, point: str = "put") -> bool:
        """Put an object if none has that name; True if this call made it, False if one was there.

        Passes the failpoints `point`.before, .during (the bytes are stored, the name is not) and .after.
        """
        try:
            failpoint(f"{point}.before")
            made = self._objects.put(name, data, f"{point}.during")
            failpoint(f"{point}.after")
        except OSError as error:
            raise _failure(error, f"cannot write {self.uri}/{name}") from error
        return made

    def put_same(self, name: str, data: bytes | Path, point: str = "put") -> None:
        """Put an object, or find the same bytes there already; raise CommitConflict for other bytes."""
        while not self.put(name, data, point):
            with suppress(FileNotFoundError):  # it was deleted meanwhile, as what served another run until it published
                if self._sha256(name) == sha256_of(data):
                    return
                raise CommitConflict(
                    f"{self.uri}/{name} exists with other bytes; nothing was overwritten: see what put it there, and "
                    "delete it if it is damaged"
                )

    def _sha256(self, name: str) -> str:
        """Return the hex sha256 of an object, without holding it in memory."""
        digest = hashlib.sha256()
        with self.open(name) as stream:
            while data := stream.read(READ_BYTES):
                digest.update(data)
        return digest.hexdigest()

    def _ask(self, verb: str, name: str, call: Callable[[], _T]) -> _T:
        try:
            return call()
        except FileNotFoundError:
            raise
        except NotADirectoryError:  # a file stands where a folder of the name would be: the object is missing
            raise FileNotFoundError(f"{self.uri}/{name}") from None
        except OSError as error:
            raise _failure(error, f"cannot {verb} {self.uri}/{name}") from error


def _distant(scheme: str, root: str) -> Objects:
    """Return the objects of a store that is not local; imported here, since local stores do without the libraries."""
    if scheme == "s3":
        from pipelines.storage.s3 import S3Objects

        return S3Objects(root)
    from pipelines.storage.clouds import CloudObjects

    return CloudObjects(scheme, root)


def _failure(error: OSError, problem: str) -> StoreUnavailable:
    kind = StoreRefused if error.errno in LASTING_ERRORS else StoreUnavailable
    return kind(f"{problem}: {error.strerror or error}")


def _expanded(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{path}: {error}: write the path without ~") from None


class ObjectStream:
    """An object being read. A failure of the store on the way raises StoreUnavailable, as at the start."""

    def __init__(self, raw: IO[bytes], where: str) -> None:
        self._raw, self._where = raw, where

    def read(self, size: int = -1, /) -> bytes:
        """Read at most `size` bytes; none at the end."""
        try:
            return self._raw.read(size)
        except HHNetError:
            raise
        except OSError as error:
            raise StoreUnavailable(f"cannot read {self._where}: {error.strerror or error}") from error

    def seek(self, offset: int) -> None:
        """Go to a byte, counted from the start."""
        self._raw.seek(offset)

    def __enter__(self) -> "ObjectStream":
        return self

    def __exit__(self, *_: object) -> None:
        self._raw.close()
