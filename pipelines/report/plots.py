"""The plots of a report, as PNG bytes that depend on the figures alone."""

import functools
import io
from collections.abc import Callable, Mapping, Sequence
from math import comb
from typing import Any, Concatenate, ParamSpec

import numpy as np
import numpy.typing as npt
from matplotlib import rc_context
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

P = ParamSpec("P")

INK = "#59636f"  # 6:1 on white; the background is transparent, and a dark page inverts the lightness of plots
# Blue and orange differ for every kind of colour vision; green and red do not.
BLUE = "#2f6fde"
ORANGE = "#d96c00"
DASHED = (0, (4, 3))
SERIES = (BLUE, ORANGE, "#7b3294", "#008f72", INK)
MARKERS = "os^Dv"

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


def _plot(xlabel: str, ylabel: str) -> Callable[[Callable[Concatenate[Any, P], None]], Callable[P, bytes]]:
    """Turn a function that draws on axes into one that returns the drawing as a PNG."""

    def turn(draw: Callable[Concatenate[Any, P], None]) -> Callable[P, bytes]:
        @functools.wraps(draw)
        def png(*args: P.args, **kwargs: P.kwargs) -> bytes:
            with rc_context(_STYLE):
                figure = Figure(figsize=(4.2, 3.1), layout="constrained")
                axes = figure.subplots()
                axes.set_xlabel(xlabel)
                axes.set_ylabel(ylabel)
                draw(axes, *args, **kwargs)
                sink = io.BytesIO()
                # Without `Software`, whose value would be matplotlib's version: equal figures give equal bytes.
                figure.savefig(sink, dpi=200, transparent=True, format="png", metadata={"Software": None})
            return sink.getvalue()

        return png

    return turn


@_plot("recall", "precision")
def pr_curve(axes: Any, precision: Sequence[float], recall: Sequence[float], chance: float) -> None:
    """Plot precision over recall, one point per Hamming radius; the chance level is dashed."""
    # Radii that find nothing have precision 0 by convention, which is not a point of the curve.
    points = [(r, p) for r, p in zip(recall, precision, strict=True) if r > 0]
    axes.plot(*zip(*points, strict=True) if points else ((), ()), color=BLUE, marker="o", markersize=2.5)
    _chance(axes, chance)
    axes.set(xlim=(0, 1.02), ylim=(0, 1.02))


@_plot("N nearest", "precision@N")
def precision_at_n(axes: Any, counts: Sequence[float], precision: Sequence[float], chance: float) -> None:
    """Plot the precision among the first N, with N on a logarithmic axis."""
    axes.plot(counts, precision, color=BLUE, marker="o", markersize=3.5)
    if len(counts) > 1:
        axes.set_xscale("log")
        axes.set_xticks([n for n in counts if f"{n:.0f}".strip("0") == "1"])
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.minorticks_off()
    _chance(axes, chance)
    axes.set_ylim(0, 1.02)


@_plot("Hamming distance", "share of pairs")
def distance_histogram(axes: Any, relevant: Sequence[float], other: Sequence[float]) -> None:
    """Plot the shares of relevant and of other pairs at each Hamming distance."""
    places = range(len(relevant))
    for shares, colour, name in ((other, ORANGE, "different class"), (relevant, BLUE, "same class")):
        _filled(axes, places, shares, colour, name)
    axes.set(xlim=(0, max(1, len(relevant) - 1)), ylim=(0, None))
    _legend(axes)


@_plot("Hamming distance / bits", "share of pairs")
def moved_distances(axes: Any, old: Sequence[float], new: Sequence[float]) -> None:
    """Plot the shares of the same pairs by normalised distance under two codes, in equal bins from 0 to 1."""
    edges = [place / len(old) for place in range(len(old) + 1)]
    for shares, colour, name in ((old, ORANGE, "old codes"), (new, BLUE, "new codes")):
        axes.stairs(shares, edges, color=colour, fill=True, alpha=0.28)
        axes.stairs(shares, edges, color=colour, linewidth=1.6, label=name)
    axes.set(xlim=(0, 1), ylim=(0, None))
    _legend(axes)


@_plot("overlap", "share of queries")
def overlap_histogram(axes: Any, shares: Sequence[float]) -> None:
    """Plot the shares of the queries by overlap, in bins of equal width from 0 to 1."""
    edges = [place / len(shares) for place in range(len(shares) + 1)]
    axes.stairs(shares, edges, color=BLUE, fill=True, alpha=0.7)
    axes.set(xlim=(0, 1), ylim=(0, None))


@_plot("bit", "share, or bits")
def bit_balance(axes: Any, balance: Sequence[float], entropy: Sequence[float]) -> None:
    """Plot the share of ones of each bit as bars and its entropy as dots; the balanced share, half, is dashed."""
    _bars(axes, balance, BLUE, "share of ones")
    size = 4.0 if len(entropy) <= 64 else 2.0
    style = {"color": ORANGE, "markersize": size, "clip_on": False, "label": "entropy in bits"}
    axes.plot(range(len(entropy)), entropy, "o", **style)
    axes.axhline(0.5, color=INK, linewidth=1, linestyle=DASHED)
    axes.set_ylim(0, 1.04)
    _legend(axes)


@_plot("bit", "bit")
def bit_correlation(axes: Any, phi_KK: npt.NDArray[np.float64]) -> None:
    """Plot the phi coefficients of all pairs of bits as a map; uncorrelated pairs are transparent."""
    ends = [(0.0, ORANGE), (0.5, f"{ORANGE}00"), (0.5, f"{BLUE}00"), (1.0, BLUE)]
    shades = LinearSegmentedColormap.from_list("phi", ends)
    image = axes.imshow(phi_KK, cmap=shades, vmin=-1, vmax=1, interpolation="nearest")
    axes.grid(visible=False)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.yaxis.get_major_locator().set_params(integer=True)
    bar = axes.figure.colorbar(image, ax=axes, label="correlation φ", ticks=[-1, -0.5, 0, 0.5, 1])
    bar.outline.set_edgecolor(INK)


@_plot("items that have the same code", "share of items")
def bucket_sizes(axes: Any, classes: Sequence[tuple[int, int, float]]) -> None:
    """Plot the share of the items in buckets of each class of sizes, given as (smallest, largest, share)."""
    _bars(axes, [share for *_, share in classes])
    names = [f"{low:,}" if low == high else f"{_short(low)}–{_short(high)}" for low, high, _ in classes]
    axes.set_xticks(range(len(names)), names)
    if len(names) > 4:
        axes.tick_params("x", labelrotation=40)
        for label in axes.get_xticklabels():
            label.set(ha="right", rotation_mode="anchor", fontsize=9)
    axes.set_ylim(0, 1.04)


@_plot("Hamming distance", "share of pairs")
def code_distances(axes: Any, database: Sequence[float], queries: Sequence[float], bits: int) -> None:
    """Plot the shares of the pairs within the database and within the queries at each distance.

    The dashed line is the distribution for independent balanced bits.
    """
    places = range(bits + 1)
    if database:
        _filled(axes, places, database, BLUE, "database")
    if queries:
        axes.step(places, queries, where="mid", color=ORANGE, linewidth=1.3, label="queries")
    binomial = [comb(bits, place) / 2**bits for place in places]
    axes.plot(places, binomial, color=INK, linewidth=1, linestyle=DASHED, label="ideal bits")
    axes.set(xlim=(0, bits), ylim=(0, None))
    _legend(axes)


@_plot("bit", "queries − database")
def bit_drift(axes: Any, change: Sequence[float], chance: Sequence[float]) -> None:
    """Plot the change of each bit's share of ones as bars, over the band that chance explains."""
    beyond = [abs(value) > limit for value, limit in zip(change, chance, strict=True)]
    for chosen, colour, name in ((False, BLUE, "within chance"), (True, ORANGE, "beyond chance")):
        _bars(axes, [value if mark == chosen else 0 for value, mark in zip(change, beyond, strict=True)], colour, name)
    edges = [place - 0.5 for place in range(len(change) + 1)]
    band = [*chance, chance[-1]]
    axes.fill_between(edges, band, [-limit for limit in band], step="post", color=INK, alpha=0.18, linewidth=0)
    most = max(0.02, *(1.1 * abs(value) for value in (*change, *chance)))
    axes.set_ylim(-min(most, 1.04), min(most, 1.04))  # with few queries chance explains any change
    _legend(axes)


@_plot("epoch", "training loss")
def learning_curve(axes: Any, epochs: Sequence[int], loss: Sequence[float], validated: Sequence[float | None]) -> None:
    """Plot the mean loss of each epoch, and over it the validation mAP of the epochs that have one."""
    axes.plot(epochs, loss, color=ORANGE, linestyle=DASHED, marker="s", markersize=3, label="training loss")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylim(0, None)
    points = [(epoch, value) for epoch, value in zip(epochs, validated, strict=True) if value is not None]
    if points:
        other = axes.twinx()
        other.grid(visible=False)
        other.spines["right"].set_visible(True)
        other.set_ylabel("validation mAP")
        other.plot(*zip(*points, strict=True), color=BLUE, marker="o", markersize=3.5, label="validation mAP")
        other.set_ylim(0, 1.15 * max(0.01, *(value for _, value in points)))
        axes.plot([], [], color=BLUE, marker="o", markersize=3.5, label="validation mAP")  # for the legend
    _legend(axes)


@_plot("", "mAP")
def study_curves(
    axes: Any, xlabel: str, series: Mapping[str, Sequence[tuple[float, float, float]]], doubling: bool
) -> None:
    """Plot mAP over x for each named series of (x, mean, deviation).

    With `doubling` x is on a logarithmic axis, and lines join the points of each series where none has an x twice.
    """
    joined = doubling and all(len({x for x, *_ in points}) == len(points) for points in series.values())
    axes.set_xlabel(xlabel)
    for place, (name, points) in enumerate(series.items()):
        colour, marker = SERIES[place % len(SERIES)], MARKERS[(place + place // len(SERIES)) % len(MARKERS)]
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


def _bars(axes: Any, heights: Sequence[float], colour: str = BLUE, name: str | None = None) -> None:
    """Draw one bar per place, without gaps where there are many."""
    axes.bar(range(len(heights)), heights, width=0.8 if len(heights) <= 64 else 1, color=colour, alpha=0.7, label=name)
    axes.set_xlim(-0.6, len(heights) - 0.4)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(visible=False, axis="x")


def _filled(axes: Any, places: Sequence[int], shares: Sequence[float], colour: str, name: str) -> None:
    axes.fill_between(places, shares, step="mid", color=colour, alpha=0.28, linewidth=0)
    axes.step(places, shares, where="mid", color=colour, linewidth=1.6, label=name)


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
