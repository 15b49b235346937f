"""Plans the samples of a source from its listing alone: keys, class ids, parts of the split, tars in a seeded order."""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from pipelines.errors import InputError
from pipelines.ingest.classes import sort_class_names
from pipelines.ingest.skips import SkipReason
from pipelines.ingest.sources import Listing, Source, make_printable
from pipelines.ingest.split import SplitPlan
from pipelines.storage import canonical_json

MAX_SHARDS = 1_000_000
"""Largest number of shards of one artifact; their names have six digits."""

_ARCHIVES = frozenset({".zip", ".gz", ".tgz", ".xz", ".txz", ".bz2", ".tbz2", ".zst", ".7z", ".rar"})

# `.` ends a key and `%` begins an escape. A tar, a Parquet string or the stock webdataset reader cannot hold the rest.
_ENCODED = re.compile(r"[.%\x00-\x1f\x7f\ud800-\udfff]")
_EMPTY_NAME = re.compile(r"(?<=/)/|/$")
_HIDDEN = re.compile(r"__[^/]*__(/|$)")


@dataclass(frozen=True, slots=True)
class PlannedSample:
    """A sample to be written: its key, the path of its image in the source, label ids, metadata, stamp of the image."""

    key: str
    path: str
    labels: tuple[int, ...]
    metadata: Mapping[str, Any] | None
    stamp: str = ""

    @property
    def suffix(self) -> str:
        """Suffix of the image's path, without the dot."""
        return self.path.rpartition(".")[2]


@dataclass(frozen=True)
class SamplePlan:
    """The samples of a source in the order of their keys, the part of each, and the class names."""

    samples: Sequence[PlannedSample]
    groups: Sequence[str]
    classes: Sequence[str]

    def part(self, name: str) -> list[PlannedSample]:
        """Return the samples of a part."""
        return [sample for sample, group in zip(self.samples, self.groups, strict=True) if group == name]

    def digest(self, source: Source) -> str:
        """Return the digest of the listing, whatever holds it: a folder and its zip have the same digest."""
        digest = hashlib.sha256(canonical_json(list(self.classes)))
        for said in filter(None, (source.files, source.columns)):
            digest.update(canonical_json(said))
        for sample, group in zip(self.samples, self.groups, strict=True):
            facts = [sample.key, make_printable(sample.path), sample.labels, sample.metadata, group]
            digest.update(json.dumps(facts, sort_keys=True, allow_nan=False).encode() + b"\n")
        return digest.hexdigest()


def plan_samples(source: Source, split: SplitPlan, seed: int) -> SamplePlan:
    """Plan the samples of a listed source. Raises InputError for no images, or for a path that comes twice."""
    listing = source.listing
    keys = _in_key_order(listing)
    groups = split.assign(listing.entries, keys, seed, listing.where)
    classes = sort_class_names(label for entry in listing.entries for label in entry.labels)
    ids = {name: number for number, name in enumerate(classes)}
    tuples: dict[tuple[str, ...], tuple[int, ...]] = {}
    samples = []
    for key, entry in zip(keys, listing.entries, strict=True):
        labels = tuples.setdefault(entry.labels, tuple(ids[name] for name in entry.labels))
        samples.append(PlannedSample(key, entry.path, labels, entry.metadata, entry.stamp))
    return SamplePlan(samples, groups, classes)


def deal_tars(
    samples: Sequence[PlannedSample], name: str, size: int, seed: int
) -> Iterator[tuple[str, tuple[PlannedSample, ...]]]:
    """Yield the name and the samples of each tar: the samples in a seeded order, `size` to a tar."""
    count = -(-len(samples) // size)
    if count > MAX_SHARDS:
        raise InputError(f"{count} shards are too many: raise ingest.samples_per_shard")
    # Philox by name, so that another default generator of numpy would not change the order. The 0 keeps this stream
    # apart from that of `split_by_shares`, which has a 1.
    random = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, 0])))
    order = random.permutation(len(samples))
    for number in range(count):
        chosen = order[number * size : (number + 1) * size]
        yield f"{name}-{number:06d}.tar", tuple(samples[place] for place in chosen)


def digest_stamps(stamps: Iterable[str]) -> str:
    """Return the digest of stamps, or "" if one is missing: then only reading tells whether bytes are the same."""
    found = list(stamps)
    return hashlib.sha256("\n".join(found).encode()).hexdigest() if all(found) else ""


# --------------------------------------------------------------------------------------------------------------- keys


def sample_key(path: str, whole: bool = False) -> str:
    """Return the key of a file: its path or URL without the suffix, or the `whole`, percent-encoded as needed."""
    key = _ENCODED.sub(_percent, path if whole else os.path.splitext(path)[0])  # noqa: PTH122 - a Path per file is slow
    if "://" in key:  # a URL: without its scheme, and without names that a tar would have as empty ones
        scheme, _, rest = key.partition("://")
        key = (f"{scheme}:/" if whole else "") + _EMPTY_NAME.sub("%2F", rest)
    # The stock webdataset reader skips names that begin with a folder like __NAME__.
    return "%5F" + key[1:] if _HIDDEN.match(key) else key


def _percent(match: re.Match[str]) -> str:
    return "".join(f"%{byte:02X}" for byte in match.group().encode("utf-8", "surrogateescape"))


def _in_key_order(listing: Listing) -> list[str]:
    """Sort the listing by key and return the keys. Raises InputError for no images, or for a path that comes twice."""
    require_images(listing, len(listing.entries))
    keys = make_unique_keys([entry.path for entry in listing.entries], listing.where)
    order = sorted(range(len(keys)), key=keys.__getitem__)
    listing.entries[:] = [listing.entries[place] for place in order]
    return [keys[place] for place in order]


def require_images(listing: Listing, samples: int) -> None:
    """Raise InputError, with the reasons of the skips, if there are no samples."""
    if not samples:
        skipped = f" ({listing.skipped} skipped: {listing.why_skipped()})" if listing.skipped else ""
        raise InputError(f"{listing.where} holds no images{skipped}{_what_helps(listing)}")


def make_unique_keys(paths: Sequence[str], where: str) -> list[str]:
    """Return the key of each path; paths that would share a key keep their suffixes. InputError for equal paths."""
    keys = [sample_key(path) for path in paths]
    while twice := {one for one, other in pairwise(sorted(keys)) if one == other}:
        # Again until all differ: a kept suffix can equal the key of a third file, as a.png beside a.jpg and a.png.jpg.
        longer = [sample_key(path, whole=True) if key in twice else key for path, key in zip(paths, keys, strict=True)]
        if longer == keys:
            path = next(path for path, key in zip(paths, keys, strict=True) if key in twice)
            raise InputError(f"{where} lists {make_printable(path)} twice: list it once")
        keys = longer
    return keys


def _what_helps(listing: Listing) -> str:
    """Return advice for a source whose files are all skipped, or ""."""
    if SkipReason.MISSING in listing.reasons:
        return ": --root DIR says where the files of a table lie"
    if ".tar" in listing.suffixes:
        return ": --adopt takes tars of WebDataset; others are to be unpacked, or each given as SOURCE"
    if not listing.suffixes.keys().isdisjoint(_ARCHIVES):
        return ": unpack the archives, or give one as SOURCE"
    return ""
