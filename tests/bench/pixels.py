"""How many images a second one core turns from JPEG bytes into the network's square, beside Pillow and simplejpeg.

    python -m tests.bench.pixels [--photos FOLDER] [--sides 32x32 533x400 1280x960 4000x3000] [--rounds 7]

Five ways in turns, in CPU-seconds of one thread: `exact` and `scaled` are this project's with either `data.decode`;
`pillow` is plain Pillow; `simplejpeg` decodes by simplejpeg and resizes by Pillow; `guarded` walks the container, then
decodes and resizes by Pillow, as this project did before. The photographs are those of FOLDER, else of scikit-image:
each is scaled and cut to the sides, so a small one makes a smooth large one, faster to decode than a photograph.
`difference` is that of `scaled` from `exact` in levels of 255: the mean over all, and over the worst photograph.
"""

import argparse
import io
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps
from simplejpeg import decode_jpeg
from skimage import data as shipped

from hhnet.preprocess import Preprocess
from pipelines.shards.containers import walk
from pipelines.shards.containers.limits import check_size
from pipelines.shards.images import STRIP_PIXELS, _to_pixels, decode_square

Pixels = npt.NDArray[np.uint8]
TURN_S = 0.2
"""Least CPU-seconds of a way in a round."""
QUALITY = 75


def photographs(folder: Path | None) -> list[Image.Image]:
    if folder is None:
        return [Image.fromarray(picture()) for picture in (shipped.coffee, shipped.chelsea, shipped.astronaut)]
    return [Image.open(path).convert("RGB") for path in sorted(folder.glob("*.jp*g"))]


def jpegs(photos: Sequence[Image.Image], width: int, height: int) -> list[bytes]:
    found = []
    for photo in photos:
        sink = io.BytesIO()
        ImageOps.fit(photo, (width, height), Image.Resampling.LANCZOS).save(sink, "JPEG", quality=QUALITY)
        found.append(sink.getvalue())
    return found


def by_pillow(pixels: Image.Image, rule: Preprocess) -> Pixels:
    side = min(pixels.size) * rule.size / rule.resize
    left, top = (pixels.width - side) / 2, (pixels.height - side) / 2
    square = (rule.size, rule.size)
    return np.array(pixels.resize(square, Image.Resampling.BILINEAR, box=(left, top, left + side, top + side)))


def guarded_pixels(data: bytes) -> Pixels:
    with Image.open(io.BytesIO(walk(data).data), formats=("JPEG",)) as image:
        check_size(*image.size)
        image.load()
        return _to_pixels(image, STRIP_PIXELS)


def ways(rule: Preprocess, exact: Preprocess) -> dict[str, Callable[[bytes], Pixels]]:
    return {
        "guarded": lambda data: by_pillow(Image.fromarray(guarded_pixels(data)), rule),
        "pillow": lambda data: by_pillow(Image.open(io.BytesIO(data)).convert("RGB"), rule),
        "simplejpeg": lambda data: by_pillow(Image.fromarray(decode_jpeg(data)), rule),
        "exact": lambda data: decode_square(data, exact)[0],
        "scaled": lambda data: decode_square(data, rule)[0],
    }


def seconds_per_image(way: Callable[[bytes], Pixels], sources: Sequence[bytes]) -> float:
    done, begun = 0, time.process_time()
    while (spent := time.process_time() - begun) < TURN_S or not done:
        for data in sources:
            way(data)
        done += len(sources)
    return spent / done


def measure(width: int, height: int, photos: Sequence[Image.Image], rounds: int) -> dict[str, object]:
    """One row: images a second of each way, and how many times as many as by the guarded Pillow."""
    size = 224 if min(width, height) > 64 else 32
    resize = 256 if size == 224 else size
    rule, exact = Preprocess(size=size, resize=resize), Preprocess(size=size, resize=resize, decode="exact")
    sources, found = jpegs(photos, width, height), ways(rule, exact)
    times: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(rounds + 1):
        for name, way in found.items():
            times[name].append(seconds_per_image(way, sources))
    medians = {name: statistics.median(spent[1:]) for name, spent in times.items()}  # the first round warms up
    differences = [np.abs(found["scaled"](data).astype(int) - found["exact"](data)).mean() for data in sources]
    return {
        "source": f"{width}x{height}",
        "size": size,
        "bytes": round(statistics.mean(map(len, sources))),
        "images_per_second": {name: round(1 / spent, 1) for name, spent in medians.items()},
        "speedup": {name: round(medians["guarded"] / spent, 2) for name, spent in medians.items()},
        "difference": [round(float(value), 2) for value in (np.mean(differences), max(differences))],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--sides", nargs="+", default=["32x32", "533x400", "1280x960", "4000x3000"])
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    photos = photographs(args.photos)
    for sides in args.sides:
        width, height = map(int, sides.split("x"))
        row = {"bench": "pixels", "photos": len(photos), **measure(width, height, photos, args.rounds)}
        sys.stdout.write(json.dumps(row) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
