"""Examines the codes themselves: the use of their bits in the database, and the drift to the queries."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isnan, sqrt
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

import hhnet
from hhnet.health import CodeDrift, CodeHealth
from pipelines.evaluate.rounding import round_figure, round_figures

BITS_LISTED = 10
WEAK_ENTROPY_BITS = 0.5
"""Bits of entropy below which a bit is weak: the rarer value in less than 11% of the codes."""
MIN_COPY_PHI = 0.9
"""Smallest |phi| at which two bits count as near copies of each other."""
BITS_PER_COPY = 16
"""Bits for each pair of near copies up to which fewer bits would do as well."""
SIGNIFICANCE = 0.01


@dataclass(frozen=True)
class Examined:
    """The examined codes of both sides, and the drift from the database to the queries, with every array."""

    database: CodeHealth
    queries: CodeHealth
    drift: CodeDrift


@dataclass(frozen=True)
class Correlated:
    """Two bits and their phi coefficient."""

    bits: tuple[int, int]
    phi: float


@dataclass(frozen=True)
class SharedCode:
    """A code as hexadecimal bytes, and the number of items that have it."""

    code: str
    items: int


@dataclass(frozen=True)
class BucketClass:
    """Buckets that hold from `smallest` to `largest` items: the number of such buckets, and of items in them."""

    smallest: int
    largest: int
    buckets: int
    items: int


@dataclass(frozen=True)
class SideFigures:
    """Figures of the codes of one side. Lists by bit begin with bit 0, `distances` with distance 0."""

    items: int
    distinct: int
    balance: Sequence[float]
    """Share of ones, by bit."""
    entropy: Sequence[float]
    """Entropy of each bit by itself, in bits."""
    entropy_total: float
    """Sum of the entropies in bits; correlation between bits makes the true entropy lower."""
    constant: Sequence[int]
    weak: Sequence[int]
    """Bits that are not constant but have less than half a bit of entropy."""
    correlation_mean: float
    """Mean |phi| over all pairs of two bits; a pair with a constant bit counts 0."""
    copies: int
    """Number of pairs with |phi| of 0.9 or more."""
    most_correlated: Sequence[Correlated]
    largest_buckets: Sequence[SharedCode]
    bucket_sizes: Sequence[BucketClass]
    """Bucket classes by powers of two, without gaps, up to the largest bucket."""
    distances: Sequence[float]
    """Share of the pairs of two items at each Hamming distance; empty for a single item."""
    sampled: int
    """Number of items whose pairs are in `distances`."""


@dataclass(frozen=True)
class DriftFigures:
    """Differences of the queries from the database."""

    balance_change: Sequence[float]
    """By bit: share of ones among the queries, minus the share in the database."""
    chance: Sequence[float]
    """By bit: the largest change that chance explains, by a two-proportion z-test at 1% for all bits together."""
    beyond_chance: Sequence[int]
    divergence_total: float
    """Jensen-Shannon divergence in bits, summed over the bits."""
    divergence_max: float
    distance_variation: float | None
    """Total variation distance between the distances within the queries and within the database.

    None where a side has one item.
    """
    common: int
    """Number of distinct codes that occur on both sides."""
    jaccard: float


@dataclass(frozen=True)
class HealthFigures:
    """Figures of code health in `metrics.json`."""

    database: SideFigures
    queries: SideFigures
    drift: DriftFigures
    conclusions: Sequence[str]


def examine_codes(queries: npt.NDArray[np.uint8], database: npt.NDArray[np.uint8], bits: int) -> Examined:
    """Examine the codes of both sides, uint8 (Q, bytes) and (N, bytes)."""
    before, after = hhnet.code_health(database, bits), hhnet.code_health(queries, bits)
    return Examined(before, after, hhnet.code_drift(before, after))


def health_figures(examined: Examined) -> HealthFigures:
    """Return the figures for the report."""
    database, queries = _side(examined.database), _side(examined.queries)
    drift = _drift(examined)
    return HealthFigures(database, queries, drift, write_conclusions(database, queries, drift))


def _side(health: CodeHealth) -> SideFigures:
    constant, weak = health.entropy == 0, health.entropy < WEAK_ENTROPY_BITS
    first, second = np.triu_indices(health.bits, 1)
    phi = health.correlation[first, second]
    order = np.argsort(-np.abs(phi).round(12), kind="stable")[:BITS_LISTED]
    most = [Correlated((int(first[n]), int(second[n])), round_figure(phi[n])) for n in order if phi[n]]
    largest = zip(health.bucket_codes[:BITS_LISTED], health.bucket_sizes[:BITS_LISTED], strict=True)
    pairs = health.distances.sum()
    return SideFigures(
        items=health.count,
        distinct=len(health.bucket_sizes),
        balance=round_figures(health.balance),
        entropy=round_figures(health.entropy),
        entropy_total=round_figure(health.entropy.sum()),
        constant=np.flatnonzero(constant).tolist(),
        weak=np.flatnonzero(weak & ~constant).tolist(),
        correlation_mean=round_figure(np.abs(phi).mean()) if len(phi) else 0.0,
        copies=int((np.abs(phi) >= MIN_COPY_PHI).sum()),
        most_correlated=most,
        largest_buckets=[SharedCode(code.tobytes().hex(), int(size)) for code, size in largest],
        bucket_sizes=_bucket_classes(health.bucket_sizes),
        distances=round_figures(health.distances / pairs) if pairs else [],
        sampled=health.sampled,
    )


def _bucket_classes(sizes: npt.NDArray[np.int64]) -> list[BucketClass]:
    classes = []
    for power in range(int(sizes[0]).bit_length()):
        mine = sizes[(sizes >= 1 << power) & (sizes < 2 << power)]
        classes.append(BucketClass(1 << power, (2 << power) - 1, len(mine), int(mine.sum())))
    return classes


def _drift(examined: Examined) -> DriftFigures:
    before, after, drift = examined.database, examined.queries, examined.drift
    pooled = (before.balance * before.count + after.balance * after.count) / (before.count + after.count)
    # Bonferroni: each bit is tested at its share of the level, split between both sides.
    limit = NormalDist().inv_cdf(1 - SIGNIFICANCE / (2 * before.bits))
    chance = limit * np.sqrt(pooled * (1 - pooled)) * sqrt(1 / before.count + 1 / after.count)
    variation = drift.distance_variation
    return DriftFigures(
        balance_change=round_figures(drift.balance_change),
        chance=round_figures(chance),
        beyond_chance=np.flatnonzero(np.abs(drift.balance_change) > chance).tolist(),
        divergence_total=round_figure(drift.divergence.sum()),
        divergence_max=round_figure(drift.divergence.max()),
        distance_variation=None if isnan(variation) else round_figure(variation),
        common=drift.common,
        jaccard=round_figure(drift.jaccard),
    )


# ---------------------------------------------------------------------------------------------------- conclusions


def write_conclusions(database: SideFigures, queries: SideFigures, drift: DriftFigures) -> list[str]:
    """Write the conclusions for a reader, a sentence or two each on bits, copies, buckets and drift."""
    return [_on_bits(database), _on_copies(database), _on_buckets(database), _on_drift(database, queries, drift)]


def _on_bits(side: SideFigures) -> str:
    bits = len(side.balance)
    text = f"Taken one by one, the {bits} bits hold {side.entropy_total:.1f} bits of entropy. "
    if not side.constant and not side.weak:
        return f"{text}None is constant or nearly so."
    findings = []
    if side.constant:
        verb = "is constant and tells" if len(side.constant) == 1 else "are constant and tell"
        findings.append(f"{_name_bits(side.constant)} {verb} no two items apart")
    if side.weak:
        verb = "has" if len(side.weak) == 1 else "have"
        findings.append(f"{_name_bits(side.weak)} {verb} the same value in more than 89% of the items")
    return f"{text}{'; '.join(findings)}."


def _on_copies(side: SideFigures) -> str:
    if not side.most_correlated:
        return "No two bits are correlated."
    first = side.most_correlated[0]
    example = f"bits {first.bits[0]} and {first.bits[1]}, φ = {first.phi:.2f}".replace("-", "−")
    if not side.copies:
        return f"No two bits are near copies of each other; the most correlated are {example}."
    bits = len(side.balance)
    pairs = f"{side.copies:,} of the {bits * (bits - 1) // 2:,} pairs of bits {'is' if side.copies == 1 else 'are'}"
    found = f"{pairs} nearly equal or opposite (|φ| ≥ {MIN_COPY_PHI}), first of all {example}"
    return f"{found}: fewer bits would do as well." if side.copies * BITS_PER_COPY >= bits else f"{found}."


def _on_buckets(side: SideFigures) -> str:
    largest = side.largest_buckets[0].items
    if side.distinct == side.items:
        return f"All {side.items:,} codes of the database are distinct."
    return (
        f"{side.distinct:,} of {side.items:,} codes are distinct. The most frequent one belongs to {largest:,} items "
        f"({largest / side.items:.1%}), among which no ranking by distance can choose."
    )


def _on_drift(database: SideFigures, queries: SideFigures, drift: DriftFigures) -> str:
    bits = len(database.balance)
    if drift.beyond_chance:
        most = max(drift.beyond_chance, key=lambda bit: abs(drift.balance_change[bit]))
        text = (
            f"In {len(drift.beyond_chance)} of {bits} bits the queries differ from the database by more than chance "
            f"explains, most in bit {most}: {queries.balance[most]:.1%} ones against {database.balance[most]:.1%}."
        )
    else:
        text = f"In none of the {bits} bits do the queries differ from the database by more than chance explains."
    return f"{text} The database holds {drift.common:,} of their {queries.distinct:,} distinct codes."


def _name_bits(bits: Sequence[int]) -> str:
    """Name bits: `1 bit (3)`, `3 bits (1, 2, 3)`; a long list is cut."""
    listed = ", ".join(str(bit) for bit in bits[:BITS_LISTED]) + (", ..." if len(bits) > BITS_LISTED else "")
    return f"{len(bits)} {'bit' if len(bits) == 1 else 'bits'} ({listed})"
