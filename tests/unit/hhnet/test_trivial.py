"""TrivialAugment: torchvision's operations at torchvision's strengths, drawn from the generator of the sample."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, TrivialAugmentWide, autoaugment

from hhnet import trivial
from hhnet.augment import sample_rng
from hhnet.trivial import OPERATIONS, STRENGTHS, Operation, trivial_augment

IMAGE = np.random.default_rng(0).integers(0, 256, (48, 40, 3), dtype=np.uint8)


@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation_is_that_of_torchvision_at_every_strength(name: str) -> None:
    strengths, signed = TrivialAugmentWide()._augmentation_space(STRENGTHS)[name]
    mine, picture = OPERATIONS[name], Image.fromarray(IMAGE)
    theirs = strengths.tolist() if strengths.ndim else [0.0]
    assert list(mine.strengths) == theirs and (mine.both_ways == signed or theirs == [0.0])
    for strength in [sign * strength for strength in theirs for sign in ((1, -1) if signed else (1,))]:
        expected = autoaugment._apply_op(picture, name, strength, InterpolationMode.NEAREST, None)
        np.testing.assert_array_equal(np.array(mine.change(picture, strength)), np.array(expected))


def test_torchvision_knows_no_other_operation() -> None:
    assert list(OPERATIONS) == list(TrivialAugmentWide()._augmentation_space(STRENGTHS))


def test_an_image_depends_on_its_generator_alone_and_is_left_as_it_is() -> None:
    before = IMAGE.copy()
    for epoch in range(40):
        torch.manual_seed(epoch)
        first = trivial_augment(IMAGE, sample_rng(0, epoch, "k"))
        np.random.default_rng().random()
        torch.rand(3)
        np.testing.assert_array_equal(first, trivial_augment(IMAGE, sample_rng(0, epoch, "k")))
        assert first.shape == IMAGE.shape and first.dtype == np.uint8 and first.flags.c_contiguous
        assert not np.shares_memory(first, IMAGE)
    np.testing.assert_array_equal(IMAGE, before)


def test_operations_strengths_and_signs_are_drawn_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: Counter[tuple[str, float]] = Counter()

    def recorded(name: str) -> Operation:
        return replace(OPERATIONS[name], change=lambda image, strength: drawn.update([(name, strength)]) or image)

    recorders, random, dot = {name: recorded(name) for name in OPERATIONS}, np.random.default_rng(0), IMAGE[:1, :1]
    monkeypatch.setattr(trivial, "OPERATIONS", recorders)
    for _ in range(14_000):
        trivial_augment(dot, random)
    for name, operation in recorders.items():
        times = {strength: count for (found, strength), count in drawn.items() if found == name}
        signs = (1, -1) if operation.both_ways else (1,)
        assert times.keys() == {sign * strength for sign in signs for strength in operation.strengths}
        assert 850 < sum(times.values()) < 1150
        if operation.both_ways:
            assert max(times.values()) < 2 * 1150 / len(operation.strengths)


def test_what_is_no_image_is_refused() -> None:
    with pytest.raises(TypeError, match="uint8"):
        trivial_augment(IMAGE.astype(float), sample_rng(0, 0, "a"))  # type: ignore[arg-type]
