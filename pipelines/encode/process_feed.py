"""Feeds a network with squares that processes of their own decode (`decoder`), into a ring of batches in shared memory.

So the thread that launches the work of a GPU has the interpreter lock of its process to itself.

Decoders on other nodes (`remote_decoder`) help: each takes chunks of the same shards, and its squares are copied into
the same ring. A chunk is handed out once its batch has a place in the ring, which bounds what is under way. The worker
never waits for such a decoder to start, and what one fails to do costs time alone: a chunk that it died over, could not
read or found damaged is decoded again by a process of the worker, and only what this one finds counts.
"""

import logging
import math
import mmap
import os
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

import numpy as np

from pipelines import errors
from pipelines.artifacts.tables import Reason
from pipelines.cluster.attempts import AttemptFailed
from pipelines.encode.decoder import DecodedChunk, DecodeProcess, Decoder, DecodeTask, chunk_line
from pipelines.encode.feed import Collected, Fed, Shaping
from pipelines.errors import HHNetError, WorkFailed
from pipelines.shards.containers.limits import ImageReject
from pipelines.shards.shards import Record, Sample, Shard, ShardSet

_log = logging.getLogger(__name__)

CHUNK_SAMPLES = 32
"""Most samples that a decoder is given at a time; an object store gets one request for each chunk."""
CHUNKS_EACH = 2
"""Chunks that a decoder has at a time: it reads one while it decodes the other."""
REMOTE_CHUNK_BYTES = 16 << 20
"""Most bytes of the squares of a chunk where decoders on other nodes send them, unless one square has more."""
LOOK_EVERY_S = 3.0
"""Seconds from one look for a place for a decoder on another node to the next."""
MOST_FAILURES = 3
"""Answers of no use in a row after which a decoder on another node is ended: its node may not see the store."""
RETRY_S = 60.0
"""Seconds until the next decoder in place of one that was ended so, or of so many that ended before any was of use."""
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
    """Chunks that decoders have."""
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
    own: bool = False
    """Whether only a process of the worker may decode it."""


@dataclass(eq=False)
class _Lane:
    """A decoder at work, and its chunks in the order of its answers."""

    decoder: Decoder
    chunks: deque[_Chunk] = field(default_factory=deque)
    ready: bool = False
    unwanted: bool = False
    """Whether it was killed because of what it has to do."""
    useful: bool = False
    """Whether an answer of it counted."""
    doubts: int = 0
    """Answers of no use since then, in a row."""


class RemoteDecoders(Protocol):
    """Decoders on other nodes, at most `most` at a time."""

    most: int

    def start(self) -> Decoder | None:
        """Start one more, or return None where no node has room."""


class ProcessFeed:
    """Decodes in `processes` processes of `threads` threads each, at least one, and in decoders on other nodes.

    The ring lies in memory that has no name: whatever ends this process, its memory is freed with its decode processes.
    A decode process that dies fails the shard of the chunk that it decoded, and is replaced. After `most_deaths` in a
    row before they were ready the work ends, and after so many before they began a chunk its shard fails. A decoder on
    another node fails no shard. It is replaced too, after a while where it was of no use.
    """

    apart = True

    def __init__(
        self,
        shards: ShardSet,
        shaping: Shaping,
        processes: int,
        advance: Callable[[], None] = lambda: None,
        most_deaths: int = 3,
        remote: RemoteDecoders | None = None,
    ) -> None:
        self._shards, self._batch_size, self._advance = shards, shaping.batch_size, advance
        self._most_deaths, self._remote = most_deaths, remote
        self.chunk_samples, side = min(CHUNK_SAMPLES, self._batch_size), shaping.preprocess.size
        if remote is not None:
            self.chunk_samples = max(1, min(self.chunk_samples, REMOTE_CHUNK_BYTES // (side * side * 3)))
        decoders = processes + (remote.most if remote is not None else 0)
        batches = SPARE_BATCHES + math.ceil(decoders * CHUNKS_EACH * self.chunk_samples / self._batch_size)
        shape = (batches * self._batch_size, side, side, 3)
        size = int(np.prod(shape))
        memory = _nameless_memory(size)
        self.ring = np.frombuffer(mmap.mmap(memory, size), np.uint8).reshape(shape)
        self._task = DecodeTask(memory, shape, shaping.preprocess.to_dict(), shaping.threads, shaping.metadata)
        self._changed = threading.Condition()
        self._readings: list[_Reading] = []
        self._free = list(range(batches))
        self._returned: deque[_Chunk] = deque()
        """Chunks that came back without an answer that counts."""
        self._lanes: dict[int, _Lane] = {}
        self._failed_starts = 0
        self._broken: Exception | None = None
        self._closed = False
        self._threads = [
            threading.Thread(
                target=self._serve if number < processes else self._serve_remote,
                args=(number,),
                name=f"feed {number}",
                daemon=True,
            )
            for number in range(decoders)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def lanes(self) -> int:
        """Threads that decode, in all decoders that are ready."""
        with self._changed:
            return self._task.threads * max(1, sum(lane.ready for lane in self._lanes.values()))

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
        """End the decoders."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            for lane in self._lanes.values():
                lane.decoder.kill()
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
        """Let a shard go; decoders that have chunks of it end, as nobody would see that one hangs."""
        with self._changed:
            reading.left = True
            if reading in self._readings:
                self._readings.remove(reading)
            for lane in self._lanes.values():
                if any(chunk.reading is reading for chunk in lane.chunks):
                    lane.unwanted = True
                    lane.decoder.kill()
            self._settle(reading)

    def _settle(self, reading: _Reading) -> None:
        """Give the places of a shard back once it is let go and no decoder writes there."""
        if reading.left and not reading.held:
            self._free += reading.places.values()
            reading.places.clear()
            self._changed.notify_all()

    # -------------------------------------------------------------------------------------------- the decoders' side

    def _serve(self, number: int) -> None:
        """Keep a decode process at work, and replace it when it dies."""
        while not (self._closed or self._broken):
            try:
                process = DecodeProcess(self._task)
            except OSError as error:
                self._break(f"a decode process does not start: {error}")
                return
            self._employ(number, _Lane(process))

    def _serve_remote(self, number: int) -> None:
        """Keep a decoder on another node at work where there is room, and replace it when it ends."""
        assert self._remote is not None
        useless = 0
        while not (self._closed or self._broken):
            decoder, pause_s = self._remote.start(), LOOK_EVERY_S
            if decoder is not None:
                lane = _Lane(decoder)
                self._employ(number, lane)
                useless = 0 if lane.useful else useless + 1
                pause_s = RETRY_S if lane.doubts or useless >= MOST_FAILURES else 0.0
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._broken, pause_s)

    def _employ(self, number: int, lane: _Lane) -> None:
        """Give a decoder chunks and take its answers until it ends."""
        with self._changed:
            self._lanes[number] = lane
            if self._closed:
                lane.decoder.kill()
        ready = lane.decoder.await_ready()
        with self._changed:
            lane.ready = ready
        if lane.decoder.own:
            self._count_start(ready)
        if ready:
            self._drive(lane)
        ended = lane.decoder.end()
        with self._changed:
            del self._lanes[number]
            self._bury(lane, ended)

    def _count_start(self, ready: bool) -> None:
        """Break the feed after too many processes in a row that ended before they were ready."""
        with self._changed:
            self._failed_starts = 0 if ready else self._failed_starts + 1
        if not ready and self._failed_starts >= self._most_deaths and not self._closed:
            also = "" if self._remote is None else " and encode.decoders=0"
            self._break(
                f"{self._failed_starts} decode processes in a row ended before they were ready: look at the memory "
                f"and the logs of this node, or set encode.decode_processes=0{also}"
            )

    def _drive(self, lane: _Lane) -> None:
        while True:
            while len(lane.chunks) < CHUNKS_EACH and (chunk := self._give(lane)) is not None:
                lane.decoder.ask(self._line(chunk), self.ring[chunk.first : chunk.first + chunk.stop - chunk.start])
            if not lane.chunks or (answer := lane.decoder.answer()) is None:
                return
            with self._changed:
                chunk = lane.chunks.popleft()
                if lane.decoder.own or _is_certain(answer):
                    lane.useful, lane.doubts = True, 0
                    self._note(chunk, answer)
                    continue
                lane.doubts += 1
                _log.info("%s could not read %s", lane.decoder.name, chunk.reading.shard.name)
                self._return(replace(chunk, own=True))
                self._changed.notify_all()
                if lane.doubts >= MOST_FAILURES:
                    return

    def _break(self, text: str) -> None:
        """End the feed with an error, which is raised where batches are asked for."""
        with self._changed:
            self._broken = WorkFailed(text)
            self._changed.notify_all()

    def _line(self, chunk: _Chunk) -> str:
        records = chunk.reading.records[chunk.start : chunk.stop]
        return chunk_line(self._shards.artifact.store, chunk.reading.shard.part, records, chunk.first)

    def _give(self, lane: _Lane) -> _Chunk | None:
        """Give a decoder the next chunk and return it; None if the feed is closed, or if there is none and it has one.

        Waits for a chunk if the decoder has none.
        """
        with self._changed:
            while not self._closed:
                chunk = self._next_chunk(lane.decoder.own)
                if chunk is not None:
                    chunk.reading.held += 1
                    lane.chunks.append(chunk)
                    return chunk
                if lane.chunks:
                    return None
                self._changed.wait()
        return None

    def _next_chunk(self, own: bool) -> _Chunk | None:
        """Return the next chunk for a process of this worker (`own`) or a decoder elsewhere, None if there is none."""
        for chunk in list(self._returned):
            wanted = not chunk.reading.left and chunk.reading.failed is None
            if wanted and chunk.own and not own:
                continue
            self._returned.remove(chunk)
            if wanted:
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

    def _bury(self, lane: _Lane, ended: str) -> None:
        """Charge the death of a process to the shard that it decoded; all other chunks of a decoder go to others.

        A death before the first chunk was begun is charged too, once the chunk has seen several.
        """
        decoder = lane.decoder
        if not decoder.own and not lane.unwanted and not self._closed:
            _log.info("%s %s", decoder.name, ended)
        for place, chunk in enumerate(lane.chunks):
            reading = chunk.reading
            first = place == 0 and decoder.own and not lane.unwanted
            if first and (decoder.begun or chunk.deaths + 1 >= self._most_deaths) and reading.failed is None:
                text = f"{reading.shard.name}: {decoder.name}, which decoded it, {ended}"
                _log.info(text, extra={"shard": reading.shard.name})
                reading.failed = AttemptFailed(text)
            own = chunk.own or not (decoder.own or lane.unwanted)
            self._return(replace(chunk, deaths=chunk.deaths + first, own=own))
        self._changed.notify_all()

    def _return(self, chunk: _Chunk) -> None:
        """Take back a chunk without an answer, for others to decode if anybody still wants it."""
        chunk.reading.held -= 1
        self._returned.append(chunk)
        self._settle(chunk.reading)


def _nameless_memory(size: int) -> int:
    """Return a file descriptor of shared memory of this size."""
    if hasattr(os, "memfd_create"):
        memory = os.memfd_create("hhnet-feed")
    else:
        with tempfile.TemporaryFile() as file:
            memory = os.dup(file.fileno())
    os.ftruncate(memory, size)
    return memory


def _is_certain(answer: DecodedChunk | tuple[str, str]) -> bool:
    """Tell whether a decoder elsewhere read all samples as they are in the index; a store may look otherwise there."""
    return isinstance(answer, DecodedChunk) and all(why is not Reason.DAMAGED for why, _ in answer.rejects.values())


def _raised(name: str, text: str) -> Exception:
    """Return the error that a decode process met."""
    kind = getattr(errors, name, None)
    if isinstance(kind, type) and issubclass(kind, HHNetError):
        return kind(text)
    return RuntimeError(f"{name}: {text}")
