"""What a run has to show for itself: one JSON object, and a page of Markdown for Prefect."""

import time
from typing import Any, cast

from flows.stages import Result


class StageLog:
    """Calls the stages one after another and remembers what each returned and how long it took."""

    def __init__(self) -> None:
        self.stages: list[Result] = []

    def add(self, stage: Any, *arguments: Any) -> Result:
        """Run a stage's task and note its result."""
        begun = time.monotonic()
        result = cast(Result, stage(*arguments))
        self.stages.append({**result, "seconds": round(time.monotonic() - begun, 1)})
        return result

    def summary(self, report: Result, out: str) -> Result:
        """The run as one JSON object; `status` is unchanged where every stage but the proofs was."""
        work = [stage for stage in self.stages if stage["verb"] != "verify"]
        unchanged = all(stage["status"] == "unchanged" for stage in work)
        return {
            "verb": "run",
            "status": "unchanged" if unchanged else "done",
            "uri": report["uri"],
            "digest": report["digest"],
            "map": report["map"],
            "chance": report["chance"],
            "convention": report["convention"],
            "report": report["report"],
            "images_per_second": encode_rate(self.stages),
            "store": out,
            "stages": self.stages,
        }


def encode_rate(stages: list[Result]) -> float | None:
    """Images per second over all encodings of the run, or None where nothing was encoded."""
    timed = [stage for stage in stages if stage.get("images_per_second")]
    seconds = sum(stage["samples"] / stage["images_per_second"] for stage in timed)
    return round(sum(stage["samples"] for stage in timed) / seconds, 1) if seconds else None


def run_report(summary: Result) -> str:
    """The run as Markdown for Prefect's page."""
    rows = [
        f"| {row['verb']} | {row['status']} | `{row['uri']}` | `{row['digest'][:12]}` | {row['seconds']:.1f} |"
        for row in summary["stages"]
    ]
    rate = summary["images_per_second"]
    figures = [
        f"mAP {summary['map']:.4f} (chance {summary['chance']:.4f})",
        f"{rate:g} images/s encoded" if rate else "nothing left to encode",
        f"report: {summary['report']}",
    ]
    table = ["| stage | status | where | digest | seconds |", "|---|---|---|---|---:|", *rows]
    return "\n".join(["# HHNet run", "", " · ".join(figures), "", *table, ""])
