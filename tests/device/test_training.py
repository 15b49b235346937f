"""Training steps on a GPU: a learner learns, and goes on from its state as if nothing had happened."""

import numpy as np
import pytest

from pipelines.config.loading import load_config
from pipelines.train.batches import preprocess_of
from pipelines.train.learner import Batch, Learner

CLASSES, SIZE, STEPS = 3, 12, 6


def learner_of(precision: str, parts: int) -> Learner:
    network = ("model.backbone=test_resnet", "model.bits=16", f"model.precision={precision}", "data.image_size=32")
    config = load_config(sets=[*network, f"train.accumulate={parts}", "train.lr=0.01", "train.loss=orthohash"])
    return Learner(config, CLASSES, 10 * STEPS, preprocess_of(config))


def batch_of(step: int) -> Batch:
    """Squares that are as bright as their class."""
    random = np.random.default_rng(step)
    classes = random.integers(0, CLASSES, SIZE)
    squares = (80 * classes[:, None, None, None] + random.integers(0, 60, (SIZE, 32, 32, 3))).astype(np.uint8)
    return Batch(squares, np.eye(CLASSES, dtype=np.bool_)[classes], [f"{step}/{place}" for place in range(SIZE)])


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_learner_learns_and_goes_on_from_its_state(precision: str, parts: int) -> None:
    learner = learner_of(precision, parts)
    losses = [learner.step(batch_of(step)) for step in range(STEPS)]  # no loss is waited for meanwhile
    values = [loss.value() for loss in losses]
    assert min(values[1:]) < values[0]
    other = learner_of(precision, parts)
    other.load_state(learner.state(), learner.step_count)
    mine, others = ([one.step(batch_of(step)).value() for step in (STEPS, STEPS + 1)] for one in (learner, other))
    assert mine == pytest.approx(others, rel=0.02)
