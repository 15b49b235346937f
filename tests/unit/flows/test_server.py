"""The settings around the server, and whom it may be; that it really runs a flow is an integration test."""

import base64
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from flows.server import _await, prefect_setting, quiet_prefect, reach_prefect, server_url
from pipelines.cluster.access import set_environment
from pipelines.errors import ConfigError, Unavailable, UsageError

PASSWORD = "hhnet:0123456789abcdef"


def test_the_environment_is_as_before_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HHNET_A", "1")
    monkeypatch.delenv("HHNET_B", raising=False)
    with pytest.raises(KeyError), set_environment({"HHNET_A": "2", "HHNET_B": "3"}):
        assert (os.environ["HHNET_A"], os.environ["HHNET_B"]) == ("2", "3")
        raise KeyError
    assert os.environ["HHNET_A"] == "1"
    assert "HHNET_B" not in os.environ
    monkeypatch.setenv("HHNET_A", "1")
    with set_environment({"HHNET_A": None}):
        assert "HHNET_A" not in os.environ
    assert os.environ["HHNET_A"] == "1"


class Asking(BaseHTTPRequestHandler):
    """Asks for the password; below /away it sends the client on to the server that is named there."""

    def do_GET(self) -> None:
        self.server.received.append((self.path, self.headers.get("Authorization")))  # type: ignore[attr-defined]
        if self.path.startswith("/away/"):
            self.send_response(302)
            self.send_header("Location", f"http://{self.path.split('/')[2]}/api/admin/version")
        else:
            right = f"Basic {base64.b64encode(PASSWORD.encode()).decode()}"
            asked = self.headers.get("Authorization")
            there = 200 if self.path.startswith(("/api/", "/ui/")) else 404
            open_to_all = asked is None and not self.path.startswith("/api/")
            self.send_response(there if open_to_all or asked == right else 401)
        self.end_headers()
        self.wfile.write(b"<html>the page</html>" if self.path.startswith("/ui") else b'"3.8.8"')

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def asking(monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadingHTTPServer]:
    for name in ("PREFECT_API_AUTH_STRING", "PREFECT_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    site = ThreadingHTTPServer(("127.0.0.1", 0), Asking)
    site.received = []  # type: ignore[attr-defined]
    threading.Thread(target=site.serve_forever, daemon=True).start()
    yield site
    site.shutdown()
    site.server_close()


def test_a_server_elsewhere_is_not_spoken_to_without_a_password(
    asking: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"http://127.1:{asking.server_port}/api"  # leads here, but is no name of this machine's that is known
    with pytest.raises(UsageError, match=r"without a password: set PREFECT_API_AUTH_STRING=.*PREFECT_API_KEY"):
        reach_prefect(url)
    assert asking.received == []  # type: ignore[attr-defined]
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", PASSWORD)
    reach_prefect(url)
    monkeypatch.delenv("PREFECT_API_AUTH_STRING")
    monkeypatch.setenv("PREFECT_API_KEY", "key")
    with pytest.raises(UsageError, match="refuses this environment"):
        reach_prefect(url)
    assert [sent for _, sent in asking.received][-1] == "Bearer key"  # type: ignore[attr-defined]


def test_an_address_without_api_is_told_what_it_lacks(asking: ThreadingHTTPServer) -> None:
    """The page of a server answers any path below the address with itself, or with 404."""
    for path in ("", "/", "/ui"):
        with pytest.raises(ConfigError, match=rf"add /api, http://127\.0\.0\.1:{asking.server_port}.*/api$"):
            reach_prefect(f"http://127.0.0.1:{asking.server_port}{path}")


def test_a_server_on_this_machine_is_not_asked_through_a_proxy(
    asking: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "example.org")
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", PASSWORD)
    reach_prefect(f"http://127.0.0.1:{asking.server_port}/api")
    with quiet_prefect():
        for name in ("no_proxy", "NO_PROXY"):
            assert os.environ[name].split(",") == ["example.org", "127.0.0.1", "localhost", "::1"]
    assert os.environ["no_proxy"] == "example.org"


def test_a_server_is_found_in_the_active_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PREFECT_API_URL", "PREFECT_API_AUTH_STRING", "PREFECT_PROFILE", "PREFECT_PROFILES_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    assert server_url() is None
    (tmp_path / "profiles.toml").write_text(
        'active = "work"\n[profiles.work]\nPREFECT_API_URL = "http://127.0.0.1:1/api"\n'
        'PREFECT_API_AUTH_STRING = "a:b"\n[profiles.other]\nPREFECT_API_URL = "http://127.0.0.1:2/api"\n'
    )
    assert (server_url(), prefect_setting("PREFECT_API_AUTH_STRING")) == ("http://127.0.0.1:1/api", "a:b")
    monkeypatch.setenv("PREFECT_PROFILE", "other")
    assert (server_url(), prefect_setting("PREFECT_API_AUTH_STRING")) == ("http://127.0.0.1:2/api", None)
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:3/api")
    assert server_url() == "http://127.0.0.1:3/api"


@pytest.mark.parametrize("password", [None, "hhnet:wrong"])
def test_a_password_that_is_refused_is_bad_usage(
    password: str | None, asking: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    if password:
        monkeypatch.setenv("PREFECT_API_AUTH_STRING", password)
    with pytest.raises(UsageError, match="refuses this environment: set PREFECT_API_AUTH_STRING"):
        reach_prefect(f"http://127.0.0.1:{asking.server_port}/api")


def test_a_redirect_does_not_carry_the_password(asking: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", PASSWORD)
    here = f"127.0.0.1:{asking.server_port}"
    with pytest.raises(UsageError, match="refuses this environment"):
        reach_prefect(f"http://{here}/away/{here}")
    (_, first), (_, second) = asking.received  # type: ignore[attr-defined]
    assert first is not None and second is None


def test_what_does_not_answer_is_out_of_reach_and_what_is_no_address_is_bad_configuration() -> None:
    with pytest.raises(Unavailable, match=r"cannot reach Prefect at http://127\.0\.0\.1:9/api: "):
        reach_prefect("http://127.0.0.1:9/api")
    for url in ("file:///etc/passwd", "127.0.0.1:4200/api"):
        with pytest.raises(ConfigError, match="is not the address of an API"):
            reach_prefect(url)


def test_a_server_that_dies_is_reported_with_its_last_words(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("wb") as stream:
        process = subprocess.Popen([sys.executable, "-c", "raise SystemExit('no disk')"], stdout=stream, stderr=stream)
    with pytest.raises(Unavailable, match=r"ended with code 1 \(no disk\).*PREFECT_API_URL"):
        _await(process, "http://127.0.0.1:9/api", log)


def test_a_server_that_does_not_come_up_is_given_up(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("")
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        with pytest.raises(Unavailable, match="did not answer in time"):
            _await(process, "http://127.0.0.1:9/api", tmp_path / "log", startup_s=0.3)
    finally:
        process.kill()
        process.wait()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such signal")
def test_the_server_does_not_outlive_a_killed_parent(tmp_path: Path) -> None:
    child = "import time; time.sleep(60)"
    parent = (
        "import subprocess, sys, time; from flows.lifeline import die_with_parent; "
        f"p = subprocess.Popen([sys.executable, '-c', {child!r}], preexec_fn=die_with_parent); "
        "print(p.pid, flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    process.kill()
    process.wait()
    process.stdout.close()
    deadline = time.monotonic() + 20
    while _runs(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _runs(pid)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
