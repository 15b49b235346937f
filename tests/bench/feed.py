"""How much of a network's speed an encode keeps: beside a pretended accelerator, the bare forward pass and its peers.

    python -m tests.bench.feed [--images 4096] [--rates 500 1000 2000 5000] [--verb 0] [--verb-photographs 0]

A pretended accelerator takes batch / rate seconds for a batch, one batch after the other, and holds no lock meanwhile,
as a GPU does. It stands for the network in the worker of an encode, with everything else as it is: photographs of
400 x 533 pixels are read, checked, decoded to 224 pixels, and their codes put. The limit is what decoding alone
delivers: the same feed, its batches thrown away. `share` is the rate of the encode divided by the smaller of the
accelerator's and the limit; `threads` decodes in the worker itself, `processes` in processes of their own.

With --verb N the verb encodes N JPEGs of 32 pixels to 64, with --verb-photographs N as many of those photographs to
224, on a local Ray, with one worker for each CPU and without GPUs. It stands beside the bare forward pass of as many
processes: `whole` has everything from the command's start to its end, `steady` the time in which shards were encoded.
Then the peers, scripts without this project (`tests.bench.feed_peers`), encode the same shards; `ratio` is the verb's
images a second, whole, divided by theirs, and `equal_bits` the share of bits that are as in the verb's codes. The last
line is JSON.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

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
from tests.bench.feed_peers import PEERS, equal_bits, run_peer
from tests.support.models import write_model
from tests.support.pictures import jpeg, picture
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
    write_photographs(folder / "accelerator", images)
    config = load_config(sets=[f"ingest.samples_per_shard={PER_SHARD}"])
    shards = ingest(str(folder / "accelerator"), str(folder / "shards"), config).uri
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
    """Write the images a second of the network alone, as it was trained, on one thread of this process."""
    encoder = Encoder.open(model)
    squares = np.random.default_rng(0).integers(0, 256, (BATCH, side, side, 3), np.uint8)
    encoder.outputs(squares, encoder.model)
    done, begun = 0, time.perf_counter()
    while time.perf_counter() - begun < seconds:
        encoder.outputs(squares, encoder.model)
        done += BATCH
    sys.stdout.write(f"{done / (time.perf_counter() - begun)}\n")


def write_small(folder: Path, images: int) -> None:
    """JPEGs of 32 pixels, no two alike."""
    folder.mkdir(parents=True)
    for number in range(images):
        (folder / f"{number:06d}.jpg").write_bytes(jpeg(picture(number % 8, number)))


@dataclass(frozen=True)
class Source:
    """Images for the verb, and the sides of the network's input and of what it is cut from."""

    write: Callable[[Path, int], None]
    side: int
    resize: int
    per_shard: int


SOURCES = {
    "small": Source(write_small, side=64, resize=64, per_shard=1000),
    "photographs": Source(write_photographs, side=SIDE, resize=256, per_shard=PER_SHARD),
}


def bare_rate(model: str, side: int, processes: int, seconds: float) -> float:
    """Images a second of the network alone, in all processes together."""
    words = [sys.executable, "-m", "tests.bench.feed", "bare", model, str(side), str(seconds)]
    alone = [subprocess.Popen(words, stdout=subprocess.PIPE, text=True) for _ in range(processes)]
    return sum(float(process.communicate()[0]) for process in alone)


def run_verb(shards: str, model: str, out: Path, *flags: str) -> tuple[float, float, list[dict[str, Any]]]:
    """Encode by the command; return when it began and ended, and the attempts that its run recorded."""
    words = ["encode", "--shards", shards, "--model", model, "--out", str(out), *flags, "--quiet"]
    begun = time.time()
    subprocess.run([sys.executable, "-m", "pipelines", *words], check=True, stdout=subprocess.DEVNULL)
    return begun, time.time(), run_record(out)["shards"]


def beside_others(name: str, images: int, options: argparse.Namespace, folder: Path) -> dict[str, object]:
    """The verb on images of a source, whole and in its steady state, beside the bare forward pass and its peers."""
    source, workers = SOURCES[name], allowed_cpus()
    source.write(folder / name, images)
    config = load_config(sets=[f"ingest.samples_per_shard={source.per_shard}"])
    shards = ingest(str(folder / name), str(folder / f"{name}-shards"), config).uri
    sizes = {"backbone": options.backbone, "side": source.side, "resize": source.resize}
    model = write_model(folder / f"{name}-model", shards, **sizes, precision=options.precision).uri
    forward = bare_rate(model, source.side, workers, options.bare_s)
    codes = folder / f"{name}-codes"
    begun, ended, tries = run_verb(shards, model, codes, "--workers", str(workers))
    first, last = min(one["began"] for one in tries), max(one["ended"] for one in tries)
    seconds = {"before the first shard": first - begun, "shards": last - first, "after the last": ended - last}
    rates, equal = {"verb": images / (ended - begun)}, dict[str, float]()
    for peer in options.peers:
        out = folder / f"{name}-{peer}"
        rates[peer] = images / run_peer(peer, shards, model, out, workers, config.data.workers)
        equal[peer] = round(equal_bits(codes / "parts", out), 4)
    return {
        "images": images,
        "backbone": options.backbone,
        "precision": options.precision,
        "workers": workers,
        "bare": round(forward, 1),
        "images_per_second": {who: round(rate, 1) for who, rate in rates.items()},
        "whole": round(rates["verb"] / forward, 3),
        "steady": round(images / seconds["shards"] / forward, 3),
        "ratio": {peer: round(rates["verb"] / rates[peer], 2) for peer in options.peers},
        "equal_bits": equal,
        "seconds": {part: round(spent, 1) for part, spent in seconds.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=4096, help="photographs; 0 = leave this out")
    parser.add_argument("--rates", type=float, nargs="+", default=[500.0, 1000.0, 2000.0, 5000.0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--verb", type=int, default=0, help="small images for the verb; 0 = leave this out")
    parser.add_argument("--verb-photographs", type=int, default=0, help="photographs for the verb; 0 = leave this out")
    parser.add_argument("--peers", nargs="*", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--backbone", default="hrnet_w18_small")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--bare-s", type=float, default=20.0, help="seconds of the bare forward pass")
    options = parser.parse_args()
    facts: dict[str, object] = {"bench": "feed", "seed": SEED, "cpus": allowed_cpus()}
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        if options.images:
            facts["accelerator"] = beside_accelerators(options.images, options.rates, options.rounds, Path(name))
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # for the processes from here on
        wanted = {"small": options.verb, "photographs": options.verb_photographs}
        facts["verb"] = {
            source: beside_others(source, images, options, Path(name)) for source, images in wanted.items() if images
        }
    sys.stdout.write(json.dumps(facts) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["bare"]:
        bare(sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))
    else:
        main()
