"""Results of verbs: a frozen dataclass per verb, as JSON and in words."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Self

if TYPE_CHECKING:
    from pipelines.artifacts.manifest import Artifact

ROWS_SHOWN = 50


@dataclass(frozen=True, kw_only=True)
class Result:
    """The result of a verb. A subclass for each verb adds its own figures, in the order of their display.

    A field whose default is None is left out of JSON while it is None.
    """

    TABLES: ClassVar[tuple[str, ...]] = ()
    """Fields that hold rows and are printed as tables."""
    HIDDEN: ClassVar[tuple[str, ...]] = ()
    """Fields that only JSON shows."""

    verb: str
    status: str
    uri: str
    digest: str | None

    @classmethod
    def of(cls, artifact: "Artifact", status: str, **figures: Any) -> Self:
        """Return the result of a verb that made or found an artifact."""
        return cls(status=status, uri=artifact.uri, digest=artifact.digest, **figures)

    def as_json(self) -> dict[str, Any]:
        """Return the result as plain JSON values, without the optional ones that are not set."""
        values = {field.name: (getattr(self, field.name), field.default) for field in fields(self)}
        return {name: value for name, (value, usual) in values.items() if value is not None or usual is MISSING}

    def as_text(self) -> str:
        """Return the result in words: what happened, then its facts, one per line, then its tables."""
        record = self.as_json()
        lines = [f"{self.verb}: {self.status}"]
        elsewhere = {"verb", "status", *self.TABLES, *self.HIDDEN}
        shown = {name: self.fact(name, value) for name, value in record.items() if name not in elsewhere}
        facts = {name: texts for name, texts in shown.items() if texts}
        width = max((len(name) for name in facts), default=0)
        for name, (first, *rest) in facts.items():
            lines += [f"  {name:<{width}}  {first}", *(f"  {'':<{width}}  {text}" for text in rest)]
        for name in self.TABLES:
            lines += _table(record.get(name, []))
        return "\n".join(lines)

    def fact(self, name: str, value: Any) -> list[str]:
        """Return the lines that show a field: counts by name on one, texts on one each, none for an empty value."""
        if value in (None, "", [], {}):
            return []
        if isinstance(value, Mapping):
            return [", ".join(f"{name} {one}" for name, one in value.items())]
        if isinstance(value, list):
            texts = [str(one).replace("\n", "\\n") for one in value[:ROWS_SHOWN]]
            more = len(value) - ROWS_SHOWN
            rest = [f"... and {more:,} more, all of them with --json"] if more > 0 else []
            return [*(texts if isinstance(value[0], str) else [", ".join(texts)]), *rest]
        if isinstance(value, bool):
            return ["yes" if value else "no"]
        if isinstance(value, float):
            return [f"{value:.4g}"]
        return [f"{value:,}" if isinstance(value, int) else str(value)]


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lay out the first rows under a heading; a digest by its first digits."""
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
