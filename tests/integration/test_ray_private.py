"""What is read from Ray's private interfaces, on a real Ray: a new version of Ray that changes it is noticed here."""

import time

import pytest

from pipelines.cluster.placement import list_live_nodes
from pipelines.cluster.ray_private import Head, draining_nodes, find_cluster, free_resources


def test_free_resources_are_what_is_left_of_the_nodes(local_ray: None) -> None:
    import ray

    (node,) = ray.nodes()
    cpus = node["Resources"]["CPU"]

    def free() -> float:
        found = free_resources()
        assert set(found) == {node["NodeID"]}
        return found[node["NodeID"]].get("CPU", 0)

    def hold() -> None:
        time.sleep(60)

    await_value(free, cpus)
    held = ray.remote(num_cpus=1)(hold).remote()
    await_value(free, cpus - 1)
    ray.cancel(held, force=True)


def await_value(ask: object, wanted: float) -> None:
    """Wait until the answer is as wanted: Ray's figures are those of a second or so ago."""
    deadline = time.monotonic() + 60
    while (found := ask()) != wanted:  # type: ignore[operator]
        assert time.monotonic() < deadline, found
        time.sleep(0.2)


def test_no_node_of_a_local_ray_is_being_drained(local_ray: None) -> None:
    """That a drained node is told is shown where nodes are drained, in tests/chaos/test_clusters.py."""
    assert draining_nodes() == {}
    assert [node.draining for node in list_live_nodes()] == [False]


def test_the_head_says_that_this_node_is_not_lost(local_ray: None) -> None:
    """That a lost one is told is shown in tests/chaos/test_clusters.py."""
    assert not Head().has_lost_node(timeout=30)


def test_the_cluster_of_the_environment_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.1.2.3:6379")
    assert find_cluster() == "10.1.2.3:6379"
