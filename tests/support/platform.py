"""The services of infra/compose.yaml as local processes: their own commands and environment, read from the file.

with platform_folder() as folder, started("ray-head", folder, "--num-cpus=1") as head:
    httpx.get(head.url + "/api/version")

Without containers some things must differ. `/run/secrets` is a folder of the test with the files of
`infra/make-secrets.sh`, the user's home is beside it, ports are free ones, the host names of services and `0.0.0.0`
become `127.0.0.1`, `tini` is left out, and Ray's remaining ports, which containers do not share, are passed as
further arguments.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import yaml

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"
COMPOSE: dict[str, Any] = yaml.safe_load((INFRA / "compose.yaml").read_text())
START_S = 180.0
STOP_S = 60.0


def free_port() -> int:
    """A port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class Platform:
    """A folder with secrets and the logs of what was started, and the ports that stand for those of compose."""

    folder: Path
    ports: dict[str, int] = field(default_factory=lambda: {port: free_port() for port in ("4200", "6379", "8265")})

    def secret(self, name: str) -> str:
        """The content of a secret file."""
        return (self.folder / "secrets" / name).read_text().strip()

    def environment(self, service: str) -> dict[str, str]:
        """The environment of a service: the image's, then its own."""
        image = dict(re.findall(r"^(?:ENV |    )(\w+)=(\S+)", (INFRA / "Dockerfile").read_text(), re.M))
        variables = {**image, **COMPOSE["services"][service].get("environment", {})}
        ours = {name: self.here(str(value)) for name, value in variables.items()}
        path = f"{Path(sys.executable).parent}{os.pathsep}/usr/local/bin:/usr/bin:/bin"
        home = {"HOME": str(self.folder), "TMPDIR": str(self.folder / "tmp"), "RAY_TMPDIR": str(self.folder)}
        ports = {"PREFECT_PORT": "4200", "RAY_PORT": "6379", "RAY_DASHBOARD_PORT": "8265"}
        code = {"PYTHONPATH": str(ROOT)}
        return {**ours, **home, **code, **{name: str(self.ports[port]) for name, port in ports.items()}, "PATH": path}

    def here(self, text: str) -> str:
        """What stands for a value of compose on this machine."""
        for theirs, mine in (
            ("/run/secrets/", f"{self.folder}/secrets/"),
            ("/home/hhnet/", f"{self.folder}/"),
            ("/opt/hhnet/", f"{ROOT}/"),
            ("/config/", f"{ROOT}/examples/"),
        ):
            text = text.replace(theirs, mine)
        text = text.replace("0.0.0.0", "127.0.0.1")
        text = re.sub(r"\b(prefect|ray-head|127\.0\.0\.1):(4200|6379|8265)", r"127.0.0.1:\2", text)
        for port, mine in self.ports.items():
            text = text.replace(f"127.0.0.1:{port}", f"127.0.0.1:{mine}")
        return text


@dataclass(frozen=True)
class Service:
    """A running service."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path


@contextmanager
def platform_folder() -> Iterator[Platform]:
    """Fresh secrets in a folder of a short name, since the paths of Ray's sockets must be short."""
    folder = Path(tempfile.mkdtemp(prefix="hp-", dir="/tmp"))
    (folder / "tmp").mkdir()
    subprocess.run([INFRA / "make-secrets.sh", folder / "secrets"], check=True, capture_output=True)
    try:
        yield Platform(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def ray_arguments() -> list[str]:
    """What keeps a Ray head small, and apart from others on the same machine."""
    names = ("dashboard-agent-listen-port", "ray-client-server-port", "metrics-export-port")
    return ["--object-store-memory=200000000", *(f"--{name}={free_port()}" for name in names)]


@contextmanager
def started(service: str, platform: Platform, *arguments: str, **variables: str) -> Iterator[Service]:
    """Run a service's command, with further arguments and variables, and stop it by its own process id."""
    command = [INFRA / "entrypoint.sh", *COMPOSE["services"][service]["command"], *arguments]
    port, health = {"prefect": ("4200", "/api/health"), "ray-head": ("8265", "/api/gcs_healthz")}[service]
    # A head of Ray waits for half a minute at its end until its workers are idle.
    at_once = {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"}
    log = platform.folder / f"{service}.log"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command,
            env=platform.environment(service) | at_once | variables,
            cwd=platform.folder,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            start_new_session=True,
        )
    found = Service(process, f"http://127.0.0.1:{platform.ports[port]}", log)
    try:
        _await(found, health)
        yield found
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def run_once(service: str, platform: Platform, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a service that ends, with further arguments and variables."""
    command = [platform.here(word) for word in COMPOSE["services"][service]["command"]]
    return subprocess.run(
        [INFRA / "entrypoint.sh", *command, *arguments],
        env=platform.environment(service) | variables,
        cwd=platform.folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )


def _await(service: Service, health: str) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and service.process.poll() is None:
        try:
            if httpx.get(service.url + health, timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(0.3)
    raise RuntimeError(f"{service.log.name} did not come up:\n{service.log.read_text(errors='replace')[-3000:]}")
