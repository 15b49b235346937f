"""Spreads the reading of a verification: over threads of this process, or over Ray where there is much to read."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any, Protocol, Self, TypeVar

from pipelines.artifacts.words import last_part
from pipelines.cluster.progress import stage
from pipelines.cluster.ray_pool import Pool
from pipelines.config.settings import Config
from pipelines.errors import WorkFailed
from pipelines.storage import Store, map_in_order

CHECKS_AT_ONCE = 4
"""Number of items that are proven side by side in this process; but for tars, all of them are in memory."""
RAY_FROM_BYTES = 4 << 30
"""Bytes from which on Ray is used: a local one takes as long to start as this process to read two gigabytes."""
BATCH_BYTES = 256 << 20
"""Bytes that a Ray worker reads for one answer."""

T = TypeVar("T")
R = TypeVar("R")
T_contra = TypeVar("T_contra", contravariant=True)
R_co = TypeVar("R_co", covariant=True)


class Prover(Protocol[T_contra, R_co]):
    """The proof of single items of an artifact, each on its own."""

    @classmethod
    def open(cls, *args: Any) -> Self:
        """Make the prover in a Ray worker."""

    def prove(self, item: T_contra) -> R_co:
        """Prove one item; return what was found."""

    def run(self, items: Sequence[T_contra]) -> Sequence[R_co]:
        """Prove several items, in a Ray worker."""


@dataclass(frozen=True)
class Spread:
    """The means of one verification. Without a pool all is proven in this process."""

    store: Store
    config: Config
    pool: Pool | None

    def run(
        self, prover: Prover[T, R], args: tuple[Any, ...], items: Sequence[T], sizes: Sequence[int], unit: str
    ) -> Iterator[tuple[T, R]]:
        """Yield each item with what its proof found, in any order.

        `sizes` are the bytes to read for each; `prover.open(*args)` makes the same prover elsewhere. Raises WorkFailed
        where the Ray workers of some items died.
        """
        if not items:
            return
        with stage(f"verify: {last_part(self.store.uri)}", len(items), unit) as advance:
            if self.pool is None or sum(sizes) < RAY_FROM_BYTES:
                for item, found in zip(items, map_in_order(prover.prove, items, CHECKS_AT_ONCE), strict=True):
                    yield item, found
                    advance(1)
                return
            batches = _batches(items, sizes)
            with self.pool(self.store, self.config) as map_items:
                for outcome in map_items(
                    type(prover).open, args, batches, verb="verify", workers=None, label=_batch_label
                ):
                    if outcome.error is not None:
                        raise WorkFailed(f"{self.store.uri}: {outcome.error}: verify again, it goes on from here")
                    yield from zip(outcome.item, outcome.result, strict=True)
                    advance(len(outcome.item))


def _batches(items: Sequence[T], sizes: Sequence[int]) -> list[list[T]]:
    """Return the items in lists of about BATCH_BYTES, in order."""
    before = accumulate(sizes, initial=0)
    numbered = ((start // BATCH_BYTES, item) for start, item in zip(before, items, strict=False))
    return [[item for _, item in batch] for _, batch in groupby(numbered, key=lambda pair: pair[0])]


def _batch_label(batch: Sequence[object]) -> str:
    return f"{len(batch)} of verify"
