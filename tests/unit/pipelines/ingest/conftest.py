"""A folder of small pictures, and tars as others write them."""

from pathlib import Path

import pytest

from tests.support import pictures
from tests.support.foreign import numbered, write_foreign


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """24 pictures of 3 classes."""
    pictures.write_folder(tmp_path / "images")
    return tmp_path / "images"


@pytest.fixture
def wds(tmp_path: Path) -> Path:
    """Two tars of six samples with class numbers 0 to 2."""
    write_foreign(tmp_path / "wds" / "train-0000.tar", numbered(0, 6))
    write_foreign(tmp_path / "wds" / "train-0001.tar", numbered(6, 6))
    return tmp_path / "wds"
