"""Builds the evaluation report as one self-contained HTML page."""

from collections.abc import Mapping, Sequence

from pipelines.config.settings import EvaluateSettings
from pipelines.evaluate.figures import ReportFigures
from pipelines.report.page import GalleryRow, render


def convention_name(settings: EvaluateSettings) -> str:
    """Return the convention in short: `mAP@all, ties=expected, denominator=retrieved, empty=zero`."""
    at = "all" if settings.at is None else settings.at
    name = f"mAP@{at}, ties={settings.ties}, denominator={settings.denominator}, empty={settings.empty}"
    return name if settings.unlabelled == "zero" else f"{name}, unlabelled={settings.unlabelled}"


def report_page(
    figures: ReportFigures,
    drawn: Mapping[str, bytes],
    rows: Sequence[GalleryRow],
    worst: Sequence[GalleryRow],
    problems: Sequence[str],
    sources: Mapping[str, str],
) -> str:
    """Return the page: headline, conventions, curves, code health, classes, and two galleries.

    The galleries show `rows` and the `worst` queries. `drawn` holds the PNGs of all plots by name.
    """
    ordered = sorted(figures.classes, key=lambda entry: (-(entry.map if entry.map is not None else -1.0), entry.name))
    return render(
        "report",
        figures=figures,
        classes=ordered,
        drawn=drawn,
        rows=rows,
        worst=worst,
        problems=problems,
        sources=sources,
    )
