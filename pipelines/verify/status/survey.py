"""Reports the progress of a folder of artifacts: all below the `run.out` of `hhnet run`, or below a study's --out."""

import json
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress

from pipelines.artifacts.nearby import is_root, list_roots
from pipelines.artifacts.runs import Record, Run, read_runs
from pipelines.errors import InputError
from pipelines.storage import Store
from pipelines.verify.status import figures
from pipelines.verify.status.roots import RUNS_READ, describe_root

STAGE_FOLDERS = ("shards", "model", "codes", "index", "reports")
"""Folders of `hhnet run`, in the order of its stages; `model-<method>` is a rotated model."""
STUDY_FOLDERS = ("model", "codes", "report", "study")
"""Folders of a study, each with one or more artifacts per cell."""
STATE_PRECEDENCE = ("working", "died", "failed", "interrupted", "pending", "done")
"""States in order of precedence: the first one that a stage has is the state of the whole."""
FAILURES_READ = 20


class Survey:
    """Looks repeatedly at one root, or at a folder of roots; a finished root is not read again."""

    def __init__(self, uri: str) -> None:
        self.store = Store(uri)
        self._settled: dict[str, Record] = {}

    def look(self) -> Record:
        """Return the state of everything there; raise InputError where there is nothing."""
        if is_root(self.store):
            return describe_root(self.store)
        runs = read_runs(self.store, RUNS_READ)
        roots = self._roots()
        if not roots and not runs:
            raise InputError(
                f"{self.store.uri} holds nothing that a verb has begun: name the --out of a verb, of `hhnet study`, or "
                "run.out of `hhnet run`"
            )
        stages = [{"stage": name, **self._stage(name)} for name in roots]
        if any(run.begin.get("verb") == "study" for run in runs) or any(name.startswith("study/") for name in roots):
            return self._study(stages, runs)
        return self._whole("folder", stages, _to_come(roots))

    def _roots(self) -> list[str]:
        """Return the roots one or two folders below, in the order of the stages."""
        places = {name: place for place, name in enumerate((*STAGE_FOLDERS, *STUDY_FOLDERS))}
        return sorted(list_roots(self.store), key=lambda name: (places.get(name.split("/")[0].split("-")[0], -1), name))

    def _stage(self, name: str) -> Record:
        store = self.store.child(name)
        if name not in self._settled:
            found = describe_root(store)
            if found["status"] != "done":
                return found
            self._settled[name] = found
        return self._settled[name]

    def _whole(self, kind: str, stages: Sequence[Record], to_come: Sequence[str]) -> Record:
        states = [*(str(stage["status"]) for stage in stages), *("pending" for _ in to_come)]
        status = next((state for state in STATE_PRECEDENCE if state in states), "pending")
        active = [stage["stage"] for stage in stages if stage["status"] == status != "done"]
        return {
            "status": status,
            "uri": self.store.uri,
            "digest": None,
            "kind": kind,
            "active": active,
            "to_come": list(to_come),
            "stages": list(stages),
            "run": max((one["run"] for one in stages if one.get("run")), key=lambda run: run["began"], default=None),
        }

    def _study(self, stages: Sequence[Record], runs: Sequence[Run]) -> Record:
        """Return the state of a study: the cells done by its runs, artifacts by kind, and failures."""
        whole = self._whole("study", stages, ())
        published = [stage for stage in stages if stage["stage"].startswith("study/") and stage["status"] == "done"]
        run = figures.choose_run(runs)
        state = run.state() if run else whole["status"]
        status = "done" if published and state != "working" else "pending" if state == "done" else state
        pace = figures.measure_pace(run) if run else {}
        counts = {
            step: dict(Counter(str(s["status"]) for s in stages if s["stage"].startswith(f"{step}/")))
            for step in STUDY_FOLDERS
        }
        return {
            **whole,
            "status": status,
            "digest": published[-1]["digest"] if published else None,
            **pace,
            "left_s": figures.seconds_left({**pace, "status": status}),
            "active": [stage["stage"] for stage in stages if stage["status"] == "working"],
            "made": {step: count for step, count in counts.items() if count},
            "failures": self._failures(),
            "run": figures.describe_run(run) if run else None,
        }

    def _failures(self) -> list[str]:
        """Return the last error of each cell that failed and was not made since; at most FAILURES_READ errors."""
        last: dict[str, str] = {}
        for name in sorted(self.store.names("failures")):
            last[name.split("/")[1]] = name  # failures/model-0123abcd/000001.json
        failed = [last[one] for one in last if self.store.size(f"{one.replace('-', '/', 1)}/manifest.json") is None]
        found = []
        for name in failed[:FAILURES_READ]:
            with suppress(ValueError, KeyError, TypeError, FileNotFoundError):  # half a record must not hide the others
                found.append(str(json.loads(self.store.read(name))["error"]))
        return found


def _to_come(roots: Sequence[str]) -> list[str]:
    """Return the stages of `hhnet run` that have not begun; [] for a folder that `hhnet run` did not make."""
    begun = {name.split("/")[0] for name in roots}
    if not all(name in STAGE_FOLDERS or name.startswith("model-") for name in begun):
        return []
    return [name for name in STAGE_FOLDERS if name not in begun and name != "shards"]
