"""The pool on a real Ray: a death or a standstill costs an attempt of the item it happened to, and no item."""

import os
import re
import time
from pathlib import Path

import pytest

from pipelines.cluster import pool
from pipelines.cluster.pool import Outcome, map_items


def by_item(outcomes: object) -> dict[int, Outcome[int]]:
    return {outcome.item: outcome for outcome in outcomes}  # type: ignore[attr-defined]


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


def test_a_worker_that_dies_costs_an_attempt_and_no_item(tmp_path: Path, local_ray: None) -> None:
    fates = {2: "dies", 3: "dies"}
    found = by_item(map_items(First, (str(tmp_path), fates, (3,)), [1, 2, 3, 4], workers=2, max_attempts=2))
    assert {item: outcome.result for item, outcome in found.items()} == {1: 1, 2: 4, 3: None, 4: 16}
    assert {item: outcome.attempts for item, outcome in found.items()} == {1: 1, 2: 2, 3: 2, 4: 1}
    assert (
        found[3].error == "3: the worker died (The actor died unexpectedly before finishing this task.), at the "
        "last of 2 attempts"
    )
    assert not found[3].stuck


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
    assert (found[2].result, found[2].attempts, found[2].stuck) == (None, 2, True)
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
    assert found[2].stuck
    order = list(found)
    assert order.index(2) < len(order) - 1, "it was only taken away when there was nothing else to do"


class NeverBuilt:
    """A worker whose construction does not end."""

    progress = 0

    def __init__(self) -> None:
        time.sleep(600)

    def run(self, item: int) -> int:
        return item


def test_a_worker_that_is_never_built_is_stuck_too(local_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "BUILD_S", 2.0)
    (outcome,) = map_items(NeverBuilt, (), [1], workers=1, max_attempts=1, stuck_s=1)
    assert outcome.stuck
