"""Builds the page of a study: its question, the groups over their seeds, curves, the searches, and every cell."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.report.page import render
from pipelines.report.plots import study_curves
from pipelines.study.grid import Description
from pipelines.study.results import AXIS_PREFIX, Trial

StudyRow = Mapping[str, Any]

CURVES = {
    "map_bits": ("bits", "bits", 1.0),
    "map_flops": ("flops", "GFLOP of one image", 1e9),
    "map_image_size": ("image_size", "side of the input in pixels", 1.0),
}
"""Name of a plot -> (figure on its x axis, title of that axis, divisor of the figure)."""


def study_plots(summary: Sequence[StudyRow]) -> dict[str, bytes]:
    """Draw PNGs of mAP over bits, FLOPs and input size, each only where that has more than one value."""
    done = [entry for entry in summary if entry["map"] is not None]
    drawn = {}
    for name, (figure, title, unit) in CURVES.items():
        if len({entry[figure] for entry in done}) > 1:
            drawn[name] = study_curves(title, _series(done, figure, unit), doubling=unit == 1.0)
    return drawn


def _series(done: Sequence[StudyRow], figure: str, unit: float) -> dict[str, list[tuple[float, float, float]]]:
    """Return the groups as curves; groups that differ only in axes that move x are on one curve."""
    axes = [name for name in done[0] if name.startswith(AXIS_PREFIX)]
    kept = [axis for axis in axes if not _moves(done, axis, axes, figure)]
    series: dict[str, list[tuple[float, float, float]]] = {}
    for entry in done:
        label = ", ".join(str(entry[axis]) for axis in kept)
        series.setdefault(label, []).append((entry[figure] / unit, entry["map"], entry["deviation"] or 0.0))
    return series


def _moves(done: Sequence[StudyRow], axis: str, axes: Sequence[str], figure: str) -> bool:
    """Tell whether two groups that differ in this axis alone differ in the figure."""
    seen: dict[tuple[str, ...], set[float]] = {}
    for entry in done:
        seen.setdefault(tuple(entry[other] for other in axes if other != axis), set()).add(entry[figure])
    return any(len(found) > 1 for found in seen.values())


def study_page(
    description: Description,
    cells: Sequence[StudyRow],
    summary: Sequence[StudyRow],
    trials: Sequence[Trial],
    drawn: Mapping[str, bytes],
    sources: Mapping[str, str],
) -> str:
    """Return the self-contained page."""
    axes = [name for name in summary[0] if name.startswith(AXIS_PREFIX)]
    best = max((entry for entry in summary if entry["map"] is not None), key=lambda e: float(e["map"]), default=None)
    return render(
        "study",
        description=description,
        cells=cells,
        failed=[cell for cell in cells if cell["error"] is not None],
        summary=summary,
        best=best,
        best_labels=", ".join(str(best[axis]) for axis in axes) if best else "",
        axes=axes,
        names=[name.removeprefix(AXIS_PREFIX) for name in axes] or ["group"],
        trials=trials,
        curves=[(png, CURVES[name][1]) for name, png in drawn.items()],
        sources={**sources, "settings": json.dumps(description.settings)},
    )
