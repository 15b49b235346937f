"""Encodes as commands of their own, on a corpus that was encoded undisturbed: started, watched, joined to nodes."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import psutil

from tests.support.nodes import LOOPBACK, Nodes
from tests.support.report import SEED

SHARDS, IMAGES = 24, 64
SETTINGS = (
    "ingest.samples_per_shard=64",
    "data.image_size=32",
    "encode.batch_size=16",
    "encode.workers=2",
    # The killer strikes at random and is no poison: no number of deaths makes these shards suspects.
    "encode.max_attempts=1000",
)
RUN_LIMIT_S = 900


PATIENCE = {"RAY_gcs_rpc_server_reconnect_timeout_s": "20"}
"""Ray gives a lost head up after so many seconds, and the verbs after half of them."""


@dataclass(frozen=True)
class Corpus:
    """Shards, a model, and the manifest of an undisturbed encode."""

    shards: str
    model: str
    manifest: bytes


def hhnet(*words: str) -> list[str]:
    """A command line with the settings of these tests."""
    settings = [word for setting in SETTINGS for word in ("--set", setting)]
    return [sys.executable, "-m", "pipelines", *words, *settings, "--json"]


def encode_words(shards: str, model: str, out: Path, *more: str) -> list[str]:
    """The command line of an encode."""
    return hhnet("encode", "--shards", shards, "--model", model, "--out", str(out), *more)


@contextmanager
def started(command: list[str], env: dict[str, str] | None = None) -> Iterator[subprocess.Popen[str]]:
    """A verb that runs; whatever happens, it and its Ray are gone at the end."""
    verb = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, env=env
    )
    try:
        yield verb
    finally:
        if verb.poll() is None:
            helpers = psutil.Process(verb.pid).children(recursive=True)
            for process in [psutil.Process(verb.pid), *helpers]:
                with suppress(psutil.Error):
                    process.kill()
            verb.wait()


def encoders(verb: subprocess.Popen[str]) -> list[psutil.Process]:
    """The worker processes below a verb; while any shard waits, each of them holds one.

    What a worker forks bears its title until it runs a program of its own, and does not count.
    """
    found = []
    with suppress(psutil.Error):
        for process in psutil.Process(verb.pid).children(recursive=True):
            with suppress(psutil.Error):
                title = " ".join(process.cmdline()[:1])
                if title.startswith(("ray::EncodeWorker", "ray::encode ")) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
    workers = {process.pid for process in found}
    return [process for process in found if _parent(process) not in workers]


def decoders(verb: subprocess.Popen[str]) -> list[psutil.Process]:
    """The decode processes below a verb's workers that are ready; what they share has no name."""
    found = []
    with suppress(psutil.Error):
        for process in psutil.Process(verb.pid).children(recursive=True):
            with suppress(psutil.Error, OSError):
                shares = "memfd:hhnet-feed (deleted)" in Path(f"/proc/{process.pid}/maps").read_text()
                if shares and "pipelines.encode.decoder" in process.cmdline():
                    found.append(process)
    return found


def remote_decoders(cluster: subprocess.Popen[str], ready: bool = False) -> list[psutil.Process]:
    """The decoders on the nodes of a cluster, or below a verb with a Ray of its own; `ready`: those that can decode."""
    titles = ["ray::DecodeWorker", "ray::DecodeWorker.decode"]
    if not ready:
        titles += ["ray::DecodeWorker.place", "ray::DecodeWorker.build"]
    return _below(cluster, lambda words: bool(words) and words[0] in titles)


def starting_decoders(cluster: subprocess.Popen[str]) -> list[psutil.Process]:
    """The decode processes below a cluster's or a verb's workers, ready or not."""
    return _below(cluster, lambda words: "pipelines.encode.decoder" in words)


def _below(top: subprocess.Popen[str], wanted: Callable[[list[str]], bool]) -> list[psutil.Process]:
    found = []
    with suppress(psutil.Error):
        for process in psutil.Process(top.pid).children(recursive=True):
            with suppress(psutil.Error):
                if wanted(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
    return found


@contextmanager
def held(verb: subprocess.Popen[str]) -> Iterator[None]:
    """Stop the workers below a verb or a cluster, which would finish few shards without a head; they end with it."""
    workers = encoders(verb)
    for worker in workers:
        with suppress(psutil.Error):
            worker.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        for worker in workers:
            with suppress(psutil.Error):
                worker.kill()


def _parent(process: psutil.Process) -> int | None:
    with suppress(psutil.Error):
        return process.ppid()
    return None


def result_of(verb: subprocess.Popen[str], code: int = 0) -> dict[str, Any]:
    out, err = verb.communicate(timeout=RUN_LIMIT_S)
    assert verb.returncode == code, f"seed {SEED}: {err}"
    return cast("dict[str, Any]", json.loads(out.splitlines()[-1]))


def joined(corpus: Corpus, cluster: Nodes, out: Path, *more: str) -> AbstractContextManager[subprocess.Popen[str]]:
    """An encode on the nodes of a cluster, which share this machine's disk; it gives a lost head up after seconds."""
    where = ("--set", f"ray.address={cluster.address}", "--set", "store.shared=true")
    command = encode_words(corpus.shards, corpus.model, out, *where, *more)
    return started(command, {**os.environ, **LOOPBACK, **PATIENCE})


def more_receipts(verb: subprocess.Popen[str], out: Path, more: int) -> bool:
    """Wait until so many further shards are finished; False where the run ended before."""
    wanted = len(list(out.glob("receipts/*.json"))) + more
    while verb.poll() is None:
        if len(list(out.glob("receipts/*.json"))) >= wanted:
            return True
        time.sleep(0.05)
    return False
