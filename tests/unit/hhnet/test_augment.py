"""Augmentation: determinism, shapes, and what each part does.

TrivialAugment: torchvision's operations at torchvision's strengths, drawn from the generator of the sample.
"""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, TrivialAugmentWide, autoaugment

import hhnet.augment
from hhnet.augment import (
    AUGMENTATIONS,
    OPERATIONS,
    STRENGTH_LEVELS,
    Augment,
    Operation,
    cut_squares,
    sample_rng,
    trivial_augment,
)

IMAGE = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
WIDE = np.random.default_rng(1).integers(0, 256, (40, 90, 3), dtype=np.uint8)


def test_generator_depends_on_each_of_the_three() -> None:
    first = sample_rng(1, 2, "a").random()
    assert sample_rng(1, 2, "a").random() == first
    others = [sample_rng(2, 2, "a"), sample_rng(1, 3, "a"), sample_rng(1, 2, "b"), sample_rng(12, 0, "a")]
    assert first not in [rng.random() for rng in others]
    assert sample_rng(1, 23, "a").random() != sample_rng(12, 3, "a").random()


def test_generator_is_stable_across_versions() -> None:
    """A changed stream would make runs that were begun earlier unrepeatable."""
    assert sample_rng(0, 0, "cat/1").integers(0, 2**32, 2).tolist() == [4200802158, 3990093496]


@pytest.mark.parametrize("kind", AUGMENTATIONS)
@pytest.mark.parametrize("image", [IMAGE, WIDE], ids=["square", "wide"])
def test_shape_determinism_and_untouched_input(kind: str, image: np.ndarray) -> None:
    augment = Augment(size=32, kind=kind, jitter=0.4, erase=0.5)
    before = image.copy()
    results = [augment(image, sample_rng(0, epoch, "k")) for epoch in range(8)]
    for epoch, result in enumerate(results):
        assert result.shape == (32, 32, 3) and result.dtype == np.uint8 and result.flags.c_contiguous
        assert not np.shares_memory(result, image) or kind == "none"
        np.testing.assert_array_equal(result, augment(image, sample_rng(0, epoch, "k")))
    np.testing.assert_array_equal(image, before)
    assert (len({result.tobytes() for result in results}) == 1) == (kind == "none")


def test_crop_flip_gives_shifted_and_mirrored_windows() -> None:
    padded = np.pad(IMAGE, ((4, 4), (4, 4), (0, 0)), mode="reflect")
    windows = {
        padded[t : t + 32, s : s + 32][:, ::step].tobytes(): (t, s, step)
        for t in range(9)
        for s in range(9)
        for step in (1, -1)
    }
    augment = Augment(size=32)
    seen = [windows[augment(IMAGE, sample_rng(0, 0, str(i))).tobytes()] for i in range(1000)]
    assert {t for t, _, _ in seen} == {s for _, s, _ in seen} == set(range(9))
    assert 400 < sum(step == 1 for _, _, step in seen) < 600


def test_large_images_are_cropped_without_padding() -> None:
    flat = np.full((64, 64, 3), 7, np.uint8)
    flat[16:48, 16:48] = 9
    inside = Augment(size=32, padding=0)(flat, sample_rng(0, 0, "a"))
    assert (inside == Augment(size=32, padding=8)(flat, sample_rng(0, 0, "a"))).all()


def test_none_is_the_centre() -> None:
    np.testing.assert_array_equal(Augment(size=20, kind="none")(WIDE, sample_rng(0, 0, "a")), WIDE[10:30, 35:55])


def test_resized_crop_takes_parts_of_the_wanted_size() -> None:
    """In a horizontal ramp the range of values tells the width of the window."""
    ramp = np.repeat(np.arange(200, dtype=np.uint8)[None, :, None], 100, axis=0).repeat(3, axis=2)
    augment = Augment(size=32, kind="resized_crop", area=(0.2, 0.4))
    widths = [np.ptp(augment(ramp, sample_rng(0, 0, str(i))).astype(int)) for i in range(200)]
    # widths are sqrt(area * ratio): from sqrt(20000 * .2 * 3/4) = 55 to sqrt(20000 * .4 * 4/3) = 103
    assert 45 < min(widths) < 65 and 90 < max(widths) < 105


def test_a_strip_is_cut_to_its_largest_square() -> None:
    strip = np.zeros((4, 4000, 3), np.uint8)
    assert Augment(size=8, kind="resized_crop", area=(0.9, 1.0))(strip, sample_rng(0, 0, "a")).shape == (8, 8, 3)


def test_jitter_changes_colour_only() -> None:
    plain = Augment(size=32)(IMAGE, sample_rng(0, 0, "a")).astype(int)
    jittered = Augment(size=32, jitter=0.3)(IMAGE, sample_rng(0, 0, "a")).astype(int)
    correlation = np.corrcoef(plain.ravel(), jittered.ravel())[0, 1]
    assert (plain != jittered).any() and correlation > 0.9
    grey = np.full((32, 32, 3), 100, np.uint8)
    result = Augment(size=32, jitter=0.3)(grey, sample_rng(0, 0, "a"))
    assert np.ptp(result) == 0 and 70 <= result[0, 0, 0] <= 130  # only brightness acts on a grey image


def test_erase_fills_one_rectangle_with_the_mean() -> None:
    kept = Augment(size=32, padding=0)
    erased = Augment(size=32, padding=0, erase=1.0)
    for i in range(20):
        plain, result = kept(IMAGE, sample_rng(0, 0, str(i))), erased(IMAGE, sample_rng(0, 0, str(i)))
        rows, columns = np.nonzero((plain != result).any(2))
        box = result[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        assert (box == np.rint(plain.reshape(-1, 3).mean(0))).all()
        assert 0.01 < box.shape[0] * box.shape[1] / 1024 < 0.3
    never = Augment(size=32, padding=0, erase=1e-9)
    np.testing.assert_array_equal(never(IMAGE, sample_rng(0, 0, "a")), kept(IMAGE, sample_rng(0, 0, "a")))


@pytest.mark.parametrize("options", [{}, {"padding": 0}, {"padding": 31}, {"kind": "none"}])
def test_squares_of_a_set_are_cut_as_they_are_one_by_one(options: dict[str, object]) -> None:
    held = np.random.default_rng(3).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    augment = Augment(**{"size": 32, **options})  # type: ignore[arg-type]
    rows = np.random.default_rng(4).integers(0, 5, 200)
    cuts = [(row, *augment.draw_cut(sample_rng(0, 0, str(place)))) for place, row in enumerate(rows)]
    found = cut_squares(torch.from_numpy(held), torch.tensor(cuts))
    assert found.dtype == torch.uint8 and found.shape == (200, 32, 32, 3)
    for place, row in enumerate(rows):
        np.testing.assert_array_equal(found[place], augment(held[row], sample_rng(0, 0, str(place))))


def test_a_draw_leaves_the_generator_as_a_call_does() -> None:
    for kind in ("crop_flip", "none"):
        augment = Augment(size=32, kind=kind)
        drawn, called = sample_rng(0, 0, "a"), sample_rng(0, 0, "a")
        augment.draw_cut(drawn), augment(IMAGE, called)
        assert drawn.random() == called.random()


def test_what_needs_the_image_is_not_drawn_without_it() -> None:
    for options in ({"kind": "resized_crop"}, {"jitter": 0.1}, {"erase": 0.1}, {"padding": 32}):
        with pytest.raises(ValueError, match="only crops of a square and mirror images are drawn without the image"):
            Augment(**{"size": 32, **options}).draw_cut(sample_rng(0, 0, "a"))  # type: ignore[arg-type]


def test_refusals() -> None:
    for kwargs, message in (
        ({"size": 0}, "size must be above 0"),
        ({"padding": -1}, "padding not below"),
        ({"kind": "flip"}, "kind must be one of crop_flip, resized_crop, none: got 'flip'"),
        ({"area": (0.5, 0.2)}, "area must be"),
        ({"area": (0.0, 0.2)}, "area must be"),
        ({"jitter": 1.0}, "jitter must be"),
        ({"erase": 2.0}, "erase in"),
    ):
        with pytest.raises(ValueError, match=message):
            Augment(**{"size": 32, **kwargs})  # type: ignore[arg-type]
    rng = sample_rng(0, 0, "a")
    with pytest.raises(ValueError, match="cannot cut 33x33 pixels from 32x32"):
        Augment(size=33, kind="none")(IMAGE, rng)
    with pytest.raises(ValueError, match="cannot cut 48x48 pixels from 32x32"):
        Augment(size=48)(IMAGE, rng)
    with pytest.raises(ValueError, match="padding of 40 pixels needs a larger image"):
        Augment(size=32, padding=40)(IMAGE, rng)
    with pytest.raises(TypeError, match="uint8"):
        Augment(size=32)(IMAGE.astype(float), rng)


# ------------------------------------------------------------------------------------------------- TrivialAugment

TALL = np.random.default_rng(0).integers(0, 256, (48, 40, 3), dtype=np.uint8)


@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation_is_that_of_torchvision_at_every_strength(name: str) -> None:
    strengths, signed = TrivialAugmentWide()._augmentation_space(STRENGTH_LEVELS)[name]
    mine, picture = OPERATIONS[name], Image.fromarray(TALL)
    theirs = strengths.tolist() if strengths.ndim else [0.0]
    assert list(mine.strengths) == theirs and (mine.both_ways == signed or theirs == [0.0])
    for strength in [sign * strength for strength in theirs for sign in ((1, -1) if signed else (1,))]:
        expected = autoaugment._apply_op(picture, name, strength, InterpolationMode.NEAREST, None)
        np.testing.assert_array_equal(np.array(mine.change(picture, strength)), np.array(expected))


def test_torchvision_knows_no_other_operation() -> None:
    assert list(OPERATIONS) == list(TrivialAugmentWide()._augmentation_space(STRENGTH_LEVELS))


def test_an_image_depends_on_its_generator_alone_and_is_left_as_it_is() -> None:
    before = TALL.copy()
    for epoch in range(40):
        torch.manual_seed(epoch)
        first = trivial_augment(TALL, sample_rng(0, epoch, "k"))
        np.random.default_rng().random()
        torch.rand(3)
        np.testing.assert_array_equal(first, trivial_augment(TALL, sample_rng(0, epoch, "k")))
        assert first.shape == TALL.shape and first.dtype == np.uint8 and first.flags.c_contiguous
        assert not np.shares_memory(first, TALL)
    np.testing.assert_array_equal(TALL, before)


def test_operations_strengths_and_signs_are_drawn_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: Counter[tuple[str, float]] = Counter()

    def recorded(name: str) -> Operation:
        return replace(OPERATIONS[name], change=lambda image, strength: drawn.update([(name, strength)]) or image)

    recorders, random, dot = {name: recorded(name) for name in OPERATIONS}, np.random.default_rng(0), TALL[:1, :1]
    monkeypatch.setattr(hhnet.augment, "OPERATIONS", recorders)
    for _ in range(14_000):
        trivial_augment(dot, random)
    for name, operation in recorders.items():
        times = {strength: count for (found, strength), count in drawn.items() if found == name}
        signs = (1, -1) if operation.both_ways else (1,)
        assert times.keys() == {sign * strength for sign in signs for strength in operation.strengths}
        assert 850 < sum(times.values()) < 1150
        if operation.both_ways:
            assert max(times.values()) < 2 * 1150 / len(operation.strengths)


def test_trivial_augment_refuses_what_is_no_image() -> None:
    with pytest.raises(TypeError, match="uint8"):
        trivial_augment(TALL.astype(float), sample_rng(0, 0, "a"))  # type: ignore[arg-type]
