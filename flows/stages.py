"""The flow's tasks, one per stage: each calls its job, and passes URIs and digests as plain JSON.

Where `ray.address` is an http(s) URL, what needs Ray is submitted there as a job; else it runs in this process.
"""

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, cast
from uuid import UUID

import httpx
from prefect import task
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.exceptions import PrefectException
from pydantic import ValidationError

from pipelines.artifacts import versions
from pipelines.cluster.progress import reporting
from pipelines.config import Config
from pipelines.errors import ConfigError, FingerprintMismatch, Unavailable
from pipelines.runs import closed_records
from pipelines.storage import Store
from pipelines.versions import lost, open_current

Ref = dict[str, str]
"""Where an artifact lies and what it is: {"uri": ..., "digest": ...}."""

Result = dict[str, Any]
"""What a job returned: verb, status, uri, digest and its own figures."""

UPDATE_EVERY_S = 2.0
NAME_CHARS = 12
RETRIES = 2
RETRY_AFTER_S = [5.0, 30.0]


def out_of_reach(_task: Any, _run: Any, state: State[Any]) -> bool:
    """Retry what a store or cluster out of reach made fail (exit code 3), and nothing else."""
    if getattr(state.data, "exit_code", None) != Unavailable.exit_code:
        return False
    sys.stderr.write(f"hhnet: {state.data}; trying again\n")
    return True


act = partial(
    task,
    retries=RETRIES,
    retry_delay_seconds=RETRY_AFTER_S,
    retry_condition_fn=out_of_reach,
    cache_policy=NO_CACHE,
    persist_result=False,
    result_serializer="json",
)


def parse(config: Mapping[str, Any]) -> Config:
    """The typed tree; ConfigError for anything that is not one."""
    try:
        return Config.model_validate(config)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def ref_of(result: Result) -> Ref:
    """What the next stage needs to know of a result."""
    return {"uri": str(result["uri"]), "digest": str(result["digest"])}


@act(name="ingest")
def ingest(source: str, out: str, split: str, config: dict[str, Any]) -> Result:
    """Images to shards, one artifact per split."""
    from pipelines.ingest import ingest as job

    with progress("ingest"):
        return job(source, out, parse(config), split=split)


@act(name="verify")
def verify(uri: str) -> Result:
    """Prove an artifact from its stored bytes."""
    from pipelines.verify import verify as job

    with progress("verify"):
        return job(uri)


@act(name="train")
def train(shards: Ref, val: Ref | None, out: str, config: dict[str, Any]) -> Result:
    """Shards to a model."""
    from pipelines.console import submit
    from pipelines.train import train as job

    settings, source, held_out = parse(config), located(shards), located(val) if val else None
    with progress("train"):
        sent = submit(settings, ["train"], {"--shards": source, "--val": held_out, "--out": out})
        return sent or job(source, out, settings, val=held_out)


@act(name="rotate")
def rotate(model: Ref, out: str, config: dict[str, Any]) -> Result:
    """Another hash layer for the model."""
    from pipelines.console import submit
    from pipelines.rotate import rotate as job

    settings, source = parse(config), located(model)
    with progress("rotate"):
        sent = submit(settings, ["train"], {"--rotate": settings.train.rotate, "--model": source, "--out": out})
        return {**(sent or job(source, out, settings)), "verb": "rotate"}


@act(name="encode", task_run_name="encode {name}")
def encode(name: str, shards: Ref, model: Ref, out: str, config: dict[str, Any]) -> Result:
    """Shards and a model to codes."""
    from pipelines.console import submit
    from pipelines.encode import encode as job

    settings, source, network = parse(config), located(shards), located(model)
    with progress(f"encode-{name}"):
        sent = submit(settings, ["encode"], {"--shards": source, "--model": network, "--out": out})
        result = sent or job(source, network, out, settings)
    return {"images_per_second": measured_rate(out), **result, "verb": f"encode {name}"}


@act(name="index")
def index(codes: list[Ref], out: str, config: dict[str, Any]) -> Result:
    """Codes to an index, or to the next version of the one that is there: with what is new, without what is gone.

    It is not published yet. A first version that lost a part is built again.
    """
    from pipelines.console import submit
    from pipelines.index import build_index
    from pipelines.indexing import require_settings
    from pipelines.reindex import add_codes

    settings, sources = parse(config), [located(ref) for ref in codes]
    with progress("index"):
        known = versions(Store(out))
        if not known or (known == [1] and lost(open_current(out, "index"))):
            sent = submit(settings, ["index", "build", "--no-publish"], {"--codes": sources, "--out": out})
            return sent or build_index(sources, out, settings, publish=False)
        require_settings(open_current(out, "index"), settings)
        words = ["index", "add", "--prune", "--replace", "--no-publish"]
        sent = submit(settings, words, {"--index": out, "--codes": sources})
        return sent or add_codes(out, sources, settings, publish=False, prune=True, replace_changed=True)


@act(name="evaluate")
def evaluate(queries: Ref, database: list[Ref], out: str, config: dict[str, Any]) -> Result:
    """Codes of queries and database to mAP and report, which lies below `out` under a name of its own.

    Each night has other codes, and a report that was published is never edited.
    """
    from pipelines.evaluate import evaluate as job
    from pipelines.evaluate import report_fingerprint

    settings = parse(config)
    name = report_fingerprint(queries["digest"], [ref["digest"] for ref in database], settings)[:NAME_CHARS]
    with progress("evaluate"):
        return job(located(queries), [located(ref) for ref in database], f"{out}/{name}", settings)


@act(name="publish")
def publish(index: Ref, config: dict[str, Any]) -> Result:
    """Let the index, or its next version, through the gate and make it current."""
    from pipelines.console import submit
    from pipelines.releases import publish_index as job

    settings, uri, digest = parse(config), index["uri"], index["digest"]
    with progress("publish"):
        sent = submit(settings, ["index", "publish"], {"--index": uri, "--digest": digest})
        return {**(sent or job(uri, settings, digest=digest)), "verb": "publish"}


def measured_rate(codes: str) -> float | None:
    """Images per second of the run that encoded most of these codes, for a run that found them all done."""
    longest = max(closed_records(Store(codes)), key=lambda record: int(record.get("images", 0)), default={})
    return cast("float | None", longest.get("images_per_second"))


def located(ref: Ref) -> str:
    """The URI, after a look that the artifact there is still the one an earlier stage handed on."""
    found = open_current(ref["uri"]).digest
    if found != ref["digest"]:
        raise FingerprintMismatch(f"{ref['uri']} changed during the run: {ref['digest'][:12]} became {found[:12]}")
    return ref["uri"]


@contextmanager
def progress(name: str) -> Iterator[None]:
    """A progress artifact `hhnet-<name>` that follows the job inside, at most every two seconds.

    A server that cannot take an update costs the picture, never the work.
    """
    artifact = cast(UUID, create_progress_artifact(0.0, key=f"hhnet-{name}", description=name))
    last = time.monotonic()

    def show(stage: str, done: int, total: int, note: str) -> None:
        nonlocal last
        if time.monotonic() - last < UPDATE_EVERY_S:
            return
        last = time.monotonic()
        with suppress(httpx.HTTPError, PrefectException):
            share = 100.0 * min(done, total) / total if total else 0.0
            update_progress_artifact(artifact, share, f"{stage}: {done} of {total} {note}".strip())

    with reporting(show):
        yield
    with suppress(httpx.HTTPError, PrefectException):
        update_progress_artifact(artifact, 100.0, f"{name}: done")
