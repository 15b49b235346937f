"""Fetches files by download or as a Debian package, and gives up if no byte comes for a while."""

import http.client
import os
import shutil
import subprocess
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

from pipelines.errors import Unavailable

STALL_S = 20.0
"""Seconds without a byte after which a transfer is given up."""


def download(url: str, path: Path, limit: int, stall_s: float = STALL_S) -> None:
    """Fetch `url` into `path`, at most `limit` bytes. Raises Unavailable on any failure, or `stall_s` without a byte.

    The transfer runs in a thread of its own, since a question to a name server has no timeout in the thread that asks.
    """
    outcome: list[str] = []
    moved = threading.Event()

    def transfer() -> None:
        try:
            outcome.append(_transfer(url, path, limit, stall_s, moved))
        except (OSError, ValueError, http.client.HTTPException) as error:
            outcome.append(str(getattr(error, "reason", error)) or type(error).__name__)

    thread = threading.Thread(target=transfer, daemon=True)
    thread.start()
    last = time.monotonic()
    while thread.is_alive():
        thread.join(0.05)
        if moved.is_set():
            moved.clear()
            last = time.monotonic()
        elif thread.is_alive() and time.monotonic() - last > stall_s:
            raise Unavailable(f"no byte in {stall_s:g} s, given up")
    if outcome != [""]:
        raise Unavailable(f"not reachable ({''.join(outcome) or 'the transfer broke off'})")


def _transfer(url: str, path: Path, limit: int, stall_s: float, moved: threading.Event) -> str:
    """Fetch `url` into `path`; return the fault of the answer, or ""."""
    received = 0
    with urllib.request.urlopen(url, timeout=stall_s) as answer, path.open("wb") as stream:  # noqa: S310
        promised = answer.headers.get("Content-Length")
        while block := answer.read1(1 << 16):
            moved.set()
            received += len(block)
            if received > limit:
                return f"it sent more than {limit} bytes"
            stream.write(block)
    if promised is not None and received != int(promised):
        return f"it ended after {received} of {promised} bytes"
    return ""


def unpack_debian(package: str, folder: Path) -> Path:
    """Download a Debian package and unpack it below `folder`, without installing it and without root.

    Returns the folder that stands for `/`. Raises Unavailable if there is no apt-get, or if it cannot download it.
    """
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise Unavailable("no apt-get here")
    timeouts = [f"-oAcquire::{scheme}::Timeout={STALL_S:g}" for scheme in ("http", "https")]
    options = ["-q", "-oAcquire::Retries=0", "-oAPT::Sandbox::User=root", *timeouts]
    if os.geteuid() == 0:
        run_watched(["apt-get", "update", *options], Path("/var/lib/apt/lists"))
    run_watched(["apt-get", "download", *options, package], folder)
    packages = sorted(folder.glob("*.deb"))
    if not packages:
        raise Unavailable("apt-get downloaded nothing")
    run_watched(["dpkg-deb", "-x", str(packages[0]), str(folder / "unpacked")], folder)
    return folder / "unpacked"


def run_watched(command: list[str], folder: Path, stall_s: float = STALL_S) -> None:
    """Run a command in `folder`. Raises Unavailable if it fails, or if no file or output grows for `stall_s`."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        seen, last = -1, time.monotonic()
        try:
            while process.poll() is None:
                time.sleep(0.1)
                grown = os.fstat(log.fileno()).st_size + _bytes_below(folder)
                if grown != seen:
                    seen, last = grown, time.monotonic()
                elif time.monotonic() - last > stall_s:
                    raise Unavailable(f"{command[0]} moved no byte in {stall_s:g} s, given up")
        finally:
            if process.poll() is None:
                process.terminate()
            process.wait()
        if process.returncode:
            log.seek(0)
            errors = [line for line in log.read().decode(errors="replace").split("\n") if line.startswith("E:")]
            reason = errors[0] if errors else f"exit code {process.returncode}"
            raise Unavailable(f"{' '.join(command[:2])} failed ({reason})")


def _bytes_below(folder: Path) -> int:
    total = 0
    for place, _, names in os.walk(folder, onerror=None):
        for name in names:
            try:
                total += Path(place, name).stat().st_size
            except OSError:  # it was renamed after it was listed
                continue
    return total
