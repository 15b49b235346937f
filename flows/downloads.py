"""Fetches files by download or as a Debian package, and gives up if no byte comes for a while."""

import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from pipelines.errors import Unavailable

STALL_S = 20.0
"""Seconds without a byte after which a transfer is given up."""

APT_CONFIG = """\
Dir::State "{folder}/state";
Dir::Cache "{folder}/cache";
Acquire::Languages "none";
Acquire::Retries "0";
Acquire::http::Timeout "{stall_s:g}";
Acquire::https::Timeout "{stall_s:g}";
APT::Sandbox::User "root";
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
"""
"""Settings of apt: lists and caches of our own, so that it needs no root, and no hooks that change the machine."""


class _Meter:
    """Progress bar for pooch that counts the bytes of a transfer and ends one of more than `limit` bytes."""

    total = 0

    def __init__(self, limit: int) -> None:
        self.limit, self.received = limit, 0

    def update(self, count: int) -> None:
        """Count `count` received bytes. Raises ValueError beyond the limit."""
        self.received += count
        if self.received > self.limit:
            raise ValueError(f"it sent more than {self.limit} bytes")

    def reset(self) -> None:
        """Set the count to 0; pooch does so at the end and then counts the real size."""
        self.received = 0

    def close(self) -> None:
        """Do nothing; pooch calls this at the end."""


def download(url: str, path: Path, limit: int, stall_s: float = STALL_S) -> None:
    """Fetch `url` into `path`. Raises Unavailable on any failure, after `limit` bytes, or `stall_s` without a byte.

    The transfer runs in a thread of its own, since a question to a name server has no timeout in the thread that asks.
    """
    import pooch
    from requests import RequestException

    pooch.get_logger().setLevel("WARNING")  # its own lines would repeat ours: the caller names each source
    meter, problems = _Meter(limit), [""]
    # Some servers declare a .gz as a content encoding, and requests would unpack it.
    fetch = pooch.HTTPDownloader(progressbar=meter, timeout=stall_s, headers={"Accept-Encoding": "identity"})

    def transfer() -> None:
        try:
            pooch.retrieve(url, None, fname=path.name, path=path.parent, downloader=fetch)
            problems.clear()
        except (RequestException, OSError, ValueError) as error:
            problems[:] = [str(getattr(error.args[0] if error.args else error, "reason", error))]

    thread = threading.Thread(target=transfer, daemon=True)
    thread.start()
    _watch(thread.is_alive, lambda: meter.received, "", stall_s)
    if problems:
        raise Unavailable(f"not reachable ({problems[0] or 'the transfer broke off'})")


def _watch(alive: Callable[[], bool], moved: Callable[[], int], name: str, stall_s: float) -> None:
    """Wait while `alive` is true. Raises Unavailable if the value of `moved` stays the same for `stall_s`."""
    seen, last = -1, time.monotonic()
    while alive():
        time.sleep(0.05)
        if (grown := moved()) != seen:
            seen, last = grown, time.monotonic()
        elif time.monotonic() - last > stall_s and alive():
            raise Unavailable(f"{name}no byte in {stall_s:g} s, given up")


def unpack_debian(package: str, folder: Path) -> Path:
    """Download a Debian package and unpack it below `folder`, without installing it and without root.

    Returns the folder that stands for `/`. Raises Unavailable if there is no apt-get, or if it cannot download it.
    """
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise Unavailable("no apt-get here")
    for own in ("state/lists/partial", "cache/archives/partial"):
        (folder / own).mkdir(parents=True)
    (folder / "apt.conf").write_text(APT_CONFIG.format(folder=folder, stall_s=STALL_S))
    for command in (["update"], ["download", package]):
        run_watched(["apt-get", *command, "-q", "-c", str(folder / "apt.conf")], folder)
    packages = sorted(folder.glob("*.deb"))
    if not packages:
        raise Unavailable("apt-get downloaded nothing")
    run_watched(["dpkg-deb", "-x", str(packages[0]), str(folder / "unpacked")], folder)
    return folder / "unpacked"


def run_watched(command: list[str], folder: Path, stall_s: float = STALL_S) -> None:
    """Run a command in `folder`. Raises Unavailable if it fails, or if no file or output grows for `stall_s`."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            _watch(
                lambda: process.poll() is None,
                lambda: os.fstat(log.fileno()).st_size + _bytes_below(folder),
                f"{command[0]} moved ",
                stall_s,
            )
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
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):  # it was renamed after it was listed
                total += Path(place, name).stat().st_size
    return total
