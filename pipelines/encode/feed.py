"""Feeds a network with batches of decoded squares, and makes the next shard ready while this one runs.

ThreadFeed decodes with threads of this process, which suits a CPU: there the network has the cores anyway. Of the next
shard it reads some samples ahead. ProcessFeed (`process_feed`) decodes in processes of their own, also on other nodes,
and goes on with the next shard where this one has no samples left.

A batch holds samples of one shard only, in row order; behind a reject the following samples move up. So batches, and
codes, are a function of the shard alone, whoever decodes.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import numpy as np

from hhnet.preprocess import Preprocess
from pipelines.artifacts.tables import Reason
from pipelines.config.settings import Config
from pipelines.encode.decoder import Squares
from pipelines.shards.containers.limits import ImageReject
from pipelines.shards.images import decode_ahead, decode_square
from pipelines.shards.shards import Record, Sample, Shard, ShardSet

READ_AHEAD_BYTES = 8 << 20
"""Bytes of the next shard's samples that are read before it begins, about."""


@dataclass(frozen=True)
class Fed:
    """A batch of one shard: squares, uint8 (N, S, S, 3), of the samples `kept`, and the rejects met on the way.

    N is the batch size, except in a shard's last batch; any batch may be empty. Call `free` once the squares are used.
    """

    squares: Squares
    kept: Sequence[Sample]
    rejects: Sequence[tuple[Record, ImageReject]]
    animated: int
    seconds: Mapping[str, float]
    free: Callable[[], None] = lambda: None


def count_processes(config: Config, share: float | None) -> int:
    """Return how many decode processes an encoding worker has, 0 for threads of its own.

    On a CPU (`share` is None) it has none; beside a GPU as many as its `share` of the node's CPUs holds with
    `data.workers` threads each, when one CPU is left to the worker, but at least one.
    """
    if config.encode.decode_processes is not None:
        return config.encode.decode_processes
    return 0 if share is None else max(1, int(share - 1) // config.data.workers)


class Feed(Protocol):
    """The batches of shard after shard."""

    apart: bool
    """Whether images are decoded in other processes, so that none of the next shard can harm this one."""
    chunk_samples: int
    """Samples that an object store is asked for at a time; 0 = whole blocks, whatever is in them."""

    @property
    def lanes(self) -> int:
        """Threads that decode, in all processes."""

    def expect(self, shard: Shard) -> None:
        """Make a shard ready that is likely to follow."""

    def batches(self, shard: Shard) -> Iterator[Fed]:
        """Yield the batches of a shard. Raises AttemptFailed if a process that decoded it died."""

    def is_ready(self, shard: Shard) -> bool:
        """Tell whether the next batch of an expected shard can be had at once."""


@dataclass(frozen=True)
class Shaping:
    """How samples become batches: the squares, their number in a batch, threads that decode, and the metadata."""

    preprocess: Preprocess
    batch_size: int
    threads: int
    metadata: bool = False
    """Whether samples keep their JSON."""


@dataclass
class Collected:
    """Samples on their way into one batch."""

    squares: list[Squares] = field(default_factory=list)
    kept: list[Sample] = field(default_factory=list)
    rejects: list[tuple[Record, ImageReject]] = field(default_factory=list)
    animated: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("read", "decode"), 0.0))

    def add(self, sample: Sample, square: Squares | ImageReject, animated: bool) -> None:
        """Add what became of a sample."""
        if isinstance(square, ImageReject):
            self.rejects.append((sample.record, square))
            return
        self.kept.append(sample)
        self.squares.append(square)
        self.animated += animated

    def fed(self, side: int) -> Fed:
        """Return the batch; `side` is that of a square."""
        squares = np.stack(self.squares) if self.squares else np.zeros((0, side, side, 3), np.uint8)
        return Fed(squares, self.kept, self.rejects, self.animated, self.seconds)


# ------------------------------------------------------------------------------------------------------- threads


def thread_batches(
    samples: Iterable[Sample], shaping: Shaping, advance: Callable[[], None] = lambda: None
) -> Iterator[Fed]:
    """Yield the batches of samples, decoded by threads beside the caller; call `advance` after each sample."""
    now, size = Collected(), shaping.batch_size
    # Two batches ahead: one is decoded while the model takes the other.
    decode = partial(_decode_sample, shaping.preprocess)
    for sample, square, animated, seconds in decode_ahead(_timed(samples), decode, shaping.threads, 2 * size):
        now.seconds["read"] += seconds[0]
        now.seconds["decode"] += seconds[1]
        advance()
        now.add(sample, square, animated)
        if len(now.squares) == size:
            yield now.fed(shaping.preprocess.size)
            now = Collected()
    yield now.fed(shaping.preprocess.size)


def _timed(samples: Iterable[Sample]) -> Iterator[tuple[Sample, float]]:
    """Yield each sample with the seconds that reading it took."""
    iterator = iter(samples)
    while True:
        begun = time.perf_counter()
        sample = next(iterator, None)
        if sample is None:
            return
        yield sample, time.perf_counter() - begun


def _decode_sample(
    preprocess: Preprocess, read: tuple[Sample, float]
) -> tuple[Sample, Squares | ImageReject, bool, tuple[float, float]]:
    """Return the sample without its bytes, its square or the reject, whether it is animated, and the seconds taken."""
    sample, read_s = read
    begun = time.perf_counter()
    square: Squares | ImageReject
    animated = False
    if sample.damage is not None:
        square = ImageReject(Reason.DAMAGED, sample.damage)
    else:
        try:
            square, animated = decode_square(sample.image, preprocess)
        except ImageReject as reject:
            square = reject
    # The bytes are not needed after decoding; keeping them until the shard ends would hold the whole shard in memory.
    bare = Sample(sample.record, b"", sample.metadata)
    return bare, square, animated, (read_s, time.perf_counter() - begun)


class _Ahead:
    """The samples of a shard; the first READ_AHEAD_BYTES of them are read in a thread before anybody asks."""

    def __init__(self, samples: Iterator[Sample]) -> None:
        self._rest, self._first = samples, list[Sample]()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._read, name="read ahead", daemon=True)
        self._thread.start()

    def _read(self) -> None:
        held = 0
        try:
            while held < READ_AHEAD_BYTES and (sample := next(self._rest, None)) is not None:
                self._first.append(sample)
                held += len(sample.image)
        except Exception as error:  # raised where the samples are asked for
            self._error = error

    def __iter__(self) -> Iterator[Sample]:
        self._thread.join()
        first = deque(self._first)
        self._first.clear()
        while first:
            yield first.popleft()
        if self._error is not None:
            raise self._error
        yield from self._rest


class ThreadFeed:
    """Decodes with threads of this process. A shard that is expected is read ahead, but not decoded yet: a picture that
    kills the process is then charged to its own shard."""

    apart, chunk_samples = False, 0

    def __init__(self, shards: ShardSet, shaping: Shaping, advance: Callable[[], None] = lambda: None) -> None:
        self._shards, self._shaping, self._advance = shards, shaping, advance
        self.lanes = shaping.threads
        self._ahead: dict[str, _Ahead] = {}

    def expect(self, shard: Shard) -> None:
        """Read the first samples of a shard in a thread."""
        self._ahead[shard.name] = _Ahead(self._read(shard))

    def batches(self, shard: Shard) -> Iterator[Fed]:
        """Return the batches of a shard."""
        ahead = self._ahead.pop(shard.name, None)
        self._ahead.clear()  # another worker took what was expected
        return thread_batches(self._read(shard) if ahead is None else ahead, self._shaping, self._advance)

    def is_ready(self, shard: Shard) -> bool:
        """Return False: nothing is decoded ahead."""
        return False

    def _read(self, shard: Shard) -> Iterator[Sample]:
        # From inside the iterator, so that what is wrong with the index is raised where the samples are asked for.
        yield from self._shards.read(shard, metadata=self._shaping.metadata)
