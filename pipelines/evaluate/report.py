"""The evaluation report as one self-contained HTML page."""

from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.config.settings import EvaluateSettings
from pipelines.evaluate.figures import Figures
from pipelines.evaluate.health import HealthFigures
from pipelines.report.page import Row, cards, document, facts, folded, gallery, note, plots, points, section, table

_TIES = {
    "expected": "ties at equal distance count by their expectation over every order",
    "stable": "ties at equal distance stand in database order",
}
_DENOMINATORS = {
    "retrieved": "AP is divided by the relevant items among those ranked",
    "min": "AP is divided by the smaller of K and the number of relevant items",
    "all": "AP is divided by the number of all relevant items",
}
_EMPTY = {
    "zero": "a query that finds nothing relevant counts 0",
    "skip": "a query that finds nothing relevant is left out",
}


_UNLABELLED = {"zero": "", "skip": "; a query without labels is left out"}

_MADE_FROM = (
    "The digests of the artifacts that were compared. When the queries were searched is in runs/, beside this page."
)


def convention_name(settings: EvaluateSettings) -> str:
    """The convention in short: `mAP@all, ties=expected, denominator=retrieved, empty=zero`."""
    at = "all" if settings.at is None else settings.at
    name = f"mAP@{at}, ties={settings.ties}, denominator={settings.denominator}, empty={settings.empty}"
    return name if settings.unlabelled == "zero" else f"{name}, unlabelled={settings.unlabelled}"


def convention_text(convention: Mapping[str, Any]) -> str:
    """The convention in words."""
    at = convention["at"]
    scope = "the whole ranking" if at is None else f"the first {at:,} of the ranking"
    return (
        f"mAP over {scope}; {_TIES[convention['ties']]}; {_DENOMINATORS[convention['denominator']]}; "
        f"{_EMPTY[convention['empty']]}{_UNLABELLED[convention['unlabelled']]}. "
        "An item is relevant if it shares a class with the query."
    )


def report_page(
    figures: Figures,
    drawn: Mapping[str, bytes],
    rows: Sequence[Row],
    worst: Sequence[Row],
    problems: Sequence[str],
    sources: Mapping[str, str],
) -> str:
    """The page: headline, conventions, curves, code health, classes, galleries of `rows` and of the `worst` queries.

    `drawn` holds the PNGs of all plots by name.
    """
    lead = (
        f"{figures.queries:,} queries searched in {figures.database:,} database items by the Hamming distance of "
        f"{figures.bits}-bit codes."
    )
    body = [
        cards(_headline(figures)),
        f"<p><strong>How it is measured.</strong> {convention_text(figures.convention)}</p>",
        *(note(text) for text in figures.notes),
        _conventions(figures),
        _curves(figures, drawn),
        _health(figures.health, drawn),
        _classes(figures),
        _gallery(rows, problems),
        _worst(worst),
        section(
            "Made from",
            facts(sources),
            lead="The digests of the artifacts that were compared. When the queries were searched is in runs/.",
        ),
        "<footer>Made by hhnet. The same figures, to six digits, are in metrics.json beside this page.</footer>",
    ]
    at = "" if figures.convention["at"] is None else f"@{figures.convention['at']}"
    return document(f"mAP{at} {figures.map:.3f} with {figures.bits} bits", "HHNet · retrieval report", body, lead)


def _headline(figures: Figures) -> list[tuple[str, str, str]]:
    at = figures.convention["at"]
    entries = [
        (f"mAP@{'all' if at is None else at}", f"{figures.map:.4f}", _lift(figures)),
        ("Chance", f"{figures.chance:.4f}", "codes that say nothing"),
        *((f"Precision@{k}", f"{value:.4f}", "") for k, value in figures.precision_at.items()),
        ("Precision, H ≤ 2", f"{figures.within_radius_2:.4f}", "nothing within the radius counts 0"),
        ("Bits", f"{figures.bits:,}", f"{(figures.bits + 7) // 8} bytes a code"),
        ("Queries", f"{figures.queries:,}", f"{figures.skipped:,} left out" if figures.skipped else ""),
        ("Database", f"{figures.database:,}", ""),
        ("Distinct codes", f"{figures.distinct:,}", f"{figures.distinct / figures.database:.1%} of the database"),
    ]
    if figures.reranked is not None:
        first = f"the first {figures.reranked.first:,} by logits"
        entries.insert(1, ("mAP, re-ranked", f"{figures.reranked.map:.4f}", first))
    if at is not None:
        entries.insert(1, (f"mAP@{at}, min(m, K)", f"{figures.map_min:.4f}", "AP divided by min(relevant, K)"))
    return entries


def _lift(figures: Figures) -> str:
    return f"{figures.map / figures.chance:.1f} × chance" if figures.chance > 0 else ""


def _conventions(figures: Figures) -> str:
    low, high = figures.tie_bounds
    denominators = {"retrieved": "relevant among the first K", "min": "min(relevant, K)", "all": "all relevant"}
    empty = {"zero": "counts 0", "skip": "left out"}
    ties = {
        "undefined": "undefined, so by expectation",
        "stable": "database order",
        "scores": "by outputs, if codes have logits",
    }
    rows = [
        (
            ", ".join(entry.names),
            "–" if entry.map is None else f"{entry.map:.4f}",
            denominators[entry.denominator],
            empty[entry.empty] + (", unlabelled left out" if entry.unlabelled == "skip" else ""),
            ties[entry.ties],
            "–" if entry.map is None else f"{entry.queries:,}",
        )
        for entry in figures.by_convention
    ]
    head = ("as in", "mAP", "AP divided by", "query that finds nothing", "order inside ties", "queries")
    lead = (
        "The same ranking at the same K as code bases of the field measure it. Ties alone could move the headline "
        f"figure from {low:.4f}, relevant items last in each, to {high:.4f}, relevant items first."
    )
    return section("By every convention", table(head, rows), lead=lead)


def _curves(figures: Figures, drawn: Mapping[str, bytes]) -> str:
    at_n, spread = figures.precision_at_n, figures.distances_relevant
    entries = [
        (
            drawn["pr_curve"],
            "Precision over recall, one point per Hamming radius; the points are in the table below",
            f"Precision and recall within every Hamming radius from 0 to {figures.bits}, averaged over the "
            f"{figures.pr_curve.queries:,} queries that have something to find. "
            "A query with nothing inside a radius counts precision 0 there.",
        ),
        (
            drawn["pr_by_rank"],
            "Precision over recall, one point per rank; the points are in metrics.json",
            f"Precision and recall among the first 1 to {figures.database:,} of the ranking, averaged over the "
            f"{figures.pr_by_rank.queries:,} queries that have something to find.",
        ),
        (
            drawn["precision_at_n"],
            "Precision among the first N neighbours; the points are in the table below",
            f"Share of relevant items among the N nearest, over {at_n.queries:,} queries.",
        ),
        (
            drawn["distances"],
            "Histogram of Hamming distances of pairs that share a class and of pairs that do not",
            f"Distances of query and database items, over {spread.queries:,} queries: the less the two hills overlap, "
            "the better the codes.",
        ),
    ]
    radii = [
        (str(radius), f"{recall:.4f}", f"{precision:.4f}")
        for radius, (recall, precision) in enumerate(zip(figures.pr_curve.x, figures.pr_curve.y, strict=True))
    ]
    ranks = [(f"{n:,.0f}", f"{value:.4f}") for n, value in zip(at_n.x, at_n.y, strict=True)]
    return section(
        "Curves",
        plots(entries),
        folded(
            "The curves as tables", table(("N", "precision@N"), ranks), table(("radius", "recall", "precision"), radii)
        ),
    )


def _health(health: HealthFigures, drawn: Mapping[str, bytes]) -> str:
    database, queries, drift = health.database, health.queries, health.drift
    sample = "" if database.sampled == database.items else f", over {database.sampled:,} items of it"
    variation = "" if drift.distance_variation is None else f" Total variation: {drift.distance_variation:.3f}."
    entries = [
        (
            drawn["bit_balance"],
            "Share of ones and entropy of every bit; the values are in the table below",
            "How often each bit of the database is 1, and what it tells by itself: most, where it is 1 in half of the "
            "items.",
        ),
        (
            drawn["bit_correlation"],
            "Map of the correlations between all pairs of bits; the strongest are in the table below",
            "Correlation between the bits of the database: blue pairs agree, red ones oppose each other, pale ones are "
            f"independent. Mean |φ| {database.correlation_mean:.3f}.",
        ),
        (
            drawn["bucket_sizes"],
            "Shares of the items by how many have the same code; the largest buckets are in the table below",
            "How many items of the database share their code with how many: those of one code are at one distance from "
            "every query.",
        ),
        (
            drawn["code_distances"],
            "Histogram of the Hamming distances of pairs within the database and within the queries",
            f"Distances of pairs within the database{sample}, and within the queries. Balanced bits that are "
            f"independent would give the dashed line.{variation}",
        ),
        (
            drawn["bit_drift"],
            "Change of every bit's share of ones from the database to the queries; the values are in the table below",
            "By how much each bit is 1 more often among the queries than in the database. Chance explains what stays "
            f"in the grey band (99% for all bits together). Jensen-Shannon divergence: {drift.divergence_total:.4f} "
            "bits over all bits.",
        ),
    ]
    by_bit = [
        (str(bit), f"{ones:.4f}", f"{entropy:.4f}", f"{other:.4f}")
        for bit, (ones, entropy, other) in enumerate(
            zip(database.balance, database.entropy, queries.balance, strict=True)
        )
    ]
    pairs = [(f"{pair.bits[0]} and {pair.bits[1]}", f"{pair.phi:.4f}") for pair in database.most_correlated]
    buckets = [
        (entry.code, f"{entry.items:,}", f"{entry.items / database.items:.2%}") for entry in database.largest_buckets
    ]
    return section(
        "Code health",
        points(health.conclusions),
        plots(entries),
        folded(
            "Bits, correlations and buckets as tables",
            table(("largest buckets: code", "items", "share"), buckets),
            table(("most correlated bits", "φ"), pairs),
            table(("bit", "share of ones", "entropy", "share of ones, queries"), by_bit),
        ),
        lead="The codes by themselves, whatever their labels. Bits count from 0.",
    )


def _classes(figures: Figures) -> str:
    """Best first: where the codes fail is what a reader looks for at the end."""
    ordered = sorted(figures.classes, key=lambda entry: (-(entry.map if entry.map is not None else -1.0), entry.name))
    rows = [
        (entry.name, "–" if entry.map is None else f"{entry.map:.4f}", f"{entry.queries:,}", f"{entry.database:,}")
        for entry in ordered
    ]
    return section(
        "Classes",
        table(("class", "mAP", "queries", "database"), rows, bar=1),
        lead="Mean AP of the queries of each class, best first.",
    )


def _gallery(rows: Sequence[Row], problems: Sequence[str]) -> str:
    if not rows:
        return ""
    remarks = [note(f"Some pictures are missing: {problem}") for problem in problems]
    return section(
        "Queries and their nearest neighbours",
        *remarks,
        gallery(rows),
        lead="Queries spread over the classes; those marked hard are the worst of their class. ✓ and a solid green "
        "frame: shares a class with the query. ✗ and a dashed red frame: does not.",
    )


def _worst(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    lead = "The lowest AP of all queries that have something to find, worst first."
    return section("The worst queries", gallery(rows), lead=lead)
