"""Facts of each kind: what a manifest says in `meta`, and what the receipts of its parts say.

Facts without a default are always written. The others are left out where they have it.
"""

from pipelines.artifacts.manifest import Facts, Part


class Receipt(Facts):
    """The receipt of a shard's codes. Each row of the shard is in one of its parts or among its rejects."""

    shard: str
    shard_sha256: str
    samples: int
    part: Part
    more: tuple[Part, ...] = ()
    """Codes that a retry recovered."""
    rejects: Part | None
    animated: int = 0
    """Pictures of several frames."""

    @property
    def codes(self) -> tuple[Part, ...]:
        """Return the parts that hold codes, in the order of their paths."""
        return (self.part, *self.more)

    @property
    def parts(self) -> list[Part]:
        """Return all parts: those of the codes and, where there are any, the rejects."""
        return [*self.codes, *([self.rejects] if self.rejects else [])]


class QuantizerReceipt(Facts):
    """The receipt of what all parts of an index share."""

    part: Part

    @property
    def parts(self) -> tuple[Part, ...]:
        """Return all parts."""
        return (self.part,)


class PartReceipt(Facts):
    """The receipt of a shard's part of an index and of its key table."""

    ordinal: int
    shard: str
    shard_sha256: str
    rows: int
    quantizer_sha256: str | None
    """What the part was built with; None where its kind has no quantizer."""
    part: Part
    keys: Part
    compacted: int = 0
    """Removed rows that the part was built without."""
    left_out: str | None = None
    """The sha256 of those that the last compaction left out."""

    @property
    def parts(self) -> tuple[Part, ...]:
        """Return all parts."""
        return (self.part, self.keys)


class PairsReceipt(Facts):
    """The receipt of one unit of a search for duplicates."""

    unit: int
    pairs: int
    parts: tuple[Part, ...]
