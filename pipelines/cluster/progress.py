"""Progress of stages: shown on stderr and sent to a reporter, from this process or from workers in others.

Ray is imported only where a board is started or read, so that a verb without Ray need not pay for the import.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from contextvars import ContextVar, copy_context
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from pipelines.artifacts.words import format_seconds, format_span
from pipelines.console import NOTICE, draws_on_terminal, printed_by
from pipelines.errors import HHNetError

if TYPE_CHECKING:
    from ray.actor import ActorHandle

_log = logging.getLogger(__name__)

LINE_EVERY_S = 10.0
"""Least seconds between two lines of progress where stderr is no terminal."""
PLACES_KEPT = 128
"""Number of moments that the time left looks back on; of more, each second one is forgotten."""
NAME_WIDTH, BAR_WIDTH = 24, 20
"""Characters of the bar, and of its name where a verb has several; with count and time, a line fits 100 columns."""
BOARD_TIMEOUT_S = 30.0
"""Seconds that a board may take to answer."""

Line = tuple[str, dict[str, Any]]
"""A line for the user, and its fields in a log of JSON."""

Reporter = Callable[[str, int, int, str], None]
"""Receives (stage, done, total, note)."""

_reporter: ContextVar[Reporter | None] = ContextVar("reporter", default=None)

Display = Callable[[str, int, str], AbstractContextManager[Callable[[int, str], None]]]
"""Called with (name, total, unit) of a stage; its context yields a function that draws (done, note)."""

_displays: list[Display] = []


class Advance(Protocol):
    """A function that moves a stage on."""

    def __call__(self, steps: int = 1, note: str = "") -> None:
        """Move the stage on by `steps`, and show `note` beside the count."""


@contextmanager
def reporting(reporter: Reporter) -> Iterator[None]:
    """Also send the progress of all stages begun inside the block to `reporter`."""
    token = _reporter.set(reporter)
    try:
        yield
    finally:
        _reporter.reset(token)


@contextmanager
def displayed_by(display: Display) -> Iterator[None]:
    """Show the progress of all stages of this process, in any thread, by `display` instead of on stderr."""
    _displays.append(display)
    try:
        yield
    finally:
        _displays.remove(display)


@contextmanager
def stage(name: str, total: int, unit: str = "items", done: int = 0) -> Iterator[Advance]:
    """Show a stage's progress on stderr: a bar on a terminal, a line or a record every few seconds elsewhere.

    `done` of the total was done before.
    """
    usual = _progress_bar if draws_on_terminal() else _progress_lines
    show = (_displays[-1] if _displays else usual)(name, total, unit)
    reporter = _reporter.get()
    with show as draw:

        def advance(steps: int = 1, note: str = "") -> None:
            nonlocal done
            done += steps
            draw(done, note)
            if reporter is not None:
                reporter(name, done, total, note)

        advance(0)
        yield advance


def say_resumed(name: str, done: int, total: int, unit: str) -> None:
    """Tell on stderr how much of a stage earlier runs have done, if they have done any."""
    if done:
        fields = {"stage": name, "done": done, "total": total, "unit": unit}
        _log.log(NOTICE, "%s: %s of %s %s done before", name, f"{done:,}", f"{total:,}", unit, extra=fields)


@contextmanager
def _progress_bar(name: str, total: int, unit: str) -> Iterator[Callable[[int, str], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(BAR_WIDTH),
        TextColumn(f"{{task.completed:,.0f}}/{{task.total:,.0f}} {unit}", markup=False),
        TextColumn("{task.fields[words]}", markup=False),
    )
    pace = Pace(total)
    label = f"{name:<{NAME_WIDTH}}" if ":" in name else name
    bars = Progress(*columns, console=Console(stderr=True, highlight=False))
    # Rich would break a long line, and with it a command that the user copies.
    line = partial(bars.console.print, soft_wrap=True, markup=False, emoji=False)
    with bars, printed_by(line):
        task = bars.add_task(label, total=total, words="")
        room = bars.console.width - len(f"{label} {total:,}/{total:,} {unit} ") - BAR_WIDTH - 1

        def draw(done: int, note: str) -> None:
            seconds, left = pace.read(done)
            if done >= total:
                words = f"in {format_seconds(seconds)}"
            else:
                words = "" if left is None else f"about {format_span(left)} left"
            bars.update(task, completed=done, words=_shortened(f"{words}  {note}" if note else words, room))

        yield draw


def _shortened(text: str, room: int) -> str:
    """Drop the last parts of a text, which stand two spaces apart, until it fits; the first part stays."""
    while len(text) > room and "  " in text:
        text = text.rpartition("  ")[0]
    return text


class Pace:
    """Time since a stage began, and the time left at its rate in the last half of the time that it has worked.

    So slow first steps count no more after a while. What earlier runs did is left out, and the time before the work
    began, in which workers start.
    """

    def __init__(self, total: int) -> None:
        self._total, self._begun = total, time.monotonic()
        self._seen: list[tuple[float, int]] = []
        """What was done at which time, from the last call before the work moved on."""
        self._spacing = 0.0
        """Least seconds between two of them."""

    def read(self, done: int) -> tuple[float, float | None]:
        """Return the seconds so far and the seconds left, None while they cannot be told."""
        now = time.monotonic()
        if not self._seen or done <= self._seen[0][1]:
            self._seen = [(now, done)]
        half = (self._seen[0][0] + now) / 2
        earlier = [seen for seen in self._seen if seen[0] <= half and seen[1] < done]
        then, before = (earlier or self._seen)[-1]
        if now - self._seen[-1][0] >= self._spacing:
            self._seen.append((now, done))
        if len(self._seen) > PLACES_KEPT:
            del self._seen[1::2]
            self._spacing = 2 * (now - self._seen[0][0]) / PLACES_KEPT
        rate = (done - before) / (now - then) if now > then else 0.0
        return now - self._begun, (self._total - done) / rate if rate and done < self._total else None


@contextmanager
def _progress_lines(name: str, total: int, unit: str) -> Iterator[Callable[[int, str], None]]:
    pace = Pace(total)
    last = 0.0

    def draw(done: int, note: str) -> None:
        nonlocal last
        seconds, left = pace.read(done)
        if seconds - last < LINE_EVERY_S and done < total:
            return
        last = seconds
        rest = "" if left is None else f", about {format_span(left)} left"
        text = f"{name}: {done:,}/{total:,} {unit} in {format_span(seconds)}{rest}{'  ' + note if note else ''}"
        fields = {"stage": name, "done": done, "total": total, "unit": unit, "seconds": round(seconds, 1)}
        fields |= {"rate": round(done / seconds, 3) if seconds else None}
        fields |= {"left_s": None if left is None else round(left, 1), "note": note}
        _log.log(NOTICE, "%s", text, extra=fields)

    yield draw


class Board:
    """Holds the progress and lines that workers post and the error that ends a run; runs in a Ray actor."""

    def __init__(self) -> None:
        self._step, self._note = 0, ""
        self._lines: list[Line] = []
        self._failure: HHNetError | None = None

    def post(self, step: int, note: str) -> None:
        """Set the number of steps done, and the note to show beside it."""
        self._step, self._note = step, note

    def tell(self, text: str, fields: dict[str, Any]) -> None:
        """Add a line for the user, with its fields in a log of JSON."""
        self._lines.append((text, fields))

    def fail(self, error: HHNetError) -> None:
        """Keep the first error that a restart would only repeat."""
        self._failure = self._failure or error

    def read(self, told: int) -> tuple[int, str, list[Line]]:
        """Return the last posted steps and note, and the lines after the first `told`."""
        return self._step, self._note, self._lines[told:]

    def failure(self) -> HHNetError | None:
        """Return the error that ended the run, or None."""
        return self._failure


def start_board() -> "ActorHandle":
    """Start a board on this process's own node, so that the loss of another node cannot take it away."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0)(Board).options(scheduling_strategy=here).remote()


@dataclass
class BoardView:
    """Context that shows a stage and lines from a board while the block lasts.

    `follow` gets the progress as well, and `hear` the fields of each line.
    """

    board: "ActorHandle"
    name: str
    done: int
    total: int
    unit: str
    follow: Callable[[int, str], None] = lambda done, note: None
    hear: Callable[[dict[str, Any]], None] = lambda fields: None

    def __post_init__(self) -> None:
        self._ended = threading.Event()
        # In a copy of this thread's context, since the reporter is a context variable and a new thread has none.
        self._thread = threading.Thread(target=copy_context().run, args=(self._poll,), daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(2 * BOARD_TIMEOUT_S)

    def _poll(self) -> None:
        import ray
        from ray.exceptions import RayError

        with stage(self.name, self.total, self.unit, self.done) as advance:
            shown, seen, told = self.done, "", 0
            ended = False
            while not ended:
                ended = self._ended.wait(1.0)
                with suppress(RayError):  # a lost or late board costs only the display; the work goes on
                    step, note, lines = ray.get(self.board.read.remote(told), timeout=BOARD_TIMEOUT_S)
                    # A restarted worker repeats some steps: the count stays until it is passed.
                    if step > shown or (step == shown and note != seen):
                        advance(step - shown, note)
                        self.follow(step, note)
                        shown, seen = step, note
                    for text, fields in lines:
                        _log.log(NOTICE, "%s", text, extra=fields)
                        self.hear(fields)
                    told += len(lines)
