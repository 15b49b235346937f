"""The contract of a store, which a folder, a bucket and the dictionary of the unit tests keep alike."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.errors import CommitConflict
from pipelines.storage import Store
from tests.support.memory import MemoryStore
from tests.support.seaweed import Seaweed, seaweed


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seaweed]:
    with seaweed(tmp_path_factory.mktemp("weed")) as running, running.environment():
        yield running


@pytest.fixture(params=["folder", "bucket", "dictionary"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "dictionary":
        return MemoryStore()
    if request.param == "folder":
        return Store(tmp_path / "store")
    server: Seaweed = request.getfixturevalue("server")
    return Store(server.uri("".join(c if c.isalnum() else "-" for c in request.node.name)))


def test_put_is_absent_or_nothing(store: Store) -> None:
    assert store.size("a/b.bin") is None
    assert store.names("a") == []
    assert store.put("a/b.bin", b"first")
    assert not store.put("a/b.bin", b"second")
    assert store.read("a/b.bin") == b"first"
    assert store.size("a/b.bin") == 5
    assert store.names("a") == ["a/b.bin"]
    store.put_same("a/b.bin", b"first")
    with pytest.raises(CommitConflict, match="nothing was overwritten"):
        store.put_same("a/b.bin", b"second")
    assert store.read("a/b.bin") == b"first"


def test_what_was_deleted_is_not_there(store: Store) -> None:
    store.put("a/b.bin", b"first")
    store.delete("a/b.bin")
    store.delete("a/b.bin")
    assert store.size("a/b.bin") is None
    for ask in (store.read, store.open):
        with pytest.raises(FileNotFoundError):
            ask("a/b.bin")


def test_files_are_put_and_streamed(store: Store, tmp_path: Path) -> None:
    data = bytes(range(256)) * 40_000  # 10 MB
    (tmp_path / "x").write_bytes(data)
    assert store.put("x.bin", tmp_path / "x")
    (tmp_path / "x").write_bytes(b"other")
    assert not store.put("x.bin", tmp_path / "x")
    with store.open("x.bin") as stream:
        assert stream.read(10) == data[:10]
        stream.seek(5_000_000)
        assert stream.read(1000) == data[5_000_000:5_001_000]
    assert store.read("x.bin") == data


def test_a_stream_begins_where_it_is_asked_to_and_ends_with_the_object(store: Store) -> None:
    store.put("x", b"0123456789")
    store.put("empty", b"")
    for name, start, whole in (
        ("x", 0, b"0123456789"),
        ("x", 7, b"789"),
        ("x", 10, b""),
        ("x", 99, b""),
        ("empty", 0, b""),
    ):
        with store.open(name, block=4, start=start) as stream:
            assert b"".join(iter(lambda stream=stream: stream.read(3), b"")) == whole, (name, start)
            stream.seek(1)
            assert stream.read(100) == (b"123456789" if name == "x" else b"")


@pytest.mark.parametrize("store", ["folder", "bucket"], indirect=True)
def test_of_racing_writers_one_wins_and_no_bytes_mix(store: Store) -> None:
    for round_ in range(10):
        barrier = threading.Barrier(4)
        won: list[int] = []

        def write(number: int, name: str, barrier: threading.Barrier, won: list[int]) -> None:
            barrier.wait()
            if store.put(name, bytes([number]) * 100_000):
                won.append(number)

        threads = [threading.Thread(target=write, args=(n, f"r/{round_}", barrier, won)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
        assert store.read(f"r/{round_}") == bytes(won) * 100_000
    assert store.names("r") == [f"r/{round_}" for round_ in range(10)]


def test_listing_says_sizes_and_folders(store: Store) -> None:
    before = time.time() - 2
    for name in ("one.json", "runs/b/begin.json", "runs/a/begin.json", "runs/a/end.json", "runs/old.json", "parts/x"):
        store.put(name, b"{}")
    assert {name: entry.size for name, entry in store.entries("runs/a").items()} == {
        "runs/a/begin.json": 2,
        "runs/a/end.json": 2,
    }
    if not isinstance(store, MemoryStore):
        assert all(before < entry.modified < time.time() + 2 for entry in store.entries().values())
    assert store.folders() == ["parts", "runs"]
    assert store.folders("runs") == ["a", "b"]
    assert store.folders("nothing") == []
    assert store.read("one.json", limit=0) == b"{"
