"""The base of all protocols: their interface, the check of their counts, and the card that identifies a split."""

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
from pipelines.ingest.sources import Source, SourceImage

ROLES = ("query", "train", "val", "database")
"""Names that a part can have; `database` holds the images that are in no other part."""
REST = -1
"""In place of a count: all images that are in no other part, in any number."""


@dataclass(frozen=True, kw_only=True)
class Protocol(ABC):
    """A named split of a data set.

    `parts` has the number of images in each part. An image is in one part and stored once, so `database` lists the
    parts that are searched: if `train` is among them, training images are searched too. If it is empty, the opened
    source names these parts. `keys` has the sha256 of the sorted keys of each part that the field has published. Bump
    `version` when the same name gets other images.
    """

    name: str
    version: int = 1
    parts: Mapping[str, int]
    database: tuple[str, ...] = ()
    keys: Mapping[str, str] = field(default_factory=dict)

    @abstractmethod
    def open(self, root: Path) -> AbstractContextManager[Source]:
        """Check the data set's own files in the folder `root` and list its images. Raises InputError for wrong ones."""

    @abstractmethod
    def deal(self, entries: Sequence[SourceImage], keys: Sequence[str]) -> list[str]:
        """Return the part of each entry. It depends on no setting and on no version of a library."""

    def assign(self, entries: Sequence[SourceImage], keys: Sequence[str], where: str) -> list[str]:
        """Return the part of each entry, checked against the protocol.

        Raises InputError if a part has another number of images than the protocol, or if a published part has other
        images.
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
        """Return the facts on a split for the manifests, from the (key, sha256 of the image) of each part's samples.

        `digest` covers the whole split: the keys and images of each part, the names of the searched parts, and the
        files with labels or parts. `leaks` counts images whose bytes are in two parts, unless both are searched.
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
        """Return one line for each property of the split that makes figures look better than they are."""
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
