"""From the bytes of samples to squares, and a process that does it for another: `python -m pipelines.encode.decoder`.

The process reads chunks of samples from its store, decodes them with several threads, and writes the squares into
memory that it shares with the worker that started it. Standard input brings a line of JSON for each chunk, standard
output takes one for each answer. It decodes one chunk after the other, so a picture that kills the process belongs to
the chunk whose answer is due; meanwhile it reads the next chunk. It ends when its worker does.
"""

import base64
import ctypes
import json
import mmap
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, TextIO

import numpy as np
import numpy.typing as npt

from hhnet.preprocess import Preprocess
from pipelines.artifacts.manifest import Part
from pipelines.artifacts.tables import Reason
from pipelines.shards.containers.limits import ImageReject
from pipelines.shards.images import decode_square
from pipelines.shards.shards import Member, Record, Sample, read_samples, span_bytes
from pipelines.storage import Store

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
    return json.dumps({"store": store.uri, "part": part.model_dump(), "samples": samples, "first": first}) + "\n"


def parse_answer(line: str) -> DecodedChunk | tuple[str, str]:
    """Return the answer of a decode process, or the class and the text of the error that it met."""
    said = json.loads(line)
    if "error" in said:
        name, text = said["error"]
        return str(name), str(text)
    rejects = {int(place): (Reason(reason), str(detail)) for place, (reason, detail) in said["rejects"].items()}
    metadata = [None if data is None else base64.b64decode(data) for data in said["metadata"]]
    return DecodedChunk(rejects, frozenset(said["animated"]), metadata, float(said["read"]), float(said["decode"]))


# ------------------------------------------------------------------------------------------------- in the process


class _Decoder:
    """The decode process: reads ahead by one chunk, decodes, answers."""

    def __init__(self, task: Mapping[str, Any], answers: TextIO) -> None:
        shape = tuple(task["shape"])
        shared = mmap.mmap(task["memory"], int(np.prod(shape)))
        self._ring = np.frombuffer(shared, np.uint8).reshape(shape)
        self._preprocess = Preprocess.from_dict(task["preprocess"])
        self._pool = ThreadPoolExecutor(task["threads"], thread_name_prefix="decode")
        self._metadata, self._answers = bool(task["metadata"]), answers
        self._read: queue.Queue[tuple[int, list[Sample] | Exception, float]] = queue.Queue(maxsize=2)

    def read(self, chunks: TextIO) -> None:
        """Read the samples of each chunk; end the process when its worker sends no more."""
        for line in chunks:
            chunk, begun = json.loads(line), time.perf_counter()
            records = [
                Record("", "", row, "", (), tuple(Member(n, o, s, bytes.fromhex(d)) for n, o, s, d in members))
                for row, members in enumerate(chunk["samples"])
            ]
            found: list[Sample] | Exception
            try:
                part, span = Part.model_validate(chunk["part"]), span_bytes(records)
                found = list(read_samples(Store(chunk["store"]), part, records, self._metadata, span))
            except Exception as error:  # it is raised again in the worker
                found = error
            self._read.put((chunk["first"], found, time.perf_counter() - begun))
        os._exit(0)

    def decode(self) -> None:
        """Decode and answer chunk after chunk."""
        while True:
            first, samples, read_s = self._read.get()
            try:
                if isinstance(samples, Exception):
                    raise samples
                self._answers.write(BEGUN)
                self._answers.flush()
                squares = list(self._pool.map(self._square, samples, range(first, first + len(samples))))
            except Exception as error:  # it is raised again in the worker
                self._say({"error": [type(error).__name__, str(error)]})
                continue
            self._say(
                {
                    "rejects": {n: why for n, (why, _, _) in enumerate(squares) if why is not None},
                    "animated": [n for n, (_, animated, _) in enumerate(squares) if animated],
                    "metadata": [sample.metadata and base64.b64encode(sample.metadata).decode() for sample in samples],
                    "read": read_s,
                    "decode": sum(seconds for _, _, seconds in squares),
                }
            )

    def _square(self, sample: Sample, place: int) -> tuple[tuple[str, str] | None, bool, float]:
        """Put the square of a sample at its place; return the reason if it is a reject, animation and seconds."""
        begun = time.perf_counter()
        if sample.damage is not None:
            return (Reason.DAMAGED.value, sample.damage), False, 0.0
        try:
            self._ring[place], animated = decode_square(sample.image, self._preprocess)
        except ImageReject as reject:
            return (reject.reason.value, reject.detail), False, time.perf_counter() - begun
        return None, animated, time.perf_counter() - begun

    def _say(self, answer: Mapping[str, Any]) -> None:
        self._answers.write(json.dumps(answer) + "\n")
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
    decoder = _Decoder(json.loads(sys.stdin.readline()), answers)
    answers.write(READY)
    answers.flush()
    threading.Thread(target=decoder.read, args=(sys.stdin,), name="read", daemon=True).start()
    try:
        decoder.decode()
    except BrokenPipeError:  # nobody waits for the answer
        os._exit(0)


if __name__ == "__main__":
    run_decoder()
