"""Assigns samples to the parts of a split: by seeded shares of each class, top folder, column, or protocol."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from pipelines.artifacts.facts import SplitSpec
from pipelines.errors import InputError
from pipelines.ingest.protocols.base import Protocol
from pipelines.ingest.sources import SourceImage

SPLIT_USAGE = "write train=.8,query=.1,database=.1, or folder, or column:NAME"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


@dataclass(frozen=True)
class SplitPlan:
    """A rule to split a source. `by` is "" (no split, one artifact), `shares`, `folder`, `column` or `protocol`."""

    by: str = ""
    shares: tuple[tuple[str, Fraction], ...] = ()
    column: str | None = None
    protocol: Protocol | None = None

    def assign(self, entries: Sequence[SourceImage], keys: Sequence[str], seed: int, where: str) -> list[str]:
        """Return the part of each entry, or "" for each if nothing is split. `entries` are in order of their keys."""
        if self.by == "shares":
            return split_by_shares([entry.labels for entry in entries], self.shares, seed)
        if self.by == "folder":
            groups = [entry.group or _top_folder(entry.path, where) for entry in entries]
        elif self.by == "column":
            groups = [entry.group or "" for entry in entries]
        elif self.protocol is not None:
            groups = self.protocol.assign(entries, keys, where)
        else:
            return [""] * len(entries)
        for name in set(groups):
            if not _NAME.fullmatch(name):
                raise InputError(f"{where}: {name!r} cannot name a part of a split: use letters, digits, _ and -")
        return groups

    def names(self, groups: Sequence[str]) -> list[str]:
        """Return the parts in the order of writing."""
        return [name for name, _ in self.shares] if self.by == "shares" else sorted(set(groups))

    def card(self, name: str) -> SplitSpec | None:
        """Return the description of the split for a part's manifest, or None without a split."""
        if not self.by:
            return None
        spec = ",".join(f"{part}={share}" for part, share in self.shares) or self.column or ""
        if self.protocol is not None:
            spec = f"{self.protocol.name}@{self.protocol.version}"
        return SplitSpec(by=self.by, spec=spec, part=name)


def parse_split(text: str | None) -> SplitPlan:
    """Parse the value of --split. Raises InputError for a malformed one."""
    if text is None:
        return SplitPlan()
    if text == "folder":
        return SplitPlan("folder")
    if text.startswith("column:") and text != "column:":
        return SplitPlan("column", column=text.removeprefix("column:"))
    return SplitPlan("shares", _parse_shares(text))


def _parse_shares(text: str) -> tuple[tuple[str, Fraction], ...]:
    shares: dict[str, Fraction] = {}
    for item in text.split(","):
        name, equals, number = (piece.strip() for piece in item.partition("="))
        if not equals or not _NAME.fullmatch(name) or not re.fullmatch(r"\d*\.?\d+", number):
            raise InputError(f"--split {text!r}: {SPLIT_USAGE}")
        if name in shares or not Fraction(number):
            raise InputError(f"--split {text!r}: {name} is named twice or has no share")
        shares[name] = Fraction(number)
    total = sum(shares.values(), Fraction(0))
    if abs(total - 1) > Fraction(1, 1_000_000):
        raise InputError(f"--split {text!r}: the shares sum to {float(total):g}, not 1")
    return tuple((name, share / total) for name, share in shares.items())


def _top_folder(path: str, where: str) -> str:
    folders = path.split("/")
    if len(folders) < 2:
        raise InputError(f"{where}/{path} lies in no folder, and --split folder needs one for each part")
    return folders[0]


def split_by_shares(labels: Sequence[tuple[str, ...]], shares: Sequence[tuple[str, Fraction]], seed: int) -> list[str]:
    """Assign samples to parts so that each class is divided by the shares, to within one sample.

    A sample with several labels counts for its rarest one. Samples left by rounding go to the largest remainders, and a
    part that came short in one class gets the difference in a later one.
    """
    sizes = Counter(label for own in labels for label in own)
    strata: dict[str | None, list[int]] = {}
    for place, own in enumerate(labels):
        rarest = min(own, key=lambda label: (sizes[label], label)) if own else None
        strata.setdefault(rarest, []).append(place)
    # Philox by name, so that another default generator of numpy would not change the split. The 1 keeps this stream
    # apart from that of the order in shards, which has a 0.
    random = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, 1])))
    parts = [""] * len(labels)
    owed = [Fraction(0)] * len(shares)
    for stratum in sorted(strata, key=lambda label: (label is None, label or "")):
        places = random.permutation(strata[stratum])
        counts = _round_counts(len(places), [share for _, share in shares], owed)
        ends = np.cumsum(counts)
        for (name, _), stop, count in zip(shares, ends, counts, strict=True):
            for place in places[stop - count : stop]:
                parts[place] = name
    for name, _ in shares:
        if name not in parts:
            raise InputError(
                f"--split: {name} would get none of the {len(labels)} samples: raise its share or add images"
            )
    return parts


def _round_counts(size: int, shares: Sequence[Fraction], owed: list[Fraction]) -> list[int]:
    """Divide `size` by the shares, with each count rounded down or up; `owed` carries the error to the next call."""
    exact = [size * share for share in shares]
    counts = [int(count) for count in exact]
    fractions = [count - int(count) for count in exact]
    candidates = sorted(
        (place for place, fraction in enumerate(fractions) if fraction),
        key=lambda place: (-(fractions[place] + owed[place]), place),
    )
    for place in candidates[: size - sum(counts)]:
        counts[place] += 1
    for place, count in enumerate(counts):
        owed[place] += exact[place] - count
    return counts
