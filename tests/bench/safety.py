"""P2: what digests, receipts and verification add to an encode, in CPU-seconds.

    python -m tests.bench.safety [--images 8192] [--rounds 5]

Two encodes of the same shards by the same decoder and network, each in a process of its own, rounds interleaved:

    safe    the verb: each sample checked by its sha256, parts named by theirs, fsync, receipts, manifest
    plain   the tars read by the webdataset library, the codes written by pyarrow, one Parquet per shard

Both run without Ray, whose own cost would hide the difference. The last line is JSON.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow.parquet as pq
import webdataset

from pipelines.artifacts.parquet import table_of
from pipelines.artifacts.tables import codes_schema
from pipelines.config.loading import load_config
from pipelines.encode.encode import encode
from pipelines.encode.encoder import Encoder, Encoding
from pipelines.encode.feed import Shaping, thread_batches
from pipelines.ingest.ingest import ingest
from pipelines.shards.shards import Record, Sample, open_shards
from tests.support.inline import InlinePool
from tests.support.models import write_model
from tests.support.pictures import write_folder

CLASSES = 8
SETTINGS = ("ingest.samples_per_shard=1024", "encode.batch_size=64", "data.workers=1", "encode.workers=1")


def safe(shards: str, model: str, out: str) -> None:
    """The verb, its pool in this process."""
    encode(shards, model, out, load_config(sets=SETTINGS), pool=InlinePool())


def plain(shards: str, model: str, out: str) -> None:
    """What one would write without any of it."""
    config = load_config(sets=SETTINGS)
    encoder = Encoder.open(model)
    opened = open_shards(shards)
    schema = codes_schema(encoder.bits, "0" * 64, opened.classes, {})
    Path(out).mkdir(parents=True)
    for shard in opened.shards:
        tar = webdataset.WebDataset(f"{shards}/{shard.part.path}", shardshuffle=False)
        samples = (
            Sample(
                Record(found["__key__"], shard.name, row, "", (int(found["cls"]),), ()),
                found.get("jpg") or found["png"],
            )
            for row, found in enumerate(tar)
        )
        size = config.encode.images_per_pass
        batches = thread_batches(samples, Shaping(encoder.preprocess, size, config.data.workers))
        encoded = Encoding(encoder, batches, size).finish()
        records = [sample.record for sample in encoded.kept]
        columns = {
            "key": [record.key for record in records],
            "shard": [record.shard for record in records],
            "row": [record.row for record in records],
            "path": [record.path for record in records],
            "code": [row.tobytes() for row in encoded.codes],
            "labels": [list(record.labels) for record in records],
        }
        pq.write_table(table_of(schema, columns), f"{out}/{shard.stem}.parquet")


def cpu_seconds(side: str, shards: str, model: str, out: Path) -> float:
    """CPU-seconds, user and system, of a process that encodes, its start and imports included."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, "-m", "tests.bench.safety", side, shards, model, str(out)],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def compare(images: int, rounds: int) -> dict[str, object]:
    """Both sides, `rounds` times in turns: medians of their CPU-seconds, and the ratio of each round."""
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        write_folder(folder / "images", classes=CLASSES, per_class=images // CLASSES, size=64)
        shards = str(ingest(str(folder / "images"), str(folder / "shards"), load_config(sets=SETTINGS)).uri)
        model = write_model(folder / "model", shards, bits=64).uri
        spent: dict[str, list[float]] = {"safe": [], "plain": []}
        for number in range(rounds):
            for side in ("safe", "plain") if number % 2 else ("plain", "safe"):
                spent[side].append(cpu_seconds(side, shards, model, folder / f"{side}-{number}"))
            sys.stderr.write(f"round {number}: " + ", ".join(f"{s} {t[-1]:.2f} s" for s, t in spent.items()) + "\n")
    medians = {side: round(statistics.median(times), 2) for side, times in spent.items()}
    return {
        "bench": "safety",
        "images": images,
        "rounds": rounds,
        "cpu_seconds": medians,
        "ratio": round(medians["safe"] / medians["plain"], 4),
        "ratios": [round(a / b, 4) for a, b in zip(spent["safe"], spent["plain"], strict=True)],
    }


if __name__ == "__main__":
    if sys.argv[1:2] in (["safe"], ["plain"]):
        {"safe": safe, "plain": plain}[sys.argv[1]](*sys.argv[2:5])
    else:
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--images", type=int, default=8192)
        parser.add_argument("--rounds", type=int, default=5)
        options = parser.parse_args()
        sys.stdout.write(json.dumps(compare(options.images, options.rounds)) + "\n")
