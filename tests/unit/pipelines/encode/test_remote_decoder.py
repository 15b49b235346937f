"""How many decoders a worker has on other nodes, and on which: rules that need no Ray."""

import pytest

from pipelines.cluster.placement import Node
from pipelines.config.loading import load_config
from pipelines.encode.remote_decoder import count_decoders, decoder_places
from pipelines.errors import ConfigError


def node(
    name: str, cpus: float, gpus: float = 0, free: tuple[float, float] | None = None, drains: bool = False
) -> Node:
    free_cpus, free_gpus = free or (cpus, gpus)
    return Node(name, {"CPU": cpus, "GPU": gpus}, {"CPU": free_cpus, "GPU": free_gpus}, {}, drains)


GPU_NODES = [node("a", 32, 4), node("b", 32, 4)]


@pytest.mark.parametrize(
    ("sets", "gpus", "nodes", "expected"),
    [
        ([], 0, [node("c", 64)], 0),
        ([], 1, GPU_NODES, 0),
        ([], 1, [*GPU_NODES, node("c", 32), node("d", 33)], 4),  # 16 + 16 decoders of 2 CPUs for 8 workers
        ([], 1, [*GPU_NODES, node("c", 6)], 1),  # 3 decoders: who comes first has one
        ([], 1, [node("a", 8, 1), node("c", 640)], 8),  # 16 CPUs are enough
        ([], 0.5, [node("a", 8, 1), node("c", 16)], 4),
        (["encode.workers=2"], 1, [*GPU_NODES, node("c", 16)], 4),
        (["data.workers=32"], 1, [node("a", 8, 1), node("c", 64)], 1),
        (["data.workers=4"], 1, [node("a", 8, 1), node("c", 8)], 2),
        (["encode.decode_processes=0"], 1, [node("a", 8, 1), node("c", 64)], 0),
        (["encode.decoders=0"], 1, [node("a", 8, 1), node("c", 64)], 0),
        (["encode.decoders=5"], 0, [], 5),
    ],
)
def test_a_gpu_has_its_share_of_the_cpus_elsewhere(
    sets: list[str], gpus: float, nodes: list[Node], expected: int
) -> None:
    assert count_decoders(load_config(sets=sets), gpus, nodes) == expected


@pytest.mark.parametrize(
    ("nodes", "cpus", "kept", "expected"),
    [
        ([], 2, 1, []),
        ([node("a", 8, free=(1.5, 0))], 2, 1, []),
        ([node("a", 8, free=(4, 0)), node("b", 8, free=(6, 0))], 2, 0, ["a", "b", "a", "b", "b"]),
        ([node("a", 8, 1, free=(4, 0)), node("b", 2)], 2, 1, ["b", "a", "a"]),
        ([node("a", 8, 4)], 1, 2, []),  # its four GPUs wait for workers of two CPUs
        ([node("a", 8, 4, free=(7, 2))], 1, 2, ["a", "a", "a"]),
        ([node("a", 8, drains=True)], 1, 0, []),
    ],
)
def test_decoders_go_where_no_encoding_worker_could_be(
    nodes: list[Node], cpus: int, kept: float, expected: list[str]
) -> None:
    assert decoder_places(nodes, cpus, kept) == expected


@pytest.mark.parametrize("value", ["-1", "257", "1.5", "some"])
def test_a_number_that_makes_no_sense_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match=r"encode\.decoders.*write a number from 0 to 256, or auto"):
        load_config(sets=[f"encode.decoders={value}"])
