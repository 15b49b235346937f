"""Builds the page of a study: its question, the groups over their seeds, curves, the searches, and every cell."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pipelines.artifacts.manifest import Artifact
from pipelines.report.page import format_figure, render, report_uris
from pipelines.report.plots import study_curves
from pipelines.storage import Store
from pipelines.study.grid import Description
from pipelines.study.results import AXIS_PREFIX, Trial, sort_groups

StudyRow = Mapping[str, Any]

CURVES = {
    "map_bits": ("bits", "bits", 1.0),
    "map_flops": ("flops", "GFLOP of one image", 1e9),
    "map_image_size": ("image_size", "side of the input in pixels", 1.0),
}
"""Name of a plot -> (figure on its x axis, title of that axis, divisor of the figure)."""
COLUMNS = {
    "bits": ("bits", ",", 1),
    "lr": ("lr", "g", 1),
    "flops": ("GFLOP", ",.4f", 1e9),
    "parameters": ("M weights", ",.2f", 1e6),
    "images": ("images seen", ",", 1),
}
"""Figure -> (title, format, divisor); it is a column where groups differ in it, and said once where they do not."""
MIN_SPREAD = 1.05
"""Ratio of the largest to the smallest figure from which it is worth an axis."""


def study_plots(summary: Sequence[StudyRow]) -> dict[str, bytes]:
    """Draw PNGs of mAP over bits, FLOPs and input size, each only where the groups differ in it visibly."""
    done = [entry for entry in summary if entry["map"] is not None]
    drawn = {}
    for name, (figure, title, unit) in CURVES.items():
        values = [entry[figure] for entry in done]
        if values and max(values) >= MIN_SPREAD * min(values):
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


def report_links(reports: Iterable[Artifact], out: str) -> dict[str, str]:
    """Return where the page of each report below `out` is, as seen from the study's page, by the report's digest."""
    root = Store(out).uri
    return {report.digest: f"../../..{report_uris(report)['report'].removeprefix(root)}" for report in reports}


def study_page(
    description: Description,
    cells: Sequence[StudyRow],
    summary: Sequence[StudyRow],
    chances: Sequence[float | None],
    trials: Sequence[Trial],
    drawn: Mapping[str, bytes],
    sources: Mapping[str, str],
    links: Mapping[str, str],
) -> str:
    """Return the self-contained page; `links` tells where the page of a report is, by the report's digest."""
    axes = [name for name in summary[0] if name.startswith(AXIS_PREFIX)]
    groups = sort_groups(summary, chances)
    cells_by_labels: dict[tuple[str, ...], list[StudyRow]] = {}
    for cell in cells:
        cells_by_labels.setdefault(tuple(cell[axis] for axis in axes), []).append(cell)
    ordered = [cells_by_labels[tuple(group.row[axis] for axis in axes)] for group in groups]
    told = {name for name in COLUMNS if any(all(e[axis] == json.dumps(e[name]) for e in summary) for axis in axes)}
    columns = {name: column for name, column in COLUMNS.items() if name not in told}
    texts = {n: {format_figure(e[n], spec, unit) for e in summary} for n, (_, spec, unit) in columns.items()}
    shown = {name for name, different in texts.items() if len(different) > 1}
    return render(
        "study",
        description=description,
        groups=list(zip(groups, ordered, strict=True)),
        cells=[cell for group_cells in ordered for cell in group_cells],
        failed=[cell for cell in cells if cell["error"] is not None],
        axes=[axis for axis in axes if len({entry[axis] for entry in summary}) > 1],
        axis_prefix=AXIS_PREFIX,
        columns={name: column for name, column in columns.items() if name in shown},
        shared={name: column for name, column in columns.items() if name not in shown},
        trials=trials,
        curves=[(png, CURVES[name][1]) for name, png in drawn.items()],
        sources={**sources, "settings": json.dumps(description.settings)},
        links=links,
    )
