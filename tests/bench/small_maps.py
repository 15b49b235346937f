"""How much faster a backbone trains and encodes small images than the timm network it is made of.

    python -m tests.bench.small_maps [--backbone hrnet_w18_small] [--side 32] [--batch 64] [--rounds 5]

Both have the same weights and see the same images, in turns; the ratio is that of the medians of their seconds.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable

import timm
import torch
from torch import nn

from hhnet.nn.backbones import Backbone


def seconds(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def train(net: nn.Module, x_BCHW: torch.Tensor) -> None:
    net.train()
    net.zero_grad(set_to_none=True)
    net(x_BCHW).sum().backward()


def encode(net: nn.Module, x_BCHW: torch.Tensor) -> None:
    net.eval()
    with torch.inference_mode():
        net(x_BCHW)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="hrnet_w18_small")
    parser.add_argument("--side", type=int, default=32)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    mine = Backbone(args.backbone)
    theirs = timm.create_model(args.backbone, num_classes=0)
    theirs.load_state_dict(mine.net.state_dict())
    x_BCHW = torch.rand(args.batch, 3, args.side, args.side)
    result: dict[str, object] = {"bench": "small_maps", **vars(args), "threads": torch.get_num_threads()}
    for work in (train, encode):
        times: dict[str, list[float]] = {"mine": [], "theirs": []}
        for _ in range(args.rounds + 1):
            times["mine"].append(seconds(lambda work=work: work(mine, x_BCHW)))  # type: ignore[misc]
            times["theirs"].append(seconds(lambda work=work: work(theirs, x_BCHW)))  # type: ignore[misc]
        medians = {who: statistics.median(found[1:]) for who, found in times.items()}  # the first round warms up
        result[f"{work.__name__}_speedup"] = round(medians["theirs"] / medians["mine"], 2)
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
