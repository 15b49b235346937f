"""Decoders on other nodes: Ray actors that read and decode chunks for the feed of an encoding worker.

The worker makes its decoders itself, and Ray ends them with it. A decoder reserves `data.workers` CPUs, first on nodes
without GPUs, then beside GPUs, where each free one keeps the CPUs of an encoding worker. It is bound to a node that has
room now, and given up if it is not ready soon: Ray would let it wait without end. Its squares travel through the object
store, a few chunks at a time, and are freed once they are copied into the feed's ring.
"""

import logging
import os
import random
import socket
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np

from pipelines.cluster.attempts import first_line
from pipelines.cluster.placement import FREE_COUNT_LAG_S, Node, list_live_nodes
from pipelines.config.settings import Config

if TYPE_CHECKING:  # they import torch, which must see what DecodeWorker sets
    from pipelines.encode.decoder import DecodedChunk, Squares
    from pipelines.encode.feed import Shaping

_log = logging.getLogger(__name__)

PLACE_S = 30.0
"""Seconds that a decoder may take to get its place, if another job took the room meanwhile."""
MOST_CPUS = 16
"""CPUs of the decoders that `encode.decoders=auto` asks for at most for each worker. Of photographs of 400 x 533 pixels
they make more squares of 224 pixels than a network of 10 Gbit/s carries."""


def count_decoders(config: Config, gpus: float, nodes: Sequence[Node]) -> int:
    """Return how many decoders an encoding worker that has `gpus` GPUs asks for.

    `auto` divides the CPUs of the nodes without GPUs among the workers that the GPUs hold. It is 0 without a GPU, or if
    the user wants no processes.
    """
    if config.encode.decoders != "auto":
        return config.encode.decoders
    if not gpus or config.encode.decode_processes == 0:
        return 0
    threads = config.data.workers
    places = sum(int(node.total.get("CPU", 0) / threads) for node in nodes if not node.total.get("GPU"))
    workers = max(1, sum(int(node.total.get("GPU", 0) / gpus) for node in nodes))
    if config.encode.workers is not None:
        workers = min(workers, config.encode.workers)
    return min(-(-places // workers), max(1, MOST_CPUS // threads))


def decoder_places(nodes: Sequence[Node], cpus: int, kept: float) -> list[str]:
    """Return the node of each decoder that finds room, in the order in which the places are to be taken.

    Nodes without GPUs come first, and of these each once before any comes twice. Each free GPU keeps `kept` CPUs.
    """
    places = [
        (node.total.get("GPU", 0) > 0, number, node.id)
        for node in nodes
        if not node.draining
        for number in range(int((node.free.get("CPU", 0) - kept * node.free.get("GPU", 0)) / cpus + 1e-6))
    ]
    return [node for _, _, node in sorted(places, key=lambda place: place[:2])]


class DecodeWorker:
    """Runs in an actor, which calls it from a thread for each chunk: it reads one while it decodes another."""

    def place(self) -> str:
        """Return where it runs, as host:pid."""
        return f"{socket.gethostname()}:{os.getpid()}"

    def build(self, preprocess: Mapping[str, object], threads: int, metadata: bool) -> None:
        """Make ready to decode."""
        os.environ["OMP_NUM_THREADS"] = "1"  # for torch, not imported yet: pictures are decoded side by side already
        from pipelines.encode.decoder import ChunkDecoder

        self._decoder = ChunkDecoder(preprocess, threads, metadata)

    def decode(self, line: str) -> "tuple[str, Squares]":
        """Decode a chunk; return the answer and the squares."""
        chunk, side = self._decoder.read(line), self._decoder.side
        squares = np.zeros((chunk.count, side, side, 3), np.uint8)
        return self._decoder.decode(chunk, squares), squares


class RemoteDecoder:
    """A decode worker on a node, as its feed sees it."""

    own = begun = False

    def __init__(self, node: str, shaping: "Shaping") -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        from pipelines.encode.process_feed import CHUNKS_EACH

        options = {"max_restarts": 0, "max_task_retries": 0, "max_concurrency": CHUNKS_EACH}
        there = NodeAffinitySchedulingStrategy(node, soft=False)
        remote = ray.remote(num_cpus=shaping.threads, scheduling_strategy=there, **options)(DecodeWorker)
        self._actor, self._shaping = remote.remote(), shaping
        self._asked: deque[tuple[ray.ObjectRef, Squares]] = deque()
        self._ended = "was ended"
        self.name = f"the decoder on node {node}"

    def await_ready(self) -> bool:
        """Wait until it is ready; return False if it has no place after PLACE_S, or ended."""
        import ray
        from ray.exceptions import GetTimeoutError, RayError

        how = self._shaping
        try:
            self.name = f"the decoder {ray.get(self._actor.place.remote(), timeout=PLACE_S)}"
            ray.get(self._actor.build.remote(how.preprocess.to_dict(), how.threads, how.metadata))
        except GetTimeoutError:
            self._ended = f"found no room within {PLACE_S:g} s"
            return False
        except RayError as error:
            self._ended = f"did not start: {first_line(error)}"
            return False
        return True

    def ask(self, line: str, squares: "Squares") -> None:
        """Ask for a chunk, whose squares are copied into `squares` with the answer."""
        self._asked.append((self._actor.decode.remote(line), squares))

    def answer(self) -> "DecodedChunk | tuple[str, str] | None":
        """Return the next answer; None if the decoder or its node is gone, or what came is no answer."""
        import ray

        from pipelines.encode.decoder import parse_answer

        ref, place = self._asked.popleft()
        try:
            line, squares = ray.get(ref)
            place[:] = squares
            return parse_answer(line)
        except Exception as error:  # whatever it is, the chunk is decoded again
            self._ended = f"gave no answer: {type(error).__name__}: {error}".splitlines()[0]
            return None

    def kill(self) -> None:
        """End it at once."""
        import ray
        from ray.exceptions import RayError

        with suppress(RayError):
            ray.kill(self._actor)

    def end(self) -> str:
        """End it if it lives, and free the squares that nobody took; return how it ended."""
        self.kill()
        self._asked.clear()
        return self._ended


class PlacedDecoders:
    """The decoders of an encoding worker, which has `gpus` GPUs and `cpus` CPUs; `most` is their number."""

    def __init__(self, most: int, shaping: "Shaping", gpus: float, cpus: float) -> None:
        self.most, self._shaping = most, shaping
        self._kept = cpus / gpus if gpus else 0.0
        self._lock = threading.Lock()
        self._looked = -FREE_COUNT_LAG_S
        self._places: list[str] = []

    def start(self) -> RemoteDecoder | None:
        """Start a decoder, or return None where no node has room."""
        with self._lock:
            if time.monotonic() - self._looked > FREE_COUNT_LAG_S:
                self._places = self._look()
                self._looked = time.monotonic()
            node = self._places.pop(0) if self._places else None
        return None if node is None else RemoteDecoder(node, self._shaping)

    def _look(self) -> list[str]:
        nodes = _find_nodes()
        # Other workers look at the same moment: so not all of them begin with the same node.
        return decoder_places(random.sample(nodes, len(nodes)), self._shaping.threads, self._kept)


def _find_nodes() -> list[Node]:
    """Return the live nodes; none while the head does not answer, since a worker can do without decoders."""
    from ray.exceptions import RayError

    try:
        return list_live_nodes()
    except (RayError, RuntimeError) as error:
        _log.info("no decoders for now: the head of Ray does not tell its nodes: %s", error)
        return []


def place_decoders(config: Config, shaping: "Shaping") -> PlacedDecoders | None:
    """Return the decoders of this encoding worker; None if it has none, as outside of Ray."""
    import ray

    if not config.encode.decoders or not ray.is_initialized():
        return None
    context = ray.get_runtime_context()
    if context.get_actor_id() is None:
        return None
    reserved = context.get_assigned_resources()
    gpus = reserved.get("GPU", 0.0)
    most = count_decoders(config, gpus, _find_nodes() if gpus else ())
    return PlacedDecoders(most, shaping, gpus, reserved.get("CPU", 0.0)) if most else None
