"""How the memory of an encode grows with the number of images.

    python -m tests.bench.memory [--images 10000 100000] [--plot FILE.png]

Each size is a generated corpus of tiny images, 1,000 to a shard, encoded by `hhnet encode` in a process of its own on
two Ray workers. Memory is RssAnon + RssShmem summed over the tree of that process, Ray's own processes included, looked
at several times a second. The last line is JSON: the peak of each size, and how many times the first peak the last is.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.compute as pc
from matplotlib.figure import Figure

from pipelines.artifacts.commit import ArtifactWriter
from pipelines.artifacts.facts import ShardsMeta
from pipelines.artifacts.tables import SHARD_INDEX
from pipelines.ingest.samples import PlannedSample
from pipelines.ingest.shard import TarTask, build_tar
from pipelines.shards.index import put_index
from pipelines.storage import Store, sha256_of
from tests.support.models import write_model
from tests.support.pictures import class_names, picture, png
from tests.support.report import SEED

CLASSES = 8
SIDE = 16
PER_SHARD = 1000
WORKERS = 2
EVERY_S = 0.25
ALLOWED = 1.05


# ------------------------------------------------------------------------------------------------------------- corpus


def write_corpus(root: Path, images: int) -> str:
    """Shards of so many samples. All tars have the same bytes; keys differ, as with `--adopt --keys-by-tar`."""
    names = class_names(CLASSES)
    pictures = [png(picture(klass, 0, SIDE, SEED)) for klass in range(CLASSES)]
    samples = [
        PlannedSample(f"{place:04d}", f"{place % CLASSES}.png", (klass,), None)
        for place in range(PER_SHARD)
        for klass in [place % CLASSES]
    ]
    writer = ArtifactWriter(Store(root), "shards", sha256_of(f"{SEED} {images}".encode()), (), {})
    parts, tables = [], []
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "tiny.tar")
        read = lambda name, _="": pictures[int(name.removesuffix(".png"))]  # noqa: E731
        table = build_tar(path, TarTask("", path.name, tuple(samples), read, None), [], lambda: None)
        for number in range(images // PER_SHARD):
            stem = f"tiny-{number:06d}"
            keys = pc.binary_join_element_wise(stem, table["key"], "/")
            columns = {name: table[name] for name in SHARD_INDEX.names}
            columns |= {"key": keys, "shard": pa.array([f"{stem}.tar"] * PER_SHARD, SHARD_INDEX.field("shard").type)}
            tables.append(pa.table(columns, SHARD_INDEX))
            parts.append(writer.put_part(f"{stem}.tar", path, PER_SHARD))
    parts += put_index(writer, tables)
    return writer.commit(
        parts, {"samples": images}, ShardsMeta(classes=tuple(names), source="", split=None, adopted=True)
    ).uri


# -------------------------------------------------------------------------------------------------------------- memory


def resident(process: psutil.Process) -> int:
    """Bytes of RssAnon + RssShmem."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{process.pid}/status").read_text().splitlines())
    return sum(int(fields[name].split()[0]) << 10 for name in ("RssAnon", "RssShmem") if name in fields)


@dataclass
class Memory:
    """Memory of a tree of processes over time: seconds, MiB of all, and at the peak the MiB by name of process."""

    seconds: list[float] = field(default_factory=list)
    mib: list[float] = field(default_factory=list)
    at_peak: dict[str, int] = field(default_factory=dict)

    @property
    def peak(self) -> float:
        return max(self.mib)

    def look(self, roots: Sequence[psutil.Process], begun: float) -> None:
        """Add what the trees hold now."""
        found: Counter[str] = Counter()
        for root in roots:
            for process in [root, *root.children(recursive=True)]:
                with suppress(psutil.NoSuchProcess, OSError):  # it ended meanwhile
                    found[process.name()] += resident(process)
        if not self.mib or found.total() > self.peak * (1 << 20):
            self.at_peak = {name: size >> 20 for name, size in found.most_common()}
        self.seconds.append(time.monotonic() - begun)
        self.mib.append(found.total() / (1 << 20))


def watched(command: list[str], cluster: int | None = None) -> Memory:
    """Run a command to its end; the memory of its tree, and of that of the process that serves its Ray cluster."""
    memory, begun, ended = Memory(), time.monotonic(), threading.Event()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:

        def watch() -> None:
            roots = [psutil.Process(pid) for pid in (run.pid, cluster) if pid is not None]
            while not ended.wait(EVERY_S):
                with suppress(psutil.NoSuchProcess):
                    memory.look(roots, begun)

        thread = threading.Thread(target=watch)
        thread.start()
        output, _ = run.communicate()
        ended.set()
        thread.join()
    if run.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {run.returncode}")
    sys.stderr.write(output)
    return memory


def measure(images: int, folder: Path) -> Memory:
    """Encode a corpus of so many images."""
    shards = write_corpus(folder / "shards", images)
    model = write_model(folder / "model", shards, seed=SEED, backbone="test_resnet", side=SIDE).uri
    words = ["encode", "--shards", shards, "--model", model, "--out", str(folder / "codes"), "--workers", str(WORKERS)]
    settings = ["--set", "encode.batch_size=250", "--set", "data.workers=1", "--json"]
    return watched([sys.executable, "-m", "pipelines", *words, *settings])


# ---------------------------------------------------------------------------------------------------------------- plot


def plot(runs: dict[int, Memory], path: Path) -> None:
    """Memory over each run, and its peak by the number of images beside what is allowed."""
    figure = Figure(figsize=(9.0, 3.4), layout="constrained")
    over_time, by_size = figure.subplots(1, 2)
    for images, memory in runs.items():
        over_time.plot(memory.seconds, memory.mib, label=f"{images:,} images", linewidth=1.2)
    over_time.set_xscale("log")
    over_time.set_xlim(left=1)
    over_time.set_xlabel("seconds")
    sizes, peaks = list(runs), [memory.peak for memory in runs.values()]
    by_size.plot(sizes, peaks, marker="o", label="peak")
    by_size.axhline(peaks[0] * ALLOWED, linestyle="--", color="grey", label=f"{ALLOWED:g} x the first")
    by_size.set_xscale("log")
    by_size.set_xlabel("images")
    for axes in (over_time, by_size):
        axes.set_ylim(0, max(peaks) * 1.4)  # room for the legend above the lines
        axes.legend(frameon=False, loc="upper left")
        axes.set_ylabel("RssAnon + RssShmem, MiB")
        axes.grid(alpha=0.25)
    figure.savefig(path, dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[10_000, 100_000], help="multiples of 1,000")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    runs: dict[int, Memory] = {}
    for size in options.images:
        with tempfile.TemporaryDirectory(prefix="bench-") as name:
            runs[size] = measure(size, Path(name))
        sys.stderr.write(f"{size} images: peak {runs[size].peak:.0f} MiB, {runs[size].at_peak}\n")
    if options.plot:
        plot(runs, options.plot)
    peaks = [round(memory.peak, 1) for memory in runs.values()]
    facts = {
        "bench": "memory",
        "seed": SEED,
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("ray", "torch", "pyarrow")},
        },
        "seconds": {size: round(memory.seconds[-1], 1) for size, memory in runs.items()},
        "peak_mib": dict(zip(runs, peaks, strict=True)),
        "at_peak_mib": {size: memory.at_peak for size, memory in runs.items()},
        "ratio": round(peaks[-1] / peaks[0], 4),
    }
    sys.stdout.write(json.dumps(facts) + "\n")
