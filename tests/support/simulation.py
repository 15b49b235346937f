"""A cluster and a store without machines: the real planner, pool and commit code run on them, by a clock of their own.

Nodes are lost, some of them while they still reach the store; workers die, hang and are slow; the store refuses, and
loses answers. `World` keeps the time and the chance, `SimulatedObjects` is the store, `SimulatedActors` the cluster as
the pool sees it. The requests of one publication follow each other without another worker's between them: what comes
of those is for tests/chaos/test_commit_interleavings.py.
"""

import heapq
import io
import random
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any

from ray.exceptions import RayActorError, RayTaskError

from pipelines.artifacts.facts import Receipt
from pipelines.cluster.placement import Need, Node
from pipelines.cluster.pool import map_items
from pipelines.cluster.ray_actors import ActorLocation
from pipelines.encode.job import EncodeJob, ShardTask
from pipelines.encode.receipts import publish_shard, read_whole_receipt
from pipelines.encode.shard import ShardCodes
from pipelines.errors import StoreUnavailable
from pipelines.shards.shards import ShardSet
from pipelines.storage import ObjectInfo, sha256_of
from pipelines.storage.clock import DEADLINE_S, MAX_FIRST_PAUSE_S, MAX_PAUSE_S

HOUR_S = 3600.0


@dataclass(frozen=True, kw_only=True)
class Weather:
    """What goes wrong, and how long things take, in seconds; shares are of attempts or requests."""

    nodes: int
    image_s: float = 0.002
    """Of a worker, for each image."""
    build_s: float = 60.0
    losses_an_hour: float = 0.05
    """Share of the nodes that are lost in an hour."""
    warned: float = 0.5
    """Share of the losses that are announced before."""
    warning_s: float = 120.0
    replaced_s: float = 180.0
    """Until a new node stands in for a lost one."""
    noticed_s: float = 15.0
    """Until the head takes a node for lost."""
    cut_off: float = 0.2
    """Share of the lost nodes that go on working for a while, out of the head's reach but not of the store's."""
    cut_off_s: float = 600.0
    died: float = 0.001
    hung: float = 0.0002
    slow: float = 0.01
    """Share of the attempts that take `slower` times as long."""
    slower: float = 8.0
    request_s: float = 0.02
    refused: float = 0.01
    lost_answers: float = 0.002
    driver_ends: tuple[float, ...] = ()
    """Times at which the driver is killed; it is started again at once."""
    poison: frozenset[str] = frozenset()
    """Tars that kill each worker."""


class DriverKilled(BaseException):
    """The process that runs the pool is gone."""


class Killed(BaseException):
    """A worker is gone, between two of its requests."""


@dataclass(eq=False)
class World:
    """The time, chance, and what happened."""

    weather: Weather
    seed: int = 0
    now: float = 0.0
    spent: float = 0.0
    """Seconds that the requests of the worker whose turn it is took so far."""
    death: float = float("inf")
    """When that worker ends."""
    counts: Counter[str] = field(default_factory=Counter)
    worked_s: float = 0.0
    """Seconds of all attempts, as far as they came."""
    useful_s: float = 0.0
    """Seconds of the attempts whose result is the one that was claimed."""
    beside_s: float = 0.0
    """CPU seconds of the simulation itself, which are no driver's."""

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.events: list[tuple[float, int, Callable[[], object]]] = []
        self.number = 0
        self.thread = threading.get_ident()

    def at(self, when: float, do: Callable[[], object]) -> None:
        """Do something later."""
        self.number += 1
        heapq.heappush(self.events, (when, self.number, do))

    def step(self, until: float) -> bool:
        """Let the next thing happen that happens until then; False if nothing does."""
        if not self.events or self.events[0][0] > until:
            return False
        self.now, _, do = heapq.heappop(self.events)
        do()
        return True

    def request(self, kind: str) -> None:
        """Let a request of the present worker pass, as often as the store refuses it. The driver's take no time."""
        if threading.get_ident() != self.thread:
            return
        self.counts[kind] += 1
        pauses, begun = 0, self.spent
        while True:
            if self.now + self.spent >= self.death:
                raise Killed
            self.spent += self.weather.request_s * self.random.uniform(0.5, 2)
            if self.random.random() >= self.weather.refused:
                return
            self.counts["refused"] += 1
            self.spent += self.random.uniform(0, min(MAX_PAUSE_S, MAX_FIRST_PAUSE_S * 2**pauses))
            pauses += 1
            if self.spent - begun > DEADLINE_S:
                raise StoreUnavailable(f"cannot {kind} within {DEADLINE_S:g} s")

    @contextmanager
    def turn(self, death: float) -> Iterator[None]:
        """Let a worker make requests; `spent` says afterwards how long they took."""
        self.spent, self.death = 0.0, death
        try:
            yield
        finally:
            self.death = float("inf")


# ------------------------------------------------------------------------------------------------------------- store


class SimulatedObjects:
    """Objects in memory, put if absent; with `careless`, a second put of a receipt replaces the first."""

    def __init__(self, world: World, careless: bool = False) -> None:
        self.world, self.careless = world, careless
        self.held: dict[str, bytes] = {}

    def read(self, name: str, limit: int | None = None) -> bytes:
        self.world.request("get")
        if name not in self.held:
            raise FileNotFoundError(name)
        return self.held[name] if limit is None else self.held[name][: limit + 1]

    def open(self, name: str, block: int | None = None, start: int = 0) -> IO[bytes]:
        return io.BytesIO(self.read(name)[start:])

    def size(self, name: str) -> int:
        self.world.request("head")
        if name not in self.held:
            raise FileNotFoundError(name)
        return len(self.held[name])

    def entries(self, prefix: str) -> dict[str, ObjectInfo]:
        self.world.request("list")
        below = f"{prefix}/" if prefix else ""
        return {name: ObjectInfo(len(data), 0.0) for name, data in list(self.held.items()) if name.startswith(below)}

    def folders(self, prefix: str) -> list[str]:
        below = f"{prefix}/" if prefix else ""
        return list({name[len(below) :].partition("/")[0] for name in self.entries(prefix)})

    def require(self) -> None:
        """The store is there."""

    def delete(self, name: str) -> None:
        self.world.request("delete")
        del self.held[name]

    def delete_all(self, prefix: str) -> None:
        for name in self.entries(prefix):
            self.delete(name)

    def uploads(self) -> dict[str, ObjectInfo]:
        return {}

    def abort(self, name: str) -> None:
        """Nothing is put in parts."""

    def put(self, name: str, data: bytes | Path, point: str) -> bool:
        """Put if absent; an answer may be lost, and then a HEAD tells whether what is there is ours."""
        assert isinstance(data, bytes)
        self.world.request("put")
        made = name not in self.held or (self.careless and name.startswith("receipts/"))
        if made:
            self.held[name] = data
        if self.world.random.random() < self.world.weather.lost_answers:
            self.world.counts["lost answers"] += 1
            self.world.request("head")
            return sha256_of(self.held[name]) == sha256_of(data)
        return made


# ----------------------------------------------------------------------------------------------------------- cluster


@dataclass(eq=False)
class _Answer:
    """What an actor owes: a value or an error, once it is ready."""

    ready: bool = False
    value: Any = None
    error: Exception | None = None


@dataclass(eq=False)
class _Place:
    """A node with room for one worker."""

    name: str
    actor: "_Hand | None" = None
    alive: bool = True
    draining: bool = False
    noticed: bool = False
    """Whether the head takes it for lost."""


@dataclass(eq=False)
class _Hand:
    """An actor: where it runs, its worker, and when it ends."""

    place: _Place | None = None
    worker: Any = None
    death: float = float("inf")
    owed: list[_Answer] = field(default_factory=list)
    hung: bool = False
    killed: bool = False


@dataclass(frozen=True)
class SimulatedEncoder:
    """Does a tar's requests: asks for its claim, and puts codes and receipt; the time between is the world's."""

    job: EncodeJob
    opened: ShardSet
    name: str

    def claimed(self, task: ShardTask) -> Receipt | None:
        return read_whole_receipt(self.job.writer().store, task.receipt)

    def publish(self, task: ShardTask, writer: Any) -> Receipt:
        """Put codes that differ from those of any other attempt, as those of another kind of machine would."""
        shard = self.opened.shard(task.shard)
        codes = f"{task.shard} by {self.name}".encode()
        return publish_shard(writer, shard, task.receipt, ShardCodes(codes, shard.rows, None, 0, {}, {}), task.kept)


class SimulatedActors:
    """The nodes, and the actors that the pool of each driver starts on them, one on each."""

    here = "head"

    def __init__(self, world: World, job: EncodeJob, opened: ShardSet) -> None:
        self.world, self.opened, self.job = world, opened, job
        self.waiting: deque[_Hand] = deque()
        self.answered: set[_Answer] = set()
        self.places: dict[str, _Place] = {}
        self.hands = 0
        for _number in range(world.weather.nodes):
            self.add_node()
        for when in world.weather.driver_ends:
            world.at(when, self._end_driver)

    def join(self, *_: object) -> "SimulatedActors":
        """Let the pool of a driver in; the actors of the one before have ended with it."""
        self.waiting.clear()
        self.answered.clear()
        return self

    # ----------------------------------------------------------------------------------------------------- nodes

    def add_node(self) -> None:
        """Add a node, and say when it will be lost."""
        weather = self.world.weather
        place = _Place(f"node-{self.world.counts['nodes']}")
        self.world.counts["nodes"] += 1
        self.places[place.name] = place
        if weather.losses_an_hour:
            lost = self.world.now + self.world.random.expovariate(weather.losses_an_hour / HOUR_S)
            if self.world.random.random() < weather.warned:
                self.world.at(max(self.world.now, lost - weather.warning_s), lambda: self._warn(place))
            self.world.at(lost, lambda: self._lose(place))
        self._seat()

    def _warn(self, place: _Place) -> None:
        place.draining = True

    def _lose(self, place: _Place) -> None:
        world, hand = self.world, place.actor
        world.counts["lost nodes"] += 1
        place.alive = False
        if hand is not None:
            cut_off = world.random.random() < world.weather.cut_off
            world.counts["cut off"] += cut_off
            hand.death = min(hand.death, world.now + (world.weather.cut_off_s if cut_off else 0))
        world.at(world.now + world.weather.noticed_s, lambda: self._notice(place))
        world.at(world.now + world.weather.replaced_s, self.add_node)

    def _notice(self, place: _Place) -> None:
        place.noticed = True
        del self.places[place.name]
        if place.actor is not None:
            self._fail(place.actor, "The actor died because its node has died.")

    def _seat(self) -> None:
        free = (place for place in self.places.values() if place.alive and not place.draining and place.actor is None)
        while self.waiting and (place := next(free, None)) is not None:
            hand = self.waiting.popleft()
            hand.place, place.actor = place, hand
            if hand.owed:
                self._answer(hand, hand.owed[0], ActorLocation(place.name, place.name, self.world.number, None))

    def _end_driver(self) -> None:
        for place in self.places.values():
            if place.actor is not None:
                place.actor.death = min(place.actor.death, self.world.now)
        raise DriverKilled

    # ---------------------------------------------------------------------------------------------------- answers

    def _answer(self, hand: _Hand, answer: _Answer, value: Any = None, error: Exception | None = None) -> None:
        if answer in hand.owed:
            hand.owed.remove(answer)
            answer.ready, answer.value, answer.error = True, value, error
            self.answered.add(answer)

    def _fail(self, hand: _Hand, why: str) -> None:
        for answer in list(hand.owed):
            self._answer(hand, answer, error=RayActorError(error_msg=why))

    def _reach(self, hand: _Hand) -> bool:
        """Tell whether an actor's answer gets to the driver."""
        return not hand.killed and hand.place is not None and hand.place.alive and self.world.now < hand.death

    # ------------------------------------------------------------------------------------------------ what it does

    def _build(self, hand: _Hand, answer: _Answer) -> None:
        if not self._reach(hand):
            return
        self.hands += 1
        with self.world.turn(hand.death):
            try:
                hand.worker = SimulatedEncoder(self.job, self.opened, f"worker-{self.world.number}"), self.job.writer()
            except Killed:
                return
        self.world.at(self.world.now + self.world.spent, lambda: self._reach(hand) and self._answer(hand, answer, 0))

    def _begin(self, hand: _Hand, answer: _Answer, task: ShardTask) -> None:
        """Begin a tar: ask for its claim, and decide how long it takes and how it ends."""
        world, weather, (worker, _) = self.world, self.world.weather, hand.worker
        with world.turn(hand.death):
            try:
                claimed = worker.claimed(task)
            except Killed:
                return
        rows = self.opened.shard(task.shard).rows
        if claimed is not None:
            world.counts["claimed before"] += 1
            world.at(world.now + world.spent, lambda: self._done(hand, answer, claimed, rows))
            return
        world.counts["attempts"] += 1
        lasts = rows * weather.image_s * world.random.uniform(0.8, 1.2)
        lasts *= weather.slower if world.random.random() < weather.slow else 1
        chance, begun = world.random.random(), world.now
        if task.shard in weather.poison or chance < weather.died:
            world.at(begun + lasts * world.random.random(), lambda: self._die(hand, begun))
        elif chance < weather.died + weather.hung:
            hand.hung = True
            world.counts["hung"] += 1
            world.worked_s += lasts
        else:
            world.at(begun + lasts, lambda: self._publish(hand, answer, task, begun))

    def _die(self, hand: _Hand, begun: float) -> None:
        if self.world.now < hand.death:
            self.world.counts["died"] += 1
            self.world.worked_s += self.world.now - begun
            hand.death = self.world.now
            self._fail(hand, "The actor died because its process ended.")

    def _publish(self, hand: _Hand, answer: _Answer, task: ShardTask, begun: float) -> None:
        """Put what was encoded, also where the driver has long forgotten the worker; end in the middle if it dies."""
        world, (worker, writer) = self.world, hand.worker
        world.worked_s += min(world.now, hand.death) - begun
        if world.now >= hand.death:
            return
        # A share of those who are to be lost soon are lost between two requests.
        with world.turn(hand.death):
            try:
                receipt = worker.publish(task, writer)
            except Killed:
                world.counts["killed as they put"] += 1
                return
            except StoreUnavailable as error:
                self._answer(hand, answer, error=RayTaskError("run", "", error))
                return
        world.counts["published"] += 1
        world.useful_s += (world.now - begun) if self._is_mine(receipt, worker, task) else 0
        rows = receipt.samples
        world.at(world.now + world.spent, lambda: self._done(hand, answer, receipt, rows))

    def _is_mine(self, receipt: Receipt, worker: SimulatedEncoder, task: ShardTask) -> bool:
        return receipt.part.sha256 == sha256_of(f"{task.shard} by {worker.name}".encode())

    def _done(self, hand: _Hand, answer: _Answer, receipt: Receipt, rows: int) -> None:
        if self._reach(hand):
            figures = {"read": 0.0, "decode": 0.0, "forward": 1.0, "write": 0.0, "samples": rows, "rejects": 0}
            self._answer(hand, answer, (receipt, figures))

    # --------------------------------------------------------------------------------------- what the pool asks for

    def start(self) -> _Hand:
        hand = _Hand()
        self.waiting.append(hand)
        return hand

    def ask(self, hand: _Hand, method: str, *arguments: Any, name: str = "") -> _Answer:
        answer = _Answer()
        if method == "progress":  # the number changes as long as it works
            answer.ready, answer.value = True, -1 if hand.hung else self.world.now
            return answer
        begun = time.process_time()
        hand.owed.append(answer)
        if method == "place":
            self._seat()
        elif hand.place is None or hand.place.noticed:
            self._fail(hand, "The actor died because its node has died.")
        elif self.world.now >= hand.death and hand.place.alive:
            self._fail(hand, "The actor died because its process ended.")
        elif method == "build":
            self.world.at(self.world.now + self.world.weather.build_s, lambda: self._build(hand, answer))
        else:
            self._begin(hand, answer, arguments[0])
        self.world.beside_s += time.process_time() - begun
        return answer

    def wait(self, references: Sequence[_Answer], timeout: float) -> list[_Answer]:
        if timeout == 0:
            return [one for one in references if one.ready][:1]
        begun, wanted = time.process_time(), set(references)
        until = self.world.now + timeout
        while not (found := self.answered & wanted) and self.world.step(until):
            pass
        if found:
            first = next(one for one in references if one in found)  # a set has no order of its own
            self.answered.discard(first)
        else:
            self.world.now = until
        self.world.beside_s += time.process_time() - begun
        return [first] if found else []

    def get(self, reference: _Answer) -> Any:
        if reference.error is not None:
            raise reference.error
        return reference.value

    def kill(self, hand: _Hand) -> None:
        """End an actor; one whose node is cut off does not hear of it."""
        hand.killed = True
        if hand in self.waiting:
            self.waiting.remove(hand)
        if hand.place is not None:
            if hand.place.alive:
                hand.death = min(hand.death, self.world.now)
            hand.place.actor = None
            self._seat()

    def nodes(self) -> list[Node]:
        one, none = {"CPU": 1.0}, {"CPU": 0.0}
        return [
            Node(place.name, one, none if place.actor else one, {}, place.draining) for place in self.places.values()
        ]

    def monotonic(self) -> float:
        return self.world.now

    def time(self) -> float:
        return self.world.now

    def sleep(self, seconds: float) -> None:
        until = self.world.now + seconds
        while self.world.step(until):
            pass
        self.world.now = until


def simulated_pool(actors: SimulatedActors) -> Any:
    """Return a pool, as verbs take it, on these actors."""

    @contextmanager
    def pool(*_: object) -> Iterator[Callable[..., Any]]:
        yield partial(map_items, need=Need(), wait_s=HOUR_S, start_on=actors.join)

    return pool
