"""Computes the mAP of one ranking as each code base of the field would."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

import hhnet
from hhnet.metrics.conventions import CONVENTIONS, Convention
from pipelines.config.settings import EvaluateSettings
from pipelines.errors import UsageError
from pipelines.evaluate.pair import Pair
from pipelines.evaluate.rounding import round_figure


@dataclass(frozen=True)
class ConventionFigures:
    """One way to compute mAP, the code bases with this convention, and the mAP of the ranking."""

    names: Sequence[str]
    ties: str
    denominator: str
    empty: str
    unlabelled: str
    map: float | None
    """None where ties are ordered by outputs that the codes do not have, or no query is left."""
    queries: int
    """Number of queries in the mean."""


def convention_settings(name: str) -> dict[str, str]:
    """Return the settings of `evaluate` for a named convention.

    Raises UsageError for an unknown name, and for a convention that orders ties by the network's outputs.
    """
    if name not in CONVENTIONS:
        raise UsageError(f"--convention {name!r} is not known: choose from {', '.join(CONVENTIONS)}")
    convention = CONVENTIONS[name]
    if convention.ties == "scores":
        given = "where the codes have real codes (encode.real_codes) and evaluate.rerank is set"
        there = f"its mAP is in the report's table of conventions {given}"
        raise UsageError(f"--convention {name} orders ties by the outputs of the network: {there}")
    return {
        "evaluate.ties": "stable" if convention.ties == "stable" else "expected",
        "evaluate.denominator": convention.denominator,
        "evaluate.empty": convention.empty,
        "evaluate.unlabelled": convention.unlabelled,
    }


def average_precisions_of_pair(pair: Pair, settings: EvaluateSettings) -> npt.NDArray[np.float64]:
    """Return the AP of every query, float64 (Q,), NaN where the convention leaves it out."""
    convention = settings.model_dump(include={"at", "ties", "denominator", "empty"})
    ap_Q = hhnet.average_precisions(*pair.arguments(), **convention)
    return _without_unlabelled(ap_Q, pair, settings.unlabelled)


def chance_of_pair(pair: Pair, settings: EvaluateSettings) -> float:
    """Return the mAP that codes without information have under the convention of the settings."""
    _, query_labels, _, database_labels = pair.arguments()
    if settings.unlabelled == "skip":
        query_labels = query_labels[pair.queries.labels.any(1)]
    return hhnet.chance_map(query_labels, database_labels, settings.at, settings.denominator, settings.empty)


def map_by_convention(pair: Pair, at: int | None) -> list[ConventionFigures]:
    """Return the mAP@`at` under every named convention; conventions that cannot differ are grouped."""
    groups: dict[Convention, list[str]] = {}
    for name, convention in CONVENTIONS.items():
        groups.setdefault(replace(convention, source=""), []).append(name)
    return [_measured(pair, at, names, convention) for convention, names in groups.items()]


def _measured(pair: Pair, at: int | None, names: Sequence[str], convention: Convention) -> ConventionFigures:
    by_outputs, kept = convention.ties == "scores", np.empty(0)
    if not by_outputs or pair.real_codes is not None:
        ap_Q = hhnet.average_precisions(
            *pair.arguments(),
            at=at,
            # A sort that promises no order is represented by the expectation over all orders.
            ties={"undefined": "expected"}.get(convention.ties, convention.ties),
            denominator=convention.denominator,
            empty=convention.empty,
            tie_scores=pair.real_codes if by_outputs else None,
        )
        ap_Q = _without_unlabelled(ap_Q, pair, convention.unlabelled)
        kept = ap_Q[~np.isnan(ap_Q)]
    return ConventionFigures(
        *(names, convention.ties, convention.denominator, convention.empty, convention.unlabelled),
        map=round_figure(kept.mean()) if len(kept) else None,
        queries=len(kept),
    )


def _without_unlabelled(ap_Q: npt.NDArray[np.float64], pair: Pair, unlabelled: str) -> npt.NDArray[np.float64]:
    return np.where(pair.queries.labels.any(1), ap_Q, np.nan) if unlabelled == "skip" else ap_Q
