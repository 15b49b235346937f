"""The result of `hhnet ingest`, of images and of shards that others wrote."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.artifacts.result import Result
from pipelines.artifacts.words import format_value, more_rows, short_place, wrap_text

FILES_SHOWN = 10
"""Skipped files that the console names; JSON names more."""
CLASSES_SHOWN = 10
"""Classes that the console names."""


@dataclass(frozen=True, kw_only=True)
class IngestResult(Result):
    """The shards, or those of each split; samples taken, files skipped, and the first of these by name and reason."""

    HIDDEN = ("skipped_reasons", "skipped_suffixes", "splits")  # shown in the tables

    verb: str = "ingest"
    samples: int
    skipped: int
    found: int
    skipped_reasons: dict[str, int]
    skipped_suffixes: dict[str, int] | None = None
    skipped_files: list[dict[str, Any]]
    notes: list[str] | None = None
    tars: int | None = None
    classes: list[str]
    splits: dict[str, dict[str, Any]] | None = None
    protocol: dict[str, Any] | None = None
    version: int | None = None

    def tables(self) -> Iterable[Sequence[Mapping[str, Any]]]:
        """Return the splits, and the counts of skipped files by reason."""
        suffixes = {"wrong_suffix": format_value(self.skipped_suffixes or {})}
        yield [
            {"split": name, "images": split["samples"], "uri": short_place(split["uri"]), "digest": split["digest"]}
            for name, split in (self.splits or {}).items()
        ]
        yield [
            {"skipped": reason, "files": count, "suffixes": suffixes.get(reason)}
            for reason, count in self.skipped_reasons.items()
        ]

    def fact(self, name: str, value: Any) -> list[str]:
        """Return the lines that show a field; of skipped files the first with their reasons, of classes their names."""
        if name == "classes" and value:
            more = "".join(more_rows(len(value) - CLASSES_SHOWN, indent=", "))
            return wrap_text(f"{len(value):,}: {', '.join(map(format_value, value[:CLASSES_SHOWN]))}{more}")
        if name != "skipped_files" or not value:
            return super().fact(name, value)
        lines = ["  ".join(map(format_value, file.values())) for file in value[:FILES_SHOWN]]
        if self.skipped <= len(lines):
            return lines
        there = "all" if self.skipped == len(value) else f"the first {len(value):,}"
        return [*lines, f"and {self.skipped - len(lines):,} more: --json has {there}"]
