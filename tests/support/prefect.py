"""A real Prefect server on a free port of 127.0.0.1 with a password, its API, and processes that serve a deployment."""

import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).parents[2]
DEADLINE_S = 600.0
ENDED = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")


def environment(home: Path, **more: str) -> dict[str, str]:
    """A clean environment with a home of its own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "RAY_"))}
    (home / "tmp").mkdir(exist_ok=True)
    ours = {
        "HOME": str(home),
        "PREFECT_HOME": str(home / "prefect"),
        "TMPDIR": str(home / "tmp"),
        "OMP_NUM_THREADS": "1",
    }
    return {**kept, **ours, **more}


def until(what: str, check: Any, seconds: float = DEADLINE_S) -> Any:
    """Poll until `check` returns something; a deadline, not a measurement."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if found := check():
                return found
        except httpx.HTTPError:
            pass
        time.sleep(0.3)
    raise AssertionError(f"{what} did not happen in {seconds:g} s")


class Prefect:
    """A server that can be stopped and started again with the same port, database and password."""

    def __init__(self, home: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.home = home
        self.url = f"http://127.0.0.1:{self.port}/api"
        self.password = f"tester:{secrets.token_hex(16)}"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def env(self) -> dict[str, str]:
        """What a client needs to know."""
        return {"PREFECT_API_URL": self.url, "PREFECT_API_AUTH_STRING": self.password}

    def start(self) -> None:
        """Start it and wait until it answers."""
        quiet = {"PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1"}
        command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(self.port)]
        with (self.home / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                [*command, "--no-ui"],
                env=environment(self.home, PREFECT_SERVER_API_AUTH_STRING=self.password, **quiet),
                stdout=log,
                stderr=log,
            )
        until("the server's start", lambda: self.call("GET", "/health"))

    def stop(self) -> None:
        """End it."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait(timeout=30)

    def call(self, method: str, path: str, **body: Any) -> Any:
        """One call of its API."""
        user, word = self.password.split(":")
        answer = httpx.request(method, f"{self.url}{path}", auth=(user, word), json=body or None, timeout=30)
        answer.raise_for_status()
        return answer.json() if answer.content else None

    def trigger(self, deployment: str, key: str, **parameters: Any) -> str:
        """Ask for a run of a deployment; its id."""
        found = until("the deployment", lambda: self.call("GET", f"/deployments/name/hhnet/{deployment}"))
        start = {"state": {"type": "SCHEDULED"}, "idempotency_key": key, "parameters": parameters}
        path = f"/deployments/{found['id']}/create_flow_run"
        run = until("the trigger", lambda: self.call("POST", path, **start))  # a busy SQLite answers 503
        return str(run["id"])

    def run(self, uid: str) -> dict[str, Any]:
        """A run as the server has it."""
        found: dict[str, Any] = self.call("GET", f"/flow_runs/{uid}")
        return found

    def end_of(self, uid: str, seconds: float = DEADLINE_S) -> dict[str, Any]:
        """Wait for the end of a run."""
        found: dict[str, Any] = until(
            "the end of the run", lambda: run if (run := self.run(uid))["state_type"] in ENDED else None, seconds
        )
        return found

    def cancel(self, uid: str) -> None:
        """Ask for the end of a run, as its page does."""
        state = {"type": "CANCELLING", "name": "Cancelling"}
        until("the cancellation", lambda: self.call("POST", f"/flow_runs/{uid}/set_state", state=state))

    def artifacts(self, uid: str) -> list[dict[str, Any]]:
        """What a run shows."""
        found: list[dict[str, Any]] = self.call("POST", "/artifacts/filter", artifacts={"flow_run_id": {"any_": [uid]}})
        return found

    def progress(self, uid: str) -> dict[str, float]:
        """The bars of a run, by key."""
        return {shown["key"]: shown["data"] for shown in self.artifacts(uid) if shown["type"] == "progress"}


@contextmanager
def serving(prefect: Prefect, home: Path, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that serves a deployment; it is ended with the block if it goes on."""
    command = [sys.executable, "-m", "flows.deploy", *arguments]
    with (home / "serve.log").open("ab") as log:
        process = subprocess.Popen(
            command, env=environment(home, **prefect.env), cwd=ROOT, stdout=log, stderr=log, start_new_session=True
        )
    try:
        yield process
    finally:
        process.terminate()
        process.wait(timeout=60)
