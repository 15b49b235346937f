"""Serve the flow on a schedule: `python -m flows.deploy --config F --cron "0 2 * * *"`.

It registers the deployment with the Prefect server that PREFECT_API_URL names (PREFECT_API_AUTH_STRING where that
asks for a password), then waits and runs what the schedule, the page or the API of that server asks for.
"""

import asyncio
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from flows.server import QUIET, environment, reach_prefect
from flows.verbs import ConfigFile, Sets, check_access
from pipelines.config import load_config
from pipelines.errors import ConfigError, HHNetError, Unavailable

NAME = "hhnet"


def serve(
    config: ConfigFile,
    cron: Annotated[
        str | None, typer.Option(help="When to run, such as '0 2 * * *'; unset = only when triggered.")
    ] = None,
    name: Annotated[str, typer.Option(help="Name of the deployment.")] = NAME,
    limit: Annotated[int, typer.Option(help="Runs at one time.", min=1)] = 1,
    out: Annotated[
        str | None, typer.Option("--out", help="Folder or s3://bucket/prefix; default run.out.", metavar="URI")
    ] = None,
    sets: Sets = None,
) -> None:
    """Serve the pipeline as a Prefect deployment until interrupted.

    Example: PREFECT_API_URL=http://127.0.0.1:4200/api python -m flows.deploy --config nightly.toml --cron '0 2 * * *'
    """
    try:
        _serve(config, cron, name, limit, out, sets)
    except HHNetError as error:
        sys.stderr.write(f"flows.deploy: {error}\n")
        raise typer.Exit(error.exit_code) from None


def _serve(config: Path, cron: str | None, name: str, limit: int, out: str | None, sets: list[str] | None) -> None:
    settings = load_config(config, sets or (), {"run.out": out})
    if settings.run.out is None:
        raise ConfigError(f"{config} does not set run.out: set it there, or give --out")
    url = os.environ.get("PREFECT_API_URL")
    if not url:
        raise ConfigError(
            "PREFECT_API_URL is not set: start `prefect server start --host 127.0.0.1` and set it to "
            "http://127.0.0.1:4200/api"
        )
    check_access(settings)
    reach_prefect(url)
    parameters = {"config": settings.model_dump(mode="json"), "out": settings.run.out}
    with environment({key: value for key, value in QUIET.items() if key not in os.environ}):
        import httpx
        from prefect.exceptions import PrefectException

        try:
            _poll(name, cron, limit, parameters)
        except (httpx.HTTPError, PrefectException, RuntimeError) as error:
            reason = str(error) or type(error).__name__
            raise Unavailable(f"cannot serve at {url}: {reason}") from error


def _poll(name: str, cron: str | None, limit: int, parameters: dict[str, Any]) -> None:
    """Register the deployment and run what is due until SIGINT or SIGTERM; schedules pause meanwhile."""
    from prefect.runner import Runner
    from prefect.types.entrypoint import EntrypointType

    from flows.pipeline import pipeline

    class Server(Runner):
        def handle_sigterm(self, *_: Any, **__: Any) -> None:
            self.execute_in_background(self.astop)  # Runner's own handler never awaits this and hangs

    runner = Server(name=name, limit=limit)
    runner.add_flow(pipeline, name=name, cron=cron, parameters=parameters, entrypoint_type=EntrypointType.MODULE_PATH)
    sys.stderr.write(
        f"serving {pipeline.name}/{name}: {cron or 'no schedule'}; run it now with "
        f"`prefect deployment run {pipeline.name}/{name}`\n"
    )
    with suppress(KeyboardInterrupt):
        asyncio.run(runner.start())


if __name__ == "__main__":
    typer.run(serve)
