"""The plots of a report, as PNG bytes that depend on the figures alone."""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

INK = "#7d8794"  # reads on a white and on a dark page; the plots' ground is transparent
ACCENT = "#3f7ff0"
RIGHT = "#2ba564"
WRONG = "#e05252"

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
    "svg.hashsalt": "hhnet",
}


class Plot:
    """Receives the PNG when the block of `_plot` ends."""

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
        figure.savefig(sink, dpi=200, transparent=True, format="png", metadata={"Software": None})
        result.png = sink.getvalue()


def pr_curve(precision: Sequence[float], recall: Sequence[float], chance: float) -> bytes:
    """Precision over recall, one point per Hamming radius; the chance level is dashed."""
    with _plot("recall", "precision") as (axes, result):
        # Radii that find nothing have precision 0 by convention, which is not a point of the curve.
        points = [(r, p) for r, p in zip(recall, precision, strict=True) if r > 0]
        axes.plot(*zip(*points, strict=True) if points else ((), ()), color=ACCENT, marker="o", markersize=2.5)
        _chance(axes, chance)
        axes.set_xlim(0, 1.02)
        axes.set_ylim(0, 1.02)
    return result.png


def precision_at_n(counts: Sequence[float], precision: Sequence[float], chance: float) -> bytes:
    """Precision among the first N, N on a logarithmic axis."""
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
    """Shares of relevant and of other pairs at each Hamming distance."""
    with _plot("Hamming distance", "share of pairs") as (axes, result):
        places = range(len(relevant))
        for shares, colour, name in ((other, WRONG, "different class"), (relevant, RIGHT, "same class")):
            axes.fill_between(places, shares, step="mid", color=colour, alpha=0.28, linewidth=0)
            axes.step(places, shares, where="mid", color=colour, linewidth=1.6, label=name)
        axes.set_ylim(bottom=0)
        axes.set_xlim(0, max(1, len(relevant) - 1))
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.16), ncols=2, handlelength=1.4)
    return result.png


def _chance(axes: Any, chance: float) -> None:
    axes.axhline(chance, color=INK, linewidth=1, linestyle=(0, (4, 3)))
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
