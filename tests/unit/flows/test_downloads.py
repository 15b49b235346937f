"""Downloads and packages: what stalls is given up, what fails says so."""

import contextlib
import hashlib
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from flows.downloads import download, run_watched, unpack_debian
from pipelines.errors import Unavailable

CONTENT = bytes(range(256)) * 400


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port that accepts connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield int(server.getsockname()[1])


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/missing":
            self.send_error(404)
            return
        self.send_response(200)
        if self.path != "/endless":
            self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        if self.path == "/cut":
            self.wfile.write(CONTENT[:1000])
            return
        if self.path == "/stall":
            self.wfile.write(CONTENT[:1000])
            self.wfile.flush()
            time.sleep(2)
            return
        if self.path == "/endless":
            with contextlib.suppress(OSError):
                while True:
                    self.wfile.write(CONTENT)
        step = len(CONTENT) // 10
        for start in range(0, len(CONTENT), step):
            self.wfile.write(CONTENT[start : start + step])
            self.wfile.flush()
            time.sleep(0.1 if self.path == "/slow" else 0)

    def log_message(self, *_: object) -> None:
        pass


class Site(HTTPServer):
    def handle_error(self, *_: object) -> None:
        """A client that gave up is what these tests are about."""


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    server = Site(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_file_is_what_the_server_sent(site: str, tmp_path: Path) -> None:
    download(f"{site}/file", tmp_path / "file", limit=len(CONTENT))
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_a_slow_server_is_not_given_up_while_bytes_come(site: str, tmp_path: Path) -> None:
    download(f"{site}/slow", tmp_path / "file", limit=len(CONTENT), stall_s=0.5)
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_a_server_that_never_answers_is_given_up(silent_port: int, tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match=r"no byte in 0\.3 s|timed out"):
        download(f"http://127.0.0.1:{silent_port}/file", tmp_path / "file", limit=10, stall_s=0.3)


def test_a_name_server_that_never_answers_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A look-up cannot be timed out from within: the thread that waits for it is left behind."""
    release = threading.Event()

    def hanging(*_: object, **__: object) -> None:
        release.wait(10)
        raise OSError("no such host")

    monkeypatch.setattr(socket, "getaddrinfo", hanging)
    try:
        with pytest.raises(Unavailable, match=r"no byte in 0\.3 s"):
            download("http://images.invalid/file", tmp_path / "file", limit=10, stall_s=0.3)
    finally:
        release.set()


def test_a_server_that_stops_in_the_middle_is_given_up(site: str, tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match=r"no byte in 0\.3 s|timed out"):
        download(f"{site}/stall", tmp_path / "file", limit=len(CONTENT), stall_s=0.3)


@pytest.mark.parametrize(
    ("path", "limit", "reason"),
    [
        ("missing", 10, "Not Found"),
        ("endless", 5000, "more than 5000 bytes"),
        ("cut", len(CONTENT), r"IncompleteRead\(1000 bytes"),
    ],
)
def test_a_failure_says_why(site: str, tmp_path: Path, path: str, limit: int, reason: str) -> None:
    with pytest.raises(Unavailable, match=reason):
        download(f"{site}/{path}", tmp_path / "file", limit=limit)


def test_a_port_where_nobody_listens_fails_at_once(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(Unavailable, match="refused"):
        download(f"http://127.0.0.1:{port}/file", tmp_path / "file", limit=10, stall_s=5)


def test_a_command_that_writes_is_waited_for(tmp_path: Path) -> None:
    script = "import time,sys\nfor n in range(8): open(f'f{n}','w').write('x'); time.sleep(.15)"
    run_watched([sys.executable, "-c", script], tmp_path, stall_s=0.8)
    assert len(list(tmp_path.iterdir())) == 8


def test_a_command_that_hangs_is_ended(tmp_path: Path) -> None:
    script = "import os,time; open('pid','w').write(str(os.getpid())); time.sleep(60)"
    with pytest.raises(Unavailable, match=r"moved no byte in 0\.5 s"):
        run_watched([sys.executable, "-c", script], tmp_path, stall_s=0.5)
    pid = tmp_path / "pid"
    assert not pid.exists() or not Path(f"/proc/{pid.read_text()}").exists()


def test_a_command_that_fails_shows_its_own_reason(tmp_path: Path) -> None:
    script = "import sys; print('W: never mind'); print('E: no such package'); sys.exit(100)"
    with pytest.raises(Unavailable, match="E: no such package"):
        run_watched([sys.executable, "-c", script], tmp_path)


@pytest.mark.skipif(shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None, reason="not a Debian")
def test_a_package_comes_without_root_and_without_a_change_to_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """apt sees a source of one package on this disk, and runs with folders of its own for everything it writes."""
    package, source = tmp_path / "package", tmp_path / "source"
    (package / "DEBIAN").mkdir(parents=True)
    (package / "usr").mkdir()
    (package / "usr" / "file").write_bytes(CONTENT)
    fields = {"Package": "toy", "Version": "1", "Architecture": "all", "Maintainer": "m <m@localhost>"}
    control = "".join(f"{name}: {value}\n" for name, value in {**fields, "Description": "toy"}.items())
    (package / "DEBIAN" / "control").write_text(control)
    source.mkdir()
    deb = source / "toy_1_all.deb"
    subprocess.run(["dpkg-deb", "-b", package, deb], check=True, capture_output=True)
    digest = hashlib.sha256(deb.read_bytes()).hexdigest()
    found = f"{control}Filename: ./{deb.name}\nSize: {deb.stat().st_size}\nSHA256: {digest}\n"
    (source / "Packages").write_text(found)
    (tmp_path / "list").write_text(f"deb [trusted=yes] file:{source} ./\n")
    # As the machine's own configuration would say it, with a hook that an update must not run.
    hook = f'APT::Update::Post-Invoke {{ "touch {tmp_path}/hook"; }};'
    own = f'Dir::Etc::SourceList "{tmp_path}/list"; Dir::Etc::SourceParts "/nonexistent"; {hook}'
    (tmp_path / "apt.conf").write_text(own)
    monkeypatch.setenv("APT_CONFIG", str(tmp_path / "apt.conf"))
    places = [Path(place) for place in ("/var/lib/apt/lists", "/var/cache/apt", "/var/cache/apt/archives")]
    before = [place.stat().st_mtime_ns for place in places if place.exists()]
    (tmp_path / "folder").mkdir()
    unpacked = unpack_debian("toy", tmp_path / "folder")
    assert (unpacked / "usr" / "file").read_bytes() == CONTENT
    assert [place.stat().st_mtime_ns for place in places if place.exists()] == before
    assert not (tmp_path / "hook").exists()
