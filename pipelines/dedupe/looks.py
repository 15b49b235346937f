"""The look of a picture: a perceptual hash and a thumbnail, by which a file that was saved again is recognised.

The hash is the DCT hash of pHash (C. Zauner, Implementation and Benchmarking of Perceptual Image Hash Functions, 2010):
64 low frequencies of the grey picture of 32 x 32 pixels, each above or below their median. Two pictures of one motif
can share it, so the thumbnails are compared too. The hash of a nearly constant picture is noise; there the thumbnails
alone decide, within narrower limits.

docs/dedupe.md has the measurement behind the limits.
"""

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipelines.shards.containers.limits import ImageReject
from pipelines.shards.images import decode_image

THUMB_SIDE = 16
MAX_HASH_DISTANCE = 8
"""Largest number of bits in which the hashes of pictures that look alike differ."""
MAX_MEAN_DIFFERENCE, MAX_DIFFERENCE = 6.0, 40
"""Largest difference of their thumbnails' bytes: the mean, and that of a single one."""
MAX_MEAN_SHARE = 0.12
"""Largest mean difference as a share of the contrast, by which pages of text are told apart."""
FLAT_CONTRAST = 4.0
"""Contrast below which a hash is noise: the standard deviation of the grey picture, of 255."""
MAX_FLAT_MEAN_DIFFERENCE, MAX_FLAT_DIFFERENCE = 2.0, 6
"""The same limits where one of the two pictures is nearly constant."""

UNKNOWN, FILE_KNOWN, SEEN = 0, 1, 2
"""What is known of a sample: nothing, the sha256 of its file, or its look as well."""

LOOK = np.dtype(
    [
        ("known", np.uint8),
        ("sha256", np.uint8, 32),
        ("contrast", np.float32),
        ("mean", np.float32),
        ("hash", np.uint64),
        ("thumb", np.uint8, 3 * THUMB_SIDE**2),
    ]
)
"""One sample: what is known, the sha256 of its file, and its look; `mean` is that of its thumbnail's bytes."""

Looks = npt.NDArray[np.void]

_SIDE, _FREQUENCIES = 32, slice(1, 9)
_PLACES = np.arange(_SIDE)
_DCT = np.cos(np.pi * (2 * _PLACES + 1) * _PLACES[:, None] / (2 * _SIDE))


def look_of(sha256: bytes, data: bytes) -> Looks:
    """Return the look of an image file as an array of one; only its sha256 is known where it does not decode."""
    look = np.zeros(1, LOOK)
    look["known"], look["sha256"] = FILE_KNOWN, np.frombuffer(sha256, np.uint8)
    try:
        image = Image.fromarray(decode_image(data))
    except ImageReject:
        return look
    grey = np.asarray(image.convert("L").resize((_SIDE, _SIDE), Image.Resampling.BOX), np.float64)
    low = (_DCT @ grey @ _DCT.T)[_FREQUENCIES, _FREQUENCIES].ravel()
    thumb = np.asarray(image.resize((THUMB_SIDE, THUMB_SIDE), Image.Resampling.BOX)).ravel()
    look["known"], look["contrast"] = SEEN, grey.std()
    look["mean"], look["thumb"] = thumb.mean(), thumb
    look["hash"] = np.packbits(low > np.median(low)).view(np.uint64)
    return look


def mark_candidates(facts: npt.NDArray[np.void], look: np.void) -> npt.NDArray[np.bool_]:
    """Mark those of some pictures that may look like one, given hash, mean and contrast of each."""
    near = np.bitwise_count(facts["hash"] ^ look["hash"]) <= MAX_HASH_DISTANCE
    flat = np.minimum(facts["contrast"], look["contrast"]) < FLAT_CONTRAST
    # The means of two thumbnails differ by no more than their bytes do on average; float32 rounds.
    close = np.abs(facts["mean"] - look["mean"]) <= MAX_MEAN_DIFFERENCE + 0.01
    marks: npt.NDArray[np.bool_] = (near | flat) & close
    return marks


def mark_alike(looks: Looks, look: np.void) -> npt.NDArray[np.bool_]:
    """Mark those of some looks that are alike to one."""
    differences = np.abs(looks["thumb"].astype(np.int16) - look["thumb"])
    mean, most = differences.mean(1), differences.max(1)
    contrast = np.minimum(looks["contrast"], look["contrast"])
    near = np.bitwise_count(looks["hash"] ^ look["hash"]) <= MAX_HASH_DISTANCE
    close = near & (mean <= np.minimum(MAX_MEAN_DIFFERENCE, MAX_MEAN_SHARE * contrast)) & (most <= MAX_DIFFERENCE)
    flat = (mean <= MAX_FLAT_MEAN_DIFFERENCE) & (most <= MAX_FLAT_DIFFERENCE)
    marks: npt.NDArray[np.bool_] = np.where(contrast < FLAT_CONTRAST, flat, close)
    return marks
