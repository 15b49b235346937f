"""Constants that finished artifacts tell: rates from their run records, sizes from their manifests.

A run record has the CPU seconds of the process that ran the verb, shared among the runs of an ingest that splits, and
the time in which a worker of a pool had each item. That of an encode also has the worker's CPU seconds and those of
each step. The newest finished run counts.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from pipelines.artifacts.manifest import Artifact
from pipelines.artifacts.runs import Run, read_runs
from pipelines.artifacts.versions import open_current
from pipelines.cost.model import TABLE_BYTES, TAR_BLOCK, Constants
from pipelines.errors import InputError
from pipelines.shards.index import DIRECTORY_NAME, ROW_GROUP_ROWS, is_tar
from pipelines.shards.shards import open_shards

RUNS_READ = 20
"""Number of an artifact's newest runs in which a finished one is looked for."""
ROWS_READ = 1_000
"""Largest number of samples whose image sizes are averaged."""


def read_constants(uris: Sequence[str]) -> tuple[Constants, list[str]]:
    """Return the constants with what these artifacts tell in place of the defaults, and the names of those.

    Raises InputError for an artifact of a kind that tells nothing.
    """
    found: dict[str, float] = {}
    for uri in uris:
        artifact = open_current(uri)
        kind = artifact.manifest.kind
        if kind not in _TOLD:
            raise InputError(f"{artifact.uri} is {kind}, which tells no costs: name shards, a model, codes or an index")
        found |= _TOLD[kind](artifact)
    return replace(Constants(), **found), sorted(found)


def _of_shards(shards: Artifact) -> dict[str, float]:
    opened = open_shards(shards)
    records = opened.shards[0].records()[:ROWS_READ]
    image_bytes = sum(record.members[0].size for record in records) / len(records)
    tars = [part for part in shards.manifest.parts if is_tar(part)]
    pieces = [part for part in shards.manifest.parts if not is_tar(part) and part.name != DIRECTORY_NAME]
    samples = sum(part.rows for part in tars)
    overhead = sum(part.bytes for part in tars) - samples * image_bytes - len(tars) * 2 * TAR_BLOCK
    groups = sum(-(-part.rows // ROW_GROUP_ROWS) for part in tars)
    fixed = groups * Constants.row_group_bytes + len(pieces) * TABLE_BYTES
    found = {
        "image_bytes": image_bytes,
        "sample_overhead_bytes": overhead / samples,
        "row_bytes": max(0.0, sum(part.bytes for part in pieces) - fixed) / samples,
    }
    run = _newest(shards, "ingest")
    return found | ({"ingest_cpu_s": _cpu_s(run) / (run.last["done"] - run.begin["done"])} if run else {})


def _of_model(model: Artifact) -> dict[str, float]:
    return {"model_bytes": float(sum(part.bytes for part in model.manifest.parts))}


def _of_codes(codes: Artifact) -> dict[str, float]:
    files = [part for part in codes.manifest.parts if part.path.startswith("parts/")]
    rows = max(1, sum(part.rows for part in files))
    found = {"code_bytes": _slope(sum(part.bytes for part in files), len(files), Constants.codes_bytes, rows)}
    receipts = codes.manifest.receipts
    found["receipt_bytes"] = sum(receipt.bytes for receipt in receipts) / len(receipts)
    run = _newest(codes, "encode")
    done = [] if run is None else [one for one in run.attempts if one.get("end", "done") == "done" and "forward" in one]
    if run is None or not done:
        return found
    images = sum(one["samples"] for one in done)
    beside = sum(one.get("read", 0) + one["decode"] + one["write"] for one in done)
    workers_cpu_s = sum(one["cpu"] for one in done)
    apart = all("pid" in one for one in done)
    driver = _own_cpu_s(run) if apart else max(0.0, _own_cpu_s(run) - workers_cpu_s)
    found |= {"driver_cpu_s": driver / len(done)}
    gpus = [len(str(one["gpu"]).split(",")) for one in done if one.get("gpu")]
    if gpus:
        spent = sum(number * (one["ended"] - one["began"]) for number, one in zip(gpus, done, strict=True))
        return found | {"decode_cpu_s": beside / images, "forward_gpu_s": spent / images}
    decode = min(beside, workers_cpu_s)
    return found | {"decode_cpu_s": decode / images, "forward_cpu_s": (workers_cpu_s - decode) / images}


def _of_index(index: Artifact) -> dict[str, float]:
    parts = [part for part in index.manifest.parts if part.name.startswith("part-")]
    keys = [part for part in index.manifest.parts if part.name.startswith("keys-")]
    rows = sum(part.rows for part in parts)
    found = {
        "part_code_bytes": sum(part.bytes for part in parts) / rows,
        "key_bytes": _slope(sum(part.bytes for part in keys), len(keys), Constants.part_bytes, rows),
    }
    run = _newest(index, "index build")
    built = sum(one.get("rows", 0) for one in run.attempts) if run else 0
    return found | ({"index_cpu_s": _cpu_s(run) / built} if run and built else {})


_TOLD: Mapping[str, Callable[[Artifact], dict[str, float]]] = {
    "shards": _of_shards,
    "model": _of_model,
    "codes": _of_codes,
    "index": _of_index,
}


def _slope(total: float, files: int, fixed: float, rows: int) -> float:
    """Return the bytes of a row, where each of some files has `fixed` bytes beside its rows."""
    return max(0.0, total - files * fixed) / rows


def _newest(artifact: Artifact, verb: str) -> Run | None:
    """Return the newest finished run of a verb that did some work, or None."""
    runs = [run for run in read_runs(artifact.store, RUNS_READ) if run.begin.get("verb") == verb]
    finished = [run for run in runs if run.state() == "done" and run.end and "cpu_seconds" in run.end]
    return next((run for run in reversed(finished) if run.last["done"] > run.begin["done"]), None)


def _cpu_s(run: Run) -> float:
    """Return the CPU seconds of a run: its own, and one core for as long as a worker in another process had an item."""
    return _own_cpu_s(run) + sum(float(one["ended"] - one["began"]) for one in run.attempts if "pid" in one)


def _own_cpu_s(run: Run) -> float:
    """Return the CPU seconds of the process that ran a verb."""
    assert run.end is not None, "it has finished"
    return float(run.end["cpu_seconds"])
