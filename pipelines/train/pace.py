"""What a training says of its pace: the time that it takes on a CPU, if that is long, and what takes less."""

import logging
from collections.abc import Callable

from pipelines.artifacts.runs import RunLog
from pipelines.artifacts.words import format_span
from pipelines.cluster.progress import Pace
from pipelines.config.recipes import AUTO
from pipelines.config.settings import Config

_log = logging.getLogger(__name__)

LONG_S = 3600.0
"""Seconds of training on a CPU beyond which the user is told at its first steps what takes less."""
STEADY_S = 10.0
"""Seconds of steps after which their pace is judged; a shorter time varies too much."""


def watch_pace(log: RunLog, config: Config, on_cpu: bool) -> Callable[[int, str], None]:
    """Return a function that records progress, and once warns if the pace on a CPU means a long training."""
    before, judged = log.done, not on_cpu
    pace: Pace | None = None

    def follow(step: int, note: str) -> None:
        nonlocal pace, judged
        log.reach(step, note)
        if judged or step <= before:
            return
        pace = pace or Pace(log.total)  # from the end of the first step, which takes longer than the others
        seconds, left = pace.read(step)
        if left is None or seconds < STEADY_S:
            return
        judged = True
        if left > LONG_S:
            speed = format_speed((log.total - step) / left * config.data.batch_size)
            _log.warning("at %s this takes %s on this CPU: %s", speed, format_span(left), _faster(config))

    return follow


def format_speed(images: float) -> str:
    """Format a number of images per second: `0.4 images/s`, `120 images/s`."""
    return f"{images:,.{0 if images >= 10 else 1}f} images/s"


def _faster(config: Config) -> str:
    """Return what to try if a training takes too long on a CPU."""
    if config.train.recipe == AUTO:
        return "try `--set data.image_size=32 --set train.epochs=1` with another --out, fewer images, or a GPU"
    return (
        f"try `--recipe {AUTO}` with another --out and without your settings of data, model and train, since it fits "
        "them to this machine"
    )
