"""Results of verbs in words: facts one to a line, and tables."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

TABLES = ("versions", "changes", "states", "summary", "by_step")
"""What of a result there are several of."""


ROWS_SHOWN = 50
FILES_SHOWN = 10


def present(result: Mapping[str, Any]) -> str:
    """A result for people: what happened, then its facts, one per line, and what there are several of as a table."""
    if result.get("results"):
        page = [f"page  {result['html']}"] if "html" in result else []
        return "\n\n".join([*(_present_query(entry) for entry in result["results"]), *page])
    lines = [f"{result['verb']}: {result['status']}"]
    elsewhere = ("verb", "status", *TABLES, "commands", "kinds")  # the planner shows its kinds before any work
    facts = {key: value for key, value in result.items() if key not in elsewhere and value not in (None, "", [], {})}
    if "skipped_files" in facts:
        facts["skipped_files"] = _first_skipped(result)
    width = max((len(key) for key in facts), default=0)
    for key, value in facts.items():
        first, *rest = _fact(value)
        lines += [f"  {key:<{width}}  {first}", *(f"  {'':<{width}}  {text}" for text in rest)]
    for name in TABLES:
        lines += _table(result.get(name, []))
    commands = [f"  {command}" for command in result.get("commands", [])]
    return "\n".join([*lines, *(["", "next:", *commands] if commands else [])])


def _first_skipped(result: Mapping[str, Any]) -> list[str]:
    """The first files that were skipped, one per line with its reason, and how many more there are."""
    named, total = result["skipped_files"], result["skipped"]
    lines = ["  ".join(map(str, file.values())) for file in named[:FILES_SHOWN]]
    if total <= len(lines):
        return lines
    there = "all of them" if total == len(named) else f"the first {len(named):,}"
    return [*lines, f"... and {total - len(lines):,} more, {there} with --json"]


def _fact(value: Any) -> list[str]:
    """Its lines: what is counted by name on one, texts on one each."""
    if isinstance(value, Mapping):
        return [", ".join(f"{name} {one}" for name, one in value.items())]
    if isinstance(value, list):
        texts = [str(one).replace("\n", "\\n") for one in value[:ROWS_SHOWN]]
        more = [f"... and {len(value) - ROWS_SHOWN:,} more, all of them with --json"] if len(value) > ROWS_SHOWN else []
        return [*(texts if isinstance(value[0], str) else [", ".join(texts)]), *more]
    if isinstance(value, bool):
        return ["yes" if value else "no"]
    if isinstance(value, float):
        return [f"{value:.4g}"]
    return [f"{value:,}" if isinstance(value, int) else str(value)]


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The first rows under a heading; a digest by its first digits."""
    if not rows:
        return []
    heading = list(dict.fromkeys(name for row in rows for name in row))
    cells = [heading, *([_cell(row.get(name)) for name in heading] for row in rows[:ROWS_SHOWN])]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["", *("  " + "  ".join(f"{cell:>{w}}" for cell, w in zip(row, widths, strict=True)) for row in cells)]


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    text = str(value)
    return text[:12] if re.fullmatch(r"[0-9a-f]{13,}", text) else text


def _present_query(entry: Mapping[str, Any]) -> str:
    near = entry["neighbours"]
    scored = bool(near) and "score" in near[0]
    heading = f"  {'score':>6}" if scored else ""
    labels = [", ".join(map(str, found["labels"])) or "-" for found in near]
    width = max(map(len, ["labels", *labels]))
    lines = [f"query {entry['query']}", f"  {'rank':>4}{heading}  {'distance':>8}  {'labels':<{width}}  key"]
    for rank, (found, label) in enumerate(zip(near, labels, strict=True), start=1):
        score = f"  {found['score']:>6.4f}" if scored else ""
        lines.append(f"  {rank:>4}{score}  {found['distance']:>8}  {label:<{width}}  {found['key']}")
    return "\n".join(lines)
