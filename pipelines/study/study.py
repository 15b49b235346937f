"""`hhnet study`: runs a grid of trainings, each encoded and evaluated, and collects them in one table and page.

    grid -> per group: search on validation -> per seed: train -> encode queries and database -> evaluate -> study

It only calls other verbs: each step is a verb's function with an --out of its own below the study's, named by the
fingerprint of its result. So a result is found whichever study made it, a rerun after a kill goes on, and results of
different settings never share a place. Processes that share a store each take a share of the groups.
"""

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, TypeVar

from pipelines.artifacts.commit import ArtifactWriter
from pipelines.artifacts.facts import ModelMeta, ReportMeta, StudyMeta
from pipelines.artifacts.manifest import Artifact, fingerprint
from pipelines.artifacts.parquet import parquet_bytes, read_parquet, table_of_rows
from pipelines.artifacts.result import Result
from pipelines.artifacts.runs import RunLog, closed_records, write_run_record
from pipelines.artifacts.versions import find_finished, open_current
from pipelines.artifacts.words import format_span
from pipelines.cluster.session import kept_ray
from pipelines.config.fingerprint import result_settings
from pipelines.config.settings import Config
from pipelines.console import NOTICE
from pipelines.encode import encode
from pipelines.encode import job as encoding
from pipelines.errors import HHNetError, UsageError, WorkFailed, is_out_of_reach
from pipelines.evaluate import evaluate
from pipelines.ingest.ingest import ingest
from pipelines.ingest.protocols import find_protocol
from pipelines.shards.shards import open_shards
from pipelines.storage import Store, canonical_json
from pipelines.study.forecast import NAME_DIGEST_CHARS, Forecast, forecast_trainings
from pipelines.study.grid import Grid, Group
from pipelines.study.page import report_links, study_page, study_plots
from pipelines.study.results import (
    AXIS_PREFIX,
    SEARCHES,
    Trial,
    cells_table,
    group_chances,
    rank_groups,
    summarise_groups,
)
from pipelines.train import rehead, train

_log = logging.getLogger(__name__)

T = TypeVar("T")

FAILED_NAMED = 3
STUDY_VERSION = 2
"""Version of the study's page. Bump it when the contents of a page change."""


@dataclass(frozen=True)
class Data:
    """The shards that all cells are trained and measured on."""

    train: Artifact
    val: Artifact | None
    query: Artifact
    database: tuple[Artifact, ...]

    def inputs(self) -> dict[str, Artifact]:
        """Return the shards by role."""
        val = {"val": self.val} if self.val else {}
        databases = {f"database-{n}": entry for n, entry in enumerate(self.database)}
        return {"train": self.train, **val, "query": self.query, **databases}


@dataclass(frozen=True)
class Cell:
    """One configuration with its seed, and its outcome; neither model nor error is set where it is missing."""

    group: Group
    seed: int
    config: Config
    model: Artifact | None = None
    report: Artifact | None = None
    error: str | None = None

    @property
    def name(self) -> str:
        """Labels and seed: `recipe=ours, model.bits=64, seed 0`."""
        return f"{self.group.name}, seed {self.seed}"

    @property
    def state(self) -> str:
        """State of the cell: `failed`, `done` or `missing`."""
        return "failed" if self.error else "done" if self.report else "missing"


# ---------------------------------------------------------------------------------------------------------- verb


@dataclass(frozen=True, kw_only=True)
class StudyListing(Result):
    """Every cell with its state, as long as cells are missing; the uri is the study's --out.

    `trainings` are left, with `images` to see (unknown without shards) and `training_seconds` to take at the pace of
    those done here (unknown before the first).
    """

    TABLES = ("states",)

    verb: str = "study"
    status: str = "done"
    dry_run: bool
    cells: int
    done: int
    missing: int
    failed: int
    trainings: int
    images: int | None
    training_seconds: float | None
    states: list[dict[str, Any]]

    def fact(self, name: str, value: Any) -> list[str]:
        """Say why a figure is not known, and that the time is an estimate."""
        if name == "images" and value is None:
            return ["unknown before the shards are made"]
        if name == "training_seconds" and self.trainings:
            return ["unknown before the first training" if value is None else f"about {format_span(value)}"]
        return super().fact(name, value)


@dataclass(frozen=True, kw_only=True)
class StudyResult(Result):
    """The whole study: its page, its table of cells, and the summary over the seeds."""

    HIDDEN = ("summary",)  # shown as ranked rows
    TEXT_ONLY = ("chances",)

    verb: str = "study"
    cells: int
    failed: int
    searches: int
    report: str
    table: str
    summary: list[dict[str, Any]]
    chances: list[float | None]

    def tables(self) -> Iterable[Sequence[Mapping[str, Any]]]:
        """Return the groups, best first."""
        return [rank_groups(self.summary, self.chances)]


def study(
    grid: Grid,
    out: str,
    root: str | None = None,
    share: tuple[int, int] = (1, 1),
    dry_run: bool = False,
    train: Callable[..., object] = train.train,
    encode: Callable[..., object] = encode.encode,
) -> StudyResult | StudyListing:
    """Do the missing steps of a study below `out`, and publish its tables and page when no cell is missing.

    The data are the shards of `run.train`, `run.query`, `run.database` and `run.val`, or those that the study's
    protocol makes from the files in `root`. `share` (i, n) does only every n-th training, from the i-th on. With
    `dry_run` nothing is done. `train` and `encode` are the verbs that a cell calls.

    Raises WorkFailed at the end where cells failed: they are rows with their error, and a rerun tries them again.
    """
    number, shares = share
    data = _open_data(grid, out, root, dry_run)
    turns = [turn % shares for turn in _training_turns(grid)]
    made = {}
    mine = [place for place, turn in enumerate(turns) if turn == number - 1]
    if data is not None and not dry_run:
        total, facts = len(mine) * len(grid.seeds), {"study": grid.description.title, "share": f"{number}/{shares}"}
        with kept_ray(), RunLog(Store(out), "study", grid.base(), total=total, unit="cells", **facts) as log:
            for place in mine:
                group = grid.groups[place]
                groups = f"{place + 1} of {len(grid.groups)}"
                _log.log(NOTICE, "study: group %s: %s", groups, group.name, extra={"group": group.name})
                made[place] = run_group(grid, group, Steps(out, data, train, encode, work=True))
                log.advance(len(grid.seeds), group.name)
    # Look after the own share is done: of several processes the last one then finds no cell missing.
    found_only = Steps(out, data, train, encode, work=False) if data else None
    outcomes = [made.get(place) or run_group(grid, group, found_only) for place, group in enumerate(grid.groups)]
    cells = [cell for found, _ in outcomes for cell in found]
    trials = [trial for _, found in outcomes for trial in found]
    if data is None or dry_run or any(cell.state == "missing" for cell in cells):
        result: StudyResult | StudyListing = _list_cells(out, cells, dry_run, _forecast(grid, cells, data, out))
    else:
        result = _publish_study(grid, out, data, cells, trials)
    if not dry_run:
        _raise_failed_cells(cells, result)
    return result


def _training_turns(grid: Grid) -> list[int]:
    """Return the place of each group's training among all trainings.

    Groups with the same training get the same place, and so the same share; otherwise several shares would train it.
    """
    configs = [grid.config(group, grid.seeds[0], {}) for group in grid.groups]
    marks = [json.dumps(result_settings(config, "model"), sort_keys=True) for config in configs]
    places = {mark: place for place, mark in enumerate(dict.fromkeys(marks))}
    return [places[mark] for mark in marks]


def _open_data(grid: Grid, out: str, root: str | None, dry_run: bool) -> Data | None:
    """Return the shards, which a protocol makes first; None for a dry run without any yet."""
    base, protocol = grid.base(), grid.description.protocol
    named = base.run
    if root is not None:
        if protocol is None:
            remedy = "give --protocol too, or --train, --query, --database"
            raise UsageError(f"--root: the study names no protocol: {remedy}")
        parts = find_protocol(protocol)
        if not dry_run:
            ingest(root, f"{out}/shards", base, protocol=parts)
        where = {part: f"{out}/shards/{part}" for part in parts.parts}
        if dry_run and any(Store(uri).size("manifest.json") is None for uri in where.values()):
            return None
        sources = where["train"], where.get("val"), where["query"], [where[part] for part in parts.database]
    elif named.train and named.query and named.database:
        sources = named.train, named.val, named.query, list(named.database)
    elif dry_run:
        return None
    else:
        hint = f", or --root with the files of {protocol}" if protocol else ""
        raise UsageError(f"the study has no data: give --train, --query and --database{hint}")
    learnt, val, query, database = sources
    opened = partial(open_current, kind="shards")
    return Data(opened(learnt), opened(val) if val else None, opened(query), tuple(map(opened, database)))


# --------------------------------------------------------------------------------------------------------- steps


class Steps:
    """The steps of a cell, each at an --out named by its fingerprint; without `work` it only finds existing results."""

    def __init__(
        self, out: str, data: Data, train: Callable[..., object], encode: Callable[..., object], work: bool
    ) -> None:
        self.out, self.data, self.work = Store(out).uri, data, work
        self._train, self._encode = train, encode

    def make_model(self, config: Config) -> Artifact | None:
        """Train or find the model; cells with rotated models share the training behind them."""
        trained = self._trained(config)
        if trained is None or config.train.rotate == "none":
            return trained
        base = trained
        mark = rehead.plan_rehead(base, self.out, config, self.data.train.uri).fingerprint
        return self._found_or_made("model", mark, lambda uri: rehead.rotate(base.uri, uri, config))

    def _trained(self, config: Config) -> Artifact | None:
        shards, val = self.data.train, self.data.val
        mark, held_out = train.plan_training(shards, val, self.out, config).fingerprint, val.uri if val else None
        return self._found_or_made("model", mark, lambda uri: self._train(shards.uri, uri, config, val=held_out))

    def make_codes(self, shards: Artifact, model: Artifact, config: Config) -> Artifact | None:
        """Encode the shards, or find the codes."""
        mark = encoding.plan_encode(shards, model, self.out, config).fingerprint
        return self._found_or_made("codes", mark, lambda uri: self._encode(shards.uri, model.uri, uri, config))

    def make_report(self, model: Artifact, config: Config) -> Artifact | None:
        """Encode and evaluate, or find the report."""
        found = [self.make_codes(shards, model, config) for shards in (self.data.query, *self.data.database)]
        codes = [entry for entry in found if entry is not None]
        if len(codes) < len(found):
            return None
        queries, *database = codes
        mark = evaluate.report_fingerprint(queries.digest, [entry.digest for entry in database], config)
        uris = [entry.uri for entry in database]
        return self._found_or_made("report", mark, lambda uri: evaluate.evaluate(queries.uri, uris, uri, config))

    def _found_or_made(self, kind: str, mark: str, make: Callable[[str], object]) -> Artifact | None:
        """Find the artifact, or make it; record a failure, so that a look can tell failed from missing."""
        uri, failures = f"{self.out}/{kind}/{mark[:NAME_DIGEST_CHARS]}", f"failures/{kind}-{mark[:NAME_DIGEST_CHARS]}"
        found, store = find_finished(Store(uri), kind, mark), Store(self.out)
        if found is not None:
            return found
        if not self.work:
            if noted := store.names(failures):
                raise WorkFailed(json.loads(store.read(max(noted)))["error"])
            return None
        try:
            make(uri)
        except HHNetError as error:
            if not is_out_of_reach(error):
                number = len(store.names(failures)) + 1  # if two shares fail at once, one note is enough
                store.put(f"{failures}/{number:06d}.json", canonical_json({"error": str(error)}))
            raise
        return open_current(uri, kind)


def run_step(step: Callable[[], T]) -> tuple[T | None, str | None]:
    """Run a step; return its result or its one-line error. Out-of-reach errors are raised: the cell is not at fault."""
    try:
        return step(), None
    except HHNetError as error:
        if is_out_of_reach(error):
            raise
        return None, str(error)


def run_group(grid: Grid, group: Group, steps: Steps | None) -> tuple[list[Cell], list[Trial]]:
    """Run the cells of a group with the candidate that validation chose; return them and the trials of its search."""
    trials, chosen = choose_candidate(grid, group, steps)
    cells = [Cell(group, seed, grid.config(group, seed, chosen)) for seed in grid.seeds]
    if trials and all(trial.error for trial in trials):
        return [replace(cell, error=f"no candidate trained: {trials[0].error}") for cell in cells], trials
    if steps is None or (trials and not any(trial.chosen for trial in trials)):
        return cells, trials
    return [_run_cell(cell, steps) for cell in cells], trials


def _run_cell(cell: Cell, steps: Steps) -> Cell:
    report = None
    model, error = run_step(partial(steps.make_model, cell.config))
    if model is not None:
        report, error = run_step(partial(steps.make_report, model, cell.config))
    if error is not None:
        _log.info("given up: %s: %s", cell.name, error, extra={"cell": cell.name, "error": error})
    return replace(cell, model=model, report=report, error=error)


def choose_candidate(grid: Grid, group: Group, steps: Steps | None) -> tuple[list[Trial], Mapping[str, Any]]:
    """Train each candidate with the first seed, and choose the best validation mAP, the first of equals.

    A candidate that fails, for example by a rate so high that the loss is not finite, is not chosen. While one is
    missing, none is chosen.
    """
    if not grid.candidates or steps is None:
        return [], {}
    seed, tried = grid.seeds[0], []
    for candidate in grid.candidates:
        model, error = run_step(partial(steps.make_model, grid.config(group, seed, candidate.settings)))
        if error is not None:
            facts = {"group": group.name, "candidate": candidate.label, "error": error}
            _log.info("given up: %(group)s with %(candidate)s: %(error)s", facts, extra=facts)
        tried.append((candidate, model, error))
    whole = all(model or error for _, model, error in tried)
    maps = [model.facts(ModelMeta).metrics.map if model else None for _, model, _ in tried]
    best = max((value for value in maps if value is not None), default=None) if whole else None
    place = maps.index(best) if best is not None else None
    trials = [
        Trial(group.name, seed, candidate.label, value, model.digest if model else None, number == place, error)
        for number, ((candidate, model, error), value) in enumerate(zip(tried, maps, strict=True))
    ]
    return trials, grid.candidates[place].settings if place is not None else {}


# ------------------------------------------------------------------------------------------------------- publish


def _publish_study(grid: Grid, out: str, data: Data, cells: Sequence[Cell], trials: Sequence[Trial]) -> StudyResult:
    """Publish the study artifact; its fingerprint covers its description, its reports, and the failures."""
    inputs = data.inputs()
    for number, cell in enumerate(cells):
        made = {"model": cell.model, "report": cell.report}
        inputs |= {f"{kind}-{number}": entry for kind, entry in made.items() if entry is not None}
    description = grid.description.model_dump(mode="json")
    facts = {
        "page": STUDY_VERSION,
        "study": description,
        "cells": [[cell.group.name, cell.seed, cell.error] for cell in cells],
        "searches": [asdict(trial) for trial in trials],
    }
    mark = fingerprint("study", {role: entry.digest for role, entry in inputs.items()}, facts)
    store = Store(f"{Store(out).uri}/study/{mark[:NAME_DIGEST_CHARS]}")
    artifact = find_finished(store, "study", mark)
    if artifact is not None:
        return _study_result(artifact, "unchanged")
    writer = ArtifactWriter.of(store, "study", mark, inputs)
    table = cells_table(list(grid.axes), _cell_rows(cells, data))
    summary = summarise_groups(table)
    drawn = study_plots(summary)
    sources = {role: entry.digest for role, entry in data.inputs().items()}
    rows, chances = table.to_pylist(), group_chances(table)
    links = report_links([cell.report for cell in cells if cell.report is not None], out)
    page = study_page(grid.description, rows, summary, chances, trials, drawn, sources, links)
    files = {
        "cells.parquet": parquet_bytes(table),
        "searches.parquet": parquet_bytes(table_of_rows(SEARCHES, trials)),
        "study.json": canonical_json(description),
        "summary.json": canonical_json(summary),
        "report.html": page.encode(),
        **{f"{name}.png": image for name, image in drawn.items()},
    }
    parts = [writer.put_part(name, content, len(cells)) for name, content in sorted(files.items())]
    totals = {"cells": len(cells), "failed": sum(cell.error is not None for cell in cells), "searches": len(trials)}
    artifact = writer.commit(parts, totals, StudyMeta(title=grid.description.title, axes=tuple(grid.axes)))
    write_run_record(artifact.store, "study", {"fingerprint": mark, "seconds_of": _training_seconds(cells)})
    return _study_result(artifact, "done")


def _cell_rows(cells: Sequence[Cell], data: Data) -> list[dict[str, Any]]:
    """Return the cells as rows of the table."""
    # They import torch, which a study that is refused or listed can do without.
    from hhnet.nn.flops import forward_flops
    from pipelines.encode.encoder import Encoder
    from pipelines.train.batches import TrainData

    train_set, val_set = open_shards(data.train.uri), open_shards(data.val.uri) if data.val else None
    known: dict[str, int] = {}
    rows = []
    for cell in cells:
        config, axes = cell.config, {AXIS_PREFIX + name: label for name, label in cell.group.labels.items()}
        row: dict[str, Any] = {"group": cell.group.name, "seed": cell.seed, "error": cell.error, **axes}
        model = cell.model.facts(ModelMeta) if cell.model else None
        bits = model.bits if model else config.model.bits  # a class index has fewer bits
        row |= {"backbone": config.model.backbone, "bits": bits, "loss": config.train.loss}
        row |= {"image_size": config.data.image_size, "lr": config.train.lr}
        if cell.model is not None and model is not None:
            samples = TrainData.make(train_set, val_set, config).samples
            row |= {"model": cell.model.digest, "val_map": model.metrics.map, "steps": model.metrics.steps}
            row |= {"images": config.train.epochs * samples, "parameters": cell.model.manifest.totals["parameters"]}
            head = model.rotation.rotated if model.rotation else None
            # Cells with one network and input size share the count, since counting opens the model.
            shape = json.dumps([config.model.model_dump(mode="json"), config.data.image_size, head])
            if shape not in known:
                known[shape] = forward_flops(Encoder.open(cell.model).model, config.data.image_size)
            row["flops"] = known[shape]
        if cell.report is not None:
            meta = cell.report.facts(ReportMeta)
            row |= {"report": cell.report.digest, "map": meta.map, "chance": meta.chance}
        rows.append(row)
    return rows


def _training_seconds(cells: Sequence[Cell]) -> dict[str, float]:
    """Return the seconds that the training of each cell took, over all its recorded runs."""
    found = {}
    for cell in cells:
        records = closed_records(cell.model.store) if cell.model else []
        found[cell.name] = sum(float(record.get("seconds", 0)) for record in records)
    return found


def _forecast(grid: Grid, cells: Sequence[Cell], data: Data | None, out: str) -> Forecast:
    """Return what is left of the study's trainings: candidates with the first seed, and cells."""
    tried = [grid.config(group, grid.seeds[0], one.settings) for group in grid.groups for one in grid.candidates]
    # With a search the cell of the first seed is the training of the chosen candidate.
    trained = [cell.config for cell in cells if not grid.candidates or cell.seed != grid.seeds[0]]
    return forecast_trainings([*tried, *trained], (data.train, data.val) if data else None, out)


def _list_cells(out: str, cells: Sequence[Cell], dry_run: bool, forecast: Forecast) -> StudyListing:
    """Return every cell with its state, for a study that is not complete yet."""
    shown = [{"cell": cell.name, "state": cell.state} for cell in cells]
    counts = Counter(cell.state for cell in cells)
    return StudyListing(
        uri=Store(out).uri,
        digest=None,
        dry_run=dry_run,
        cells=len(cells),
        done=counts["done"],
        missing=counts["missing"],
        failed=counts["failed"],
        trainings=forecast.trainings,
        images=forecast.images,
        training_seconds=forecast.seconds,
        states=shown,
    )


def _study_result(artifact: Artifact, status: str) -> StudyResult:
    manifest = artifact.manifest
    return StudyResult.of(
        artifact,
        status,
        **manifest.totals,
        report=f"{artifact.uri}/{manifest.part('report.html').path}",
        table=f"{artifact.uri}/{manifest.part('cells.parquet').path}",
        summary=json.loads(artifact.read(manifest.part("summary.json"))),
        chances=group_chances(read_parquet(artifact.read(manifest.part("cells.parquet")), artifact.uri)),
    )


def _raise_failed_cells(cells: Sequence[Cell], result: Result) -> None:
    """Raise WorkFailed, naming them, where cells failed."""
    failed = [cell for cell in cells if cell.error]
    if failed:
        named = "; ".join(f"{cell.name}: {cell.error}" for cell in failed[:FAILED_NAMED])
        more = f"; and {len(failed) - FAILED_NAMED} more" if len(failed) > FAILED_NAMED else ""
        where = f", see {result.report}" if isinstance(result, StudyResult) else ""
        raise WorkFailed(f"{len(failed)} of {len(cells)} cells failed ({named}{more}){where}; a rerun tries them again")
