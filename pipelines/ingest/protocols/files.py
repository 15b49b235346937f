"""Reads untrusted files of a data set: sizes are bounded, and images are checked before they are listed."""

from pathlib import Path

from pipelines.errors import InputError
from pipelines.ingest.sources import file_size, find_unfit_reason, make_printable


def read_bounded(path: Path, limit: int, wanted: str) -> bytes:
    """Return all bytes of a file. InputError, with `wanted` as advice, if it cannot be read or exceeds `limit`."""
    if path.exists() and not path.is_file():  # opening a pipe would wait for a writer
        raise InputError(f"{path} is not a plain file: {wanted}")
    try:
        with path.open("rb") as stream:
            data = None if path.stat().st_size > limit else stream.read(limit + 1)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}: {wanted}") from None
    if data is None or len(data) > limit:  # it may have grown since its size was asked
        raise InputError(f"{path} is larger than {limit} bytes: {wanted}")
    return data


def require_image(root: Path, path: str, where: str) -> None:
    """Raise InputError, with `where` it is named, unless `path` below `root` is a file that can be a sample."""
    if reason := find_unfit_reason(path, file_size(f"{root}/{path}", where)):
        raise InputError(f"{where}: {make_printable(path)} cannot be a sample: {reason}")
