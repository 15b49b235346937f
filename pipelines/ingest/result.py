"""The result of `hhnet ingest`, of images and of shards that others wrote."""

from dataclasses import dataclass
from typing import Any

from pipelines.artifacts.result import Result

FILES_SHOWN = 10
"""Skipped files that the console names; JSON names more."""


@dataclass(frozen=True, kw_only=True)
class IngestResult(Result):
    """The shards, or those of each split; samples taken, files skipped, and the first of these by name and reason."""

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

    def fact(self, name: str, value: Any) -> list[str]:
        """Return the lines that show a field; of skipped files the first with their reasons, and how many more."""
        if name != "skipped_files" or not value:
            return super().fact(name, value)
        lines = ["  ".join(map(str, file.values())) for file in value[:FILES_SHOWN]]
        if self.skipped <= len(lines):
            return lines
        there = "all of them" if self.skipped == len(value) else f"the first {len(value):,}"
        return [*lines, f"... and {self.skipped - len(lines):,} more, {there} with --json"]
