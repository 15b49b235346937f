"""TrivialAugment: one operation of fourteen at one strength of 31, both drawn evenly, and nothing to tune.

Müller and Hutter 2021, "TrivialAugment: Tuning-free Yet State-of-the-Art Data Augmentation", in their wide space of
strengths. Operations and strengths are torchvision's. Its own class is not used: it draws from torch's global
generator, so the result would depend on the thread and on earlier draws.

Shape suffixes: H height, W width.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torchvision.transforms import functional as ops

from hhnet.preprocess import check_image

STRENGTHS = 31
"""Number of strengths of each operation that has several."""


@dataclass(frozen=True)
class Operation:
    """A change of a picture by a strength, drawn from `strengths`; with `both_ways` its sign is drawn too."""

    change: Callable[[Image.Image, float], Image.Image]
    strengths: tuple[float, ...] = (0.0,)
    both_ways: bool = True


def _steps(first: float, last: float) -> tuple[float, ...]:
    return tuple(torch.linspace(first, last, STRENGTHS).tolist())


def _moved(image: Image.Image, across: float, down: float) -> Image.Image:
    moved: Image.Image = ops.affine(image, angle=0.0, translate=[int(across), int(down)], scale=1.0, shear=[0.0, 0.0])
    return moved


def _sheared(image: Image.Image, across: float, down: float) -> Image.Image:
    degrees = [math.degrees(math.atan(slope)) for slope in (across, down)]
    sheared: Image.Image = ops.affine(image, angle=0.0, translate=[0, 0], scale=1.0, shear=degrees, center=[0, 0])
    return sheared


_SHARES, _PIXELS, _DEGREES = _steps(0.0, 0.99), _steps(0.0, 32.0), _steps(0.0, 135.0)
_BITS = tuple(float(8 - round(6 * place / (STRENGTHS - 1))) for place in range(STRENGTHS))

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
    "Posterize": Operation(lambda image, bits: ops.posterize(image, int(bits)), _BITS, both_ways=False),
    "Solarize": Operation(lambda image, least: ops.solarize(image, least), _steps(255.0, 0.0), both_ways=False),
    "AutoContrast": Operation(lambda image, _: ops.autocontrast(image)),
    "Equalize": Operation(lambda image, _: ops.equalize(image)),
}
"""The fourteen operations by torchvision's names."""


def trivial_augment(image: npt.NDArray[np.uint8], rng: np.random.Generator) -> npt.NDArray[np.uint8]:
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
