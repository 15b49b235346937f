"""What a serving process decides about runs that were missed."""

import uuid
from datetime import UTC, datetime, timedelta

from prefect.client.schemas.objects import FlowRun

from flows.serving import Deployment, missed_runs

NOW = datetime(2026, 11, 29, 8, 0, tzinfo=UTC)


def planned(hours: float, auto: bool = True, run_count: int = 0) -> FlowRun:
    """A scheduled run that is due in so many hours."""
    due = NOW + timedelta(hours=hours)
    values = {"flow_id": uuid.uuid4(), "auto_scheduled": auto, "run_count": run_count}
    return FlowRun(**values, next_scheduled_start_time=due)


def test_missed_is_what_the_schedule_wanted_and_nobody_began() -> None:
    late, later, coming = planned(-30), planned(-6), planned(+2)
    asked, waiting = planned(-5, auto=False), planned(-4, run_count=1)
    assert missed_runs([coming, later, asked, late, waiting], NOW) == [late, later]


def test_a_schedule_has_one_kind_and_its_time_zone() -> None:
    nightly = Deployment("n", {}, cron="0 2 * * *", timezone="Europe/Berlin").schedule()
    assert nightly is not None and (nightly.cron, nightly.timezone) == ("0 2 * * *", "Europe/Berlin")
    often = Deployment("n", {}, interval_s=3600.0).schedule()
    assert often is not None and often.interval == timedelta(hours=1)
    assert Deployment("n", {}).schedule() is None


def test_one_run_more_waits_or_is_cancelled() -> None:
    assert Deployment("n", {}, limit=2).concurrency().model_dump()["collision_strategy"] == "ENQUEUE"
    assert Deployment("n", {}, cancel_new=True).concurrency().model_dump()["collision_strategy"] == "CANCEL_NEW"
