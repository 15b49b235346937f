"""Mixup and label smoothing: what becomes of pictures and labels, and which losses take them."""

import numpy as np
import pytest

from hhnet.augment import sample_rng
from hhnet.nn.losses import loss_names
from pipelines.config.loading import load_config
from pipelines.config.settings import Config
from pipelines.errors import ConfigError
from pipelines.train.batches import soften_labels
from pipelines.train.learner import Batch, make_training_loss

CLASSES = 5


def batch(samples: int, views: int = 1) -> Batch:
    random = np.random.default_rng(samples)
    squares = random.integers(0, 256, (samples * views, 8, 8, 3), dtype=np.uint8)
    labels = random.random((samples, CLASSES)) < 0.4
    labels[0], labels[1] = False, [True, True, False, False, False]
    return Batch(squares, labels.repeat(views, 0), [f"k{place}" for place in range(samples) for _ in range(views)])


def configure(*sets: str) -> Config:
    return load_config(sets=sets)


@pytest.mark.parametrize("views", [1, 2])
def test_each_picture_and_label_is_blended_with_the_next_in_its_own_share(views: int) -> None:
    given = batch(6, views)
    found = soften_labels(given, configure("train.mixup=0.4"), 3, views)
    assert found.keys == given.keys and found.squares.dtype == np.uint8 and found.labels.dtype == np.float32
    shares = []
    for row, key in enumerate(given.keys):
        after = (row + views) % len(given.keys)
        share = sample_rng(0, 3, f"{key}\0mixup").beta(0.4, 0.4)
        blend = share * given.squares[row].astype(float) + (1 - share) * given.squares[after]
        assert np.abs(found.squares[row] - blend).max() < 0.501
        expected = share * given.labels[row] + (1 - share) * given.labels[after]
        np.testing.assert_allclose(found.labels[row], expected, atol=1e-6)
        shares.append(share)
    assert len(set(shares)) == 6
    assert shares != [sample_rng(0, 4, f"{key}\0mixup").beta(0.4, 0.4) for key in given.keys]


def test_shares_depend_on_the_sample_and_not_on_its_place() -> None:
    given = batch(6)
    turned = Batch(np.roll(given.squares, 2, 0), np.roll(given.labels, 2, 0), [*given.keys[4:], *given.keys[:4]])
    first, second = (soften_labels(each, configure("train.mixup=0.4"), 0, 1) for each in (given, turned))
    assert np.array_equal(np.roll(first.squares, 2, 0), second.squares)
    assert np.array_equal(np.roll(first.labels, 2, 0), second.labels)


def test_smoothing_deals_its_share_of_the_labels_out_to_all_classes() -> None:
    given = batch(6)
    found = soften_labels(given, configure("train.label_smoothing=0.1"), 0, 1)
    assert np.array_equal(found.squares, given.squares)
    assert not found.labels[0].any()
    np.testing.assert_allclose(found.labels[1], [0.94, 0.94, 0.04, 0.04, 0.04], rtol=1e-6)
    np.testing.assert_allclose(found.labels.sum(1), given.labels.sum(1), rtol=1e-6)


@pytest.mark.parametrize("name", ["mixup", "label_smoothing"])
def test_only_losses_that_say_so_take_them(name: str) -> None:
    for loss in loss_names():
        config = configure(f"train.loss={loss}", f"train.{name}=0.1")
        if loss in ("ce", "dhd", "greedyhash", "orthohash"):
            make_training_loss(config, CLASSES)
            continue
        said = f"^train.{name}: loss {loss} takes no soft labels: set train.{name}=0, or"
        with pytest.raises(ConfigError, match=said):
            make_training_loss(config, CLASSES)
