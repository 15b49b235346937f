"""The order of the files of a folder, whose tests go to several processes file by file."""

from collections.abc import Sequence
from pathlib import Path

import pytest


def begin_with(files: Sequence[str], folder: Path, items: list[pytest.Item]) -> None:
    """Move the tests of these files of a folder to the front, in this order: the longest, else one is left at the end.

    A name that no file has is an error.
    """
    places = {folder / name: place for place, name in enumerate(files)}
    assert all(path.exists() for path in places), places
    items.sort(key=lambda item: places.get(item.path, len(places)))
