"""Shows a status in words and short tables."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.artifacts.runs import Record
from pipelines.artifacts.words import align_facts, format_span, format_table, wrap_text

STAGES_SHOWN = 40
SETTINGS_SHOWN = 12
SAME_DAY_S = 43_200
"""Seconds left within which the expected end is shown without its date: half a day, so the time alone is clear."""


def format_status(found: Record) -> str:
    """Format a status for people."""
    lines = [f"status: {found['status']}{_why(found)}"]
    active = next((one for one in found.get("stages", []) if one["stage"] in found.get("active", [])), None)
    lines += align_facts(_status_facts(found if active is None or "made" in found else {**found, "run": None}))
    if "made" not in found:
        lines += _table("stages", [_stage_row(one) for one in found.get("stages", [])[:STAGES_SHOWN]])
    if active is not None:
        lines += ["", f"{active['stage']}: {active['status']}{_why(active)}"]
        lines += align_facts(_status_facts({**active, "kind": None}))
    for name in ("hosts", "slowest", "retried"):
        rows = (active or found).get(name, [])
        lines += _table(name, rows)
    return "\n".join(lines)


def format_line(found: Record) -> str:
    """Format a status as one line, for a log."""
    active = [one for one in found.get("stages", []) if one["stage"] in found.get("active", [])]
    of = found if found.get("done") is not None or not active else active[0]
    name = f"{of['stage']} " if "stage" in of else ""
    parts = [f"{found['status']}: {name}{_done(of) or of.get('kind', '')}".strip(), *_pace(of)]
    if rejected := of.get("rejects", {}).get("total"):
        parts.append(f"{rejected:,} rejected")
    return ", ".join(parts)


def _why(found: Record) -> str:
    """Return the reason for the status, as the end of a sentence."""
    run = found.get("run")
    if not run:
        return ", nothing is working on it" if found["status"] == "pending" else ""
    if found["status"] == "working":
        return f", last sign of life {format_span(run['silent_s'])} ago"
    if found["status"] == "died":
        return f": last sign of life {format_span(run['silent_s'])} ago; the same command goes on from there"
    if found["status"] in ("failed", "interrupted"):
        return f": {run['error']}" if run["error"] else ""
    if found["status"] == "done" and run["state"] in ("died", "failed"):
        return f"; the last run ({run['verb']}) {run['state']}{': ' + run['error'] if run['error'] else ''}"
    return ", nothing is working on it" if found["status"] == "pending" else ""


def _status_facts(found: Record) -> list[tuple[str, str]]:
    run = found.get("run") or {}
    facts = [
        ("uri", found["uri"]),
        ("kind", found.get("kind")),
        ("digest", found.get("digest")),
        ("done", _done(found)),
        ("rate", " ".join(_pace(found)[:1]) or _starting(found)),
        ("time left", ", ".join(_pace(found)[1:])),
        ("epoch", f"{found['epoch']} of {found['epochs']}" if found.get("epoch") and found.get("epochs") else None),
        ("mAP", _map(found)),
        ("checkpoint", f"step {found['checkpoint_step']:,}" if found.get("checkpoint_step") else None),
        ("note", found.get("note") if found["status"] == "working" else None),
        ("rejects", _rejects(found["rejects"]) if "rejects" in found else None),
        ("failed", _failed(found.get("hosts") or [])),
        ("version", str(found["version"]) if found.get("version") else None),
        ("holds", _counts(found.get("totals") or {})),
        ("artifacts", "; ".join(f"{kind} {_counts(counts)}" for kind, counts in (found.get("made") or {}).items())),
        ("failures", "; ".join(found.get("failures") or [])),
        ("working on", ", ".join(found.get("active") or []) if found["status"] == "working" else None),
        ("to come", ", ".join(found.get("to_come") or [])),
        ("run", _run(run) if run else None),
        ("versions", _counts(run.get("versions") or {})),
        ("settings", _settings(run.get("settings") or {})),
    ]
    shown = [(name, [str(text)] if name == "uri" else wrap_text(str(text))) for name, text in facts if text]
    return [("" if place else name, line) for name, lines in shown for place, line in enumerate(lines)]


def _done(found: Record) -> str:
    shards, parts = found.get("shards"), []
    if shards:
        of = f" of {shards['of']:,}" if shards.get("of") else ""
        parts.append(f"{shards['done']:,}{of} shards")
    if found.get("of"):
        share = f" ({100 * found['done'] / found['of']:.0f} %)"
        parts.append(f"{found['done']:,} of {found['of']:,} {found.get('unit') or ''}".rstrip() + share)
    return ", ".join(parts)


def _pace(found: Record) -> list[str]:
    """Return the rate and, if known, the time left with the expected end."""
    if not found.get("rate"):
        return []
    parts = [f"{found['rate']:,.4g} {found.get('unit') or 'steps'}/s"]
    if found.get("left_s") is not None and found["status"] == "working":
        ends = time.localtime(time.time() + found["left_s"])
        when = time.strftime("%H:%M" if found["left_s"] < SAME_DAY_S else "%d %b %H:%M", ends)
        parts.append(f"about {format_span(found['left_s'])}, until {when}")
    return parts


def _starting(found: Record) -> str:
    """Return a note for a run at work that has nothing to show yet, else an empty text."""
    works = found["status"] == "working" and found.get("of") and not found.get("hosts")
    return "none yet: Ray and its workers start, or the first of them is at work" if works else ""


def _failed(hosts: Sequence[Record]) -> str:
    """Return how many recorded attempts at a shard ended badly, of all recorded ones."""
    failed, done = (sum(host[name] for host in hosts) for name in ("failed", "shards"))
    return f"{failed or 'none'} of {failed + done:,} attempts" if failed + done else ""


def _map(found: Record) -> str | None:
    if found.get("map") is None:
        return None
    so_far = "" if found["status"] == "done" else ", best so far"
    return f"{found['map']:.4f} on validation{so_far} (epoch {found.get('map_epoch')})"


def _rejects(rejects: Mapping[str, Any]) -> str:
    reasons = _counts(rejects["reasons"])
    some = f" (reasons of the first {rejects['looked_into']:,})" if "looked_into" in rejects else ""
    return f"{rejects['total']:,}{': ' + reasons if reasons else ''}{some}"


def _counts(counts: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {one:,}" if isinstance(one, int) else f"{name} {one}" for name, one in counts.items())


def _run(run: Mapping[str, Any]) -> str:
    began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(run["began"]))
    return (
        f"{run['verb']} on {run['host']}, began {began}, {run['state']}, {format_span(run['seconds'])} ({run['name']})"
    )


def _settings(settings: Mapping[str, Any]) -> str:
    shown = [f"{name}={value}" for name, value in settings.items()]
    more = [f"... and {len(shown) - SETTINGS_SHOWN} more with --json"] if len(shown) > SETTINGS_SHOWN else []
    return ", ".join([*shown[:SETTINGS_SHOWN], *more])


def _stage_row(stage: Record) -> Record:
    run = stage.get("run") or {}
    working = stage["status"] == "working"
    return {
        "stage": stage["stage"],
        "status": stage["status"],
        "done": _amount(stage) or _map(stage) or _counts(stage.get("totals") or {}),
        "rate": " ".join(_pace(stage)[:1]) or None,
        "left": format_span(stage["left_s"]) if working and stage.get("left_s") is not None else None,
        "took": format_span(run["seconds"]) if run else None,
        "rejects": (stage.get("rejects") or {}).get("total"),
    }


def _amount(stage: Record) -> str:
    """Return how much of a stage is done; of a finished one its images, steps or codes alone."""
    if stage["status"] == "done" and stage.get("of") and stage["done"] == stage["of"]:
        return f"{stage['of']:,} {stage.get('unit') or ''}".rstrip()
    return _done(stage)


def _table(title: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lay out rows under a title."""
    return ["", title, *format_table(rows)] if rows else []
