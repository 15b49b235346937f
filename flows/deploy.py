"""Serve the flow on a schedule: `python -m flows.deploy --config F --cron "0 2 * * *"`.

It registers the deployment with the Prefect server of PREFECT_API_URL or of the active profile. If that server wants a
password, set PREFECT_API_AUTH_STRING. Then it waits, and starts each run that the schedule, the server's page or the
API asks for.
"""

import logging
import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any
from zoneinfo import ZoneInfo

import typer

from flows.server import NO_SERVER, quiet_prefect, reach_prefect, server_url
from flows.verbs import OutOption, RunFileOption
from pipelines.cli.help import Flag
from pipelines.cli.verb import SetsOption
from pipelines.config.loading import config_from, load_tree
from pipelines.config.values import parse_duration
from pipelines.console import NOTICE
from pipelines.errors import ConfigError, HHNetError, Unavailable

_log = logging.getLogger("flows.deploy")  # __name__ is __main__ where it is run

NAME = "hhnet"
"""Default name of the deployment."""
REFUSED = "/%&<>"
"""Characters that Prefect refuses in names."""
CRON_FIELDS = ("minute", "hour", "day of the month", "month", "day of the week")
LEAST_INTERVAL_S = 60.0
"""Smallest --interval in seconds."""
LEAST_LOST_AFTER_S = 90.0
"""Smallest --lost-after in seconds, the time of three signs of life."""


class Collision(StrEnum):
    """What happens to a run that is due while the limit of runs is reached."""

    ENQUEUE = "enqueue"
    CANCEL_NEW = "cancel-new"


def serve_command(
    config: RunFileOption,
    cron: Annotated[
        str | None, Flag("Schedule in cron's five fields, such as '0 2 * * *'; unset = run on request only.")
    ] = None,
    interval: Annotated[
        str | None, Flag("Time from one run to the next, such as 6h; instead of --cron.", "DURATION")
    ] = None,
    timezone: Annotated[str, Flag("Time zone of the schedule, such as Europe/Berlin.", "ZONE")] = "UTC",
    name: Annotated[str, Flag("Name of the deployment.")] = NAME,
    tag: Annotated[list[str] | None, Flag("Prefect tag of the deployment and its runs; repeatable.")] = None,
    limit: Annotated[int, Flag("Most runs at one time, over all processes that serve the deployment.", min=1)] = 1,
    collision: Annotated[
        Collision, Flag("What happens to a run beyond --limit: it waits for its turn, or is cancelled.")
    ] = Collision.ENQUEUE,
    lost_after: Annotated[
        str, Flag("Time without a sign of life after which the server marks a run as Crashed; 0 = never.", "DURATION")
    ] = "5m",
    out: OutOption = None,
    sets: SetsOption = None,
) -> None:
    """Serve the pipeline as a Prefect deployment until interrupted.

    If scheduled runs were missed while nothing served the deployment, the last of them runs now.

    Example: PREFECT_API_URL=http://127.0.0.1:4200/api python -m flows.deploy --config nightly.toml --cron '0 2 * * *'
    """
    try:
        check_name("--name", name)
        for one in tag or ():
            check_name("--tag", one)
        lost = _parse_seconds("--lost-after", lost_after, LEAST_LOST_AFTER_S)
        every = _parse_seconds("--interval", interval, LEAST_INTERVAL_S) if interval is not None else None
        if cron is not None and every is not None:
            raise ConfigError("--cron and --interval are two ways to set the schedule: give only one of them")
        check_zone(timezone)
        tree = load_tree(config, sets or (), {"run.out": out})
        when = f"cron {cron} ({timezone})" if cron else f"every {interval}" if interval else "no schedule"
        with quiet_prefect():
            url = _check_run(config, tree)
            if cron is not None:
                check_cron(cron)
            reach_prefect(url)
            fields = {"name": name, "tags": tuple(tag or ()), "limit": limit, "lost_after_s": lost}
            fields |= {"cron": cron, "interval_s": every, "timezone": timezone}
            fields |= {"cancel_new": collision is Collision.CANCEL_NEW}
            parameters = {"base": tree, "config": {}, "sets": [], "out": tree["run"]["out"]}
            _serve(url, when, {**fields, "parameters": parameters})
    except HHNetError as error:
        _log.error("%s", error, extra={"program": "flows.deploy"})
        raise typer.Exit(error.exit_code) from None


def _check_run(config: Path, tree: dict[str, Any]) -> str:
    """Check the settings of the runs, and return the URL of the server."""
    from flows.checks import check_access, check_names
    from pipelines.ingest.split import parse_split

    settings = config_from(tree)
    check_access(settings)  # first, since other errors show what they refuse
    check_names(settings)
    if settings.run.split is not None:
        parse_split(settings.run.split)
    if settings.run.out is None:
        raise ConfigError(f"{config} does not set run.out: set it there, or give --out")
    url = server_url()
    if url is None:
        raise ConfigError(NO_SERVER)
    return url


def _serve(url: str, when: str, fields: dict[str, Any]) -> None:
    import httpx
    from prefect.exceptions import PrefectException

    from flows.serving import Deployment, serve_deployment

    deployment = Deployment(**fields)
    word = "cancelled" if deployment.cancel_new else "waits"
    facts = {"name": deployment.name, "when": when, "limit": deployment.limit, "word": word}
    _log.log(
        NOTICE,
        "serving hhnet/%(name)s: %(when)s; at most %(limit)d at one time, one more %(word)s; "
        "run it now with `prefect deployment run hhnet/%(name)s`",
        facts,
        extra={"deployment": deployment.name, "limit": deployment.limit},
    )
    try:
        serve_deployment(deployment)
    except (httpx.HTTPError, PrefectException, RuntimeError, ExceptionGroup) as error:
        first: Exception = error
        while isinstance(first, ExceptionGroup):
            first = first.exceptions[0]
        if not isinstance(first, httpx.HTTPError | PrefectException | RuntimeError):
            raise
        reason = str(first) or type(first).__name__
        raise Unavailable(f"cannot serve at {url}: {reason}: see that the server runs, then serve again") from error


def check_name(what: str, name: str) -> None:
    """Raise ConfigError for a name that Prefect would refuse."""
    found = [character for character in REFUSED if character in name]
    if found or not name.strip():
        why = f"holds {' '.join(found)}" if found else "is empty"
        raise ConfigError(f"{what} {name!r} {why}, which Prefect refuses: choose another")


def check_zone(zone: str) -> None:
    """Raise ConfigError for a zone that is not in the IANA time zone database."""
    try:
        ZoneInfo(zone)
    except (OSError, ValueError, KeyError):  # ZoneInfoNotFoundError is a KeyError
        raise ConfigError(f"--timezone {zone!r} is not a time zone: write one such as Europe/Berlin or UTC") from None


def check_cron(cron: str) -> None:
    """Raise ConfigError, naming the wrong field, unless `cron` is a schedule of five fields."""
    fields = cron.split()
    if len(fields) != len(CRON_FIELDS):
        names = ", ".join(CRON_FIELDS)
        raise ConfigError(f"--cron {cron!r} has {len(fields)} fields instead of five: {names}, as in '0 2 * * *'")
    for place, (field, meaning) in enumerate(zip(fields, CRON_FIELDS, strict=True)):
        # Each field is tried alone among stars, so that the error can name the wrong one.
        alone = " ".join(field if other == place else "*" for other in range(len(fields)))
        if not _is_cron(alone):
            raise ConfigError(f"--cron {cron!r}: {field!r} is not a valid {meaning}: mend that field")
    if not _is_cron(cron):
        raise ConfigError(f"--cron {cron!r} matches no date: check its day and month")


def _is_cron(text: str) -> bool:
    from prefect.client.schemas.schedules import CronSchedule

    try:
        CronSchedule(cron=text)
    except ValueError:
        return False
    return True


def _parse_seconds(what: str, text: str, least: float) -> float:
    """Parse a duration into seconds. Raises ConfigError if it is none or too short; --lost-after may be 0."""
    try:
        seconds = float(text) if re.fullmatch(r"\d+(\.\d+)?", text) else float(parse_duration(text))
    except ValueError as error:
        raise ConfigError(f"{what} {text!r}: {error}") from None
    if seconds < least and not (seconds == 0 and what == "--lost-after"):
        raise ConfigError(f"{what} {text!r} is shorter than {least:g} s: give at least that")
    return seconds


if __name__ == "__main__":
    typer.run(serve_command)
