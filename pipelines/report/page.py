"""Building blocks of the HTML pages. All text from data is escaped here; pages load nothing."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from pipelines.report.pictures import data_uri
from pipelines.report.style import CSS

# Pages need no scripts and load nothing. Forbidding both keeps a name in the data that escaped escaping harmless.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


@dataclass(frozen=True)
class Tile:
    """One picture with its caption; `right` is None if right and wrong mean nothing for it."""

    name: str
    labels: Sequence[str] = ()
    picture: str | None = None
    distance: int | None = None
    right: bool | None = None
    remark: str = ""


@dataclass(frozen=True)
class Row:
    """A query and its neighbours, nearest first."""

    query: Tile
    neighbours: Sequence[Tile] = field(default_factory=tuple)


def document(title: str, over: str, body: Iterable[str], lead: str = "") -> str:
    """Return a whole page: its heading, then `body`, which is HTML already."""
    lead_html = f'<p class="lead">{escape(lead)}</p>' if lead else ""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f"<title>{escape(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n"
        f'<header><p class="over">{escape(over)}</p><h1>{escape(title)}</h1>{lead_html}</header>\n'
        + "\n".join(body)
        + "\n</main>\n</body>\n</html>\n"
    )


def section(title: str, *parts: str, lead: str = "") -> str:
    """Return a titled section of HTML parts."""
    lead_html = f'<p class="lead">{escape(lead)}</p>' if lead else ""
    return f"<section><h2>{escape(title)}</h2>{lead_html}\n" + "\n".join(parts) + "</section>"


def note(text: str) -> str:
    """Return a highlighted remark."""
    return f'<p class="note" role="note">{escape(text)}</p>'


def points(entries: Sequence[str]) -> str:
    """Return sentences as a list."""
    return f"<ul>{''.join(f'<li>{escape(entry)}</li>' for entry in entries)}</ul>"


def cards(entries: Sequence[tuple[str, str, str]]) -> str:
    """Return headline figures, given as (name, value, remark), as cards; the first is the main one."""
    items = [
        f'<div class="card{" main" if place == 0 else ""}"><dt>{escape(name)}</dt>'
        f"<dd>{escape(value)}{f'<small>{escape(remark)}</small>' if remark else ''}</dd></div>"
        for place, (name, value, remark) in enumerate(entries)
    ]
    return f'<dl class="cards">{"".join(items)}</dl>'


def plots(entries: Sequence[tuple[bytes, str, str]]) -> str:
    """Return PNG plots side by side, given as (bytes, alternative text, caption)."""
    figures = [
        f'<figure><img src="{data_uri(png, "png")}" alt="{escape(alt)}">'
        f"<figcaption>{escape(text)}</figcaption></figure>"
        for png, alt, text in entries
    ]
    return f'<div class="plots">{"".join(figures)}</div>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]], bar: int | None = None) -> str:
    """Return a table of text; a bar follows column `bar`, of a length given by its numbers from 0 to 1."""

    def cells(row: Sequence[str]) -> str:
        out = [f"<td>{escape(cell)}</td>" for cell in row]
        if bar is not None:
            out.insert(bar + 1, f'<td class="bar" aria-hidden="true">{_bar(row[bar])}</td>')
        return "".join(out)

    names = [f'<th scope="col">{escape(name)}</th>' for name in head]
    if bar is not None:
        names.insert(bar + 1, '<td class="bar" aria-hidden="true"></td>')
    body = "".join(f"<tr>{cells(row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{"".join(names)}</tr></thead><tbody>{body}</tbody></table></div>'


def _bar(value: str) -> str:
    try:
        share = min(1.0, max(0.0, float(value)))
    except ValueError:
        return ""
    return f'<span class="track"><span class="fill" style="width:{100 * share:.1f}%"></span></span>'


def facts(entries: Mapping[str, Any]) -> str:
    """Return names and values as a plain table."""
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td style="text-align:left;white-space:normal">'
        f"<code>{escape(str(value))}</code></td></tr>"
        for name, value in entries.items()
    )
    return f'<div class="scroll"><table><tbody>{body}</tbody></table></div>'


def folded(title: str, *parts: str) -> str:
    """Return parts that open on a click."""
    return f"<details><summary>{escape(title)}</summary>{''.join(parts)}</details>"


def gallery(rows: Sequence[Row]) -> str:
    """Return queries with their neighbours."""
    return "\n".join(
        f'<article class="query">{_tile(row.query, "div")}'
        f'<ol class="neighbours">{"".join(_tile(tile, "li") for tile in row.neighbours)}</ol></article>'
        for row in rows
    )


def _tile(tile: Tile, tag: str) -> str:
    verdict = {None: "", True: " right", False: " wrong"}[tile.right]
    mark = {None: "", True: '<b class="mark">✓</b> ', False: '<b class="mark">✗</b> '}[tile.right]
    labels = ", ".join(tile.labels)
    alt = ", ".join(
        text
        for text in (
            {None: "", True: "right", False: "wrong"}[tile.right],
            labels or tile.name,
            "" if tile.distance is None else f"distance {tile.distance}",
        )
        if text
    )
    # Small pictures are stored lossless: they are enlarged without blurring.
    tiny = (tile.picture or "").startswith("data:image/png")
    image = (
        f'<img{" class=tiny" if tiny else ""} src="{tile.picture}" alt="{escape(alt)}" loading="lazy">'
        if tile.picture
        else "<span>no picture</span>"
    )
    distance = "" if tile.distance is None else f'<br><span class="soft">distance {tile.distance}</span>'
    remark = f'<br><span class="soft">{escape(tile.remark)}</span>' if tile.remark else ""
    return (
        f'<{tag} class="tile{verdict}" title="{escape(tile.name)}"><div class="frame">{image}</div>'
        f'<span class="caption">{mark}<b>{escape(labels or tile.name)}</b>{distance}{remark}</span></{tag}>'
    )
