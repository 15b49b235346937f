"""From untrusted bytes to pixels: a guarded decoder that returns RGB or a reason to refuse, and a pool to run it.

A decoder sees only the bytes that make pixels: `pipelines.shards.containers` has walked the file first. simplejpeg
decodes the usual JPEGs, faster than Pillow and to the same pixels; Pillow decodes all else, and all that simplejpeg
refuses or warns of. So each file becomes what Pillow makes of it.
"""

import functools
import io
import queue
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import AvifImagePlugin, Image, UnidentifiedImageError
from simplejpeg import decode_jpeg, decode_jpeg_header

from pipelines.artifacts.tables import Reason
from pipelines.shards.containers import walk
from pipelines.shards.containers.limits import MAX_PIXELS, ImageReject, check_size

if TYPE_CHECKING:  # imports torch, which not all that read pictures need
    from hhnet.preprocess import Preprocess

T = TypeVar("T")
R = TypeVar("R")

MAX_IMAGE_BYTES = 64 << 20
"""Largest image file that is decoded, in bytes."""
STRIP_PIXELS = 4 << 20
"""Pixels converted to RGB at a time, which bounds the memory of the conversion."""

# Pillow only warns between one and two times its own ceiling; here the first is already an error.
Image.MAX_IMAGE_PIXELS = MAX_PIXELS
warnings.simplefilter("error", Image.DecompressionBombWarning)
AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # pictures are decoded side by side already

_TURNS = {
    2: (False, 1, -1),
    3: (False, -1, -1),
    4: (False, -1, 1),
    5: (True, 1, 1),
    6: (True, 1, -1),
    7: (True, -1, -1),
    8: (True, -1, 1),
}
"""Steps that turn each EXIF orientation upright: whether to swap the axes, then the step along rows and columns."""


@dataclass(frozen=True, slots=True)
class Decoded:
    """A picture: RGB, uint8 (H, W, 3), upright. `animated`: it is the first of several frames."""

    pixels: npt.NDArray[np.uint8]
    animated: bool


def decode_square(data: bytes, preprocess: "Preprocess") -> tuple[npt.NDArray[np.uint8], bool]:
    """Decode image bytes to the network's square, uint8 (S, S, 3), and say whether there are further frames.

    Raises ImageReject and nothing else.
    """
    decoded = decode_picture(data, preprocess.least_side)
    return preprocess.resize_crop(decoded.pixels), decoded.animated


def decode_image(data: bytes, least_side: int = 0) -> npt.NDArray[np.uint8]:
    """Decode image bytes to RGB, uint8 (H, W, 3), upright by EXIF; of an animation, the first frame.

    CMYK and palette images are converted, 16-bit grey is scaled to 8 bits, transparency lies on white. With
    `least_side`, a usual JPEG is decoded at the smallest of the scales 1, 1/2, 3/8, 1/4 and 1/8 that leaves its shorter
    side at least so long. Raises ImageReject and nothing else.
    """
    return decode_picture(data, least_side).pixels


def decode_picture(data: bytes, least_side: int = 0, strip_pixels: int = STRIP_PIXELS) -> Decoded:
    """Decode as `decode_image` does, in strips of so many pixels, and say whether there are further frames."""
    if len(data) > MAX_IMAGE_BYTES:
        raise ImageReject(Reason.TOO_LARGE, f"{len(data)} bytes, the limit is {MAX_IMAGE_BYTES}")
    try:
        picture = walk(data)
        if picture.plain and (pixels := _decode_plain(picture.data, least_side)) is not None:
            return Decoded(_upright(pixels, picture.orientation), picture.animated)
        if picture.format == "HEIF":
            _register_heif()
        with Image.open(io.BytesIO(picture.data), formats=(picture.format,)) as image:
            check_size(*image.size)
            # For AVIF, Pillow reports the rotation stated by the container as if it were the EXIF orientation.
            turn = image.getexif().get(0x0112, 1) if picture.format == "AVIF" else picture.orientation
            image.load()
            pixels = _to_pixels(image, strip_pixels)
        return Decoded(_upright(pixels, turn), picture.animated)
    except ImageReject:
        raise
    except UnidentifiedImageError:
        raise ImageReject(Reason.UNDECODABLE, f"not a {picture.format} beyond its first bytes") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageReject(Reason.TOO_LARGE, str(error)) from None
    except OSError as error:
        truncated = "truncated" in str(error) or "broken data stream" in str(error)
        raise ImageReject(Reason.TRUNCATED if truncated else Reason.UNDECODABLE, str(error)) from None
    except Exception as error:  # Pillow's plugins let many types through on bad bytes; none may end a run
        raise ImageReject(Reason.UNDECODABLE, f"{type(error).__name__}: {error}") from None


def _decode_plain(data: bytes, least_side: int) -> npt.NDArray[np.uint8] | None:
    """Decode a usual JPEG; return None for one that Pillow has to decode or to reject."""
    try:
        height, width, *_ = decode_jpeg_header(data)
        check_size(int(width), int(height))
        # The scales 5/8, 3/4 and 7/8 take longer than full size.
        pixels: npt.NDArray[np.uint8] = decode_jpeg(data, min_height=least_side, min_width=least_side, min_factor=2)
    except (ValueError, KeyError, ImageReject):  # KeyError: a subsampling that has no name
        return None
    return pixels


@functools.cache
def _register_heif() -> None:
    """Let Pillow read HEIC; raise ImageReject if the extra is not installed."""
    try:
        import pi_heif
    except ImportError:
        raise ImageReject(Reason.NOT_AN_IMAGE, "HEIC, which needs the extra: pip install 'hhnet[heic]'") from None
    pi_heif.register_heif_opener(thumbnails=False, decode_threads=1)


def _to_pixels(image: Image.Image, strip_pixels: int) -> npt.NDArray[np.uint8]:
    """Return the RGB of a loaded picture, converted strip by strip.

    Converted at once, a large picture would be held four times over.
    """
    width, height = image.size
    rows = max(1, strip_pixels // width)
    if rows >= height:
        return np.asarray(_to_rgb(image), dtype=np.uint8)
    pixels = np.empty((height, width, 3), np.uint8)
    for top in range(0, height, rows):
        strip = image.crop((0, top, width, min(top + rows, height)))
        pixels[top : top + rows] = np.asarray(_to_rgb(strip), dtype=np.uint8)
    return pixels


def _upright(pixels: npt.NDArray[np.uint8], orientation: int) -> npt.NDArray[np.uint8]:
    if orientation not in _TURNS:
        return pixels
    swapped, row_step, column_step = _TURNS[orientation]
    turned = pixels.swapaxes(0, 1) if swapped else pixels
    return np.ascontiguousarray(turned[::row_step, ::column_step])


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):  # as "I" of 32 bits, Pillow opens a PGM of 16 bits
        # Pillow's own conversion would clip 16-bit grey at 255 instead of scaling it.
        return Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        layered = image.convert("RGBA")
        # A plain convert("RGB") would show the colours that a file keeps under its transparent pixels.
        ground = Image.new("RGBA", layered.size, (255, 255, 255, 255))
        return Image.alpha_composite(ground, layered).convert("RGB")
    if image.mode not in ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr"):
        raise ImageReject(Reason.UNDECODABLE, f"no conversion from {image.mode} to RGB is defined")
    return image.convert("RGB")


# ---------------------------------------------------------------------------------------------------- in parallel


def decode_ahead(items: Iterable[T], work: Callable[[T], R], threads: int, limit: int) -> Iterator[R]:
    """Yield `work(item)` for each item, in order, computed by `threads` threads at most `limit` items ahead.

    The items are drawn in a thread of their own, so reading, decoding and the caller's own work run side by side. An
    exception of `items` or `work` is raised at its place in the order.
    """
    results: queue.Queue[Future[R] | BaseException | None] = queue.Queue(maxsize=limit)
    stopped = threading.Event()

    def put(entry: Future[R] | BaseException | None) -> None:
        # With a timeout: nobody empties the queue after the caller gave up, and this thread must still end.
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
