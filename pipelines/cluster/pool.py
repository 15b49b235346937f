"""A bounded pool of Ray actors: one item in flight for each worker, attempts counted, deaths and hangs survived.

An actor gets an item only once it runs and its worker is built. If no actor finds room in time, the pool ends; if some
do, it goes on with those. Actors end as soon as no item waits for one, so that others can have their CPUs and GPUs.

Each actor answers questions for its progress in a second thread (a heartbeat). A worker that is stopped, or stuck in
code that holds the interpreter lock, does not answer. A worker with an integer `progress` must also change it.

A worker with a method `expect` is told, before each item, the item that it will most likely get next, so that it can
make ready for it. Such an item still waits: another actor takes it where nothing else waits.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Generic, TypeVar

from pipelines.cluster.attempts import OWN_FAULT, Attempt, AttemptFailed, End, Outcome, cause_of_death, first_line
from pipelines.cluster.metrics import Meter, Show
from pipelines.cluster.placement import FREE_COUNT_LAG_S, Need, Node, count_places, explain_shortage
from pipelines.cluster.ray_actors import ActorLocation, Handle, RayActors, Reference, StartActors
from pipelines.errors import ClusterUnavailable, WorkFailed

_log = logging.getLogger(__name__)

T = TypeVar("T")

BUILD_TIMEOUT_S = 600.0
"""Seconds that building a worker (imports, the model) may take before it counts as stuck."""
STUCK_S = 600.0
"""Default of `stuck_s`: seconds without an answer or progress after which an item is taken from its worker."""
ASK_EVERY_S = 5.0
"""Seconds between two looks at the workers and at the cluster."""
NODE_VERDICT_S = 30.0
"""Seconds after a worker's death until Ray surely knows whether its node is lost: its health check takes about 15."""
MAX_NODE_LOSSES = 20
"""Number of lost nodes under one item that ends the run. They count as no attempts, so they need their own limit."""


@dataclass(eq=False)
class _Item(Generic[T]):
    """An unfinished item, and the attempts at it so far, each with its node."""

    value: T
    tries: list[tuple[Attempt, str]] = field(default_factory=list)

    @property
    def attempts(self) -> tuple[Attempt, ...]:
        """The attempts alone."""
        return tuple(attempt for attempt, _ in self.tries)

    def count_failures(self, alive: set[str]) -> int:
        """Return how many attempts count: those with an end in OWN_FAULT on a node that is still alive."""
        return sum(attempt.end in OWN_FAULT and node in alive for attempt, node in self.tries)


@dataclass(eq=False)
class _Actor(Generic[T]):
    """An actor of the pool. `moved` is the monotonic time of its last change: placed, built, or making progress."""

    handle: Handle
    waits: Reference | None
    """Reference to the answer that it owes: its place, the end of the build, or the result of its item."""
    moved: float
    place: ActorLocation | None = None
    built: bool = False
    item: _Item[T] | None = None
    upcoming: _Item[T] | None = None
    """The item that it was told to expect."""
    began: float = 0.0
    progress: int | None = None
    beat: Reference | None = None

    def hear(self, progress: int | None, now: float) -> None:
        """Take a heartbeat: a changed number is progress, and without a number (None) so is every answer."""
        if progress is None or progress != self.progress:
            self.progress, self.moved = progress, now

    def stands_still(self, limit_s: float, build_s: float, now: float) -> bool:
        """Tell whether it made no progress for longer than allowed. An actor without a place is never stuck."""
        if self.place is None:
            return False
        return now - self.moved > (limit_s if self.built else build_s)


def map_items(
    worker: Callable[..., Any], worker_args: tuple[Any, ...], items: Sequence[T], *, verb: str, **options: Any
) -> Iterator[Outcome[T]]:
    """Run `worker(*worker_args).run(item)` for every item on a pool of actors; yield outcomes as items complete.

    The `options` are the fields of `_Pool`: `need`, `workers` and `wait_s`, and those with a default.

    At most `workers` actors run side by side; with None, as many as find room while nodes come and go. If a worker
    dies and its node lives on, or if it makes no progress for `stuck_s` and is killed, that counts as one attempt and
    the item goes to another actor. After `max_attempts` attempts its outcome carries the error. The loss of a node is
    not counted. `failed` is called at once with each attempt that ended badly.

    Exceptions of the worker itself are raised here. Raises WorkFailed if workers die while they are built, and
    ClusterUnavailable if no worker finds room for `wait_s` or this process's own node is lost.
    """
    with Meter(verb).queue() as show:
        pool: _Pool[T] = _Pool((worker, worker_args), items, verb, show, **options)
        try:
            yield from pool.yield_outcomes()
        finally:
            pool.close()


@dataclass(eq=False)
class _Pool(Generic[T]):
    """The actors, the waiting items, and the last look at the nodes."""

    arguments: tuple[Callable[..., Any], tuple[Any, ...]]
    items: Sequence[T]
    verb: str
    show: Show
    _: KW_ONLY
    need: Need
    workers: int | None
    wait_s: float
    max_attempts: int = 3
    stuck_s: float = STUCK_S
    build_s: float = BUILD_TIMEOUT_S
    label: Callable[[T], str] = str
    failed: Callable[[T, Attempt], None] = lambda item, attempt: None
    start_on: StartActors = RayActors

    def __post_init__(self) -> None:
        self.build_s = max(self.stuck_s, self.build_s)
        self.on = self.start_on(*self.arguments, self.need, self.verb)
        self.waiting = deque(_Item(item) for item in self.items)
        self.doubtful: list[_Item[T]] = []
        """Items with too many attempts; the last attempt may yet turn out to be the loss of its node."""
        self.actors: list[_Actor[T]] = []
        self.deaths_unbuilt = 0
        self.roomless_since = self.on.monotonic()
        """Monotonic time since which items wait and no actor has found a place."""
        self.told = False
        self.placed = -FREE_COUNT_LAG_S
        """Monotonic time at which an actor last found its place."""
        self.draining: set[str] = set()
        self.room = 0
        """Number of actors that the cluster has room for, counted while every actor has its place."""
        self.refresh()

    def yield_outcomes(self) -> Iterator[Outcome[T]]:
        """Yield the outcome of each item."""
        looked = self.on.monotonic()
        while self.waiting or self.doubtful or self.count_busy():
            self.resize()
            self.show(len(self.waiting) + len(self.doubtful), self.count_busy())
            asked = {actor.waits: actor for actor in self.actors if actor.waits is not None}
            pause = min(ASK_EVERY_S, self.wait_s / 4, self.stuck_s / 4)
            ready = self.on.wait(list(asked), pause) if asked else []
            if not asked:
                self.on.sleep(min(pause, 1.0))
            outcomes = [outcome for ref in ready if (outcome := self.take_answer(asked[ref])) is not None]
            if not ready or self.on.monotonic() - looked > pause:
                looked = self.on.monotonic()
                self.refresh()
                self.kill_stuck()
                self.require_room()
            outcomes += self.judge_doubtful()
            self.resize()  # before the yield, since the caller may take long over the outcomes
            yield from outcomes

    def count_busy(self) -> int:
        """Return how many actors have an item."""
        return sum(actor.item is not None for actor in self.actors)

    # ------------------------------------------------------------------------------------------------------ actors

    def resize(self) -> None:
        """Give waiting items to free actors, end those without work, and start actors up to the wanted number."""
        free = [actor for actor in self.actors if actor.built and actor.item is None]
        for actor in free:
            # A draining node would soon take the item away again.
            if self.waiting and actor.place is not None and actor.place.node not in self.draining:
                self.assign(actor, self.choose(actor))
            else:
                self.end(actor)
        coming = [actor for actor in self.actors if not actor.built]
        for actor in coming[len(self.waiting) :]:
            self.end(actor)
        for _ in range(self.count_wanted() - len(self.actors)):
            self.start()

    def count_wanted(self) -> int:
        """Return how many actors there should be now."""
        most = self.count_busy() + len(self.waiting)
        if self.workers is not None:
            return min(self.workers, most)
        return min(max(1, self.room), most)

    def start(self) -> None:
        handle = self.on.start()
        self.actors.append(_Actor(handle, self.on.ask(handle, "place"), self.on.monotonic()))

    def choose(self, actor: _Actor[T]) -> _Item[T]:
        """Take a waiting item for an actor: the one that it expects, else one that none expects, else the first."""
        told = actor.upcoming
        # Without the first test a new actor would have all waiting items looked through for None.
        chosen = told if told is not None and told in self.waiting else self.first_unexpected(actor)
        item = self.waiting[0] if chosen is None else chosen
        self.waiting.remove(item)
        return item

    def first_unexpected(self, actor: _Actor[T]) -> _Item[T] | None:
        """Return the first waiting item that no other actor expects."""
        expected = {id(other.upcoming) for other in self.actors if other is not actor}
        return next((item for item in self.waiting if id(item) not in expected), None)

    def assign(self, actor: _Actor[T], item: _Item[T]) -> None:
        actor.item, actor.began, actor.moved = item, self.on.time(), self.on.monotonic()
        actor.upcoming = self.first_unexpected(actor)
        label = self.label(item.value)
        fields = {"shard": label, "worker": str(actor.place)}
        _log.debug("%(shard)s: begun on %(worker)s", fields, extra={"verb": self.verb, **fields})
        upcoming = [actor.upcoming.value] if actor.upcoming is not None else []
        actor.waits = self.on.ask(actor.handle, "run", item.value, label, upcoming, name=f"{self.verb} {label}")

    def end(self, actor: _Actor[T]) -> None:
        self.actors.remove(actor)
        self.on.kill(actor.handle)

    # ----------------------------------------------------------------------------------------------------- answers

    def take_answer(self, actor: _Actor[T]) -> Outcome[T] | None:
        """Take an actor's answer: its place, the end of the build, or the result of its item, and return the last."""
        from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError

        try:
            answer = self.on.get(actor.waits)
        except (RayActorError, OutOfMemoryError) as death:
            self.take_death(actor, death)
            return None
        except RayTaskError as error:
            if not isinstance(error.cause, AttemptFailed):
                raise (error.cause or error) from None
            actor.waits, actor.moved = None, self.on.monotonic()
            self.put_back(self.take_item(actor, End.DIED))
            return None
        actor.waits, actor.moved = None, self.on.monotonic()
        self.roomless_since = self.on.monotonic()
        if actor.place is None:
            actor.place, self.placed = answer, self.on.monotonic()
            actor.waits = self.on.ask(actor.handle, "build")
        elif not actor.built:
            actor.built, actor.progress, self.deaths_unbuilt = True, answer, 0
        else:
            item = self.take_item(actor, End.DONE)
            return Outcome(item.value, answer, item.count_failures(self.alive) + 1, tries=item.attempts)
        return None

    def take_death(self, actor: _Actor[T], death: Exception) -> None:
        end = cause_of_death(death, actor.place.node if actor.place else None, self.draining)
        self.end(actor)
        if actor.item is not None:
            self.put_back(self.take_item(actor, end))
        elif end in OWN_FAULT:
            self.count_unbuilt(f"died ({first_line(death)})")

    def take_item(self, actor: _Actor[T], end: End) -> _Item[T]:
        """Take the item from an actor and record the attempt."""
        item, place = actor.item, actor.place
        assert item is not None and place is not None
        attempt = Attempt(actor.began, self.on.time(), place.host, place.pid, place.gpu, end)
        item.tries.append((attempt, place.node))
        actor.item = None
        if end is not End.DONE:
            fields = {"shard": self.label(item.value), "worker": str(place), "end": end.value}
            _log.info("%(shard)s: an attempt on %(worker)s ended: %(end)s", fields, extra={"verb": self.verb, **fields})
            self.failed(item.value, attempt)
        return item

    def put_back(self, item: _Item[T]) -> None:
        """Put an item back for another attempt, or among the doubtful ones after too many."""
        failures = item.count_failures(self.alive)
        if len(item.tries) - failures >= MAX_NODE_LOSSES:  # the others do not count: their node was lost
            raise ClusterUnavailable(
                f"{self.label(item.value)}: {MAX_NODE_LOSSES} nodes were lost while they worked on it: what was "
                "finished is kept, run the same command again when the cluster is stable"
            )
        (self.doubtful if failures >= self.max_attempts else self.waiting).append(item)

    def judge_doubtful(self) -> list[Outcome[T]]:
        """Decide on the doubtful items: try again if the last attempt's node was lost, give up if it surely lives."""
        given_up, doubtful = [], self.doubtful
        self.doubtful = []
        for item in doubtful:
            attempt, node = item.tries[-1]
            if item.count_failures(self.alive) < self.max_attempts:
                self.waiting.append(item)
            elif node == self.on.here or self.on.time() - attempt.ended > NODE_VERDICT_S:
                given_up.append(self.give_up(item, End(attempt.end)))
            else:
                self.doubtful.append(item)
        return given_up

    def give_up(self, item: _Item[T], end: End) -> Outcome[T]:
        causes = {
            End.DIED: "the worker died",
            End.OUT_OF_MEMORY: "the worker was killed because its node ran out of memory",
            End.STUCK: f"no progress for {self.stuck_s:g} s",
        }
        attempts, last = item.count_failures(self.alive), item.tries[-1][0]
        text = f"{self.label(item.value)}: {causes[end]}, at the last of {attempts} attempts"
        fields = {"shard": self.label(item.value), "worker": f"{last.host}:{last.pid}", "attempts": attempts}
        _log.info("given up: %s", text, extra={"verb": self.verb, **fields})
        return Outcome(item.value, None, attempts, text, end, item.attempts)

    def count_unbuilt(self, reason: str) -> None:
        """Count a worker that was lost before it was built. Raises WorkFailed after `max_attempts` in a row."""
        self.deaths_unbuilt += 1
        _log.info("%s: before they were ready, workers %s", self.verb, reason, extra={"deaths": self.deaths_unbuilt})
        if self.deaths_unbuilt >= self.max_attempts:
            raise WorkFailed(
                f"{self.verb}: {self.deaths_unbuilt} workers in a row {reason} while they were made ready: look at "
                "the memory and the logs of their nodes"
            )

    # ------------------------------------------------------------------------------------------------------- watch

    def refresh(self) -> None:
        """Look at the nodes, and take the heartbeats of the actors."""
        from ray.exceptions import RayError

        self.nodes: list[Node] = self.on.nodes()
        self.alive = {node.id for node in self.nodes}
        self.draining |= {node.id for node in self.nodes if node.draining}
        self.count_room()
        for actor in self.actors:
            if actor.item is None:
                continue
            if actor.beat is not None and self.on.wait([actor.beat], 0):
                with suppress(RayError):  # it died: its item says so
                    actor.hear(self.on.get(actor.beat), self.on.monotonic())
                actor.beat = None
            if actor.beat is None:
                actor.beat = self.on.ask(actor.handle, "progress")

    def count_room(self) -> None:
        """Count the room for actors if their number is not given: the present actors and the free places."""
        if self.workers is not None:
            return
        now, late = self.on.monotonic(), [actor for actor in self.actors if actor.place is None]
        if late and len(late) < len(self.actors) and now - min(actor.moved for actor in late) > self.wait_s:
            _log.info("%s: no room for %d more workers; goes on", self.verb, len(late), extra={"verb": self.verb})
            for actor in late:  # the room was taken, or went with its node
                self.end(actor)
            self.room = len(self.actors)
        elif not late and now - self.placed > FREE_COUNT_LAG_S:
            self.room = len(self.actors) + count_places(self.nodes, self.need)

    def kill_stuck(self) -> None:
        """Kill the actors that are stuck; their items are tried again."""
        now = self.on.monotonic()
        for actor in [actor for actor in self.actors if actor.stands_still(self.stuck_s, self.build_s, now)]:
            self.end(actor)
            if actor.item is not None:
                self.put_back(self.take_item(actor, End.STUCK))
            else:
                self.count_unbuilt(f"were not built within {self.build_s:g} s")

    def require_room(self) -> None:
        """Raise ClusterUnavailable if items wait and no actor has had a place for `wait_s`.

        If only some actors have no place for so long, warn once on stderr.
        """
        placed = [actor for actor in self.actors if actor.place is not None]
        coming = len(self.actors) - len(placed)
        if placed or not self.waiting:
            waited = self.on.monotonic() - min(
                (a.moved for a in self.actors if a.place is None), default=self.on.monotonic()
            )
            if placed and waited > self.wait_s and not self.told:
                self.told = True
                text = explain_shortage(coming, self.need, self.nodes, self.wait_s)
                _log.warning("%s goes on with %d workers: %s", self.verb, len(placed), text)
            self.roomless_since = self.on.monotonic()
        elif self.on.monotonic() - self.roomless_since > self.wait_s:
            raise ClusterUnavailable(explain_shortage(1, self.need, self.nodes, self.wait_s))

    def close(self) -> None:
        """End all actors."""
        for actor in list(self.actors):
            self.end(actor)
