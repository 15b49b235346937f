"""Reports the progress at one artifact's root from its objects: manifest, receipts, rejects, checkpoints, runs."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import PurePosixPath

from pipelines.artifacts.commit import list_versions, read_claim
from pipelines.artifacts.facts import CheckpointMeta, IndexMeta, ModelMeta, Receipt
from pipelines.artifacts.manifest import Artifact, Part, open_artifact, read_identity, read_part
from pipelines.artifacts.parquet import read_parquet
from pipelines.artifacts.runs import Record, Run, read_runs
from pipelines.artifacts.versions import open_current
from pipelines.errors import DamagedArtifact, InputError
from pipelines.storage import Store, map_in_order
from pipelines.verify.status import figures

RUNS_READ = 3
"""Number of newest runs whose attempts are read."""
MAX_OBJECTS_READ = 1000
"""Largest number of receipts, and of tables of rejects, that one look reads."""
_VALIDATED = ("epoch", "loss", "map")
"""Figures of a validation in a checkpoint."""


def describe_root(store: Store) -> Record:
    """Return all figures of one root."""
    artifact = _committed(store)
    kind = artifact.manifest.kind if artifact else read_identity(store)[0]
    runs = read_runs(store, RUNS_READ)
    run = figures.choose_run(runs)
    state = run.state() if run else "pending"
    if artifact is not None and state != "working":
        state = "done"
    attempts = figures.list_attempts(runs)
    found = {
        "status": "pending" if state == "done" and artifact is None else state,
        "uri": store.uri,
        "digest": artifact.digest if artifact else None,
        "kind": kind,
        **(figures.measure_pace(run) if run else {}),
        **_LOOKS.get(kind, _plain)(store, artifact, run),
    }
    return {
        **found,
        "left_s": figures.seconds_left(found),
        "run": figures.describe_run(run) if run else None,
        # Of one run: pauses between runs are no work.
        "hosts": figures.host_figures(figures.list_attempts([run] if run else [])),
        "slowest": figures.list_slowest(attempts),
        "retried": figures.list_retried(attempts),
    }


def _committed(store: Store) -> Artifact | None:
    with suppress(InputError):
        return open_current(store)
    return None


def _plain(store: Store, artifact: Artifact | None, run: Run | None) -> Record:
    """Return the published totals."""
    return {"totals": artifact.manifest.totals} if artifact else {}


# ------------------------------------------------------------------------------------------------------------ codes


def _codes(store: Store, artifact: Artifact | None, run: Run | None) -> Record:
    """Count the finished shards and images, and the rejects so far by reason."""
    if artifact is not None:
        manifest = artifact.manifest
        rejects = [part for part in manifest.parts if part.path.startswith("rejects/")]
        return {
            "totals": manifest.totals,
            "shards": {"done": len(manifest.receipts), "of": len(manifest.receipts)},
            **_rejects(store, rejects),
        }
    there = store.entries("receipts")
    total = run.begin.get("shards") if run else None
    found: Record = {"shards": {"done": len(there), "of": total}}
    if len(there) <= MAX_OBJECTS_READ:  # exact; of more receipts the last record of the run has to do
        found["done"] = sum(receipt.samples for receipt in _receipts(store, there))
        found["unit"] = "images"
    return {**found, **_rejects(store, _claimed_rejects(store))}


def _receipts(store: Store, names: Iterable[str]) -> list[Receipt]:
    """Return the readable receipts; an unreadable one is left for the verb to report."""

    def read(name: str) -> Receipt | None:
        with suppress(DamagedArtifact, FileNotFoundError):
            return read_claim(store, name, Receipt)
        return None

    return [receipt for receipt in map_in_order(read, names) if receipt is not None]


def _claimed_rejects(store: Store) -> list[Part]:
    """Return the tables of rejects of finished shards, as their receipts name them."""
    # Without "-" and the 16 digits of the digest that every part has in its name.
    stems = {PurePosixPath(name).stem[:-17] for name in store.entries("rejects")}
    there = store.entries("receipts")
    names = [name for name in there if PurePosixPath(name).stem in stems]
    return [receipt.rejects for receipt in _receipts(store, names[:MAX_OBJECTS_READ]) if receipt.rejects]


def _rejects(store: Store, parts: Sequence[Part]) -> Record:
    """Count the rejects and their reasons; `looked_into` is set where only the first tables were read."""
    reasons: Counter[str] = Counter()
    read = parts[:MAX_OBJECTS_READ]
    for found in map_in_order(partial(_reasons, store), read):
        reasons.update(found)
    rejects: Record = {"total": sum(part.rows for part in parts), "reasons": dict(reasons.most_common())}
    if len(read) < len(parts):
        rejects["looked_into"] = sum(part.rows for part in read)
    return {"rejects": rejects}


def _reasons(store: Store, part: Part) -> list[str]:
    with suppress(DamagedArtifact, KeyError):  # `verify` reports damage; a status shows the rest
        table = read_parquet(read_part(store, part), f"{store.uri}/{part.path}", ["reason"])
        return [str(reason) for reason in table["reason"].to_pylist()]
    return []


# ------------------------------------------------------------------------------------------------------------ model


def _model(store: Store, artifact: Artifact | None, run: Run | None) -> Record:
    """Return epoch and validation mAP of the published model, else of the newest readable checkpoint."""
    begin = run.begin if run else {}
    epochs, epoch_steps = begin.get("epochs"), begin.get("epoch_steps")
    if artifact is not None:
        metrics = artifact.facts(ModelMeta).metrics
        return {"epochs": epochs, "epoch": epochs, "map": metrics.map, "map_epoch": metrics.epoch}
    found: Record = {"epochs": epochs, **_newest_checkpoint(store)}
    if run is not None:  # a run that died may have saved more than it recorded
        found["done"] = max(int(run.last.get("done", 0)), found.get("checkpoint_step", 0))
        if epochs and epoch_steps:
            found["epoch"] = min(int(epochs), found["done"] // int(epoch_steps) + 1)
    return found


def _newest_checkpoint(store: Store) -> Record:
    """Return step, validations and best mAP of the newest readable checkpoint, without reading its weights."""
    for name in reversed(store.folders("checkpoints")):
        with suppress(DamagedArtifact, InputError, ValueError, KeyError):  # cut off: the one before is shown
            checkpoint = open_artifact(store.child(f"checkpoints/{name}"), "checkpoint")
            progress = json.loads(checkpoint.read(checkpoint.manifest.part("progress.json")))
            best, history = progress.get("best") or {}, progress.get("history") or []
            return {
                "checkpoint_step": checkpoint.facts(CheckpointMeta).step,
                "validations": [{name: one.get(name) for name in _VALIDATED} for one in history if "map" in one],
                "map": best.get("map"),
                "map_epoch": best.get("epoch"),
            }
    return {}


# ------------------------------------------------------------------------------------------------------------ index


def _index(store: Store, artifact: Artifact | None, run: Run | None) -> Record:
    """Return the current version, and the published totals."""
    known = list_versions(store)
    found: Record = {"version": known[-1] if known else None}
    if artifact is not None:
        return {**found, "totals": artifact.manifest.totals, "index_kind": artifact.facts(IndexMeta).kind}
    return found


_LOOKS: Mapping[str, Callable[[Store, Artifact | None, Run | None], Record]] = {
    "codes": _codes,
    "model": _model,
    "index": _index,
}
