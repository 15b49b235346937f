"""`train.log`: figures of each epoch in another program, which may be missing or fail."""

import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from pipelines.artifacts.versions import open_current
from pipelines.cli.main import build_app
from pipelines.config.loading import load_config
from pipelines.errors import Unavailable
from pipelines.ingest.ingest import ingest
from pipelines.train.job import TrainJob
from pipelines.train.sinks import open_sink
from pipelines.train.train import plan_training
from tests.support.pictures import write_folder

EPOCH = {"epoch": 2, "step": 8, "loss": 0.5, "map": 0.75, "val_images": 12, "chance": 0.25}


class Run:
    """Stands for a run of W&B."""

    def __init__(self) -> None:
        self.logged: list[tuple[Mapping[str, float], int]] = []
        self.fails = self.ended = False

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        self.ended = True
        if self.fails:
            raise ConnectionError("no answer")

    def log(self, figures: Mapping[str, float], step: int) -> None:
        if self.fails:
            raise ConnectionError("the server is gone")
        self.logged.append((figures, step))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    run, module = Run(), ModuleType("wandb")
    run.__dict__["begun"] = []
    module.init = lambda **given: run.__dict__["begun"].append(given) or run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    return run


@pytest.fixture
def job(tmp_path: Path) -> TrainJob:
    write_folder(tmp_path / "photos", classes=2, per_class=4)
    ingest(str(tmp_path / "photos"), str(tmp_path / "shards"), load_config())
    shards, config = open_current(str(tmp_path / "shards"), "shards"), load_config(sets=["train.log=wandb"])
    return plan_training(shards, None, str(tmp_path / "model"), config)


@pytest.mark.parametrize("name", ["tensorboard", "mlflow", "wandb"])
def test_a_missing_package_is_one_line_before_anything_starts(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    out = str(tmp_path / "model")
    with pytest.raises(SystemExit) as ended:
        build_app()(["train", "--shards", str(tmp_path / "none"), "--out", out, "--set", f"train.log={name}"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        f"hhnet: train.log={name} needs the package {name}, which is not installed: pip install 'hhnet[{name}]', or "
        "leave train.log out\n"
    )


def test_the_figures_of_an_epoch_arrive_and_the_log_changes_no_model(job: TrainJob, run: Run) -> None:
    with open_sink(job) as hear:
        hear({"epoch": 1, "step": 4, "loss": 1.5})
        hear(EPOCH)
        assert not run.ended
    assert run.logged == [
        ({"train/loss": 1.5}, 1),
        ({"train/loss": 0.5, "val/map": 0.75, "val/chance": 0.25}, 2),
    ]
    (begun,) = run.__dict__["begun"]
    assert begun["name"] == f"model-{job.fingerprint[:8]}" and begun["config"]["train.epochs"] == 20
    assert run.ended and "train.log" not in begun["config"]


def test_a_sink_that_fails_is_told_once_and_the_training_goes_on(
    job: TrainJob, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    with open_sink(job) as hear:
        run.fails = True
        hear(EPOCH)
        hear(EPOCH)
    assert capsys.readouterr().err == (
        "hhnet: train.log=wandb failed, so it gets no more figures: the server is gone\n"
        "hhnet: train.log=wandb could not end its run: no answer\n"
    )


def test_a_sink_that_cannot_begin_is_out_of_reach(job: TrainJob, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> None:
        raise OSError("no key")

    monkeypatch.setattr(sys.modules["wandb"], "init", refuse)
    with (
        pytest.raises(Unavailable, match=r"train\.log=wandb cannot begin \(no key\): mend that, or leave"),
        open_sink(job),
    ):
        pass
