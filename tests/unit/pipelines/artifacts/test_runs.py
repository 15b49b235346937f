"""Run records: what they hold, how they end, and how a run that died is told from one that works."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipelines.artifacts import runs
from pipelines.artifacts.runs import RunLog, closed_records, read_runs, write_run_record
from pipelines.config.loading import load_config
from pipelines.config.settings import Config
from pipelines.errors import StoreUnavailable, WorkFailed
from pipelines.storage import Store
from tests.support.memory import MemoryObjects, MemoryStore


@dataclass(frozen=True)
class Tried:
    """An attempt as a pool has it."""

    began: float
    ended: float
    host: str
    end: str


def test_a_record_is_begun_with_what_one_wants_to_know_and_closed(tmp_path: Path) -> None:
    store, config = Store(tmp_path), load_config(sets=["train.epochs=3"])
    before = time.time()
    with RunLog(store, "encode", config, total=20, done=5, unit="images", fingerprint="f" * 64) as log:
        (running,) = read_runs(store)
        assert (running.state(), running.end) == ("working", None)
        assert running.begin["settings"]["train"]["epochs"] == 3
        assert running.begin["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
        assert {"hhnet", "ray", "torch"} <= running.begin["versions"].keys()
        assert (running.begin["host"], running.begin["process"]["pid"]) == (socket.gethostname(), os.getpid())
        assert before <= running.begin["began"] <= time.time()
        log.record_attempts("a.tar", [Tried(1.0, 2.0, "n1", "died"), Tried(2.0, 4.0, "n2", "done")], {"samples": 10})
        log.advance(10)
        log.record_figures(images=10)
    (run,) = read_runs(store)
    assert run.end is not None
    assert (run.state(), run.end["done"], run.end["total"], run.end["images"]) == ("done", 15, 20, 10)
    first, last = run.attempts
    assert (first["item"], first["end"], first["host"], "samples" in first) == ("a.tar", "died", "n1", False)
    assert (last["end"], last["began"], last["ended"], last["samples"]) == ("done", 2.0, 4.0, 10)
    assert [record["fingerprint"] for record in closed_records(store)] == ["f" * 64]


def test_names_sort_by_time(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for number in range(5):
        write_run_record(store, "work", {"number": number})
    assert [record["number"] for record in closed_records(store)] == list(range(5))
    assert [run.end["number"] for run in read_runs(store, last=3) if run.end] == [2, 3, 4]


@pytest.mark.parametrize(("error", "end"), [(WorkFailed("no more"), "failed"), (KeyboardInterrupt(), "interrupted")])
def test_a_run_that_does_not_finish_says_how_it_ended(error: BaseException, end: str, tmp_path: Path) -> None:
    with pytest.raises(type(error)), RunLog(Store(tmp_path), "work"):
        raise error
    (run,) = read_runs(Store(tmp_path))
    assert run.end is not None
    assert (run.state(), run.end["error"]) == (end, str(error))


class QuickLog(RunLog):
    progress_every_s = 0.1
    heartbeat_s = 1.1


def test_a_run_that_works_shows_signs_of_life_and_few_of_them(tmp_path: Path) -> None:
    """A hundred items in a row are few objects; every attempt is in one of them, once."""
    store = Store(tmp_path)
    with QuickLog(store, "work", total=100) as log:
        for number in range(100):
            log.record_attempts(f"{number}", [], {})
            log.advance(1, f"item {number}")
            time.sleep(0.01)
        wait_for(lambda: len(read_runs(store)[0].attempts) == 100)
        (working,) = read_runs(store)
    (run,) = read_runs(store)
    assert working.state() == "working"
    assert 2 <= len(run.heartbeats) <= 30
    assert (run.heartbeats[-1]["done"], run.heartbeats[-1]["note"]) == (100, "item 99")
    assert sorted(int(one["item"]) for one in run.attempts) == list(range(100))


def test_a_run_that_does_not_move_on_is_known_to_live(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with QuickLog(store, "work", total=100):
        wait_for(lambda: len(read_runs(store)[0].heartbeats) >= 3)
        assert read_runs(store)[0].state() == "working"


class BusyObjects(MemoryObjects):
    """Objects that refuse the first three progress objects."""

    failures = 0

    def put(self, name: str, data: bytes | Path, point: str) -> bool:
        if runs.PROGRESS in name and self.failures < 3:
            self.failures += 1
            raise StoreUnavailable("not now")
        return super().put(name, data, point)


def test_a_store_that_fails_for_a_while_costs_no_attempt_and_no_work() -> None:
    store = MemoryStore(BusyObjects)
    with QuickLog(store, "work", total=1) as log:
        log.record_attempts("a", [], {})
        wait_for(lambda: store.memory.failures == 3 and bool(store.names("runs")[1:]))
    (run,) = read_runs(store)
    assert [one["item"] for one in run.attempts] == ["a"]


def test_a_store_that_is_gone_is_not_waited_for_once_more() -> None:
    store = MemoryStore()
    with pytest.raises(StoreUnavailable), RunLog(store, "work"):
        raise StoreUnavailable("gone")
    assert [name.rpartition("/")[2] for name in store.names("runs")] == ["begin.json"]


# ------------------------------------------------------------------------------------------------------------- died


BEGINS = """
import sys, time
from pipelines.artifacts.runs import RunLog
from pipelines.storage import Store
with RunLog(Store(sys.argv[1]), "work", fingerprint="f" * 64):
    print("begun", flush=True)
    time.sleep(600)
"""


def killed_run(root: Path, number: int = signal.SIGKILL) -> None:
    """A run in a process of its own that is killed while it works."""
    with subprocess.Popen([sys.executable, "-c", BEGINS, str(root)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        (run,) = read_runs(Store(root))
        assert run.state() == "working"
        process.send_signal(number)


def test_a_killed_run_is_known_at_once_and_closed_by_the_next(tmp_path: Path) -> None:
    killed_run(tmp_path)
    (dead,) = read_runs(Store(tmp_path))
    assert (dead.state(), dead.end) == ("died", None)
    with RunLog(Store(tmp_path), "work") as log:
        pass
    dead, alive = read_runs(Store(tmp_path), last=2)
    assert dead.end is not None
    assert (dead.state(), dead.end["closed_by"], dead.end["fingerprint"]) == ("died", log.name, "f" * 64)
    assert alive.state() == "done"


def other_machine(store: Store, name: str) -> None:
    """As if the run had begun on another machine, whose processes are not seen here."""
    path = Path(store.uri, "runs", name, "begin.json")
    begin = json.loads(path.read_bytes())
    begin["process"]["machine"] = "elsewhere"
    path.write_text(json.dumps(begin))


def test_a_run_on_another_machine_is_dead_when_it_was_silent_for_long(tmp_path: Path) -> None:
    store = Store(tmp_path)
    killed_run(tmp_path)
    (run,) = read_runs(store)
    other_machine(store, run.name)
    assert read_runs(store)[0].state() == "working"
    with RunLog(store, "work"):  # it may well be alive: it is left alone
        assert not Path(tmp_path, "runs", run.name, "end.json").exists()
    long_ago = time.time() - runs.DEAD_AFTER_S - 1
    os.utime(tmp_path / "runs" / run.name / "begin.json", (long_ago, long_ago))
    assert read_runs(store, last=2)[0].state() == "died"


def test_a_run_that_was_taken_for_dead_and_moves_on_works(tmp_path: Path) -> None:
    store = Store(tmp_path)
    killed_run(tmp_path)
    with RunLog(store, "work"):
        pass
    dead = read_runs(store, last=2)[0]
    other_machine(store, dead.name)
    past = time.time() - 10
    os.utime(tmp_path / "runs" / dead.name / "end.json", (past, past))
    store.put(f"runs/{dead.name}/progress-000001.json", b'{"at": 1.0, "done": 3, "total": 5, "attempts": []}')
    run = read_runs(store, last=2)[0]
    assert (run.state(), run.last["done"]) == ("working", 3)


# ------------------------------------------------------------------------------------------------------ what is odd


def test_what_is_no_record(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.put("runs/0123456789abcdef0123456789abcdef.json", b'{"images": 7, "images_per_second": 2.5}')
    store.put("runs/broken/end.json", b"{")
    store.put("runs/list/end.json", b"[1]")
    store.put("runs/notes/begin.json", b"{}")
    assert closed_records(store) == []
    assert read_runs(store) == []


def test_no_secret_of_a_url_is_kept(tmp_path: Path) -> None:
    config = Config.model_validate({"ray": {"address": "http://user:hush@host:8265"}})
    write_run_record(Store(tmp_path), "work", {}, config)
    kept = b"".join(path.read_bytes() for path in tmp_path.rglob("*.json"))
    assert b"http://host:8265" in kept
    assert b"hush" not in kept


def wait_for(condition: object) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + 60
    assert callable(condition)
    while not condition():
        assert time.monotonic() < deadline, "it does not come"
        time.sleep(0.02)
