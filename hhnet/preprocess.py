"""From decoded pixels to network input; every verb goes this way.

Shape suffixes: B images, C channels, H height, W width, S side of the network's input.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import interpolate

DECODES = ("scaled", "exact")


def check_image(image: npt.NDArray[Any]) -> None:
    """Raise unless `image` is RGB: TypeError for a dtype other than uint8, ValueError for another shape."""
    if image.dtype != np.uint8:
        raise TypeError(f"an image must be uint8 RGB: got {image.dtype}")
    if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"an image must have shape (H, W, 3): got {image.shape}")


def resample(window: npt.NDArray[np.uint8], size: int) -> npt.NDArray[np.uint8]:
    """Resample an image, or a window cut from one: uint8 (H, W, 3) -> uint8 (size, size, 3), contiguous.

    Bilinear, antialiased where it shrinks: the width first, then the height, each to 8 bits with integer weights of 16
    bits. The result is the same with and without vector instructions, and for any number of threads. docs/export.md has
    the same in numpy.
    """
    # Contiguous and writable: torch copies others, or refuses them.
    batch_1HWC = torch.from_numpy(np.require(window, requirements=["C", "W"])).unsqueeze(0)
    # Permuted as a batch, the memory order counts as channels-last, and the result is made in it.
    resized_1CSS = interpolate(batch_1HWC.permute(0, 3, 1, 2), (size, size), mode="bilinear", antialias=True)
    return np.ascontiguousarray(resized_1CSS[0].permute(1, 2, 0).numpy())


@dataclass(frozen=True, kw_only=True, slots=True)
class Preprocess:
    """The steps before the network: shorter side to `resize`, centre square of `size`, scale to [0, 1], normalise.

    Attributes:
        size: side S of the result, in pixels.
        resize: length of the shorter side before the cut, in pixels, at least `size`.
        mean, std: per RGB channel, for values in [0, 1]; ImageNet's by default.
        decode: "exact", or "scaled" if a large JPEG may be decoded at a smaller scale, see `least_side`.
    """

    size: int = 224
    resize: int = 256
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    decode: str = "scaled"

    def __post_init__(self) -> None:
        """Raise ValueError for values outside their range."""
        if self.size < 1 or self.resize < self.size:
            raise ValueError(f"size must be from 1 to resize: got size={self.size}, resize={self.resize}")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError(f"mean and std must have 3 values, std above 0: got {self.mean}, {self.std}")
        if self.decode not in DECODES:
            raise ValueError(f"decode must be one of {', '.join(DECODES)}: got {self.decode!r}")

    @property
    def least_side(self) -> int:
        """Length in pixels that the shorter side keeps when a JPEG is decoded at a smaller scale; 0 = no smaller scale.

        Twice `resize`, so that the resampling that follows at least halves both sides.
        """
        return 2 * self.resize if self.decode == "scaled" else 0

    def resize_crop(self, image: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Resize and cut: uint8 (H, W, 3) of any size -> uint8 (S, S, 3).

        The cut comes first, so a very long image never grows to its full resized length: a square of whole pixels, its
        side size / resize of the shorter side, rounded to the nearest and halves up, in the middle, and where the rest
        is odd half a pixel to the left and the top of it. An image of S x S is returned as it is where resize is S.
        """
        check_image(image)
        height, width = image.shape[:2]
        if height == width == self.size == self.resize:
            return image
        side = max(1, int(min(height, width) * self.size / self.resize + 0.5))
        left, top = (width - side) // 2, (height - side) // 2
        return resample(image[top : top + side, left : left + side], self.size)

    def normalise(self, images_BHWC: Tensor) -> Tensor:
        """Normalise: uint8 (B, S, S, 3) on any device -> float32 (B, 3, S, S) there, in channels-last memory order."""
        mean, std = torch.tensor(self.mean), torch.tensor(self.std)
        # Not blocking: otherwise each batch would wait for all the work that a GPU still has in its queue.
        scale, shift = (one.to(images_BHWC.device, non_blocking=True) for one in (1 / (255 * std), -mean / std))
        return (images_BHWC.to(torch.float32) * scale + shift).permute(0, 3, 1, 2)

    def __call__(self, image: npt.NDArray[np.uint8]) -> Tensor:
        """Prepare one image: uint8 RGB (H, W, 3) -> float32 (3, S, S), contiguous."""
        square = torch.from_numpy(np.ascontiguousarray(self.resize_crop(image)))
        return self.normalise(square[None])[0].contiguous()

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON values; `from_dict` is the inverse."""
        return asdict(self) | {"mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Preprocess":
        """Build from JSON values. Raises ValueError for missing, unknown or mistyped keys."""
        names = {field.name for field in fields(cls)}
        if not isinstance(values, Mapping) or set(values) != names:
            got = sorted(values) if isinstance(values, Mapping) else values
            raise ValueError(f"preprocess must have just the keys {sorted(names)}: got {got}")
        sizes, channels = (values["size"], values["resize"]), (values["mean"], values["std"])
        if not all(type(size) is int for size in sizes):
            raise ValueError(f"preprocess size and resize must be integers: got {sizes}")
        if not all(
            isinstance(triple, list | tuple) and all(type(value) in (int, float) for value in triple)
            for triple in channels
        ):
            raise ValueError(f"preprocess mean and std must be lists of numbers: got {channels}")
        return cls(**{**values, "mean": tuple(values["mean"]), "std": tuple(values["std"])})
