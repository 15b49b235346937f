"""The stores of Google and Azure, against servers of their kind: put-if-absent is proven here, or not offered."""

import os
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from pipelines.config.loading import load_config
from pipelines.errors import CommitConflict, CommitUnknown, ConfigError, HHNetError, StoreRefused, StoreUnavailable
from pipelines.ingest.ingest import ingest
from pipelines.shards.shards import open_shards
from pipelines.storage import Store, clouds
from pipelines.verify.verify import verify
from tests.support import pictures
from tests.support.clouds import BUCKET, azure, forget_clients, google
from tests.support.faults import Fault, FaultProxy
from tests.support.rig import on

WRITERS = 4
SERVERS = {"gs": google, "az": azure}


@pytest.fixture(scope="module", params=SERVERS)
def scheme(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with ExitStack() as running:
        running.enter_context(SERVERS[request.param](tmp_path_factory.mktemp(request.param)))
        yield request.param


@pytest.fixture
def store(scheme: str, request: pytest.FixtureRequest) -> Store:
    return Store(f"{scheme}://{BUCKET}/" + "".join(c if c.isalnum() else "-" for c in request.node.name))


def race(store: Store, name: str, put: Callable[[int], bool]) -> list[int]:
    """Let all writers put an object at once; who of them made it."""
    barrier = threading.Barrier(WRITERS)

    def write(number: int) -> bool:
        barrier.wait()
        return put(number)

    with ThreadPoolExecutor(WRITERS) as pool:
        return [number for number, won in enumerate(pool.map(write, range(WRITERS))) if won]


def test_of_racing_writers_exactly_one_wins(store: Store) -> None:
    for round_ in range(10):
        name = f"r/{round_}"
        won = race(store, name, lambda number, name=name: store.put(name, bytes([number]) * 100_000))
        assert len(won) == 1
        assert store.read(name) == bytes(won) * 100_000
    assert store.names("r") == [f"r/{round_}" for round_ in range(10)]


def test_of_writers_of_the_same_bytes_one_wins_too(store: Store) -> None:
    for round_ in range(5):
        assert len(race(store, "", lambda _, round_=round_: store.put(f"r/{round_}", b"the same"))) == 1


def test_a_large_file_has_one_winner_and_its_bytes(store: Store, tmp_path: Path) -> None:
    """Larger than what Azure takes in one request: blocks, and one request that commits them."""
    files = [tmp_path / str(number) for number in range(WRITERS)]
    for number, file in enumerate(files):
        with file.open("wb") as stream:
            stream.write(bytes([number]))
            stream.truncate(70 << 20)
    (won,) = race(store, "large", lambda number: store.put("large", files[number]))
    assert store.size("large") == 70 << 20
    with store.open("large") as stream:
        assert stream.read(10) == bytes([won]) + bytes(9)
        stream.seek((70 << 20) - 5)
        assert stream.read(10) == bytes(5)


def test_a_put_that_overwrites_is_found_out(store: Store, scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test of the tests: with the library's plain put, more than one writer wins."""
    plain = replace(clouds.CLOUDS[scheme], create=lambda fs, path, data, writer: fs.pipe_file(path, data))
    monkeypatch.setitem(clouds.CLOUDS, scheme, plain)
    careless = Store(store.uri)
    assert len(race(careless, "x", lambda number: careless.put("x", bytes([number])))) == WRITERS


@pytest.fixture
def proxy(store: Store, scheme: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """A proxy that does harm, between the library and the server."""
    variable = {"gs": "STORAGE_EMULATOR_HOST", "az": "AZURE_STORAGE_CONNECTION_STRING"}[scheme]
    address = re.search(r"http://127\.0\.0\.1:\d+", os.environ[variable])
    assert address
    with FaultProxy(address[0]) as harm:
        monkeypatch.setenv(variable, os.environ[variable].replace(address[0], harm.endpoint))
        forget_clients()
        yield harm
    forget_clients()


@pytest.mark.parametrize(
    "fault", [Fault.SLOW_DOWN, Fault.ERROR, Fault.DROPPED, Fault.LOST, Fault.LOST_RESET], ids=lambda fault: fault.name
)
def test_a_put_that_fails_on_the_way_is_made_once_and_known_as_ones_own(
    store: Store, scheme: str, proxy: FaultProxy, fault: Fault
) -> None:
    write = {"gs": "POST", "az": "PUT"}[scheme]
    proxy.choose = on(write, fault)
    through = Store(store.uri)
    made = through.put("x", b"mine")
    assert made or (scheme, fault) == ("az", Fault.LOST_RESET)  # a PUT the connection pool repeats by itself, unseen
    through.put_same("x", b"mine")
    assert proxy.done == {fault.name: 1}
    proxy.choose = on(write, fault)
    assert not through.put("x", b"other")
    assert through.read("x") == b"mine"


def test_the_contract_of_a_store(store: Store, tmp_path: Path) -> None:
    assert store.size("a/b.bin") is None and store.names("a") == [] and store.folders() == []
    assert store.put("a/b.bin", b"0123456789") and not store.put("a/b.bin", b"other")
    store.put_same("a/b.bin", b"0123456789")
    with pytest.raises(CommitConflict, match="nothing was overwritten"):
        store.put_same("a/b.bin", b"second")
    assert (store.size("a/b.bin"), store.read("a/b.bin"), store.read("a/b.bin", limit=3)) == (
        10,
        b"0123456789",
        b"0123",
    )
    assert store.put("empty", b"") and store.read("empty") == b""
    assert store.size("a") is None
    for name, start, whole in (("a/b.bin", 0, b"0123456789"), ("a/b.bin", 7, b"789"), ("a/b.bin", 99, b"")):
        with store.open(name, block=5, start=start) as stream:
            assert b"".join(iter(lambda stream=stream: stream.read(3), b"")) == whole
    data = bytes(range(256)) * 70_000  # 17 MiB, in blocks of 8
    (tmp_path / "x").write_bytes(data)
    assert store.put("c/d/x", tmp_path / "x") and store.read("c/d/x") == data
    assert store.folders() == ["a", "c"] and store.names("") == ["a/b.bin", "c/d/x", "empty"]
    assert {name: found.size for name, found in store.entries("a").items()} == {"a/b.bin": 10}
    assert all(found.modified > 1e9 for found in store.entries().values())
    store.delete("a/b.bin")
    store.delete("a/b.bin")
    for ask in (store.read, store.open):
        with pytest.raises(FileNotFoundError):
            ask("a/b.bin")
    store.discard("c")
    assert store.names("") == ["empty"] and store.uploads() == {}


def test_an_answer_longer_than_asked_for_is_refused(store: Store, scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put("x", bytes(100))
    careless = replace(clouds.CLOUDS[scheme], open=lambda bucket: Unbounded())
    monkeypatch.setitem(clouds.CLOUDS, scheme, careless)
    with pytest.raises(StoreRefused, match="more than it is asked for"):
        Store(store.uri).read("x", limit=10)


class Unbounded:
    """A file system whose server knows no ranges."""

    def cat_file(self, path: str, start: int, end: int) -> bytes:
        return bytes(100)


def test_a_bucket_that_is_not_there(scheme: str) -> None:
    store = Store(f"{scheme}://no-such-bucket/x")
    assert store.names("") == [] and store.size("x") is None
    with pytest.raises(StoreRefused, match="no such bucket"):
        store.put("x", b"data")


def test_ingest_writes_the_same_bytes_as_on_a_disk(store: Store, tmp_path: Path) -> None:
    pictures.write_folder(tmp_path / "images")
    config = load_config(sets=["ingest.samples_per_shard=10"])
    local = ingest(str(tmp_path / "images"), str(tmp_path / "out"), config)
    remote = ingest(str(tmp_path / "images"), store.uri, config)
    assert (remote.status, remote.digest) == ("done", local.digest)
    assert ingest(str(tmp_path / "images"), store.uri, config).status == "unchanged"
    here, there = open_shards(local.uri), open_shards(remote.uri)
    for mine, theirs in zip(here.shards, there.shards, strict=True):
        assert list(here.read(mine)) == list(there.read(theirs))
    assert verify(remote.uri).orphans == []


def test_a_server_that_is_gone_is_store_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gcsfs")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:9")
    monkeypatch.setenv("HHNET_STORE_DEADLINE_S", "1")
    clouds.CLOUDS["gs"].open("bucket").clear_instance_cache()
    with pytest.raises(StoreUnavailable, match="cannot stat gs://bucket/x/a within 1 s"):
        Store("gs://bucket/x").size("a")


ACCOUNT = "DefaultEndpointsProtocol=http;AccountName=a;BlobEndpoint=http://127.0.0.1:9/a;AccountKey="


@pytest.mark.parametrize(
    ("given", "kind", "code", "said"),
    [
        ("geheim", ConfigError, 2, "az://bucket cannot be opened"),
        (f"{ACCOUNT}geheim", StoreRefused, 3, "cannot write az://bucket/x/a: AzureSigningError.*check the keys"),
        (f"{ACCOUNT}Z2VoZWlt", StoreUnavailable, 3, "cannot write az://bucket/x/a within 1 s"),
    ],
)
def test_keys_and_addresses_that_are_wrong(
    given: str, kind: type[HHNetError], code: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    adlfs = pytest.importorskip("adlfs")
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", given)
    monkeypatch.setenv("HHNET_STORE_DEADLINE_S", "1")
    adlfs.AzureBlobFileSystem.clear_instance_cache()
    with pytest.raises(kind, match=said) as caught:
        Store("az://bucket/x").put("a", b"data")
    assert caught.value.exit_code == code and not isinstance(caught.value, CommitUnknown)
    assert given[-6:] not in str(caught.value)
    adlfs.AzureBlobFileSystem.clear_instance_cache()
