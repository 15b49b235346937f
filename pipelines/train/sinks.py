"""Sinks of `train.log`: other programs that show the figures of a training while it runs.

Each needs a package that is an extra of hhnet. A sink that fails later costs its figures, not the training.
"""

import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from importlib.util import find_spec
from typing import Any

from pipelines.artifacts.words import last_part
from pipelines.errors import ConfigError, Unavailable
from pipelines.train.job import TrainJob

_log = logging.getLogger(__name__)

Log = Callable[[int, Mapping[str, float]], None]
"""Receives an epoch and its figures by name."""

TENSORBOARD_FOLDER = "tensorboard"
"""Folder below the present one that holds a folder of events for each training."""


def require_sink(name: str | None) -> None:
    """Raise ConfigError if the package behind `train.log` is not installed."""
    if name is not None and find_spec(name) is None:
        remedy = f"pip install 'hhnet[{name}]', or leave train.log out"
        raise ConfigError(f"train.log={name} needs the package {name}, which is not installed: {remedy}")


@contextmanager
def open_sink(job: TrainJob) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Yield a function that takes the fields of an epoch's line and logs its figures to `train.log`, if that is set."""
    name = job.config.train.log
    if name is None:
        yield lambda fields: None
        return
    stack = ExitStack()
    try:
        log = stack.enter_context(_SINKS[name](job, f"{last_part(job.out)}-{job.fingerprint[:8]}"))
    except Exception as error:  # whatever a library raises that talks to a server of its own
        raise Unavailable(f"train.log={name} cannot begin ({error}): mend that, or leave train.log out") from error
    try:
        yield _guarded(name, log)
    finally:
        try:
            stack.__exit__(*sys.exc_info())  # so that the run is marked as failed where the training is
        except Exception as error:  # as above; the model is what counts
            _log.warning("train.log=%s could not end its run: %s", name, error)


def _guarded(name: str, log: Log) -> Callable[[Mapping[str, Any]], None]:
    """Return a function that logs until the first failure, and warns of that."""
    failed = False

    def record(fields: Mapping[str, Any]) -> None:
        nonlocal failed
        figures = {shown: fields[field] for field, shown in _SHOWN.items() if fields.get(field) is not None}
        if failed or not figures:
            return
        try:
            log(int(fields["epoch"]), figures)
        except Exception as error:  # as above; the training goes on
            failed = True
            _log.warning("train.log=%s failed, so it gets no more figures: %s", name, error)

    return record


_SHOWN = {"loss": "train/loss", "map": "val/map", "chance": "val/chance"}
"""Names of the figures in a sink, by the fields of an epoch's line."""


@contextmanager
def _tensorboard(job: TrainJob, run: str) -> Iterator[Log]:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(f"{TENSORBOARD_FOLDER}/{run}") as writer:

        def log(epoch: int, figures: Mapping[str, float]) -> None:
            for name, value in figures.items():
                writer.add_scalar(name, value, epoch)
            writer.flush()

        yield log


@contextmanager
def _mlflow(job: TrainJob, run: str) -> Iterator[Log]:
    """Log to the run of this training, which a resume finds by its fingerprint."""
    import mlflow

    mark = f"tags.hhnet_fingerprint = '{job.fingerprint}'"
    found = mlflow.search_runs(filter_string=mark, max_results=1, output_format="list")
    tags = {"hhnet_fingerprint": job.fingerprint}
    with mlflow.start_run(found[0].info.run_id if found else None, run_name=run, tags=tags) as active:
        mlflow.log_params(job.settings)
        # With its id, since a run is active only in the thread that began it.
        yield lambda epoch, figures: mlflow.log_metrics(figures, epoch, run_id=active.info.run_id)


@contextmanager
def _wandb(job: TrainJob, run: str) -> Iterator[Log]:
    import wandb

    with wandb.init(project="hhnet", name=run, id=job.fingerprint[:16], resume="allow", config=job.settings) as active:
        yield lambda epoch, figures: active.log(figures, step=epoch)


_SINKS: Mapping[str, Callable[[TrainJob, str], AbstractContextManager[Log]]] = {
    "tensorboard": _tensorboard,
    "mlflow": _mlflow,
    "wandb": _wandb,
}
