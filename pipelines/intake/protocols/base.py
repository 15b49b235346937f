"""What every protocol has: an interface, the check of its counts, and the card by which its split is known again."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from pipelines.errors import InputError
from pipelines.intake.sources import Entry, Source
from pipelines.shards import part_proof, split_digest

ROLES = ("query", "train", "val", "database")
"""What a part can be called; `database` are the images that are nothing else."""


@dataclass(frozen=True, kw_only=True)
class Protocol(ABC):
    """A named split of a data set.

    `parts` has the number of images in each part. An image is in one part and stored once, so `database` names the
    parts that are searched: with `train` among them the training images are searched as well. `version` is raised when
    other images are dealt under the same name.
    """

    name: str
    version: int = 1
    parts: Mapping[str, int]
    database: tuple[str, ...]

    @abstractmethod
    def open(self, root: Path) -> AbstractContextManager[Source]:
        """Check the data set's own files in the folder `root` and list its images; InputError where they do not fit."""

    @abstractmethod
    def deal(self, entries: Sequence[Entry], keys: Sequence[str]) -> list[str]:
        """The part of each entry. It depends on nothing else: neither on a setting nor on a version of a library."""

    def assign(self, entries: Sequence[Entry], keys: Sequence[str], where: str) -> list[str]:
        """The part of each entry; InputError unless each part gets the number of images that the protocol says."""
        dealt = self.deal(entries, keys)
        found = Counter(dealt)
        for part in sorted({*found, *self.parts}):
            if found[part] != self.parts.get(part, 0):
                raise InputError(
                    f"{where}: {found[part]} images for {part}, {self.name} has {self.parts.get(part, 0)}: it is not "
                    f"the data set of this protocol"
                )
        return dealt

    def card(self, parts: Mapping[str, Sequence[tuple[str, bytes]]]) -> dict[str, Any]:
        """What the manifests say of a split, from the (key, sha256 of the image) of each part's samples.

        `digest` is that of the whole split: of each part's keys and images, and of which parts are searched. `leaks`
        counts the images that are in two parts by their bytes; twice in the database is no leak.
        """
        proofs = {part: part_proof(samples) for part, samples in parts.items()}
        return {
            "name": self.name,
            "version": self.version,
            "digest": split_digest(proofs, self.database),
            "database": list(self.database),
            "leaks": self._leaks(parts),
            "parts": proofs,
        }

    def _leaks(self, parts: Mapping[str, Sequence[tuple[str, bytes]]]) -> dict[str, int]:
        held = {part: {digest for _, digest in parts[part]} for part in ROLES if part in parts}
        leaks = {
            f"{part} in {other}": sum(digest in held[other] for _, digest in parts[part])
            for part, other in combinations(held, 2)
            if not {part, other} <= set(self.database)
        }
        return {pair: count for pair, count in leaks.items() if count}

    def warnings(self, card: Mapping[str, Any]) -> list[str]:
        """What of this split makes a figure look better than it is: one line each."""
        found = []
        if "train" in self.database:
            found.append(
                f"{self.name}: the {self.parts['train']} training images are in the database, by design of the "
                f"protocol: mAP also counts images that were learned"
            )
        if card["leaks"]:
            named = ", ".join(f"{count} {pair}" for pair, count in card["leaks"].items())
            found.append(f"{self.name}: the data set has images twice, and so two parts have them: {named}")
        return found
