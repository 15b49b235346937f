"""The table of protocols, and what the manifests of one say about it."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.errors import InputError
from pipelines.storage import canonical_json


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """A named split of CIFAR-10. Counts are of images in all; each class gets the same share of them.

    `batch` is the number of images in each of the data set's six files. With `official` the queries are the test file
    and the training images the others; else both are drawn from all images, for each class, with a seed of its own.
    `database` counts the training images where `train_in_database`. `at` is the usual K of mAP@K, None the whole
    ranking.
    """

    name: str
    version: int = 1
    batch: int = 10_000
    train: int
    query: int
    val: int = 0
    database: int
    official: bool = False
    train_in_database: bool
    at: int | None = None
    source: str

    @property
    def images(self) -> int:
        """All images of the data set."""
        return 6 * self.batch

    @property
    def parts(self) -> dict[str, int]:
        """Images by part. Each image is in one part; `database` is what is left, none where nothing is."""
        rest = self.images - self.train - self.query - self.val
        counts = {"train": self.train, "query": self.query, "val": self.val, "database": rest}
        return {part: count for part, count in counts.items() if count}

    @property
    def searched(self) -> list[str]:
        """The parts that make the protocol's database."""
        among = {"train": self.train_in_database, "database": True}
        return [part for part in self.parts if among.get(part, False)]

    def row(self) -> dict[str, Any]:
        """The protocol as a row of the list."""
        return {
            "protocol": self.name,
            "images": self.images,
            "train": self.train,
            "query": self.query,
            "val": self.val,
            "database": self.database,
            "includes train": "yes" if self.train_in_database else "no",
            "mAP@": self.at or "all",
            "draw": "official" if self.official else "seeded, per class",
        }


PROTOCOLS = (
    Protocol(
        name="cifar10",
        train=5_000,
        query=1_000,
        database=54_000,
        train_in_database=False,
        source="swuxyj/DeepHash-pytorch README, tools.py; thulab/DeepHash data/cifar10",
    ),
    Protocol(
        name="cifar10-1",
        train=5_000,
        query=1_000,
        database=59_000,
        train_in_database=True,
        source="swuxyj/DeepHash-pytorch README, tools.py; ssppp/GreedyHash cifar1.py; OrthoHash",
    ),
    Protocol(
        name="cifar10-2",
        train=50_000,
        query=10_000,
        database=50_000,
        official=True,
        train_in_database=True,
        source="ssppp/GreedyHash, setting II",
    ),
    Protocol(
        name="cifar10-h2q",
        train=5_000,
        query=1_000,
        val=1_000,
        database=53_000,
        train_in_database=False,
        at=5_000,
        source="BioDeepHashing and h2q, src/data/process",
    ),
)


def find_protocol(name: str) -> Protocol:
    """The protocol of this name; InputError where there is none."""
    for protocol in PROTOCOLS:
        if protocol.name == name:
            return protocol
    known = ", ".join(protocol.name for protocol in PROTOCOLS)
    raise InputError(f"--protocol {name}: there is none of this name; there are {known}")


def list_protocols() -> dict[str, Any]:
    """All protocols as the result of a verb."""
    return {"verb": "ingest", "status": "listed", "protocols": [protocol.row() for protocol in PROTOCOLS]}


def protocol_card(
    protocol: Protocol, keys: Sequence[str], digests: Sequence[bytes], parts: Sequence[str]
) -> dict[str, Any]:
    """What the manifests say: name, version, parts that are the database, digest of the split, and leaks.

    `digest` is the sha256 over the sorted keys of each part. `leaks` counts the queries whose bytes are also those of
    an image of another part.
    """
    by_part: dict[str, list[str]] = {part: [] for part in protocol.parts}
    for key, part in zip(keys, parts, strict=True):
        by_part[part].append(key)
    counts = {part: len(found) for part, found in by_part.items()}
    if counts != protocol.parts or sum(counts[part] for part in protocol.searched) != protocol.database:
        raise InputError(
            f"the protocol {protocol.name} gives {counts}, but says {protocol.parts} and a database of "
            f"{protocol.database}"
        )
    return {
        "name": protocol.name,
        "version": protocol.version,
        "database": protocol.searched,
        "digest": _split_digest(by_part),
        "at": protocol.at,
        "leaks": _leaks(digests, parts),
    }


def _split_digest(by_part: Mapping[str, Sequence[str]]) -> str:
    return hashlib.sha256(canonical_json({part: sorted(keys) for part, keys in by_part.items()})).hexdigest()


def _leaks(digests: Sequence[bytes], parts: Sequence[str]) -> dict[str, int]:
    """Queries that are also in another part, by content, for each part that has some."""
    held: dict[str, set[bytes]] = {}
    for digest, part in zip(digests, parts, strict=True):
        held.setdefault(part, set()).add(digest)
    queries = [digest for digest, part in zip(digests, parts, strict=True) if part == "query"]
    counts = {part: sum(digest in held[part] for digest in queries) for part in sorted(held) if part != "query"}
    return {part: count for part, count in counts.items() if count}
