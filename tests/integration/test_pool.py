"""The pool on a real Ray: a death or a standstill costs an attempt of the item it happened to, and no item."""

import json
import os
import re
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from pipelines.cluster import pool
from pipelines.cluster.attempts import AttemptFailed, End, Outcome
from pipelines.cluster.placement import Need
from pipelines.console import show_log
from pipelines.errors import ClusterUnavailable, WorkFailed


def by_item(outcomes: object) -> dict[int, Outcome[int]]:
    return {outcome.item: outcome for outcome in outcomes}  # type: ignore[attr-defined]


def map_items(worker: Any, arguments: Any, items: Any, **options: Any) -> Iterator[Outcome[Any]]:
    """The pool with what these tests do not care about."""
    return pool.map_items(worker, arguments, items, **{"verb": "test", "need": Need(), "wait_s": 60.0, **options})


class First:
    """A worker that meets its fate on an item the first time any worker sees it, or always if `always` has it."""

    progress = 0

    def __init__(self, folder: str, fates: dict[int, str], always: tuple[int, ...] = ()) -> None:
        self.folder, self.fates, self.always = Path(folder), fates, always

    def run(self, item: int) -> int:
        mark = self.folder / str(item)
        if item in self.fates and (item in self.always or not mark.exists()):
            mark.touch()
            getattr(self, self.fates[item])()
        return item * item

    def dies(self) -> None:
        os._exit(1)

    def sleeps(self) -> None:
        time.sleep(600)

    def holds_the_interpreter(self) -> None:
        """Never lets another thread of the process run, as a decoder's endless loop would."""
        re.match(r"(a+)+$", "a" * 60 + "b")

    def is_slow(self) -> None:
        for _ in range(12):
            time.sleep(0.5)
            self.progress += 1


class SeesGpus:
    def run(self, item: int) -> str | None:
        return os.environ.get("CUDA_VISIBLE_DEVICES")


def test_a_worker_without_a_gpu_of_its_own_sees_none(local_ray: None) -> None:
    """Else torch would put each such worker on the node's first GPU."""
    assert by_item(map_items(SeesGpus, (), [1], workers=1))[1].result == ""


def test_a_worker_that_dies_costs_an_attempt_and_no_item(
    tmp_path: Path, local_ray: None, capsys: pytest.CaptureFixture[str]
) -> None:
    show_log("info", as_json=True)
    fates = {2: "dies", 3: "dies"}
    found = by_item(map_items(First, (str(tmp_path), fates, (3,)), [1, 2, 3, 4], workers=2, max_attempts=2))
    show_log()
    logged = [json.loads(line) for line in capsys.readouterr().err.splitlines() if line.startswith('{"time"')]
    ended = sorted((line["shard"], line["worker"]) for line in logged if line.get("end") == "died")
    tries = {item: [f"{a.host}:{a.pid}" for a in found[item].tries if a.end == "died"] for item in fates}
    assert ended == sorted((str(item), worker) for item, workers in tries.items() for worker in workers)
    assert [(line["shard"], line["attempts"]) for line in logged if "given up" in line["message"]] == [("3", 2)]
    assert {item: outcome.result for item, outcome in found.items()} == {1: 1, 2: 4, 3: None, 4: 16}
    assert {item: outcome.attempts for item, outcome in found.items()} == {1: 1, 2: 2, 3: 2, 4: 1}
    assert found[3].error == "3: the worker died, at the last of 2 attempts"
    assert [attempt.end for attempt in found[3].tries] == ["died", "died"]
    assert [attempt.end for attempt in found[2].tries] == ["died", "done"]
    assert all(attempt.began <= attempt.ended and attempt.pid and attempt.host for attempt in found[2].tries)


class Sandboxed(First):
    """A worker that outlives what happens to its items."""

    def dies(self) -> None:
        raise AttemptFailed("a process of the worker died")


def test_a_worker_that_outlives_the_death_of_an_item_goes_on(tmp_path: Path, local_ray: None) -> None:
    fates = {2: "dies", 3: "dies"}
    found = by_item(map_items(Sandboxed, (str(tmp_path), fates, (3,)), [1, 2, 3, 4], workers=1, max_attempts=2))
    assert {item: outcome.result for item, outcome in found.items()} == {1: 1, 2: 4, 3: None, 4: 16}
    assert [attempt.end for attempt in found[3].tries] == ["died", "died"]
    assert found[3].error == "3: the worker died, at the last of 2 attempts"
    assert len({attempt.pid for outcome in found.values() for attempt in outcome.tries}) == 1


class Told:
    """A worker that says what it was told to expect. Item 0 is done only once the items named by `after` are."""

    def __init__(self, folder: str, after: tuple[int, ...]) -> None:
        self.folder, self.after = Path(folder), after
        self.expected: int | None = None

    def expect(self, item: int) -> None:
        self.expected = item

    def run(self, item: int) -> int | None:
        expected, self.expected = self.expected, None
        while item == 0 and not all((self.folder / str(other)).exists() for other in self.after):
            time.sleep(0.01)
        (self.folder / str(item)).touch()
        return expected


def test_a_worker_is_told_the_item_that_follows(tmp_path: Path, local_ray: None) -> None:
    found = by_item(map_items(Told, (str(tmp_path), ()), [5, 6, 7], workers=1))
    assert {item: outcome.result for item, outcome in found.items()} == {5: 6, 6: 7, 7: None}


def test_an_expected_item_goes_to_an_idle_worker(tmp_path: Path, local_ray: None) -> None:
    """The worker with item 0 ends only after all others are done, the one that it expects among them."""
    found = by_item(map_items(Told, (str(tmp_path), (1, 2, 3, 4)), [0, 1, 2, 3, 4], workers=2))
    assert found[0].result is not None and found.keys() == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("fate", ["sleeps", "holds_the_interpreter"])
def test_an_item_without_progress_is_taken_away_and_given_to_another(
    fate: str, tmp_path: Path, local_ray: None
) -> None:
    pool_of = map_items(First, (str(tmp_path), {2: fate}), [1, 2, 3], workers=2, max_attempts=2, stuck_s=3)
    found = by_item(pool_of)
    assert {item: outcome.result for item, outcome in found.items()} == {1: 1, 2: 4, 3: 9}
    assert {item: outcome.attempts for item, outcome in found.items()} == {1: 1, 2: 2, 3: 1}


def test_an_item_that_always_stands_still_is_given_up(tmp_path: Path, local_ray: None) -> None:
    arguments = (str(tmp_path), {2: "sleeps"}, (2,))
    found = by_item(map_items(First, arguments, [1, 2, 3], workers=1, max_attempts=2, stuck_s=2))
    assert (found[2].result, found[2].attempts, found[2].end) == (None, 2, End.STUCK)
    assert found[2].error == "2: no progress for 2 s, at the last of 2 attempts"
    assert (found[1].result, found[3].result) == (1, 9)


def test_slow_work_that_moves_is_left_alone(tmp_path: Path, local_ray: None) -> None:
    pool_of = map_items(First, (str(tmp_path), {2: "is_slow"}), [2], workers=1, max_attempts=1, stuck_s=3)
    assert by_item(pool_of)[2].result == 4


def test_busy_neighbours_do_not_hide_a_standstill(tmp_path: Path, local_ray: None) -> None:
    items = [2, *range(10, 40)]
    fates = {2: "sleeps"} | dict.fromkeys(items[1:], "naps")

    class Busy(First):
        def naps(self) -> None:
            time.sleep(0.3)

    found = by_item(map_items(Busy, (str(tmp_path), fates), items, workers=2, max_attempts=1, stuck_s=2))
    assert found[2].end is End.STUCK
    order = list(found)
    assert order.index(2) < len(order) - 1, "it was only taken away when there was nothing else to do"


class Silent:
    """A worker without a number to tell its progress by, which stops itself at its first item."""

    def __init__(self, folder: str) -> None:
        self.mark = Path(folder) / "stopped"

    def run(self, item: int) -> int:
        time.sleep(4)  # longer than it may be silent, but it answers meanwhile
        if not self.mark.exists():
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(60)  # another thread may take the signal first, and this one would return
        return item


def test_a_worker_without_progress_must_answer(tmp_path: Path, local_ray: None) -> None:
    (outcome,) = map_items(Silent, (str(tmp_path),), [7], workers=1, max_attempts=3, stuck_s=3)
    assert (outcome.result, [attempt.end for attempt in outcome.tries]) == (7, ["stuck", "done"])


class NeverBuilt:
    """A worker whose construction does not end."""

    progress = 0

    def __init__(self) -> None:
        time.sleep(600)

    def run(self, item: int) -> int:
        return item


def test_workers_that_are_never_built_end_the_run_and_reject_nothing(local_ray: None) -> None:
    with pytest.raises(WorkFailed, match="test: 1 workers in a row were not built within 2 s"):
        list(map_items(NeverBuilt, (), [1], workers=1, max_attempts=1, stuck_s=1, build_s=2.0))


def test_more_workers_than_find_room_are_done_without(tmp_path: Path, local_ray: None) -> None:
    found = by_item(map_items(First, (str(tmp_path), {}), list(range(9)), workers=3, need=Need(cpus=2)))
    assert sorted(found) == list(range(9))


def test_without_room_for_any_worker_the_run_ends_and_says_what_there_is(tmp_path: Path, local_ray: None) -> None:
    with pytest.raises(ClusterUnavailable, match=r"no room for 1 worker of 99 CPU after 1 s .*nodes are 1 with 2 CPU"):
        list(map_items(First, (str(tmp_path), {}), [1], workers=1, need=Need(cpus=99), wait_s=1))


def test_a_worker_that_dies_between_items_costs_them_nothing(tmp_path: Path, local_ray: None) -> None:
    """Two idle workers die; the item that another worker held once has its attempts left."""
    marks = tmp_path / "marks"
    marks.mkdir()

    class Idle(First):
        def waits(self) -> None:
            for path in marks.iterdir():  # those who had nothing to do while this worked
                with suppress(ProcessLookupError):
                    os.kill(int(path.name), signal.SIGKILL)
            os._exit(1)

        def run(self, item: int) -> int:
            if item:
                (marks / str(os.getpid())).touch()
            else:
                time.sleep(2)
            return super().run(item)

    found = by_item(map_items(Idle, (str(tmp_path), {0: "waits"}), [0, 1], workers=2, max_attempts=2))
    assert found[0].result == 0 and found[0].attempts == 2
