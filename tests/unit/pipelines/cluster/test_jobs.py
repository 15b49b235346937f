"""How the outcome of a job becomes a result or an error of the process that follows it."""

import json
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from pipelines.cluster.jobs import _Followed
from pipelines.cluster.records import record_mark
from pipelines.errors import HHNetError, may_heal


class EndedJob:
    """The client of a cluster whose job has failed, with one record in its log."""

    def __init__(self, record: dict[str, Any]) -> None:
        self.log = f"{record_mark('it')}{json.dumps(record)}\n"

    def get_job_info(self, _: str) -> SimpleNamespace:
        return SimpleNamespace(status=SimpleNamespace(is_terminal=lambda: True, value="FAILED"), driver_exit_code=3)

    def get_job_logs(self, _: str) -> str:
        return self.log

    async def tail_job_logs(self, _: str) -> AsyncIterator[str]:
        yield self.log


@pytest.mark.parametrize(("refused", "heals"), [({}, True), ({"refused": True}, False)])
def test_a_store_that_refused_a_job_for_good_is_not_tried_again(refused: dict[str, bool], heals: bool) -> None:
    client: Any = EndedJob({"error": "cannot write s3://b/x: 403", "code": 3, **refused})
    with pytest.raises(HHNetError, match="job it: cannot write s3://b/x: 403") as caught:
        _Followed(client, "http://127.0.0.1:1", "it", 5.0, {}).result()
    assert (caught.value.exit_code, may_heal(caught.value)) == (3, heals)
