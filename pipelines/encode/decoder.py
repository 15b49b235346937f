"""From the bytes of samples to squares, and a process that does it for another: `python -m pipelines.encode.decoder`.

The process reads chunks of samples from their store, decodes them with several threads, and writes the squares into
memory that it shares with the worker that started it. Standard input brings a line of JSON for each chunk, standard
output takes one for each answer. It decodes one chunk after the other, so a picture that kills the process belongs to
the chunk whose answer is due; meanwhile it reads the next chunk. It ends when its worker does.
"""

import base64
import ctypes
import json
import logging
import mmap
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import IO, Any, Protocol, TextIO

import numpy as np
import numpy.typing as npt

from hhnet.preprocess import Preprocess
from pipelines.artifacts.manifest import Part
from pipelines.artifacts.tables import Reason
from pipelines.shards.containers.limits import ImageReject
from pipelines.shards.images import decode_square
from pipelines.shards.shards import Member, Record, Sample, read_samples, span_bytes
from pipelines.storage import Store

_log = logging.getLogger(__name__)

PR_SET_PDEATHSIG = 1
"""Number of the prctl option, from linux/prctl.h."""

READY, BEGUN = "ready\n", "begun\n"
"""Lines before the answers: the process is ready, and it begins to decode a chunk."""

Squares = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class DecodeTask:
    """Facts that a decode process begins with: the shared memory and its shape, and how samples become squares."""

    memory: int
    """File descriptor of the shared memory."""
    shape: tuple[int, ...]
    """Squares that fit, then the shape of one."""
    preprocess: Mapping[str, Any]
    threads: int
    metadata: bool
    """Whether the answers bring the samples' JSON."""


@dataclass(frozen=True)
class DecodedChunk:
    """What became of a chunk: by place in it, the rejects as (reason, detail), the animated ones and the metadata."""

    rejects: Mapping[int, tuple[Reason, str]]
    animated: frozenset[int]
    metadata: Sequence[bytes | None]
    read_s: float
    decode_s: float


def task_line(task: DecodeTask) -> str:
    """Write the first line that a decode process gets."""
    return json.dumps(asdict(task)) + "\n"


def chunk_line(store: Store, part: Part, records: Sequence[Record], first: int) -> str:
    """Write the line for a chunk: samples of one tar, whose squares go to place `first` and those behind it."""
    samples = [[[m.name, m.offset, m.size, m.sha256.hex()] for m in record.members] for record in records]
    return json.dumps({"store": store.uri, "part": asdict(part), "samples": samples, "first": first}) + "\n"


class Decoder(Protocol):
    """One that decodes chunks for a feed, and answers in the order in which it was asked."""

    own: bool
    """Whether it is a process of the feed's worker."""
    name: str
    begun: bool
    """Whether it certainly decodes the chunk whose answer is due."""

    def await_ready(self) -> bool:
        """Wait until it is ready; return False if it ended before."""

    def ask(self, line: str, squares: Squares) -> None:
        """Ask it to decode a chunk into `squares`, unless it has ended: `answer` tells."""

    def answer(self) -> DecodedChunk | tuple[str, str] | None:
        """Return the next answer; None once it has ended, or says what is no answer."""

    def kill(self) -> None:
        """End it at once."""

    def end(self) -> str:
        """End it if it lives, and free what it held; return how it ended."""


def parse_answer(line: str) -> DecodedChunk | tuple[str, str]:
    """Return the answer of a decode process, or the class and the text of the error that it met."""
    said = json.loads(line)
    if "error" in said:
        name, text = said["error"]
        return str(name), str(text)
    rejects = {int(place): (Reason(reason), str(detail)) for place, (reason, detail) in said["rejects"].items()}
    metadata = [None if data is None else base64.b64decode(data) for data in said["metadata"]]
    return DecodedChunk(rejects, frozenset(said["animated"]), metadata, float(said["read"]), float(said["decode"]))


# ------------------------------------------------------------------------------- the process, as its worker has it


class DecodeProcess:
    """A decode process. It is a child of the thread that makes it, and dies with this thread."""

    own = True

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
        self.name = f"process {self.process.pid}"
        self.begun = False
        self._send(task_line(task))

    def await_ready(self) -> bool:
        """Wait until it is ready; return False if it ended before."""
        return self._receive() == READY

    def ask(self, line: str, squares: Squares) -> None:
        """Send a chunk; the process knows the squares' place in the ring from the line."""
        self._send(line)

    def answer(self) -> DecodedChunk | tuple[str, str] | None:
        """Return the next answer; None once the process has ended, or says what is no answer."""
        line = self._receive()
        if line == BEGUN:
            self.begun = True
            line = self._receive()
        try:
            answer = parse_answer(line) if line else None
        except (ValueError, TypeError, LookupError):
            _log.info("%s gave no answer to what it was asked", self.name)
            return None
        if answer is not None:
            self.begun = False
        return answer

    def kill(self) -> None:
        """Kill the process."""
        self.process.kill()

    def end(self) -> str:
        """Kill the process if it lives; return how it ended."""
        self.process.kill()
        for stream in (self.process.stdin, self.process.stdout):
            with suppress(OSError):  # what was not sent is of no use any more
                _piped(stream).close()
        code = self.process.wait()
        return f"was killed by signal {-code}" if code < 0 else f"ended with {code}"

    def _send(self, line: str) -> None:
        with suppress(OSError):  # it has ended: `_receive` tells
            stream = _piped(self.process.stdin)
            stream.write(line)
            stream.flush()

    def _receive(self) -> str:
        """Return the next line, or "" once the process has ended."""
        line = _piped(self.process.stdout).readline()
        return line if line.endswith("\n") else ""


def _piped(stream: IO[str] | None) -> IO[str]:
    assert stream is not None, "both streams are pipes"
    return stream


# ------------------------------------------------------------------------------------------------------ the decoding


@dataclass(frozen=True)
class _ReadChunk:
    """The samples of a chunk, or the error met while they were read, and the seconds that it took."""

    first: int
    count: int
    samples: Sequence[Sample] | Exception
    seconds: float


class ChunkDecoder:
    """Reads chunks from their stores and decodes them with several threads: the one way from a chunk to squares."""

    def __init__(self, preprocess: Mapping[str, Any], threads: int, metadata: bool) -> None:
        self._preprocess, self._metadata = Preprocess.from_dict(preprocess), metadata
        self.side = self._preprocess.size
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")

    def read(self, line: str) -> _ReadChunk:
        """Read the samples of a chunk."""
        chunk, begun = json.loads(line), time.perf_counter()
        records = [
            Record("", "", row, "", (), tuple(Member(n, o, s, bytes.fromhex(d)) for n, o, s, d in members))
            for row, members in enumerate(chunk["samples"])
        ]
        found: list[Sample] | Exception
        try:
            part, span = Part(**chunk["part"]), span_bytes(records)
            found = list(read_samples(Store(chunk["store"]), part, records, self._metadata, span))
        except Exception as error:  # it is raised again in the worker
            found = error
        return _ReadChunk(chunk["first"], len(records), found, time.perf_counter() - begun)

    def decode(self, chunk: _ReadChunk, squares: Squares) -> str:
        """Decode the samples of a chunk into `squares`, each at its place; return the answer."""
        try:
            if isinstance(chunk.samples, Exception):
                raise chunk.samples
            told = list(self._pool.map(self._square, chunk.samples, squares))
        except Exception as error:  # it is raised again in the worker
            return json.dumps({"error": [type(error).__name__, str(error)]})
        metadata = (sample.metadata for sample in chunk.samples)
        return json.dumps(
            {
                "rejects": {n: why for n, (why, _, _) in enumerate(told) if why is not None},
                "animated": [n for n, (_, animated, _) in enumerate(told) if animated],
                "metadata": [None if data is None else base64.b64encode(data).decode() for data in metadata],
                "read": chunk.seconds,
                "decode": sum(seconds for _, _, seconds in told),
            }
        )

    def _square(self, sample: Sample, place: Squares) -> tuple[tuple[str, str] | None, bool, float]:
        """Put the square of a sample at its place; return the reason if it is a reject, animation and seconds."""
        begun = time.perf_counter()
        if sample.damage is not None:
            return (Reason.DAMAGED.value, sample.damage), False, 0.0
        try:
            place[:], animated = decode_square(sample.image, self._preprocess)
        except ImageReject as reject:
            return (reject.reason.value, reject.detail), False, time.perf_counter() - begun
        return None, animated, time.perf_counter() - begun


# ------------------------------------------------------------------------------------------------- in the process


class _Process:
    """The decode process: reads ahead by one chunk, decodes, answers."""

    def __init__(self, task: Mapping[str, Any], answers: TextIO) -> None:
        shape = tuple(task["shape"])
        shared = mmap.mmap(task["memory"], int(np.prod(shape)))
        self._ring = np.frombuffer(shared, np.uint8).reshape(shape)
        self._decoder = ChunkDecoder(task["preprocess"], task["threads"], bool(task["metadata"]))
        self._answers = answers
        self._read: queue.Queue[_ReadChunk] = queue.Queue(maxsize=2)

    def read(self, chunks: TextIO) -> None:
        """Read the samples of each chunk; end the process when its worker sends no more."""
        for line in chunks:
            self._read.put(self._decoder.read(line))
        os._exit(0)

    def decode(self) -> None:
        """Decode and answer chunk after chunk."""
        while True:
            chunk = self._read.get()
            self.say(BEGUN)
            self.say(self._decoder.decode(chunk, self._ring[chunk.first : chunk.first + chunk.count]) + "\n")

    def say(self, line: str) -> None:
        """Write a line to the worker."""
        self._answers.write(line)
        self._answers.flush()


def run_decoder() -> None:
    """Decode what standard input asks for, until it ends."""
    if sys.platform == "linux":  # a decoder that hangs and holds the interpreter lock would not see the input end
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    for number in (signal.SIGINT, signal.SIGTERM):  # Ctrl-C comes to all processes; the worker ends its own
        signal.signal(number, signal.SIG_IGN)
    # What a library prints must not be taken for an answer.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    process = _Process(json.loads(sys.stdin.readline()), answers)
    process.say(READY)
    threading.Thread(target=process.read, args=(sys.stdin,), name="read", daemon=True).start()
    try:
        process.decode()
    except BrokenPipeError:  # nobody waits for the answer
        os._exit(0)


if __name__ == "__main__":
    run_decoder()
