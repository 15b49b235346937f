"""Training steps of each backbone: images a second, and which share of the machine's matrix products that is.

    python -m tests.bench.training [--cases hrnet_w18_small:32:512 ...] [--precision bf16] [--steps 10] [--compile]

A case is backbone:side:batch. A step is a whole one: normalise, forward, loss, backward, clip, AdamW, averaged weights.
`bare` is forward and backward of the same network alone, at the same precision, on normalised images in its memory.
Its floating-point operations are counted by torch in the convolutions and matrix products of both passes. The limit is
a large matrix product at the same precision in the same process. Decoding is measured apart (`data` row): small images
from memory through crop, mirror and stacking, in one process.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from pipelines.config.loading import load_config
from pipelines.config.settings import Config
from pipelines.encode.encoder import autocast
from pipelines.ingest.ingest import ingest
from pipelines.shards.shards import open_shards
from pipelines.train.batches import DecodedCache, TrainData, epoch_batches, epoch_leg, preprocess_of
from pipelines.train.learner import Batch, Learner
from tests.support.pictures import write_folder

CLASSES = 10
CUDA = torch.cuda.is_available()
STEPS = 5
"""Steps between two looks at the clock."""


def timed(work: Callable[[], object], rounds: int) -> float:
    """Median seconds of a call, after three that warm up."""
    times = []
    for number in range(rounds + 3):
        begun = time.perf_counter()
        work()
        if CUDA:
            torch.cuda.synchronize()
        if number >= 3:
            times.append(time.perf_counter() - begun)
    return statistics.median(times)


def matrix_rate(precision: str) -> float:
    """Floating-point operations a second of a large matrix product."""
    side, dtype = (8192 if CUDA else 1024), torch.bfloat16 if precision == "bf16" else torch.float32
    one, other = (torch.randn(side, side, device="cuda" if CUDA else "cpu", dtype=dtype) for _ in range(2))
    return 2 * side**3 / timed(lambda: one @ other, 10)


def batch_of(side: int, size: int) -> Batch:
    random = np.random.default_rng(0)
    labels = np.eye(CLASSES, dtype=np.bool_)[random.integers(0, CLASSES, size)]
    return Batch(random.integers(0, 256, (size, side, side, 3), np.uint8), labels, [str(n) for n in range(size)])


def bare(learner: Learner, batch: Batch) -> Callable[[], None]:
    """Forward and backward of a learner's network, as often as `steps` takes steps."""
    squares = torch.from_numpy(batch.squares).to(learner.device)
    images = learner.preprocess.normalise(squares).contiguous(memory_format=torch.channels_last)

    def passes() -> None:
        for _ in range(STEPS):
            with autocast(learner.device, learner.config.model.precision):
                outputs = learner.model(images)
            outputs.float().square().mean().backward()
            learner.model.zero_grad(set_to_none=True)

    return passes


def steps(backbone: str, side: int, size: int, args: argparse.Namespace, limit: float) -> dict[str, Any]:
    stem = 4 if side > 64 else 1
    sets = [f"model.backbone={backbone}", f"model.stem_stride={stem}", f"data.image_size={side}"]
    config: Config = load_config(sets=[*sets, f"data.batch_size={size}", f"model.precision={args.precision}"])
    learner = Learner(config, CLASSES, 1000, preprocess_of(config))
    batch = batch_of(side, size)
    with FlopCounterMode(display=False) as counter:
        learner.step(batch)
    begun = time.perf_counter()
    if args.compile:
        learner._network = torch.compile(learner._network)
        learner.step(batch).value()
    compiled = time.perf_counter() - begun
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    seconds = timed(lambda: [learner.step(batch) for _ in range(STEPS)], args.steps) / STEPS
    peak = round(torch.cuda.max_memory_allocated() / 2**30, 2) if CUDA else None
    alone = timed(bare(learner, batch), args.steps) / STEPS
    return {
        "bench": "training",
        "backbone": backbone,
        "side": side,
        "batch": size,
        "precision": args.precision,
        "compiled_s": round(compiled, 1) if args.compile else None,
        "ms_per_step": round(1e3 * seconds, 2),
        "images_per_s": round(size / seconds, 1),
        "bare_images_per_s": round(size / alone, 1),
        "of_bare": round(alone / seconds, 3),
        "gflop_per_image": round(counter.get_total_flops() / size / 1e9, 3),
        "of_products": round(counter.get_total_flops() / seconds / limit, 4),
        "peak_gib": peak,
    }


def data(folder: Path) -> dict[str, Any]:
    """Images a second that one process decodes, and that it takes from those it keeps."""
    write_folder(folder / "photos", classes=CLASSES, per_class=300)
    config = load_config(sets=["data.image_size=32", "data.batch_size=256"])
    ingest(str(folder / "photos"), str(folder / "shards"), config)
    whole, cache = TrainData.make(open_shards(str(folder / "shards")), None, config), DecodedCache(config.data.cache)
    found = []
    for epoch in range(2):
        begun = time.perf_counter()
        for _ in epoch_batches(epoch_leg(whole, config, epoch, (), 1), 0, 0, 1, cache):
            pass
        found.append(round(whole.samples / (time.perf_counter() - begun)))
    return {"bench": "training data", "samples": whole.samples, "decoded_per_s": found[0], "kept_per_s": found[1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=["hrnet_w18_small:32:128", "resnet18:32:128"])
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16" if CUDA else "fp32")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    limit = matrix_rate(args.precision)
    name = torch.cuda.get_device_name() if CUDA else "CPU"
    rows: list[Callable[[], dict[str, Any]]] = [
        lambda: {"bench": "products", "on": name, "tflop_per_s": round(limit / 1e12, 3)}
    ]
    for case in args.cases:
        backbone, side, size = case.split(":")
        rows.append(lambda b=backbone, s=int(side), n=int(size): steps(b, s, n, args, limit))
    with tempfile.TemporaryDirectory() as folder:
        for row in [*rows, lambda: data(Path(folder))]:
            sys.stdout.write(json.dumps(row()) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
