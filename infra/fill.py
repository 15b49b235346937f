"""Fills a bucket or a folder for a first run: `python fill.py s3://hhnet/photos`, `python fill.py /data`.

Makes the bucket if there is none, draws a few hundred pictures, and ingests them as the shards `train`, `query` and
`database` below shards/. A second call finds everything done.
"""

import random
import subprocess
import sys
import tempfile
from pathlib import Path

import s3fs
from PIL import Image, ImageDraw

SHAPES = ("disc", "frame", "stripes")
"""Classes of the pictures."""
EACH = 100
"""Pictures of a class."""
SIDE = 48
"""Width and height of a picture in pixels."""


def draw_picture(shape: str, rng: random.Random) -> Image.Image:
    """Draw one shape of random colours, place and size."""
    back, front = (tuple(rng.randrange(low, low + 110) for _ in range(3)) for low in (0, 130))
    picture = Image.new("RGB", (SIDE, SIDE), back)
    pen = ImageDraw.Draw(picture)
    size = rng.randrange(18, 34)
    left, top = rng.randrange(2, SIDE - size - 2), rng.randrange(2, SIDE - size - 2)
    box = (left, top, left + size, top + size)
    if shape == "disc":
        pen.ellipse(box, fill=front)
    elif shape == "frame":
        pen.rectangle(box, outline=front, width=5)
    else:
        for x in range(left, left + size, 8):
            pen.rectangle((x, top, x + 3, top + size), fill=front)
    return picture


def fill(uri: str) -> int:
    """Make shards below a URI, and its bucket before; return the exit code of the ingest."""
    if uri.startswith("s3://"):
        bucket = uri.removeprefix("s3://").partition("/")[0]
        store = s3fs.S3FileSystem()
        if not store.exists(bucket):
            store.mkdir(bucket)
    rng = random.Random(0)  # noqa: S311  # draws pictures
    with tempfile.TemporaryDirectory() as scratch:
        for shape in SHAPES:
            folder = Path(scratch) / "pictures" / shape
            folder.mkdir(parents=True)
            for number in range(EACH):
                draw_picture(shape, rng).save(folder / f"{number:03}.png")
        words = ["ingest", f"{scratch}/pictures", "--out", f"{uri}/shards", "--split", "train=.6,query=.1,database=.3"]
        return subprocess.run([sys.executable, "-m", "pipelines", *words]).returncode


if __name__ == "__main__":
    sys.exit(fill(sys.argv[1]))
