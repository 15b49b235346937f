"""A deployment, and the process that serves it: it starts due runs, stops unwanted ones, and ends its runs with itself.

Prefect's own runner stops hearing of cancellations, and then of schedules, if its server is away for half a minute. The
runner here keeps asking. It uses private parts of `prefect.runner`, only in the class `Server`.
"""

import asyncio
import logging
import os
import signal
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import anyio
from prefect.automations import Automation
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.filters import DeploymentFilter, FlowRunFilter
from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy, FlowRun, StateType
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import EventTrigger, Posture
from prefect.exceptions import ObjectNotFound
from prefect.runner import Runner
from prefect.schedules import Cron, Interval, Schedule
from prefect.states import Cancelled
from prefect.types.entrypoint import EntrypointType

from flows.lifeline import SERVED_BY_VARIABLE, end_orphaned_ray
from flows.pipeline import pipeline
from flows.reporting import OUT_OF_REACH
from pipelines.cluster.session import adopt_orphans
from pipelines.console import NOTICE

_log = logging.getLogger(__name__)

LOOK_EVERY_S = 5.0
"""Seconds between two questions to the server for the states of this process's runs."""
HEARTBEAT_S = 30
"""Seconds between two signs of life of a run, the smallest value that Prefect allows."""
MISSED_AFTER_S = 60.0
"""Seconds after its time at which a scheduled run that nobody started counts as missed."""


@dataclass(frozen=True)
class Deployment:
    """A deployment: its name, the parameters of its runs, its schedule, and its limit of runs."""

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
        """Return Prefect's schedule, or None if runs begin only on request."""
        if self.cron is not None:
            return Cron(self.cron, timezone=self.timezone)
        if self.interval_s is not None:
            return Interval(timedelta(seconds=self.interval_s), timezone=self.timezone)
        return None

    def concurrency(self) -> ConcurrencyLimitConfig:
        """Return Prefect's limit of runs at one time over all processes, and its strategy for one run more."""
        strategy = ConcurrencyLimitStrategy.CANCEL_NEW if self.cancel_new else ConcurrencyLimitStrategy.ENQUEUE
        return ConcurrencyLimitConfig(limit=self.limit, collision_strategy=strategy)


def serve_deployment(deployment: Deployment) -> None:
    """Register the deployment and start due runs until SIGINT or SIGTERM."""
    with suppress(KeyboardInterrupt):  # the runner has ended its runs by then
        asyncio.run(_serve(deployment))


async def _serve(deployment: Deployment) -> None:
    runner = Server(deployment)
    uid = await runner.register()
    async with get_client() as client:
        await crash_lost_runs(client, deployment, uid)
        dropped = await drop_missed_runs(client, uid)
    if dropped:
        text = "%d scheduled runs were missed: the last one runs now, the %d before it are cancelled"
        _log.log(NOTICE, text, dropped + 1, dropped, extra={"cancelled": dropped})
    await runner.serve()


class Server(Runner):
    """Starts flow runs in processes of their own, which end with this one."""

    def __init__(self, deployment: Deployment) -> None:
        # No limit of this process: the deployment's limit counts over all processes and has a strategy beyond it.
        super().__init__(name=deployment.name, limit=None, heartbeat_seconds=HEARTBEAT_S, pause_on_shutdown=False)
        self._deployment = deployment
        self._away = False
        os.environ[SERVED_BY_VARIABLE] = str(os.getpid())  # read by flows.lifeline in the processes of the runs
        adopt_orphans()

    async def register(self) -> UUID:
        """Register the deployment on the server, and return its id."""
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
        """Start runs that are due and end those that are no longer wanted, until SIGTERM."""
        async with self, anyio.create_task_group() as group:
            self._stop_observing()
            loop = asyncio.get_running_loop()
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                loop.add_signal_handler(number, lambda: loop.create_task(self.astop()))
            self._loops_task_group = group
            group.start_soon(self._repeat, self._get_and_submit_flow_runs, self.query_seconds)
            group.start_soon(self._repeat, self._end_unwanted, LOOK_EVERY_S)

    def _stop_observing(self) -> None:
        """End Prefect's own watch for cancellations: it gives up for ever if the server is away."""
        observer = self._cancelling_observer
        assert observer is not None, "the runner was entered"
        watches = (
            (observer._consumer_task, observer._start_polling_task),
            (observer._polling_task, observer._handle_polling_task_done),
        )
        for task, callback in watches:
            if task is not None:
                # First the callback: Prefect's would start polling after a failed task, or ask a cancelled one for
                # its error.
                task.remove_done_callback(callback)
                task.cancel()

    async def _repeat(self, look: Any, every_s: float) -> None:
        """Call `look` every `every_s` seconds for ever. If the server is away, say so once and keep asking."""
        while True:
            try:
                await look()
            except OUT_OF_REACH as error:
                if not self._away:
                    problem = str(error) or type(error).__name__
                    text = "Prefect does not answer (%s); trying again until it does"
                    _log.log(NOTICE, text, problem, extra={"error": problem})
                self._away = True
            else:
                if self._away:
                    _log.log(NOTICE, "Prefect answers again")
                self._away = False
            await asyncio.sleep(every_s)

    async def _end_unwanted(self) -> None:
        """Stop this process's runs that the server cancelled, crashed or deleted, and Ray processes of ended runs."""
        await anyio.to_thread.run_sync(end_orphaned_ray)
        for uid in self._process_manager.flow_run_ids():
            try:
                run = await self._client.read_flow_run(uid)
            except ObjectNotFound:
                _log.info("the server does not know run %s any more: ended", uid, extra={"run": str(uid)})
                await self._process_manager.kill(uid)
                continue
            if run.state is None:
                continue
            if run.state.is_cancelling():
                await self._cancel_run(run)
            elif run.state.is_crashed() or run.state.is_cancelled():
                await self._kill_if_working(run)

    async def _kill_if_working(self, run: FlowRun) -> None:
        """Kill the process of a run that the server has ended, unless it ends by itself within LOOK_EVERY_S."""
        await asyncio.sleep(LOOK_EVERY_S)
        if self._process_manager.get(run.id) is not None:
            _log.info("run %s was ended on the server: its process is killed", run.id, extra={"run": str(run.id)})
            await self._process_manager.kill(run.id)


async def crash_lost_runs(client: PrefectClient, deployment: Deployment, uid: UUID) -> None:
    """Make the server mark runs without a sign of life as Crashed: those of a dead host would stay Running for ever."""
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
    """Cancel all but the last of the scheduled runs that were missed while nobody served; return their number."""
    served = DeploymentFilter.model_validate({"id": {"any_": [uid]}})
    scheduled = FlowRunFilter.model_validate({"state": {"type": {"any_": [StateType.SCHEDULED]}}})
    late = await client.read_flow_runs(deployment_filter=served, flow_run_filter=scheduled)
    before = datetime.now(UTC) - timedelta(seconds=MISSED_AFTER_S)
    missed = missed_runs(late, before)[:-1]
    for run in missed:
        await client.set_flow_run_state(run.id, Cancelled(message="missed: nobody served the deployment"), force=True)
    return len(missed)


def missed_runs(runs: Sequence[FlowRun], before: datetime) -> list[FlowRun]:
    """Return the scheduled runs that should have begun before that time and have not, oldest first."""
    due = [(run.next_scheduled_start_time, run) for run in runs if run.auto_scheduled and run.run_count == 0]
    missed = [(when, run) for when, run in due if when is not None and when < before]
    return [run for _, run in sorted(missed, key=lambda pair: pair[0])]
