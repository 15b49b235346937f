from pathlib import Path

import pytest

from pipelines.config.fingerprint import result_settings
from pipelines.errors import ConfigError
from pipelines.study.grid import SHIPPED_STUDIES, Grid, read_description

TINY = """
title = "Tiny"
seeds = [3, 4]
[settings]
data.image_size = 32
train.loss_options.margin = 0.5
[axes]
model.bits = [16, 32]
[axes.recipe]
plain = { data.augment = "none" }
ours = { data.augment = "flip", train.loss_options.margin = 0.25 }
[search]
train.lr = [1e-5, 1e-3]
"""


def grid_of(folder: Path, text: str, *sets: str) -> Grid:
    file = folder / "study.toml"
    file.write_text(text)
    return Grid.make(read_description(str(file)), sets=sets)


def test_a_grid_has_every_choice_of_every_axis_with_its_settings(tmp_path: Path) -> None:
    grid = grid_of(tmp_path, TINY)
    assert [group.name for group in grid.groups] == [
        *("model.bits=16, recipe=plain", "model.bits=16, recipe=ours"),
        *("model.bits=32, recipe=plain", "model.bits=32, recipe=ours"),
    ]
    assert [candidate.label for candidate in grid.candidates] == ["train.lr=1e-05", "train.lr=0.001"]
    found = [
        (config.model.bits, config.data.augment, config.train.loss_options, config.train.lr, config.train.seed)
        for group in grid.groups[:2]
        for config in [grid.config(group, 4, grid.candidates[0].settings)]
    ]
    assert found == [(16, "none", {"margin": 0.5}, 1e-5, 4), (16, "flip", {"margin": 0.25}, 1e-5, 4)]


def test_flags_win_over_the_study_and_axes_over_flags(tmp_path: Path) -> None:
    grid = grid_of(tmp_path, TINY, "data.image_size=64", "model.bits=8")
    config = grid.config(grid.groups[0], 3)
    assert (config.data.image_size, config.model.bits) == (64, 16)


@pytest.mark.parametrize("name", SHIPPED_STUDIES)
def test_a_shipped_study_is_a_valid_grid(name: str) -> None:
    grid = Grid.make(read_description(name))
    assert len(grid.seeds) == 3 and len(grid.groups) > 1
    assert {name for candidate in grid.candidates for name in candidate.settings} <= {"train.lr"}


def test_the_small_study_is_what_it_says() -> None:
    """5,000 images, 1,000 queries and 54,000 of a database are the protocol's; the grid of rates is the issue's."""
    grid = Grid.make(read_description("small"))
    assert grid.description.protocol == "cifar10"
    assert [c.settings["train.lr"] for c in grid.candidates] == [1e-5, 1e-4, 3e-4, 1e-3]
    configs = [grid.config(group, 0) for group in grid.groups]
    assert {config.model.backbone for config in configs} == {"hrnet_w18_small", "resnet18"}
    assert {config.model.bits for config in configs} == {64}
    assert len({config.train.epochs * result_settings(config, "model")["train.val_share"] for config in configs}) == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("data.image_size = 32", "data.image_sise = 32"), "unknown setting data.image_sise: did you mean"),
        (("[16, 32]", "[]"), "axes: model.bits is empty"),
        (
            ("data.image_size = 32", 'data.image_size = 32\nencode.batch_size = "auto"'),
            "encode.batch_size = 'auto' would be another number on another machine: write a number",
        ),
        (("[16, 32]", "16"), "axes: model.bits is 16: give a list"),
        (("[16, 32]", "[16, 12]"), "model.bits = 12: must be a multiple of 8"),
        (("[16, 32]", "[16, 16]"), "axes: model.bits has a value twice"),
        (("model.bits = [16, 32]", "data.workers = [1, 2]"), "what differs changes no result"),
        (("model.bits = [16, 32]", "bits = [16, 32]"), "axes: bits is neither"),
        (("model.bits = [16, 32]", "train.lr = [1e-2]"), "train.lr is set by train.lr and by search train.lr"),
        (("model.bits = [16, 32]", "train.seed = [1]"), "train.seed is set by seeds and by train.seed"),
        (("[3, 4]", "[3, 3]"), "seeds: a seed is listed twice"),
        (("[3, 4]", "[]"), "seeds: "),
        (('title = "Tiny"', 'titel = "Tiny"'), "title: Field required"),
        (("[1e-5, 1e-3]", "[]"), "search: train.lr is empty"),
        (("[1e-5, 1e-3]", "[1e-5, 1e-5]"), "search: train.lr has a value twice"),
        (("[16, 32]", f"{list(range(8, 8 * 2600, 8))}"), "more than 10000"),
        (("[axes]", "[axes"), "cannot be read as TOML"),
    ],
)
def test_a_bad_study_is_refused_in_one_line(tmp_path: Path, change: tuple[str, str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        grid_of(tmp_path, TINY.replace(*change))
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_an_unknown_study_is_refused_with_the_names_of_those_that_there_are(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="study 'smal' is unknown: choose one of small, baselines, losses, resolution, paper"
    ):
        read_description("smal")
    with pytest.raises(ConfigError, match=r"none\.toml does not exist"):
        read_description(str(tmp_path / "none.toml"))
