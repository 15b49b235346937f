"""What the pool asks of a cluster: actors and their answers, nodes, and the time. Ray is the one that verbs run on."""

import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pipelines.cluster.head import require_node
from pipelines.cluster.placement import Need, Node, hide_unreserved_gpus, list_live_nodes
from pipelines.console import logged_in_worker

Handle = Any
"""A handle of an actor, of the type that its backend has."""
Reference = Any
"""A reference to an answer that may not be there yet, of the type that its backend has."""
BESIDE_GROUP = "beside"
"""Name of the concurrency group whose thread answers while the actor works."""


@dataclass(frozen=True)
class ActorLocation:
    """The node, host, process and GPUs of an actor."""

    node: str
    host: str
    pid: int
    gpu: str | None

    def __str__(self) -> str:
        return f"{self.host}:{self.pid}"


class WorkerActor:
    """Runs in an actor. It builds the real worker on request, since an error in an actor's __init__ counts as death."""

    def __init__(self, kind: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self._make: Callable[[], Any] = lambda: kind(*args)
        self._worker: Any = None

    def place(self) -> ActorLocation:
        """Return where this actor runs. Every actor is asked this first."""
        import ray

        context = ray.get_runtime_context()
        gpus = ",".join(map(str, context.get_accelerator_ids().get("GPU", [])))
        return ActorLocation(context.get_node_id(), socket.gethostname(), os.getpid(), gpus or None)

    def build(self) -> int | None:
        """Build the worker and return its first progress."""
        hide_unreserved_gpus()
        self._worker = self._make()
        return self.progress()

    def run(self, item: Any, label: str, upcoming: Sequence[Any]) -> Any:
        """Do one item; `upcoming` has the item that is likely to follow, or nothing."""
        expect = getattr(self._worker, "expect", None)
        with logged_in_worker(label):
            if expect is not None:
                for following in upcoming:
                    expect(following)
            return self._worker.run(item)

    def progress(self) -> int | None:
        """Return the worker's progress, a number that changes as it works, or None if it has none."""
        progress: int | None = getattr(self._worker, "progress", None)
        return progress


class Actors(Protocol):
    """Actors that each run one worker, on the nodes of a cluster, and the clock by which they are watched."""

    here: str
    """The node of this process."""

    def start(self) -> Handle:
        """Start an actor, as soon as a node has room; return its handle."""

    def ask(self, actor: Handle, method: str, *arguments: object, name: str = "") -> Reference:
        """Call a method of `WorkerActor`, under a `name` for people; return a reference to its answer."""

    def wait(self, references: Sequence[Reference], timeout: float) -> list[Reference]:
        """Wait until one of the answers is there; return its reference, or nothing after so many seconds."""

    def get(self, reference: Reference) -> Any:
        """Return an answer, or raise what Ray raises in its place."""

    def kill(self, actor: Handle) -> None:
        """End an actor."""

    def nodes(self) -> list[Node]:
        """Return the live nodes; raise ClusterUnavailable if this process's own is not among them."""

    def monotonic(self) -> float:
        """Return the seconds of a clock that never goes back."""

    def time(self) -> float:
        """Return the seconds since the epoch."""

    def sleep(self, seconds: float) -> None:
        """Wait."""


StartActors = Callable[[Callable[..., Any], tuple[Any, ...], Need, str], Actors]
"""Takes the worker's class and its arguments, what each reserves, and the verb, as `RayActors` does."""


class RayActors:
    """Actors on Ray. Its own restarts are off: the pool counts attempts, and moves an item to another actor itself."""

    def __init__(self, worker: Callable[..., Any], arguments: tuple[Any, ...], need: Need, verb: str) -> None:
        import ray

        options = {"max_restarts": 0, "max_task_retries": 0, "concurrency_groups": {BESIDE_GROUP: 1}}
        named = type(f"{verb.title().replace('-', '')}Worker", (WorkerActor,), {"__module__": __name__})
        self._remote = ray.remote(**need.options(), **options)(named)  # the dashboard shows the class as its name
        self._arguments = worker, arguments
        self.here = str(ray.get_runtime_context().get_node_id())

    def start(self) -> Handle:
        """Start an actor."""
        return self._remote.remote(*self._arguments)

    def ask(self, actor: Handle, method: str, *arguments: object, name: str = "") -> Reference:
        """Call a method; its progress is asked beside the work."""
        options = {"concurrency_group": BESIDE_GROUP} if method == "progress" else {"name": name} if name else {}
        return getattr(actor, method).options(**options).remote(*arguments)

    def wait(self, references: Sequence[Reference], timeout: float) -> list[Reference]:
        """Wait for one answer."""
        import ray

        ready, _ = ray.wait(list(references), num_returns=1, timeout=timeout)
        return list(ready)

    def get(self, reference: Reference) -> Any:
        """Return an answer."""
        import ray

        return ray.get(reference)

    def kill(self, actor: Handle) -> None:
        """End an actor."""
        import ray

        ray.kill(actor)

    def nodes(self) -> list[Node]:
        """Return the live nodes."""
        require_node()
        return list_live_nodes()

    def monotonic(self) -> float:
        """Return the monotonic time."""
        return time.monotonic()

    def time(self) -> float:
        """Return the time."""
        return time.time()

    def sleep(self, seconds: float) -> None:
        """Wait."""
        time.sleep(seconds)
