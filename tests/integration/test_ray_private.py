"""What is read from Ray's private interfaces, on a real Ray: a new version of Ray that changes it is noticed here."""

import time

from pipelines.cluster.placement import look
from pipelines.cluster.ray_private import draining_nodes, free_resources


def test_free_resources_are_what_is_left_of_the_nodes(local_ray: None) -> None:
    import ray

    def run_on_one(started: object) -> None:
        ray.get(started)
        time.sleep(60)

    (node,) = ray.nodes()
    free = free_resources()
    assert set(free) == {node["NodeID"]}
    assert free[node["NodeID"]]["CPU"] <= node["Resources"]["CPU"]
    held = ray.remote(num_cpus=1)(run_on_one).remote(ray.put(None))
    deadline = time.monotonic() + 60
    while (left := free_resources()[node["NodeID"]].get("CPU", 0)) > node["Resources"]["CPU"] - 1:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert left >= 0
    ray.cancel(held, force=True)


def test_no_node_of_a_local_ray_is_being_drained(local_ray: None) -> None:
    """That a drained node is told is shown where nodes are drained, in tests/chaos/test_clusters.py."""
    assert draining_nodes() == {}
    assert [node.draining for node in look()] == [False]
