"""From untrusted bytes to pixels: a guarded decoder that either returns RGB or says why not, and a pool to run it."""

import io
import queue
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from pipelines.schema import Reason

T = TypeVar("T")
R = TypeVar("R")

FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
MAX_BYTES = 64 << 20
MAX_PIXELS = 64_000_000
MAX_ASPECT = 200

# Pillow only warns between one and two times its own ceiling; here the first is already an error.
Image.MAX_IMAGE_PIXELS = MAX_PIXELS
warnings.simplefilter("error", Image.DecompressionBombWarning)


class ImageReject(Exception):
    """The bytes do not become pixels, for `reason`."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, " ".join(detail.split())[:200]


def decode_image(data: bytes) -> npt.NDArray[np.uint8]:
    """Decode image bytes to RGB, uint8 (H, W, 3), upright by EXIF.

    CMYK and palette images are converted, 16-bit grey is scaled to 8 bits, transparency lies on white.
    Raises ImageReject and nothing else.
    """
    if len(data) > MAX_BYTES:
        raise ImageReject(Reason.TOO_LARGE, f"{len(data)} bytes, the limit is {MAX_BYTES}")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_header(image)
            image.load()
            return np.asarray(_to_rgb(ImageOps.exif_transpose(image)), dtype=np.uint8)
    except ImageReject:
        raise
    except UnidentifiedImageError:
        raise ImageReject(Reason.NOT_AN_IMAGE, f"none of {', '.join(FORMATS)}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageReject(Reason.TOO_LARGE, str(error)) from None
    except OSError as error:
        truncated = "truncated" in str(error) or "broken data stream" in str(error)
        raise ImageReject(Reason.TRUNCATED if truncated else Reason.UNDECODABLE, str(error)) from None
    except Exception as error:  # Pillow's plugins let many types through on bad bytes; none may end a run
        raise ImageReject(Reason.UNDECODABLE, f"{type(error).__name__}: {error}") from None


def _check_header(image: Image.Image) -> None:
    """Refuse by what the header declares, before any pixel is decoded."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageReject(Reason.TOO_LARGE, f"{width} x {height} pixels, the limit is {MAX_PIXELS}")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageReject(Reason.TOO_LARGE, f"{width} x {height} is more elongated than {MAX_ASPECT}:1")
    # MPO is what phones write: a JPEG whose further pictures are previews of the first.
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
        raise ImageReject(Reason.TOO_LARGE, "more than one frame")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode == "I":
        deep = np.asarray(image, dtype=np.int64)
        return Image.fromarray((deep.clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        layered = image.convert("RGBA")
        ground = Image.new("RGBA", layered.size, (255, 255, 255, 255))
        return Image.alpha_composite(ground, layered).convert("RGB")
    return image.convert("RGB")


def decode_ahead(items: Iterable[T], work: Callable[[T], R], threads: int, limit: int) -> Iterator[R]:
    """`work(item)` for each item, in order, computed by `threads` threads at most `limit` items ahead.

    The items are drawn in a thread of their own, so reading, decoding and what the caller does with the results
    run side by side. An exception of `items` or `work` is raised at its place in the order.
    """
    results: queue.Queue[Future[R] | BaseException | None] = queue.Queue(maxsize=limit)
    stopped = threading.Event()

    def put(entry: Future[R] | BaseException | None) -> None:
        while not stopped.is_set():
            try:
                results.put(entry, timeout=0.1)
            except queue.Full:
                continue
            return

    def produce() -> None:
        try:
            for item in items:
                put(pool.submit(work, item))
                if stopped.is_set():
                    return
            put(None)
        except BaseException as error:
            put(error)

    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        producer = threading.Thread(target=produce, name="read", daemon=True)
        producer.start()
        try:
            while (entry := results.get()) is not None:
                if isinstance(entry, BaseException):
                    raise entry
                yield entry.result()
        finally:
            stopped.set()
            producer.join()
