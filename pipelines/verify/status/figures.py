"""Sums up run records: rate and time left, hosts, the slowest and the retried items, settings."""

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

from pipelines.artifacts.runs import Record, Run
from pipelines.config.loading import flattened
from pipelines.config.settings import Config

RATE_WINDOW_S = 600.0
"""Seconds that the rate is measured over: short enough to follow a cluster that grows or shrinks."""
ITEMS_SHOWN = 5


def choose_run(runs: Sequence[Run]) -> Run | None:
    """Return the newest run at work, else the newest run."""
    return next((one for one in reversed(runs) if one.state() == "working"), runs[-1] if runs else None)


def measure_pace(run: Run) -> Record:
    """Return the progress: done, total, unit and rate per second; None for values that are not known yet."""
    said = run.last
    rate = _rate(run)
    return {
        "done": int(said.get("done", 0)),
        "of": int(said.get("total", 0)) or None,
        "unit": said.get("unit") or None,
        "rate": None if rate is None else round(rate, 2),
        "note": said.get("note") or None,
    }


def seconds_left(found: Record) -> int | None:
    """Return the time left from the rest and the rate; None unless the run works and has a rate."""
    if found["status"] != "working" or not found.get("rate") or not found.get("of"):
        return None
    return round(max(0, int(found["of"]) - int(found["done"])) / float(found["rate"]))


def _rate(run: Run) -> float | None:
    """Return the work per second: over the whole of an ended run, else over the last RATE_WINDOW_S."""
    if run.end is not None and "done" in run.end and not run.back:
        began, before = float(run.begin.get("began", 0)), int(run.begin.get("done", 0))
        points = [(began, before), (float(run.end["ended"]), int(run.end["done"]))]
    else:
        points = _ends(run) or [(float(beat["at"]), int(beat["done"])) for beat in run.heartbeats]
    points = [point for point in points if points[-1][0] - point[0] <= RATE_WINDOW_S or run.end is not None]
    still = [point for point in points if point[1] == points[0][1]]  # before the first progress
    points = points[max(0, len(still) - 1) :]
    if len(points) < 2 or points[-1][1] <= points[0][1]:
        return None
    (start, before), (stop, after) = points[0], points[-1]
    return (after - before) / (stop - start) if stop > start else None


def _ends(run: Run) -> list[tuple[float, int]]:
    """Return (time, samples done) at the end of each item that the run did.

    The first entry is the start of counting: until then workers were built and a model was loaded.
    """
    ended = sorted(
        (float(one["ended"]), int(one["samples"])) for one in run.attempts if "ended" in one and one.get("samples")
    )
    return list(accumulate(ended, lambda before, one: (one[0], before[1] + one[1])))


def describe_run(run: Run) -> Record:
    """Return host, time, duration, versions and settings of a run, and the error that ended it."""
    ended = float(run.end["ended"]) if run.end and "ended" in run.end and not run.back else None
    began = float(run.begin.get("began", 0))
    state = run.state()
    stop = ended or (run.sign if state == "died" else time.time())
    return {
        "name": run.name,
        "verb": run.begin.get("verb"),
        "state": state,
        "host": run.begin.get("host"),
        "began": began,
        "seconds": round(stop - began),
        "silent_s": max(0, round(time.time() - run.sign)),
        "versions": run.begin.get("versions", {}),
        "settings": dict(_changed(run.begin.get("settings", {}))),
        "command": run.begin.get("command", []),
        "error": (run.end or {}).get("error"),
    }


def _changed(settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the settings that are not at their default, by dotted name."""
    usual = dict(flattened(Config().model_dump(mode="json")))
    for name, value in flattened(settings):
        if name not in usual or usual[name] != value:
            yield name, value


def list_attempts(runs: Sequence[Run]) -> list[Record]:
    """Return the attempts of several runs that record their host and time."""
    found = [one for run in runs for one in run.attempts]
    return [one for one in found if isinstance(one.get("began"), float) and isinstance(one.get("ended"), float)]


def host_figures(attempts: Sequence[Record]) -> list[Record]:
    """Return the figures of each host, the slowest per item first."""
    by_host: dict[str, list[Record]] = defaultdict(list)
    for one in attempts:
        by_host[str(one.get("host") or "?")].append(one)
    rows = [_host(name, tries) for name, tries in by_host.items()]
    return sorted(rows, key=lambda row: (-(row["mean_s"] or 0), row["host"]))


def _host(name: str, tries: Sequence[Record]) -> Record:
    done = [one for one in tries if one.get("end") == "done"]
    spent = [one["ended"] - one["began"] for one in done]
    samples = sum(int(one.get("samples") or one.get("rows") or 0) for one in done)
    wall = max(one["ended"] for one in tries) - min(one["began"] for one in tries)
    return {
        "host": name,
        "workers": len({one["pid"] for one in tries if one.get("pid")}),
        "gpus": len({gpu for one in tries for gpu in str(one.get("gpu") or "").split(",") if gpu}),
        "shards": len(done),
        "failed": len(tries) - len(done),
        "images_per_second": round(samples / wall, 1) if samples and wall > 0 else None,
        "mean_s": round(sum(spent) / len(spent), 2) if spent else None,
    }


def list_slowest(attempts: Sequence[Record]) -> list[Record]:
    """Return the items that took a worker longest."""
    done = [one for one in attempts if one.get("end") == "done"]
    done.sort(key=lambda one: one["began"] - one["ended"])
    return [
        {
            "shard": one["item"],
            "seconds": round(one["ended"] - one["began"], 2),
            "samples": one.get("samples", one.get("rows")),
            "rejects": one.get("rejects"),
            "host": one.get("host") or None,
            "worker": str(one["pid"]) if one.get("pid") else None,
            "gpu": one.get("gpu"),
        }
        for one in done[:ITEMS_SHOWN]
    ]


def list_retried(attempts: Sequence[Record]) -> list[Record]:
    """Return the items with more than one attempt, most attempts first, and the end of each attempt."""
    by_item: dict[str, list[Record]] = defaultdict(list)
    for one in attempts:
        by_item[str(one["item"])].append(one)
    rows = [
        {
            "shard": item,
            "attempts": len(tries),
            "ends": [str(one.get("end")) for one in tries],
            "hosts": list(dict.fromkeys(str(one.get("host") or "?") for one in tries)),
        }
        for item, tries in by_item.items()
        if len(tries) > 1 or tries[-1].get("end") != "done"
    ]
    return sorted(rows, key=lambda row: (-row["attempts"], row["shard"]))
