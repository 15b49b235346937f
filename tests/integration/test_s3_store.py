"""The store, and ingest and verify on it, against a real S3 server."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import s3fs

from pipelines.artifacts.commit import ArtifactWriter, list_versions, publish_version
from pipelines.artifacts.facts import QuantizerReceipt, Receipt
from pipelines.artifacts.manifest import Part, open_artifact
from pipelines.artifacts.runs import RunLog, closed_records
from pipelines.config.loading import load_config
from pipelines.encode.codes import open_codes
from pipelines.errors import (
    CommitConflict,
    CommitUnknown,
    ConfigError,
    DamagedArtifact,
    FingerprintMismatch,
    InputError,
    StoreUnavailable,
)
from pipelines.ingest.ingest import ingest
from pipelines.search.images import find_images, read_images
from pipelines.shards.index import piece_name
from pipelines.shards.shards import open_shards
from pipelines.storage import Store, canonical_json
from pipelines.storage.bucket import Answer, Bucket
from pipelines.storage.s3 import S3Objects
from pipelines.verify.status import status
from pipelines.verify.verify import verify
from tests.support import pictures
from tests.support.codes import write_many_codes
from tests.support.faults import FaultProxy
from tests.support.seaweed import BUCKET, Seaweed, seaweed

MARK = "f" * 64


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seaweed]:
    with seaweed(tmp_path_factory.mktemp("weed")) as running, running.environment():
        yield running


def test_an_object_of_several_uploads_is_put_once(server: Seaweed, tmp_path: Path) -> None:
    with (tmp_path / "x").open("wb") as stream:
        stream.truncate(110 << 20)  # above the size from which a multipart upload is used
    store = Store(server.uri("large"))
    assert store.put("x.bin", tmp_path / "x")
    assert not store.put("x.bin", tmp_path / "x")
    assert store.size("x.bin") == 110 << 20


def test_an_object_is_a_query_image(server: Seaweed) -> None:
    data = pictures.jpeg(pictures.picture(1, 0))
    Store(server.uri("queries")).put("my cats/a b.jpg", data)
    (source,) = find_images([server.uri("queries/my cats/a b.jpg")])
    (image,) = read_images([source], 0, [])
    assert (image.name, image.data) == (server.uri("queries/my cats/a b.jpg"), data)
    for name in ("queries/none.jpg", "queries/my cats", "queries/*.jpg"):
        with pytest.raises(InputError, match="does not exist: name an object, for prefixes and patterns"):
            list(read_images(find_images([server.uri(name)]), 0, []))


def test_an_artifact_is_committed_opened_and_checked(server: Seaweed, tmp_path: Path) -> None:
    store = Store(server.uri("artifact"))

    def commit(data: bytes = b"data", mark: str = MARK) -> str:
        writer = ArtifactWriter(store, "shards", mark, (), {"source": "here"})
        part = writer.put_part("part.bin", data, 1)
        receipt = writer.put_receipt("part", QuantizerReceipt(part=part))
        return writer.commit([part], {"samples": 1}, {}, {"part": receipt}).digest

    digest = commit()
    assert commit() == digest
    with pytest.raises(CommitConflict):
        commit(b"other")
    with pytest.raises(FingerprintMismatch):
        commit(mark="e" * 64)
    artifact = open_artifact(store.uri, "shards")
    assert artifact.digest == digest
    assert artifact.origin("source") == "here"
    part = artifact.manifest.part("part.bin")
    assert artifact.read(part) == b"data"
    assert artifact.fetch(part, tmp_path).read_bytes() == b"data"
    assert publish_version(store, 1, "manifest.json", digest)
    assert not publish_version(store, 1, "manifest.json", "0" * 64)
    assert list_versions(store) == [1]
    store.delete(part.path)
    with pytest.raises(DamagedArtifact, match="is missing"):
        artifact.read(part)


def test_ingest_fetches_objects_by_their_urls(server: Seaweed, tmp_path: Path) -> None:
    pictures.write_folder(tmp_path / "images", classes=1, per_class=3)
    source, out = Store(server.uri("pictures")), str(tmp_path / "out")
    files = sorted((tmp_path / "images").rglob("*.*g"))
    for file in files:
        source.put(file.name, file)
    names = [*(file.name for file in files), "x"]
    (tmp_path / "list.csv").write_text("path\n" + "".join(f"{source.uri}/{name}\n" for name in names))
    result = ingest(str(tmp_path / "list.csv"), out, load_config(), label_columns=[], allow_degraded=True).as_json()
    assert result["skipped_files"] == [
        {"path": f"{source.uri}/x", "reason": "missing", "detail": "no such object", "retryable": False}
    ]
    shards = open_shards(out)
    found = {sample.record.path: sample.image for shard in shards.shards for sample in shards.read(shard)}
    assert found == {f"{source.uri}/{file.name}": file.read_bytes() for file in files}


def test_ingest_writes_the_same_bytes_as_on_a_disk(server: Seaweed, tmp_path: Path) -> None:
    pictures.write_folder(tmp_path / "images")
    config = load_config(sets=["ingest.samples_per_shard=10"])
    local = ingest(str(tmp_path / "images"), str(tmp_path / "out"), config).as_json()
    remote = ingest(str(tmp_path / "images"), server.uri("shards"), config).as_json()
    assert remote["status"] == "done"
    assert remote["digest"] == local["digest"]
    assert ingest(str(tmp_path / "images"), server.uri("shards"), config).status == "unchanged"
    here, there = open_shards(local["uri"]), open_shards(remote["uri"])
    for mine, theirs in zip(here.shards, there.shards, strict=True):
        assert list(here.read(mine)) == list(there.read(theirs))
    assert verify(remote["uri"]).orphans == []
    victim = there.shards[1].part
    there.artifact.store.delete(victim.path)
    assert there.artifact.store.put(victim.path, b"\0" * 5000)
    damaged = [sample.damage for sample in there.read(there.shards[1])]
    assert len(damaged) == 10
    assert all(damaged)
    with pytest.raises(DamagedArtifact, match="shard-000001"):
        verify(remote["uri"])
    assert there.artifact.read(there.artifact.manifest.part(piece_name(0)))


def test_nothing_there_and_no_such_bucket(server: Seaweed) -> None:
    for uri, said in (
        (server.uri("nowhere"), r"no manifest\.json"),
        ("s3://no-such-bucket/x", "does not exist: check"),
    ):
        with pytest.raises(InputError, match=said):
            open_artifact(uri)
        assert Store(uri).names("parts") == []


def test_wrong_keys_are_store_unavailable_and_not_shown(server: Seaweed) -> None:
    with server.environment(AWS_SECRET_ACCESS_KEY="notthesecret"):
        for call in (lambda s: s.put("a", b"x"), lambda s: s.read("a"), lambda s: s.size("a"), lambda s: s.names("")):
            with pytest.raises(StoreUnavailable) as caught:
                call(Store(server.uri("denied")))
            assert "notthesecret" not in str(caught.value)


def test_a_server_that_is_gone_is_store_unavailable(server: Seaweed) -> None:
    with server.environment(AWS_ENDPOINT_URL_S3="http://127.0.0.1:9", HHNET_STORE_DEADLINE_S="1"):
        store = Store(server.uri("gone"))
        for call in (lambda: store.read("a"), lambda: store.put("a", b"x"), lambda: store.size("a")):
            with pytest.raises(StoreUnavailable, match=r"within 1 s .*: Could not connect") as caught:
                call()
            assert not isinstance(caught.value, CommitUnknown)


@pytest.mark.parametrize("name", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
def test_the_endpoint_is_taken_from_either_variable(
    server: Seaweed, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3")
    monkeypatch.setenv(name, server.endpoint)
    s3fs.S3FileSystem.clear_instance_cache()
    assert Store(server.uri(f"endpoint-{name}")).put("a", b"x")


def test_an_endpoint_that_is_none(server: Seaweed) -> None:
    with server.environment(AWS_ENDPOINT_URL_S3="nowhere"), pytest.raises(ConfigError, match="nowhere"):
        Store(server.uri("x")).read("a")


@pytest.mark.parametrize("text", ["soon", "-1", "0", "inf", "nan"])
def test_a_deadline_that_is_no_time(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("HHNET_STORE_DEADLINE_S", text)
    with pytest.raises(ConfigError, match="HHNET_STORE_DEADLINE_S"):
        Store("s3://bucket/x")


def test_listing_says_sizes_and_times(server: Seaweed) -> None:
    before = time.time() - 2
    store = Store(server.uri("entries"))
    store.put("a/b", b"12345")
    store.put("c", b"1")
    entries = store.entries()
    assert {name: entry.size for name, entry in entries.items()} == {"a/b": 5, "c": 1}
    assert all(before < entry.modified < time.time() + 2 for entry in entries.values())
    store.discard("a")
    assert store.names("") == ["c"]


def test_a_long_listing_has_all_its_pages(server: Seaweed) -> None:
    store = Store(server.uri("pages"), S3Objects(f"{BUCKET}/pages", ShortPages(BUCKET, 60.0)))
    names = [f"{number:02d}" for number in range(11)]
    for name in names:
        store.put(name, b"")
    ShortPages.asked = 0
    assert store.names("") == names
    assert ShortPages.asked == 4


class ShortPages(Bucket):
    """A bucket whose listings come in pages of three."""

    asked = 0

    async def request(self, method: str, **fields: object) -> Answer:
        ShortPages.asked += 1
        return await super().request(method, **fields, **({"MaxKeys": 3} if method == "list_objects_v2" else {}))


def test_a_read_that_is_limited_fetches_no_more(server: Seaweed) -> None:
    store = Store(server.uri("limited"))
    store.put("x", bytes(range(256)) * 40_000)
    assert store.read("x", limit=10) == bytes(range(11))
    assert len(store.read("x", limit=10_240_000)) == 10_240_000


def test_opening_codes_on_s3_asks_for_no_receipt(server: Seaweed, tmp_path: Path) -> None:
    local, count = Path(write_many_codes(tmp_path / "codes", 100)), 100
    store = Store(server.uri("many"))
    for path in sorted(local.rglob("*.json")):
        store.put(str(path.relative_to(local)), path.read_bytes())
    with FaultProxy(server.endpoint) as proxy, server.environment(AWS_ENDPOINT_URL_S3=proxy.endpoint):
        opened = open_codes(server.uri("many"))
        proxy.reset()
        assert len(opened.shards) == count
        assert not proxy.seen


WORKS = """
import sys, time
from pipelines.artifacts.runs import RunLog
from pipelines.storage import Store
with RunLog(Store(sys.argv[1]), "encode", total=40, unit="images", shards=4) as log:
    log.reach(10)
    print("begun", flush=True)
    time.sleep(600)
"""


def test_a_run_on_s3_is_seen_while_it_works_and_after_it_was_killed(server: Seaweed) -> None:
    uri = server.uri("run/codes/database")
    store = ArtifactWriter(Store(uri), "codes", MARK, (), {}).store
    part = Part(path="parts/a.parquet", bytes=1, sha256="0" * 64, rows=10)
    receipt = Receipt(shard="a.tar", shard_sha256="0" * 64, samples=10, part=part, rejects=None)
    store.put("receipts/a.json", canonical_json(receipt))
    with subprocess.Popen([sys.executable, "-c", WORKS, uri], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        working = status(uri).as_json()
        process.kill()
    assert (working["status"], working["shards"], working["done"]) == ("working", {"done": 1, "of": 4}, 10)
    assert (status(uri).status, status(server.uri("run")).status) == ("died", "died")
    with RunLog(store, "encode", total=40, unit="images", shards=4) as log:
        assert status(uri).found["run"]["name"] == log.name
    assert [(one["end"], one.get("closed_by")) for one in closed_records(store)] == [("died", log.name), ("done", None)]
