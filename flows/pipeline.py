"""The flow, in the order in which data moves: images -> shards -> model -> codes -> index -> report.

Each stage is one Prefect task; inside it, Ray works on thousands of shards. The jobs find finished work themselves, so
a second run reports `unchanged` stage by stage.
"""

import json
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from contextvars import ContextVar
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger, runtime
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State
from prefect.context import FlowRunContext
from prefect.exceptions import TerminationSignal
from prefect.states import Cancelled, Failed, Running

from flows.checks import assign_roles, require_split
from flows.lease import keep_leases
from flows.lifeline import follow_parent
from flows.reporting import await_prefect, best_effort, show_if_reachable
from flows.stages import (
    NAME_DIGEST_CHARS,
    Ref,
    encode_stage,
    evaluate_stage,
    index_stage,
    ingest_stage,
    parse_settings,
    publish_stage,
    ref_of,
    rotate_stage,
    train_stage,
    verify_stage,
)
from flows.summary import RunResult, StageLog, reject_rows, run_page, slowest_rows, stage_rows
from pipelines.artifacts.manifest import open_artifact
from pipelines.artifacts.runs import Record
from pipelines.cluster.session import kept_ray, ray_address
from pipelines.config.loading import load_tree, merge_trees
from pipelines.config.settings import Config
from pipelines.errors import ConfigError, HHNetError, may_heal
from pipelines.storage import Store

WAIT_FACTOR = 4
"""Factor from each wait before another try of a run to the next wait."""

AWAIT_SERVER_S = 30.0
"""Seconds that a run waits at its end for a Prefect server that is away."""
AWAIT_SERVER_SERVED_S = 600.0
"""Seconds that a run of a deployment waits for it, since no user waits for the run."""

NO_SETTINGS: dict[str, Any] = {}

finished: ContextVar[list[RunResult] | None] = ContextVar("finished", default=None)
"""Receives the summary of a run in this process. Prefect would lose it if its server is gone at the end."""


keep_leases()  # at import, since a run's process imports this module before Prefect's engine begins


def run_name() -> str:
    """Name a run by its deployment, date, loss and bits, such as `nightly 2026-11-29 orthohash-64`."""
    when = runtime.flow_run.scheduled_start_time or datetime.now(UTC)
    words = [runtime.deployment.name or "run", f"{when:%Y-%m-%d}"]
    with suppress(HHNetError, KeyError, TypeError):  # bad settings: the flow itself reports them, under a shorter name
        settings = parse_settings(settings_of(**runtime.flow_run.parameters))
        words.append(f"{settings.train.loss}-{settings.model.bits}")
    return " ".join(words)


def settings_of(
    config: Mapping[str, Any] = NO_SETTINGS,
    sets: tuple[str, ...] = (),
    out: str | None = None,
    base: Mapping[str, Any] = NO_SETTINGS,
) -> dict[str, Any]:
    """Lay the parameters of a run over each other: `base`, then `config`, then `sets`, then `out`."""
    return load_tree(merge_trees(base, config), sets, {"run.out": out})


@flow(name="hhnet", flow_run_name=run_name, persist_result=False, result_serializer="json")
def pipeline(
    config: dict[str, Any] = NO_SETTINGS,
    sets: tuple[str, ...] = (),
    out: str | None = None,
    base: dict[str, Any] = NO_SETTINGS,
) -> Record | State[Any]:
    """Build everything below `out`: shards, model, codes, index and report.

    Returns every stage's status, uri, digest and seconds, and the run's map, chance, report and images_per_second.

    Args:
        config: Settings that differ from those of the deployment, as a tree: {"train": {"epochs": 1}}.
        sets: The same, one setting each: ["train.epochs=1"]. They win over `config`.
        out: Folder or s3://bucket/prefix of everything; unset = run.out of the settings.
        base: The deployment's own settings, which the others override. Do not change it.
    """
    follow_parent()
    served = bool(runtime.deployment.id)  # asked now: the answer comes from the server, which may be gone later
    try:
        tree = settings_of(config, sets, out, base)
        settings = parse_settings(tree)
        if settings.run.out is None:
            raise ConfigError("run.out is not set: set it in the configuration, or give the parameter `out`")
        with kept_ray():
            ended: Record | State[Any] = _run_with_retries(settings, tree, settings.run.out, served)
    except TerminationSignal:
        # Prefect tells a cancellation from a crash by its own handler of SIGTERM, which a Ray session replaces.
        if _is_cancelled():
            return Cancelled(message="cancelled; what was committed stays, the next run goes on from there")
        raise
    except Exception as error:
        # Returned as a state: Prefect would write an exception that leaves the flow into the user's storage.
        log = get_run_logger()
        log.error(str(error), exc_info=None if isinstance(error, HHNetError) else error)
        ended = Failed(data=error, message=str(error) or type(error).__name__)
    await_prefect(AWAIT_SERVER_SERVED_S if served else AWAIT_SERVER_S)
    return ended


def _is_cancelled() -> bool:
    """Tell whether the server has cancelled this run or is about to."""
    context = FlowRunContext.get()
    if context is None or context.flow_run is None:
        return False
    with best_effort(), get_client(sync_client=True) as client:
        state = client.read_flow_run(context.flow_run.id).state
        return state is not None and (state.is_cancelling() or state.is_cancelled())
    return False


def _run_with_retries(settings: Config, tree: dict[str, Any], out: str, served: bool) -> Record:
    """Run the stages. A run of a deployment tries again, after ever longer waits, if something is out of reach."""
    tries = settings.run.retries if served else 0
    for attempt in range(tries + 1):
        log = StageLog()
        try:
            summary = _run_stages(settings, tree, out, log)
        except BaseException as error:
            _show_run(settings, out, log, None)
            if attempt == tries or not may_heal(error):
                raise
            _wait(settings.run.retry_after * WAIT_FACTOR**attempt, error, attempt + 1, tries)
        else:
            if (kept := finished.get()) is not None:
                kept.append(summary)
            _show_run(settings, out, log, summary)
            return summary.as_json()
    raise AssertionError("the last try returns or raises")


def _wait(seconds: float, error: BaseException, attempt: int, tries: int) -> None:
    """Wait before another try, and show that in the log and in the run's state."""
    text = f"{error}; try {attempt} of {tries} more in {seconds:g} s"
    get_run_logger().warning(text)
    _show_state(Running(name="WaitingToRetry", message=text))
    time.sleep(seconds)
    _show_state(Running(message=f"try {attempt} of {tries} more"))


def _show_state(state: State[Any]) -> None:
    context = FlowRunContext.get()
    if context is None or context.flow_run is None:
        return
    with best_effort(), get_client(sync_client=True) as client:
        client.set_flow_run_state(context.flow_run.id, state, force=True)


def _run_stages(settings: Config, config: dict[str, Any], out: str, log: StageLog) -> RunResult:
    run = settings.run
    _show_run(settings, out, log, None)

    # images -> shards
    splits: Mapping[str, Any] = {}
    if run.source is not None:
        source = run.source if "://" in run.source else str(Path(run.source).expanduser())
        splits = log.add(ingest_stage, "ingest shards", source, f"{out}/shards", require_split(run), config)["splits"]
    roles = assign_roles(run, splits)
    shards = {uri: ref_of(log.add(verify_stage, f"verify {shorten_uri(uri)}", uri, out, config)) for uri in roles.all()}

    # shards -> model
    val = shards[roles.val] if roles.val else None
    model = ref_of(log.add(train_stage, "train model", shards[roles.train], val, f"{out}/model", config))
    if (method := settings.train.rotate) != "none":
        model = ref_of(log.add(rotate_stage, f"rotate model-{method}", model, f"{out}/model-{method}", config))

    # shards, model -> codes
    queries = ref_of(log.add(encode_stage, "encode query", shards[roles.query], model, f"{out}/codes/query", config))
    database = []
    for uri in roles.database:
        # Named by the digest of the first version, so that shards that grow keep the place of their codes.
        first = {**shards[uri], "digest": open_artifact(uri).digest}
        name = codes_name(first, splits)
        coded = log.add(encode_stage, f"encode {name}", shards[uri], model, f"{out}/codes/{name}", config)
        database.append(ref_of(coded))

    # codes -> index -> report; the index is published only if it passes the gate
    made = ref_of(log.add(index_stage, "build index", database, f"{out}/index", config))
    report = log.add(evaluate_stage, "evaluate reports", queries, database, f"{out}/reports", config)
    log.add(publish_stage, "publish index", made, config)
    return log.summary(report, out)


def _show_run(settings: Config, out: str, log: StageLog, summary: RunResult | None) -> None:
    """Show the run's page and tables so far in Prefect. A failure to do so never ends the run."""
    links = {"everything": out}
    if (address := ray_address(settings)).startswith(("http://", "https://")):
        links["Ray's dashboard"] = f"{address}/#/jobs"
    if summary is not None:
        links["report"] = summary.report
    page = run_page(log.stages, summary, links)
    if not show_if_reachable("hhnet-report", "markdown", page, "What the run made"):
        return
    names = [stage["stage"] for stage in log.stages]
    encoded = [name.removeprefix("encode ") for name in names if name.startswith("encode ")]
    codes = {name: f"{out}/codes/{name}" for name in encoded}
    tables: tuple[tuple[str, str, Callable[[], list[Record]]], ...] = (
        ("hhnet-stages", "What became of each stage", lambda: stage_rows(log.stages)),
        ("hhnet-rejects", "Rejects by codes and reason", lambda: reject_rows(codes)),
        ("hhnet-slowest-shards", "Shards on which workers spent most time", lambda: slowest_rows(codes)),
    )
    for key, title, make in tables:
        # A table that cannot be made must not fail a run whose work is done.
        with suppress(HHNetError, OSError, ValueError, KeyError, TypeError):
            if rows := make():
                show_if_reachable(key, "table", json.dumps(rows), title)


def shorten_uri(uri: str) -> str:
    """Return the last two parts of a URI, as a name of the artifact for people."""
    return "/".join(Store(uri).uri.rstrip("/").split("/")[-2:])


def codes_name(shards: Ref, splits: Mapping[str, Any]) -> str:
    """Return the folder of a database's codes below OUT/codes, by its split or digest: its position may change."""
    split = next((name for name, found in splits.items() if found["uri"] == shards["uri"]), None)
    return "database" if split == "database" else f"database-{split or shards['digest'][:NAME_DIGEST_CHARS]}"
