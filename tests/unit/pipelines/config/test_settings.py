"""Configuration: precedence, bounds, messages, and what belongs to a fingerprint."""

import re
from pathlib import Path
from typing import Annotated

import pytest
from pydantic import Field, ValidationError

from pipelines.config.fingerprint import result_settings, settings_by_kind
from pipelines.config.loading import config_from, known_names, load_config, load_tree, merge_trees, validate_tree
from pipelines.config.settings import ChangesResult, Config, Section
from pipelines.errors import ConfigError


def test_defaults_stand() -> None:
    assert load_config() == Config()


def test_later_sources_win(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("[train]\nepochs = 3\nlr = 0.5\nseed = 7\n")
    config = load_config(file, ["train.epochs=4", "train.lr=0.25"], {"train.epochs": 5, "train.seed": None})
    assert (config.train.epochs, config.train.lr, config.train.seed) == (5, 0.25, 7)


def test_a_home_in_the_path_of_weights_is_that_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/of-mine")
    config = load_config(sets=["model.weights=~/w.safetensors", "train.teacher_weights=~/t.safetensors"])
    assert (config.model.weights, config.train.teacher_weights) == (
        "/home/of-mine/w.safetensors",
        "/home/of-mine/t.safetensors",
    )


def test_a_tree_is_laid_over_another_and_its_recipe_below_both() -> None:
    below = {"train": {"recipe": "plain", "epochs": 3}, "run": {"database": ["a", "b"]}}
    tree = load_tree(merge_trees(below, {"train": {"epochs": 2}, "run": {"database": ["c"]}}), ["model.bits=32"])
    assert tree["train"] == {"recipe": "plain", "epochs": 2} and below["train"]["epochs"] == 3
    config = config_from(tree)
    assert (config.train.epochs, config.model.bits, config.run.database) == (2, 32, ("c",))
    assert config.train.optimizer == load_config(sets=["train.recipe=plain"]).train.optimizer
    assert "optimizer" not in tree["train"]


@pytest.mark.parametrize(
    ("text", "path", "value"),
    [
        ("model.backbone=resnet18", "backbone", "resnet18"),
        ('model.backbone="resnet18"', "backbone", "resnet18"),
        ("model.bits = 32", "bits", 32),
    ],
)
def test_set_reads_toml_values_and_bare_words(text: str, path: str, value: object) -> None:
    assert getattr(load_config(sets=[text]).model, path) == value


def test_set_reaches_into_nested_tables_and_lists() -> None:
    config = load_config(sets=["train.loss_options.margin=0.3", 'encode.carry=["a", "b"]'])
    assert config.train.loss_options == {"margin": 0.3}
    assert config.encode.carry == ("a", "b")


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["model.bitz=64"], "unknown setting model.bitz: did you mean model.bits?"),
        (["modle.bits=64"], "unknown setting modle: did you mean model?"),
        (["model.bits=0"], "model.bits = 0: must be a multiple of 8"),
        (["model.bits=12"], "model.bits = 12: must be a multiple of 8"),
        (["train.epochs=0"], "train.epochs = 0"),
        (["train.epochs=many"], "train.epochs = 'many'"),
        (["ingest.name=../x"], "ingest.name = '../x'"),
        (["train.epochs"], "write section.key=value"),
        (["=5"], "write section.key=value"),
        (["train=5"], "train = 5"),
        (
            ["encode.real_codes=true", 'encode.carry=["real_codes"]'],
            "encode.real_codes = True: stores a column `real_codes`",
        ),
        (["train.epochs=2", "train.epochs.x=1"], "epochs is a value, not a section"),
    ],
)
def test_mistakes_are_one_line(sets: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(sets=sets)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_missing_or_broken_file_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.toml"):
        load_config(tmp_path / "nowhere.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("[train\n")
    with pytest.raises(ConfigError, match=r"broken\.toml"):
        load_config(broken)


def test_the_tree_is_frozen() -> None:
    with pytest.raises(ValidationError):
        Config().train.epochs = 3  # type: ignore[misc]


FROZEN = {
    "shards": {"ingest": "samples_per_shard seed name"},
    "model": {
        "data": "image_size resize decode batch_size augment policy shuffle_buffer interleave",
        "model": "backbone weights bits head stem_stride branches precision",
        "train": "epochs loss loss_options mixup label_smoothing teacher teacher_weights distillation optimizer lr "
        "backbone_lr_scale layer_decay schedule weight_decay warmup ema_decay grad_clip accumulate seed val_share "
        "val_limit val_every",
    },
    "rotation": {"train": "rotate rotate_samples seed"},
    "codes": {"encode": "batch_size carry real_codes"},
    "index": {"index": "kind part_codes nlist nprobe m ef_search seed", "index.gate": "probes k radius"},
    "duplicates": {"dedupe": "radius same_code"},
    "report": {"evaluate": "at ties denominator empty unlabelled rerank gallery"},
    "agreement": {"agreement": "queries k seed"},
}


def test_the_settings_of_every_fingerprint_are_frozen() -> None:
    """A change of these lists names every result of that kind anew: make it knowingly."""
    for kind, sections in FROZEN.items():
        expected = {f"{section}.{name}" for section, names in sections.items() for name in names.split()}
        assert set(result_settings(Config(), kind)) == expected, kind
    assert settings_by_kind(Config).keys() == FROZEN.keys()


class ToySettings(Section):
    """A section with one setting, which nothing but this declaration knows."""

    size: Annotated[int, ChangesResult("index", "toy")] = Field(3, ge=1, le=9)
    """Size of the toy."""
    speed: int = 1
    """Speed of the toy, which changes no result."""


class ToyConfig(Config):
    """The tree with that section."""

    toy: ToySettings = ToySettings()


def test_a_declared_setting_is_known_everywhere() -> None:
    """To loading, to the errors, to the lists by kind and to fingerprints."""
    made = validate_tree(load_tree(sets=["toy.size=5", "toy.speed=2"]), ToyConfig)
    assert isinstance(made, ToyConfig) and (made.toy.size, made.toy.speed) == (5, 2)
    for said, message in (
        ("toy.size=10", "toy.size = 10: Input should be less than or equal to 9"),
        ("toy.sise=5", "unknown setting toy.sise: did you mean toy.size?"),
        ("tpy.size=5", "unknown setting tpy: did you mean toy?"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            validate_tree(load_tree(sets=[said]), ToyConfig)
    assert set(known_names(ToyConfig)) - set(known_names()) == {"toy", "toy.size", "toy.speed"}
    assert settings_by_kind(ToyConfig) == {
        **settings_by_kind(Config),
        "index": (*settings_by_kind(Config)["index"], "toy.size"),
        "toy": ("toy.size",),
    }
    assert result_settings(made, "toy") == {"toy.size": 5}
    assert result_settings(made, "index") == result_settings(Config(), "index") | {"toy.size": 5}
    assert ToySettings.model_fields["size"].description == "Size of the toy."


def test_every_setting_that_stays_outside_the_fingerprints_is_known() -> None:
    """A new setting must be declared with `ChangesResult` or, knowingly, be put here."""
    covered = {name for names in settings_by_kind(Config).values() for name in names}
    every = {name for name in known_names() if "." in name and name != "index.gate"}
    neutral = {
        "train.recipe",  # the settings that it stands for count
        *("data.workers", "data.cache", "train.workers", "train.checkpoint_steps"),
        *("train.log", "train.max_failures"),
        *(
            "ingest.skip_budget",
            "ingest.workers",
            "ingest.per_host",
            "ingest.url_timeout_s",
            "ingest.url_attempts",
            "ingest.private_hosts",
            "store.unsigned",
            "encode.workers",
            "encode.reject_budget",
            "encode.max_attempts",
            "encode.stuck_s",
            "encode.decode_processes",
            "encode.decoders",
            "index.workers",
            "search.k",
            "search.workers",
            "search.rerank",
            "search.device",
        ),
        *(f"index.gate.min_{name}" for name in ("self_recall", "recall", "recall_within")),
        *("index.gate.max_p50_ms", "index.gate.max_p99_ms", "index.memory", "index.latency", "index.recall"),
        *("dedupe.memory", "dedupe.max_pairs", "dedupe.threads"),
        *(
            "ray.address",
            "ray.cpus",
            "ray.wait_s",
            "ray.cpu_fallback",
            "ray.driver_labels",
            "ray.metrics_port",
            "store.shared",
        ),
        *(f"cost.{name}" for name in ("gpu_hour", "cpu_hour", "get_1000", "put_1000", "gb_month")),
        *(
            f"{section}.{name}"
            for section in ("ingest", "train", "encode", "index", "search")
            for name in ("cpus", "worker_memory", "resources", "labels", "strategy")
        ),
        *(f"{section}.{name}" for section in ("train", "encode") for name in ("gpus", "accelerator")),
    }
    assert {name for name in every - covered if not name.startswith("run.")} == neutral
