"""Placement of a verb's workers: the resources that one reserves, the nodes that can hold it, and the wait for room.

Ray queues a worker that fits nowhere and never says so. Here every wait for room ends after `ray.wait_s`, with an error
that lists the request, the nodes and the resources in use. A wait asks the autoscaler too, so a cluster may begin with
no workers.
"""

import logging
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from pipelines.artifacts.host import allowed_cpus
from pipelines.cluster.head import require_head
from pipelines.cluster.ray_private import draining_nodes, free_resources
from pipelines.config.settings import Config, GpuPlacedSettings, PlacedSettings
from pipelines.errors import ClusterUnavailable

_log = logging.getLogger(__name__)

T = TypeVar("T")

LOOK_EVERY_S = 1.0
"""Seconds between two looks at the cluster during a wait for room."""
ACCELERATOR_SHARE = 0.001
"""Amount of the node's resource `accelerator_type:NAME` that a worker reserves, so that Ray picks such a node."""
CHECK_HEAD_EVERY_S = 0.5
"""Seconds between two checks that the head lives, while it is asked for its nodes."""
FREE_COUNT_LAG_S = 3.0
"""Seconds after which Ray's count of free resources has caught up with workers that began or ended."""
HIDDEN_RESOURCES = ("node:", "object_store_memory", "accelerator_type:", "bundle_")
"""Resources of a node that messages leave out."""


@dataclass(frozen=True)
class Need:
    """The resources that one worker reserves on its node, and the labels that the node must have."""

    cpus: float = 1
    gpus: float = 0
    memory: int = 0
    resources: Mapping[str, float] = field(default_factory=dict)
    accelerator: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    strategy: str = "pack"

    def bundle(self) -> dict[str, float]:
        """Return the resources of one worker by Ray's names."""
        wanted = {"CPU": self.cpus, "GPU": self.gpus, "memory": float(self.memory), **self.resources}
        if self.accelerator:
            wanted[f"accelerator_type:{self.accelerator}"] = ACCELERATOR_SHARE
        return {name: amount for name, amount in wanted.items() if amount}

    def options(self) -> dict[str, Any]:
        """Return Ray's options for an actor with this reservation."""
        chosen = {
            "memory": self.memory,
            "resources": dict(self.resources),
            "accelerator_type": self.accelerator,
            "label_selector": dict(self.labels),
            "scheduling_strategy": "SPREAD" if self.strategy == "spread" else None,
        }
        return {"num_cpus": self.cpus, "num_gpus": self.gpus, **{name: one for name, one in chosen.items() if one}}

    def __str__(self) -> str:
        return ", ".join(
            [format_amounts(self.bundle()), *(f"label {name}={value}" for name, value in self.labels.items())]
        )


@dataclass(frozen=True)
class Node:
    """A live node: its resources, total and free, its labels, and whether Ray is about to take it away (`draining`)."""

    id: str
    total: Mapping[str, float]
    free: Mapping[str, float]
    labels: Mapping[str, str] = field(default_factory=dict)
    draining: bool = False

    def places(self, need: Need, free: bool = True) -> int:
        """Return how many workers fit: beside the present work, or on the empty node with `free=False`."""
        labelled = all(label_matches(self.labels.get(name), wanted) for name, wanted in need.labels.items())
        if self.draining or not labelled:
            return 0
        have = self.free if free else self.total
        # 1e-6: free fractions can fall short by rounding, as 0.3 / 0.1 = 2.9999..., and int() would drop a worker.
        return min((int(have.get(name, 0) / amount + 1e-6) for name, amount in need.bundle().items()), default=1)


def label_matches(value: str | None, wanted: str) -> bool:
    """Tell whether a node's label passes a selector of Ray: `v`, `!v`, `in(v, w)` or `!in(v, w)`."""
    refused = wanted.startswith("!")
    condition = wanted.removeprefix("!")
    listed = re.fullmatch(r"in\((.*)\)", condition)
    values = [entry.strip() for entry in listed[1].split(",")] if listed else [condition]
    return (value in values) != refused


def list_live_nodes() -> list[Node]:
    """Return the nodes that are alive. Raises HeadLost if the head of Ray is lost.

    A thread asks the head, since a call to a lost head waits where no interrupt reaches it.
    """
    answer: Future[list[Node]] = Future()

    def ask() -> None:
        try:
            answer.set_result(_ask_head())
        except BaseException as error:  # raised again where it was asked
            answer.set_exception(error)

    threading.Thread(target=ask, name="list_live_nodes", daemon=True).start()
    while not answer.done():
        wait([answer], CHECK_HEAD_EVERY_S)
        require_head()
    return answer.result()


def _ask_head() -> list[Node]:
    import ray

    free, draining = free_resources(), draining_nodes()
    alive = [(node["NodeID"], node) for node in ray.nodes() if node["Alive"]]
    return [
        Node(name, node["Resources"], free.get(name, {}), node.get("Labels", {}), name in draining)
        for name, node in alive
    ]


def count_places(nodes: Iterable[Node], need: Need, free: bool = True) -> int:
    """Return how many workers fit on the nodes together; none fit on a draining node."""
    return sum(node.places(need, free) for node in nodes)


# ------------------------------------------------------------------------------------------------- what a verb asks


def await_need(settings: PlacedSettings, config: Config) -> Need:
    """Wait until the cluster has room for one worker of a verb, and return its reservation.

    A worker takes a GPU if the settings ask for one, or if they say nothing and a node has one; with
    `ray.cpu_fallback` it can run without. Raises ClusterUnavailable after `ray.wait_s` without room.
    """
    return _settle(settings, config, 1, lambda nodes, need: need if count_places(nodes, need) else None)


def await_training_needs(config: Config) -> Need:
    """Wait until the cluster has room for all `train.workers` workers, and return the reservation of each.

    Unless `train.cpus` is set, a worker gets the largest number of CPUs that all workers can have; a worker with a GPU
    gets at most the GPU's share of its node's CPUs. Raises ClusterUnavailable after `ray.wait_s` without room.
    """
    settings = config.train
    patience = time.monotonic() + min(FREE_COUNT_LAG_S, config.ray.wait_s)

    def find(nodes: Sequence[Node], need: Need) -> Need | None:
        if settings.cpus is not None:
            return need if count_places(nodes, need) >= settings.workers else None
        found, best = (widen_need(nodes, settings.workers, need, free) for free in (True, False))
        full = found is not None and best is not None and found.cpus >= best.cpus
        return found if full or time.monotonic() >= patience else None

    return _settle(settings, config, settings.workers, find)


def _settle(
    settings: PlacedSettings, config: Config, workers: int, find: Callable[[Sequence[Node], Need], Need | None]
) -> Need:
    """Decide between GPU and CPU, and wait until `find` finds room.

    If the settings say nothing of a GPU, a worker takes one where a node has one.
    """
    need = Need(
        cpus=1 if settings.cpus is None else settings.cpus,
        memory=int(settings.worker_memory or 0),
        resources=settings.resources,
        labels=settings.labels,
        strategy=settings.strategy,
    )
    if isinstance(settings, GpuPlacedSettings):
        need = replace(need, gpus=1 if settings.gpus is None else settings.gpus, accelerator=settings.accelerator)
        if settings.gpus is None and not settings.accelerator and not count_places(list_live_nodes(), need, free=False):
            need = replace(need, gpus=0)
    try:
        return _wait(lambda nodes: find(nodes, need), workers, need, config)
    except ClusterUnavailable as error:
        if not (need.gpus and config.ray.cpu_fallback):
            raise
        _log.warning("%s; goes on without a GPU, as ray.cpu_fallback is set", error)
        plain = replace(need, gpus=0, accelerator=None)
        return _wait(lambda nodes: find(nodes, plain), workers, plain, config)


def widen_need(nodes: Sequence[Node], workers: int, need: Need, free: bool = True) -> Need | None:
    """Return `need` with the most CPUs that let all `workers` fit on the nodes, or None if they do not fit."""
    shares = {share for node in nodes for share in _shares(node, need)}
    for cpus in sorted(shares, reverse=True):
        candidate = replace(need, cpus=cpus)
        if count_places(nodes, candidate, free) >= workers:
            return candidate
    return None


def _shares(node: Node, need: Need) -> Iterable[int]:
    """Return the numbers of CPUs that a worker may get here: up to all, or with GPUs up to its GPUs' share."""
    cpus, gpus = int(node.total.get("CPU", 0)), node.total.get("GPU", 0)
    if need.gpus:
        cpus = max(1, int(cpus * need.gpus / gpus)) if gpus >= need.gpus else 0
    return range(1, cpus + 1)


def hide_unreserved_gpus() -> None:
    """Hide the node's GPUs from a worker that reserved none: Ray leaves them visible, and torch would take one."""
    import ray

    if not ray.get_runtime_context().get_accelerator_ids().get("GPU"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def share_of_cpus(settings: PlacedSettings) -> float:
    """Return the CPUs of this worker: those that it reserved by the settings, else its GPUs' share of the node's."""
    import ray

    usable = float(allowed_cpus())
    if settings.cpus is not None:
        return min(settings.cpus, usable)
    if not ray.is_initialized():
        return usable
    context = ray.get_runtime_context()
    mine, here = context.get_assigned_resources().get("GPU", 0), context.get_node_id()
    there = next((node["Resources"].get("GPU", 0) for node in ray.nodes() if node["NodeID"] == here), 0)
    return usable * mine / there if 0 < mine < there else usable


# -------------------------------------------------------------------------------------------------------- the wait


def room_on_nodes(workers: int, need: Need) -> list[int]:
    """Wait until all `workers` fit, at most FREE_COUNT_LAG_S; return how many fit on each node with room."""
    deadline = time.monotonic() + FREE_COUNT_LAG_S
    while True:
        rooms = [room for node in list_live_nodes() if (room := node.places(need))]
        if sum(rooms) >= workers or time.monotonic() >= deadline:
            return rooms
        time.sleep(LOOK_EVERY_S)


def _wait(find: Callable[[Sequence[Node]], T | None], workers: int, need: Need, config: Config) -> T:
    """Call `find` with the nodes until it returns a result; ask the autoscaler for the workers meanwhile."""
    deadline = time.monotonic() + config.ray.wait_s
    asked = False
    try:
        while True:
            nodes = list_live_nodes()
            found = find(nodes)
            if found is not None:
                return found
            if time.monotonic() >= deadline:
                raise ClusterUnavailable(explain_shortage(workers, need, nodes, config.ray.wait_s))
            if not asked:
                asked = True
                _ask_autoscaler([need] * workers)
            time.sleep(min(LOOK_EVERY_S, config.ray.wait_s))
    finally:
        if asked:
            _ask_autoscaler([])


def _ask_autoscaler(needs: Sequence[Need]) -> None:
    """Ask the autoscaler for nodes that can hold these workers; an empty list takes the request back.

    A cluster keeps one such request, so this one replaces another job's. Without an autoscaler it has no effect.
    """
    from ray.autoscaler.sdk import request_resources

    selectors = [dict(need.labels) for need in needs]
    request_resources(bundles=[need.bundle() for need in needs], bundle_label_selectors=selectors)


def explain_shortage(workers: int, need: Need, nodes: Sequence[Node], waited_s: float) -> str:
    """Return the message that workers found no room: the request, the nodes, the resources in use, and a remedy."""
    kinds = Counter(format_amounts(node.total) for node in nodes)
    have = "; ".join(f"{count} with {kind}" for kind, count in kinds.most_common())
    taken: Counter[str] = Counter()
    for node in nodes:
        taken.update(node.total)
        taken.subtract(node.free)
    used = {name: amount for name, amount in taken.items() if amount > 1e-6}
    fit = count_places(nodes, need, free=False)
    remedy = "wait for what runs there" if fit >= workers else "ask for fewer or smaller workers, or add nodes"
    return (
        f"no room for {workers} {'worker' if workers == 1 else 'workers'} of {need} after {waited_s:g} s "
        f"(ray.wait_s): the cluster's nodes are {have or 'none'}, in use are {format_amounts(used)}; {remedy}"
    )


def format_amounts(resources: Mapping[str, float]) -> str:
    """Write resources for people, such as `2 CPU, 1 GPU, 3.5 GiB memory`."""
    words = [
        f"{amount / 2**30:.3g} GiB memory" if name == "memory" else f"{amount:g} {name}"
        for name, amount in sorted(resources.items())
        if amount and not name.startswith(HIDDEN_RESOURCES)
    ]
    return ", ".join(words) or "nothing"
