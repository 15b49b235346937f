"""Verbs in processes of their own, which can be killed, and start at once: forked from one that imported everything.

done = run(verb, "ingest", str(source), "--out", str(out), failpoints="part.put.before=kill")
done.code     exit code, -9 after SIGKILL
done.result   what `--json` printed, or None
done.errors   the lines on stderr that are errors, without those of progress
done.hits     how often it passed each failpoint, where `failpoints` names any and nothing killed it
"""

import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from pipelines.__main__ import run_command_line
from pipelines.artifacts.facts import Progress
from pipelines.artifacts.manifest import open_artifact
from pipelines.config.loading import load_config
from pipelines.encode import encode, retry_rejects
from pipelines.errors import HHNetError
from pipelines.index import build, update
from pipelines.storage import Store
from pipelines.storage import failpoints as places
from pipelines.train.checkpoints import Checkpoints
from pipelines.train.train import plan_training
from pipelines.train.worker import train_worker
from tests.support.inline import InlinePool

LIMIT_S = 120
ON_A_POOL = (
    *((encode, "encode"), (retry_rejects, "retry_rejects")),
    *((build, "build_index"), (update, "add_codes"), (update, "compact_index")),
)
MARK = "c" * 64

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.support.preload"])


@dataclass(frozen=True)
class Done:
    """How a process ended."""

    code: int
    out: str
    err: str
    seconds: float
    hits: dict[str, int]

    @property
    def result(self) -> dict[str, Any] | None:
        """What the verb printed with --json."""
        return json.loads(self.out) if self.out.strip() else None

    @property
    def errors(self) -> list[str]:
        """Lines of stderr that say what went wrong."""
        return [line for line in self.err.splitlines() if line.startswith(("hhnet:", "Traceback"))]


def run(
    work: Callable[..., None],
    *args: Any,
    failpoints: str = "",
    kill_after: float | None = None,
    variables: dict[str, str] | None = None,
) -> Done:
    """Run `work(*args)` in a process of its own, killed after `kill_after` seconds if it still runs then."""
    with tempfile.TemporaryDirectory() as folder:
        changes = {places.FAILPOINTS_VARIABLE: failpoints, **(variables or {})}
        process = _context.Process(target=_child, args=(work, args, changes, folder))
        begun = time.monotonic()
        process.start()
        process.join(LIMIT_S if kill_after is None else kill_after)
        if process.is_alive():
            process.kill()
            process.join()
            assert kill_after is not None, f"{args} still ran after {LIMIT_S} s"
        seconds = time.monotonic() - begun
        said = (Path(folder, name) for name in ("out", "err", "hits"))
        out, err, hits = (path.read_text() if path.exists() else "" for path in said)
        return Done(int(process.exitcode or 0), out, err, seconds, json.loads(hits or "{}"))


def begin(work: Callable[..., None], *args: Any) -> BaseProcess:
    """Begin `work(*args)` in a process of its own, for the caller to end."""
    process = _context.Process(target=work, args=args)
    process.start()
    return process


def _child(work: Callable[..., None], args: tuple[Any, ...], variables: dict[str, str], folder: str) -> None:
    os.environ.update(variables)
    for number, name in ((1, "out"), (2, "err")):
        descriptor = os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    try:
        work(*args)
    finally:
        Path(folder, "hits").write_text(json.dumps(places._hits))


def verb(*words: str) -> None:
    """The command line; shards are encoded and an index is built in this process instead of on Ray."""
    pool = InlinePool()
    for module, name in ON_A_POOL:  # the command line takes no pool, and this process runs nothing else
        setattr(module, name, partial(getattr(module, name), pool=pool))
    sys.argv = ["hhnet", *words, "--json"]
    run_command_line()


def save_checkpoints(root: str, steps: int) -> None:
    """What a training does with its checkpoints: go on from the newest that verifies, save each step."""
    try:
        checkpoints = Checkpoints(Store(root), MARK)
        last = checkpoints.latest()
        for step in range(last.step + 1 if last else 1, steps + 1):
            state = {"w": torch.full((100,), float(step))}
            checkpoints.save(checkpoints.new_name(step), step, state, Progress.new())
    except HHNetError as error:
        sys.stderr.write(f"hhnet: {error}\n")
        sys.exit(error.exit_code)


def train_checkpoints(shards: str, out: str, sets: Sequence[str]) -> None:
    """The whole of a training but its end: all checkpoints are there, the model is not."""
    torch.set_num_threads(1)
    job = plan_training(open_artifact(shards, "shards"), None, out, load_config(sets=sets))
    job.writer()
    train_worker(job, lambda step, note: None)
