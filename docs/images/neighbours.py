"""Draws the picture of README from a finished demo: one query of each of six classes and its nearest neighbours.

python docs/images/neighbours.py hhnet-demo docs/images/neighbours.png
"""

import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import rc_context
from matplotlib.figure import Figure
from PIL import Image

from pipelines.artifacts.manifest import open_artifact
from pipelines.config.settings import Config
from pipelines.encode.codes import open_codes
from pipelines.search.search import search
from pipelines.shards.shards import ShardSet, open_shards

WIDTH, HEIGHT = 900, 500  # pixels
ROWS, NEIGHBOURS = 6, 10
TILE, GAP = 58, 10  # pixels
SIDE, TOP = 118, 74  # pixels: the place of the first tile
BOX = {"facecolor": "#1f2933", "edgecolor": "none", "pad": 1.5}
RIGHT, WRONG, INK, PALE = "#2f6fe0", "#d9730d", "#1f2933", "#5b6673"


def first_of_each_class(codes: str) -> list[dict[str, Any]]:
    """The first stored sample of each of the first classes: key, shard, row, code and label."""
    entry = open_codes(codes)
    seen: dict[int, dict[str, Any]] = {}
    for table in entry.tables():
        for row in table.to_pylist():
            seen.setdefault(row["labels"][0], row)
    return [{**seen[label], "label": entry.classes[label]} for label in sorted(seen)[:ROWS]]


def picture_of(shards: Sequence[ShardSet], name: str, row: int) -> npt.NDArray[np.uint8]:
    """The RGB pixels of a sample, enlarged to a tile."""
    for entry in shards:
        for shard in entry.shards:
            if shard.name == name:
                (sample,) = entry.read(shard, [row])
                return np.asarray(Image.open(io.BytesIO(sample.image)).convert("RGB").resize((2 * TILE, 2 * TILE)))
    raise SystemExit(f"no shards of this demo hold {name}")


def main(demo: str, out: str) -> None:
    """Draw the picture of the demo in the folder `demo` into the file `out`."""
    queries = first_of_each_class(f"{demo}/codes/query")
    index = open_artifact(f"{demo}/index")
    found = search(f"{demo}/index", Config(), hex_codes=[query["code"].hex() for query in queries], k=NEIGHBOURS)
    shards = [open_shards(str(path)) for path in sorted(Path(demo, "shards").iterdir()) if path.is_dir()]
    (metrics,) = Path(demo, "reports").glob("*/parts/metrics-*.json")
    figures = json.loads(metrics.read_text())
    with rc_context({"font.family": "DejaVu Sans", "text.color": INK}):
        figure = Figure(figsize=(WIDTH / 100, HEIGHT / 100), facecolor="white")

        def write(x: float, y: float, text: str, size: float, colour: str = INK, **more: Any) -> None:
            figure.text(x / WIDTH, 1 - y / HEIGHT, text, fontsize=size, color=colour, **more)

        def show(x: float, y: float, pixels: npt.NDArray[np.uint8], colour: str) -> None:
            axes = figure.add_axes((x / WIDTH, 1 - (y + TILE) / HEIGHT, TILE / WIDTH, TILE / HEIGHT))
            axes.imshow(pixels)
            axes.set(xticks=[], yticks=[])
            for spine in axes.spines.values():
                spine.set(color=colour, linewidth=2.2)

        bits = 8 * len(queries[0]["code"])
        write(16, 30, f"Nearest of {index.manifest.totals['codes']:,} images by {bits}-bit codes", 15, weight="bold")
        write(16, 54, f"Fashion-MNIST, mAP {figures['map']:.3f} (chance {figures['chance']:.3f})", 10, PALE)
        write(346, 54, "same class", 10, RIGHT, weight="bold")
        write(442, 54, "another class", 10, WRONG, weight="bold")
        write(562, 54, "the number is the distance in bits", 10, PALE)
        for place, (query, result) in enumerate(zip(queries, found.results, strict=True)):
            y = TOP + place * (TILE + GAP)
            write(16, y + TILE / 2, query["label"].replace("_", " "), 9, PALE, va="center")
            show(SIDE, y, picture_of(shards, query["shard"], query["row"]), "#b8c0ca")
            for rank, neighbour in enumerate(result["neighbours"]):
                x = SIDE + TILE + 30 + rank * (TILE + GAP)
                right = query["label"] in neighbour["labels"]
                show(x, y, picture_of(shards, neighbour["shard"], neighbour["row"]), RIGHT if right else WRONG)
                write(x + TILE - 3, y + TILE - 4, str(neighbour["distance"]), 8, "white", ha="right", bbox=BOX)
        figure.savefig(out, dpi=100, metadata={"Software": None})


if __name__ == "__main__":
    main(*sys.argv[1:])
