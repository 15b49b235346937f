"""Lists the tars of a SOURCE of `--adopt`: all in a folder or prefix, one of them, or those of a pattern in braces."""

import re
from itertools import product
from math import prod
from pathlib import Path

from pipelines.artifacts.manifest import PART_NAME
from pipelines.errors import InputError
from pipelines.storage import Store

MAX_TARS = 1_000_000
"""Largest number of tars that a pattern may stand for."""

_COMPRESSED = re.compile(r"[^/.][^/]*\.(tar\.(gz|bz2|xz|zst|lz4)|tgz|tbz2|txz)", re.IGNORECASE)
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d{1,9})\.\.(\d{1,9})")


def list_tars(source: str) -> tuple[Store, list[str]]:
    """Return the folder or prefix of the tars of `source`, and their names in order.

    `source` is a folder or s3:// prefix with tars directly in it, a tar, or a pattern of the webdataset library for
    several, such as `t-{000..012}.tar` or `{train,val}.tar`. Raises InputError if there is no tar, or if one does not
    exist, is compressed or has a name that a shard cannot have.
    """
    origin, wanted = _folder_of_tars(source)
    beside = [name for name in origin.names("") if "/" not in name]
    tars = [name for name in beside if name.endswith(".tar") and not name.startswith(".")]
    if wanted is None:
        _require_readable(origin, beside)
        wanted = tars
    for name in wanted:
        if name not in beside:
            origin.require_bucket()
            hint = ": give the folder for all its tars, or a pattern such as t-{000..012}.tar" if "*" in name else ""
            raise InputError(f"{origin.uri}/{name} does not exist, or is no plain file{hint}")
        if not re.fullmatch(PART_NAME, name):
            allowed = "letters, digits, space and any of . _ - + = , @ ( ) [ ]"
            raise InputError(f"{origin.uri}/{name} cannot name a shard: rename it, or a copy, with {allowed}")
    if not wanted:
        origin.require_bucket()
        if _COMPRESSED.fullmatch(source.rpartition("/")[2]):
            raise InputError(f"{source} is compressed, so no sample can be read by its place: unpack it")
        if origin.is_local and not Path(origin.uri).exists():
            raise InputError(f"{origin.uri} does not exist: --adopt takes a folder of WebDataset tars, or a tar")
        raise InputError(
            f"{origin.uri} holds no .tar file: --adopt takes a folder or s3:// prefix of WebDataset tars, or a tar"
        )
    return origin, wanted


def _folder_of_tars(source: str) -> tuple[Store, list[str] | None]:
    """Return the folder of the named tars and their names, or None for all tars in it."""
    whole = Store(source)
    literal = whole.is_local and Path(whole.uri).exists()
    sources = [source] if literal or "{" not in source else _expanded(source)
    above = [named.rpartition("/") for named in sources]
    if not all(name.endswith(".tar") for _, _, name in above):
        if len(sources) > 1:
            raise InputError(f"{source} does not name .tar files: write a pattern such as wds/t-{{000..012}}.tar")
        return whole, None
    folders = dict.fromkeys(folder + slash or "." for folder, slash, _ in above)
    if len(folders) > 1:
        raise InputError(f"{source} names tars of {len(folders)} folders: adopt those of one folder at a time")
    # A name that ends in .tar may belong to a folder or prefix.
    if len(sources) == 1 and (Path(whole.uri).is_dir() if whole.is_local else whole.entries()):
        return whole, None
    origin = Store(next(iter(folders)))
    return origin, sorted({name for _, _, name in above})


def _expanded(source: str) -> list[str]:
    """Return every name that a pattern in braces stands for. Raises InputError for nested braces or too many names."""
    pieces = _BRACES.split(source)
    choices = [_choices(piece, source) if place % 2 else [piece] for place, piece in enumerate(pieces)]
    if prod(map(len, choices)) > MAX_TARS or "{" in "".join(pieces[::2]):
        raise InputError(f"{source}: write at most {MAX_TARS} tars, with braces that do not lie in one another")
    return ["".join(chosen) for chosen in product(*choices)]


def _choices(inside: str, source: str) -> list[str]:
    """Return the choices of one pair of braces: the numbers of a range, padded like its ends, or a list of texts."""
    span = _RANGE.fullmatch(inside)
    if span is None:
        return inside.split(",")
    first, last = int(span[1]), int(span[2])
    if not first <= last < first + MAX_TARS:
        raise InputError(f"{source}: {{{inside}}} is to count up, over at most {MAX_TARS} tars")
    padded = any(text.startswith("0") and len(text) > 1 for text in span.groups())
    width = max(map(len, span.groups())) if padded else 0
    return [f"{number:0{width}d}" for number in range(first, last + 1)]


def _require_readable(origin: Store, beside: list[str]) -> None:
    """Raise InputError for a file among the tars of a folder that would be skipped silently: special or compressed."""
    if origin.is_local:
        for path in sorted(Path(origin.uri).glob("[!.]*.tar")):
            if path.name not in beside:
                raise InputError(f"{path} is no plain file, so it cannot be read as a tar: take it away")
    for name in beside:
        if _COMPRESSED.fullmatch(name):
            raise InputError(f"{origin.uri}/{name} is compressed, so no sample can be read by its place: unpack it")
