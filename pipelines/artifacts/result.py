"""Results of verbs: a frozen dataclass per verb, as JSON and in words."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pipelines.artifacts.words import align_facts, format_label, format_table, format_value, more_rows, wrap_text

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
    TEXT_ONLY: ClassVar[tuple[str, ...]] = ()
    """Fields that only the text shows, not JSON."""

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
        told = [field for field in fields(self) if field.name not in self.TEXT_ONLY]
        values = {field.name: (getattr(self, field.name), field.default) for field in told}
        return {name: value for name, (value, usual) in values.items() if value is not None or usual is MISSING}

    def as_text(self) -> str:
        """Return the result in words: what happened, then its facts, one per line, then its tables."""
        record = self.as_json()
        lines = [f"{self.verb}: {self.outcome()}"]
        elsewhere = {"verb", "status", *self.TABLES, *self.HIDDEN}
        shown = {format_label(name): self.fact(name, value) for name, value in record.items() if name not in elsewhere}
        lines += align_facts(
            ("" if place else name, text) for name, texts in shown.items() for place, text in enumerate(texts)
        )
        for rows in self.tables():
            lines += ["", *format_table(rows, ROWS_SHOWN)] if rows else []
        return "\n".join(lines)

    def outcome(self) -> str:
        """Return the status in words."""
        return self.status

    def tables(self) -> Iterable[Sequence[Mapping[str, Any]]]:
        """Return the rows of each table that follows the facts."""
        record = self.as_json()
        return [record.get(name) or [] for name in self.TABLES]

    def fact(self, name: str, value: Any) -> list[str]:
        """Return the lines that show a field: texts of a list on one each, none for an empty value."""
        if value in (None, "", [], {}):
            return []
        if isinstance(value, list):
            shown = value[:ROWS_SHOWN]
            texts = map(format_value, shown) if isinstance(value[0], str) else [format_value(shown)]
            lines = [line for text in texts for line in wrap_text(text)]
            return [*lines, *more_rows(len(value) - len(shown))]
        return [format_value(value, name)]
