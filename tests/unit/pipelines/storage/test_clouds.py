"""Stores behind fsspec: what holds for all of their libraries, shown with a small one."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from fsspec.asyn import get_loop, sync

from pipelines.errors import StoreRefused, StoreUnavailable
from pipelines.storage import Store, clouds


class Library:
    """A file system of one object, `bucket/x/whole`, and of others that hang, fail or are found by name."""

    def __init__(self) -> None:
        self.given_up = threading.Event()

    def cat_file(self, path: str, start: int, end: int) -> bytes:
        if path.endswith("hangs"):
            self.given_up.wait(20)
        if path.endswith("lacks"):
            raise Lacking
        if path.endswith("named"):

            async def resolve() -> None:
                await asyncio.get_running_loop().getaddrinfo("localhost", 80)

            sync(get_loop(), resolve)  # as aiohttp does below gcsfs and adlfs, in the loop's own threads
        return b"bytes"[start:end]

    def find(self, path: str, detail: bool) -> dict[str, dict[str, object]]:
        return {f"{path}/undated": {"name": f"{path}/undated", "size": 1, "type": "file", "mtime": None}}


class Lacking(Exception):
    """What a server answers to an operation that it does not have."""

    status_code = 501


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    library = Library()
    monkeypatch.setitem(clouds.CLOUDS, "gs", clouds.Cloud("gs", lambda bucket: library))  # type: ignore[arg-type]
    return library


def test_many_reads_at_a_time_leave_room_for_the_names_of_their_hosts(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HHNET_STORE_DEADLINE_S", "10")
    store = Store("gs://bucket/x")
    with ThreadPoolExecutor(48) as readers:
        assert set(readers.map(store.read, ["named"] * 48)) == {b"bytes"}


def test_a_call_that_was_given_up_holds_up_nobody(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HHNET_STORE_DEADLINE_S", "0.3")
    with pytest.raises(StoreUnavailable, match="no answer in time"):
        Store("gs://bucket/x").read("hangs")
    left = [thread for thread in threading.enumerate() if thread.name == "cloud"]
    assert left and all(thread.daemon for thread in left)
    library.given_up.set()
    monkeypatch.setenv("HHNET_STORE_DEADLINE_S", "10")
    assert Store("gs://bucket/x").read("whole") == b"bytes"


def test_an_operation_that_a_server_lacks_is_not_tried_again(library: Library) -> None:
    with pytest.raises(StoreRefused, match="refuses this request for good"):
        Store("gs://bucket/x").read("lacks")


def test_an_object_without_a_time_is_never_old(library: Library) -> None:
    assert Store("gs://bucket/x").entries()["undated"].modified > 1e12
