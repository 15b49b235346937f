"""Validating looks at the averaged weights and leaves the training as it was."""

from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch

from hhnet import mean_average_precision
from pipelines.artifacts.versions import open_current
from pipelines.config.loading import load_config
from pipelines.encode.codes import code_array, open_codes
from pipelines.encode.encode import encode
from pipelines.ingest.ingest import ingest
from pipelines.shards.shards import ShardSet, open_shards
from pipelines.train.batches import TrainData, epoch_batches, epoch_leg, preprocess_of
from pipelines.train.job import TrainJob
from pipelines.train.learner import Learner
from pipelines.train.train import plan_training, train
from pipelines.train.validation import validate
from pipelines.train.worker import train_worker
from tests.support.inline import InlinePool
from tests.support.pictures import jpeg, picture, write_folder

SETS = ("data.image_size=32", "data.batch_size=8", "train.val_share=0.3", "train.epochs=1", "train.lr=0.01")


def test_a_training_that_validates_takes_the_same_steps(tmp_path: Path) -> None:
    config = load_config(sets=[*SETS, "model.backbone=test_convnext", "model.bits=16"])
    write_folder(tmp_path / "photos", classes=3, per_class=15)
    ingest(str(tmp_path / "photos"), str(tmp_path / "shards"), config)
    data = TrainData.make(open_shards(str(tmp_path / "shards")), None, config)
    steps = list(epoch_batches(epoch_leg(data, config, 0, (), 1), 0, 0))
    states = []
    for validates in (False, True):
        learner = Learner(config, len(data.train.classes), len(steps), preprocess_of(config))
        for batch, _ in steps:
            learner.step(batch)
            if validates:
                assert 0 < validate(learner, data) <= 1
        states.append(learner.state())
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name


def test_the_map_of_a_training_is_that_of_the_codes_which_encode_makes(tmp_path: Path) -> None:
    """Of photographs that are decoded at a smaller scale, cut and resized."""
    config = load_config(sets=[*SETS, "model.backbone=test_resnet", "model.bits=16", "data.resize=40"])
    for name, seed in (("photos", 0), ("others", 1)):
        for klass in range(6):
            (tmp_path / name / f"class_{klass}").mkdir(parents=True)
            for number in range(5):
                data = jpeg(picture(klass, number, 200, seed)[: 200 - 5 * number])
                (tmp_path / name / f"class_{klass}" / f"{number}.jpg").write_bytes(data)
        ingest(str(tmp_path / name), str(tmp_path / f"shards-{name}"), config)
    photos, others, model = (str(tmp_path / name) for name in ("shards-photos", "shards-others", "model"))
    result = train(photos, model, config, others, run=lambda job, data, log: train_worker(job, lambda *report: None))
    encode(others, model, str(tmp_path / "codes"), config, pool=InlinePool())
    [table] = open_codes(str(tmp_path / "codes")).tables()
    data = TrainData.make(open_shards(photos), open_shards(others), config)
    rows = [row for _, row in data.val_rows]
    assert len(rows) == 30 and table["row"].to_pylist() == sorted(rows)
    codes = code_array(table["code"])[rows]
    labels = np.array(table["labels"].to_pylist())[rows, 0]
    n = data.queries
    wanted = mean_average_precision(codes[:n], labels[:n], codes[n:], labels[n:])
    assert result.map == wanted and 0 < wanted < 1


@pytest.mark.parametrize(("maps", "epoch"), [([0.5, 0.5, 0.5], 3), ([0.4, 0.6, 0.5], 2), ([0.7, 0.6, 0.7], 3)])
def test_of_equal_epochs_the_last_is_published_and_a_map_that_never_moves_is_said(
    maps: list[float], epoch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(sets=[*SETS, "model.backbone=test_resnet", "model.bits=16", "train.epochs=3"])
    write_folder(tmp_path / "photos", classes=2, per_class=8)
    ingest(str(tmp_path / "photos"), str(tmp_path / "shards"), config)
    left = iter(maps)
    monkeypatch.setattr("pipelines.train.worker.validate", lambda *given: next(left))
    result = train(
        *(str(tmp_path / "shards"), str(tmp_path / "model"), config),
        run=lambda job, data, log: train_worker(job, lambda *report: None),
    ).as_json()
    assert (result["map"], result["epoch"]) == (max(maps), epoch)
    said = "the validation mAP was 0.5000 in all 3 validations" in capsys.readouterr().err
    assert said == (len(set(maps)) == 1)


def test_relative_weights_are_found_by_workers_in_other_folders_and_name_the_model_by_their_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = [*SETS, "model.backbone=test_resnet", "model.bits=16", "model.weights=w.safetensors"]
    write_folder(tmp_path / "photos", classes=2, per_class=8)
    ingest(str(tmp_path / "photos"), str(tmp_path / "shards"), load_config())
    state = timm.create_model("test_resnet").state_dict()

    def elsewhere(job: TrainJob, data: TrainData, log: object) -> None:
        monkeypatch.chdir("/")
        train_worker(job, lambda *report: None)

    digests = set()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        safetensors.torch.save_file(state, tmp_path / name / "w.safetensors")
        monkeypatch.chdir(tmp_path / name)
        where = str(tmp_path / "shards"), str(tmp_path / f"model-{name}")
        digests.add(train(*where, load_config(sets=sets), run=elsewhere).digest)
    assert len(digests) == 1


def test_validation_images_are_decoded_once_if_they_fit_half_of_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = []
    for name in ("photos", "others"):
        write_folder(tmp_path / name, classes=2, per_class=8, seed=len(shards))
        ingest(str(tmp_path / name), str(tmp_path / f"shards-{name}"), load_config())
        shards.append(open_current(str(tmp_path / f"shards-{name}"), "shards"))
    read: list[str] = []
    whole = ShardSet.read
    monkeypatch.setattr(ShardSet, "read", lambda self, *given: read.append(self.artifact.uri) or whole(self, *given))
    square = 32 * 32 * 3
    maps: list[list[object]] = []
    for cache, times in ((32 * square - 1, 2), (32 * square, 1)):
        sets = ["model.backbone=test_resnet", "model.bits=16", "train.epochs=2", f"data.cache={cache}"]
        job = plan_training(*shards, str(tmp_path / str(cache)), load_config(sets=[*SETS, *sets]))
        job.writer()
        maps.append([])
        train_worker(job, lambda *report: None, lambda text, fields: maps[-1].append(fields["map"]))
        assert read.count(shards[1].uri) == times
        read.clear()
    assert maps[0] == maps[1] and len(maps[0]) == 2


def test_each_epoch_is_told_with_its_images_and_chance_and_its_map_stays_beside_the_progress(tmp_path: Path) -> None:
    config = load_config(
        sets=[*SETS, "model.backbone=test_resnet", "model.bits=16", "train.epochs=3", "train.val_every=2"]
    )
    write_folder(tmp_path / "photos", classes=2, per_class=20)
    ingest(str(tmp_path / "photos"), str(tmp_path / "shards"), config)
    job = plan_training(open_current(str(tmp_path / "shards"), "shards"), None, str(tmp_path / "model"), config)
    job.writer()
    notes: list[tuple[int, str]] = []
    told: list[tuple[str, dict[str, object]]] = []
    train_worker(job, lambda *report: notes.append(report), lambda *line: told.append(line))
    assert notes[0] == (0, "first batch")
    assert [text.partition(" loss ")[0] for text, _ in told] == ["epoch 1/3:", "epoch 2/3:", "epoch 3/3:"]
    assert "map" not in told[0][1] and "mAP" not in told[0][0]
    text, fields = told[1]
    assert text == (
        f"epoch 2/3: loss {fields['loss']:.4f}, validation mAP {fields['map']:.4f} "
        f"(12 images, chance {fields['chance']:.4f})"
    )
    assert fields["val_images"] == 12 and 0 < float(str(fields["chance"])) < 1
    last = told[2][1]
    assert "mAP" not in notes[1][1] and any(f"epoch 3/3  mAP {fields['map']:.4f}  loss" in note for _, note in notes)
    assert [note for _, note in notes if "validating" in note] == ["epoch 2/3  validating", "epoch 3/3  validating"]
    assert notes[-2][1] == "epoch 3/3  validating" and notes[-1][0] == notes[-2][0] == last["step"]
    assert notes[-1][1].startswith(f"epoch 3/3  mAP {last['map']:.4f}  loss {last['loss']:.4f}  ")
