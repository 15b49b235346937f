"""Lists of URLs: what is fetched, from servers that misbehave, and what they may never reach."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.config.loading import load_config
from pipelines.config.settings import Config
from pipelines.errors import Degraded, InputError
from pipelines.ingest.bounds import SourceLimits
from pipelines.ingest.fetch import is_public, retry_after
from pipelines.ingest.ingest import ingest
from pipelines.ingest.samples import sample_key
from pipelines.shards.shards import open_shards
from pipelines.verify.rejects import list_rejects
from tests.support.folders import tree
from tests.support.inline import InlinePool
from tests.support.trees import shot, taken
from tests.support.web import Answer, body, endless, redirect, web_server

HERE = ("ingest.private_hosts=true", "ingest.url_timeout_s=2", "ingest.samples_per_shard=4")


def here(*sets: str) -> Config:
    """Settings that allow servers on loopback."""
    return load_config(sets=[*HERE, *sets])


def listed(folder: Path, urls: list[str], name: str = "list.csv") -> Path:
    """A table of these URLs, of two classes in turn."""
    folder.mkdir(exist_ok=True)
    rows = [f"{url},{'cat' if number % 2 else 'dog'}\n" for number, url in enumerate(urls)]
    (folder / name).write_text("path,label\n" + "".join(rows))
    return folder / name


@contextmanager
def counted(answers: Mapping[str, Answer]) -> Iterator[tuple[str, Counter[str]]]:
    """A server of these answers, and how often each was asked for."""
    asked: Counter[str] = Counter()

    def counting(path: str, answer: Answer) -> Answer:
        def counts(request: BaseHTTPRequestHandler) -> None:
            asked[path] += 1
            answer(request)

        return counts

    with web_server({path: counting(path, answer) for path, answer in answers.items()}) as server:
        yield server, asked


def in_turn(*answers: Answer) -> Answer:
    """One answer after another, the last one again and again."""
    left = list(answers)
    return lambda request: (left.pop(0) if len(left) > 1 else left[0])(request)


def cut(request: BaseHTTPRequestHandler) -> None:
    """Fewer bytes than the answer says it has."""
    body(shot(0), **{"Content-Length": "4000"})(request)
    request.close_connection = True


def slow(request: BaseHTTPRequestHandler) -> None:
    """A picture without an end, a byte every twentieth of a second."""
    request.send_response(200)
    request.end_headers()
    request.wfile.write(shot(0))
    for _ in range(200):
        request.wfile.write(b"\0")
        request.wfile.flush()
        time.sleep(0.05)


PICTURES = {f"/{number}.jpg": body(shot(number)) for number in range(6)}


def test_a_list_of_urls_becomes_shards_and_a_rerun_asks_for_nothing(tmp_path: Path) -> None:
    answers = {**PICTURES, "/moved": redirect("/deep/x.jpg?v=1"), "/deep/x.jpg?v=1": body(shot(9))}
    with counted(answers) as (server, asked):
        table = listed(tmp_path / "t", [f"{server}{path}" for path in (*PICTURES, "/moved")])
        result = taken(table, tmp_path / "out", here())
        assert (result["samples"], result["classes"]) == (7, ["cat", "dog"])
        assert set(asked.values()) == {1}
        shards = open_shards(result["uri"])
        found = {s.record.path: s for shard in shards.shards for s in shards.read(shard)}
        assert found[f"{server}/3.jpg"].image == shot(3) and found[f"{server}/moved"].image == shot(9)
        host = server.removeprefix("http://").replace(".", "%2E")
        moved = found[f"{server}/moved"].record
        assert (moved.key, moved.members[0].name) == (f"{host}/moved", f"{host}/moved.jpg")
        assert ingest(str(table), str(tmp_path / "out"), here()).status == "unchanged"
        assert set(asked.values()) == {1}


def test_a_parquet_list_and_workers_give_the_same_bytes(tmp_path: Path) -> None:
    with web_server(PICTURES) as server:
        urls = [f"{server}{path}" for path in PICTURES]
        table = listed(tmp_path / "t", urls)
        pq.write_table(pa.table({"url": urls, "label": ["dog", "cat"] * 3}), tmp_path / "t/list.parquet")
        taken(table, tmp_path / "a", here())
        pool = InlinePool()
        ingest(str(table), str(tmp_path / "b"), here("ingest.workers=3"), pool=pool)
        assert len(pool.done) == 2
        taken(tmp_path / "t/list.parquet", tmp_path / "c", here(), path_column="url")
    assert tree(tmp_path / "a") == tree(tmp_path / "b") == tree(tmp_path / "c")


def test_each_failure_is_named_with_its_reason_and_whether_it_may_go_away(tmp_path: Path) -> None:
    html, big = b"<!doctype html><title>no</title>", b"\xff\xd8\xff\xe0" + bytes(5000)
    answers: dict[str, Answer] = {
        **{"/0.jpg": body(shot(0)), "/cut.jpg": cut, "/busy.jpg": body(b"", 503), "/slow.jpg": slow},
        **{"/no.jpg": body(b"", 403), "/page.jpg": body(html, kind="text/html"), "/lies.jpg": body(html)},
        **{"/big.jpg": body(big), "/endless.jpg": endless, "/none.jpg": body(b"")},
        **{"/loop.jpg": redirect("/loop.jpg"), "/ftp.jpg": redirect("ftp://example.org/x.jpg")},
        **{"/key.jpg": redirect("http://user:secret@example.org/x.jpg")},
    }
    with counted(answers) as (server, asked):
        urls = [f"{server}{path}" for path in (*answers, "/gone.jpg")]
        urls += [server.replace("//", "//user:secret@") + "/x.jpg", "http:///x.jpg", "s3://bucket", "x.jpg"]
        table = listed(tmp_path / "t", [*urls, "http://127.0.0.1:1/closed.jpg", f"{server}/{'long' * 300}.jpg"])
        limits = SourceLimits(file_bytes=4096)
        result = taken(table, tmp_path / "out", here("ingest.url_attempts=2"), allow_degraded=True, limits=limits)
    found = {file["path"].removeprefix(server): file for file in result["skipped_files"]}
    assert {path: (file["reason"], file.get("retryable")) for path, file in found.items() if "long" not in path} == {
        **dict.fromkeys(("/cut.jpg", "/busy.jpg", "/slow.jpg"), ("unreachable", True)),
        "http://127.0.0.1:1/closed.jpg": ("unreachable", True),
        **{"/no.jpg": ("refused", False), "/gone.jpg": ("missing", False), "/none.jpg": ("empty", False)},
        **dict.fromkeys(("/page.jpg", "/lies.jpg"), ("not_an_image", False)),
        "/endless.jpg": ("not_an_image", False),
        "/big.jpg": ("too_large", False),
        **dict.fromkeys(("/loop.jpg", "/ftp.jpg", "/key.jpg"), ("redirected", False)),
        **{"list.csv": ("unsafe_name", None), "http:///x.jpg": ("unsafe_name", False)},
        **{"s3://bucket": ("unsafe_name", False), "x.jpg": ("unsafe_name", None)},
    }
    assert found[next(path for path in found if "long" in path)]["detail"].endswith("too long a URL")
    assert (found["/busy.jpg"]["detail"], found["/loop.jpg"]["detail"]) == (
        "the server answers 503 Service Unavailable",
        "more than 5 redirects",
    )
    assert "secret" not in str(result)
    assert {path: asked[path] for path in ("/busy.jpg", "/cut.jpg", "/no.jpg", "/page.jpg")} == {
        **{"/busy.jpg": 2, "/cut.jpg": 2},
        **{"/no.jpg": 1, "/page.jpg": 1},
    }
    rejects = list_rejects(result["uri"])
    assert rejects.rejects == result["skipped"] and rejects.rows == result["skipped_files"]


def test_a_busy_server_is_asked_again_when_it_says(tmp_path: Path) -> None:
    times: list[float] = []

    def timed(answer: Answer) -> Answer:
        def noting(request: BaseHTTPRequestHandler) -> None:
            times.append(time.monotonic())
            answer(request)

        return noting

    busy, late = body(b"", 429, **{"Retry-After": "2"}), body(b"", 429, **{"Retry-After": "3600"})
    with counted({"/a.jpg": in_turn(timed(busy), timed(body(shot(1)))), "/late.jpg": late}) as (server, asked):
        table = listed(tmp_path / "t", [f"{server}/a.jpg", f"{server}/late.jpg"])
        result = taken(table, tmp_path / "out", here("ingest.per_host=1"), allow_degraded=True)
    assert result["samples"] == 1 and times[1] - times[0] >= 1.9
    assert asked["/late.jpg"] == 1 and result["skipped_reasons"] == {"unreachable": 1}


def test_a_host_is_never_asked_more_often_at_once_than_allowed(tmp_path: Path) -> None:
    now, most, moving = 0, 0, threading.Lock()
    together, fourth = threading.Barrier(3), threading.Event()

    def slow(request: BaseHTTPRequestHandler) -> None:
        nonlocal now, most
        with moving:
            now += 1
            most = max(most, now)
            if now > 3:
                fourth.set()
        together.wait(30)  # three are there at once, or nobody gets an answer
        fourth.wait(0.2)  # the time in which one more would come
        with moving:
            now -= 1
        body(shot(1))(request)

    with web_server({f"/{number}.jpg": slow for number in range(12)}) as server:
        table = listed(tmp_path / "t", [f"{server}/{number}.jpg" for number in range(12)])
        config = here("ingest.per_host=3", "ingest.samples_per_shard=12", "ingest.workers=1", "ingest.url_timeout_s=60")
        assert ingest(str(table), str(tmp_path / "out"), config, pool=InlinePool()).samples == 12
    assert most == 3


def test_a_run_over_the_budget_asks_again_for_what_may_have_come_back(tmp_path: Path) -> None:
    back = in_turn(body(b"", 500), body(b"", 500), body(shot(7)))
    with counted({**PICTURES, "/back.jpg": back}) as (server, asked):
        table = listed(tmp_path / "t", [f"{server}{path}" for path in (*PICTURES, "/back.jpg")])
        config = here("ingest.url_attempts=2")
        with pytest.raises(Degraded, match=r"1 of 7 pictures .*back\.jpg: unreachable, the server answers 500"):
            ingest(str(table), str(tmp_path / "out"), config)
        result = ingest(str(table), str(tmp_path / "out"), config)
    assert (result.status, result.samples, result.skipped) == ("done", 7, 0)
    assert sum(asked.values()) < 2 * 7 + 3, "the tar without failures is kept"


@pytest.mark.parametrize("make", [lambda url: url, lambda url: url.replace("127.0.0.1", "localhost")])
def test_private_addresses_are_out_of_bounds(tmp_path: Path, make: Callable[[str], str]) -> None:
    with counted(PICTURES) as (server, asked):
        table = listed(tmp_path / "t", [make(f"{server}/0.jpg")])
        with pytest.raises(InputError, match=r"private 1; the first is .*0\.jpg: private, .* is a private address"):
            ingest(str(table), str(tmp_path / "out"), load_config(), allow_degraded=True)
    assert not asked


@pytest.mark.parametrize(
    ("address", "public"),
    [
        *(("8.8.8.8", True), ("2606:4700::1111", True)),
        *((one, False) for one in ("127.0.0.1", "10.1.2.3", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1")),
        *(
            (one, False)
            for one in ("::1", "fe80::1%eth0", "fd00::1", "::ffff:127.0.0.1", "64:ff9b::a00:1", "2002:7f00:1::")
        ),
    ],
)
def test_which_addresses_are_public(address: str, public: bool) -> None:
    assert is_public(address) == public


def test_a_retry_after_is_a_number_or_a_date() -> None:
    assert (retry_after("3"), retry_after("soon"), retry_after("")) == (3.0, None, None)
    later = retry_after(format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True))
    assert later is not None and 20 < later <= 30
    assert retry_after(format_datetime(datetime(2001, 1, 1, tzinfo=UTC), usegmt=True)) == 0


@pytest.mark.parametrize(
    ("url", "key"),
    [
        ("https://a.org/b/c.jpg", "a%2Eorg/b/c"),
        ("https://a.org/b?id=7", "a%2Eorg/b?id=7"),
        ("https://a.org//b/", "a%2Eorg/%2Fb%2F"),
        ("s3://bucket/x/1.png", "bucket/x/1"),
    ],
)
def test_keys_of_urls(url: str, key: str) -> None:
    assert sample_key(url) == key


def test_a_root_makes_no_sense_for_urls(tmp_path: Path) -> None:
    table = listed(tmp_path / "t", ["https://example.org/1.jpg"])
    with pytest.raises(InputError, match=r"list\.csv lists URLs, which lie below no folder: leave out --root"):
        ingest(str(table), str(tmp_path / "out"), Config(), table_root=str(tmp_path))
