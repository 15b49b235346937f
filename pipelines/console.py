"""Shows log records on stderr, each as a line `hhnet: ...` or as one line of JSON with its fields.

Every process that imports `pipelines` shows them in the form that HHNET_LOG_LEVEL and HHNET_LOG_JSON say; the command
line's flags go before these. `log_variables` gives another process the level and form of this one. In a Ray worker
stderr is the worker's own log file.
"""

import json
import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Literal, get_args

Level = Literal["debug", "info", "warning", "error"]

LEVEL_VARIABLE = "HHNET_LOG_LEVEL"
"""Environment variable with the least level that is shown."""
JSON_VARIABLE = "HHNET_LOG_JSON"
"""Environment variable that is 1 where records are shown as JSON."""
NOTICE = 35
"""Level of progress and the like, between warning and error: shown as a plain line, and hidden by `error` alone."""

_USUAL = {*vars(logging.makeLogRecord({})), "message", "asctime"}

logging.addLevelName(NOTICE, "NOTICE")


class Console(logging.Handler):
    """Writes to the present stderr; a line that nobody reads costs no work."""

    as_json = False
    level_name: Level = "warning"
    fields: Mapping[str, str] = {}
    """Fields of every record until further notice; a record's own fields go before them."""
    printer: Callable[[str], None] | None = None
    """Prints the lines instead, while a bar is drawn on the terminal."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write the record."""
        if self.as_json:
            self.write(_json_line(record, self.fields))
        else:
            program = getattr(record, "program", "hhnet")
            self.write(f"{'' if record.levelno == NOTICE else f'{program}: '}{record.getMessage()}")

    def write(self, text: str) -> None:
        """Write a line."""
        with suppress(OSError):
            if self.printer is not None:
                self.printer(text)
                return
            sys.stderr.write(f"{text}\n")
            sys.stderr.flush()


def _json_line(record: logging.LogRecord, more: Mapping[str, str]) -> str:
    when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created))
    usual = {"time": when, "level": record.levelname.lower(), "logger": record.name, "message": record.getMessage()}
    # Names with an underscore are left out: Ray marks every record with one.
    fields = {name: value for name, value in vars(record).items() if name not in _USUAL and name[0] != "_"}
    return json.dumps({**usual, **more, **fields}, default=str)


_CONSOLE = Console()


def show_log(level: Level | None = None, as_json: bool | None = None) -> None:
    """Show the records of `pipelines` and `flows` from this level on; None leaves it to the environment."""
    said = os.environ.get(LEVEL_VARIABLE, "").lower()
    usual: Level = next((name for name in get_args(Level) if name == said), "warning")
    _CONSOLE.level_name = level or usual
    _CONSOLE.as_json = os.environ.get(JSON_VARIABLE, "") in ("1", "true") if as_json is None else as_json
    logging.captureWarnings(_CONSOLE.as_json)  # Python's own warnings take several lines of text
    for name in ("pipelines", "flows", "py.warnings"):
        logger = logging.getLogger(name)
        logger.handlers = [_CONSOLE]
        logger.propagate = False  # at the root logger, Prefect and Ray would show the records again in their own form
        logger.setLevel(_CONSOLE.level_name.upper())


def show_as_ours(library: str) -> None:
    """Show the log of an imported library in this form too, where that is JSON."""
    if _CONSOLE.as_json:
        logging.getLogger(library).handlers = [_CONSOLE]


def log_variables() -> dict[str, str]:
    """Return the environment variables by which another process shows its log as this one does, unless as usual."""
    level = {LEVEL_VARIABLE: _CONSOLE.level_name} if _CONSOLE.level_name != "warning" else {}
    return {**level, **({JSON_VARIABLE: "1"} if _CONSOLE.as_json else {})}


@contextmanager
def logged_in_worker(shard: str) -> Iterator[None]:
    """Give all records of this process the shard that it works on in the block, and itself as `worker` (host:pid)."""
    _CONSOLE.fields = {"shard": shard, "worker": f"{socket.gethostname()}:{os.getpid()}"}
    try:
        yield
    finally:
        _CONSOLE.fields = {}


def draws_on_terminal() -> bool:
    """Tell whether bars and tables may be drawn on stderr: it is a terminal, and people read it."""
    return sys.stderr.isatty() and not _CONSOLE.as_json and logging.getLogger("pipelines").isEnabledFor(NOTICE)


def prints_on_terminal() -> bool:
    """Tell whether people read the results on stdout as they come: it is a terminal."""
    return sys.stdout is not None and sys.stdout.isatty()


@contextmanager
def printed_by(printer: Callable[[str], None]) -> Iterator[None]:
    """Have lines printed by this function in the block, since a bar that is drawn owns the terminal."""
    before, _CONSOLE.printer = _CONSOLE.printer, printer
    try:
        yield
    finally:
        _CONSOLE.printer = before


def relay(line: str, logger: logging.Logger, **fields: object) -> None:
    """Show a line of another process's log as it is; among records of JSON, as the message of one if it is none."""
    if _CONSOLE.as_json and not _is_record(line):
        logger.log(NOTICE, "%s", line, extra=fields)
    elif logger.isEnabledFor(NOTICE):
        _CONSOLE.write(line)


def _is_record(line: str) -> bool:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and {"logger", "message"} <= found.keys()
