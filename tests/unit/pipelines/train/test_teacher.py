"""A teacher: what it says comes beside the loss, whole for several parts, and its weights name the result."""

from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch

from hhnet.nn.distillation import neighbour_divergence
from pipelines.artifacts.manifest import open_artifact
from pipelines.config.loading import load_config
from pipelines.config.settings import Config
from pipelines.errors import ConfigError, InputError
from pipelines.ingest.ingest import ingest
from pipelines.train.batches import preprocess_of
from pipelines.train.learner import Batch, Learner
from pipelines.train.teacher import Teacher
from pipelines.train.train import check_network, plan_training
from tests.support.pictures import write_folder

CLASSES = 3


def save_teacher(path: Path, seed: int = 0) -> str:
    torch.manual_seed(seed)
    safetensors.torch.save_file(timm.create_model("test_resnet", pretrained=False).state_dict(), path)
    return str(path)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_teacher(tmp_path_factory.mktemp("teacher") / "weights.safetensors")


PLAIN = ("model.backbone=test_convnext", "model.bits=16", "model.head=ln", "data.image_size=32", "train.loss=dpsh")


def configure(*sets: str) -> Config:
    return load_config(sets=sets)


def taught_by(weights: str, *sets: str) -> Config:
    return configure(*PLAIN, "train.teacher=test_resnet", f"train.teacher_weights={weights}", *sets)


def make(config: Config) -> Learner:
    return Learner(config, CLASSES, 4, preprocess_of(config))


def batch(step: int) -> Batch:
    random = np.random.default_rng(step)
    labels = np.eye(CLASSES, dtype=np.bool_)[random.integers(0, CLASSES, 7)]
    return Batch(random.integers(0, 256, (7, 32, 32, 3), dtype=np.uint8), labels, [f"{step}/{row}" for row in range(7)])


def test_the_loss_is_that_without_it_and_the_weighed_divergence(weights: str) -> None:
    """Also in parts. The teacher is no part of the network, of what is learned, or of a checkpoint."""
    given = batch(0)
    alone = make(configure(*PLAIN))
    codes: list[torch.Tensor] = []
    alone.model.register_forward_hook(lambda module, inputs, output: codes.append(output.detach()))
    loss = alone.step(given).value()
    taught = [make(taught_by(weights, "train.distillation=0.5", f"train.accumulate={parts}")) for parts in (1, 3)]
    for learner in taught:
        assert learner.teacher is not None
        features = learner.teacher.features(torch.from_numpy(given.squares))
        expected = loss + 0.5 * neighbour_divergence(codes[0], features).item()
        assert learner.step(given).value() == pytest.approx(expected, rel=1e-5)
        assert learner.state().keys() == alone.state().keys()
        assert torch.equal(learner.teacher.features(torch.from_numpy(given.squares)), features)
    first, second = (learner.state()["model.head.0.weight"] for learner in taught)
    torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-5)
    assert not torch.allclose(first, alone.state()["model.head.0.weight"], rtol=1e-3, atol=1e-5)


def test_the_teacher_sees_pixels_scaled_as_it_was_trained(weights: str) -> None:
    """Its weights are those of the file, and its mean and deviation those of timm: 0.5 here."""
    config, squares = taught_by(weights), torch.from_numpy(batch(1).squares)
    network = timm.create_model("test_resnet", pretrained=False, num_classes=0).eval()
    state = safetensors.torch.load_file(weights)
    network.load_state_dict({name: tensor for name, tensor in state.items() if not name.startswith("fc.")})
    assert network.pretrained_cfg["mean"] == (0.5, 0.5, 0.5)
    with torch.no_grad():
        expected = network((squares.permute(0, 3, 1, 2) / 255 - 0.5) / 0.5)
    found = Teacher(config, preprocess_of(config), torch.device("cpu")).features(squares)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["train.teacher=hrnet_w81"], "train.teacher: unknown backbone 'hrnet_w81': did you mean"),
        (["train.teacher=resnet18"], "train.teacher: weights in .* and backbone resnet18 do not fit"),
        (["train.teacher=vgg11", "train.teacher_weights=timm"], "train.teacher: weights='timm' needs a pinned tag"),
        (["train.teacher_weights=nowhere"], "train.teacher: weights file nowhere does not exist"),
    ],
)
def test_a_teacher_that_cannot_be_is_said_before_any_work(sets: list[str], message: str, weights: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_network(taught_by(weights, *sets), CLASSES)


def test_its_weights_name_the_result_by_their_bytes(weights: str, tmp_path: Path) -> None:
    write_folder(tmp_path / "photos", classes=2, per_class=3)
    ingest(str(tmp_path / "photos"), str(tmp_path / "shards"), load_config())
    shards = open_artifact(str(tmp_path / "shards"), "shards")

    def name(config: Config) -> str:
        return plan_training(shards, None, str(tmp_path / "model"), config).fingerprint

    copy, other = tmp_path / "copy.safetensors", save_teacher(tmp_path / "other.safetensors", seed=1)
    copy.write_bytes(Path(weights).read_bytes())
    assert name(taught_by(weights)) == name(taught_by(str(copy)))
    assert len({name(taught_by(weights)), name(taught_by(other)), name(configure(*PLAIN))}) == 3
    with pytest.raises(InputError, match=r"train\.teacher_weights=.*gone cannot be read"):
        name(taught_by(str(tmp_path / "gone")))
