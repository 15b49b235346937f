"""What every unit test finds and leaves: the log as it is at the start of a process."""

from collections.abc import Iterator

import pytest

from pipelines.console import show_log


@pytest.fixture(autouse=True)
def usual_log() -> Iterator[None]:
    """Set the log back after a test, since verbs that run in this process change its level."""
    yield
    show_log()
