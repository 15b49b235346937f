"""The Prefect server that a run reports to: the one in PREFECT_API_URL, else a temporary one.

Prefect reads its settings when it is imported, so this module sets the environment first and imports none of Prefect.
"""

import base64
import json
import logging
import os
import secrets
import socket
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from urllib.parse import urlsplit

from flows.lifeline import die_with_parent
from pipelines.cluster.access import is_loopback, refuse_credentials, set_environment
from pipelines.console import NOTICE
from pipelines.errors import ConfigError, Unavailable, UsageError
from pipelines.storage import scratch_folder

_log = logging.getLogger(__name__)

STARTUP_WAIT_S = 180.0
"""Seconds that the temporary server may take to start."""
REACH_WAIT_S = 30.0
"""Seconds that the user's server may take to answer."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")
CREDENTIALS = "PREFECT_API_AUTH_STRING=user:password, or PREFECT_API_KEY"
NO_SERVER = (
    "PREFECT_API_URL is not set, nor in the active Prefect profile: start `prefect server start --host 127.0.0.1` and "
    "set it to http://127.0.0.1:4200/api"
)
QUIET_ENVIRONMENT = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_TELEMETRY_ENABLE_RESOURCE_METRICS": "false",
    # The command line shows progress and one line per failure; the log itself goes to the server.
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    "PREFECT_LOGGING_HANDLERS_DEBUG_LEVEL": "CRITICAL",
    "PREFECT_RESULTS_DEFAULT_SERIALIZER": "json",
    # Each call to a lost server, also for each batch of log lines, retries this often; two retries take about 10 s.
    "PREFECT_CLIENT_MAX_RETRIES": "2",
}
"""Settings of Prefect: no analytics, no output of its own on the terminal, no pickle, few retries of each call."""


@contextmanager
def prefect_server() -> Iterator[None]:
    """Set the environment for flows in the block: the user's server, else one on 127.0.0.1 that ends with the block.

    The temporary server has its own database and home in a scratch folder, and a password that only this process knows.
    No setting of the user for another server reaches it. Raises Unavailable if it does not start, UsageError if the
    user's server may not be used.
    """
    assert "prefect" not in sys.modules, "Prefect was imported before its settings were made"
    with quiet_prefect(), scratch_folder() as home:
        if url := server_url():
            reach_prefect(url)
            # Prefect writes results that it cannot report to its server into files; here they end with the block.
            with set_environment({"PREFECT_RESULTS_LOCAL_STORAGE_PATH": str(home)}):
                yield
            return
        names = [name for name in os.environ if name.upper().startswith("PREFECT_") and name not in QUIET_ENVIRONMENT]
        theirs = dict.fromkeys(names, None)
        with set_environment(theirs), _temporary_server(home) as settings, set_environment(settings):
            yield


@contextmanager
def quiet_prefect() -> Iterator[None]:
    """Set the environment for a process that will import Prefect: QUIET_ENVIRONMENT, and no proxy for this machine."""
    quiet: dict[str, str | None] = {name: value for name, value in QUIET_ENVIRONMENT.items() if name not in os.environ}
    direct = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    hosts = ",".join(dict.fromkeys([*filter(None, direct.split(",")), *LOOPBACK]))
    with set_environment({**quiet, "no_proxy": hosts, "NO_PROXY": hosts}):
        yield


def server_url() -> str | None:
    """Return the URL of the user's Prefect API from PREFECT_API_URL, else from the active profile, else None."""
    return prefect_setting("PREFECT_API_URL")


def prefect_setting(name: str) -> str | None:
    """Read a setting like Prefect, from the environment, else from the active profile, without importing Prefect."""
    if value := os.environ.get(name):
        return value
    try:
        home = Path(os.environ.get("PREFECT_HOME") or "~/.prefect").expanduser()
        path = Path(os.environ.get("PREFECT_PROFILES_PATH") or home / "profiles.toml")
        profiles = tomllib.loads(path.read_text(encoding="utf-8"))
        value = profiles["profiles"][os.environ.get("PREFECT_PROFILE") or profiles["active"]][name]
    except (OSError, RuntimeError, ValueError, KeyError, TypeError):
        return None
    return value if isinstance(value, str) else None


def reach_prefect(url: str) -> None:
    """Check that the Prefect API at `url` may be used and answers, before anything is sent to it.

    Raises UsageError if it is beyond this machine and no password or key is set, or if it refuses the one that is set;
    Unavailable if it does not answer; ConfigError if the URL is not that of an API.
    """
    refuse_credentials("PREFECT_API_URL", url)
    password, key = (prefect_setting(f"PREFECT_API_{name}") for name in ("AUTH_STRING", "KEY"))
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"PREFECT_API_URL={url} is not the address of an API, such as http://127.0.0.1:4200/api")
    if not (is_loopback(url) or password or key):
        problem = "is not on the loopback address and would be reported to without a password"
        raise UsageError(f"Prefect at {url} {problem}: set {CREDENTIALS}")
    question = urllib.request.Request(f"{url.rstrip('/')}/admin/version")  # noqa: S310 (http and https alone come here)
    if password or key:
        basic = base64.b64encode((password or "").encode()).decode()
        # Unredirected: a redirect must not carry the password to another server.
        question.add_unredirected_header("Authorization", f"Basic {basic}" if password else f"Bearer {key}")
    proxies = urllib.request.ProxyHandler({} if is_loopback(url) else None)
    try:
        with urllib.request.build_opener(proxies).open(question, timeout=REACH_WAIT_S) as answer:
            version = _is_json(answer.read(1 << 16))
    except urllib.error.HTTPError as answer:
        if answer.code in (401, 403):
            raise UsageError(f"Prefect at {url} refuses this environment: set {CREDENTIALS}") from None
        version = answer.code != 404
    except (OSError, ValueError, HTTPException) as error:
        problem = f"cannot reach Prefect at {url}: {getattr(error, 'reason', error)}"
        raise Unavailable(f"{problem}: start that server, or unset PREFECT_API_URL") from None
    if not version and "api" not in urlsplit(url).path.split("/"):
        raise ConfigError(f"PREFECT_API_URL={url} answers, but not as Prefect's API: add /api, {url.rstrip('/')}/api")


def _is_json(data: bytes) -> bool:
    try:
        json.loads(data)
    except ValueError:
        return False
    return True


@contextmanager
def _temporary_server(home: Path) -> Iterator[dict[str, str]]:
    """Start a server in `home`, yield the settings that reach it, and stop it at the end of the block."""
    settings = {
        "PREFECT_HOME": str(home),
        "PREFECT_API_AUTH_STRING": f"hhnet:{secrets.token_urlsafe(24)}",
        "PREFECT_API_URL": f"http://127.0.0.1:{(port := _free_port())}/api",
    }
    _log.log(NOTICE, "starting a Prefect server for this run")
    process = _start(port, home, settings)
    try:
        _await(process, settings["PREFECT_API_URL"], home / "server.log")
        yield settings
    finally:
        _stop(process)


def _free_port() -> int:
    with socket.socket() as probe:
        # Port 0: the kernel picks a free one. Another process may take it before the server does, which then ends.
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _start(port: int, home: Path, settings: Mapping[str, str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    env = {
        **os.environ,
        **settings,
        "PREFECT_SERVER_API_AUTH_STRING": settings["PREFECT_API_AUTH_STRING"],
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{home}/prefect.db",
    }
    with (home / "server.log").open("wb") as log:
        return subprocess.Popen(
            [*command, "--no-ui"],
            env=env,
            cwd=home,  # Prefect would read a .env or prefect.toml in the user's folder
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # keeps Ctrl-C from it: the interrupted flow still reports to it
            preexec_fn=die_with_parent if sys.platform == "linux" else None,
        )


def _await(process: subprocess.Popen[bytes], url: str, log: Path, startup_s: float = STARTUP_WAIT_S) -> None:
    deadline = time.monotonic() + startup_s
    while time.monotonic() < deadline and process.poll() is None:
        try:
            direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            with direct.open(f"{url}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    lines = log.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
    state = "did not answer in time" if process.poll() is None else f"ended with code {process.returncode}"
    remedy = "try again, or name a server with PREFECT_API_URL"
    raise Unavailable(f"the temporary Prefect server {state} ({lines[-1]}): {remedy}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
