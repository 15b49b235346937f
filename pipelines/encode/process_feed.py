"""Feeds a network with squares that processes of their own decode (`decoder`), into a ring of batches in shared memory.

So the thread that launches the work of a GPU has the interpreter lock of its process to itself.
"""

import logging
import math
import mmap
import os
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import IO

import numpy as np

from pipelines import errors
from pipelines.cluster.attempts import AttemptFailed
from pipelines.encode.decoder import BEGUN, READY, DecodedChunk, DecodeTask, chunk_line, parse_answer, task_line
from pipelines.encode.feed import Collected, Fed, Shaping
from pipelines.errors import HHNetError, WorkFailed
from pipelines.shards.containers.limits import ImageReject
from pipelines.shards.shards import Record, Sample, Shard, ShardSet

_log = logging.getLogger(__name__)

CHUNK_SAMPLES = 32
"""Most samples that a decode process is given at a time; an object store gets one request for each chunk."""
CHUNKS_EACH = 2
"""Chunks that a decode process has at a time: it reads one while it decodes the other."""
SPARE_BATCHES = 3
"""Batches of the ring beyond those in work: two that the network has, and one that is whole and waits."""


@dataclass(eq=False)
class _Reading:
    """A shard that is being decoded: its records, what became of them so far, and its batches in the ring."""

    shard: Shard
    records: Sequence[Record] = ()
    cut: int = 0
    """Samples that are in chunks."""
    places: dict[int, int] = field(default_factory=dict)
    """The place in the ring of each batch in work, by the batch's number."""
    decoded: dict[int, int] = field(default_factory=dict)
    """Samples of each batch whose answer is there."""
    answers: dict[int, tuple[Sample, ImageReject | None, bool]] = field(default_factory=dict)
    """Sample, reject and animation by row."""
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("read", "decode"), 0.0))
    held: int = 0
    """Chunks that processes have."""
    failed: Exception | None = None
    left: bool = False
    """Whether nobody wants it any more."""


@dataclass(frozen=True)
class _Chunk:
    """Records [start, stop) of a shard, all of one batch; the square of the first goes to `first` in the ring."""

    reading: _Reading
    start: int
    stop: int
    first: int
    deaths: int = 0
    """Processes that had it as their first and died before they began to decode it."""


class _Child:
    """A decode process. It is a child of the thread that makes it, and dies with this thread."""

    def __init__(self, task: DecodeTask) -> None:
        path = os.pathsep.join(filter(None, sys.path))
        self.process = subprocess.Popen(
            # -P: a module in the present folder must not take the place of one of ours.
            [sys.executable, "-P", "-m", "pipelines.encode.decoder"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[task.memory],
            text=True,
            encoding="utf-8",
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )
        self.chunks: deque[_Chunk] = deque()
        self.begun = False
        """Whether it decodes the first of its chunks."""
        self.unwanted = False
        """Whether it was killed because of what it has to do."""
        self.send(task_line(task))

    def send(self, line: str) -> None:
        """Send a line, unless the process has ended: `receive` tells."""
        with suppress(OSError):
            stream = _piped(self.process.stdin)
            stream.write(line)
            stream.flush()

    def receive(self) -> str:
        """Return the next line, or "" once the process has ended."""
        line = _piped(self.process.stdout).readline()
        return line if line.endswith("\n") else ""

    def end(self) -> int:
        """Kill the process if it lives; return its exit code."""
        self.process.kill()
        for stream in (self.process.stdin, self.process.stdout):
            with suppress(OSError):  # what was not sent is of no use any more
                _piped(stream).close()
        return self.process.wait()


def _piped(stream: IO[str] | None) -> IO[str]:
    assert stream is not None, "both streams are pipes"
    return stream


class ProcessFeed:
    """Decodes in `processes` processes of `threads` threads each.

    The ring lies in memory that has no name: whatever ends this process, its memory is freed with its decode processes.
    A decode process that dies fails the shard of the chunk that it decoded, and is replaced. After `most_deaths` in a
    row before they were ready the work ends, and after so many before they began a chunk its shard fails.
    """

    apart = True

    def __init__(
        self,
        shards: ShardSet,
        shaping: Shaping,
        processes: int,
        advance: Callable[[], None] = lambda: None,
        most_deaths: int = 3,
    ) -> None:
        self._shards, self._batch_size, self._advance = shards, shaping.batch_size, advance
        self._most_deaths = most_deaths
        self.lanes, self.chunk_samples = processes * shaping.threads, min(CHUNK_SAMPLES, self._batch_size)
        batches = SPARE_BATCHES + math.ceil(processes * CHUNKS_EACH * self.chunk_samples / self._batch_size)
        side = shaping.preprocess.size
        shape = (batches * self._batch_size, side, side, 3)
        size = int(np.prod(shape))
        memory = _nameless_memory(size)
        self.ring = np.frombuffer(mmap.mmap(memory, size), np.uint8).reshape(shape)
        self._task = DecodeTask(memory, shape, shaping.preprocess.to_dict(), shaping.threads, shaping.metadata)
        self._changed = threading.Condition()
        self._readings: list[_Reading] = []
        self._free = list(range(batches))
        self._returned: deque[_Chunk] = deque()
        """Chunks that a process had when it died, but had not begun."""
        self._children: dict[int, _Child] = {}
        self._failed_starts = 0
        self._broken: Exception | None = None
        self._closed = False
        self._threads = [
            threading.Thread(target=self._serve, args=(number,), name=f"feed {number}", daemon=True)
            for number in range(processes)
        ]
        for thread in self._threads:
            thread.start()

    def expect(self, shard: Shard) -> None:
        """Have a shard decoded as soon as the one before has no samples left."""
        self._begin(shard)

    def batches(self, shard: Shard) -> Iterator[Fed]:
        """Return the batches of a shard; shards that were expected and are not this one are let go."""
        reading = self._begin(shard)
        for other in list(self._readings):
            if other is not reading:
                self._leave(other)
        return self._yield_batches(reading)

    def is_ready(self, shard: Shard) -> bool:
        """Tell whether a whole batch of an expected shard waits."""
        with self._changed:
            reading = self._find(shard)
            return (
                reading is not None
                and reading.failed is None
                and self._is_whole(reading, min(reading.places, default=-1))
            )

    def close(self) -> None:
        """End the decode processes."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            for child in self._children.values():
                child.process.kill()
        for thread in self._threads:
            thread.join()
        os.close(self._task.memory)

    # --------------------------------------------------------------------------------------------- the consumer's side

    def _find(self, shard: Shard) -> _Reading | None:
        return next((reading for reading in self._readings if reading.shard == shard), None)

    def _begin(self, shard: Shard) -> _Reading:
        """Return the reading of a shard, which begins now unless it was expected."""
        found = self._find(shard)
        if found is not None:
            return found
        reading = _Reading(shard)
        try:
            reading.records = shard.records()
        except Exception as error:  # raised where its batches are asked for
            reading.failed = error
        with self._changed:
            self._readings.append(reading)
            self._changed.notify_all()
        return reading

    def _yield_batches(self, reading: _Reading) -> Iterator[Fed]:
        size, now = self._batch_size, Collected()
        try:
            for number in range(-(-len(reading.records) // size)):
                self._await_batch(reading, number)
                with self._changed:
                    place = reading.places.pop(number)  # the network's, even if the shard is let go meanwhile
                    rows = range(number * size, min((number + 1) * size, len(reading.records)))
                    found = [reading.answers.pop(row) for row in rows]
                    seconds, reading.seconds = reading.seconds, dict.fromkeys(reading.seconds, 0.0)
                squares = self.ring[place * size : place * size + len(rows)]
                for name, spent in seconds.items():
                    now.seconds[name] += spent
                if not now.squares and all(reject is None for _, reject, _ in found):
                    kept, animated = [sample for sample, _, _ in found], sum(flag for _, _, flag in found)
                    yield Fed(squares, kept, now.rejects, animated, now.seconds, partial(self._give_back, place))
                    now = Collected()
                    continue
                # Behind a reject the squares move up: they are copied into other batches.
                whole = Fed(squares[:0], (), (), 0, {})  # nothing yet, so that the caller never waits for two batches
                for square, (sample, reject, animated) in zip(squares, found, strict=True):
                    now.add(sample, square.copy() if reject is None else reject, animated)
                    if len(now.squares) == size:
                        whole, now = now.fed(squares.shape[1]), Collected()
                self._give_back(place)
                yield whole
            self._await_batch(reading, -1)  # for what is wrong with a shard without a sample
            yield now.fed(self.ring.shape[1])
        finally:
            self._leave(reading)

    def _await_batch(self, reading: _Reading, number: int) -> None:
        """Wait until a batch is whole; raise what made that impossible."""
        with self._changed:
            while not self._is_whole(reading, number):
                failure = reading.failed or self._broken
                if failure is not None:
                    raise failure
                if number < 0:
                    return
                self._changed.wait()

    def _is_whole(self, reading: _Reading, number: int) -> bool:
        wanted = min(self._batch_size, len(reading.records) - number * self._batch_size)
        return number in reading.places and reading.decoded[number] == wanted

    def _give_back(self, place: int) -> None:
        """Let a batch's place in the ring be written again."""
        with self._changed:
            self._free.append(place)
            self._changed.notify_all()

    def _leave(self, reading: _Reading) -> None:
        """Let a shard go; processes that have chunks of it end, as nobody would see that one hangs."""
        with self._changed:
            reading.left = True
            if reading in self._readings:
                self._readings.remove(reading)
            for child in self._children.values():
                if any(chunk.reading is reading for chunk in child.chunks):
                    child.unwanted = True
                    child.process.kill()
            self._settle(reading)

    def _settle(self, reading: _Reading) -> None:
        """Give the places of a shard back once it is let go and no process writes there."""
        if reading.left and not reading.held:
            self._free += reading.places.values()
            reading.places.clear()
            self._changed.notify_all()

    # ------------------------------------------------------------------------------------------- the processes' side

    def _serve(self, number: int) -> None:
        """Keep a decode process at work, and replace it when it dies."""
        while not (self._closed or self._broken):
            try:
                child = _Child(self._task)
            except OSError as error:
                self._break(f"a decode process does not start: {error}")
                return
            with self._changed:
                self._children[number] = child
            self._drive(child)
            code = child.end()
            with self._changed:
                del self._children[number]
                self._bury(child, code)

    def _drive(self, child: _Child) -> None:
        """Give a decode process chunks and take its answers, until it ends."""
        ready = child.receive() == READY
        with self._changed:
            self._failed_starts = 0 if ready else self._failed_starts + 1
        if not ready:
            if self._failed_starts >= self._most_deaths and not self._closed:
                self._break(
                    f"{self._failed_starts} decode processes in a row ended before they were ready: look at the memory "
                    "and the logs of this node, or set encode.decode_processes=0"
                )
            return
        while True:
            while len(child.chunks) < CHUNKS_EACH and (chunk := self._give(child)) is not None:
                child.send(self._line(chunk))
            if not child.chunks or (answer := self._answer(child)) is None:
                return
            with self._changed:
                child.begun = False
                self._note(child.chunks.popleft(), answer)

    def _answer(self, child: _Child) -> DecodedChunk | tuple[str, str] | None:
        """Return the next answer of a process; None once it has ended or says what is no answer."""
        line = child.receive()
        if line == BEGUN:
            child.begun = True
            line = child.receive()
        try:
            return parse_answer(line) if line else None
        except (ValueError, TypeError, LookupError):
            _log.info("process %d gave no answer to what it was asked", child.process.pid)
            return None

    def _break(self, text: str) -> None:
        """End the feed with an error, which is raised where batches are asked for."""
        with self._changed:
            self._broken = WorkFailed(text)
            self._changed.notify_all()

    def _line(self, chunk: _Chunk) -> str:
        records = chunk.reading.records[chunk.start : chunk.stop]
        return chunk_line(self._shards.artifact.store, chunk.reading.shard.part, records, chunk.first)

    def _give(self, child: _Child) -> _Chunk | None:
        """Give a process the next chunk and return it; None if the feed is closed, or if there is none and it has one.

        Waits for a chunk if the process has none.
        """
        with self._changed:
            while not self._closed:
                chunk = self._next_chunk()
                if chunk is not None:
                    chunk.reading.held += 1
                    child.chunks.append(chunk)
                    return chunk
                if child.chunks:
                    return None
                self._changed.wait()
        return None

    def _next_chunk(self) -> _Chunk | None:
        while self._returned:
            chunk = self._returned.popleft()
            if not chunk.reading.left and chunk.reading.failed is None:
                return chunk
        for reading in self._readings:
            if reading.failed is not None or reading.cut == len(reading.records):
                continue
            number, offset = divmod(reading.cut, self._batch_size)
            if number not in reading.places:
                if not self._free:
                    return None  # a later shard must not take the place that this one waits for
                reading.places[number], reading.decoded[number] = self._free.pop(), 0
            start, end = reading.cut, min((number + 1) * self._batch_size, len(reading.records))
            reading.cut = min(start + self.chunk_samples, end)
            return _Chunk(reading, start, reading.cut, reading.places[number] * self._batch_size + offset)
        return None

    def _note(self, chunk: _Chunk, answer: DecodedChunk | tuple[str, str]) -> None:
        """Note what became of a chunk."""
        reading = chunk.reading
        reading.held -= 1
        if isinstance(answer, tuple):
            reading.failed = _raised(*answer)
        else:
            for place, record in enumerate(reading.records[chunk.start : chunk.stop]):
                reject = answer.rejects.get(place)
                sample = Sample(record, b"", answer.metadata[place])
                told = None if reject is None else ImageReject(*reject)
                reading.answers[chunk.start + place] = sample, told, place in answer.animated
            number = chunk.start // self._batch_size
            reading.decoded[number] += chunk.stop - chunk.start
            reading.seconds["read"] += answer.read_s
            reading.seconds["decode"] += answer.decode_s
            self._advance()
        self._settle(reading)
        self._changed.notify_all()

    def _bury(self, child: _Child, code: int) -> None:
        """Charge the death of a process to the shard that it decoded; chunks that it had not begun go to others.

        A death before the first chunk was begun is charged too, once the chunk has seen several.
        """
        for place, chunk in enumerate(child.chunks):
            reading = chunk.reading
            reading.held -= 1
            first = place == 0 and not child.unwanted
            if first and (child.begun or chunk.deaths + 1 >= self._most_deaths) and reading.failed is None:
                ended = f"was killed by signal {-code}" if code < 0 else f"ended with {code}"
                text = f"{reading.shard.name}: process {child.process.pid}, which decoded it, {ended}"
                _log.info(text, extra={"shard": reading.shard.name})
                reading.failed = AttemptFailed(text)
            elif not reading.left:
                self._returned.append(replace(chunk, deaths=chunk.deaths + first))
            self._settle(reading)
        self._changed.notify_all()


def _nameless_memory(size: int) -> int:
    """Return a file descriptor of shared memory of this size."""
    if hasattr(os, "memfd_create"):
        memory = os.memfd_create("hhnet-feed")
    else:
        with tempfile.TemporaryFile() as file:
            memory = os.dup(file.fileno())
    os.ftruncate(memory, size)
    return memory


def _raised(name: str, text: str) -> Exception:
    """Return the error that a decode process met."""
    kind = getattr(errors, name, None)
    if isinstance(kind, type) and issubclass(kind, HHNetError):
        return kind(text)
    return RuntimeError(f"{name}: {text}")
