"""What a user reads before a run: help, the list of settings, and the flags that every verb has."""

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.core import TyperCommand, TyperGroup, TyperOption
from typer.testing import CliRunner

from pipelines.cli.flags import EncodeFlags
from pipelines.cli.main import build_app
from pipelines.config.loading import load_config
from pipelines.config.recipes import left_open
from pipelines.config.settings import Config, setting_meanings
from tests.support.codes import simple_rows, write_codes
from tests.support.pictures import write_folder

APP = build_app()


def asked(*words: str, code: int = 0) -> str:
    done = CliRunner().invoke(APP, list(words), env={"COLUMNS": "100", "TERMINAL_WIDTH": "100"})
    assert done.exit_code == code, done.output
    return done.output if code == 0 else done.stderr


def verbs(group: Any = None, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], TyperCommand]]:
    """Every verb by the words that call it."""
    found: list[tuple[tuple[str, ...], TyperCommand]] = []
    for name, command in (group or typer.main.get_command(APP)).commands.items():
        inner = verbs(command, (*path, name)) if isinstance(command, TyperGroup) else [((*path, name), command)]
        found += inner
    return found


VERBS = verbs()
NAMES = [" ".join(path) for path, _ in VERBS]


def test_the_verbs_stand_in_groups_in_the_order_of_work() -> None:
    text = asked("--help")
    titles = re.findall(r"^╭─ (.*?) ─", text, re.MULTILINE)
    assert titles == ["Options", "The whole pipeline", "Step by step, in the order of work", "What there is", "Later"]
    listed = re.findall(r"^│ ([a-z][a-z-]+) +\S", text, re.MULTILINE)
    assert listed[:9] == ["demo", "run", "study", "ingest", "train", "encode", "index", "search", "evaluate"]
    assert set(listed) == {path[0] for path, _ in VERBS}


@pytest.mark.parametrize(("path", "command"), VERBS, ids=NAMES)
def test_every_verb_has_the_flags_that_the_readme_names(path: tuple[str, ...], command: TyperCommand) -> None:
    flags = {flag for one in command.params for flag in one.opts}
    named = {"--json", "--config", "--set", "--quiet", "-q", "--verbose", "-v", "--log-level", "--log-json", "--debug"}
    assert named <= flags
    text = asked(*path, "--help")
    assert "<bool>" not in text and "Example: hhnet" in text
    assert max(map(len, text.splitlines())) <= 100


def test_the_default_of_a_setting_stands_at_its_flag() -> None:
    lines = {line.split()[1]: line for line in asked("train", "--help").splitlines() if line.startswith("│    --")}
    defaults = load_config()
    assert f"[default: {defaults.train.epochs}]" in lines["--epochs"]
    assert f"[default: {defaults.model.backbone}]" in lines["--backbone"]
    assert "[default: 1GiB]" in asked("dedupe", "--help")
    assert "default" not in lines["--model"]


ARTIFACT = {
    "train": "shards",
    "encode": "shards",
    "index build": "codes",
    **{f"index {name}": "index" for name in ("add", "remove", "compact", "publish", "rollback", "info")},
    "search": "index",
    "evaluate": "queries",
    "retry-rejects": "codes",
    "dedupe": "codes",
    "alias": "alias",
    "export": "model",
}


@pytest.mark.parametrize(("name", "artifact"), ARTIFACT.items())
def test_the_main_artifact_is_given_without_a_flag_or_with_it(name: str, artifact: str, tmp_path: Path) -> None:
    needed = {
        "train": ["--out", "o"],
        "encode": ["--model", "m", "--out", "o"],
        "index build": ["--out", "o"],
        "index add": ["--codes", "c"],
        "index remove": ["--key", "k"],
        "search": ["--key", "k"],
        "evaluate": ["--database", "d", "--out", "o"],
        "dedupe": ["--out", "o"],
        "export": ["--out", "o"],
    }.get(name, [])
    there = str(tmp_path / "nothing")
    placed = asked(*name.split(), there, *needed, code=2)
    assert f"{there} holds no" in placed
    assert asked(*name.split(), f"--{artifact}", there, *needed, code=2) == placed
    if name != "train":  # which says itself that --rotate is another way
        assert asked(*name.split(), *needed, code=2) == (
            f"hhnet: {artifact.upper()} is missing: give it after the verb, or with --{artifact}\n"
        )
    if artifact != "codes" or name == "retry-rejects":
        twice = asked(*name.split(), there, f"--{artifact}", "x", *needed, code=2)
        assert "is given twice, as" in twice and f"with --{artifact} x: give it once" in twice


def test_several_codes_are_given_one_after_another(tmp_path: Path) -> None:
    made = write_codes(tmp_path / "a", {"a.tar": simple_rows("a", 3, seed=0)}).uri
    for words in ([made, f"{tmp_path}/b"], [made, "--codes", f"{tmp_path}/b"]):
        said = asked("dedupe", *words, "--out", str(tmp_path / "o"), code=2)
        assert said.startswith(f"hhnet: {tmp_path}/b holds no committed codes")


def test_flags_of_one_verb_are_those_of_its_class() -> None:
    (command,) = (command for path, command in VERBS if path == ("encode",))
    hidden = [one.name for one in command.params if isinstance(one, TyperOption) and one.hidden]
    assert hidden == ["shards"] and set(EncodeFlags.__dataclass_fields__) <= {one.name for one in command.params}


def test_every_setting_is_listed_with_value_default_and_meaning() -> None:
    rows = json.loads(asked("config", "--set", "train.lr=0.5", "--json"))["settings"]
    assert [row["name"] for row in rows] == list(setting_meanings(Config))
    assert all(row["meaning"] for row in rows)
    (rate,) = (row for row in rows if row["name"] == "train.lr")
    assert rate == {
        "name": "train.lr",
        "value": 0.5,
        "default": 0.001,
        "meaning": "Peak learning rate of the hash layer.",
    }


def test_a_section_or_one_setting_is_listed_in_words() -> None:
    lines = asked("config", "train.lr", "--set", "train.lr=0.5").splitlines()
    assert lines[0] == "train: Settings of a training."
    assert lines[2].split(maxsplit=3) == ["train.lr", "0.5", "0.001", "Peak learning rate of the hash layer."]
    text = asked("config", "index")
    assert "index.gate.min_recall " in text and "train." not in text
    assert "512MiB" in asked("config", "data.cache")
    assert asked("config", "trian", code=2) == "hhnet: unknown setting trian: did you mean train?\n"


@pytest.mark.parametrize("words", [["ingest", "x", "--out", "o"], ["demo"]], ids=" ".join)
def test_the_settings_of_a_run_are_printed_as_a_file_for_config(words: list[str], tmp_path: Path) -> None:
    sets = ['train.loss_options={"margin" = 0.3}', 'encode.carry=["a"]', "index.gate.k=3", "data.cache=1GiB"]
    text = asked(*words, *(word for one in sets for word in ("--set", one)), "--print-config")
    (tmp_path / "run.toml").write_text(text)
    printed = load_config(tmp_path / "run.toml")
    assert (printed.index.gate.k, printed.encode.carry, printed.data.cache) == (3, ("a",), 1 << 30)
    assert printed.train.loss_options == {"margin": 0.3}
    assert asked("config", "--config", str(tmp_path / "run.toml"), "--print-config") == text


@pytest.mark.parametrize("words", [["demo", "PHOTOS"], ["train", "shards", "--recipe", "auto", "--out", "o"]])
def test_what_the_recipe_auto_chooses_later_is_left_open_in_the_file(words: list[str], tmp_path: Path) -> None:
    write_folder(tmp_path / "photos", classes=2, per_class=3)
    named = [str(tmp_path / "photos") if word == "PHOTOS" else word for word in words]
    text = CliRunner().invoke(APP, [*named, "--set", "data.batch_size=8", "--print-config"]).stdout
    assert "# image_size is chosen by the recipe as the training begins\n" in text and "batch_size = 8\n" in text
    (tmp_path / "run.toml").write_text(text)
    printed = load_config(tmp_path / "run.toml")
    assert left_open(printed) == ["data.image_size", "train.epochs"]


def test_a_training_without_settings_prints_those_of_the_recipe_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.train.fit.GPU_DEVICES", ())
    text = asked("train", "shards", "--out", "o", "--print-config")
    assert 'recipe = "auto"' in text and "# epochs is chosen by the recipe" in text and "lr = 0.005" in text


@pytest.mark.parametrize("words", [["config", "run"], ["ingest", "x", "--out", "o", "--print-config"]], ids=" ".join)
def test_a_secret_in_the_settings_is_not_shown(words: list[str]) -> None:
    said = asked(*words, "--set", "run.source=s3://key:geheim@bucket/x", code=2)
    assert "must not carry credentials in a URL" in said and "geheim" not in said


def test_what_demo_takes_from_a_file_goes_before_its_recipe(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("[train]\nepochs = 7\nlr = 0.25\n")
    text = asked("demo", "--config", str(tmp_path / "mine.toml"), "--set", "train.lr=0.5", "--print-config")
    assert "epochs = 7\n" in text and "lr = 0.5\n" in text and 'backbone = "hrnet_w18_small"' in text


def test_quiet_and_verbose_stand_for_levels_of_the_log(tmp_path: Path) -> None:
    write_folder(tmp_path / "photos", classes=2, per_class=3)
    words = ("ingest", str(tmp_path / "photos"), "--out", str(tmp_path / "o"))
    quiet = CliRunner().invoke(APP, [*words, "--quiet"])
    assert (quiet.exit_code, quiet.stderr) == (0, "") and quiet.stdout.startswith("ingest: done")
    assert "ingest: writing" in CliRunner().invoke(APP, [*words[:-1], str(tmp_path / "p")]).stderr
    for flag, level in (("--verbose", logging.INFO), ("-q", logging.ERROR), ("--json", logging.WARNING)):
        asked("config", "train.lr", flag)
        assert logging.getLogger("pipelines").getEffectiveLevel() == level
    assert "--quiet and --verbose exclude each other" in asked("verify", "x", "-q", "-v", code=2)


def test_the_shell_can_complete_verbs_and_flags() -> None:
    env = {"_HHNET_COMPLETE": "complete_bash", "COMP_WORDS": "hhnet retr", "COMP_CWORD": "1"}
    done = CliRunner().invoke(APP, [], env=env, prog_name="hhnet")
    assert done.output.split() == ["retry-rejects"]
    assert "--install-completion" in asked("--help")
