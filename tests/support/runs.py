"""What the last run at a root recorded, as tests ask for it."""

from collections import defaultdict
from pathlib import Path
from typing import Any

from pipelines.artifacts.runs import read_runs
from pipelines.storage import Store


def run_record(out: str | Path) -> dict[str, Any]:
    """Its begin and end as one, with the `shards` that it did and how many attempts each took."""
    (run,) = read_runs(Store(out))
    assert run.end is not None, "the run closed its record"
    tries: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for attempt in run.attempts:
        tries[attempt["item"]].append(attempt)
    shards = [{**of[-1], "shard": item, "attempts": len(of)} for item, of in sorted(tries.items())]
    return {**run.begin, **run.end, "shards": shards}
