"""How much of a network's speed an encode keeps: beside a pretended accelerator, and of the bare forward pass.

    python -m tests.bench.feed [--images 4096] [--rates 500 1000 2000 5000] [--verb 0]

A pretended accelerator takes batch / rate seconds for a batch, one batch after the other, and holds no lock meanwhile,
as a GPU does. It stands for the network in the worker of an encode, with everything else as it is: photographs of
400 x 533 pixels are read, checked, decoded to 224 pixels, and their codes put. The limit is what decoding alone
delivers: the same feed, its batches thrown away. `share` is the rate of the encode divided by the smaller of the
accelerator's and the limit; `threads` decodes in the worker itself, `processes` in processes of their own.

With --verb N the verb encodes N small images on a local Ray beside the bare forward pass of as many processes as
workers: `whole` has everything from the command's start to its end, `steady` the time in which shards were encoded.
The last line is JSON.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import cast

import numpy as np
import torch

from pipelines.artifacts.host import allowed_cpus
from pipelines.artifacts.manifest import open_artifact
from pipelines.config.loading import load_config
from pipelines.encode.encoder import Coded, Encoder
from pipelines.encode.job import ShardTask, plan_encode
from pipelines.encode.process_feed import ProcessFeed
from pipelines.encode.workers import ShardEncoder
from pipelines.ingest.ingest import ingest
from tests.support.models import write_model
from tests.support.pictures import jpeg, write_folder
from tests.support.report import SEED
from tests.support.runs import run_record

SIDE, BATCH, PER_SHARD = 224, 64, 256
HEIGHT, WIDTH = 400, 533
DIFFERENT = 64
"""Photographs that differ; the others are their copies."""


def write_photographs(folder: Path, images: int) -> None:
    """Smooth noise, whose JPEGs take about as many bytes as photographs do."""
    random = np.random.default_rng(SEED)
    folder.mkdir(parents=True)
    made = []
    for _ in range(DIFFERENT):
        coarse = torch.from_numpy(random.uniform(0, 255, (1, 3, 25, 33)).astype(np.float32))
        smooth = torch.nn.functional.interpolate(coarse, (HEIGHT, WIDTH), mode="bicubic")[0].permute(1, 2, 0).numpy()
        made.append(jpeg((smooth + random.normal(0, 6, smooth.shape)).clip(0, 255).astype(np.uint8)))
    for number in range(images):
        (folder / f"{number:06d}.jpg").write_bytes(made[number % DIFFERENT])


class Accelerator:
    """Stands for an encoder: a queue of batches that takes its time, and codes of zeros."""

    def __init__(self, encoder: Encoder, rate: float) -> None:
        self.bits, self.device, self.preprocess = encoder.bits, encoder.device, encoder.preprocess
        self._rate, self._free = rate, 0.0

    def begin(self, squares: object, batch_size: int, real_codes: bool) -> Callable[[], Coded]:
        """Queue a batch; the function that is returned waits until it is done."""
        rows = len(squares)  # type: ignore[arg-type]
        done = self._free = max(time.perf_counter(), self._free) + rows / self._rate

        def wait() -> Coded:
            time.sleep(max(0.0, done - time.perf_counter()))
            return np.zeros((rows, (self.bits + 7) // 8), np.uint8), None

        return wait


WAYS = {
    "threads": ("encode.decode_processes=0", f"data.workers={allowed_cpus()}"),
    "processes": (f"encode.decode_processes={allowed_cpus()}", "data.workers=1"),
}


def opened(shards: str, model: str, out: Path, way: str) -> ShardEncoder:
    """The worker of an encode, without Ray."""
    config = load_config(sets=[*WAYS[way], f"encode.batch_size={BATCH}"])
    return ShardEncoder(plan_encode(open_artifact(shards), open_artifact(model), str(out), config))


def rate_of(worker: ShardEncoder, work: Callable[[int], object]) -> float:
    """Images a second of `work` on shard after shard, from the end of the first to the end of the last but one.

    The first is left out since processes start in it, the last since it does not begin another one ahead.
    """
    shards, ends = worker.shards.shards, []
    for number in range(len(shards)):
        work(number)
        ends.append(time.perf_counter())
    return sum(shard.rows for shard in shards[1:-1]) / (ends[-2] - ends[0])


def decode_limit(worker: ShardEncoder) -> float:
    """What the feed delivers where nobody waits for anything else."""

    def work(number: int) -> None:
        batches = worker.feed.batches(worker.shards.shards[number])
        for following in worker.shards.shards[number + 1 : number + 2]:
            worker.feed.expect(following)
        for fed in batches:
            fed.free()

    return rate_of(worker, work)


def encode_rate(worker: ShardEncoder, rate: float) -> float:
    """What the worker reaches beside an accelerator of this rate."""
    worker.encoder = cast("Encoder", Accelerator(worker.encoder, rate))
    tasks = [ShardTask(shard.name, shard.stem) for shard in worker.shards.shards]

    def work(number: int) -> None:
        for following in tasks[number + 1 : number + 2]:
            worker.expect(following)
        worker.run(tasks[number])

    return rate_of(worker, work)


def beside_accelerators(images: int, rates: list[float], rounds: int, folder: Path) -> list[dict[str, object]]:
    """The rows of all ways and rates, each the median of the rounds."""
    write_photographs(folder / "photographs", images)
    config = load_config(sets=[f"ingest.samples_per_shard={PER_SHARD}"])
    shards = ingest(str(folder / "photographs"), str(folder / "shards"), config).uri
    model = write_model(folder / "model", shards, backbone="test_resnet", side=SIDE, resize=256).uri
    found: dict[tuple[str, float], list[tuple[float, float]]] = {}
    for number in range(rounds):
        for way in WAYS:
            for rate in rates:
                worker = opened(shards, model, folder / f"{number}-{way}-{rate:g}", way)
                limit, reached = decode_limit(worker), encode_rate(worker, rate)
                if isinstance(worker.feed, ProcessFeed):
                    worker.feed.close()
                found.setdefault((way, rate), []).append((limit, reached))
                sys.stderr.write(f"{way}, {rate:g} images/s: limit {limit:.0f}, reached {reached:.0f}\n")
    return [
        {
            "way": way,
            "accelerator": rate,
            "decode_limit": round(statistics.median(limit for limit, _ in pairs), 1),
            "images_per_second": round(statistics.median(reached for _, reached in pairs), 1),
            "share": round(statistics.median(reached / min(rate, limit) for limit, reached in pairs), 3),
        }
        for (way, rate), pairs in found.items()
    ]


# ---------------------------------------------------------------------------------------------------------- the verb


def bare(model: str, side: int, seconds: float) -> None:
    """Write the images a second of the network alone, on one thread, in this process."""
    encoder = Encoder.open(model)
    squares = np.random.default_rng(0).integers(0, 256, (BATCH, side, side, 3), np.uint8)
    encoder.outputs(squares)
    done, begun = 0, time.perf_counter()
    while time.perf_counter() - begun < seconds:
        encoder.outputs(squares)
        done += BATCH
    sys.stdout.write(f"{done / (time.perf_counter() - begun)}\n")


def beside_the_forward_pass(images: int, backbone: str, side: int, folder: Path) -> dict[str, object]:
    """The verb on small images, whole and in its steady state, beside the bare forward pass."""
    write_folder(folder / "small", classes=8, per_class=images // 8, size=32)
    shards = ingest(str(folder / "small"), str(folder / "small-shards"), load_config()).uri
    model = write_model(folder / "small-model", shards, backbone=backbone, side=side).uri
    workers, words = allowed_cpus(), [sys.executable, "-m"]
    alone = [
        subprocess.Popen(
            [*words, "tests.bench.feed", "bare", model, str(side), "20"], stdout=subprocess.PIPE, text=True
        )
        for _ in range(workers)
    ]
    forward = sum(float(process.communicate()[0]) for process in alone)
    out, begun = folder / "small-codes", time.time()
    paths = ["--shards", shards, "--model", model, "--out", str(out), "--workers", str(workers)]
    subprocess.run([*words, "pipelines", "encode", *paths, "--quiet"], check=True, stdout=subprocess.DEVNULL)
    ended, tries = time.time(), run_record(out)["shards"]
    first, last = min(one["began"] for one in tries), max(one["ended"] for one in tries)
    return {
        "images": images,
        "workers": workers,
        "bare": round(forward, 1),
        "whole": round(images / (ended - begun) / forward, 3),
        "steady": round(images / (last - first) / forward, 3),
        "seconds": {
            "before the first shard": round(first - begun, 1),
            "shards": round(last - first, 1),
            "after the last": round(ended - last, 1),
        },
    }


if __name__ == "__main__":
    if sys.argv[1:2] == ["bare"]:
        bare(sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))
        sys.exit()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=4096, help="photographs; 0 = leave this out")
    parser.add_argument("--rates", type=float, nargs="+", default=[500.0, 1000.0, 2000.0, 5000.0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--verb", type=int, default=0, help="small images for the verb; 0 = leave this out")
    parser.add_argument("--backbone", default="hrnet_w18_small")
    parser.add_argument("--side", type=int, default=64)
    options = parser.parse_args()
    facts: dict[str, object] = {"bench": "feed", "seed": SEED, "cpus": allowed_cpus()}
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        if options.images:
            facts["accelerator"] = beside_accelerators(options.images, options.rates, options.rounds, Path(name))
        if options.verb:
            facts["verb"] = beside_the_forward_pass(options.verb, options.backbone, options.side, Path(name))
    sys.stdout.write(json.dumps(facts) + "\n")
