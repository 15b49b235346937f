"""A real S3 server on loopback: SeaweedFS from its wheel, one process per fixture.

with seaweed(folder) as server:      # started, answering, with one bucket
    with server.environment():       # AWS_* variables of this process point at it
        Store(server.uri("prefix"))
        server.kill()                # as a power cut would
        server.start()               # the same data at the same address
"""

import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import s3fs

BUCKET = "hhnet-test"
ACCESS_KEY = "test"
SECRET_KEY = "testsecret"
START_S = 60
STOP_S = 30
PORTS = ("s3.port", "master.port", "volume.port", "filer.port", "admin.port", "metricsPort")


@dataclass(eq=False)
class Seaweed:
    """A server whose data lies in `folder`, at one address as often as it is started."""

    folder: Path
    ports: dict[str, int]
    process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        """URL of its S3 API."""
        return f"http://127.0.0.1:{self.ports['s3.port']}"

    def start(self) -> None:
        """Start it and wait until it answers and its bucket is there."""
        command = [
            *(str(Path(sys.executable).with_name("weed")), "mini", f"-dir={self.folder}", f"-bucket={BUCKET}"),
            *("-ip=127.0.0.1", "-ip.bind=127.0.0.1", *(f"-{name}={port}" for name, port in self.ports.items())),
            *("-s3.port.iceberg=0", "-s3.port.lance=0", "-webdav=false", "-admin.ui=false", "-master.telemetry=false"),
            *("-master.electionTimeout=1s", "-master.heartbeatInterval=100ms"),
            f"-filer.localSocket={self.folder}/f.sock",
        ]
        keys = {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY}
        with (self.folder / "weed.log").open("ab") as log:
            self.process = subprocess.Popen(
                command,
                env=os.environ | keys,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
                start_new_session=True,
            )
        _wait_until_ready(self, self.folder / "weed.log")

    def kill(self) -> None:
        """End it without a chance to flush anything."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """End it by its own process id."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.kill()

    def uri(self, prefix: str) -> str:
        """An s3:// URI in the server's bucket."""
        return f"s3://{BUCKET}/{prefix}"

    def requests(self) -> Counter[str]:
        """The requests that its S3 API has answered so far, by verb."""
        url = f"http://127.0.0.1:{self.ports['metricsPort']}/metrics"
        with urllib.request.urlopen(url, timeout=10) as answer:
            text = answer.read().decode()
        found = Counter[str]()
        for labels, count in re.findall(r"^SeaweedFS_s3_request_total\{([^}]*)\} (\S+)$", text, re.MULTILINE):
            found[re.findall(r'type="([^"]*)"', labels)[0]] += round(float(count))
        return found

    @property
    def variables(self) -> dict[str, str]:
        """What a client process needs in its environment."""
        return {
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL_S3": self.endpoint,
        }

    @contextmanager
    def environment(self, **changes: str) -> Iterator[None]:
        """Let this process's S3 clients talk to the server; `changes` replace single variables."""
        wanted = self.variables | changes
        before = {name: os.environ.get(name) for name in wanted}
        os.environ.update(wanted)
        s3fs.S3FileSystem.clear_instance_cache()
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
            s3fs.S3FileSystem.clear_instance_cache()


@contextmanager
def seaweed(folder: Path) -> Iterator[Seaweed]:
    """Start a server whose data lies in `folder`, and stop it."""
    folder.mkdir(parents=True, exist_ok=True)
    server = Seaweed(folder, _free_ports())
    try:
        server.start()
        yield server
    finally:
        server.stop()


def _wait_until_ready(server: Seaweed, log: Path) -> None:
    """Poll until the server answers and its bucket is there, which comes a moment later."""
    client = s3fs.S3FileSystem(
        key=ACCESS_KEY, secret=SECRET_KEY, endpoint_url=server.endpoint, skip_instance_cache=True
    )
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if server.process is None or server.process.poll() is not None:
            break
        with suppress(urllib.error.URLError, ConnectionError, TimeoutError):
            urllib.request.urlopen(f"{server.endpoint}/healthz", timeout=2).close()
            if client.exists(BUCKET):
                return
        time.sleep(0.1)
    raise RuntimeError(f"SeaweedFS did not come up:\n{log.read_text(errors='replace')[-3000:]}")


def _free_ports() -> dict[str, int]:
    """One port for each service; the server also takes each port + 10,000 for gRPC."""
    found: list[int] = []
    while len(found) < len(PORTS):
        port = random.randrange(20_000, 30_000)
        if port not in found and _is_free(port) and _is_free(port + 10_000):
            found.append(port)
    return dict(zip(PORTS, found, strict=True))


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
