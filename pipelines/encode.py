"""Encode: shards and a model to packed codes in Parquet, one part per shard, on a pool of Ray workers.

`encode_shard` does one shard without Ray; the rest hands out shards, counts attempts and publishes.
"""

import json
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.artifacts import (
    Artifact,
    ArtifactInput,
    ArtifactWriter,
    Part,
    fingerprint,
    open_artifact,
    write_run_record,
)
from pipelines.cluster.pool import map_items
from pipelines.cluster.progress import stage
from pipelines.cluster.session import pool_size, ray_session, require_shared_store, wait_for
from pipelines.config import Config, result_settings
from pipelines.encoder import ENCODER_VERSION, Encoded, Encoder, read_model_card
from pipelines.errors import Degraded
from pipelines.images import ImageReject
from pipelines.schema import REJECTS, Reason, codes_schema, parquet_bytes, table_of
from pipelines.shards import Record, Shard, ShardSet, open_shards
from pipelines.storage import Store


@dataclass(frozen=True)
class ShardCodes:
    """One encoded shard as bytes: its codes part and, where there are rejects, their table."""

    codes: bytes
    rows: int
    rejects: bytes | None
    rejected: int
    seconds: dict[str, float]


def encode_shard(
    encoder: Encoder, shards: ShardSet, shard: Shard, schema: pa.Schema, batch_size: int, threads: int
) -> ShardCodes:
    """Encode one shard; samples = rows + rejected, always."""
    carried = schema.names[5:]
    samples = shards.read(shard, metadata=bool(carried))
    encoded = encoder.encode_samples(samples, batch_size, threads)
    columns = _columns(encoded, carried)
    rejects = [(record, reject) for record, reject in encoded.rejects]
    return ShardCodes(
        parquet_bytes(table_of(schema, columns)),
        len(encoded.kept),
        rejects_bytes(rejects) if rejects else None,
        len(rejects),
        encoded.seconds,
    )


def _columns(encoded: Encoded, carried: list[str]) -> dict[str, Any]:
    records = [sample.record for sample in encoded.kept]
    metadata = [json.loads(sample.metadata) if sample.metadata else {} for sample in encoded.kept]
    return {
        "key": [record.key for record in records],
        "shard": [record.shard for record in records],
        "row": [record.row for record in records],
        "code": [row.tobytes() for row in np.ascontiguousarray(encoded.codes)],
        "labels": [list(record.labels) for record in records],
        **{name: [_text(fields.get(name)) for fields in metadata] for name in carried},
    }


def _text(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)


def rejects_bytes(rejects: list[tuple[Record, ImageReject]]) -> bytes:
    """The rejects table of one shard as Parquet."""
    columns = {
        "key": [record.key for record, _ in rejects],
        "shard": [record.shard for record, _ in rejects],
        "row": [record.row for record, _ in rejects],
        "stage": ["encode"] * len(rejects),
        "reason": [str(reject.reason) for _, reject in rejects],
        "detail": [reject.detail for _, reject in rejects],
    }
    return parquet_bytes(table_of(REJECTS, columns))


class ShardEncoder:
    """One Ray worker: a model in memory, shards in, receipts out."""

    def __init__(self, job: "EncodeJob") -> None:
        self.job = job
        self.shards = open_shards(job.shards)
        self.encoder = Encoder.open(job.model)
        self.writer = job.writer()

    def run(self, name: str) -> dict[str, Any]:
        """Encode a shard and put its part and receipt; returns the timings."""
        shard = self.shards.shard(name)
        encode = self.job.config.encode
        done = encode_shard(
            self.encoder, self.shards, shard, self.job.schema, encode.batch_size, self.job.config.data.workers
        )
        begun = time.perf_counter()
        publish_shard(self.writer, shard, done)
        return {
            **done.seconds,
            "write": time.perf_counter() - begun,
            "samples": shard.rows,
            "rejects": done.rejected,
        }


def publish_shard(writer: ArtifactWriter, shard: Shard, done: ShardCodes) -> dict[str, Any]:
    """Put a shard's part and rejects, then claim it with a receipt; the first receipt wins."""
    part = writer.put_part(f"{shard.stem}.parquet", done.codes, done.rows)
    rejects = (
        writer.put_part(f"{shard.stem}.parquet", done.rejects, done.rejected, folder="rejects")
        if done.rejects
        else None
    )
    return writer.put_receipt(
        shard.stem,
        {
            "shard": shard.name,
            "shard_sha256": shard.part.sha256,
            "samples": shard.rows,
            "part": part.model_dump(),
            "rejects": rejects.model_dump() if rejects else None,
        },
    )


@dataclass(frozen=True)
class EncodeJob:
    """What every worker of one encoding needs to know; plain values that travel to other processes."""

    shards: str
    model: str
    out: str
    fingerprint: str
    inputs: tuple[ArtifactInput, ...]
    schema: pa.Schema
    config: Config

    def writer(self) -> ArtifactWriter:
        """The writer at the job's root."""
        origin = {"shards": self.shards, "model": self.model}
        return ArtifactWriter(Store(self.out), "codes", self.fingerprint, self.inputs, origin)


def plan_job(shards: Artifact, model: Artifact, out: str, config: Config) -> EncodeJob:
    """Name the result: its fingerprint, inputs and schema."""
    bits = int(read_model_card(model)["bits"])
    settings = {**result_settings(config, "codes"), "encoder": ENCODER_VERSION}
    mark = fingerprint("codes", {"shards": shards.digest, "model": model.digest}, settings)
    inputs = (
        ArtifactInput(role="shards", kind="shards", digest=shards.digest),
        ArtifactInput(role="model", kind="model", digest=model.digest),
    )
    carried = dict.fromkeys(config.encode.carry, pa.string())
    schema = codes_schema(bits, mark, shards.manifest.meta["classes"], carried)
    return EncodeJob(shards.uri, model.uri, Store(out).uri, mark, inputs, schema, config)


def encode(shards: str, model: str, out: str, config: Config, allow_degraded: bool = False) -> dict[str, Any]:
    """Encode all samples of a shards artifact; a rerun does only what is missing.

    Returns verb, status (`done`, `unchanged`, `degraded`), uri, digest, samples, codes, rejects and, unless
    nothing was done, images_per_second. Raises Degraded when more than `encode.reject_budget` was rejected and
    that was not allowed.
    """
    begun = time.monotonic()
    opened = open_shards(shards)
    job = plan_job(opened.artifact, open_artifact(model, "model"), out, config)
    writer = job.writer()
    missing = [shard for shard in opened.shards if not _is_done(writer, shard)]
    committed = writer.committed()
    runs = _encode_missing(job, writer, missing) if missing else []
    artifact = committed or _commit(job, writer, opened, allow_degraded)
    totals = artifact.manifest.totals
    status = "degraded" if _over_budget(totals, config) else "unchanged" if committed and not missing else "done"
    result = {"verb": "encode", "status": status, "uri": artifact.uri, "digest": artifact.digest, **totals}
    if runs:
        record = _run_record(job, runs, time.monotonic() - begun)
        write_run_record(artifact.store, record)
        result |= {"images_per_second": record["images_per_second"], "shares": record["shares"]}
    return result


def _is_done(writer: ArtifactWriter, shard: Shard) -> bool:
    """A receipt exists and the bytes it promises are still there."""
    path = f"receipts/{shard.stem}.json"
    if writer.store.size(path) is None:
        return False
    receipt = json.loads(writer.store.read(path))
    parts = [Part.model_validate(entry) for entry in (receipt["part"], receipt["rejects"]) if entry]
    return all(writer.store.size(part.path) == part.bytes for part in parts)


def _encode_missing(job: EncodeJob, writer: ArtifactWriter, missing: list[Shard]) -> list[dict[str, Any]]:
    by_name = {shard.name: shard for shard in missing}
    samples = sum(shard.rows for shard in missing)
    runs = []
    with ray_session(job.config):
        require_shared_store(writer.store, job.config)
        workers, gpus = pool_size(job.config.encode.workers)
        workers = min(workers, len(missing))
        wait_for({"GPU": 1, "CPU": 1} if gpus else {"CPU": 1}, job.config)
        with stage("encode", samples, "images") as advance:
            begun = time.monotonic()
            done = 0
            for outcome in map_items(
                ShardEncoder,
                (job,),
                list(by_name),
                workers=workers,
                num_gpus=gpus,
                max_attempts=job.config.encode.max_attempts,
            ):
                shard = by_name[outcome.item]
                if outcome.error is not None:
                    publish_shard(writer, shard, _all_rejected(job, shard, outcome.error))
                run = outcome.result or {"samples": shard.rows, "rejects": shard.rows}
                runs.append({**run, "shard": shard.name, "attempts": outcome.attempts})
                done += shard.rows
                advance(shard.rows, f"{done / (time.monotonic() - begun):.0f} images/s")
    return runs


def _all_rejected(job: EncodeJob, shard: Shard, error: str) -> ShardCodes:
    """A shard that killed every worker it was given to: nothing is lost, each sample is named."""
    reject = ImageReject(Reason.WORKER_DIED, error)
    empty = parquet_bytes(job.schema.empty_table())
    return ShardCodes(empty, 0, rejects_bytes([(record, reject) for record in shard.records()]), shard.rows, {})


def _over_budget(totals: dict[str, int], config: Config) -> bool:
    return totals["rejects"] > config.encode.reject_budget * totals["samples"]


def _commit(job: EncodeJob, writer: ArtifactWriter, opened: ShardSet, allow_degraded: bool) -> Artifact:
    receipts = writer.receipts()
    parts = [Part.model_validate(r[key]) for r in receipts.values() for key in ("part", "rejects") if r[key]]
    rejected = sum(part.rows for part in parts if part.path.startswith("rejects/"))
    totals = {
        "samples": opened.samples,
        "codes": sum(part.rows for part in parts) - rejected,
        "rejects": rejected,
    }
    if _over_budget(totals, job.config) and not allow_degraded:
        raise Degraded(
            f"{rejected} of {opened.samples} samples were rejected, more than encode.reject_budget = "
            f"{job.config.encode.reject_budget:g}: see {writer.store.uri}/rejects, then pass --allow-degraded "
            "to publish without them"
        )
    meta = {
        "bits": int(job.schema.metadata[b"hhnet.bits"]),
        "classes": list(opened.classes),
        "carried": {name: str(job.schema.field(name).type) for name in job.schema.names[5:]},
        "settings": result_settings(job.config, "codes"),
    }
    return writer.commit(parts, totals, meta, receipts)


def _run_record(job: EncodeJob, runs: list[dict[str, Any]], wall: float) -> dict[str, Any]:
    """Images per second, and how the workers' time was shared out; decode and read run beside forward."""
    spent = {name: sum(run.get(name, 0.0) for run in runs) for name in ("read", "decode", "forward", "write")}
    total = sum(spent.values()) or 1.0
    samples = sum(run["samples"] for run in runs)
    return {
        "verb": "encode",
        "fingerprint": job.fingerprint,
        "seconds": round(wall, 3),
        "images": samples,
        "images_per_second": round(samples / wall, 1),
        "shares": {name: round(value / total, 4) for name, value in spent.items()},
        "shards": sorted(runs, key=lambda run: str(run["shard"])),
    }
