"""An index spread over real Ray actors gives the answers of one process, also when an actor is killed."""

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from pipelines.config.settings import Config, IndexSettings, RaySettings, SearchSettings
from pipelines.errors import ClusterUnavailable, DamagedArtifact, WorkFailed
from pipelines.index.build import build_index
from pipelines.index.reader import open_index
from pipelines.index.update import remove_rows
from pipelines.search.actors import spread_over_actors
from pipelines.search.search import search
from tests.support.codes import random_codes, simple_rows, write_codes
from tests.support.inline import InlinePool

PARTS = 5
SMALL_PARTS = Config(index=IndexSettings(part_codes=1))


@pytest.fixture(scope="module", params=["flat", "ivf", "multihash"])
def index(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Five parts of short codes, which are often at equal distances; some rows of two of them are removed."""
    root = tmp_path_factory.mktemp(request.param)
    contents = {f"x-{n:06d}.tar": simple_rows(f"x/{n}", 40 + n, 16, seed=n, flip=0.3) for n in range(PARTS)}
    config = Config(index=IndexSettings(kind=request.param, workers=1, part_codes=1))
    uri = build_index(
        [write_codes(root / "codes", contents, 16).uri], str(root / "index"), config, pool=InlinePool()
    ).uri
    remove_rows(uri, config, ["x/1/00003", "x/1/00007", "x/4/00000"])
    yield uri


def same(found: Any, expected: Any) -> bool:
    return all(mine.dtype == one.dtype and np.array_equal(mine, one) for mine, one in zip(found, expected, strict=True))


@pytest.mark.parametrize("workers", [1, 2])
def test_actors_and_one_process_give_the_same(index: str, workers: int, local_ray: None) -> None:
    queries = random_codes(9, 16, seed=5)
    with open_index(index) as reader, spread_over_actors(reader, workers, Config()) as nearest:
        for k in (1, 7, 1000):
            assert same(nearest(queries, k), reader.search(queries, k))
        assert same(nearest(queries[:0], 3), reader.search(queries[:0], 3))


def test_the_verb_answers_alike_with_more_workers_than_parts(tmp_path: Path, local_ray: None) -> None:
    contents = {f"x-{n:06d}.tar": simple_rows(f"x/{n}", 30, seed=n) for n in range(2)}
    uri = write_codes(tmp_path / "codes", contents).uri
    built = build_index([uri], str(tmp_path / "index"), SMALL_PARTS).uri
    answers = [
        search(built, Config(search=SearchSettings(k=6, workers=workers)), keys=["x/0/00001"], codes=[uri]).as_json()
        for workers in (None, 9)
    ]
    assert answers[0] == answers[1] and len(answers[0]["results"]) == 61


def actors() -> list[psutil.Process]:
    """The processes of this session's actors that hold a share."""
    return [
        process
        for process in psutil.Process().children(recursive=True)
        if process.status() != psutil.STATUS_ZOMBIE and process.cmdline()[:1] and "SearchActor" in process.cmdline()[0]
    ]


def killed_while_it_searches(nearest: Any, queries: Any, k: int) -> Any:
    """The answer to a batch in the middle of which an actor is killed."""
    nearest(queries, k)
    victim = actors()[0]
    victim.send_signal(signal.SIGSTOP)  # so that it cannot have answered before
    killer = threading.Timer(0.5, os.kill, (victim.pid, signal.SIGKILL))
    killer.start()
    try:
        return nearest(queries, k)
    finally:
        killer.join()


def test_the_share_of_a_killed_actor_is_asked_again(index: str, local_ray: None) -> None:
    queries = random_codes(9, 16, seed=6)
    with open_index(index) as reader, spread_over_actors(reader, 2, Config()) as nearest:
        assert same(killed_while_it_searches(nearest, queries, 20), reader.search(queries, 20))
        left = actors()
        assert left
    assert not psutil.wait_procs(left, timeout=30)[1], "actors outlive the search"


def test_a_share_that_loses_every_actor_ends_the_search(index: str, local_ray: None) -> None:
    with (
        open_index(index) as reader,
        pytest.raises(WorkFailed, match=r"index: the worker that searches \d of its parts died .* last of 1 attempts"),
        spread_over_actors(reader, 2, Config(), attempts=1) as nearest,
    ):
        killed_while_it_searches(nearest, random_codes(3, 16), 5)


def test_the_share_of_a_stopped_actor_is_asked_again(index: str, local_ray: None) -> None:
    queries = random_codes(9, 16, seed=8)
    with (
        open_index(index) as reader,
        spread_over_actors(reader, 2, Config(ray=RaySettings(wait_s=4)), stuck_s=2.0) as nearest,
    ):
        nearest(queries, 20)
        actors()[0].send_signal(signal.SIGSTOP)
        assert same(nearest(queries, 20), reader.search(queries, 20))


def test_a_damaged_part_is_named_by_the_actor_that_has_it(tmp_path: Path, local_ray: None) -> None:
    contents = {f"x-{n:06d}.tar": simple_rows(f"x/{n}", 30, seed=n) for n in range(3)}
    built = build_index([write_codes(tmp_path / "codes", contents).uri], str(tmp_path / "index"), SMALL_PARTS).uri
    part = next(Path(built, "parts").glob("part-000001-*"))
    data = bytearray(part.read_bytes())
    data[-1] ^= 1
    part.write_bytes(data)
    with pytest.raises(DamagedArtifact, match=f"{part.name} does not match the digest"):
        search(built, Config(search=SearchSettings(workers=2)), keys=["x/0/00001"])


def test_fewer_actors_than_parts_give_the_same_answers(index: str, local_ray: None) -> None:
    import ray

    if ray.cluster_resources()["CPU"] >= PARTS:
        pytest.fail("this test needs fewer CPUs than parts")
    queries = random_codes(9, 16, seed=7)
    with open_index(index) as reader, spread_over_actors(reader, PARTS, Config()) as nearest:
        for k in (3, 30):
            assert same(nearest(queries, k), reader.search(queries, k))


def test_an_actor_that_finds_no_room_is_not_waited_for_without_end(index: str, local_ray: None) -> None:
    config = Config(ray=RaySettings(wait_s=0.5), search=SearchSettings(cpus=99))
    with (
        open_index(index) as reader,
        pytest.raises(ClusterUnavailable, match=r"no room for 1 worker of 99 CPU after 0.5 s"),
        spread_over_actors(reader, PARTS, config),
    ):
        pass
