"""CIFAR-10 from scratch on a GPU: the official split, trained, encoded and evaluated, with the seconds of each step.

    python -m tests.bench.gpu_recipe ROOT [--epochs 18]

ROOT holds CIFAR-10 as `hhnet ingest --protocol` takes it (docs/protocols.md). The settings are those of
docs/benchmarks/2026-11-26.md. With --rehearse the images are made up, and few, and all is done in this process, without
Ray; ROOT is left out.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipelines.cluster.ray_pool import Pool, ray_pool
from pipelines.cluster.session import kept_ray
from pipelines.config.loading import load_config
from pipelines.encode.encode import encode
from pipelines.evaluate.evaluate import evaluate
from pipelines.ingest.ingest import ingest
from pipelines.ingest.protocols import find_protocol
from pipelines.ingest.protocols.base import Protocol
from pipelines.ingest.protocols.cifar10 import CLASSES, Cifar10
from pipelines.train.train import train
from pipelines.train.worker import train_worker
from tests.support.inline import InlinePool
from tests.support.pictures import jpeg, picture

SETTINGS = {
    "data.batch_size": 500,
    "data.image_size": 32,
    "model.backbone": "hrnet_w18_small",
    "model.precision": "bf16",
    "model.stem_stride": 1,
    "train.ema_decay": 0.995,
    "train.lr": 0.002,
    "train.val_every": 12,
    "train.val_limit": 1000,
    "train.val_share": 0.02,
}
TINY_SETTINGS = {"data.batch_size": 20, "model.backbone": "test_resnet", "model.stem_stride": 4, "train.val_share": 0.2}
TINY = Cifar10(name="cifar10-2", parts={"train": 100, "query": 20}, database=("train",), official=True, batch=20)


def write_tiny(root: Path) -> None:
    """Pictures in the folders of CIFAR-10, as many as TINY has."""
    for part, each in (("train", 10), ("test", 2)):
        for klass, name in enumerate(CLASSES):
            folder = root / part / name
            folder.mkdir(parents=True)
            for number in range(each):
                (folder / f"{number}.jpg").write_bytes(jpeg(picture(klass, number, seed=len(part))))


def recipe(
    root: Path,
    protocol: Protocol,
    settings: dict[str, Any],
    folder: Path,
    pool: Pool = ray_pool,
    run: Callable[..., None] | None = None,
) -> dict[str, Any]:
    config = load_config(sets=[f"{name}={value}" for name, value in settings.items()])
    places = {name: str(folder / name) for name in ("shards", "model", "query", "train", "report")}
    seconds: dict[str, float] = {}

    def timed(step: str, work: Callable[[], Any]) -> Any:
        begun = time.perf_counter()
        found = work()
        seconds[step] = round(time.perf_counter() - begun, 1)
        return found

    def encode_all() -> None:
        for part in ("query", "train"):
            encode(f"{places['shards']}/{part}", places["model"], places[part], config, pool=pool)

    timed("ingest", lambda: ingest(str(root), places["shards"], config, protocol=protocol))
    with kept_ray():
        model = timed("train", lambda: train(f"{places['shards']}/train", places["model"], config, run=run))
        timed("encode", encode_all)
    report = timed("evaluate", lambda: evaluate(places["query"], [places["train"]], places["report"], config))
    images = protocol.parts["train"] * (1 - config.train.val_share) * config.train.epochs
    return {
        "bench": "recipe",
        "backbone": config.model.backbone,
        "epochs": config.train.epochs,
        "best epoch": model.epoch,
        "map": round(report.map, 4),
        "chance": round(report.chance, 4),
        "queries": report.queries,
        "database": report.database,
        "training images/s, whole": round(images / seconds["train"], 1),
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, nargs="?")
    parser.add_argument("--epochs", type=int, default=18)
    parser.add_argument("--rehearse", action="store_true")
    args = parser.parse_args()
    if (args.root is None) != args.rehearse:
        parser.error("give either ROOT or --rehearse")
    settings = {**SETTINGS, "train.epochs": args.epochs}
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        folder = Path(scratch)
        if args.rehearse:
            write_tiny(folder / "pictures")
            row = recipe(
                *(folder / "pictures", TINY, settings | TINY_SETTINGS, folder),
                pool=InlinePool(),
                run=lambda job, data, log: train_worker(job, lambda step, note: None),
            )
        else:
            row = recipe(args.root, find_protocol("cifar10-2"), settings, folder)
    sys.stdout.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
