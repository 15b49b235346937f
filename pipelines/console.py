"""Shows log records on stderr, each as a line `hhnet: ...` or as one line of JSON with its fields.

Every process that imports `pipelines` shows warnings so; the command line sets another level and form. In a Ray worker
stderr is the worker's own log file.
"""

import json
import logging
import sys
import time
from contextlib import suppress
from typing import Literal

Level = Literal["debug", "info", "warning", "error"]

_USUAL = {*vars(logging.makeLogRecord({})), "message", "asctime"}


class Console(logging.Handler):
    """Writes to the present stderr; a line that nobody reads costs no work."""

    as_json = False

    def emit(self, record: logging.LogRecord) -> None:
        """Write the record."""
        text = _json_line(record) if self.as_json else f"hhnet: {record.getMessage()}"
        with suppress(OSError):
            sys.stderr.write(f"{text}\n")
            sys.stderr.flush()


def _json_line(record: logging.LogRecord) -> str:
    when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created))
    usual = {"time": when, "level": record.levelname.lower(), "logger": record.name, "message": record.getMessage()}
    # Names with an underscore are left out: Ray marks every record with one.
    fields = {name: value for name, value in vars(record).items() if name not in _USUAL and name[0] != "_"}
    return json.dumps(usual | fields, default=str)


_CONSOLE = Console()


def show_log(level: Level = "warning", as_json: bool = False) -> None:
    """Show the records of `pipelines` and `flows` from this level on."""
    _CONSOLE.as_json = as_json
    for name in ("pipelines", "flows"):
        logger = logging.getLogger(name)
        logger.handlers = [_CONSOLE]
        logger.propagate = False  # at the root logger, Prefect and Ray would show the records again in their own form
        logger.setLevel(level.upper())
