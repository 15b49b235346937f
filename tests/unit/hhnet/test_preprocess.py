"""From pixels to network input."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hhnet.preprocess import Preprocess, resample

RECIPE = Path(__file__).parents[3] / "docs" / "export.md"
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


def recipe_of(size: int, resize: int) -> Callable[[np.ndarray], np.ndarray]:
    """The function `square` of docs/export.md."""
    (code,) = re.findall(r"^def resample.*?(?=^images = )", RECIPE.read_text(), re.MULTILINE | re.DOTALL)
    names = {"np": np, "rule": {"size": size, "resize": resize}}
    exec(code, names)
    return names["square"]  # type: ignore[return-value]


def test_the_documented_recipe_gives_the_same_pixels_for_a_thousand_sizes() -> None:
    for number in range(1000):
        height, width = RNG.integers(1, 40 if number % 3 else 300, 2)
        size = int(RNG.integers(1, 40 if number % 2 else 230))
        resize = size + int(RNG.integers(0, 40)) * (number % 5 > 0)
        pixels = image(height, width) if number % 2 else np.full((height, width, 3), RNG.integers(256), np.uint8)
        found = Preprocess(size=size, resize=resize).resize_crop(pixels)
        np.testing.assert_array_equal(found, recipe_of(size, resize)(pixels), f"{height} x {width} to {size}, {resize}")


def test_large_pictures_follow_the_recipe_too() -> None:
    for height, width in ((1200, 1600), (2000, 1500), (1, 4000), (3000, 7)):
        pixels = image(height, width)
        np.testing.assert_array_equal(Preprocess().resize_crop(pixels), recipe_of(224, 256)(pixels))


DIGEST = """
import hashlib, numpy as np, torch
from hhnet.preprocess import resample
torch.set_num_threads({threads})
rng, digest = np.random.default_rng(0), hashlib.sha256()
for number in range(200):
    height, width, size = rng.integers(1, 200, 3).tolist()
    pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
    digest.update(resample(pixels, size))
print(digest.hexdigest())
"""


def test_pixels_depend_neither_on_vector_instructions_nor_on_threads() -> None:
    found = {
        subprocess.run(
            [sys.executable, "-c", DIGEST.format(threads=threads)],
            env={**os.environ, "ATEN_CPU_CAPABILITY": capability},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for capability, threads in (("default", 1), ("avx2", 1), ("avx512", 2))
    }
    assert len(found) == 1


def test_a_window_is_resampled_as_a_picture_of_its_own() -> None:
    pixels = image(60, 80)
    locked = pixels[9:50, 3:61].copy()
    locked.setflags(write=False)
    windows = [pixels[9:50, 3:61], locked, pixels[::-1, ::-1][10:51, 19:77][::-1, ::-1]]
    expected = resample(windows[0].copy(), 24)
    for window in windows:
        np.testing.assert_array_equal(resample(window, 24), expected)
    assert expected.flags.c_contiguous


def test_resampling_is_that_of_pillow_but_for_rounding() -> None:
    for height, width, size in ((400, 300, 224), (31, 50, 64), (900, 700, 32), (5, 3, 8)):
        pixels = image(height, width)
        expected = np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BILINEAR))
        difference = np.abs(resample(pixels, size).astype(int) - expected)
        assert difference.max() <= 1, (height, width, size)


@pytest.mark.parametrize(
    ("shape", "size", "resize", "corner", "side"),
    [
        ((64, 64), 28, 32, (4, 4), 56),
        ((64, 96), 28, 32, (4, 20), 56),
        ((97, 64), 28, 32, (20, 4), 56),
        ((20, 30), 224, 256, (1, 6), 18),  # 17.5 pixels: halves are rounded up
        ((13, 400), 224, 256, (1, 194), 11),  # 11.4 pixels
        ((1, 9), 16, 64, (0, 4), 1),  # a quarter of a pixel
    ],
)
def test_the_cut_is_a_square_of_whole_pixels(
    shape: tuple[int, int], size: int, resize: int, corner: tuple[int, int], side: int
) -> None:
    pixels, (top, left) = image(*shape), corner
    found = Preprocess(size=size, resize=resize).resize_crop(pixels)
    np.testing.assert_array_equal(found, resample(pixels[top : top + side, left : left + side], size))


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


def test_a_jpeg_keeps_twice_the_side_that_is_resampled() -> None:
    assert [Preprocess(decode=decode).least_side for decode in ("scaled", "exact")] == [512, 0]


def test_round_trip_through_json() -> None:
    preprocess = Preprocess(size=32, resize=36, mean=(0.1, 0.2, 0.3), decode="exact")
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
    with pytest.raises(ValueError, match="decode must be one of scaled, exact: got 'half'"):
        Preprocess(decode="half")
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
