"""The scripts that one would write without this project: shards and a model to packed codes in Parquet, on CPUs.

    python -m tests.bench.feed_peers webdataset|ray SHARDS MODEL OUT WORKERS LOADERS

Both read the tars of a shards artifact, decode by Pillow, resize and crop by torchvision, and run the same network at
the same precision on one thread in each of WORKERS processes. `webdataset` is started as torchrun does it: each process
takes its share of the tars, with LOADERS processes of a DataLoader. `ray` is Ray Data with one actor for each worker.
It fuses the decoding with the network in the actors; Ray is told of twice the CPUs, so that its tasks which read and
write find room beside them.
"""

import io
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet
import torch
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, Resize

from hhnet.preprocess import Preprocess
from pipelines.artifacts.facts import ModelCard
from pipelines.artifacts.manifest import open_artifact
from pipelines.encode.encoder import Encoder, autocast

BATCH = 64


def shaping(rule: Preprocess) -> Callable[[bytes], npt.NDArray[np.uint8]]:
    """From the bytes of an image to the network's square, by Pillow and torchvision."""
    shape = Compose([Resize(rule.resize), CenterCrop(rule.size)])
    return lambda data: np.asarray(shape(Image.open(io.BytesIO(data)).convert("RGB")))


class Network:
    """A model on one thread; from squares to a table of keys and codes."""

    def __init__(self, model: str) -> None:
        torch.set_num_threads(1)
        opened = Encoder.open(model)
        self.network, self.rule, self.precision = opened.model, opened.preprocess, opened.precision

    def codes(self, keys: Sequence[str], squares: torch.Tensor) -> pa.Table:
        with torch.inference_mode(), autocast(squares.device, self.precision):
            outputs = self.network(self.rule.normalise(squares)).float()
        codes = np.packbits(outputs.numpy() > 0, axis=1, bitorder="little")
        return pa.table({"key": list(keys), "code": [row.tobytes() for row in codes]})

    def __call__(self, batch: dict[str, Any]) -> pa.Table:
        return self.codes(batch["key"].tolist(), torch.from_numpy(batch["square"]))


def by_webdataset(tars: list[str], model: str, out: str, loaders: int) -> None:
    import webdataset

    network = Network(model)
    shaped = shaping(network.rule)
    images = (
        webdataset.WebDataset(tars, shardshuffle=False, nodesplitter=webdataset.split_by_node, empty_check=False)
        .map(lambda sample: (sample["__key__"], shaped(sample["jpg"])))
        .batched(BATCH)
    )
    loader = torch.utils.data.DataLoader(images, batch_size=None, num_workers=loaders)
    tables = [network.codes(keys, squares) for keys, squares in loader]
    if tables:
        pyarrow.parquet.write_table(pa.concat_tables(tables), Path(out, f"{os.environ['RANK']}.parquet"))


def by_ray_data(tars: list[str], model: str, out: str, workers: int) -> None:
    import ray

    shaped = shaping(Preprocess.from_dict(ModelCard.of(open_artifact(model, "model")).preprocess))
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:
        quiet: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
        ray.init(address="local", num_cpus=2 * workers, _temp_dir=folder, **quiet)
        ray.data.DataContext.get_current().enable_progress_bars = False
        (
            ray.data.read_webdataset(tars, decoder=None, suffixes=["jpg"])
            .map(lambda sample: {"key": sample["__key__"], "square": shaped(sample["jpg"])})
            .map_batches(
                Network,
                fn_constructor_args=(model,),
                batch_size=BATCH,
                compute=ray.data.ActorPoolStrategy(size=workers),
                num_cpus=1,
            )
            .write_parquet(out)
        )
        ray.shutdown()


PEERS = {"webdataset": by_webdataset, "ray": by_ray_data}


def run_peer(peer: str, shards: str, model: str, out: Path, workers: int, loaders: int) -> float:
    """Run a peer in processes of its own; return the seconds from their start to their end."""
    out.mkdir()
    words = [sys.executable, "-m", "tests.bench.feed_peers", peer, shards, model, str(out), str(workers), str(loaders)]
    ranks = workers if peer == "webdataset" else 1
    shared = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(ranks), "RAY_USAGE_STATS_ENABLED": "0"}
    log = out.with_suffix(".log")
    with log.open("w") as said:
        begun = time.perf_counter()
        running = [
            subprocess.Popen(words, env={**shared, "RANK": str(rank)}, stdout=said, stderr=said)
            for rank in range(ranks)
        ]
        ended = [process.wait() for process in running]
        seconds = time.perf_counter() - begun
    if any(ended):
        sys.exit(f"{log.read_text()}\nthe peer {peer} ended with {ended}: see above what it wrote")
    return seconds


def equal_bits(codes: Path, others: Path) -> float:
    """Return the share of bits that are equal in two folders of codes of the same images."""
    tables = [
        pyarrow.dataset.dataset(folder, format="parquet").to_table(["key", "code"]).sort_by("key")
        for folder in (codes, others)
    ]
    assert tables[0]["key"].equals(tables[1]["key"]), f"{others} does not hold the images of {codes}, each once"
    one, other = (np.frombuffer(b"".join(table["code"].to_pylist()), np.uint8) for table in tables)
    return 1 - float(np.bitwise_count(one ^ other).mean()) / 8


if __name__ == "__main__":
    peer, shards, model, out, workers, loaders = sys.argv[1:]
    tars = sorted(map(str, Path(shards).rglob("*.tar")))
    PEERS[peer](tars, model, out, int(loaders if peer == "webdataset" else workers))
