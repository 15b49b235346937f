"""Self-contained HTML pages from the templates beside this file, which escape all that they are given."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from pipelines.artifacts.commit import ArtifactWriter
from pipelines.artifacts.manifest import Artifact, Part
from pipelines.report.pictures import data_uri
from pipelines.storage import canonical_json

SHORT_KEY_CHARS = 24

_COMMAND = re.compile(r"`([^`]+)`|(?<![\w-])(--[a-z][\w-]*(?: [\w.]+=[^\s,;:]*[^\s,;:.])?)")
"""What a sentence tells to type: what stands between backticks, or a flag with its setting."""


@dataclass(frozen=True)
class Tile:
    """One picture with its caption; `right` is None if right and wrong mean nothing for it.

    `name` is the sample's path or key, or what names it if it has none.
    """

    name: str
    labels: Sequence[str] = ()
    picture: str | None = None
    distance: int | None = None
    right: bool | None = None
    remark: str = ""

    @property
    def shown(self) -> str:
        """The labels, or the short name if there are none."""
        return ", ".join(self.labels) or short_key(self.name)

    @property
    def file(self) -> str:
        """The short name where the labels are shown, else nothing, since it is shown already."""
        return short_key(self.name) if self.labels else ""

    @property
    def apart(self) -> str:
        """The distance in words; a picture at distance 0 may be the query itself, which the codes cannot tell."""
        if self.distance is None:
            return ""
        return f"distance {self.distance}" if self.distance else "distance 0: same code"

    @property
    def alt(self) -> str:
        """Say in words what the frame, the caption and the distance show."""
        verdict = {None: "", True: "right", False: "wrong"}[self.right]
        return ", ".join(text for text in (verdict, self.shown, self.apart) if text)


@dataclass(frozen=True)
class GalleryRow:
    """A query and its neighbours, nearest first; `compared` are its neighbours by the new of two codes."""

    query: Tile
    neighbours: Sequence[Tile] = field(default_factory=tuple)
    compared: Sequence[Tile] = field(default_factory=tuple)

    @property
    def marked(self) -> bool:
        """Whether a neighbour has a mark that says right or wrong."""
        return any(tile.right is not None for tile in (*self.neighbours, *self.compared))


def short_key(key: str) -> str:
    """Return the last component of a key, its middle left out where it is long."""
    name = key.rstrip("/").rpartition("/")[2] or key
    half = SHORT_KEY_CHARS // 2
    return name if len(name) <= SHORT_KEY_CHARS else f"{name[: half - 1]}…{name[-half:]}"


def mark_commands(text: str) -> Markup:
    """Return a sentence as HTML in which what the user can type is code that breaks between its words only."""
    whole, end = Markup(), 0
    for found in _COMMAND.finditer(text):
        words = (found[1] or found[2]).split()
        code = Markup(" ").join(Markup("<span>{}</span>").format(word) for word in words)
        whole += escape(text[end : found.start()]) + Markup("<code>{}</code>").format(code)
        end = found.end()
    return whole + escape(text[end:])


def format_figure(value: float | None, spec: str = ",.4f", unit: float = 1) -> str:
    """Format a figure divided by its unit, or a dash where there is none."""
    return "–" if value is None else format(value / unit if unit != 1 else value, spec)


TEMPLATES = Environment(
    loader=PackageLoader("pipelines.report"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
TEMPLATES.filters |= {"data_uri": data_uri, "figure": format_figure, "commands": mark_commands}


def render(name: str, **facts: Any) -> str:
    """Fill in `templates/<name>.html.j2` with `facts`; a fact that the template needs and lacks is an error."""
    return TEMPLATES.get_template(f"{name}.html.j2").render(facts)


def put_report(
    writer: ArtifactWriter, figures: Mapping[str, Any], page: str, drawn: Mapping[str, bytes], rows: int
) -> list[Part]:
    """Put figures, page and PNGs as the parts of a report on `rows` queries."""
    files = {"metrics.json": canonical_json(figures), "report.html": page.encode()}
    files |= {f"{name}.png": data for name, data in drawn.items()}
    return [writer.put_part(name, data, rows) for name, data in sorted(files.items())]


def report_uris(artifact: Artifact) -> dict[str, str]:
    """Return where page and figures of a report lie."""
    names = {"report": "report.html", "metrics": "metrics.json"}
    return {what: f"{artifact.uri}/{artifact.manifest.part(name).path}" for what, name in names.items()}
