"""Many tiny images from a folder to answers, and night after night more of them: on a real S3 server and two Ray nodes.

    python -m tests.bench.nights [--images 1000000] [--nights 10] [--folder DIR]

The pictures are 16 x 16 pixels, four squares of random colours, a thousand to a folder, and the network is a small
untrained one. Each step is a verb in a process of its own, which joins the cluster. A night brings one hundredth as
many new images: ingest, encode, index add, then verify of the codes and of the index. Memory is RssAnon + RssShmem over
the trees of the verb and of the cluster, without the server; requests are those that the server answered (its GET hold
the HEAD). One JSON line for each step.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from tests.bench.memory import watched
from tests.support.models import write_model
from tests.support.nodes import LOOPBACK, Nodes, cluster_of
from tests.support.pictures import png
from tests.support.seaweed import Seaweed, seaweed

SIDE, CLASSES, PER_FOLDER = 16, 10, 1000
SETTINGS = (
    *("data.image_size=16", "data.workers=1", "encode.batch_size=250", "encode.workers=2", "ingest.workers=2"),
    *("store.shared=true", "ingest.samples_per_shard=1000"),
)


def write_pictures(root: Path, count: int, seed: int) -> None:
    """Write so many pictures below class folders, each unlike any other."""
    random = np.random.default_rng(seed)
    for start in range(0, count, PER_FOLDER):
        number = start // PER_FOLDER
        folder = root / f"class_{number % CLASSES}" / f"{number:05d}"
        folder.mkdir(parents=True)
        for place in range(min(PER_FOLDER, count - start)):
            pixels = random.integers(0, 256, (2, 2, 3), dtype=np.uint8).repeat(SIDE // 2, 0).repeat(SIDE // 2, 1)
            (folder / f"{place:04d}.png").write_bytes(png(pixels))


class Bench:
    """The verbs on one server and one cluster."""

    def __init__(self, server: Seaweed, cluster: Nodes, images: int) -> None:
        self.server, self.cluster, self.images = server, cluster, images

    def verb(self, step: str, *words: str) -> None:
        """Run a verb and say what it took."""
        sets = [word for setting in (*SETTINGS, f"ray.address={self.cluster.address}") for word in ("--set", setting)]
        before, begun = self.server.requests(), time.perf_counter()
        memory = watched([sys.executable, "-m", "pipelines", *words, *sets, "--json"], self.cluster.process.pid)
        facts = {
            "seconds": round(time.perf_counter() - begun, 1),
            "peak_mib": round(memory.peak),
            "at_peak": dict(list(memory.at_peak.items())[:4]),
            "requests": dict(self.server.requests() - before),
        }
        say(images=self.images, step=step, **facts)

    def night(self, number: int, source: Path, model: str, index: str) -> None:
        """Bring new images to the index, and prove what is new."""
        name, uri = f"night {number}", self.server.uri(f"night-{number}")
        shards, codes = f"{uri}/shards", f"{uri}/codes"
        self.verb(f"{name}: ingest", "ingest", str(source), "--out", shards, "--set", f"ingest.name=n{number:02d}")
        self.verb(f"{name}: encode", "encode", "--shards", shards, "--model", model, "--out", codes)
        self.verb(f"{name}: index add", "index", "add", "--index", index, "--codes", codes)
        self.verb(f"{name}: verify codes", "verify", codes)
        self.verb(f"{name}: verify index", "verify", index)


def say(**facts: object) -> None:
    sys.stdout.write(json.dumps({"bench": "nights", **facts}) + "\n")
    sys.stdout.flush()


def measure(bench: Bench, folder: Path, nights: int) -> None:
    """Run all steps, from the first pictures to a search after the last night."""
    shards, model, codes, index = map(bench.server.uri, ("shards", "model", "codes", "index"))
    begun = time.perf_counter()
    write_pictures(folder / "pictures", bench.images, 0)
    say(images=bench.images, step="generate", seconds=round(time.perf_counter() - begun, 1))
    bench.verb("ingest", "ingest", str(folder / "pictures"), "--out", shards)
    write_model(model, shards, bits=64, backbone="test_resnet", side=SIDE)
    bench.verb("encode", "encode", "--shards", shards, "--model", model, "--out", codes)
    bench.verb("index build", "index", "build", "--codes", codes, "--out", index)
    for uri in (shards, codes, index):
        bench.verb(f"verify {uri.rpartition('/')[2]}", "verify", uri)
    for number in range(1, nights + 1):
        source = folder / f"night-{number}"
        write_pictures(source, bench.images // 100, number)
        bench.night(number, source, model, index)
    bench.verb("search", "search", "--index", index, "--key", "class_0/00000/0000", "-k", "10")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1_000_000, help="a multiple of 100")
    parser.add_argument("--nights", type=int, default=10)
    parser.add_argument("--folder", type=Path, help="where pictures and the server's data go for the time of the run")
    given = parser.parse_args()
    os.environ.update(LOOPBACK)
    with tempfile.TemporaryDirectory(prefix="bench-", dir=given.folder) as name:
        folder = Path(name)
        with seaweed(folder / "weed") as server, server.environment(), cluster_of(1, 1) as cluster:
            measure(Bench(server, cluster, given.images), folder, given.nights)


if __name__ == "__main__":
    main()
