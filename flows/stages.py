"""The flow's tasks, one for each stage: each calls its job, and passes on URIs and digests as plain JSON.

If `ray.address` is an http(s) URL, stages that need Ray are submitted there as jobs; otherwise they run in this
process. The first argument of every task is its name in Prefect: of the task run, its progress bar and its table rows.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, cast

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State

from flows.checks import check_names
from flows.reporting import report_progress
from pipelines.artifacts.commit import list_versions
from pipelines.artifacts.runs import Record, closed_records
from pipelines.artifacts.versions import list_lost, open_current
from pipelines.config.loading import config_from
from pipelines.config.settings import Config
from pipelines.errors import FingerprintMismatch, may_heal
from pipelines.storage import Store, use_unsigned

_log = logging.getLogger(__name__)

Ref = dict[str, str]
"""Reference to an artifact: {"uri": ..., "digest": ...}."""

NAME_DIGEST_CHARS = 12
"""Characters of a digest that name a folder."""
TASK_RETRIES = 2
"""Number of times that a task is tried again."""
TASK_RETRY_WAITS_S = [5.0, 30.0]
"""Seconds of waiting before each of these tries."""


def retry_if_it_may_heal(_task: Any, _run: Any, state: State[Any]) -> bool:
    """Tell Prefect to retry a task if a store or cluster was out of reach and may come back, and in no other case."""
    if not may_heal(state.data):
        return False
    _log.warning("%s; trying again", state.data)
    return True


stage_task = partial(
    task,
    task_run_name="{name}",
    retries=TASK_RETRIES,
    retry_delay_seconds=TASK_RETRY_WAITS_S,
    retry_condition_fn=retry_if_it_may_heal,
    cache_policy=NO_CACHE,
    persist_result=False,
    result_serializer="json",
)


def parse_settings(config: Mapping[str, Any]) -> Config:
    """Return the typed settings, and read their public buckets without keys from now on. ConfigError for a bad tree."""
    settings = config_from(config)
    check_names(settings)
    use_unsigned(settings.store.unsigned)
    return settings


def ref_of(result: Record) -> Ref:
    """Return the reference to a result that the next stages need."""
    return {"uri": str(result["uri"]), "digest": str(result["digest"])}


@stage_task(name="ingest")
def ingest_stage(name: str, source: str, out: str, split: str, config: dict[str, Any]) -> Record:
    """Turn images into shards, one artifact for each part of the split."""
    from pipelines.ingest.ingest import ingest as job

    with report_progress(name):
        return job(source, out, parse_settings(config), split=split).as_json()


@stage_task(name="verify")
def verify_stage(name: str, uri: str, out: str, config: dict[str, Any]) -> Record:
    """Verify the tars of shards that runs with this `out` have not verified yet.

    A damaged tar does not end the run: `encode` rejects the damaged samples, and the reject budget decides.
    """
    from pipelines.verify.verify import verify_tars

    settings = parse_settings(config)
    with report_progress(name):
        result = verify_tars(uri, out, settings)
    if damaged := result.damaged:
        more = f" (and {len(damaged) - 1} more tars)" if len(damaged) > 1 else ""
        line = f"{damaged[0]}{more}: the damaged samples become rejects, encode.reject_budget says how many may"
        _log.warning(line)
        get_run_logger().warning(line)
    return result.as_json()


@stage_task(name="train")
def train_stage(name: str, shards: Ref, val: Ref | None, out: str, config: dict[str, Any]) -> Record:
    """Train a model on shards."""
    from pipelines.train.train import train as job

    settings, source = parse_settings(config), require_unchanged(shards)
    held_out = require_unchanged(val) if val else None
    with report_progress(name):
        return job(source, out, settings, val=held_out).as_json()


@stage_task(name="rotate")
def rotate_stage(name: str, model: Ref, out: str, config: dict[str, Any]) -> Record:
    """Give the model another hash layer, as a new model."""
    from pipelines.train.rehead import rotate as job

    settings, source = parse_settings(config), require_unchanged(model)
    with report_progress(name):
        return replace(job(source, out, settings), verb="rotate").as_json()


@stage_task(name="encode")
def encode_stage(name: str, shards: Ref, model: Ref, out: str, config: dict[str, Any]) -> Record:
    """Encode shards with a model into codes."""
    from pipelines.encode.encode import encode as job

    settings, source, network = parse_settings(config), require_unchanged(shards), require_unchanged(model)
    with report_progress(name):
        result = job(source, network, out, settings)
    return {"images_per_second": measured_rate(out), **replace(result, verb=name).as_json()}


@stage_task(name="index")
def index_stage(name: str, codes: list[Ref], out: str, config: dict[str, Any]) -> Record:
    """Build an index of codes, or the next version of the present one: with new codes, without those that are gone.

    It is not published yet. A first version that lost a part is built again.
    """
    from pipelines.index.build import build_index
    from pipelines.index.pool import require_settings
    from pipelines.index.update import add_codes

    settings, sources = parse_settings(config), [require_unchanged(ref) for ref in codes]
    with report_progress(name):
        known = list_versions(Store(out))
        if not known or (known == [1] and list_lost(open_current(out, "index"))):
            return build_index(sources, out, settings, publish=False).as_json()
        require_settings(open_current(out, "index"), settings)
        return add_codes(out, sources, settings, publish=False, prune=True, replace_changed=True).as_json()


@stage_task(name="evaluate")
def evaluate_stage(name: str, queries: Ref, database: list[Ref], out: str, config: dict[str, Any]) -> Record:
    """Compute mAP and the report from the codes of queries and database, in a folder of its own below `out`.

    Each night has other codes, and a published report is never edited.
    """
    from pipelines.evaluate.evaluate import evaluate as job
    from pipelines.evaluate.evaluate import report_fingerprint

    settings = parse_settings(config)
    mark = report_fingerprint(queries["digest"], [ref["digest"] for ref in database], settings)[:NAME_DIGEST_CHARS]
    with report_progress(name):
        asked, *searched = (require_unchanged(ref) for ref in (queries, *database))
        return job(asked, searched, f"{out}/{mark}", settings).as_json()


@stage_task(name="publish")
def publish_stage(name: str, index: Ref, config: dict[str, Any]) -> Record:
    """Check the index, or its next version, at the gate and make it current."""
    from pipelines.index.publish import publish_index as job

    settings, uri, digest = parse_settings(config), index["uri"], index["digest"]
    with report_progress(name):
        return replace(job(uri, settings, digest=digest), verb="publish").as_json()


def measured_rate(codes: str) -> float | None:
    """Return the images per second of the run that encoded most of these codes, for runs that find them all done."""
    longest = max(closed_records(Store(codes)), key=lambda record: int(record.get("images", 0)), default={})
    return cast("float | None", longest.get("images_per_second"))


def require_unchanged(ref: Ref) -> str:
    """Return the URI. Raises FingerprintMismatch if the artifact there is not the one of an earlier stage any more."""
    found = open_current(ref["uri"]).digest
    if found != ref["digest"]:
        change = f"changed during the run, {ref['digest'][:12]} became {found[:12]}"
        raise FingerprintMismatch(f"{ref['uri']} {change}: run again when nothing else writes there")
    return ref["uri"]
