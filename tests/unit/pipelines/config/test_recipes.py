"""Recipes: presets that every later source of settings beats, and what is told of them."""

import re
from pathlib import Path

import pytest
import torch

from pipelines.config.fingerprint import result_settings
from pipelines.config.loading import changed_settings, load_config
from pipelines.config.recipes import _RECIPES, recipe_names, recipe_settings
from pipelines.config.settings import Config
from pipelines.errors import ConfigError
from pipelines.train.learner import make_network, make_training_loss
from pipelines.train.optimizer import make_optimizer
from pipelines.train.train import check_network

PAGE = Path(__file__).parents[4] / "docs" / "recipes.md"


def recipe(name: str, *sets: str) -> Config:
    return load_config(sets=sets, flags={"train.recipe": name})


def test_each_later_source_wins(tmp_path: Path) -> None:
    """Defaults < recipe < file < --set < named flags, wherever the recipe is named."""
    file = tmp_path / "run.toml"
    file.write_text('[train]\nrecipe = "scratch32"\nlr = 0.5\nepochs = 7\nval_every = 1\n')
    config = load_config(file, ["train.lr=0.25", "data.augment=none"], {"train.lr": 0.125, "train.recipe": None})
    assert (config.train.lr, config.train.epochs, config.train.val_every, config.data.augment) == (0.125, 7, 1, "none")
    assert (config.model.stem_stride, config.data.image_size, config.train.seed) == (2, 32, 0)
    assert load_config(file, flags={"train.recipe": "plain"}).train.optimizer == "rmsprop"
    assert recipe("plain") == load_config(sets=["train.recipe=plain"])


@pytest.mark.parametrize("name", ["nosuch", "Plain", ""])
def test_an_unknown_one_names_those_that_exist_in_one_line(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        recipe(name)
    assert str(caught.value) == f"train.recipe = {name!r}: there is no such recipe; take one of auto, plain, scratch32"


@pytest.mark.parametrize("sets", [["train.recipe=5"], ["train=5", "data.policy=none"]])
def test_what_is_no_name_is_said_as_for_every_setting(sets: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"^train(\.recipe)? = 5: "):
        load_config(sets=sets)


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_is_no_more_than_the_settings_it_stands_for(name: str) -> None:
    """Said one by one, they make the same model, by the same fingerprint."""
    said = load_config(flags=recipe_settings(name))
    assert recipe(name) == said.model_copy(update={"train": said.train.model_copy(update={"recipe": name})})
    assert (
        result_settings(recipe(name), "model") == result_settings(said, "model") != result_settings(Config(), "model")
    )
    assert "train.recipe" not in result_settings(recipe(name), "model")


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_makes_a_network_a_loss_and_an_optimiser_that_fit_each_other(name: str) -> None:
    config = recipe(name)
    with torch.device("meta"):
        loss = make_training_loss(config, 10)
        network = make_network(config, loss.default_head)
        make_optimizer(network, loss, config.train)
        side = config.data.image_size
        assert network(torch.zeros(2, 3, side, side)).shape == (2, 64)


def test_a_loss_of_hard_labels_refuses_soft_ones_before_any_work() -> None:
    with pytest.raises(ConfigError, match=r"train\.mixup: loss hyp2 takes no soft labels: set train\.mixup=0"):
        check_network(recipe("scratch32", "train.loss=hyp2", "train.mixup=0.2"), 10)
    check_network(recipe("scratch32", "train.loss=hyp2", "train.mixup=0", "train.label_smoothing=0"), 10)


def test_a_job_gets_the_recipe_and_what_differs_from_it_be_it_a_default() -> None:
    config = recipe("plain", "train.warmup=0.05", "train.epochs=20", "train.lr=0.5")
    changed = changed_settings(config)
    assert changed == [
        *("train.recipe=plain", "train.epochs=20", "train.lr=0.5", "train.warmup=0.05"),
        "ray.address=auto",
    ]
    assert load_config(sets=changed).train == config.train


def test_a_job_is_told_a_default_that_the_user_named_and_the_automatic_recipe_would_change() -> None:
    config = recipe("auto", "train.epochs=20", "ray.cpus=2")
    told = changed_settings(config)
    assert "train.epochs=20" in told and not [entry for entry in told if entry.startswith("data.image_size")]
    assert load_config(sets=told).train.model_fields_set == config.train.model_fields_set


@pytest.mark.parametrize("name", recipe_names())
def test_each_has_its_command_and_its_figure(name: str) -> None:
    told = _RECIPES[name].__doc__ or ""
    assert f"    hhnet train --recipe {name} --shards shards/train --out model" in told
    assert re.search(r"mAP of .+ 0\.\d+ .*\(docs/results\.md\)", told)


def test_the_page_has_the_settings_of_each() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| .* \| (.+) \|$", PAGE.read_text(), re.MULTILINE))
    assert list(rows) == list(recipe_names())
    for name, told in rows.items():
        settings = recipe_settings(name)
        for setting, value in re.findall(r"`([a-z_]+\.[a-z_0-9]+)=([^`]+)`", told):
            assert str(settings[setting]) == value, (name, setting)
