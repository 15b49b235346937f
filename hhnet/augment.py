"""Training augmentation on uint8 images, before `Preprocess.normalise`.

The random numbers of a sample depend on (seed, epoch, key) alone, so the augmented image is the same
whichever worker makes it and in whatever order.

`trivial_augment` is TrivialAugment: one operation of fourteen at one strength of 31, both drawn evenly, and nothing to
tune. Müller and Hutter 2021, "TrivialAugment: Tuning-free Yet State-of-the-Art Data Augmentation", in their wide space
of strengths. Operations and strengths are torchvision's; its own class draws from the global generator of torch, so
that what becomes of an image would depend on the thread and the moment.

Shape suffixes: H height, W width, S side of the result, N squares of a set, B images of a batch.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as ops

from hhnet.preprocess import check_image, resample

AUGMENTATIONS = ("crop_flip", "resized_crop", "none")
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601
_CROP_TRIES = 10  # windows drawn for "resized_crop" before the largest square is taken

_Image = npt.NDArray[np.uint8]


def sample_rng(seed: int, epoch: int, key: str) -> np.random.Generator:
    """Return the random generator of one sample in one epoch: Philox, keyed by a hash of the three arguments."""
    # NUL between the parts, so that (1, 23) and (12, 3) do not make one text.
    digest = hashlib.blake2b(f"{seed}\0{epoch}\0{key}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest, np.uint64)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Augment:
    """Random crop, mirror image, colour and erasing.

    Attributes:
        size: side S of the result, in pixels.
        kind: "crop_flip" = a random S x S window, after reflecting `padding` pixels on each side if the image
            is no larger than S (He et al. 2015, section 4.2), and a mirror image every second time;
            "resized_crop" = a random window of whole pixels, of `area` of the image and of side ratio 3/4 to
            4/3, resampled to S x S (Szegedy et al. 2015), and the mirror image; "none" = the centre.
        padding: pixels, for "crop_flip".
        area: least and largest share of the image, for "resized_crop".
        jitter: brightness, contrast and saturation are each scaled by a factor from 1 - jitter to 1 + jitter.
        erase: probability of filling a random rectangle of 2 to 25 per cent of the area with the mean colour
            (random erasing, Zhong et al. 2017).
    """

    size: int
    kind: str = "crop_flip"
    padding: int = 4
    area: tuple[float, float] = (0.25, 1.0)
    jitter: float = 0.0
    erase: float = 0.0

    def __post_init__(self) -> None:
        """Raise ValueError for values outside their range."""
        if self.size < 1 or self.padding < 0:
            raise ValueError(f"size must be above 0, padding not below: got {self.size} and {self.padding}")
        if self.kind not in AUGMENTATIONS:
            raise ValueError(f"kind must be one of {', '.join(AUGMENTATIONS)}: got {self.kind!r}")
        if not 0 < self.area[0] <= self.area[1] <= 1:
            raise ValueError(f"area must be two shares, 0 < least <= largest <= 1: got {self.area}")
        if not (0 <= self.jitter < 1 and 0 <= self.erase <= 1):
            raise ValueError(f"jitter must be in [0, 1), erase in [0, 1]: got {self.jitter}, {self.erase}")

    @property
    def least_side(self) -> int:
        """Length in pixels of the shorter side from which on every window of "resized_crop" has at least 2 S x 2 S."""
        # The shorter side of the smallest window of the most extreme ratio is this share of the root of the area.
        return math.ceil(2 * self.size / math.sqrt(self.area[0] * 3 / 4))

    def __call__(self, image: npt.NDArray[Any], rng: np.random.Generator) -> _Image:
        """Augment one image: uint8 RGB (H, W, 3) -> uint8 (S, S, 3), contiguous; the input does not change.

        Raises:
            TypeError, ValueError: if `image` is not such an array, or too small to cut S x S from.
        """
        check_image(image)
        if self.kind == "none":
            return np.ascontiguousarray(_window(image, self.size, 0.5, 0.5))
        result = self._resized_crop(image, rng) if self.kind == "resized_crop" else self._crop(image, rng)
        mirrored = rng.random() < 0.5
        # Both ways copy: the result is contiguous, and `_erase` does not write into the caller's image.
        result = result.take(np.arange(result.shape[1])[::-1], axis=1) if mirrored else result.copy()
        if self.jitter:
            result = _jitter(result, rng.uniform(1 - self.jitter, 1 + self.jitter, 3))
        if self.erase and rng.random() < self.erase:
            _erase(result, rng)
        return result

    def draw_cut(self, rng: np.random.Generator) -> tuple[int, int, bool]:
        """Draw what this augmentation does to a square of S x S pixels: first row, first column, whether mirrored.

        It takes the random numbers that a call takes, and `cut_squares` does what was drawn.

        Raises:
            ValueError: if it does more to an image than to cut S x S pixels from it and to mirror them.
        """
        if self.kind == "resized_crop" or self.jitter or self.erase or self.padding >= self.size:
            raise ValueError(f"only crops of a square and mirror images are drawn without the image: got {self}")
        if self.kind == "none":
            return 0, 0, False
        across, down = (int(share * (2 * self.padding + 1)) - self.padding for share in rng.random(2))
        return down, across, bool(rng.random() < 0.5)

    def _crop(self, image: _Image, rng: np.random.Generator) -> _Image:
        across, down = rng.random(2)
        pad, least = self.padding, min(image.shape[:2])
        if least <= self.size and pad >= least:
            raise ValueError(f"padding of {pad} pixels needs a larger image than {image.shape[:2]}")
        if not pad or least > self.size or least + 2 * pad < self.size:
            return _window(image, self.size, across, down)
        rows, columns = (
            _reflected(int(share * (length + 2 * pad - self.size + 1)) - pad, self.size, length)
            for share, length in ((down, image.shape[0]), (across, image.shape[1]))
        )
        return image.take(rows, axis=0).take(columns, axis=1)  # several times faster than one subscript of both

    def _resized_crop(self, image: _Image, rng: np.random.Generator) -> _Image:
        height, width = image.shape[:2]
        for _ in range(_CROP_TRIES):
            area = height * width * rng.uniform(*self.area)
            ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                break
        else:  # a long image: its largest square
            w = h = min(height, width)
        left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
        return resample(image[top : top + h, left : left + w], self.size)


def _reflected(first: int, size: int, length: int) -> npt.NDArray[np.int64]:
    """Return `size` indices from `first` on into a line of `length` pixels; those beyond an end are mirrored at it."""
    places: npt.NDArray[np.int64] = (length - 1) - np.abs((length - 1) - np.abs(np.arange(first, first + size)))
    return places


def cut_squares(held_NSSC: Tensor, cuts_B4: Tensor) -> Tensor:
    """Cut the images of a batch from a set of squares, on the device of both: uint8 (B, S, S, C).

    `cuts_B4`, int64, has for each image the number of its square and the numbers of `Augment.draw_cut`. The result is
    that of `Augment` for the same random numbers.
    """
    last = held_NSSC.shape[1] - 1
    line_S = torch.arange(last + 1, device=held_NSSC.device)
    rows_B1, down_B1, across_B1, mirrored_B1 = cuts_B4[:, :, None].unbind(1)
    # What lies beyond an edge is mirrored at it, as in `_reflected`.
    down_BS, across_BS = (last - (last - (line_S + first_B1).abs()).abs() for first_B1 in (down_B1, across_B1))
    across_BS = torch.where(mirrored_B1.bool(), across_BS.flip(1), across_BS)
    return held_NSSC[rows_B1[:, :, None], down_BS[:, :, None], across_BS[:, None, :]]


def _window(image: _Image, size: int, across: float, down: float) -> _Image:
    """Cut a size x size window; `across` and `down`, from 0 to below 1, give its place."""
    height, width = image.shape[:2]
    if min(height, width) < size:
        raise ValueError(f"cannot cut {size}x{size} pixels from {height}x{width}: resize the image first")
    top, left = int(down * (height - size + 1)), int(across * (width - size + 1))
    return image[top : top + size, left : left + size]


def _jitter(image: _Image, factors: npt.NDArray[np.float64]) -> _Image:
    """Scale brightness, then contrast about the mean grey, then saturation about each pixel's grey."""
    brightness, contrast, saturation = factors.astype(np.float32)
    x = image * brightness
    grey = (x @ _LUMA)[..., None]
    mean = grey.mean()
    x = (grey + (x - grey) * saturation - mean) * contrast + mean
    clipped: _Image = np.clip(np.rint(x), 0, 255).astype(np.uint8)
    return clipped


def _erase(image: _Image, rng: np.random.Generator) -> None:
    height, width = image.shape[:2]
    side = math.sqrt(rng.uniform(0.02, 0.25))
    ratio = math.exp(rng.uniform(math.log(1 / 2), math.log(2)))
    h = min(height, max(1, round(height * side * math.sqrt(ratio))))
    w = min(width, max(1, round(width * side / math.sqrt(ratio))))
    top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
    image[top : top + h, left : left + w] = np.rint(image.reshape(-1, 3).mean(0)).astype(np.uint8)


# ------------------------------------------------------------------------------------------------- TrivialAugment

STRENGTH_LEVELS = 31


@dataclass(frozen=True)
class Operation:
    """A change of a picture and its range of strengths; with `both_ways` the sign of the strength is random too."""

    change: Callable[[Image.Image, float], Image.Image]
    strengths: tuple[float, ...] = (0.0,)
    both_ways: bool = True


def _spread_strengths(first: float, last: float) -> tuple[float, ...]:
    return tuple(torch.linspace(first, last, STRENGTH_LEVELS).tolist())


def _moved(image: Image.Image, across: float, down: float) -> Image.Image:
    moved: Image.Image = ops.affine(image, angle=0.0, translate=[int(across), int(down)], scale=1.0, shear=[0.0, 0.0])
    return moved


def _sheared(image: Image.Image, across: float, down: float) -> Image.Image:
    degrees = [math.degrees(math.atan(slope)) for slope in (across, down)]
    sheared: Image.Image = ops.affine(image, angle=0.0, translate=[0, 0], scale=1.0, shear=degrees, center=[0, 0])
    return sheared


_SHARES, _PIXELS, _DEGREES = _spread_strengths(0.0, 0.99), _spread_strengths(0.0, 32.0), _spread_strengths(0.0, 135.0)
_KEPT_BITS = tuple(float(8 - round(6 * place / (STRENGTH_LEVELS - 1))) for place in range(STRENGTH_LEVELS))

OPERATIONS: dict[str, Operation] = {
    "Identity": Operation(lambda image, _: image),
    "ShearX": Operation(lambda image, slope: _sheared(image, slope, 0), _SHARES),
    "ShearY": Operation(lambda image, slope: _sheared(image, 0, slope), _SHARES),
    "TranslateX": Operation(lambda image, pixels: _moved(image, pixels, 0), _PIXELS),
    "TranslateY": Operation(lambda image, pixels: _moved(image, 0, pixels), _PIXELS),
    "Rotate": Operation(lambda image, degrees: ops.rotate(image, degrees), _DEGREES),
    "Brightness": Operation(lambda image, share: ops.adjust_brightness(image, 1 + share), _SHARES),
    "Color": Operation(lambda image, share: ops.adjust_saturation(image, 1 + share), _SHARES),
    "Contrast": Operation(lambda image, share: ops.adjust_contrast(image, 1 + share), _SHARES),
    "Sharpness": Operation(lambda image, share: ops.adjust_sharpness(image, 1 + share), _SHARES),
    "Posterize": Operation(lambda image, bits: ops.posterize(image, int(bits)), _KEPT_BITS, both_ways=False),
    "Solarize": Operation(
        lambda image, least: ops.solarize(image, least), _spread_strengths(255.0, 0.0), both_ways=False
    ),
    "AutoContrast": Operation(lambda image, _: ops.autocontrast(image)),
    "Equalize": Operation(lambda image, _: ops.equalize(image)),
}
"""The operations of TrivialAugment, by their names in torchvision."""


def trivial_augment(image: _Image, rng: np.random.Generator) -> _Image:
    """Apply one random operation: uint8 RGB (H, W, 3) -> uint8 (H, W, 3), contiguous; the input does not change.

    Pixels that move in from outside are black.

    Raises:
        TypeError, ValueError: if `image` is not such an array.
    """
    check_image(image)
    operation = list(OPERATIONS.values())[rng.integers(len(OPERATIONS))]
    strength = operation.strengths[rng.integers(len(operation.strengths))]
    if operation.both_ways and rng.integers(2):
        strength = -strength
    return np.array(operation.change(Image.fromarray(image), strength))
