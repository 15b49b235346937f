"""Reads the rows of a CSV, each cell as the text in the file."""

import codecs
import csv
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import IO

from pipelines.errors import InputError

MAX_LINE_CHARS = 16 << 20
"""Longest line in characters; a longer one means that the file is no table."""
MAX_CELL_CHARS = 1 << 20
"""Longest cell in characters."""
DELIMITERS = (",", ";", "\t", "|")
"""Delimiters in the order in which they are tried on the header."""

_BOMS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before the mark of UTF-16, since that is how this one begins
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_NAMED_DELIMITER = re.compile(r"sep=(.)\s*")


def read_csv(path: Path, column: str, encoding: str | None = None) -> Iterator[tuple[int, list[str]]]:
    """Yield the line number and the cells of each row, the header first. Rows without any text are skipped.

    The encoding is that of the byte-order mark, else `encoding`, else UTF-8. The delimiter is a comma, unless the
    header has `column` only with a semicolon, tab or bar, or a line such as `sep=;` stands above it. Raises InputError
    for a file that cannot be read as a table.
    """
    chosen = _encoding(path, encoding)
    csv.field_size_limit(MAX_CELL_CHARS)
    try:
        with path.open(encoding=chosen, newline="") as text:
            yield from _rows(path, column, text)
    except UnicodeError as error:
        raise InputError(_undecodable(path, chosen, error)) from None
    except (LookupError, ValueError):  # the latter for a NUL in its name
        raise InputError(f"--encoding {encoding!r}: there is no such text encoding; give cp1252 for example") from None
    except OSError as error:
        raise InputError(f"cannot read {path} as a table: {error.strerror}") from None


def _rows(path: Path, column: str, text: IO[str]) -> Iterator[tuple[int, list[str]]]:
    lines, before = _read_lines(path, text), 0
    head = next(lines, "")
    while head and not head.strip():
        head, before = next(lines, ""), before + 1
    named = _NAMED_DELIMITER.fullmatch(head)
    if named:
        head, before = next(lines, ""), before + 1
    if not head.strip():
        raise InputError(f"{path} is empty: its first line names the columns")
    delimiter = named[1] if named else _delimiter(head, column)
    reader = csv.reader(chain([head], lines), delimiter=delimiter, strict=True)
    width, row, line = 0, 0, before + 1
    try:
        for cells in reader:
            if any(map(str.strip, cells)):
                if not width:
                    width = len(cells)
                elif len(cells) < width or any(cells[width:]):
                    raise InputError(
                        f"{path}, row {row} (line {line}): {len(cells)} cells, but the header has {width}: "
                        f"quote a cell that contains {delimiter!r}"
                    )
                yield line, cells[:width]
                row += 1
            line = before + reader.line_num + 1
    except csv.Error as error:
        hint = "a quotation mark before it may not be closed" if "limit" in str(error) else "check its quotation marks"
        raise InputError(f"{path}, row {row} (line {line}): {error}: {hint}") from None


def _read_lines(path: Path, text: IO[str]) -> Iterator[str]:
    while line := text.readline(MAX_LINE_CHARS):
        if len(line) == MAX_LINE_CHARS:
            raise InputError(f"{path} has a line of more than {MAX_LINE_CHARS} characters: it is no table")
        line.encode()  # raises UnicodeError for a lone surrogate: a few encodings can spell it, UTF-8 cannot store it
        yield line


def _delimiter(head: str, column: str) -> str:
    for delimiter in DELIMITERS:
        try:
            if column in map(str.strip, next(csv.reader([head], delimiter=delimiter))):
                return delimiter
        except csv.Error:  # not parseable with this delimiter; another one may fit
            continue
    return DELIMITERS[0]


def _encoding(path: Path, given: str | None) -> str:
    try:
        with path.open("rb") as stream:
            head = stream.read(4)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except OSError as error:
        raise InputError(f"cannot read {path} as a table: {error.strerror}") from None
    for mark, name in _BOMS:
        if head.startswith(mark):
            return name
    if given is None and b"\0" in head:
        raise InputError(f"{path} is not UTF-8: give --encoding utf-16-le or utf-16-be if it is text")
    return given or "utf-8"


def _undecodable(path: Path, encoding: str, error: UnicodeError) -> str:
    if encoding not in ("utf-8", "utf-8-sig"):
        return f"{path} is not {encoding}: {getattr(error, 'reason', error)}: give its --encoding"
    with path.open("rb") as stream:
        for line, data in enumerate(iter(lambda: stream.readline(MAX_LINE_CHARS), b"")):
            try:
                data.decode()
            except UnicodeDecodeError as found:
                return (
                    f"{path} is not UTF-8: byte 0x{data[found.start]:02x} in row {line} (line {line + 1}): "
                    f"give its --encoding, such as cp1252, or save it as UTF-8"
                )
    return f"{path} is not UTF-8: give its --encoding, such as cp1252, or save it as UTF-8"
