"""Fetching from a real server on loopback, which may be slow, endless or hostile."""

import socket
import threading

import pytest

from pipelines.errors import InputError, Unavailable
from pipelines.storage.web import WebLimits, fetch_url
from tests.support.web import body, dripping, endless, redirect, web_server

QUICK = WebLimits(total_s=0.5)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture(scope="module")
def server():
    stop = threading.Event()
    answers = {
        "/cat.jpg": body(b"abc"),
        "/query?size=2": body(b"with a query"),
        "/gzip": body(b"\x1f\x8b not unpacked", **{"Content-Encoding": "gzip"}),
        "/endless": endless,
        "/drip": dripping(stop),
        "/moved": redirect("/cat.jpg"),
        "/loop": redirect("/loop"),
        "/ftp": redirect("ftp://127.0.0.1/cat.jpg"),
        "/file": redirect("file:///etc/passwd"),
        **{f"/hop{n}": redirect(f"/hop{n - 1}" if n > 1 else "/cat.jpg") for n in range(1, 7)},
        **{f"/{status}": body(b"", status) for status in (204, 401, 403, 410, 429, 500, 503, 599)},
    }
    with web_server(answers) as url:
        yield url
        stop.set()


def test_the_bytes_of_a_file_and_no_more_than_the_limit(server):
    assert fetch_url(f"{server}/cat.jpg", 3) == b"abc"
    assert fetch_url(f"{server}/cat.jpg", 2) == b"abc"
    assert fetch_url(f"{server}/cat.jpg", 1) == b"ab"
    assert fetch_url(f"{server}/query?size=2", 99) == b"with a query"
    assert fetch_url(f"{server}/gzip", 99).startswith(b"\x1f\x8b")


def test_an_endless_answer_is_cut_at_the_limit(server):
    assert len(fetch_url(f"{server}/endless", 1_000_000)) == 1_000_001


def test_a_server_that_is_never_silent_and_never_done_is_left(server):
    with pytest.raises(Unavailable, match=r"/drip did not arrive within 0\.5 s: try again, or download it"):
        fetch_url(f"{server}/drip", 1 << 20, QUICK)


def test_a_server_that_never_answers_is_left():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        with pytest.raises(Unavailable, match=r"did not arrive within 0\.5 s"):
            fetch_url(f"http://127.0.0.1:{silent.getsockname()[1]}/x.jpg", 99, QUICK)
        port = silent.getsockname()[1]
    with pytest.raises(Unavailable, match=r"/x\.jpg cannot be fetched: .*: check the address and the network"):
        fetch_url(f"http://127.0.0.1:{port}/x.jpg", 99)


def test_five_redirects_are_followed_and_only_to_web_servers(server):
    assert fetch_url(f"{server}/moved", 99) == fetch_url(f"{server}/hop5", 99) == b"abc"
    for path in ("hop6", "loop"):
        with pytest.raises(InputError, match=f"/{path} redirects more than 5 times: give the address of the file"):
            fetch_url(f"{server}/{path}", 99)
    for path in ("ftp", "file"):
        with pytest.raises(InputError, match=f"/{path} redirects to an address that is not http or https") as caught:
            fetch_url(f"{server}/{path}", 99)
        assert "passwd" not in str(caught.value)


@pytest.mark.parametrize(
    ("status", "error", "words"),
    [
        ("missing", InputError, "404 Not Found: check the address"),
        ("204", InputError, "204 No Content: check the address"),
        ("401", InputError, "401 Unauthorized: check the address, and that it needs no login"),
        ("403", InputError, "403 Forbidden"),
        ("410", InputError, "410 Gone"),
        ("429", Unavailable, "429 Too Many Requests: try again later"),
        ("500", Unavailable, "500 Internal Server Error: try again later"),
        ("503", Unavailable, "503 Service Unavailable: try again later"),
        ("599", Unavailable, "answers 599: try again later"),
    ],
)
def test_a_refusal_says_its_status_in_one_line(server, status, error, words):
    with pytest.raises(error) as caught:
        fetch_url(f"{server}/{status}", 99)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("url", ["http://[::1/x.jpg", "http://127.0.0.1:99999/x.jpg", "http://a..b/x.jpg"])
def test_what_is_no_url(url):
    with pytest.raises(InputError, match="is not a valid URL: write http://host/path"):
        fetch_url(url, 99)
