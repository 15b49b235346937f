"""The plots of a report, as PNG bytes that depend on the figures alone."""

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import comb
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import rc_context
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

INK = "#7d8794"  # readable on a white and on a dark page; the background of plots is transparent
ACCENT = "#3f7ff0"
RIGHT = "#2ba564"
WRONG = "#e05252"
ORANGE = "#e08a2e"
DASHED = (0, (4, 3))
SERIES = (ACCENT, ORANGE, RIGHT, WRONG, INK)
MARKERS = "os^D"

_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10.5,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": INK,
    "grid.alpha": 0.18,
    "grid.linewidth": 0.8,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "legend.frameon": False,
    "lines.linewidth": 2.0,
}


class Plot:
    """The result of `_plot`: it holds the PNG once the block has ended."""

    png: bytes = b""


@contextmanager
def _plot(xlabel: str, ylabel: str) -> Iterator[tuple[Any, Plot]]:
    result = Plot()
    with rc_context(_STYLE):
        figure = Figure(figsize=(4.2, 3.1), layout="constrained")
        axes = figure.subplots()
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        yield axes, result
        sink = io.BytesIO()
        # Without `Software`, whose value would be matplotlib's version: equal figures give equal bytes.
        figure.savefig(sink, dpi=200, transparent=True, format="png", metadata={"Software": None})
        result.png = sink.getvalue()


def pr_curve(precision: Sequence[float], recall: Sequence[float], chance: float) -> bytes:
    """Plot precision over recall, one point per Hamming radius; the chance level is dashed."""
    with _plot("recall", "precision") as (axes, result):
        # Radii that find nothing have precision 0 by convention, which is not a point of the curve.
        points = [(r, p) for r, p in zip(recall, precision, strict=True) if r > 0]
        axes.plot(*zip(*points, strict=True) if points else ((), ()), color=ACCENT, marker="o", markersize=2.5)
        _chance(axes, chance)
        axes.set_xlim(0, 1.02)
        axes.set_ylim(0, 1.02)
    return result.png


def precision_at_n(counts: Sequence[float], precision: Sequence[float], chance: float) -> bytes:
    """Plot the precision among the first N, with N on a logarithmic axis."""
    with _plot("N nearest", "precision@N") as (axes, result):
        axes.plot(counts, precision, color=ACCENT, marker="o", markersize=3.5)
        if len(counts) > 1:
            axes.set_xscale("log")
            axes.set_xticks([n for n in counts if f"{n:.0f}".strip("0") == "1"])
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
            axes.minorticks_off()
        _chance(axes, chance)
        axes.set_ylim(0, 1.02)
    return result.png


def distance_histogram(relevant: Sequence[float], other: Sequence[float]) -> bytes:
    """Plot the shares of relevant and of other pairs at each Hamming distance."""
    with _plot("Hamming distance", "share of pairs") as (axes, result):
        places = range(len(relevant))
        for shares, colour, name in ((other, WRONG, "different class"), (relevant, RIGHT, "same class")):
            axes.fill_between(places, shares, step="mid", color=colour, alpha=0.28, linewidth=0)
            axes.step(places, shares, where="mid", color=colour, linewidth=1.6, label=name)
        axes.set_ylim(bottom=0)
        axes.set_xlim(0, max(1, len(relevant) - 1))
        _legend(axes)
    return result.png


def moved_distances(old: Sequence[float], new: Sequence[float]) -> bytes:
    """Plot the shares of the same pairs by normalised distance under two codes, in equal bins from 0 to 1."""
    with _plot("Hamming distance / bits", "share of pairs") as (axes, result):
        edges = [place / len(old) for place in range(len(old) + 1)]
        for shares, colour, name in ((old, ORANGE, "old codes"), (new, ACCENT, "new codes")):
            axes.stairs(shares, edges, color=colour, fill=True, alpha=0.28)
            axes.stairs(shares, edges, color=colour, linewidth=1.6, label=name)
        axes.set_ylim(bottom=0)
        axes.set_xlim(0, 1)
        _legend(axes)
    return result.png


def overlap_histogram(shares: Sequence[float]) -> bytes:
    """Plot the shares of the queries by overlap, in bins of equal width from 0 to 1."""
    with _plot("overlap", "share of queries") as (axes, result):
        edges = [place / len(shares) for place in range(len(shares) + 1)]
        axes.stairs(shares, edges, color=ACCENT, fill=True, alpha=0.7)
        axes.set_ylim(bottom=0)
        axes.set_xlim(0, 1)
    return result.png


def bit_balance(balance: Sequence[float], entropy: Sequence[float]) -> bytes:
    """Plot the share of ones of each bit as bars and its entropy as dots; the balanced share, half, is dashed."""
    with _plot("bit", "share, or bits") as (axes, result):
        _bars(axes, balance, ACCENT, "share of ones")
        size = 4.0 if len(entropy) <= 64 else 2.0
        style = {"color": RIGHT, "markersize": size, "clip_on": False, "label": "entropy in bits"}
        axes.plot(range(len(entropy)), entropy, "o", **style)
        axes.axhline(0.5, color=INK, linewidth=1, linestyle=DASHED)
        axes.set_ylim(0, 1.04)
        _legend(axes)
    return result.png


def bit_correlation(phi_KK: npt.NDArray[np.float64]) -> bytes:
    """Plot the phi coefficients of all pairs of bits as a map; uncorrelated pairs are transparent."""
    with _plot("bit", "bit") as (axes, result):
        ends = [(0.0, WRONG), (0.5, f"{WRONG}00"), (0.5, f"{ACCENT}00"), (1.0, ACCENT)]
        shades = LinearSegmentedColormap.from_list("phi", ends)
        image = axes.imshow(phi_KK, cmap=shades, vmin=-1, vmax=1, interpolation="nearest")
        axes.grid(visible=False)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.yaxis.get_major_locator().set_params(integer=True)
        bar = axes.figure.colorbar(image, ax=axes, label="correlation φ", ticks=[-1, -0.5, 0, 0.5, 1])
        bar.outline.set_edgecolor(INK)
    return result.png


def bucket_sizes(classes: Sequence[tuple[int, int, float]]) -> bytes:
    """Plot the share of the items in buckets of each class of sizes, given as (smallest, largest, share)."""
    with _plot("items that have the same code", "share of items") as (axes, result):
        _bars(axes, [share for *_, share in classes])
        names = [f"{low:,}" if low == high else f"{_short(low)}–{_short(high)}" for low, high, _ in classes]
        axes.set_xticks(range(len(names)), names)
        if len(names) > 4:
            axes.tick_params("x", labelrotation=40)
            for label in axes.get_xticklabels():
                label.set(ha="right", rotation_mode="anchor", fontsize=9)
        axes.set_ylim(0, 1.04)
    return result.png


def code_distances(database: Sequence[float], queries: Sequence[float], bits: int) -> bytes:
    """Plot the shares of the pairs within the database and within the queries at each distance.

    The dashed line is the distribution for independent balanced bits.
    """
    with _plot("Hamming distance", "share of pairs") as (axes, result):
        places = range(bits + 1)
        if database:
            axes.fill_between(places, database, step="mid", color=ACCENT, alpha=0.28, linewidth=0)
            axes.step(places, database, where="mid", color=ACCENT, linewidth=1.6, label="database")
        if queries:
            axes.step(places, queries, where="mid", color=ORANGE, linewidth=1.3, label="queries")
        binomial = [comb(bits, place) / 2**bits for place in places]
        axes.plot(places, binomial, color=INK, linewidth=1, linestyle=DASHED, label="ideal bits")
        axes.set_ylim(bottom=0)
        axes.set_xlim(0, bits)
        _legend(axes)
    return result.png


def bit_drift(change: Sequence[float], chance: Sequence[float]) -> bytes:
    """Plot the change of each bit's share of ones as bars, over the band that chance explains."""
    with _plot("bit", "queries − database") as (axes, result):
        beyond = [abs(value) > limit for value, limit in zip(change, chance, strict=True)]
        for chosen, colour, name in ((False, ACCENT, "within chance"), (True, WRONG, "beyond chance")):
            _bars(
                axes, [value if mark == chosen else 0 for value, mark in zip(change, beyond, strict=True)], colour, name
            )
        edges = [place - 0.5 for place in range(len(change) + 1)]
        band = [*chance, chance[-1]]
        axes.fill_between(edges, band, [-limit for limit in band], step="post", color=INK, alpha=0.18, linewidth=0)
        most = max(0.02, *(1.1 * abs(value) for value in (*change, *chance)))
        axes.set_ylim(-min(most, 1.04), min(most, 1.04))  # with few queries chance explains any change
        _legend(axes)
    return result.png


def study_curves(xlabel: str, series: Mapping[str, Sequence[tuple[float, float, float]]], doubling: bool) -> bytes:
    """Plot mAP over x for each named series of (x, mean, deviation).

    With `doubling` x is on a logarithmic axis, and lines join the points of each series where none has an x twice.
    """
    joined = doubling and all(len({x for x, *_ in points}) == len(points) for points in series.values())
    with _plot(xlabel, "mAP") as (axes, result):
        for place, (name, points) in enumerate(series.items()):
            colour, marker = SERIES[place % len(SERIES)], MARKERS[place // len(SERIES) % len(MARKERS)]
            x, mean, deviation = zip(*sorted(points), strict=True)
            style = {"color": colour, "marker": marker, "markersize": 4.5, "linewidth": 1.6, "capsize": 2.5}
            style["linestyle"] = "-" if joined else "none"
            axes.errorbar(x, mean, yerr=deviation, label=name, **style)
        places = sorted({point[0] for points in series.values() for point in points})
        if doubling:
            axes.set_xscale("log", base=2)
            axes.set_xticks(places, [f"{x:g}" for x in places])
            axes.minorticks_off()
        highest = max(mean + deviation for points in series.values() for _, mean, deviation in points)
        axes.set_ylim(0, min(1.02, 1.15 * highest))
        if len(series) > 1:
            axes.figure.legend(loc="outside upper center", ncols=2, fontsize=8, handlelength=1.4, columnspacing=1.2)
    return result.png


def _bars(axes: Any, heights: Sequence[float], colour: str = ACCENT, name: str | None = None) -> None:
    """Draw one bar per place, without gaps where there are many."""
    axes.bar(range(len(heights)), heights, width=0.8 if len(heights) <= 64 else 1, color=colour, alpha=0.7, label=name)
    axes.set_xlim(-0.6, len(heights) - 0.4)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(visible=False, axis="x")


def _short(number: int) -> str:
    """Shorten a number: `950`, `2k`, `1M`."""
    for size, letter in ((1 << 20, "M"), (1 << 10, "k")):
        if number >= size:
            return f"{number / size:.0f}{letter}"
    return str(number)


def _legend(axes: Any) -> None:
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.16), ncols=3, handlelength=1.4, columnspacing=1.2)


def _chance(axes: Any, chance: float) -> None:
    axes.axhline(chance, color=INK, linewidth=1, linestyle=DASHED)
    below = chance > 0.1  # the label stands where there is room: curves end at the right
    axes.annotate(
        f"chance {chance:.3f}",
        (0.06, chance),
        xycoords=("axes fraction", "data"),
        xytext=(0, -3 if below else 3),
        textcoords="offset points",
        va="top" if below else "bottom",
        fontsize=9,
    )
