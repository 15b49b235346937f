"""Do risky work in a child process, item by item, and know of each item what became of it, deaths included."""

import multiprocessing
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.fuzz.guards import peak_growth

STUCK_S = 30.0
"""No outcome for this long, and the child is killed; its item counts as hung."""
MAX_HUNG = 3
"""As many, and there is no need to wait for more."""


@dataclass(frozen=True)
class Apart:
    """One outcome per item (`died` and `hung` are the parent's words), and how far a child's memory rose, in MiB."""

    outcomes: list[str]
    growth_mib: float


def do_apart(work: Callable[[int], str], items: Sequence[int], folder: Path) -> Apart:
    """`work(item)` for each item in a spawned child, which is replaced when it dies. `work` gives one word."""
    outcomes: list[str] = []
    growth = 0.0
    while len(outcomes) < len(items):
        log = folder / f"outcomes-{len(outcomes)}.txt"
        log.touch()
        rest = list(items[len(outcomes) :])
        child = multiprocessing.get_context("spawn").Process(target=_work_through, args=(work, rest, log))
        child.start()
        hung = _wait(child, log)
        *lines, last = log.read_text().split("\n")
        outcomes += [line for line in lines if not line.startswith("growth ")]
        growth = max([growth, *(float(line.split()[1]) for line in lines if line.startswith("growth "))])
        assert last == "" or hung or child.exitcode, last
        if len(outcomes) < len(items):
            assert hung or child.exitcode, "the child ended early without having died"
            outcomes.append("hung" if hung else "died")
            stuck = [items[place] for place, outcome in enumerate(outcomes) if outcome == "hung"]
            assert len(stuck) < MAX_HUNG, f"items {stuck} hung"
    return Apart(outcomes, growth)


def _wait(child: multiprocessing.process.BaseProcess, log: Path) -> bool:
    """Until the child ends; True if it had to be killed because nothing came of it any more."""
    size, since = 0, time.monotonic()
    while True:
        child.join(0.5)
        if child.exitcode is not None:
            return False
        if (now := log.stat().st_size) != size:
            size, since = now, time.monotonic()
        elif time.monotonic() - since > STUCK_S:
            child.kill()
            child.join()
            return True


def _work_through(work: Callable[[int], str], items: Sequence[int], log: Path) -> None:
    with log.open("a", buffering=1) as stream:
        with peak_growth() as memory:
            for item in items:
                stream.write(work(item) + "\n")
        stream.write(f"growth {memory.mib:.1f}\n")
