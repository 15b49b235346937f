"""`hhnet index build`: codes -> a sharded Hamming index, built part by part on Ray, published through a gate."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pydantic import ValidationError

from pipelines.artifacts import Artifact, ArtifactInput, ArtifactWriter, Part, fingerprint, publish_version, versions
from pipelines.cluster.pool import map_items
from pipelines.cluster.progress import stage
from pipelines.cluster.session import ray_session, require_shared_store
from pipelines.codes import CodesSet, CodesShard, open_codes, require_distinct, require_pair
from pipelines.config import Config, result_settings
from pipelines.errors import DamagedArtifact, InputError, WorkFailed
from pipelines.kinds import IndexKind, index_kind
from pipelines.kinds.artifact import (
    ORDINALS,
    ORDINALS_NAME,
    QUANTIZER_NAME,
    part_stem,
)
from pipelines.kinds.gate import check_gate, measured_recall
from pipelines.kinds.parts import PartBuilder, PartTask, codes_of, sample_rows
from pipelines.schema import parquet_bytes, table_of
from pipelines.storage import Store, sha256_of
from pipelines.versions import finished

QUANTIZER = "quantizer"
PROBES = 100
RECALL_AT = 10


def build_index(codes: Sequence[str], out: str, config: Config, publish: bool = True) -> dict[str, Any]:
    """Index the codes artifacts `codes` (in this order) at `out`; publish it as version 1 if it passes the gate.

    Raises FingerprintMismatch where the codes do not belong together, InputError where a tar comes twice or there is
    nothing to index, WorkFailed where the gate finds that the index does not return its own codes.
    """
    sets = _open_all(codes)
    store = Store(out)
    name = fingerprint("index", {"codes": [entry.artifact.digest for entry in sets]}, result_settings(config, "index"))
    artifact = finished(store, "index", name)
    status = "unchanged" if artifact else "done"
    if artifact is None or (publish and not versions(store)):
        require_distinct(sets)
        tasks = plan_parts(sets)
        if artifact is None:
            artifact = _build(_writer(sets, store, name), tasks, sets[0], config)
        if publish and not versions(store):
            check_gate(artifact, tasks, config.index.seed)
            if not publish_version(store, 1, "manifest.json", artifact.digest):
                raise WorkFailed(f"{artifact.uri}: another run published version 1 with another manifest")
            status = "done"
    known = versions(store)
    return {
        "verb": "index build",
        "status": status,
        "uri": artifact.uri,
        "digest": artifact.digest,
        "version": known[-1] if known else None,
        "kind": artifact.manifest.meta["kind"],
        "card": artifact.manifest.meta["card"],
    }


def _open_all(codes: Sequence[str]) -> list[CodesSet]:
    if not codes:
        raise InputError("no codes to index: name at least one codes artifact with --codes")
    sets = [open_codes(uri) for uri in codes]
    for other in sets[1:]:
        require_pair(sets[0], other, classes=True)
    if not any(entry.rows for entry in sets):
        raise InputError(f"{', '.join(entry.artifact.uri for entry in sets)}: there are no codes to index")
    return sets


def plan_parts(sets: Sequence[CodesSet]) -> list[PartTask]:
    """One task per shard, ordinals counted from 0 in the order of the artifacts and of their shards."""
    shards = [(entry, shard) for entry in sets for shard in entry.shards]
    return [_task(ordinal, entry, shard) for ordinal, (entry, shard) in enumerate(shards)]


def _task(ordinal: int, entry: CodesSet, shard: CodesShard) -> PartTask:
    return PartTask(
        ordinal, shard.name, shard.sha256, entry.artifact.uri, entry.artifact.digest, shard.part, entry.bits
    )


def _writer(sets: Sequence[CodesSet], store: Store, name: str) -> ArtifactWriter:
    """The model is named as an input too, so that a search by image finds it without the codes."""
    digests = [entry.artifact.digest for entry in sets]
    inputs = [ArtifactInput(role=f"codes-{n}", kind="codes", digest=digest) for n, digest in enumerate(digests)]
    inputs.append(ArtifactInput(role="model", kind="model", digest=sets[0].model))
    origin = {f"codes-{n}": entry.artifact.uri for n, entry in enumerate(sets)}
    model = next((uri for entry in sets if (uri := entry.artifact.origin("model"))), None)
    return ArtifactWriter(store, "index", name, tuple(inputs), origin | ({"model": model} if model else {}))


def _build(writer: ArtifactWriter, tasks: Sequence[PartTask], first: CodesSet, config: Config) -> Artifact:
    kind = index_kind(config.index.kind)
    count = sum(task.part.rows for task in tasks)
    parameters = kind.parameters(config.index, count)
    receipts = _own_receipts(writer, tasks)
    if kind.sample_size(parameters) and not _built(writer, receipts.get(QUANTIZER)):
        receipts[QUANTIZER] = _train(writer, kind, tasks, parameters, config)
    shared, shared_parts = _shared(writer, receipts.get(QUANTIZER))
    receipts |= _build_parts(writer, tasks, receipts, shared, config)
    parts = [part for receipt in receipts.values() for part in _parts_of(writer, receipt, shared)]
    ordinals = _ordinal_table(tasks)
    parts.append(writer.put_part(ORDINALS_NAME, ordinals, len(tasks)))
    meta: dict[str, Any] = {
        "kind": config.index.kind,
        "parameters": parameters,
        "bits": first.bits,
        "classes": list(first.classes),
        "quantizer_sha256": shared_parts[0].sha256 if shared_parts else None,
    }
    built = sum(part.bytes for part in parts if part.path.startswith("parts/part-"))
    meta["card"] = {"count": count, "bytes_per_code": round(built / count, 3), "recall": 1.0}
    totals = {"codes": count, "shards": len(tasks)}
    if not kind.exact:
        meta["card"] |= measured_recall(writer, parts, totals, meta, tasks, config.index.seed)
    return writer.commit(parts, totals, meta, receipts)


# ---------------------------------------------------------------------------------------------------------- parts


def _build_parts(
    writer: ArtifactWriter,
    tasks: Sequence[PartTask],
    receipts: Mapping[str, Any],
    shared: bytes | None,
    config: Config,
) -> dict[str, dict[str, Any]]:
    """Receipts of the parts that were missing, built side by side."""
    missing = [task for task in tasks if task.part.rows and not _built(writer, receipts.get(part_stem(task.ordinal)))]
    done: dict[str, dict[str, Any]] = {}
    if not missing:
        return done
    arguments = (writer.store.uri, writer.fingerprint, writer.inputs, config.index.kind, shared)
    with ray_session(config), stage("index", len(missing), unit="parts") as advance:
        require_shared_store(writer.store, config)
        pool = map_items(
            PartBuilder, arguments, missing, workers=config.index.workers or _cpus(), label=lambda task: task.shard
        )
        for outcome in pool:
            if outcome.error is not None:
                raise WorkFailed(f"{writer.store.uri}: {outcome.error}; what was built is kept, run again to resume")
            done[part_stem(outcome.item.ordinal)] = outcome.result
            advance(1)
    return done


def _own_receipts(writer: ArtifactWriter, tasks: Sequence[PartTask]) -> dict[str, Any]:
    """The receipts that were put for the quantizer and for these parts."""
    names = {QUANTIZER, *(part_stem(task.ordinal) for task in tasks)}
    return {name: receipt for name, receipt in writer.receipts().items() if name in names}


def _built(writer: ArtifactWriter, receipt: Mapping[str, Any] | None) -> bool:
    """A receipt exists, and so does what it claims."""
    return receipt is not None and all(
        writer.store.size(receipt[name]["path"]) == receipt[name]["bytes"]
        for name in ("part", "keys")
        if name in receipt
    )


def _cpus() -> int:
    import ray  # the session is open by now

    return max(1, int(ray.cluster_resources().get("CPU", 1)))


def _parts_of(writer: ArtifactWriter, receipt: Mapping[str, Any], shared: bytes | None) -> list[Part]:
    """The parts a receipt claims; they must be there, and built from the quantizer at hand."""
    try:
        parts = [Part.model_validate(receipt[name]) for name in ("part", "keys") if name in receipt]
    except ValidationError:
        raise DamagedArtifact(f"{writer.store.uri}: a receipt does not describe its parts") from None
    for part in parts:
        if writer.store.size(part.path) != part.bytes:
            raise DamagedArtifact(
                f"{writer.store.uri}/{part.path} is missing or cut, but its receipt says it was built"
            )
    if "keys" in receipt and receipt.get("quantizer_sha256") != (sha256_of(shared) if shared else None):
        raise DamagedArtifact(f"{writer.store.uri}/{parts[0].path} was built with another quantizer")
    return parts


def _ordinal_table(tasks: Sequence[PartTask]) -> bytes:
    columns = {
        "ordinal": [task.ordinal for task in tasks],
        "shard": [task.shard for task in tasks],
        "shard_sha256": [task.shard_sha256 for task in tasks],
        "codes_digest": [task.codes_digest for task in tasks],
        "rows": [task.part.rows for task in tasks],
    }
    return parquet_bytes(table_of(ORDINALS, columns))


# ------------------------------------------------------------------------------------------------------ quantizer


def _train(
    writer: ArtifactWriter,
    kind: IndexKind,
    tasks: Sequence[PartTask],
    parameters: Mapping[str, int],
    config: Config,
) -> dict[str, Any]:
    """Train what the parts share; its receipt makes a resumed run use the same."""
    drawn = sample_rows(tasks, kind.sample_size(parameters), config.index.seed)
    sample = np.concatenate([codes_of(task)[rows] for task, rows in drawn])
    data = kind.train(sample, parameters, config.index.seed)
    part = writer.put_part(QUANTIZER_NAME, data, parameters.get("nlist", 1))
    return writer.put_receipt(QUANTIZER, {"part": part.model_dump()})


def _shared(writer: ArtifactWriter, receipt: Mapping[str, Any] | None) -> tuple[bytes | None, list[Part]]:
    """The bytes of the quantizer that won, checked."""
    if receipt is None:
        return None, []
    parts = _parts_of(writer, receipt, None)
    data = writer.store.read(parts[0].path)
    if sha256_of(data) != parts[0].sha256:
        raise DamagedArtifact(f"{writer.store.uri}/{parts[0].path} does not match the digest in its receipt")
    return data, parts
