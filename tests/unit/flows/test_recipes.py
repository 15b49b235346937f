"""The demo's recipe, and how it is fitted to the user's own images."""

from pathlib import Path

import pytest
import typer
from PIL import Image

from flows.recipes import RECIPE, demo_recipe, demo_settings, probe_images
from flows.verbs import DemoResult, _own_images, run
from pipelines.config.loading import load_config
from pipelines.errors import ConfigError, InputError
from tests.support.pictures import write_folder

EXAMPLES = Path(__file__).parents[3] / "examples"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.toml")), ids=lambda path: path.name)
def test_every_example_is_a_valid_configuration_that_says_where_its_results_go(path: Path) -> None:
    assert load_config(path).run.out


def test_the_example_is_the_recipe_of_the_demo() -> None:
    assert load_config(EXAMPLES / "fashion-mnist.toml") == demo_recipe()


def test_a_probe_counts_the_images_and_measures_their_shorter_side(tmp_path: Path) -> None:
    write_folder(tmp_path, classes=3, per_class=5, size=48)
    (tmp_path / "class_00" / "notes.txt").write_text("no image")
    (tmp_path / "class_00" / "broken.jpg").write_bytes(b"no image either")
    Image.new("RGB", (48, 100)).save(tmp_path / "class_00" / "tall.JPG")
    seen = probe_images(str(tmp_path))
    assert (seen.images, seen.side) == (17, 48)
    assert seen.example is not None and seen.example.is_file()


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir(), lambda path: path.write_text("x")])
def test_data_that_is_no_folder_of_images_is_bad_input(tmp_path: Path, make: object) -> None:
    make(tmp_path / "photos")  # type: ignore[operator]
    with pytest.raises(InputError, match="one folder per class"):
        probe_images(str(tmp_path / "photos"))


def test_a_flat_folder_is_refused_before_any_work(tmp_path: Path) -> None:
    write_folder(tmp_path, classes=1, per_class=3)
    with pytest.raises(InputError, match="class_00 holds no folders of classes, and training needs classes"):
        probe_images(str(tmp_path / "class_00"))
    assert probe_images(str(tmp_path)).images == 3


def test_flags_of_the_images_beat_the_recipe_and_the_user_beats_both(tmp_path: Path) -> None:
    write_folder(tmp_path / 'my "photos"', classes=2, per_class=4)
    said: list[str] = []
    flags, query, title = _own_images(str(tmp_path / 'my "photos"'), said.append)
    settings = demo_settings(flags, None, ["train.epochs=2", "data.batch_size=8"], "out")
    assert settings.run.source == str(tmp_path / 'my "photos"')
    assert settings.run.split == "train=0.8,query=0.2"
    assert (settings.run.query, settings.run.database, settings.run.out) == ("query", ("train",), "out")
    assert (settings.train.recipe, settings.train.epochs, settings.data.batch_size) == ("auto", 2, 8)
    assert "image_size" not in settings.data.model_fields_set  # the recipe chooses it
    assert Path(query).is_file() and "8 images" in said[0] and "photos" in title


def test_own_images_get_the_recipe_that_was_tuned_for_the_demo() -> None:
    own, tuned = demo_settings({"train.recipe": "auto"}, None, (), "out"), demo_recipe()
    chosen = {"image_size", "batch_size"}
    assert own.data.model_dump(exclude=chosen) == tuned.data.model_dump(exclude=chosen)
    assert own.model == tuned.model and own.encode == tuned.encode
    assert own.train.model_dump(exclude={"epochs", "recipe"}) == tuned.train.model_dump(exclude={"epochs", "recipe"})


def test_the_summary_ends_with_a_command_that_can_be_pasted() -> None:
    where = {"status": "done", "uri": "my out", "digest": "d", "store": "my out", "report": "r.html"}
    figures = {"map": 0.81234, "chance": 0.1, "images_per_second": 1234.5}
    more = {"seconds": 130.0, "stages": [{"uri": "my out/codes/query", "rejects": 2}, {"uri": "my out/index"}]}
    text = DemoResult(**where, **figures, images="Fashion-MNIST", bits=64, query="it's.png", **more).as_text()
    assert "0.8123" in text and "0.1000" in text and "1,234 images/s" in text and "r.html" in text
    assert "took          2 min 10 s\n" in text
    assert "left out      2 images that cannot be read: hhnet rejects 'my out/codes/query'\n" in text
    import shlex

    words = shlex.split(text.splitlines()[-1].removeprefix("next: "))
    assert words[:2] == ["hhnet", "search"]
    assert words[words.index("--index") + 1] == "my out/index"
    assert words[words.index("--image") + 1] == "it's.png"


def test_a_run_without_a_place_for_its_results_is_bad_usage(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("[run]\ntrain = 'x'\n")
    with pytest.raises(ConfigError, match=r"run\.out"):
        run(tmp_path / "c.toml")


def test_the_recipe_is_packaged_with_the_code() -> None:
    assert RECIPE.parent.name == "flows" and RECIPE.is_file()
    assert typer  # the verbs are plain functions with typer's annotations
