"""From pixels to network input."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from hhnet.preprocess import Preprocess

RNG = np.random.default_rng(0)


def image(height: int, width: int) -> np.ndarray:
    return RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_normalise() -> None:
    preprocess = Preprocess(size=4, resize=4)
    pixels = image(4, 4)
    x = preprocess(pixels)
    assert x.dtype == torch.float32 and x.shape == (3, 4, 4) and x.is_contiguous()
    mean, std = np.array(preprocess.mean), np.array(preprocess.std)
    expected = ((pixels / 255 - mean) / std).transpose(2, 0, 1)
    np.testing.assert_allclose(x.numpy(), expected, atol=1e-6)


def test_batch_and_single_image_agree() -> None:
    preprocess = Preprocess(size=16, resize=18)
    images = [image(20, 30), image(50, 40)]
    squares = np.stack([preprocess.resize_crop(i) for i in images])
    batch = preprocess.normalise(torch.from_numpy(squares))
    assert batch.shape == (2, 3, 16, 16) and batch.is_contiguous(memory_format=torch.channels_last)
    for one, other in zip(images, batch, strict=True):
        assert torch.equal(preprocess(one), other)


@pytest.mark.parametrize("shape", [(64, 64), (64, 96), (97, 64), (30, 31), (500, 333)])
def test_resize_crop_is_resize_then_crop(shape: tuple[int, int]) -> None:
    """Equal to the two steps, but for rounding of the resized length and the outermost pixels."""
    yy, xx = np.mgrid[: shape[0], : shape[1]]
    pixels = np.stack([yy * 255 / shape[0], xx * 255 / shape[1], (yy + xx) % 200], axis=2).astype(np.uint8)
    pixels[..., 2] = 128 + 100 * np.sin(yy / 9) * np.cos(xx / 11)
    found = Preprocess(size=28, resize=32).resize_crop(pixels)
    height, width = (round(side * 32 / min(shape)) for side in shape)
    whole = np.array(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR))
    top, left = (height - 28) // 2, (width - 28) // 2
    expected = whole[top : top + 28, left : left + 28].astype(int)
    assert found.shape == (28, 28, 3) and found.dtype == np.uint8
    assert np.abs(found - expected)[2:-2, 2:-2].mean() < 3


def test_square_of_the_right_size_is_untouched() -> None:
    pixels = image(32, 32)
    np.testing.assert_array_equal(Preprocess(size=32, resize=32).resize_crop(pixels), pixels)


def test_shrinking_is_antialiased() -> None:
    board = np.indices((512, 512)).sum(0) % 2 * 255
    pixels = np.repeat(board[..., None], 3, axis=2).astype(np.uint8)
    assert np.ptp(Preprocess(size=32, resize=32).resize_crop(pixels).astype(int)) < 10


@pytest.mark.parametrize("shape", [(1, 1), (1, 5000), (5000, 1), (2, 3)])
def test_odd_shapes(shape: tuple[int, int]) -> None:
    """A strip resized to 256 pixels in height would have a million columns; only the square is made."""
    assert Preprocess().resize_crop(image(*shape)).shape == (224, 224, 3)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos", "box"])
def test_round_trip_through_json(interpolation: str) -> None:
    preprocess = Preprocess(size=32, resize=36, mean=(0.1, 0.2, 0.3), interpolation=interpolation)
    assert Preprocess.from_dict(json.loads(json.dumps(preprocess.to_dict()))) == preprocess
    assert preprocess.resize_crop(image(50, 60)).shape == (32, 32, 3)


def test_refusals() -> None:
    with pytest.raises(TypeError, match="uint8 RGB: got float64"):
        Preprocess()(np.zeros((8, 8, 3)))
    for shape in ((8, 8), (8, 8, 4), (0, 8, 3)):
        with pytest.raises(ValueError, match=r"\(H, W, 3\): got"):
            Preprocess()(np.zeros(shape, np.uint8))
    with pytest.raises(ValueError, match="size=64, resize=32"):
        Preprocess(size=64, resize=32)
    with pytest.raises(ValueError, match="std above 0"):
        Preprocess(std=(1, 1, 0))
    with pytest.raises(ValueError, match=r"interpolation must be one of bilinear.*'nearest'"):
        Preprocess(interpolation="nearest")
    good = Preprocess().to_dict()
    for change, message in (
        ({"sise": 1}, "just the keys"),
        ({"size": "224"}, "must be integers"),
        ({"size": True}, "must be integers"),
        ({"mean": ["a", "b", "c"]}, "lists of numbers"),
        ({"mean": 0.5}, "lists of numbers"),
        ({"std": [1.0, 1.0]}, "3 values"),
    ):
        with pytest.raises(ValueError, match=message):
            Preprocess.from_dict({**good, **change})
    del good["std"]
    with pytest.raises(ValueError, match="just the keys"):
        Preprocess.from_dict(good)
    with pytest.raises(ValueError, match="just the keys"):
        Preprocess.from_dict([])  # type: ignore[arg-type]
