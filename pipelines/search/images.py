"""Query images of `hhnet search --image`: finds them, reads them, and decodes each once before the model is asked.

A value is a file, a folder, a pattern such as photos/*.jpg, an http://, https:// or file:// URL, or an object of a
bucket. A search is refused if an image that the user names cannot be used. One that a folder or a pattern holds is
skipped instead, and named in the result.
"""

import errno
import logging
from collections.abc import Iterable, Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from pipelines.artifacts.tables import Reason
from pipelines.errors import InputError
from pipelines.report.pictures import LARGE_SIDE, encode_thumbnail
from pipelines.shards.containers import SUFFIXES
from pipelines.shards.containers.limits import ImageReject
from pipelines.shards.folders import is_hidden, walk_folder
from pipelines.shards.images import MAX_IMAGE_BYTES, decode_image
from pipelines.storage import Store, map_in_order

_log = logging.getLogger(__name__)

IMAGES_AT_ONCE = 4
"""Images read and decoded at a time; twice as many files are in memory."""
UNREADABLE = "unreadable"
"""Reason to skip a file that the system does not give, beside the reasons of the decoder."""

_WILD = frozenset("*?[")


class ImageSource(NamedTuple):
    """An image by its path or URL. `found`: in a folder or by a pattern, so the user did not name it."""

    name: str
    found: bool = False


class QueryImage(NamedTuple):
    """A picture that decodes: its path or URL, the bytes of its file, and its thumbnail if one was asked for."""

    name: str
    data: bytes
    picture: str | None


class SkippedImage(NamedTuple):
    """A picture of a folder or pattern that cannot be used, with the reason."""

    path: str
    reason: str
    detail: str


def find_images(values: Iterable[str]) -> list[ImageSource]:
    """List the images that these values of --image mean, those of a folder or pattern sorted.

    Raises InputError for a value that means none.
    """
    return [source for value in values for source in _expand(value)]


def _expand(value: str) -> list[ImageSource]:
    scheme, separator, _ = value.partition("://")
    if separator:
        _require_url(value, scheme.lower())
        if scheme.lower() != "file":
            return [ImageSource(value)]
    path = _local_path(value)
    try:
        if path.is_dir():
            found = sorted(_pictures_below(path))
        elif not separator and not path.exists() and _WILD & set(value):
            found = sorted(set(_matches(path, value)))
        else:
            path.stat()
            return [ImageSource(value)]
    except FileNotFoundError:
        raise InputError(f"{value} does not exist: name an image file, a folder of images or a pattern") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{value} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not found:
        holds = "holds" if path.is_dir() else "matches"
        remedy = "give files with an image's suffix, such as .jpg, that are not hidden"
        raise InputError(f"{value} {holds} no image: {remedy}")
    return [ImageSource(str(one), True) for one in found]


def _require_url(value: str, scheme: str) -> None:
    """Raise InputError unless this is a URL that --image takes. What may hold a secret is not printed."""
    if scheme not in ("http", "https", "file", "s3"):
        raise InputError(f"{scheme}://... is no image: give a path, or a URL that begins with http, https, file or s3")
    try:
        parts = urlsplit(value)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise InputError(f"{scheme}://... is not a valid URL: write {scheme}://host/path") from None
    if "@" in parts.netloc:
        raise InputError(f"{scheme}://...@... carries credentials: give a URL without user and password")
    if scheme == "file" and host not in (None, "localhost"):
        raise InputError(f"{value} names another machine: write file:///path for a file of this one")
    if scheme != "file" and not (host and parts.path.strip("/")):
        raise InputError(f"{value} names no file: write {scheme}://{'bucket' if scheme == 's3' else 'host'}/path")


def _local_path(name: str) -> Path:
    scheme, separator, _ = name.partition("://")
    if separator and scheme.lower() == "file":
        return Path(unquote(urlsplit(name).path))
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise InputError(f"{name}: {error}: write the path without ~") from None


def _pictures_below(folder: Path) -> Iterator[Path]:
    """Yield the pictures of a folder and of all below it, and what of it cannot be read; hidden ones are left out."""
    for found in walk_folder(folder):
        unread = found.kind == "unreadable" and found.name.endswith("/")
        if (unread or (found.kind not in ("folder", "loop") and _is_picture(found.name))) and not is_hidden(found.name):
            yield folder / found.name


def _matches(path: Path, value: str) -> Iterator[Path]:
    """Yield the pictures that a pattern matches, and those below folders that it matches."""
    fixed = list(takewhile(lambda part: not _WILD & set(part), path.parts))
    base = Path(*fixed)
    try:
        for match in base.glob("/".join(path.parts[len(fixed) :])):
            if is_hidden(match.relative_to(base).as_posix()):
                continue
            if match.is_dir():
                yield from _pictures_below(match)
            elif _is_picture(match.name):
                yield match
    except ValueError:
        rule = "** stands for whole folders, as in photos/**/*.jpg"
        raise InputError(f"{value} is not a valid pattern: {rule}") from None


def _is_picture(name: str) -> bool:
    return Path(name).suffix.lower() in SUFFIXES


# -------------------------------------------------------------------------------------------------------- reading


def read_images(sources: Sequence[ImageSource], pictured: int, skipped: list[SkippedImage]) -> Iterator[QueryImage]:
    """Yield the images in order, the first `pictured` with a thumbnail; add those to `skipped` that cannot be used.

    Raises InputError for a named image that cannot be used, and where none of the found ones can; Unavailable where a
    store or server is out of reach.
    """
    places = [(source, place < pictured) for place, source in enumerate(sources)]
    for image in map_in_order(lambda place: _read(*place), places, IMAGES_AT_ONCE):
        if isinstance(image, QueryImage):
            yield image
        else:
            _log.info("skipped an image: %s", image.reason, extra=image._asdict())
            skipped.append(image)
    if sources and len(skipped) == len(sources):
        path, reason, detail = skipped[0]
        first = f"{path}: {reason}, {detail}"
        raise InputError(f"none of the {len(skipped):,} images can be used, the first is {first}: give others")


def _read(source: ImageSource, pictured: bool) -> QueryImage | SkippedImage:
    name = source.name
    try:
        data = _read_bytes(source)
        if len(data) > MAX_IMAGE_BYTES:
            raise ImageReject(Reason.TOO_LARGE, f"the limit for an image is {MAX_IMAGE_BYTES:,} bytes")
        pixels = decode_image(data)
        return QueryImage(name, data, encode_thumbnail(pixels, LARGE_SIDE) if pictured else None)
    except OSError as error:
        problem = error.strerror or str(error)
        if not source.found:
            raise InputError(f"{name} cannot be read: {problem}") from None
        return SkippedImage(name, UNREADABLE, problem)
    except ImageReject as reject:
        if not source.found:
            raise InputError(f"{name} cannot be decoded: {reject.reason}, {reject.detail}") from None
        return SkippedImage(name, str(reject.reason), reject.detail)


def _read_bytes(source: ImageSource) -> bytes:
    """Return the bytes of an image's file; of one beyond the limit, one byte more than the limit."""
    name = source.name
    scheme, separator, rest = name.partition("://")
    if separator and scheme.lower() in ("http", "https"):
        from pipelines.storage.web import fetch_url  # imports aiohttp; files need none

        return fetch_url(name, MAX_IMAGE_BYTES)
    if separator and scheme.lower() == "s3":
        bucket, _, key = rest.partition("/")
        try:
            return Store(f"s3://{bucket}").read(key, MAX_IMAGE_BYTES)
        except FileNotFoundError:
            remedy = "name an object, for prefixes and patterns of a bucket are not listed"
            raise InputError(f"{name} does not exist: {remedy}") from None
    path = _local_path(name)
    if source.found and not path.is_file():  # opening a FIFO would wait for its writer
        if path.is_dir():  # it could not be listed
            next(path.iterdir(), None)
        path.stat()
        raise OSError(errno.EINVAL, "not a plain file")
    with path.open("rb") as stream:
        return stream.read(MAX_IMAGE_BYTES + 1)
