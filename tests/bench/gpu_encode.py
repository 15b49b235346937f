"""The verb `encode` on a GPU, beside the bare forward pass on the same card and beside the card's matrix products.

    python -m tests.bench.gpu_encode [--backbones hrnet_w18 hrnet_w32] [--side 224] [--batch 256] [--images 32768]

The images are photographs of 400 x 533 pixels, see `tests.bench.feed`; one worker encodes them, with the decode
processes that it takes by itself. `bare` is the network alone on normalised images that lie on the card. `steady`
counts from the end of the first shard, in which processes start and the card warms up; `whole` from the command's start
to its end. `forward` has the seconds in which the worker launched passes and waited for their codes, `decode` those of
all decode threads together. The limit is a large matrix product at the same precision; a pass needs the floating-point
operations of its convolutions and matrix products.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from hhnet.nn.flops import forward_flops
from pipelines.config.loading import load_config
from pipelines.encode.encoder import Encoder, autocast
from pipelines.ingest.ingest import ingest
from tests.bench.feed import run_verb, write_photographs
from tests.bench.training import matrix_rate, timed
from tests.support.models import write_model

SHARDS = 32
PASSES = 5
"""Passes between two looks at the clock."""


def bare_pass(model: str, batch: int, rounds: int) -> tuple[float, int]:
    """Images a second of the network alone, and the floating-point operations for one."""
    encoder = Encoder.open(model)
    side = encoder.preprocess.size
    squares = torch.randint(0, 256, (batch, side, side, 3), dtype=torch.uint8, device=encoder.device)
    images = encoder.preprocess.normalise(squares)

    def passes() -> None:
        with torch.inference_mode(), autocast(encoder.device, encoder.precision):
            for _ in range(PASSES):
                encoder.model(images)

    return batch * PASSES / timed(passes, rounds), forward_flops(encoder.model, side)


def measure(backbone: str, shards: str, args: argparse.Namespace, limit: float, folder: Path) -> dict[str, Any]:
    resize = args.side * 256 // 224
    sizes = {"side": args.side, "resize": resize, "precision": args.precision}
    model = write_model(folder / backbone, shards, bits=64, backbone=backbone, **sizes).uri
    bare, flops = bare_pass(model, args.batch, args.rounds)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    flags = ("--workers", "1", "--set", f"encode.batch_size={args.batch}")
    begun, ended, tries = run_verb(shards, model, folder / f"{backbone}-codes", *flags)
    first = min(tries, key=lambda one: one["ended"])
    last = max(one["ended"] for one in tries)
    steady = (args.images - first["samples"]) / (last - first["ended"])
    whole = args.images / (ended - begun)
    return {
        "bench": "encode",
        "backbone": backbone,
        "side": args.side,
        "batch": args.batch,
        "images": args.images,
        "precision": args.precision,
        "bare": round(bare, 1),
        "steady": round(steady, 1),
        "whole": round(whole, 1),
        "steady / bare": round(steady / bare, 3),
        "whole / bare": round(whole / bare, 3),
        "gflop_per_image": round(flops / 1e9, 3),
        "tflop_per_s": {"bare": round(bare * flops / 1e12, 3), "steady": round(steady * flops / 1e12, 3)},
        "of_products": {"bare": round(bare * flops / limit, 4), "steady": round(steady * flops / limit, 4)},
        "seconds": {
            "to the first shard's end": round(first["ended"] - begun, 1),
            "all": round(ended - begun, 1),
            **{step: round(sum(one[step] for one in tries), 1) for step in ("forward", "decode")},
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", nargs="+", default=["hrnet_w18", "hrnet_w32"])
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--images", type=int, default=32768)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    limit = matrix_rate(args.precision)
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    row = {"bench": "products", "on": name, "precision": args.precision, "tflop_per_s": round(limit / 1e12, 3)}
    sys.stdout.write(json.dumps(row) + "\n")
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        folder = Path(scratch)
        write_photographs(folder / "photographs", args.images)
        config = load_config(sets=[f"ingest.samples_per_shard={-(-args.images // SHARDS)}"])
        shards = ingest(str(folder / "photographs"), str(folder / "shards"), config).uri
        for backbone in args.backbones:
            sys.stdout.write(json.dumps(measure(backbone, shards, args, limit, folder)) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
