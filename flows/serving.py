"""A deployment and the process that serves it: what it runs when, what it stops, and how it ends.

Prefect's own runner stops hearing of cancellations, and then of schedules, when its server is away for half a minute.
This one asks by itself. It uses inner parts of `prefect.runner`, all of them in the class below.
"""

import asyncio
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import anyio
import httpx
from prefect.automations import Automation
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterId,
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy, FlowRun, StateType
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import EventTrigger, Posture
from prefect.exceptions import ObjectNotFound, PrefectException
from prefect.runner import Runner
from prefect.schedules import Cron, Interval, Schedule
from prefect.states import Cancelled
from prefect.types.entrypoint import EntrypointType

from flows.lifeline import VARIABLE, adopt_orphans, end_orphaned_ray
from flows.pipeline import pipeline

LOOK_EVERY_S = 5.0
"""Seconds between two looks at what the server wants of the runs of this process."""
HEARTBEAT_S = 30
"""Seconds between two signs of life of a run; Prefect's least."""
MISSED_AFTER_S = 60.0
"""Seconds after which a scheduled run that nobody began counts as missed."""

OUT_OF_REACH = (httpx.HTTPError, PrefectException)


@dataclass(frozen=True)
class Deployment:
    """What is served: a name, parameters, and when and how often runs begin."""

    name: str
    parameters: dict[str, Any]
    tags: tuple[str, ...] = ()
    cron: str | None = None
    interval_s: float | None = None
    timezone: str = "UTC"
    limit: int = 1
    cancel_new: bool = False
    lost_after_s: float = 0.0

    def schedule(self) -> Schedule | None:
        """Prefect's schedule, or None: only when asked to."""
        if self.cron is not None:
            return Cron(self.cron, timezone=self.timezone)
        if self.interval_s is not None:
            return Interval(timedelta(seconds=self.interval_s), timezone=self.timezone)
        return None

    def concurrency(self) -> ConcurrencyLimitConfig:
        """How many runs there may be at one time over all processes, and what becomes of one more."""
        strategy = ConcurrencyLimitStrategy.CANCEL_NEW if self.cancel_new else ConcurrencyLimitStrategy.ENQUEUE
        return ConcurrencyLimitConfig(limit=self.limit, collision_strategy=strategy)


def serve(deployment: Deployment) -> None:
    """Register the deployment and run what is due until SIGINT or SIGTERM."""
    with suppress(KeyboardInterrupt):
        asyncio.run(_serve(deployment))


async def _serve(deployment: Deployment) -> None:
    runner = Server(deployment)
    uid = await runner.register()
    async with get_client() as client:
        await crash_lost_runs(client, deployment, uid)
        dropped = await drop_missed_runs(client, uid)
    if dropped:
        sys.stderr.write(
            f"{dropped + 1} scheduled runs were missed: the last is made up for, {dropped} before it cancelled\n"
        )
    await runner.serve()


class Server(Runner):
    """Runs flow runs in processes of their own, which end with this one."""

    def __init__(self, deployment: Deployment) -> None:
        # No limit of this process: the deployment's own counts over all processes and knows what to do beyond it.
        super().__init__(name=deployment.name, limit=None, heartbeat_seconds=HEARTBEAT_S, pause_on_shutdown=False)
        self._deployment = deployment
        self._away = False
        os.environ[VARIABLE] = str(os.getpid())  # for flows.lifeline in the processes of the runs
        adopt_orphans()

    async def register(self) -> UUID:
        """Put the deployment on the server; its id."""
        served = self._deployment
        uid: UUID = await self.aadd_flow(
            pipeline,
            name=served.name,
            schedule=served.schedule(),
            parameters=served.parameters,
            tags=list(served.tags),
            concurrency_limit=served.concurrency(),
            entrypoint_type=EntrypointType.MODULE_PATH,
        )
        return uid

    async def serve(self) -> None:
        """Begin runs that are due and end those that are not wanted any more, until SIGTERM."""
        async with self, anyio.create_task_group() as group:
            self._stop_observing()
            loop = asyncio.get_running_loop()
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                loop.add_signal_handler(number, lambda: loop.create_task(self.astop()))
            self._loops_task_group = group
            group.start_soon(self._repeat, self._get_and_submit_flow_runs, self.query_seconds)
            group.start_soon(self._repeat, self._end_unwanted, LOOK_EVERY_S)

    def _stop_observing(self) -> None:
        """End Prefect's own watch for cancellations, which gives up for ever while the server is away."""
        observer = self._cancelling_observer
        assert observer is not None, "the runner was entered"
        watches = (
            (observer._consumer_task, observer._start_polling_task),
            (observer._polling_task, observer._handle_polling_task_done),
        )
        for task, callback in watches:
            if task is not None:
                task.remove_done_callback(callback)
                task.cancel()

    async def _repeat(self, look: Any, every_s: float) -> None:
        """Look again and again; a server that is away is told once, and asked on."""
        while True:
            try:
                await look()
            except OUT_OF_REACH as error:
                if not self._away:
                    sys.stderr.write(f"Prefect does not answer ({str(error) or type(error).__name__}); asking on\n")
                self._away = True
            else:
                if self._away:
                    sys.stderr.write("Prefect answers again\n")
                self._away = False
            await asyncio.sleep(every_s)

    async def _end_unwanted(self) -> None:
        """Stop the runs of this process that the server has as cancelled, crashed or deleted, and what runs left."""
        await anyio.to_thread.run_sync(end_orphaned_ray)
        for uid in self._process_manager.flow_run_ids():
            try:
                run = await self._client.read_flow_run(uid)
            except ObjectNotFound:
                await self._process_manager.kill(uid)
                continue
            if run.state is None:
                continue
            if run.state.is_cancelling():
                await self._cancel_run(run)
            elif run.state.is_crashed() or run.state.is_cancelled():
                await self._kill_if_working(run)

    async def _kill_if_working(self, run: FlowRun) -> None:
        """Kill the process of a run that somebody else ended, unless it is just ending by itself."""
        await asyncio.sleep(LOOK_EVERY_S)
        if self._process_manager.get(run.id) is not None:
            await self._process_manager.kill(run.id)


async def crash_lost_runs(client: PrefectClient, deployment: Deployment, uid: UUID) -> None:
    """Have the server mark a run Crashed that gives no sign of life, since one of a dead host runs for ever else."""
    name = f"hhnet: runs of {deployment.name} that give no sign of life are Crashed"
    known = await client.read_automations_by_name(name)
    for old in known:
        await client.delete_automation(old.id)
    if not deployment.lost_after_s:
        return
    ended = ("Completed", "Failed", "Cancelled", "Crashed", "AwaitingRetry", "Paused", "Suspended")
    beat = "prefect.flow-run.heartbeat"
    trigger = EventTrigger(
        match={"prefect.resource.id": "prefect.flow-run.*"},
        match_related={"prefect.resource.role": "deployment", "prefect.resource.id": f"prefect.deployment.{uid}"},
        for_each={"prefect.resource.id"},
        after={beat},
        expect={beat, *(f"prefect.flow-run.{state}" for state in ended)},
        posture=Posture.Proactive,
        threshold=1,
        within=timedelta(seconds=deployment.lost_after_s),
    )
    text = f"no sign of life for {deployment.lost_after_s:g} s: its process or its host is gone"
    action = ChangeFlowRunState(state=StateType.CRASHED, name="Crashed", message=text)
    await Automation(name=name, description=text, trigger=trigger, actions=[action]).acreate()


async def drop_missed_runs(client: PrefectClient, uid: UUID) -> int:
    """Cancel the scheduled runs that nobody began while nobody served, but for the last; how many."""
    late = await client.read_flow_runs(
        deployment_filter=DeploymentFilter(id=DeploymentFilterId(any_=[uid])),
        flow_run_filter=FlowRunFilter(
            state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.SCHEDULED]))
        ),
    )
    before = datetime.now(UTC) - timedelta(seconds=MISSED_AFTER_S)
    missed = missed_runs(late, before)[:-1]
    for run in missed:
        await client.set_flow_run_state(run.id, Cancelled(message="missed: nobody served the deployment"), force=True)
    return len(missed)


def missed_runs(runs: Sequence[FlowRun], before: datetime) -> list[FlowRun]:
    """The runs of the schedule that should have begun before that time, oldest first."""
    due = [(run.next_scheduled_start_time, run) for run in runs if run.auto_scheduled and run.run_count == 0]
    missed = [(when, run) for when, run in due if when is not None and when < before]
    return [run for _, run in sorted(missed, key=lambda pair: pair[0])]
