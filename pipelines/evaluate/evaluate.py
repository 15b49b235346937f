"""`hhnet evaluate`: measures how well the codes of queries find their own classes in the database."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from pipelines.artifacts.commit import ArtifactWriter
from pipelines.artifacts.facts import EpochFigures, ModelCard, ReportMeta, RerankedMeta, SplitPart
from pipelines.artifacts.manifest import Artifact, Part, fingerprint
from pipelines.artifacts.result import Result
from pipelines.artifacts.runs import RunLog, closed_records
from pipelines.artifacts.splits import LEARNED_NOTE, require_one_split, split_facts, split_notes, split_part
from pipelines.artifacts.tables import class_ids_in
from pipelines.artifacts.versions import find_finished, open_input_version
from pipelines.cluster.progress import stage
from pipelines.config.fingerprint import result_settings
from pipelines.config.settings import Config, EvaluateSettings
from pipelines.encode.codes import CodesSet, open_codes, require_distinct_tars, require_pair, require_real_codes
from pipelines.errors import HHNetError, InputError
from pipelines.evaluate.advice import advise
from pipelines.evaluate.figures import ReportFigures, measure_pair, require_findable
from pipelines.evaluate.gallery import gallery_rows, spread_queries, worst_queries
from pipelines.evaluate.health import Examined, examine_codes
from pipelines.evaluate.pair import load_pair
from pipelines.evaluate.subject import describe_subject, find_card
from pipelines.report import plots
from pipelines.report.page import put_report, render, report_uris
from pipelines.report.pictures import find_pictures
from pipelines.storage import Store

_log = logging.getLogger(__name__)

PROGRESS_STEPS = 5
WORST_SHOWN = 6
EPOCHS_LISTED = 10
REPORT_VERSION = 4
"""Version of the report format. Bump it when the contents of a report change."""


@dataclass(frozen=True, kw_only=True)
class EvaluateResult(Result):
    """The main figures of a report, and its place; `queries_searched` says when its queries were searched."""

    verb: str = "evaluate"
    map: float
    convention: str
    chance: float
    precision_at: dict[str, float]
    bits: int
    reranked: dict[str, Any] | None = None
    protocol: str | None = None
    split: str | None = None
    queries: int
    database: int
    queries_searched: list[str]
    report: str
    metrics: str

    def fact(self, name: str, value: Any) -> list[str]:
        """Return the lines that show a field; precision by its ranks, and how often the queries were searched."""
        if name == "precision_at":
            return [", ".join(f"{share:.4f} of the first {rank}" for rank, share in value.items())]
        if name == "queries_searched" and value:
            times = "once" if len(value) == 1 else f"{len(value)} times, the last"
            return [f"{times} on {datetime.fromisoformat(value[-1]):%Y-%m-%d at %H:%M %Z}"]
        return super().fact(name, value)


def evaluate(queries: str, database: Sequence[str], out: str, config: Config) -> EvaluateResult:
    """Evaluate the codes `queries` against the codes `database` (several count as one) into a report at `out`.

    Raises FingerprintMismatch where the codes differ in bits, model or split; InputError where queries have classes
    that the database lacks, a tar comes twice, a side is empty, no query has a relevant item, or real codes are missing
    that `evaluate.rerank` needs.
    """
    query_set, sets = _open_all(queries, database)
    for entry in (query_set, *sets) if config.evaluate.rerank else ():
        require_real_codes(entry.artifact.uri, entry.real_codes)
    name = report_fingerprint(query_set.artifact.digest, [entry.artifact.digest for entry in sets], config)
    artifact = find_finished(Store(out), "report", name)
    if artifact is not None:
        return _evaluate_result(artifact, "unchanged")
    require_distinct_tars(sets)
    return _evaluate_result(_make_report(query_set, sets, out, name, config), "done")


def report_fingerprint(queries: str, database: Sequence[str], config: Config) -> str:
    """Return the fingerprint of a report: the digests of the codes that it compares, and the convention."""
    inputs = {"queries": queries, "database": list(database), "figures": REPORT_VERSION}
    return fingerprint("report", inputs, result_settings(config, "report"))


def _open_all(queries: str, database: Sequence[str]) -> tuple[CodesSet, list[CodesSet]]:
    if not database:
        raise InputError("nothing to search in: name at least one codes artifact with --database")
    query_set, sets = open_codes(queries), [open_codes(uri) for uri in database]
    for other in sets:
        require_pair(query_set, other)
    require_one_split(query_set.artifact, [entry.artifact for entry in sets])
    for name, rows in ((queries, query_set.rows), (", ".join(database), sum(entry.rows for entry in sets))):
        if not rows:
            raise InputError(f"{name} holds no codes to evaluate: name codes of at least one image")
    known = {name for entry in sets for name in entry.classes}
    unknown = [name for name in query_set.classes if name not in known]
    if unknown:  # unused class ids are fine: adopted numbers leave gaps
        used = class_ids_in(table["labels"] for table in query_set.tables())
        unknown = [name for n, name in enumerate(query_set.classes) if n in used and name not in known]
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        problem = f"has class {unknown[0]!r}{more}, which {', '.join(database)} does not know"
        raise InputError(f"{query_set.artifact.uri} {problem}: name queries and database of the same classes")
    return query_set, sets


# --------------------------------------------------------------------------------------------------------- report


def _make_report(query_set: CodesSet, sets: Sequence[CodesSet], out: str, name: str, config: Config) -> Artifact:
    with ExitStack() as stack:
        advance = stack.enter_context(stage("evaluate", PROGRESS_STEPS, unit="steps"))
        pair = load_pair(query_set, sets, real_codes=config.evaluate.rerank is not None)
        require_findable(pair)  # before anything is written at `out`
        databases = {f"database-{number}": entry.artifact for number, entry in enumerate(sets)}
        settings = result_settings(config, "report")
        writer = ArtifactWriter.of(Store(out), "report", name, {"queries": query_set.artifact, **databases}, settings)
        advance(1, note="codes read")
        log = stack.enter_context(RunLog(writer.store, "evaluate", config, fingerprint=name))
        examined = examine_codes(pair.queries.codes, pair.database.codes, pair.bits)
        advance(1, note="codes examined")
        figures, ap_Q = measure_pair(pair, examined, config.evaluate)
        figures = replace(figures, notes=(*figures.notes, *_split_notes(query_set, sets)))
        advance(1, note=f"mAP {figures.map:.4f}")
        pictures = find_pictures([entry.artifact for entry in (query_set, *sets)], ())
        count = config.evaluate.gallery
        galleries = {
            "worst": gallery_rows(
                pair, worst_queries(pair, ap_Q, min(count, WORST_SHOWN)), pictures, (query_set, *sets)
            ),
            "rows": gallery_rows(pair, spread_queries(pair, ap_Q, count), pictures, (query_set, *sets)),
            "problems": pictures.problems,
        }
        card = find_card(query_set.artifact)
        drawn = _draw_plots(figures, examined, card)
        advance(1, note="plots and gallery")
        learnt = {"card": card, "epochs": _thin_history(card) if card else ()}
        said = {"subject": describe_subject(query_set, sets, card), "advice": advise(figures, card), **learnt}
        page = _page(figures, drawn, {**said, "sources": _sources(query_set, sets)}, galleries)
        parts = put_report(writer, figures.as_json(), page, drawn, figures.queries)
        artifact = _commit_report(writer, parts, figures, config.evaluate, split_part(query_set.artifact))
        log.record_figures(queries_searched=datetime.now(UTC).isoformat(timespec="seconds"))
        advance(1)
    return artifact


def _page(
    figures: ReportFigures, drawn: Mapping[str, bytes], said: Mapping[str, Any], galleries: Mapping[str, Any]
) -> str:
    """Return the page; `drawn` holds the PNGs of all plots by name, `said` what the page says in words."""
    ordered = sorted(figures.classes, key=lambda entry: (-(entry.map if entry.map is not None else -1.0), entry.name))
    shown = {f"{entry.map:.3f}" for entry in figures.by_convention if entry.map is not None}
    facts = {"classes": ordered, "agreed": shown == {f"{figures.map:.3f}"}}
    return render("report", figures=figures, drawn=drawn, **facts, **said, **galleries)


def _thin_history(card: ModelCard) -> list[EpochFigures]:
    """Return at most EPOCHS_LISTED epochs in even steps, and the last and the one whose weights were kept."""
    total = len(card.history)
    step = -(-total // EPOCHS_LISTED)
    shown = {*range(step, total + 1, step), total, card.metrics.epoch}
    return [entry for entry in card.history if entry.epoch in shown]


def _draw_plots(figures: ReportFigures, examined: Examined, card: ModelCard | None) -> dict[str, bytes]:
    history = card.history if card else ()
    learnt = [entry.epoch for entry in history], [entry.loss for entry in history], [entry.map for entry in history]
    curve, by_rank, at_n, health = figures.pr_curve, figures.pr_by_rank, figures.precision_at_n, figures.health
    return {
        "pr_curve": plots.pr_curve(curve.y, curve.x, figures.relevant_share),
        "pr_by_rank": plots.pr_curve(by_rank.precision, by_rank.recall, figures.relevant_share),
        "precision_at_n": plots.precision_at_n(at_n.x, at_n.y, figures.relevant_share),
        "distances": plots.distance_histogram(figures.distances_relevant.y, figures.distances_other.y),
        "bit_balance": plots.bit_balance(health.database.balance, health.database.entropy),
        "bit_correlation": plots.bit_correlation(examined.database.correlation),
        "bucket_sizes": plots.bucket_sizes(
            [(entry.smallest, entry.largest, entry.items / figures.database) for entry in health.database.bucket_sizes]
        ),
        "code_distances": plots.code_distances(health.database.distances, health.queries.distances, figures.bits),
        "bit_drift": plots.bit_drift(health.drift.balance_change, health.drift.chance),
        **({"learning_curve": plots.learning_curve(*learnt)} if history else {}),
    }


def _sources(query_set: CodesSet, sets: Sequence[CodesSet]) -> Mapping[str, str]:
    """Return the digests of the inputs, without their places: a report must not depend on them."""
    split = split_facts(query_set.artifact, [entry.artifact for entry in sets])
    databases = {f"database {number}": entry.artifact.digest for number, entry in enumerate(sets, 1)}
    return {"model": query_set.model, "queries": query_set.artifact.digest, **databases, **split}


def _split_notes(query_set: CodesSet, sets: Sequence[CodesSet]) -> list[str]:
    """List the reasons why the figures are not those of a protocol, and say them on stderr too."""
    notes = split_notes(query_set.artifact, [entry.artifact for entry in sets])
    for text in notes or _learned_notes(query_set):
        _log.warning("warning: %s", text)
    return notes


def _learned_notes(query_set: CodesSet) -> list[str]:
    """Return the warning that the queries were trained on, for stderr only.

    It is not in the report, because it can be given only if the model is at its remembered place.
    """
    with suppress(HHNetError):  # the model was moved or is out of reach
        learned = open_input_version(query_set.artifact, "model").manifest.inputs
        if query_set.artifact.manifest.input("shards").digest in {entry.digest for entry in learned}:
            return [LEARNED_NOTE]
    return []


def _convention_name(settings: EvaluateSettings) -> str:
    """Return the convention in short: `mAP@all, ties=expected, denominator=retrieved, empty=zero`."""
    at = "all" if settings.at is None else settings.at
    name = f"mAP@{at}, ties={settings.ties}, denominator={settings.denominator}, empty={settings.empty}"
    return name if settings.unlabelled == "zero" else f"{name}, unlabelled={settings.unlabelled}"


def _commit_report(
    writer: ArtifactWriter,
    parts: list[Part],
    figures: ReportFigures,
    settings: EvaluateSettings,
    split: SplitPart | None,
) -> Artifact:
    again = figures.reranked
    meta = ReportMeta(
        map=figures.map,
        chance=figures.chance,
        convention=_convention_name(settings),
        precision_at=dict(figures.precision_at),
        bits=figures.bits,
        reranked=RerankedMeta(first=again.first, map=again.map) if again else None,
        protocol=split.name if split else None,
        split=split.digest if split else None,
    )
    return writer.commit(parts, {"queries": figures.queries, "database": figures.database}, meta)


def _evaluate_result(artifact: Artifact, status: str) -> EvaluateResult:
    facts = {**artifact.facts(ReportMeta).as_json(), **artifact.manifest.totals, **report_uris(artifact)}
    return EvaluateResult.of(artifact, status, **facts, queries_searched=_search_times(artifact))


def _search_times(artifact: Artifact) -> list[str]:
    """Return the times when the queries were searched for this report; a rerun that finds the report adds no time."""
    records = closed_records(artifact.store)
    return sorted(str(record["queries_searched"]) for record in records if "queries_searched" in record)
