"""`hhnet index build`: codes -> a sharded Hamming index, built part by part on Ray, published through a gate."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipelines.artifacts.commit import ArtifactWriter, list_versions, mismatch
from pipelines.artifacts.facts import IndexMeta, PartReceipt, QuantizerReceipt
from pipelines.artifacts.manifest import Artifact, ArtifactInput, fingerprint, open_artifact, read_identity
from pipelines.artifacts.result import Result
from pipelines.artifacts.runs import RunLog, write_run_record
from pipelines.artifacts.tables import REAL_CODES
from pipelines.artifacts.versions import find_finished, missing_paths, publish_manifest
from pipelines.cluster.ray_pool import Pool, ray_pool
from pipelines.cluster.submit import on_cluster
from pipelines.config.fingerprint import result_settings
from pipelines.config.settings import Config
from pipelines.encode.codes import (
    CodesSet,
    open_codes,
    renumbering,
    require_distinct_tars,
    require_pair,
    unite_classes,
)
from pipelines.errors import DamagedArtifact, FingerprintMismatch, InputError
from pipelines.index.gate import GateFigures
from pipelines.index.kinds import IndexKind, index_kind, kind_names, require_index_kind
from pipelines.index.layout import NO_PART, ORDINALS_NAME, QUANTIZER_NAME
from pipelines.index.parts import PartTask, ShardSource, gather_parts, read_shard_codes, sample_rows
from pipelines.index.planner import Plan, plan_kind
from pipelines.index.pool import (
    IndexResult,
    build_parts,
    card_of,
    gated_meta,
    machine_facts,
    measure_index,
    ordinal_table,
    pass_gate,
    require_parts_of,
    source_of,
    totals_of,
)
from pipelines.storage import Store, sha256_of

QUANTIZER = "quantizer"

Planner = Callable[[Sequence[PartTask], Config], Plan]
"""Function that chooses the kind of an index; by default `plan_kind`."""


@dataclass(frozen=True, kw_only=True)
class BuildResult(IndexResult):
    """The built index. If the planner chose its kind in this run, also the reason and the predictions."""

    HIDDEN = ("kinds",)  # shown before any work

    verb: str = "index build"
    why: str | None = None
    kinds: list[dict[str, Any]] | None = None
    sample: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class PlannedResult(Result):
    """The kind that the planner would choose, and the kind that a build at this root would keep."""

    HIDDEN = ("kinds",)  # shown before any work

    verb: str = "index build"
    status: str = "planned"
    kind: str
    begun_as: str | None
    why: str
    kinds: list[dict[str, Any]]
    sample: dict[str, Any]


@on_cluster("index build")
def build_index(
    codes: Sequence[str],
    out: str,
    config: Config,
    publish: bool = True,
    dry_run: bool = False,
    pool: Pool = ray_pool,
    plan: Planner = plan_kind,
) -> BuildResult | PlannedResult:
    """Index the codes artifacts `codes`, in this order, at `out`; publish version 1 if it passes the gate.

    An index that was built before stays unchanged, at its present version. For the kind `auto`, a rerun keeps the kind
    that `out` was begun with, and a first run asks the planner; with `dry_run` nothing is built or written. Raises
    FingerprintMismatch where the codes do not belong together, ConfigError for an unknown kind or if no kind keeps
    within the planner's budget, InputError where a tar comes twice or there is nothing to index, WorkFailed where the
    gate finds less than `index.gate` asks for.
    """
    require_index_kind(config.index.kind, "auto")
    sets = _open_all(codes)
    store = Store(out)
    if dry_run:
        return _dry_run(sets, store, config, plan)
    chosen: dict[str, Any] = {}
    if config.index.kind == "auto":
        config, chosen = _choose(sets, store, config, plan)
    name = _fingerprint(sets, config)
    artifact, known = find_finished(store, "index", name), list_versions(store)
    status = "unchanged" if artifact else "done"
    if artifact is None or (publish and not known):
        artifact = _build_and_publish(sets, store, name, artifact, publish, config, pool)
        known, status = list_versions(store), "done"
    if status == "done" and known and known != [1] and (artifact := find_finished(store, "index", name)) is None:
        raise DamagedArtifact(
            f"{store.uri}: version {known[-1]} lacks parts that were not built from these codes alone: roll back to a "
            "whole version, or build anew to another --out"
        )
    return BuildResult.of(artifact, status, version=known[-1] if known else None, **chosen)


def _build_and_publish(
    sets: Sequence[CodesSet],
    store: Store,
    name: str,
    artifact: Artifact | None,
    publish: bool,
    config: Config,
    pool: Pool,
) -> Artifact:
    """Build the missing parts of the index, and publish version 1 if asked for and none exists."""
    figures = None
    sources: list[ShardSource] = []
    if artifact is None:
        require_distinct_tars(sets)
        sources = list_sources(sets)
    tasks = gather_parts(sources, config.index.part_codes)
    writer = _index_writer(sets, store, name, config)
    with RunLog(store, "index build", config, fingerprint=name, total=len(tasks), unit="parts") as log:
        if artifact is None:
            artifact, figures = _build_index(writer, sources, tasks, sets, config, log, pool)
        if publish and not list_versions(store):
            pass_gate(artifact, figures or measure_index(artifact, config), config, log)
            publish_manifest(artifact, "manifest.json", 1)
    return artifact


def _open_all(codes: Sequence[str]) -> list[CodesSet]:
    if not codes:
        raise InputError("no codes to index: name at least one codes artifact with --codes")
    sets = [open_codes(uri) for uri in codes]
    for other in sets[1:]:
        require_pair(sets[0], other, one_index=True)
    if not any(entry.rows for entry in sets):
        raise InputError(f"{', '.join(entry.artifact.uri for entry in sets)}: there are no codes to index")
    return sets


def list_sources(sets: Sequence[CodesSet]) -> list[ShardSource]:
    """Return the shards to index; ordinals count from 0 in the order of the artifacts and of their shards."""
    classes, sources = _classes(sets), list[ShardSource]()
    for entry in sets:
        class_ids = renumbering(classes, entry.classes)
        sources += [source_of(n, entry, shard, class_ids) for n, shard in enumerate(entry.shards, len(sources))]
    return sources


def plan_parts(sets: Sequence[CodesSet], config: Config) -> list[PartTask]:
    """Return the parts of a new index of these codes."""
    return gather_parts(list_sources(sets), config.index.part_codes)


def _classes(sets: Sequence[CodesSet]) -> tuple[str, ...]:
    return unite_classes(*(entry.classes for entry in sets))


# ----------------------------------------------------------------------------------------------------------- auto


def _fingerprint(sets: Sequence[CodesSet], config: Config) -> str:
    return fingerprint("index", {"codes": [entry.artifact.digest for entry in sets]}, result_settings(config, "index"))


def _of_kind(config: Config, kind: str) -> Config:
    return config.model_copy(update={"index": config.index.model_copy(update={"kind": kind})})


def _dry_run(sets: Sequence[CodesSet], store: Store, config: Config, plan: Planner) -> PlannedResult:
    """Return the planner's choice; `begun_as` is the kind that a build at this root would keep."""
    require_distinct_tars(sets)
    begun, chosen = kind_begun_with(sets, store, config), plan(plan_parts(sets, config), config)
    return PlannedResult(uri=store.uri, digest=None, kind=chosen.kind, begun_as=begun, **chosen.facts())


def _choose(sets: Sequence[CodesSet], store: Store, config: Config, plan: Planner) -> tuple[Config, dict[str, Any]]:
    """Return the settings with a kind in place of `auto`, and the reason.

    The kind that the root was begun with comes first, else the planner's choice. A second measurement could choose
    another kind, so the choice has to be remembered. identity.json does that: it is put before any work and holds a
    fingerprint that only the chosen kind has. The first of several runs wins.
    """
    facts: dict[str, Any] = {}
    if (kind := kind_begun_with(sets, store, config)) is None:
        require_distinct_tars(sets)
        chosen = plan(plan_parts(sets, config), config)
        with suppress(FingerprintMismatch):  # another run began the root meanwhile
            begun = _of_kind(config, chosen.kind)
            _index_writer(sets, store, _fingerprint(sets, begun), begun)
        kind, facts = kind_begun_with(sets, store, config), chosen.facts()
        write_run_record(store, "index plan", {"chosen": chosen.kind, "machine": machine_facts(), **facts}, config)
    assert kind is not None, "the root was begun"
    return _of_kind(config, kind), facts


def kind_begun_with(sets: Sequence[CodesSet], store: Store, config: Config) -> str | None:
    """Return the kind that the root was begun with, or None where it was not begun.

    Raises FingerprintMismatch where other codes or settings began it.
    """
    try:
        held, name = read_identity(store)
    except FileNotFoundError:
        if store.size("manifest.json") is None:
            return None
        held, name = "index", open_artifact(store, "index").manifest.fingerprint
    for kind in kind_names():
        if name == _fingerprint(sets, _of_kind(config, kind)):
            return kind
    settings = {name: value for name, value in result_settings(config, "index").items() if name != "index.kind"}
    raise mismatch(store, (held, name), "index", settings, *_index_inputs(sets))


def _index_inputs(sets: Sequence[CodesSet]) -> tuple[tuple[ArtifactInput, ...], dict[str, str]]:
    """Return the inputs of the index, the codes and their model, and the place of each by role.

    With the model among the inputs, a search by image finds it without the codes.
    """
    digests = [entry.artifact.digest for entry in sets]
    inputs = [ArtifactInput(role=f"codes-{n}", kind="codes", digest=digest) for n, digest in enumerate(digests)]
    inputs.append(ArtifactInput(role="model", kind="model", digest=sets[0].model))
    origin = {f"codes-{n}": entry.artifact.uri for n, entry in enumerate(sets)}
    model = next((uri for entry in sets if (uri := entry.artifact.origin("model"))), None)
    return tuple(inputs), origin | ({"model": model} if model else {})


def _index_writer(sets: Sequence[CodesSet], store: Store, name: str, config: Config) -> ArtifactWriter:
    return ArtifactWriter(store, "index", name, *_index_inputs(sets), result_settings(config, "index"))


def _build_index(
    writer: ArtifactWriter,
    sources: Sequence[ShardSource],
    tasks: Sequence[PartTask],
    sets: Sequence[CodesSet],
    config: Config,
    log: RunLog,
    pool: Pool,
) -> tuple[Artifact, GateFigures]:
    kind = index_kind(config.index.kind)
    count = sum(task.rows for task in tasks)
    parameters = kind.parameters(config.index, count)
    trained = writer.receipts(QuantizerReceipt, {QUANTIZER}).get(QUANTIZER)
    if kind.sample_size(parameters) and (not trained or missing_paths(writer.store.entries("parts"), trained.parts)):
        trained = _train(writer, kind, sources, parameters, config)
    shared = _shared(writer, trained) if trained else None
    receipts: dict[str, PartReceipt | QuantizerReceipt] = {QUANTIZER: trained} if trained else {}
    receipts |= build_parts(writer, config.index.kind, parameters, tasks, shared, config, log, pool)
    there = writer.store.entries("parts")
    parts = [part for receipt in receipts.values() for part in require_parts_of(writer, receipt, shared, there)]
    numbers = {source.ordinal: task.number for task in tasks for source in task.sources}
    shards = [source.placed(numbers.get(source.ordinal, NO_PART)) for source in sources]
    parts.append(writer.put_part(ORDINALS_NAME, ordinal_table(shards), len(shards)))
    meta = IndexMeta(
        kind=config.index.kind,
        parameters=parameters,
        part_codes=config.index.part_codes,
        bits=sets[0].bits,
        classes=_classes(sets),
        quantizer_sha256=trained.part.sha256 if trained else None,
        card=card_of(parts, count),
        real_codes=REAL_CODES if sets[0].real_codes else None,
    )
    totals = totals_of(shards, count)
    figures = measure_index(writer.draft(parts, totals, meta, receipts), config)
    return writer.commit(parts, totals, gated_meta(meta, figures), receipts), figures


# ------------------------------------------------------------------------------------------------------ quantizer


def _train(
    writer: ArtifactWriter,
    kind: IndexKind,
    sources: Sequence[ShardSource],
    parameters: Mapping[str, int],
    config: Config,
) -> QuantizerReceipt:
    """Train the quantizer that the parts share; with its receipt a resumed run uses the same one."""
    drawn = sample_rows(sources, kind.sample_size(parameters), config.index.seed)
    sample = np.concatenate([read_shard_codes(source)[rows] for source, rows in drawn])
    data = kind.train(sample, parameters, config.index.seed)
    part = writer.put_part(QUANTIZER_NAME, data, parameters.get("nlist", 1))
    return writer.put_receipt(QUANTIZER, QuantizerReceipt(part=part))


def _shared(writer: ArtifactWriter, receipt: QuantizerReceipt) -> bytes:
    """Return the bytes of the quantizer that the receipt names, checked against their digest."""
    (part,) = require_parts_of(writer, receipt, None, writer.store.entries("parts"))
    data = writer.store.read(part.path)
    if sha256_of(data) != part.sha256:
        raise DamagedArtifact(f"{writer.store.uri}/{part.path} does not match the digest in its receipt")
    return data
