"""Another hash layer for a trained model: what is fitted, on what, and what is refused. On Ray: tests/integration."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import hhnet
from hhnet.nn.rotation import quantisation_error
from pipelines.artifacts.facts import ModelCard
from pipelines.artifacts.manifest import open_artifact
from pipelines.config.loading import load_config
from pipelines.config.settings import Config
from pipelines.encode.encoder import Encoder
from pipelines.errors import InputError, UsageError
from pipelines.ingest.ingest import ingest
from pipelines.shards.shards import open_shards
from pipelines.train import rehead as verb
from pipelines.train.rehead import Fitted, Fitter, plan_rehead
from pipelines.train.train import plan_training
from pipelines.verify.verify import verify
from tests.support.models import train_model
from tests.support.pictures import write_folder

SETTINGS = (
    *("ingest.samples_per_shard=30", "data.image_size=32", "data.batch_size=20", "data.workers=1"),
    *("model.backbone=resnet18", "model.bits=16", "train.epochs=2", "train.val_share=0.2", "train.loss=ce"),
)
PER_CLASS, CLASSES = 20, 5


def settings(*more: str) -> Config:
    return load_config(sets=(*SETTINGS, *more))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rotate")
    write_folder(folder / "images", CLASSES, PER_CLASS, 32)
    ingest(str(folder / "images"), str(folder / "shards"), settings())
    train_model(str(folder / "shards"), folder / "model", settings())
    return folder


def fit_here(job: verb.RotateJob) -> verb.Fitted:
    """The worker runs in this process; its bytes go through JSON as they do on the way to the store."""
    return Fitter(job, lambda done, note: None).run(job.model)


def run(root: Path, out: Path, method: str, *more: str, model: str = "model") -> dict[str, Any]:
    return verb.rotate(str(root / model), str(out), settings(f"train.rotate={method}", *more), fit=fit_here).as_json()


def training_images(root: Path) -> tuple[list[bytes], set[str]]:
    """Those that were trained on, by the rule of the split, and the keys of the others."""
    from pipelines.train.batches import TrainData

    data = TrainData.make(open_shards(str(root / "shards")), None, settings())
    rows = [(shard, set(rows.tolist())) for shard, rows in zip(data.train.shards, data.rows, strict=True)]
    images, held = [], set()
    for shard, mine in rows:
        for sample in data.train.read(shard):
            if sample.record.row in mine:
                images.append(sample.image)
            else:
                held.add(sample.record.key)
    return images, held


@pytest.mark.parametrize("method", ["h2q", "itq"])
def test_a_rotation_turns_the_outputs_and_lessens_their_error(root: Path, tmp_path: Path, method: str) -> None:
    result = run(root, tmp_path / "out", method)
    assert (result["verb"], result["status"], result["rotated"]) == ("train", "done", method)
    assert (result["images"], result["bits"]) == (80, 16)
    images, held = training_images(root)
    assert len(held) == 20
    before = Encoder.open(str(root / "model")).real_codes(images)
    after = Encoder.open(str(tmp_path / "out")).real_codes(images)
    assert result["error_before"] == pytest.approx(quantisation_error(before), abs=1e-4)
    assert result["error"] == pytest.approx(quantisation_error(after), abs=1e-4)
    assert result["error"] < result["error_before"]
    np.testing.assert_allclose(before @ before.T, after @ after.T, rtol=1e-3, atol=1e-2)  # no angle has changed
    assert verify(str(tmp_path / "out")).status == "done"
    again = run(root, tmp_path / "out", method)
    assert again["status"] == "unchanged" and again["digest"] == result["digest"]
    assert {name: again[name] for name in ("map", "error")} == {name: result[name] for name in ("map", "error")}


def test_validation_measures_it_on_what_was_held_out(root: Path, tmp_path: Path) -> None:
    """By hand: the first fifth of the held-out samples is searched in the others."""
    from pipelines.train.batches import TrainData

    result = run(root, tmp_path / "out", "itq")
    shards = open_shards(str(root / "shards"))
    data = TrainData.make(shards, None, settings())
    encoder = Encoder.open(str(tmp_path / "out"))
    samples = [next(shards.read(shards.shards[shard], [row])) for shard, row in data.val_rows]
    codes = hhnet.pack_bits(encoder.real_codes([sample.image for sample in samples]) > 0)
    labels = np.array([sample.record.labels[0] for sample in samples])
    cut = data.queries
    expected = hhnet.mean_average_precision(codes[:cut], labels[:cut], codes[cut:], labels[cut:])
    assert result["map"] == pytest.approx(expected, abs=1e-9)
    assert result["map_before"] == open_artifact(str(root / "model")).manifest.meta["metrics"]["map"]
    assert open_artifact(str(tmp_path / "out")).manifest.meta["metrics"]["map"] == result["map"]


@pytest.mark.parametrize("method", ["lsh", "pca", "pca-itq"])
def test_a_projection_takes_the_features(root: Path, tmp_path: Path, method: str) -> None:
    result = run(root, tmp_path / "out", method)
    images, _ = training_images(root)
    base, made = Encoder.open(str(root / "model")), Encoder.open(str(tmp_path / "out"))
    squares = [verb.decode_square(image, base.preprocess)[0] for image in images]
    features = base.outputs(squares, base.model.backbone)
    outputs = made.outputs(squares)
    centred = features - features.mean(0)
    weight, *_ = np.linalg.lstsq(centred, outputs, rcond=None)
    np.testing.assert_allclose(centred @ weight, outputs, atol=1e-2 * np.abs(outputs).max())
    assert np.abs(outputs.mean(0)).max() < 1e-3 * np.abs(outputs).max()
    if method != "lsh":
        variance = np.linalg.svd(centred, compute_uv=False)[:16] ** 2
        assert (outputs.astype(np.float64) ** 2).sum() == pytest.approx(variance.sum(), rel=1e-3)
    assert "error_before" not in result and 0 < result["error"] < 2


def test_the_class_index_is_that_of_the_classifier_in_the_checkpoint(root: Path, tmp_path: Path) -> None:
    from pipelines.train.checkpoints import Checkpoints

    result = run(root, tmp_path / "out", "classes")
    assert (result["bits"], result["images"]) == (3, 0)
    base = open_artifact(str(root / "model"), "model")
    checkpoints = Checkpoints(base.store, base.manifest.fingerprint)
    last = checkpoints.latest()
    assert last is not None
    learned = checkpoints.open_named(last.best).tensors("loss.classifier.")
    images, _ = training_images(root)
    outputs = torch.from_numpy(Encoder.open(base).real_codes(images))
    expected = (outputs @ learned["weight"].T + learned["bias"]).argmax(1).numpy()
    codes = Encoder.open(str(tmp_path / "out")).real_codes(images) > 0
    np.testing.assert_array_equal(codes @ (1 << np.arange(3)), expected)
    assert open_artifact(str(tmp_path / "out")).manifest.meta["bits"] == 3


def test_the_sample_is_seeded_and_no_larger_than_asked_for(root: Path, tmp_path: Path) -> None:
    job = plan_rehead(open_artifact(str(root / "model")), str(tmp_path), settings("train.rotate=itq"))
    _, held = training_images(root)

    def keys(*more: str) -> list[str]:
        fitter = Fitter(replace(job, config=settings("train.rotate=itq", *more)), lambda done, note: None)
        return [sample.record.key for sample in fitter._sample()]

    assert len(keys()) == 80 and not held & set(keys())
    few, other = keys("train.rotate_samples=30"), keys("train.rotate_samples=30", "train.seed=1")
    assert len(set(few)) == len(set(other)) == 30 and set(few) != set(other)
    assert few == keys("train.rotate_samples=30") and not held & set(few + other)


def test_images_that_do_not_decode_are_left_out(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole: Callable[..., Any] = verb.decode_square
    seen = iter(range(1000))

    def damaged(data: bytes, preprocess: Any) -> Any:
        if next(seen) < 10:
            raise verb.ImageReject("damaged", "made so")
        return whole(data, preprocess)

    monkeypatch.setattr(verb, "decode_square", damaged)
    assert run(root, tmp_path / "out", "itq")["images"] == 70
    monkeypatch.setattr(verb, "decode_square", lambda *_: (_ for _ in ()).throw(verb.ImageReject("damaged", "all")))
    with pytest.raises(InputError, match="none of 80 training images decodes"):
        run(root, tmp_path / "none", "itq")
    assert not (tmp_path / "none").exists()


def test_what_makes_another_model_has_another_fingerprint(root: Path, tmp_path: Path) -> None:
    model = open_artifact(str(root / "model"))
    marks = {
        plan_rehead(model, str(tmp_path), settings(*more)).fingerprint
        for more in (
            ("train.rotate=h2q",),
            ("train.rotate=itq",),
            ("train.rotate=h2q", "train.seed=1"),
            ("train.rotate=h2q", "train.rotate_samples=9"),
        )
    }
    assert len(marks) == 4
    same = settings("train.rotate=h2q", "train.epochs=9", "data.workers=7")
    assert plan_rehead(model, str(tmp_path), same).fingerprint in marks
    plain = plan_training(open_artifact(str(root / "shards")), None, str(tmp_path), settings()).fingerprint
    turned = plan_training(open_artifact(str(root / "shards")), None, str(tmp_path), settings("train.rotate=h2q"))
    assert turned.fingerprint == plain  # the training is the same, and found again


def test_refusals(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="nothing to do to the model: give --rotate"):
        verb.rotate(str(root / "model"), str(out), settings())
    with pytest.raises(InputError, match="itq: the hash layer is not linear"):
        run(root, tmp_path / "index", "classes")
        verb.rotate(str(tmp_path / "index"), str(out), settings("train.rotate=itq"))
    with pytest.raises(InputError, match=r"pca: 9 rows of 512 features have no 16 directions"):
        run(root, out, "pca", "train.rotate_samples=9")
    assert not out.exists()


def test_a_classifier_that_is_not_there_is_refused(root: Path, tmp_path: Path) -> None:
    from shutil import copytree, rmtree

    copytree(root / "model", tmp_path / "model")
    rmtree(tmp_path / "model" / "checkpoints")
    with pytest.raises(InputError, match=r"the checkpoints of .*model, which have its classifier, are gone"):
        verb.rotate(str(tmp_path / "model"), str(tmp_path / "out"), settings("train.rotate=classes"))
    train_model(str(root / "shards"), root / "other", settings("train.loss=csq", "train.epochs=1"))
    with pytest.raises(InputError, match="was trained with loss csq, which has no classifier"):
        run(root, tmp_path / "out", "classes", model="other")
    assert not (tmp_path / "out").exists()


def test_the_new_card_has_the_settings_of_both(root: Path, tmp_path: Path) -> None:
    fitted = Fitter(
        plan_rehead(open_artifact(str(root / "model")), str(tmp_path), settings("train.rotate=h2q")), lambda d, n: None
    ).run("")
    assert isinstance(fitted, Fitted) and ModelCard.from_json(fitted.card.as_json()) == fitted.card
    assert (fitted.card.config.train.rotate, fitted.card.config.train.epochs) == ("h2q", 2)
