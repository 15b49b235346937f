"""The flow's tasks, one per stage: each calls its job, and passes URIs and digests as plain JSON.

Where `ray.address` is an http(s) URL, what needs Ray is submitted there as a job; else it runs in this process. The
first argument of every task is its name in Prefect: of the task run, its progress bar and its row in the tables.
"""

import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, cast

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State

from flows.reporting import progress
from pipelines.artifacts.commit import versions
from pipelines.artifacts.runs import Record, closed_records
from pipelines.artifacts.versions import lost, open_current
from pipelines.config.loading import config_from
from pipelines.config.settings import Config
from pipelines.errors import FingerprintMismatch, Unavailable
from pipelines.storage import Store, use_unsigned

Ref = dict[str, str]
"""Where an artifact lies and what it is: {"uri": ..., "digest": ...}."""

NAME_CHARS = 12
RETRIES = 2
RETRY_AFTER_S = [5.0, 30.0]


def is_out_of_reach(error: object) -> bool:
    """Whether an error, of a job or of a submitted one, is exit code 3: store or cluster out of reach."""
    return getattr(error, "exit_code", None) == Unavailable.exit_code


def out_of_reach(_task: Any, _run: Any, state: State[Any]) -> bool:
    """Retry what a store or cluster out of reach made fail, and nothing else."""
    if not is_out_of_reach(state.data):
        return False
    sys.stderr.write(f"hhnet: {state.data}; trying again\n")
    return True


act = partial(
    task,
    task_run_name="{name}",
    retries=RETRIES,
    retry_delay_seconds=RETRY_AFTER_S,
    retry_condition_fn=out_of_reach,
    cache_policy=NO_CACHE,
    persist_result=False,
    result_serializer="json",
)


def parse(config: Mapping[str, Any]) -> Config:
    """The typed tree, whose public buckets this process asks without keys; ConfigError for anything that is not one."""
    settings = config_from(config)
    use_unsigned(settings.store.unsigned)
    return settings


def ref_of(result: Record) -> Ref:
    """What the next stage needs to know of a result."""
    return {"uri": str(result["uri"]), "digest": str(result["digest"])}


@act(name="ingest")
def ingest(name: str, source: str, out: str, split: str, config: dict[str, Any]) -> Record:
    """Images to shards, one artifact per split."""
    from pipelines.ingest.ingest import ingest as job

    with progress(name):
        return job(source, out, parse(config), split=split).as_json()


@act(name="verify")
def verify(name: str, uri: str, out: str, config: dict[str, Any]) -> Record:
    """Prove the tars of shards that runs with this `out` have not proven yet.

    A damaged tar does not end the run: `encode` makes rejects of the damaged samples, and the reject budget decides.
    """
    from pipelines.verify.verify import verify_tars

    settings = parse(config)
    with progress(name):
        result = verify_tars(uri, out, settings)
    if damaged := result.damaged:
        more = f" (and {len(damaged) - 1} more tars)" if len(damaged) > 1 else ""
        line = f"{damaged[0]}{more}: the damaged samples become rejects, encode.reject_budget says how many may"
        sys.stderr.write(f"hhnet: {line}\n")
        get_run_logger().warning(line)
    return result.as_json()


@act(name="train")
def train(name: str, shards: Ref, val: Ref | None, out: str, config: dict[str, Any]) -> Record:
    """Shards to a model."""
    from pipelines.train.train import train as job

    settings, source, held_out = parse(config), located(shards), located(val) if val else None
    with progress(name):
        return job(source, out, settings, val=held_out).as_json()


@act(name="rotate")
def rotate(name: str, model: Ref, out: str, config: dict[str, Any]) -> Record:
    """Another hash layer for the model."""
    from pipelines.train.rehead import rotate as job

    settings, source = parse(config), located(model)
    with progress(name):
        return replace(job(source, out, settings), verb="rotate").as_json()


@act(name="encode")
def encode(name: str, shards: Ref, model: Ref, out: str, config: dict[str, Any]) -> Record:
    """Shards and a model to codes."""
    from pipelines.encode.encode import encode as job

    settings, source, network = parse(config), located(shards), located(model)
    with progress(name):
        result = job(source, network, out, settings)
    return {"images_per_second": measured_rate(out), **replace(result, verb=name).as_json()}


@act(name="index")
def index(name: str, codes: list[Ref], out: str, config: dict[str, Any]) -> Record:
    """Codes to an index, or to the next version of the one that is there: with what is new, without what is gone.

    It is not published yet. A first version that lost a part is built again.
    """
    from pipelines.index.build import build_index
    from pipelines.index.pool import require_settings
    from pipelines.index.update import add_codes

    settings, sources = parse(config), [located(ref) for ref in codes]
    with progress(name):
        known = versions(Store(out))
        if not known or (known == [1] and lost(open_current(out, "index"))):
            return build_index(sources, out, settings, publish=False).as_json()
        require_settings(open_current(out, "index"), settings)
        return add_codes(out, sources, settings, publish=False, prune=True, replace_changed=True).as_json()


@act(name="evaluate")
def evaluate(name: str, queries: Ref, database: list[Ref], out: str, config: dict[str, Any]) -> Record:
    """Codes of queries and database to mAP and report, which lies below `out` under a name of its own.

    Each night has other codes, and a report that was published is never edited.
    """
    from pipelines.evaluate.evaluate import evaluate as job
    from pipelines.evaluate.evaluate import report_fingerprint

    settings = parse(config)
    mark = report_fingerprint(queries["digest"], [ref["digest"] for ref in database], settings)[:NAME_CHARS]
    with progress(name):
        return job(located(queries), [located(ref) for ref in database], f"{out}/{mark}", settings).as_json()


@act(name="publish")
def publish(name: str, index: Ref, config: dict[str, Any]) -> Record:
    """Let the index, or its next version, through the gate and make it current."""
    from pipelines.index.publish import publish_index as job

    settings, uri, digest = parse(config), index["uri"], index["digest"]
    with progress(name):
        return replace(job(uri, settings, digest=digest), verb="publish").as_json()


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
