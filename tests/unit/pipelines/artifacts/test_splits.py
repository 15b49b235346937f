"""The split of the field that images are of: from shards into models, codes and reports, and what is made of it."""

import json
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from pipelines.artifacts.facts import ShardsMeta
from pipelines.artifacts.manifest import manifest_digest, open_artifact
from pipelines.artifacts.splits import split_part
from pipelines.config.loading import load_config
from pipelines.config.settings import Config, EvaluateSettings
from pipelines.encode.encode import encode
from pipelines.errors import DamagedArtifact, FingerprintMismatch
from pipelines.evaluate.evaluate import evaluate
from pipelines.ingest.ingest import ingest
from pipelines.ingest.protocols.cifar10 import CLASSES, Cifar10
from pipelines.storage import canonical_json
from pipelines.train import rehead as rotation
from pipelines.verify.verify import verify
from tests.support.inline import InlinePool
from tests.support.models import train_model, write_model
from tests.support.protocols import warnings_in, write_pictures

PLAIN = Config(evaluate=EvaluateSettings(gallery=0))
ENCODE = load_config(sets=["data.image_size=32", "encode.batch_size=16"])
SPLITS = {
    "a": Cifar10(name="a", parts={"train": 60, "query": 20, "database": 100}, database=("database",), batch=30),
    "b": Cifar10(name="b", parts={"train": 60, "query": 30, "database": 90}, database=("train", "database"), batch=30),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two splits of one data set, shards of none, and a model whose training images are those of `a`."""
    folder = tmp_path_factory.mktemp("lineage")
    for group, images in (("train", 15), ("test", 3)):
        write_pictures(folder / "images", (f"{group}/{name}/{n:02d}.jpg" for name in CLASSES for n in range(images)))
    for name, protocol in SPLITS.items():
        ingest(str(folder / "images"), str(folder / name), load_config(), protocol=protocol)
    ingest(str(folder / "images" / "test"), str(folder / "none"), load_config())
    write_model(folder / "model", str(folder / "a" / "train"))
    for name in ("a/train", "a/query", "a/database", "b/train", "b/query", "b/database", "none"):
        out = folder / "codes" / name
        encode(str(folder / name), str(folder / "model"), str(out), ENCODE, pool=InlinePool())
    return folder


def with_split(model: Path, more: dict[str, Any]) -> None:
    manifest = json.loads((model / "manifest.json").read_bytes())
    manifest["meta"] |= more
    manifest["digest"] = manifest_digest(manifest)
    (model / "manifest.json").write_bytes(canonical_json(manifest))


def report(root: Path, out: Path, queries: str, *database: str) -> dict[str, Any]:
    return evaluate(
        str(root / "codes" / queries), [str(root / "codes" / name) for name in database], str(out), PLAIN
    ).as_json()


def notes(result: dict[str, Any]) -> list[str]:
    found: list[str] = json.loads(Path(result["metrics"]).read_text())["notes"]
    return [note for note in found if "protocol" in note or "split" in note or "trained" in note]


def test_codes_carry_the_split_of_their_shards_and_of_their_model(root: Path) -> None:
    codes, shards = (open_artifact(str(root / at)) for at in ("codes/b/query", "b/query"))
    card = shards.manifest.meta["protocol"]
    assert codes.manifest.meta["protocol"] == {
        **{name: card[name] for name in ("name", "digest", "database")},
        "part": "query",
    }
    assert codes.manifest.meta["trained_on"]["name"] == "a" and codes.manifest.meta["trained_on"]["part"] == "train"
    assert "protocol" not in open_artifact(str(root / "codes/none")).manifest.meta
    assert verify(str(root / "codes/b/query")).status == "done"


def test_training_and_rotating_carry_it_into_the_model(root: Path, tmp_path: Path) -> None:
    sets = ["data.image_size=32", "data.batch_size=20", "model.backbone=resnet18", "model.bits=16", "train.epochs=1"]
    learned = train_model(str(root / "a" / "train"), tmp_path / "model", load_config(sets=sets))
    assert learned.manifest.meta["protocol"] == open_artifact(str(root / "codes/a/train")).manifest.meta["protocol"]
    turned = rotation.rotate(
        *(learned.uri, str(tmp_path / "turned"), load_config(sets=["train.rotate=itq"])),
        fit=lambda job: rotation.Fitter(job, lambda done, note: None).run(job.model),
    ).as_json()
    assert open_artifact(turned["uri"]).manifest.meta["protocol"] == learned.manifest.meta["protocol"]
    assert verify(learned.uri).status == verify(turned["uri"]).status == "done"


@pytest.mark.parametrize("key", ["protocol", "trained_on"])
def test_a_split_that_is_not_that_of_the_input_is_found(root: Path, tmp_path: Path, key: str) -> None:
    from shutil import copytree

    copytree(root / "codes/b/query", tmp_path / "codes")
    card = open_artifact(str(tmp_path / "codes")).manifest.meta[key]
    with_split(tmp_path / "codes", {key: {**card, "digest": "0" * 64}})
    with pytest.raises(DamagedArtifact, match=rf"names another split \({key}\) than its input"):
        verify(str(tmp_path / "codes"))
    with_split(tmp_path / "codes", {key: "b"})
    with pytest.raises(DamagedArtifact, match=rf"the codes manifest cannot be used \({key} is wrong"):
        split_part(open_artifact(str(tmp_path / "codes")))


def test_a_report_of_a_protocol_says_so(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begun = datetime.now(UTC).replace(microsecond=0)
    result = report(root, tmp_path / "report", "a/query", "a/database")
    digest = open_artifact(str(root / "a" / "query")).manifest.meta["protocol"]["digest"]
    assert (result["protocol"], result["split"]) == ("a", digest)
    assert notes(result) == warnings_in(capsys.readouterr().err) == []
    page = Path(result["report"]).read_text()
    assert re.search(rf"<th[^>]*>split</th>.*?{digest}", page) and "searched are" in page
    (searched,) = result["queries_searched"]
    assert begun <= datetime.fromisoformat(searched) <= datetime.now(UTC) + timedelta(seconds=1)
    again = report(root, tmp_path / "report", "a/query", "a/database")
    assert (again["status"], again["queries_searched"]) == ("unchanged", [searched])


def test_splits_are_not_mixed(root: Path, tmp_path: Path) -> None:
    with pytest.raises(FingerprintMismatch, match=r"a/query is of split a \(\w{12}\), .*b/database of b \(\w{12}\)"):
        report(root, tmp_path / "report", "a/query", "b/database")
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    ("queries", "database", "said"),
    [
        (
            "a/query",
            ("a/train", "a/database"),
            "searches its queries in database: here query is searched in database and",
        ),
        ("a/database", ("a/query",), "here database is searched in query"),
        ("a/query", ("a/database", "none"), "here query is searched in database and others"),
        ("b/query", ("b/train", "b/database"), r"The model was trained on split a \(\w{12}\), the queries are of b"),
        ("a/train", ("a/database",), "The queries are images that the model was trained on"),
    ],
)
def test_what_is_not_the_protocols_figure_is_said(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], queries: str, database: tuple[str, ...], said: str
) -> None:
    result = report(root, tmp_path / "report", queries, *database)
    assert any(re.search(said, note) for note in notes(result))
    assert warnings_in(capsys.readouterr().err) == notes(result)


def test_queries_that_were_learned_are_told_without_a_split_too(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_model(tmp_path / "model", str(root / "none"))
    for name in ("none", "a/database"):
        encode(str(root / name), str(tmp_path / "model"), str(tmp_path / "codes" / name), ENCODE, pool=InlinePool())
    result = report(tmp_path, tmp_path / "report", "none", "a/database")
    assert warnings_in(capsys.readouterr().err) == [
        "The queries are images that the model was trained on: the figures say nothing of others."
    ]
    assert "split" not in result


def test_shards_of_a_plain_split_carry_nothing(root: Path) -> None:
    assert open_artifact(str(root / "none")).facts(ShardsMeta).split_part is None
