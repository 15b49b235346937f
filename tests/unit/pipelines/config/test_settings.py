"""Configuration: precedence, bounds, messages, and what belongs to a fingerprint."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from pipelines.config.fingerprint import LATER_SETTINGS, RESULT_SETTINGS, result_settings
from pipelines.config.loading import config_from, known_names, load_config, load_tree, merged
from pipelines.config.settings import Config
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
    tree = load_tree(merged(below, {"train": {"epochs": 2}, "run": {"database": ["c"]}}), ["model.bits=32"])
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
        (["encode.logits=true", 'encode.carry=["logits"]'], "encode.logits = True: makes a column `logits`"),
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


def test_result_settings_name_real_settings_and_no_place_or_width() -> None:
    for kind, names in RESULT_SETTINGS.items():
        settings = result_settings(Config(), kind)
        assert list(settings) == [name for name in names if name not in LATER_SETTINGS]
        assert not [name for name in names if name.endswith(("workers", "address", "out", "source"))]


def test_a_setting_that_came_later_is_part_of_a_fingerprint_only_where_it_is_set() -> None:
    """Else what was made before it would have to be made anew, and would have other bytes."""
    assert result_settings(Config(), "codes") == {"encode.batch_size": 64, "encode.carry": []}
    assert result_settings(load_config(sets=["encode.logits=true"]), "codes")["encode.logits"] is True
    trained_before = {name for name in RESULT_SETTINGS["model"] if name.startswith(("data.", "train."))} - {
        *("data.policy", "train.optimizer", "train.schedule", "train.layer_decay"),
        *("train.mixup", "train.label_smoothing", "train.accumulate"),
        *("train.teacher", "train.teacher_weights", "train.distillation"),
    }
    assert {name for name in result_settings(Config(), "model") if not name.startswith("model.")} == trained_before
    assert result_settings(load_config(sets=["train.accumulate=2"]), "model")["train.accumulate"] == 2
    assert result_settings(load_config(sets=["evaluate.rerank=100"]), "report")["evaluate.rerank"] == 100


def test_every_setting_that_stays_outside_the_fingerprints_is_known() -> None:
    """A new setting must be put into RESULT_SETTINGS or, knowingly, here."""
    covered = {name for names in RESULT_SETTINGS.values() for name in names}
    every = {name for name in known_names() if "." in name and name != "index.gate"}
    neutral = {
        "train.recipe",  # the settings that it stands for count
        *("data.workers", "data.cache", "train.workers", "train.checkpoint_steps", "train.max_failures"),
        *(
            "ingest.skip_budget",
            "store.unsigned",
            "encode.workers",
            "encode.reject_budget",
            "encode.max_attempts",
            "encode.stuck_s",
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
        *(
            f"{section}.{name}"
            for section in ("train", "encode", "index", "search")
            for name in ("cpus", "worker_memory", "resources", "labels", "strategy")
        ),
        *(f"{section}.{name}" for section in ("train", "encode") for name in ("gpus", "accelerator")),
    }
    assert {name for name in every - covered if not name.startswith("run.")} == neutral
