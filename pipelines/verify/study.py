"""Proves a study: every figure in its tables equals the one in the report or model that its row names by digest."""

import json
from typing import Any

from pipelines.artifacts.facts import ModelCard, ModelMeta, ReportMeta, StudyMeta
from pipelines.artifacts.manifest import Artifact
from pipelines.artifacts.tables import read_table
from pipelines.artifacts.versions import open_input_version
from pipelines.errors import DamagedArtifact, InputError, StoreUnavailable, format_count
from pipelines.study.results import cells_schema, summarise_groups
from pipelines.verify.findings import Findings


def prove_study(findings: Findings) -> None:
    """Check that rows have the figures of their inputs, the summary follows from them, and the totals count them."""
    artifact = findings.artifact
    inputs = {entry.digest: entry for entry in findings.inputs()}
    named = {(entry.kind, entry.digest) for entry in artifact.manifest.inputs}
    with findings.guard():
        part = artifact.manifest.part("cells.parquet")
        where = f"{artifact.uri}/{part.path}"
        cells = read_table(artifact.store, part, cells_schema(list(artifact.facts(StudyMeta).axes)))
        rows = cells.to_pylist()
        for row in rows:
            _prove_row(findings, row, named, inputs, where)
        failed = sum(row["error"] is not None for row in rows)
        totals = {name: artifact.manifest.totals.get(name) for name in ("cells", "failed")}
        findings.require(
            totals == {"cells": len(rows), "failed": failed},
            f"{artifact.uri}: the totals say {totals}, the table has {len(rows)} cells of which {failed} failed",
        )
        kept = _read_json_part(artifact, "summary.json")
        findings.require(
            kept == summarise_groups(cells), f"{artifact.uri}: summary.json is not the summary of its cells"
        )
        findings.checks.append(
            f"{format_count(len(rows), 'cell')} with the figures of the reports and models they name"
        )


def _prove_row(
    findings: Findings, row: dict[str, Any], named: set[tuple[str, str]], inputs: dict[str, Artifact], where: str
) -> None:
    cell = f"{where}: the row of {row['group']}, seed {row['seed']}"
    findings.require((row["error"] is None) == (row["report"] is not None), f"{cell} has neither report nor error")
    for kind in ("model", "report"):
        if row[kind] is None:
            findings.require(kind != "report" or row["map"] is None, f"{cell} has a mAP, but names no report")
            continue
        findings.require((kind, row[kind]) in named, f"{cell} names a {kind} that is not an input")
        artifact = inputs.get(row[kind])
        if artifact is None:
            continue
        if kind == "report" and _model_of(artifact) not in (None, row["model"]):
            findings.note_problem(f"{cell} names a report of another model than its own")
        told = _report_figures(artifact) if kind == "report" else _model_figures(artifact)
        for name, value in told.items():
            findings.require(
                row[name] == value, f"{cell} says {name} {row[name]}, but {kind} {artifact.uri} says {value}"
            )


def _model_of(report: Artifact) -> str | None:
    """Return the digest of the model behind a report's codes, or None where its queries are out of reach."""
    try:
        return open_input_version(report, "queries").manifest.input("model").digest
    except (InputError, StoreUnavailable):
        return None


def _report_figures(report: Artifact) -> dict[str, Any]:
    meta = report.facts(ReportMeta)
    return {"map": meta.map, "chance": meta.chance, "bits": meta.bits}


def _model_figures(model: Artifact) -> dict[str, Any]:
    card = ModelCard.of(model)
    meta = model.facts(ModelMeta)
    return {
        "val_map": meta.metrics.map,
        "steps": meta.metrics.steps,
        "parameters": model.manifest.totals.get("parameters"),
        "bits": meta.bits,
        "backbone": card.backbone,
        "loss": card.loss,
    }


def _read_json_part(artifact: Artifact, name: str) -> Any:
    try:
        return json.loads(artifact.read(artifact.manifest.part(name)))
    except ValueError:
        raise DamagedArtifact(f"{artifact.uri}: {name} is not JSON") from None
