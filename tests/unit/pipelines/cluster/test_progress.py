"""What a stage says of its progress: bars on a terminal, lines elsewhere, the time left, lines of its workers."""

import logging
import re
import time

import pytest

from pipelines.cluster import progress
from pipelines.cluster.progress import Board, Pace, stage

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("COLUMNS", "100"), ("TERM", "xterm"), ("FORCE_COLOR", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(progress, "draws_on_terminal", lambda: True)


def drawn(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line.rstrip() for line in re.split(r"[\r\n]+", ESCAPES.sub("", capsys.readouterr().err)) if line.strip()]


def test_a_bar_says_what_it_works_on_what_is_left_and_what_it_took(
    clock: list[float], terminal: None, capsys: pytest.CaptureFixture[str]
) -> None:
    with stage("ingest: writing train", 60_000, "images") as advance:
        clock[0] += 60
        advance(15_000, "[250] images/s")
        time.sleep(0.3)  # rich draws ten times a second
        clock[0] += 140
        advance(45_000)
    lines = drawn(capsys)
    assert any(
        line.startswith("ingest: writing train ")
        and "15,000/60,000 images" in line
        and line.endswith("about 3 min left  [250] images/s")
        for line in lines
    ), lines
    assert lines[-1].endswith("60,000/60,000 images in 3 min 20 s") and max(map(len, lines)) <= 100


def test_a_long_line_beside_a_bar_is_not_broken_so_that_its_command_can_be_copied(
    terminal: None, capsys: pytest.CaptureFixture[str]
) -> None:
    line = (
        "this takes long: try `hhnet train --recipe auto --set data.image_size=32 --epochs 1` :smile: [b]" + 30 * " x"
    )
    with stage("train", 10, "steps"):
        logging.getLogger("pipelines.train").warning(line)
    assert f"hhnet: {line}" in drawn(capsys)
    logging.getLogger("pipelines.train").warning("after it")
    assert drawn(capsys) == ["hhnet: after it"]


def test_a_long_note_loses_its_last_parts_and_the_count_stays(
    clock: list[float], terminal: None, capsys: pytest.CaptureFixture[str]
) -> None:
    with stage("train", 1824, "steps") as advance:
        clock[0] += 60
        advance(60, "epoch 2/19  mAP 0.233  loss 3.4563  1,234 images/s")
        time.sleep(0.3)  # rich draws ten times a second
        advance(1764)
    assert any(
        re.fullmatch(r"train \S+ 60/1,824 steps about 29 min 24 s left  epoch 2/19  mAP 0\.233", line)
        for line in drawn(capsys)
    )


def test_lines_and_records_tell_the_same(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with stage("encode: train", 4000, "images") as advance:
        clock[0] += 100
        advance(1000)
    assert capsys.readouterr().err == "encode: train: 1,000/4,000 images in 1 min 40 s, about 5 min left\n"


def test_the_time_left_leaves_out_the_start_and_what_was_done_before(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with stage("train", 1000, "steps", done=500) as advance:
        clock[0] += 40  # the start of workers
        advance(0, "first batch")
        clock[0] += 10
        advance(1)
        clock[0] += 10 * 50
        advance(50)
    assert [line.split("  ")[0] for line in capsys.readouterr().err.splitlines()] == [
        "train: 500/1,000 steps in 40 s",
        "train: 501/1,000 steps in 50 s, about 1 h 23 min left",
        "train: 551/1,000 steps in 9 min 10 s, about 1 h 14 min left",
    ]


def test_the_time_left_forgets_slow_first_steps(clock: list[float]) -> None:
    pace, done, left = Pace(10_000), 0, list[float | None]()
    for seconds, steps in [(10, 1)] * 4 + [(1, 5)] * 1000:
        clock[0] += seconds
        done += steps
        left.append(pace.read(done)[1])
    assert left[0] is None and left[3] == 10 * 9_996
    assert left[-1] == (10_000 - done) / 5
    clock[0] += 3000  # nothing moves for more than half of the time
    after = pace.read(done + 1)[1]
    assert after is not None and after > 50 * (10_000 - done) / 5


def test_the_time_left_is_steady_where_the_work_is_done_in_bursts(clock: list[float]) -> None:
    pace = Pace(1000)
    for second in range(400):
        clock[0] += 1
        left = pace.read(second // 10 * 10)[1]
        assert second < 40 or left == pytest.approx(1000 - second, rel=0.5)


def test_a_board_gives_each_line_once() -> None:
    board = Board()
    board.post(3, "note")
    board.tell("one", {"epoch": 1})
    assert board.read(0) == (3, "note", [("one", {"epoch": 1})])
    board.tell("two", {})
    assert board.read(1) == (3, "note", [("two", {})])
