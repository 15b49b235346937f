"""What every protocol has: an interface, the check of its counts, and the card by which its split is known again."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

from pipelines.artifacts.facts import ProtocolCard
from pipelines.artifacts.splits import keys_digest, part_proof, split_digest
from pipelines.errors import InputError
from pipelines.ingest.sources import Entry, Source

ROLES = ("query", "train", "val", "database")
"""What a part can be called; `database` are the images that are nothing else."""
REST = -1
"""In place of a count: all images that are in no other part, however many there are."""


@dataclass(frozen=True, kw_only=True)
class Protocol(ABC):
    """A named split of a data set.

    `parts` has the number of images in each part. An image is in one part and stored once, so `database` names the
    parts that are searched: with `train` among them the training images are searched as well. Where it is empty, the
    opened source says which. `keys` has the sha256 of the sorted keys of parts that the field has published. `version`
    is raised when other images are dealt under the same name.
    """

    name: str
    version: int = 1
    parts: Mapping[str, int]
    database: tuple[str, ...] = ()
    keys: Mapping[str, str] = field(default_factory=dict)

    @abstractmethod
    def open(self, root: Path) -> AbstractContextManager[Source]:
        """Check the data set's own files in the folder `root` and list its images; InputError where they do not fit."""

    @abstractmethod
    def deal(self, entries: Sequence[Entry], keys: Sequence[str]) -> list[str]:
        """The part of each entry. It depends on nothing else: neither on a setting nor on a version of a library."""

    def assign(self, entries: Sequence[Entry], keys: Sequence[str], where: str) -> list[str]:
        """The part of each entry; InputError unless each part gets the number of images that the protocol says.

        Nor may a part that was published get other images than that.
        """
        dealt = self.deal(entries, keys)
        found = Counter(dealt)
        for part in sorted({*found, *self.parts}):
            expected = self.parts.get(part, 0)
            if found[part] != expected and not (expected == REST and found[part]):
                raise InputError(
                    f"{where}: {found[part]} images for {part}, {self.name} has "
                    f"{'some' if expected == REST else expected}: it is not the data set of this protocol"
                )
        for part, published in self.keys.items():
            own = keys_digest(key for key, other in zip(keys, dealt, strict=True) if other == part)
            if own != published:
                raise InputError(
                    f"{where}: the images for {part} are as many as those of {self.name}, but others: the sha256 of "
                    f"their keys is {own[:12]}, {published[:12]} expected: take the protocol's own lists"
                )
        return dealt

    def card(self, parts: Mapping[str, Sequence[tuple[str, bytes]]], source: Source) -> ProtocolCard:
        """What the manifests say of a split, from the (key, sha256 of the image) of each part's samples.

        `digest` is that of the whole split: of each part's keys and images, of which parts are searched, and of the
        files that say labels or parts. `leaks` counts the images that are in two parts by their bytes; twice in the
        database is no leak.
        """
        proofs = {part: part_proof(samples) for part, samples in parts.items()}
        database = source.searched or self.database
        return ProtocolCard(
            name=self.name,
            version=self.version,
            digest=split_digest(proofs, database, source.files),
            database=tuple(database),
            leaks=_leaks(parts, database),
            parts=proofs,
            files=dict(source.files),
        )

    def warnings(self, card: ProtocolCard) -> list[str]:
        """What of this split makes a figure look better than it is: one line each."""
        found = []
        if "train" in card.database:
            found.append(
                f"{self.name}: the {self.parts['train']} training images are in the database, by design of the "
                f"protocol: mAP also counts images that were learned"
            )
        if "query" in card.database:
            found.append(
                f"{self.name}: the {self.parts['query']} queries are in the database, by the list of the protocol: "
                f"each finds itself first"
            )
        if card.leaks:
            named = ", ".join(f"{count} {pair}" for pair, count in card.leaks.items())
            found.append(f"{self.name}: the data set has images twice, and so two parts have them: {named}")
        return found


def _leaks(parts: Mapping[str, Sequence[tuple[str, bytes]]], database: Sequence[str]) -> dict[str, int]:
    held = {part: {digest for _, digest in parts[part]} for part in ROLES if part in parts}
    leaks = {
        f"{part} in {other}": sum(digest in held[other] for _, digest in parts[part])
        for part, other in combinations(held, 2)
        if not {part, other} <= set(database)
    }
    return {pair: count for pair, count in leaks.items() if count}
