"""A folder as a store, and the local files that verbs write beside it."""

import errno
import os
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from pipelines.errors import StoreUnavailable
from pipelines.storage.failpoints import failpoint
from pipelines.storage.objects import ObjectInfo
from pipelines.storage.scratch import PrivateFolder

COPY_BYTES = 1 << 20
"""Bytes of a file that are copied at a time."""
SCRATCH_PREFIX = "hhscratch-"
"""Beginning of the names of scratch folders; a later process finds abandoned ones by it."""
DISK_FULL_ERRORS = (errno.ENOSPC, errno.EDQUOT)
"""Error numbers of a full disk and of a used-up quota."""
FOLDER_TRIES = 9
"""Number of times that a put whose folder is removed meanwhile is tried again."""


class LocalObjects:
    """Files below one folder. Raises OSError unchanged, and FileNotFoundError for a missing object.

    Pipes, devices and other special files do not count as objects: reading one might never end.
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    def read(self, name: str, limit: int | None = None) -> bytes:
        """Return all bytes of a file, or the first `limit` + 1."""
        with self._file(name).open("rb") as stream:
            return stream.read(-1 if limit is None else limit + 1)

    def open(self, name: str, block: int | None = None, start: int = 0) -> IO[bytes]:
        """Open the file for reading from byte `start` on."""
        stream = self._file(name).open("rb")
        stream.seek(start)
        return stream

    def size(self, name: str) -> int:
        """Return the bytes of the file."""
        return self._file(name).stat().st_size

    def entries(self, prefix: str) -> dict[str, ObjectInfo]:
        """List the files below `prefix` by their names relative to the root."""
        cut = len(str(self._root)) + 1
        found = {}
        for folder, _, names in os.walk(self._root / prefix):
            for name in names:
                with suppress(FileNotFoundError):  # gone since the folder was read
                    facts = os.stat(f"{folder}/{name}")  # noqa: PTH116 - a Path per file is slow
                    if stat.S_ISREG(facts.st_mode):
                        found[f"{folder}/{name}"[cut:]] = ObjectInfo(facts.st_size, facts.st_mtime)
        return found

    def folders(self, prefix: str) -> list[str]:
        """List the folders directly below `prefix`."""
        try:
            with os.scandir(self._root / prefix) as found:
                return [entry.name for entry in found if entry.is_dir()]
        except (FileNotFoundError, NotADirectoryError):
            return []

    def require(self) -> None:
        """Do nothing: a folder is made when something is put into it."""

    def delete(self, name: str) -> None:
        """Remove a file."""
        (self._root / name).unlink()

    def delete_all(self, prefix: str) -> None:
        """Remove all files and folders below `prefix`; what another run puts there meanwhile may stay."""
        for folder, folders, names in os.walk(self._root / prefix, topdown=False):
            links = [name for name in folders if Path(folder, name).is_symlink()]
            for name in (*names, *links):
                Path(folder, name).unlink(missing_ok=True)
            try:
                Path(folder).rmdir()
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ENOTEMPTY):
                    raise

    def uploads(self) -> dict[str, ObjectInfo]:
        """Return {}: local writes have no resumable uploads."""
        return {}

    def abort(self, name: str) -> None:
        """Do nothing: local writes have no resumable uploads."""

    def put(self, name: str, data: bytes | Path, point: str) -> bool:
        """Write the bytes durably to an unnamed file, then link its name, which fails where the name is taken."""
        for _ in range(FOLDER_TRIES):
            try:
                return self._put(name, data, point)
            except FileNotFoundError:  # another run removed the folder, with what served it until it published
                if isinstance(data, Path) and not data.exists():
                    raise
        return self._put(name, data, point)

    def _put(self, name: str, data: bytes | Path, point: str) -> bool:
        target = self._root / name
        _make_folder(target.parent)
        folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            with _temporary(target.parent) as (stream, path):
                # The bytes reach the disk before the name: a power cut must not leave the name of a half-written file.
                _write_durably(stream, data)
                failpoint(point)
                # `path` may be a link in /proc to the unnamed file. Only linkat with AT_SYMLINK_FOLLOW links the file
                # itself, and Python calls linkat where a descriptor is given; it does not matter for absolute paths.
                os.link(path, target, src_dir_fd=folder, follow_symlinks=True)
            os.fsync(folder)  # or a power cut could take the name back
        except FileExistsError:
            # No reader would take anything else for the object.
            if not target.is_file() and (target.exists() or target.is_symlink()):
                raise OSError(errno.EEXIST, "something that is no plain file has this name", str(target)) from None
            return False
        finally:
            os.close(folder)
        return True

    def _file(self, name: str) -> Path:
        path = self._root / name
        if not path.is_file():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        return path


@contextmanager
def _temporary(folder: Path) -> Iterator[tuple[IO[bytes], str]]:
    """Open a file to write, and yield it with a path to link it from.

    Where the system can (O_TMPFILE), the file has no name, so a killed process leaves nothing behind.
    """
    try:
        # 0o666 is cut by the umask, as for a file that `open` makes; mkstemp's 0o600 would hide objects from others.
        descriptor = os.open(folder, os.O_TMPFILE | os.O_WRONLY, 0o666)
    except (AttributeError, OSError):  # the system, or this file system, has no unnamed files
        path = folder / f".tmp-{uuid.uuid4().hex}"
        try:
            with path.open("xb") as stream:
                yield stream, str(path)
        finally:
            path.unlink(missing_ok=True)
    else:
        with os.fdopen(descriptor, "wb") as stream:
            yield stream, f"/proc/self/fd/{descriptor}"


def _write_durably(stream: IO[bytes], data: bytes | Path) -> None:
    if isinstance(data, bytes):
        stream.write(data)
    else:
        with data.open("rb") as source:
            shutil.copyfileobj(source, stream, COPY_BYTES)
    stream.flush()
    os.fsync(stream.fileno())


def _make_folder(path: Path) -> None:
    """Make a folder and those above it, and sync each one's entry to disk."""
    if path.is_dir():
        return
    _make_folder(path.parent)
    path.mkdir(exist_ok=True)
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def scratch_folder(kept: bool = False) -> Iterator[Path]:
    """Make a local folder for bytes under construction, removed at the end; StoreUnavailable if its disk is full.

    If this process is killed, the next one that makes such a folder removes it. With `kept`, a process of its own
    removes it at once.
    """
    private = PrivateFolder(Path(tempfile.gettempdir()), SCRATCH_PREFIX, kept)
    try:
        yield private.path
    except OSError as error:
        if error.errno not in DISK_FULL_ERRORS:
            raise
        raise StoreUnavailable(
            f"{private.path}: {error.strerror}: free some space, or set TMPDIR to a larger disk"
        ) from error
    finally:
        private.close()


def write_output(path: str | Path, data: bytes) -> None:
    """Write a local file that a user named, whole or not at all, replacing an existing one."""
    target = Path(path).expanduser()
    # In the same folder, hence on the same file system: only there is `replace` atomic.
    temporary = target.parent / f".tmp-{uuid.uuid4().hex}"
    try:
        with temporary.open("xb") as stream:
            _write_durably(stream, data)
        temporary.replace(target)
    except OSError as error:
        raise StoreUnavailable(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
