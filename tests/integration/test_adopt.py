"""Adopted shards on a real S3 server, and through a real encode: every other verb takes them as they are."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.artifacts import open_artifact
from pipelines.config import Config
from pipelines.encode import encode
from pipelines.intake.adopt import adopt
from pipelines.schema import read_parquet
from pipelines.shards import open_shards, write_tar
from pipelines.storage import Store
from pipelines.verify import verify
from tests.support import pictures as drawn
from tests.support.seaweed import Seaweed, seaweed


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seaweed]:
    with seaweed(tmp_path_factory.mktemp("weed")) as running, running.environment():
        yield running


@pytest.fixture
def wds(tmp_path: Path) -> Path:
    """Two tars of five samples, one of which is no picture."""
    folder = tmp_path / "wds"
    folder.mkdir()
    for tar in range(2):
        images = [drawn.jpeg(drawn.picture(number % 3, number)) for number in range(5)]
        images[4] = images[4] if tar else drawn.text_as_jpeg()
        names = [f"{tar}{number}" for number in range(5)]
        write_tar(
            folder / f"train-{tar}.tar",
            ({"__key__": name, "jpg": image, "cls": b"1"} for name, image in zip(names, images, strict=True)),
        )
    return folder


def test_tars_in_s3_are_indexed_where_they_lie_and_copied_elsewhere(server: Seaweed, wds: Path, tmp_path: Path) -> None:
    source = Store(server.uri("adopted"))
    for path in wds.iterdir():
        source.put(path.name, path)
    in_place = adopt(source.uri, source.uri)
    assert (in_place["samples"], in_place["skipped"], in_place["tars"]) == (10, 0, 2)
    assert [name for name in source.names("parts") if name.endswith(".tar")] == []
    for out in (server.uri("copy"), str(tmp_path / "down")):
        assert adopt(source.uri, out)["samples"] == 10
        opened = open_shards(out)
        assert [sample.damage for shard in opened.shards for sample in opened.read(shard)] == [None] * 10
        verify(out)
    verify(source.uri)
    assert adopt(source.uri, source.uri)["status"] == "unchanged"


def test_adopted_shards_are_encoded_and_proven(wds: Path, model: Path, config: Config, tmp_path: Path) -> None:
    adopt(str(wds), str(wds))
    result = encode(str(wds), str(model), str(tmp_path / "codes"), config, allow_degraded=True)
    assert (result["samples"], result["codes"], result["rejects"]) == (10, 9, 1)
    artifact = open_artifact(str(tmp_path / "codes"))
    (rejects,) = (part for part in artifact.manifest.parts if part.path.startswith("rejects/"))
    assert read_parquet(artifact.read(rejects), "rejects").select(["key", "shard", "reason"]).to_pylist() == [
        {"key": "04", "shard": "train-0.tar", "reason": "not_an_image"}
    ]
    verify(str(tmp_path / "codes"))
