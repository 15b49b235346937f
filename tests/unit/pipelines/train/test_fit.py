"""The settings that `train.recipe = auto` chooses, and when it is taken."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch

from flows.recipes import demo_recipe
from pipelines.artifacts.facts import ModelCard
from pipelines.artifacts.manifest import open_artifact
from pipelines.cli.main import build_app
from pipelines.config.loading import load_config
from pipelines.config.recipes import left_open
from pipelines.config.settings import Config
from pipelines.ingest.ingest import ingest
from pipelines.train.fit import SIDES, auto_if_unsaid, choose_settings, fit_to_images, has_gpu, name_defaults
from pipelines.train.worker import train_worker
from tests.support.pictures import write_folder

AUTO = load_config(sets=["train.recipe=auto"])


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.train.fit.has_gpu", lambda: False)


@pytest.fixture
def shards(tmp_path: Path) -> str:
    write_folder(tmp_path / "photos", classes=3, per_class=8, size=48)
    ingest(str(tmp_path / "photos"), str(tmp_path / "shards"), load_config(sets=["ingest.samples_per_shard=7"]))
    return str(tmp_path / "shards")


@pytest.mark.parametrize(
    ("images", "side", "cpus", "size"),
    [(800, 28, 2, 32), (800, 64, 2, 64), (800, 500, 2, 96), (1500, 500, 2, 64), (1500, 500, 8, 128), (10**6, 9, 2, 32)],
)
def test_the_input_is_the_largest_that_the_images_fill_and_the_time_allows(
    images: int, side: int, cpus: int, size: int
) -> None:
    found = choose_settings(AUTO, images, side, cpus)
    assert found["data"] == {"image_size": size, "batch_size": 32 if images < 4000 else 64}
    epochs = found["train"]["epochs"]
    assert 1 <= epochs <= 40 and (epochs >= 16 or size == 32)
    work = cpus * 30_000 * 32**2 * (2 if epochs == 16 else 1)
    assert epochs == 1 or images * epochs * size**2 <= work


def test_the_images_of_the_demo_get_the_settings_of_the_demo() -> None:
    tuned = demo_recipe()
    size, batch = tuned.data.image_size, tuned.data.batch_size
    chosen = {"data": {"image_size": size, "batch_size": batch}, "train": {"epochs": tuned.train.epochs}}
    assert choose_settings(AUTO, 60_000, 28, 2) == chosen


def test_the_epochs_suit_an_input_that_the_user_chose() -> None:
    slow = choose_settings(load_config(sets=["train.recipe=auto", "data.image_size=128"]), 1500, 500, 2)
    assert slow["data"]["image_size"] == 128 and slow["train"]["epochs"] == 2
    finer = choose_settings(load_config(sets=["train.recipe=auto", "model.stem_stride=2"]), 1500, 500, 2)
    assert finer["data"]["image_size"] == 32


@pytest.mark.parametrize("sets", [["train.lr=0.1", "train.epochs=20"], ["model.bits=64"], ["train.recipe=plain"]])
def test_who_names_a_setting_that_changes_the_model_gets_no_others(sets: list[str], tmp_path: Path) -> None:
    config = load_config(sets=sets)
    assert auto_if_unsaid(config, str(tmp_path)) == config


@pytest.mark.parametrize("setting", ["data.image_size=64", "data.batch_size=8", "train.epochs=20"])
def test_who_names_what_the_recipe_would_choose_keeps_it(setting: str, tmp_path: Path) -> None:
    found = auto_if_unsaid(load_config(sets=[setting]), str(tmp_path))
    assert (found.train.recipe, setting.partition("=")[0] in left_open(found)) == ("auto", False)


@pytest.mark.parametrize(
    ("sets", "gpu", "told"),
    [
        (["model.bits=16"], False, "image_size 224, 20 epochs: --recipe auto would keep your settings"),
        (["model.bits=16"], True, None),
        (["data.image_size=64"], False, None),
        (["train.recipe=auto"], False, None),
    ],
)
def test_a_default_size_is_named_where_nobody_chose_it_for_the_machine(
    sets: list[str], gpu: bool, told: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pipelines.train.fit.has_gpu", lambda: gpu)
    name_defaults(load_config(sets=sets))
    said = capsys.readouterr().err
    assert said.startswith(told) if told else not said


def test_it_is_taken_on_a_machine_without_gpu_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, said = str(tmp_path / "model"), load_config(sets=["ray.cpus=1", "train.max_failures=1", "data.workers=1"])
    assert auto_if_unsaid(said, out).train.recipe == "auto"
    assert auto_if_unsaid(said, out).ray.cpus == auto_if_unsaid(said, out).data.workers == 1
    assert auto_if_unsaid(load_config(sets=["ray.address=127.0.0.1:6379"]), out).train.recipe is None
    monkeypatch.setattr("pipelines.train.fit.has_gpu", lambda: True)
    assert auto_if_unsaid(said, out) == said


def test_a_gpu_is_what_torch_can_use_and_without_its_device_torch_is_not_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("pipelines.train.fit.GPU_DEVICES", (str(tmp_path / "none"),))
    assert has_gpu() is (sys.platform != "linux")
    monkeypatch.setattr("pipelines.train.fit.GPU_DEVICES", (str(tmp_path),))
    assert has_gpu()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not has_gpu()


def test_what_the_user_says_wins_and_the_rest_is_named(shards: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = load_config(sets=["train.recipe=auto", "ray.cpus=2", "data.batch_size=8", "model.backbone=test_resnet"])
    fitted = fit_to_images(shards, "nowhere", config)
    assert (fitted.data.batch_size, fitted.model.backbone, fitted.data.image_size) == (8, "test_resnet", 64)
    assert (fitted.train.epochs, fitted.train.lr) == (40, 5e-3)
    assert capsys.readouterr().err == (
        "recipe auto for 24 images on 2 CPUs, to take minutes: image_size 64, test_resnet, batch 8 (yours), 40 epochs\n"
    )


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Train without Ray, and for one epoch of the smallest input."""
    monkeypatch.setattr("pipelines.train.train.run_on_ray", lambda job, data, log: train_worker(job, lambda *_: None))
    monkeypatch.setattr("pipelines.train.fit.WORK_PER_CPU", 24 * SIDES[-1] ** 2)


def hhnet(*words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        build_app()(list(words))
    return int(ended.value.code or 0)


@pytest.mark.usefixtures("in_this_process")
def test_a_training_without_settings_keeps_those_of_its_begin_on_a_machine_with_other_cpus(
    shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("train", "--shards", shards, "--out", str(tmp_path / "model"), "--json")
    assert hhnet(*command, "--set", "ray.cpus=1") == 0
    first = capsys.readouterr()
    lines = first.err.splitlines()
    why = "recipe auto for 24 images on 1 CPU, to take minutes"
    assert lines[0].startswith(f"{why}: image_size 32, hrnet_w18_small, batch 32, 1 epoch")
    assert lines[1] == "starting Ray, reading 24 images"
    used = ModelCard.of(open_artifact(str(tmp_path / "model"))).config
    assert (used.data.image_size, used.data.batch_size, used.train.epochs) == (32, 32, 1)
    assert (used.model.backbone, used.train.lr) == ("hrnet_w18_small", 5e-3)

    monkeypatch.setattr("pipelines.train.fit.has_gpu", lambda: True)
    assert hhnet(*command, "--set", "ray.cpus=16") == 0
    again = capsys.readouterr()
    assert re.match(r"recipe auto as the training at \S+model began: image_size 32, .* 1 epoch\n", again.err)
    assert json.loads(again.out)["status"] == "unchanged"
    assert json.loads(again.out)["digest"] == json.loads(first.out)["digest"]


@pytest.mark.parametrize(("text", "recipe"), [("[train]\nlr = 0.01", None), ("[ray]\ncpus = 2", "auto")])
def test_what_a_file_says_of_the_model_stands(
    text: str, recipe: str | None, shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Config] = []
    monkeypatch.setattr("pipelines.train.train.plan_training", lambda *given: seen.append(given[-1]) or 1 / 0)
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(ZeroDivisionError):
        build_app()(["train", "--shards", shards, "--out", str(tmp_path / "m"), "--config", str(tmp_path / "c.toml")])
    assert seen[0].train.recipe == recipe
    assert recipe or seen == [load_config(tmp_path / "c.toml")]
