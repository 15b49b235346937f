"""How many workers fit on which nodes, how many CPUs a training worker gets, and what is said where none fits."""

import pytest

from pipelines.cluster.placement import (
    Need,
    Node,
    count_places,
    explain_shortage,
    format_amounts,
    label_matches,
    share_of_cpus,
    widen_need,
)
from pipelines.config.loading import load_config


def node(cpus: float, gpus: float = 0, free: float | None = None, **more: object) -> Node:
    """A node of so many CPUs, of which `free` are free."""
    total = {"CPU": cpus, "GPU": gpus, "memory": 2.0**30}
    return Node("n", total, {**total, "CPU": cpus if free is None else free}, **more)  # type: ignore[arg-type]


def test_a_worker_fits_on_one_node_or_not_at_all() -> None:
    nodes = [node(1), node(2), node(2)]
    assert [count_places(nodes, Need(cpus=cpus)) for cpus in (0.5, 1, 2, 3, 5)] == [10, 5, 2, 0, 0]
    assert count_places([node(8, gpus=2)], Need(cpus=1, gpus=0.25)) == 8
    assert count_places([node(8, gpus=2)], Need(cpus=3, gpus=1)) == 2
    assert count_places([node(8)], Need(memory=2**29)) == 2
    assert count_places([node(8)], Need(resources={"disk": 1})) == 0
    assert count_places([node(8)], Need(accelerator="A100")) == 0


def test_what_others_use_and_what_is_taken_away_does_not_count() -> None:
    assert count_places([node(4, free=1)], Need()) == 1
    assert count_places([node(4, free=1)], Need(), free=False) == 4
    assert count_places([node(4, draining=True)], Need()) == 0


@pytest.mark.parametrize(
    ("value", "wanted", "passes"),
    [
        ("spot", "spot", True),
        ("spot", "!spot", False),
        (None, "!spot", True),
        (None, "spot", False),
        ("a", "in(a, b)", True),
        ("c", "in(a, b)", False),
        ("c", "!in(a,b)", True),
    ],
)
def test_labels_are_matched_as_ray_does(value: str | None, wanted: str, passes: bool) -> None:
    assert label_matches(value, wanted) is passes
    assert count_places([node(1, labels={"x": value} if value else {})], Need(labels={"x": wanted})) == passes


@pytest.mark.parametrize(
    ("nodes", "workers", "cpus"),
    [
        ([1, 2, 2], 1, 2),
        ([1, 2, 2], 2, 2),
        ([1, 2, 2], 3, 1),
        ([1, 2, 2], 5, 1),
        ([1, 2, 2], 6, None),
        ([0, 8], 1, 8),
        ([16, 4, 4], 2, 8),
        ([16, 4, 4], 5, 4),
    ],
)
def test_training_workers_get_the_most_cpus_that_all_of_them_can_have(
    nodes: list[int], workers: int, cpus: int | None
) -> None:
    found = widen_need([node(count) for count in nodes], workers, Need())
    assert (found and found.cpus) == cpus


def test_beside_a_gpu_a_worker_gets_its_share_of_the_node() -> None:
    head, big, small = node(16), node(64, gpus=8), node(8, gpus=1)
    on_gpu = Need(gpus=1)
    found = [widen_need([head, big, small], workers, on_gpu) for workers in (1, 8, 9)]
    assert [need and need.cpus for need in found] == [8, 8, 8]
    assert widen_need([head], 1, on_gpu) is None
    assert widen_need([head, big], 4, Need(gpus=2)) == Need(gpus=2, cpus=16)


def test_a_shortage_says_what_was_asked_what_there_is_what_is_in_use_and_what_to_do() -> None:
    nodes = [node(2, gpus=1, free=0.5), node(2, gpus=1), node(4)]
    assert explain_shortage(3, Need(cpus=2, gpus=1, labels={"zone": "a"}), nodes, 60) == (
        "no room for 3 workers of 2 CPU, 1 GPU, label zone=a after 60 s (ray.wait_s): the cluster's nodes are 2 with "
        "2 CPU, 1 GPU, 1 GiB memory; 1 with 4 CPU, 1 GiB memory, in use are 1.5 CPU; ask for fewer or smaller workers, "
        "or add nodes"
    )
    assert explain_shortage(1, Need(cpus=2), [node(2, free=0)], 5).endswith(
        "in use are 2 CPU; wait for what runs there"
    )
    assert format_amounts({}) == "nothing"


@pytest.mark.parametrize(
    ("mine", "there", "sets", "share"),
    [(1, 4, [], 4.0), (0.5, 2, [], 4.0), (1, 1, [], 16.0), (0, 0, [], 16.0), (1, 4, ["encode.cpus=6"], 6.0)],
)
def test_a_worker_has_its_gpus_share_of_the_cpus_that_it_may_use(
    mine: float, there: float, sets: list[str], share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The node says 64 CPUs; its control groups allow 16."""
    import ray

    class Context:
        def get_assigned_resources(self) -> dict[str, float]:
            return {"CPU": 1, "GPU": mine}

        def get_node_id(self) -> str:
            return "here"

    nodes = [{"NodeID": name, "Resources": {"CPU": 64, "GPU": gpus}} for name, gpus in (("far", 8), ("here", there))]
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "get_runtime_context", Context)
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr("pipelines.cluster.placement.allowed_cpus", lambda: 16)
    assert share_of_cpus(load_config(sets=sets).encode) == share
