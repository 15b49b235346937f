"""Summaries of a run: one JSON object, and for Prefect a page of Markdown and tables."""

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from pipelines.artifacts.result import Result
from pipelines.artifacts.runs import Record, read_runs
from pipelines.artifacts.tables import REJECTS, read_table
from pipelines.artifacts.words import format_label, format_seconds, format_value, short_place
from pipelines.storage import Store
from pipelines.verify.rejects import parts_of_codes
from pipelines.verify.status.figures import list_attempts, list_slowest

SLOWEST_SHOWN = 20
"""Number of shards in the table of the slowest."""
RUNS_READ = 20
"""Number of last runs on the same codes in which the slowest shards are looked for."""
FIGURES = ("map", "samples", "skipped", "codes", "rejects", "tars", "proven", "epoch", "version", "kind")
"""Facts of a stage that the table at the end of a run shows."""
DETAIL_CHARS = 300
"""Characters of an error that a table shows."""


@dataclass(frozen=True, kw_only=True)
class RunResult(Result):
    """The figures and report of a run, and what each of its stages returned."""

    HIDDEN = ("stages",)  # shown as rows

    verb: str = "run"
    map: float
    chance: float
    convention: str
    report: str
    images_per_second: float | None
    store: str
    stages: list[Record]

    def tables(self) -> Iterable[Sequence[Mapping[str, Any]]]:
        """Return the stages: status, figures, time and place below the store."""
        return [[_stage_words(stage, self.store) for stage in self.stages]]


def _stage_words(stage: Record, store: str) -> Record:
    named = {name: stage[name] for name in FIGURES if stage.get(name) not in (None, [], "")}
    figures = [f"{format_label(name)} {format_value(value, name)}" for name, value in named.items()]
    damaged = [f"damaged tars {len(stage['damaged']):,}"] if stage.get("damaged") else []
    return {
        "stage": stage["stage"],
        "status": stage["status"],
        "figures": ", ".join([*figures, *damaged]),
        "time": format_seconds(stage["seconds"]),
        "uri": short_place(Store(str(stage.get("uri", ""))).uri).removeprefix(f"{short_place(Store(store).uri)}/"),
    }


class StageLog:
    """Calls the stages one after another, and records the result, the seconds and the failure of each."""

    def __init__(self) -> None:
        self.stages: list[Record] = []

    def add(self, stage: Any, name: str, *arguments: Any) -> Record:
        """Run a stage's task under a name, record its result and return it."""
        begun = time.monotonic()
        try:
            result = cast(Record, stage(name, *arguments))
        except BaseException as error:
            failed = "failed" if isinstance(error, Exception) else "ended"
            detail = (str(error) or type(error).__name__)[:DETAIL_CHARS]
            self.stages.append({"verb": name, "stage": name, "status": failed, "detail": detail, **_elapsed(begun)})
            raise
        self.stages.append({**result, "stage": name, **_elapsed(begun)})
        return result

    def summary(self, report: Record, out: str) -> RunResult:
        """Return the run as one JSON object. `status` is `unchanged` if that of every stage but `verify` is."""
        work = [stage for stage in self.stages if stage["verb"] != "verify"]
        unchanged = all(stage["status"] == "unchanged" for stage in work)
        return RunResult(
            status="unchanged" if unchanged else "done",
            **{name: report[name] for name in ("uri", "digest", "map", "chance", "convention", "report")},
            images_per_second=encode_rate(self.stages),
            store=out,
            stages=self.stages,
        )


def _elapsed(begun: float) -> Record:
    return {"seconds": round(time.monotonic() - begun, 1)}


def encode_rate(stages: list[Record]) -> float | None:
    """Return the images per second over all encodings of the run, or None if nothing was encoded."""
    timed = [stage for stage in stages if stage.get("images_per_second")]
    seconds = sum(stage["samples"] / stage["images_per_second"] for stage in timed)
    return round(sum(stage["samples"] for stage in timed) / seconds, 1) if seconds else None


# ------------------------------------------------------------------------------------------------------ for the page


def stage_rows(stages: Iterable[Record]) -> list[Record]:
    """Return the stages as rows of a table: status, seconds, counts, and the reason of a failure."""
    return [
        {
            "stage": stage["stage"],
            "status": stage["status"],
            "seconds": stage["seconds"],
            "samples": stage.get("samples"),
            "rejects": stage.get("rejects"),
            "detail": _detail(stage),
            "digest": str(stage.get("digest", ""))[:12],
            "where": stage.get("uri"),
        }
        for stage in stages
    ]


def _detail(stage: Record) -> str:
    """Return why a stage failed; for `verify`, the numbers of checked tars and their damages."""
    if "proven" not in stage:
        return str(stage.get("detail", ""))
    counts = f"{stage['proven']} tars proven, {stage['known']} before, {stage['left']} left"
    return "; ".join([counts, *stage["damaged"]])[:DETAIL_CHARS]


def reject_rows(codes: Mapping[str, str]) -> list[Record]:
    """Count rejects by codes and reason, also of codes that are not published yet."""
    rows = []
    for name, uri in codes.items():
        store = Store(uri)
        reasons: Counter[str] = Counter()
        for part in parts_of_codes(store):
            if part.path.startswith("rejects/"):
                reasons.update(read_table(store, part, REJECTS)["reason"].to_pylist())
        rows += [{"codes": name, "reason": reason, "rejects": count} for reason, count in reasons.most_common()]
    return rows


def slowest_rows(codes: Mapping[str, str]) -> list[Record]:
    """Return the shards on which a worker spent most time in the last runs on these codes."""
    rows: list[Record] = []
    for name, uri in codes.items():
        slowest = list_slowest(list_attempts(read_runs(Store(uri), RUNS_READ)))
        rows += [{"codes": name, **row} for row in slowest]
    return sorted(rows, key=lambda row: -row["seconds"])[:SLOWEST_SHOWN]


def run_page(stages: list[Record], summary: RunResult | None, links: Mapping[str, str]) -> str:
    """Return the run as Markdown: figures or the failure, links, stages."""
    lines = ["# HHNet run", ""]
    failed = next((stage for stage in stages if stage["status"] in ("failed", "ended")), None)
    if summary is not None:
        rate = summary.images_per_second
        encoded = f"{rate:g} images/s encoded" if rate else "nothing left to encode"
        lines += [f"mAP {summary.map:.4f} (chance {summary.chance:.4f}) · {encoded}", ""]
    elif failed is not None:
        lines += [f"**{failed['stage']} {failed['status']}:** {failed['detail']}", ""]
    lines += [f"- {name}: [{target}]({target})" for name, target in links.items()]
    lines += ["", "| stage | status | where | digest | seconds |", "|---|---|---|---|---:|"]
    lines += [
        f"| {row['stage']} | {row['status']} | `{row['where'] or ''}` | `{row['digest']}` | {row['seconds']:.1f} |"
        for row in stage_rows(stages)
    ]
    return "\n".join([*lines, ""])
