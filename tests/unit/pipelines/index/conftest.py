"""A small index in three shards, and the pool that builds it in this process."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.index.build import build_index
from pipelines.storage import failpoints
from tests.support.indexes import FLAT, codes_at
from tests.support.inline import InlinePool


@pytest.fixture
def pool() -> InlinePool:
    return InlinePool()


@pytest.fixture(autouse=True)
def fresh_failpoints() -> Iterator[None]:
    failpoints._hits.clear()
    yield
    failpoints._hits.clear()


@pytest.fixture
def index(tmp_path: Path, pool: InlinePool) -> str:
    uri = str(build_index([codes_at(tmp_path, "base", shards=3)], str(tmp_path / "index"), FLAT, pool=pool).uri)
    pool.done.clear()
    return uri
