"""The page of a study: what was asked, the groups over their seeds, curves, the searches, and every cell."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.report.page import cards, document, facts, folded, note, plots, section, table
from pipelines.report.plots import study_curves
from pipelines.study.grid import Description
from pipelines.study.results import AXIS, Trial

Entry = Mapping[str, Any]

CURVES = {
    "map_bits": ("bits", "bits", 1.0),
    "map_flops": ("flops", "GFLOP of one image", 1e9),
    "map_image_size": ("image_size", "side of the input in pixels", 1.0),
}
"""Name of a plot -> the figure on its x axis, that axis's title, and what the figure is divided by."""


def study_plots(summary: Sequence[Entry]) -> dict[str, bytes]:
    """PNGs of mAP over bits, FLOPs and input size, each only where that has more than one value."""
    done = [entry for entry in summary if entry["map"] is not None]
    drawn = {}
    for name, (figure, title, unit) in CURVES.items():
        if len({entry[figure] for entry in done}) > 1:
            drawn[name] = study_curves(title, _series(done, figure, unit), doubling=unit == 1.0)
    return drawn


def _series(done: Sequence[Entry], figure: str, unit: float) -> dict[str, list[tuple[float, float, float]]]:
    """The groups as curves: what differs in an axis that moves x stands on one curve."""
    axes = [name for name in done[0] if name.startswith(AXIS)]
    kept = [axis for axis in axes if not _moves(done, axis, axes, figure)]
    series: dict[str, list[tuple[float, float, float]]] = {}
    for entry in done:
        label = ", ".join(str(entry[axis]) for axis in kept)
        series.setdefault(label, []).append((entry[figure] / unit, entry["map"], entry["deviation"] or 0.0))
    return series


def _moves(done: Sequence[Entry], axis: str, axes: Sequence[str], figure: str) -> bool:
    """Whether two groups that differ in this axis alone differ in the figure."""
    seen: dict[tuple[str, ...], set[float]] = {}
    for entry in done:
        seen.setdefault(tuple(entry[other] for other in axes if other != axis), set()).add(entry[figure])
    return any(len(found) > 1 for found in seen.values())


def study_page(
    description: Description,
    cells: Sequence[Entry],
    summary: Sequence[Entry],
    trials: Sequence[Trial],
    drawn: Mapping[str, bytes],
    sources: Mapping[str, str],
) -> str:
    """The self-contained page."""
    failed = [cell for cell in cells if cell["error"] is not None]
    best = max((entry for entry in summary if entry["map"] is not None), key=lambda e: float(e["map"]), default=None)
    headline = [
        ("Best mAP", _mean(best), _labels(best) if best else "no cell succeeded"),
        ("Groups", f"{len(summary):,}", f"{len(description.seeds)} seed{'s' * (len(description.seeds) > 1)} each"),
        ("Cells", f"{len(cells) - len(failed):,}", f"{len(failed):,} failed" if failed else "none failed"),
        *([("Trainings of the searches", f"{len(trials):,}", "on validation")] if trials else []),
    ]
    curves = [(png, f"mAP over {CURVES[name][1]}", _caption(name)) for name, png in drawn.items()]
    failures = ("cell", "seed", "error"), [(c["group"], str(c["seed"]), c["error"]) for c in failed]
    body = [
        cards(headline),
        *([note(f"{len(failed)} of {len(cells)} cells failed and are in no mean; see the end.")] if failed else []),
        section("Groups", _groups(summary), lead="Mean and sample deviation of the mAP over the seeds."),
        *([section("Curves", plots(curves))] if curves else []),
        *([section("Searches", _searches(trials), lead=SEARCHED)] if trials else []),
        section("Cells", folded("Every cell", _cells(cells)), *([table(*failures)] if failed else [])),
        section("Made from", facts({**sources, "settings": json.dumps(description.settings)})),
        "<footer>Made by hhnet. The same figures are in the Parquet and JSON files beside this page.</footer>",
    ]
    return document(description.title, "HHNet · study", body, " ".join(description.about.split()))


SEARCHED = (
    "Each candidate was trained with the first seed; the one with the best mAP on validation samples was taken for all "
    "seeds of its group. The test queries have no part in it."
)


def _caption(name: str) -> str:
    return f"Mean over the seeds, the bars are the deviation; x is {CURVES[name][1]}."


def _labels(entry: Entry) -> str:
    return ", ".join(str(value) for name, value in entry.items() if name.startswith(AXIS))


def _figure(value: float | None, unit: float = 1.0, digits: int = 4) -> str:
    return "–" if value is None else f"{value / unit:,.{digits}f}"


def _mean(entry: Entry | None) -> str:
    if entry is None:
        return "–"
    deviation = "" if entry["deviation"] is None else f" ± {entry['deviation']:.4f}"
    return f"{_figure(entry['map'])}{deviation}"


def _groups(summary: Sequence[Entry]) -> str:
    axes = [name for name in summary[0] if name.startswith(AXIS)]
    names = [name.removeprefix(AXIS) for name in axes] or ["group"]
    head = (*names, "mAP", "deviation", "seeds", "validation mAP", "lr", "GFLOP", "M weights", "images seen")
    rows = [
        (
            *([str(entry[axis]) for axis in axes] or ["all"]),
            *(_figure(entry["map"]), _figure(entry["deviation"])),
            f"{entry['seeds']}" + (f", {entry['failed']} failed" if entry["failed"] else ""),
            *(_figure(entry["val_map"]), f"{entry['lr']:g}", _figure(entry["flops"], 1e9)),
            *(_figure(entry["parameters"], 1e6, 2), _figure(entry["images"], digits=0)),
        )
        for entry in summary
    ]
    return table(head, rows)


def _searches(trials: Sequence[Trial]) -> str:
    rows = [
        (trial.group, trial.candidate, _figure(trial.val_map), "chosen" if trial.chosen else trial.error or "")
        for trial in trials
    ]
    return table(("group", "candidate", "validation mAP", ""), rows)


def _cells(cells: Sequence[Entry]) -> str:
    rows = [
        (
            *(cell["group"], str(cell["seed"]), _figure(cell["map"]), _figure(cell["val_map"]), f"{cell['lr']:g}"),
            *((cell["model"] or "–")[:12], (cell["report"] or "–")[:12]),
        )
        for cell in cells
    ]
    return table(("group", "seed", "mAP", "validation mAP", "lr", "model", "report"), rows)
