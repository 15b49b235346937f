"""The verbs that flows contribute to `hhnet`. Importing this module is cheap; a verb imports what it runs."""

import logging
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

from pipelines.artifacts.result import Result
from pipelines.artifacts.runs import Record
from pipelines.artifacts.words import align_facts, format_seconds, short_place
from pipelines.cli.config import PrintedConfig
from pipelines.cli.help import Flag
from pipelines.cli.verb import ConfigOption, Main, PrintConfigOption, SetsOption
from pipelines.config.loading import load_config
from pipelines.config.recipes import AUTO
from pipelines.config.settings import Config
from pipelines.console import NOTICE
from pipelines.errors import ConfigError, Unavailable, format_count
from pipelines.storage import Store

if TYPE_CHECKING:
    from flows.summary import RunResult

_log = logging.getLogger(__name__)

REPORT_TIMEOUT_S = 10.0
"""Seconds that Prefect may take to send its last events."""

RunFileOption = Annotated[Path, Flag("TOML file of settings.", "FILE.toml")]
OutOption = Annotated[str | None, Flag("Folder or s3://bucket/prefix for all results; default run.out.", "URI")]


def run(
    config: RunFileOption, out: OutOption = None, sets: SetsOption = None, print_config: PrintConfigOption = False
) -> Result:
    """Run the whole pipeline as a Prefect flow: shards, model, codes, index, report; rerun to resume.

    The run reports to the Prefect server of PREFECT_API_URL, else to a temporary server that stops at the end.

    Example: hhnet run --config examples/fashion-mnist.toml --out out
    """
    from flows.checks import check_access, check_names, check_places

    settings = load_config(config, sets or (), {"run.out": out})
    if print_config:
        return PrintedConfig.of_config(settings)
    if settings.run.out is None:
        raise ConfigError(f"{config} does not set run.out: set it there, or give --out")
    check_access(settings)  # first, since other errors show what they refuse
    check_names(settings)
    check_places(settings, settings.run.out)
    return run_pipeline(settings, settings.run.out)


@dataclass(frozen=True, kw_only=True)
class DemoResult(Result):
    """The figures of a demo run, and the places of its artifacts and report."""

    TEXT_ONLY = ("images", "bits", "query", "stages", "seconds")

    verb: str = "demo"
    map: float
    chance: float
    images_per_second: float | None
    store: str
    report: str
    images: str
    bits: int
    query: str
    """An image to search with."""
    stages: list[Record]
    seconds: float

    def as_text(self) -> str:
        """Return the figures, the places and a search to try."""
        rate = self.images_per_second
        search = ["hhnet", "search", "--index", f"{self.store}/index", "--image", self.query]
        facts = {
            "images": self.images,
            f"mAP, {self.bits} bits": f"{self.map:.4f}   (chance {self.chance:.4f})",
            "encoded": f"{rate:,.0f} images/s" if rate else "-",
            "everything": short_place(Store(self.store).uri),
            "report": short_place(self.report),
            "took": format_seconds(self.seconds),
        }
        left = [
            shlex.join(["hhnet", "rejects", short_place(str(stage["uri"]))])
            for stage in self.stages
            if stage.get("rejects")
        ]
        count = sum(stage.get("rejects") or 0 for stage in self.stages)
        if count:
            facts["left out"] = f"{format_count(count, 'image')} that cannot be read: {', '.join(left)}"
        try_it = shlex.join([*search, "-k", "10", "--html", "neighbours.html"])
        return "\n".join([f"demo: {self.status}", *align_facts(facts.items()), "", f"next: {try_it}"])


def demo(
    data: Annotated[
        str | None, Flag("Your own images: a folder of class folders; default: Fashion-MNIST.", "PATH"), Main("PHOTOS")
    ] = None,
    out: Annotated[
        str | None, Flag("Folder or s3://bucket/prefix for all results; default: hhnet-demo, hhnet-PHOTOS.", "URI")
    ] = None,
    config: ConfigOption = None,
    sets: SetsOption = None,
    print_config: PrintConfigOption = False,
) -> Result:
    """Run the whole pipeline on real images in minutes, without setup; a second run finds everything done.

    Example: hhnet demo --data photos/ --out my-demo
    """
    from flows.checks import check_access, check_names, check_places
    from flows.recipes import demo_settings

    out = out or f"hhnet-{Path(data).expanduser().resolve().name if data else 'demo'}"
    usual = demo_settings({}, config, sets or (), out)
    check_access(usual)
    check_names(usual)  # before images are counted or fetched
    if print_config and data is None:
        return PrintedConfig.of_config(usual)
    flags, query, title = _own_images(data, _say) if data else _standard_images(_say)
    settings = demo_settings(flags, config, sets or (), out)
    if print_config:
        return PrintedConfig.of_config(settings)
    check_names(settings)
    check_places(settings, out)
    fitted = settings.train.recipe == AUTO  # training says the size and the epochs then
    size = "" if fitted else f", {settings.data.image_size} px, {format_count(settings.train.epochs, 'epoch')}"
    model = f"{settings.model.backbone}, {settings.model.bits} bits, {settings.train.loss}{size}"
    _say(f"recipe: {'auto, ' if fitted else ''}{model}; everything goes to {out}")
    begun = time.monotonic()
    summary = run_pipeline(settings, out)
    shared = {one.name: getattr(summary, one.name) for one in fields(DemoResult) if hasattr(summary, one.name)}
    own = {"verb": "demo", "images": title, "bits": settings.model.bits, "query": query}
    return DemoResult(**{**shared, **own, "seconds": time.monotonic() - begun})


def _say(text: str) -> None:
    _log.log(NOTICE, "%s", text)


def _standard_images(say: Callable[[str], None]) -> tuple[dict[str, Any], str, str]:
    """Return settings, a query image and a title for Fashion-MNIST, or for its fallback."""
    from flows.datasets import prepare_archive, sample_query

    found = prepare_archive(say)
    flags: dict[str, Any] = {"run.source": str(found.archive)}
    if found.fallback:
        flags |= {"train.recipe": AUTO}
    return flags, sample_query(found.archive), found.title


def _own_images(data: str, say: Callable[[str], None]) -> tuple[dict[str, Any], str, str]:
    """Return settings, a query image and a title for the user's folder."""
    from flows.recipes import REJECT_BUDGET, TRAIN_SHARE, probe_images

    seen = probe_images(data)
    say(f"data: {seen.images:,} images in {data}, usually {seen.side} px on the shorter side")
    flags: dict[str, Any] = {
        "run.source": data,
        "run.split": f"train={TRAIN_SHARE:g},query={1 - TRAIN_SHARE:g}",
        "run.query": "query",
        "encode.reject_budget": REJECT_BUDGET,
        "train.recipe": AUTO,
    }
    return flags, str(seen.example), data


def run_pipeline(settings: Config, out: str) -> "RunResult":
    """Run the flow in this process, against the user's Prefect server or a temporary one.

    Raises Unavailable if the server is lost, even after all artifacts were made: it then does not show the run's end.
    """
    from flows.server import prefect_server

    with prefect_server():
        import httpx
        from prefect.exceptions import PrefectException

        from flows.pipeline import finished, pipeline
        from flows.summary import RunResult

        logging.raiseExceptions = False  # else each log line that a lost server does not take prints a traceback
        made: list[RunResult] = []
        token = finished.set(made)
        try:
            record = pipeline(settings.model_dump(mode="json", exclude_unset=True), (), out)
            return RunResult(**cast("dict[str, Any]", record))
        except (httpx.HTTPError, PrefectException) as error:
            lost = f"Prefect is out of reach ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
            if made:
                unseen = f"everything was made in {out}, but {lost} and does not show it"
                raise Unavailable(f"{unseen}: start the server and run it again to have it shown") from error
            raise Unavailable(f"{lost}: what was committed in {out} stays: run the same command again") from error
        finally:
            finished.reset(token)
            _report_all()


def _report_all() -> None:
    """Send the logs and events that Prefect's threads still hold; afterwards a temporary server may stop."""
    from prefect.events.worker import EventsWorker

    from flows.reporting import prefect_answers

    for handler in logging.getLogger("prefect.flow_runs").handlers:
        handler.flush()
    EventsWorker.drain_all(timeout=REPORT_TIMEOUT_S)
    if not prefect_answers():
        _drop_unsent()


def _drop_unsent() -> None:
    """Drop unsent logs and events: at the end of the process Prefect would try each once more, for minutes."""
    # Private, since Prefect offers no way to give up its queues; its own at-exit hook only drains them.
    from prefect._internal.concurrency.services import _active_services

    for service in tuple(_active_services):
        waiting = service._queue
        with waiting.mutex:
            waiting.queue.clear()
        waiting.put_nowait(None)  # makes the service end
