"""`hhnet status`: shows the progress of the work at a root, from the store alone, during it and after its death.

figures   what run records add up to
roots     one artifact's root
survey    a folder of roots: `run.out`, a study
words     the same for people
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from pipelines.artifacts.result import Result
from pipelines.artifacts.runs import Record
from pipelines.console import NOTICE, draws_on_terminal
from pipelines.verify.status.survey import Survey
from pipelines.verify.status.words import format_line, format_status

_log = logging.getLogger(__name__)

WATCH_EVERY_S = 5.0
"""Seconds between two looks of --watch."""
ONGOING = ("working", "pending")


@dataclass(frozen=True, kw_only=True)
class StatusResult(Result):
    """The state of the work: `done`, `working`, `died`, `failed`, `interrupted`, or `pending` if none runs.

    The digest is None before the commit; `found` holds all figures, which differ by kind.
    """

    verb: str = "status"
    found: Record

    def as_json(self) -> Record:
        """Return the figures as they were found."""
        return {"verb": self.verb, **self.found}

    def as_text(self) -> str:
        """Return the figures in words and short tables."""
        return format_status(self.found)


def status(uri: str, watch: bool = False, every: float = WATCH_EVERY_S) -> StatusResult:
    """Report the progress of the work at `uri`: the root of any artifact, a study's --out, or run.out.

    With `watch` it looks again until nothing works and nothing is to come, and draws on stderr meanwhile. Raises
    InputError where nothing was begun.
    """
    survey = Survey(uri)
    found = survey.look()
    if watch and found["status"] in ONGOING:
        with _draw_screen() if draws_on_terminal() else _draw_lines() as draw:
            while found["status"] in ONGOING:
                draw(found)
                time.sleep(every)
                found = survey.look()
    return StatusResult(status=found["status"], uri=found["uri"], digest=found["digest"], found=found)


@contextmanager
def _draw_screen() -> Iterator[Callable[[Record], None]]:
    """Yield a function that draws over its last drawing."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    with Live(console=Console(stderr=True), auto_refresh=False, transient=True) as live:
        yield lambda found: live.update(Text(format_status(found)), refresh=True)


@contextmanager
def _draw_lines() -> Iterator[Callable[[Record], None]]:
    """Yield a function that prints a line whenever the state has changed."""
    last = ""

    def draw(found: Record) -> None:
        nonlocal last
        line = format_line(found)
        if line != last:
            _log.log(NOTICE, "%s %s", time.strftime("%H:%M:%S"), line, extra={"status": found["status"]})
        last = line

    yield draw
