"""Optimisers and rates: what each group of parameters gets, and how it changes over the steps."""

import pytest
import torch

from hhnet.nn.losses import make_loss
from hhnet.nn.model import HHNet
from pipelines.config.loading import load_config
from pipelines.config.settings import TrainSettings
from pipelines.errors import ConfigError
from pipelines.train.optimizer import make_optimizer, rate_factor

KINDS = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "rmsprop": torch.optim.RMSprop,
    "sgd": torch.optim.SGD,
}


def settings(*sets: str) -> TrainSettings:
    return load_config(sets=sets).train


@pytest.mark.parametrize("name", KINDS)
def test_each_optimiser_gives_every_part_its_own_rate_and_decay(name: str) -> None:
    """And a momentum of 0.9 to the one that has none by itself; that of RMSprop is 0, as in the code bases."""
    with torch.device("meta"):
        model, loss = HHNet("test_convnext", 16), make_loss("hyp2", 16, 5)
    train = settings(
        f"train.optimizer={name}", "train.lr=1e-4", "train.weight_decay=0.5", "train.backbone_lr_scale=0.1"
    )
    optimizer = make_optimizer(model, loss, train)
    assert type(optimizer) is KINDS[name]
    assert optimizer.defaults.get("momentum") == {"sgd": 0.9, "rmsprop": 0}.get(name)
    groups = {group["name"]: group for group in optimizer.param_groups}
    assert {name: group["peak"] for name, group in groups.items()} == pytest.approx(
        {"backbone": 1e-5, "backbone.no_decay": 1e-5, "head": 1e-4, "head.no_decay": 1e-4, "loss": 1e-3}
    )
    assert {name for name, group in groups.items() if group["weight_decay"]} == {"backbone", "head"}


def test_a_network_without_known_blocks_has_no_rates_by_block() -> None:
    with torch.device("meta"):
        model, loss = HHNet("pit_ti_224", 16), make_loss("cel", 16, 5)
    make_optimizer(model, loss, settings())
    with pytest.raises(ConfigError, match=r"^train\.layer_decay: pit_ti_224 does not say .*: set it to 1$"):
        make_optimizer(model, loss, settings("train.layer_decay=0.7"))


def test_the_rate_rises_then_falls_to_nothing() -> None:
    factors = [rate_factor(step, 100, settings("train.warmup=0.1")) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == factors[10] == 1.0
    assert factors == sorted(factors[:10]) + sorted(factors[10:], reverse=True)
    assert factors[-1] < 0.001


def test_a_constant_rate_stays_after_it_has_risen() -> None:
    train = settings("train.warmup=0.1", "train.schedule=constant")
    factors = [rate_factor(step, 100, train) for step in range(100)]
    assert factors[:10] == sorted(set(factors[:10])) and set(factors[9:]) == {1.0}
    at_once = settings("train.warmup=0", "train.schedule=constant")
    assert {rate_factor(step, 100, at_once) for step in range(100)} == {1.0}
