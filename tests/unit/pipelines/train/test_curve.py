"""The learning curve that a model holds."""

import csv
import io
from pathlib import Path

import pytest
from PIL import Image

from pipelines.artifacts.facts import ModelCard
from pipelines.artifacts.manifest import Artifact, manifest_digest, open_artifact
from pipelines.config.loading import load_config
from pipelines.errors import DamagedArtifact
from pipelines.ingest.ingest import ingest
from pipelines.storage import canonical_json, sha256_of
from pipelines.train.learner import Batch, Learner, StepLoss
from pipelines.train.train import plan_training
from pipelines.train.worker import train_worker
from pipelines.verify.verify import verify
from tests.support.models import train_model
from tests.support.pictures import write_folder

SETS = [
    *("model.backbone=test_resnet", "model.bits=16", "data.image_size=32", "data.batch_size=8"),
    *("train.epochs=3", "train.val_every=2"),
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, Artifact]:
    """The same training at two places."""
    folder = tmp_path_factory.mktemp("curve")
    write_folder(folder / "photos", classes=2, per_class=10)
    ingest(str(folder / "photos"), str(folder / "shards"), load_config())
    one, two = (train_model(str(folder / "shards"), folder / name, load_config(sets=SETS)) for name in ("one", "two"))
    return one, two


def test_a_model_has_its_figures_by_epoch_as_a_table_and_a_picture(trained: tuple[Artifact, Artifact]) -> None:
    model, again = trained
    rows = list(csv.DictReader(io.StringIO(model.read(model.parts["learning_curve.csv"]).decode())))
    history = ModelCard.of(model).history
    assert [row["epoch"] for row in rows] == ["1", "2", "3"] and model.parts["learning_curve.csv"].rows == 3
    assert [float(row["loss"]) for row in rows] == [entry.loss for entry in history]
    assert rows[0]["map"] == "" and [float(row["map"]) for row in rows[1:]] == [entry.map for entry in history[1:]]
    with Image.open(io.BytesIO(model.read(model.parts["learning_curve.png"]))) as picture:
        picture.load()
        assert picture.format == "PNG" and picture.width >= 800
    assert model.digest == again.digest
    assert "learning_curve.csv has the figures of model.json" in verify(model.uri).checks


class _Stopped(Exception):
    """Ends a training as a kill would."""


def test_the_loss_of_an_epoch_is_the_mean_of_its_steps_also_after_a_resume_within_it(
    trained: tuple[Artifact, Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses: dict[int, float] = {}

    class Watched(Learner):
        def step(self, batch: Batch) -> StepLoss:
            found = super().step(batch)
            losses[self.step_count] = found.value()
            return found

    def stop(step: int, note: str) -> None:
        if step == 2:
            raise _Stopped

    monkeypatch.setattr("pipelines.train.worker.Learner", Watched)
    config = load_config(sets=[*SETS, "train.checkpoint_steps=1"])
    shards = str(trained[0].origin("shards"))
    job = plan_training(open_artifact(shards, "shards"), None, str(tmp_path / "model"), config)
    job.writer()
    with pytest.raises(_Stopped):
        train_worker(job, stop)
    model = train_model(shards, tmp_path / "model", config)
    history = ModelCard.of(model).history
    size = history[0].step
    assert size > 1 and [entry.step for entry in history] == [size, 2 * size, 3 * size] and len(losses) == 3 * size
    for entry in history:
        mine = [losses[step] for step in range(entry.step - size + 1, entry.step + 1)]
        assert entry.loss == pytest.approx(sum(mine) / size) and len(set(mine)) > 1


def test_a_table_with_other_figures_than_the_model_is_damage(trained: tuple[Artifact, Artifact]) -> None:
    root = Path(trained[1].uri)
    fields = open_artifact(str(root)).manifest.model_dump(mode="json")
    part = next(one for one in fields["parts"] if one["path"].endswith(".csv"))
    data = (root / part["path"]).read_bytes().replace(b"\n2,", b"\n9,")
    (root / part["path"]).write_bytes(data)
    part["sha256"] = sha256_of(data)
    (root / "manifest.json").write_bytes(canonical_json({**fields, "digest": manifest_digest(fields)}))
    with pytest.raises(DamagedArtifact, match=r"model\.json and learning_curve\.csv differ"):
        verify(str(root))
