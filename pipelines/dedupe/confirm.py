"""Confirms by the pictures which samples of a component are duplicates: by the bytes of their files, or by their looks.

Codes that were learned from classes are meant to be equal within a class, so equal codes alone prove nothing. The
shard index has the sha256 of every image file. The pictures of the samples in a component, and no others, are read from
the shards that the codes came from. A sample is a duplicate of one that stays, never of one that goes as well, so a
chain of similar pictures does not drift apart.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipelines.artifacts.host import allowed_cpus
from pipelines.artifacts.manifest import Artifact
from pipelines.artifacts.versions import open_input_version, open_inputs_of_kind
from pipelines.cluster.progress import stage
from pipelines.dedupe.looks import FILE_KNOWN, LOOK, SEEN, Looks, look_of, mark_alike, mark_candidates
from pipelines.dedupe.tables import Match, PlacedShard
from pipelines.encode.codes import CodesSet
from pipelines.errors import DamagedArtifact, FingerprintMismatch, HHNetError
from pipelines.index.layout import ROW_MASK
from pipelines.shards.images import decode_ahead
from pipelines.shards.shards import Sample, Shard, ShardSet, open_shards

Ids = npt.NDArray[np.int64]

LOOKS_AT_ONCE = 4096
"""Looks of the samples to be matched that are in memory; each takes about 800 bytes."""


# ------------------------------------------------------------------------------------------------- finding the shards


def find_shards(
    sets: Sequence[CodesSet], index: Artifact | None, given: Sequence[str]
) -> tuple[list[Artifact], list[str]]:
    """Find the shards that the codes, and those of the index, came from, in the version that was used.

    They are looked for at the `given` places, then at the remembered ones. Returns them, and why others cannot be
    opened. Raises FingerprintMismatch where a given place has none of them.
    """
    unused, found, problems = dict.fromkeys(given), dict[str, Artifact](), list[str]()
    indexed = open_inputs_of_kind(index, "codes", problems) if index else ()
    for codes in chain((entry.artifact for entry in sets), indexed):
        for place in (*given, None):
            try:
                shards = open_input_version(codes, "shards", place)
            except HHNetError as error:
                if place is None:
                    problems.append(str(error))
                elif not isinstance(error, FingerprintMismatch):
                    raise
            else:
                found.setdefault(shards.digest, shards)
                unused.pop(place or "", None)
                break
    if unused:
        raise FingerprintMismatch(f"{next(iter(unused))}: none of the codes came from these shards: name theirs")
    return [found[digest] for digest in sorted(found)], problems


# ------------------------------------------------------------------------------------------------------ reading looks


@dataclass(frozen=True)
class SeenSamples:
    """Samples by id, ascending, and their looks, in mapped files."""

    ids: Ids
    looks: Looks
    """Empty if no shards can be read."""

    def of(self, ids: Ids) -> Looks:
        """Return the looks of samples, given their ids."""
        return self.looks[np.searchsorted(self.ids, ids)]


def read_looks(
    places: Sequence[PlacedShard], shards: Iterable[Artifact], folder: Path, threads: int | None, ids: Ids
) -> SeenSamples:
    """Read the pictures of the samples `ids`, tar by tar, and keep their looks in a file of `folder`."""
    opened = [open_shards(artifact) for artifact in shards] if len(ids) else []
    tars = {shard.part.sha256: (entry, shard) for entry in opened for shard in entry.shards}
    if not tars:
        return SeenSamples(ids, np.empty(0, LOOK))
    looks, threads = np.memmap(folder / "looks", LOOK, "w+", shape=(len(ids),)), threads or allowed_cpus()
    with stage("dedupe: reading pictures", len(ids), unit="pictures") as advance:
        for place, look in decode_ahead(_samples(places, tars, ids), _seen, threads, 2 * threads):
            looks[place] = look
            advance(1)
    return SeenSamples(ids, looks)


def _seen(sample: tuple[int, Sample]) -> tuple[int, Looks]:
    place, found = sample
    if found.damage:  # its twin must not go because of it
        return place, np.zeros(1, LOOK)
    return place, look_of(found.record.members[0].sha256, found.image)


def _samples(
    places: Sequence[PlacedShard], tars: Mapping[str, tuple[ShardSet, Shard]], ids: Ids
) -> Iterator[tuple[int, Sample]]:
    """Yield the samples `ids` whose tar is known, each with its place among them."""
    for tar in places:
        first, last = np.searchsorted(ids, [tar.ordinal << 32, (tar.ordinal + 1) << 32]).tolist()
        if first == last or tar.shard_sha256 not in tars:
            continue
        entry, shard = tars[tar.shard_sha256]
        rows = (ids[first:last] & ROW_MASK).tolist()
        if rows[-1] >= shard.rows:
            raise DamagedArtifact(f"{entry.artifact.uri}: {shard.name} has no row {rows[-1]}, but codes of it")
        yield from zip(range(first, last), entry.read(shard, rows), strict=True)


# ---------------------------------------------------------------------------------------------------------- matching


class ComponentMatcher:
    """Finds the twins of the samples of one component after another, in the order of (component, id)."""

    def __init__(self, seen: SeenSamples) -> None:
        self._seen = seen
        self._component = -1
        self._files: dict[bytes, int] = {}
        self._stay = _Staying()

    def match(self, components: Ids, ids: Ids, alone: npt.NDArray[np.bool_]) -> tuple[npt.NDArray[np.uint8], Ids]:
        """Return the match and the twin of each of the next samples; those that are `alone` get none."""
        matches = np.where(alone, Match.NONE, Match.UNREAD).astype(np.uint8)
        twins = np.where(alone, ids, components)
        if not len(self._seen.looks):
            return matches, twins
        for start in range(0, len(ids), LOOKS_AT_ONCE):
            some = slice(start, start + LOOKS_AT_ONCE)
            samples = zip(components[some].tolist(), ids[some].tolist(), self._seen.of(ids[some]), strict=True)
            for place, (component, number, look) in enumerate(samples, start):
                if component != self._component:
                    self._component, self._files, self._stay = component, {}, _Staying()
                match, twin = (Match.NONE, None) if alone[place] else self._find(look)
                if twin is None:
                    self._keep(number, look)
                else:
                    twins[place] = twin
                matches[place] = match
        return matches, twins

    def _find(self, look: np.void) -> tuple[Match, int | None]:
        if look["known"] >= FILE_KNOWN and (same := self._files.get(look["sha256"].tobytes())) is not None:
            return Match.BYTES, same
        if look["known"] < SEEN:
            return Match.UNREAD, None
        ids = self._stay.candidates(look)
        alike = ids[mark_alike(self._seen.of(ids), look)] if len(ids) else ids
        return (Match.PICTURE, int(alike[0])) if len(alike) else (Match.CODE, None)

    def _keep(self, number: int, look: np.void) -> None:
        if look["known"] >= FILE_KNOWN:
            self._files.setdefault(look["sha256"].tobytes(), number)
        if look["known"] == SEEN:
            self._stay.add(number, look)


class _Staying:
    """The samples of a component that stay, with the facts by which candidates are found, in an array that doubles."""

    def __init__(self) -> None:
        self._count = 0
        self._facts = np.empty(16, [("id", np.int64), ("hash", np.uint64), ("mean", "f4"), ("contrast", "f4")])

    def add(self, number: int, look: np.void) -> None:
        if self._count == len(self._facts):
            self._facts = np.concatenate([self._facts, self._facts])
        self._facts[self._count] = (number, look["hash"], look["mean"], look["contrast"])
        self._count += 1

    def candidates(self, look: np.void) -> Ids:
        """Return the ids of those that may look like this, ascending."""
        facts = self._facts[: self._count]
        ids: Ids = facts["id"][mark_candidates(facts, look)]
        return ids
