"""Adopted shards on a real S3 server, and through a real encode: every other verb takes them as they are."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.artifacts.manifest import open_artifact
from pipelines.artifacts.parquet import read_parquet
from pipelines.config.settings import Config
from pipelines.encode.encode import encode
from pipelines.errors import InputError
from pipelines.ingest.adopt import adopt
from pipelines.shards.shards import open_shards, write_tar
from pipelines.storage import Store
from pipelines.verify.verify import verify
from tests.support import pictures as drawn
from tests.support.checker import client_of
from tests.support.seaweed import BUCKET, Seaweed, seaweed


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
    in_place = adopt(source.uri, source.uri).as_json()
    assert (in_place["samples"], in_place["skipped"], in_place["tars"]) == (10, 0, 2)
    assert [name for name in source.names("parts") if name.endswith(".tar")] == []
    for out in (server.uri("copy"), str(tmp_path / "down")):
        assert adopt(source.uri, out).samples == 10
        opened = open_shards(out)
        assert [sample.damage for shard in opened.shards for sample in opened.read(shard)] == [None] * 10
        verify(out)
    verify(source.uri)
    assert adopt(source.uri, source.uri).status == "unchanged"


def test_a_missing_bucket_is_named_as_missing(server: Seaweed, tmp_path: Path) -> None:
    for work in (lambda uri: adopt(uri, str(tmp_path / "out")).as_json(), open_artifact):
        with pytest.raises(InputError, match="the bucket s3://no-such-bucket-x does not exist"):
            work("s3://no-such-bucket-x/wds")
        with pytest.raises(InputError, match="holds no"):
            work(server.uri("nothing"))


def test_tars_of_a_prefix_by_name(server: Seaweed, wds: Path, tmp_path: Path) -> None:
    source = Store(server.uri("named"))
    for path in wds.iterdir():
        source.put(f"{path.stem} (1)+=.tar", path)
    assert adopt(f"{source.uri}/train-0 (1)+=.tar", str(tmp_path / "one")).samples == 5
    assert adopt(f"{source.uri}/train-{{0..1}} (1)+=.tar", source.uri).samples == 10
    verify(source.uri)
    with pytest.raises(InputError, match=r"named/train-2 \(1\)\+=\.tar does not exist"):
        adopt(f"{source.uri}/train-{{0..2}} (1)+=.tar", str(tmp_path / "three"))


def test_a_public_bucket_is_read_without_keys(
    server: Seaweed, wds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Store(server.uri("public"))
    for path in wds.iterdir():
        source.put(path.name, path)
    allowed = {"Effect": "Allow", "Principal": "*", "Action": ["s3:GetObject", "s3:ListBucket"]}
    allowed["Resource"] = [f"arn:aws:s3:::{BUCKET}", f"arn:aws:s3:::{BUCKET}/*"]
    policy = json.dumps({"Version": "2012-10-17", "Statement": [allowed]})
    client_of(server).call_s3("put_bucket_policy", Bucket=BUCKET, Policy=policy)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HHNET_STORE_UNSIGNED", "")
    words = [
        sys.executable,
        "-m",
        "pipelines",
        "ingest",
        "--adopt",
        source.uri,
        "--out",
        str(tmp_path / "out"),
        "--json",
    ]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 3 and "Unable to locate credentials" in done.stderr and "store.unsigned" in done.stderr
    for setting in (f'store.unsigned=["{BUCKET}"]', "store.unsigned=true"):
        done = subprocess.run([*words, "--set", setting], capture_output=True, text=True)
        assert (done.returncode, json.loads(done.stdout)["samples"]) == (0, 10), done.stderr


def test_adopted_shards_are_encoded_and_proven(wds: Path, model: Path, config: Config, tmp_path: Path) -> None:
    adopt(str(wds), str(wds))
    result = encode(str(wds), str(model), str(tmp_path / "codes"), config, allow_degraded=True).as_json()
    assert (result["samples"], result["codes"], result["rejects"]) == (10, 9, 1)
    artifact = open_artifact(str(tmp_path / "codes"))
    (rejects,) = (part for part in artifact.manifest.parts if part.path.startswith("rejects/"))
    assert read_parquet(artifact.read(rejects), "rejects").select(["key", "shard", "reason"]).to_pylist() == [
        {"key": "04", "shard": "train-0.tar", "reason": "not_an_image"}
    ]
    verify(str(tmp_path / "codes"))
