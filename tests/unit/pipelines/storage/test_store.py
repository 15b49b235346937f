"""The commit protocol on a local store: put-if-absent, artifacts, tampering, versions."""

import io
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import cast

import pytest

from pipelines.artifacts.commit import ArtifactWriter, list_versions, publish_version
from pipelines.artifacts.facts import QuantizerReceipt
from pipelines.artifacts.manifest import (
    MANIFEST_FORMAT,
    Artifact,
    ArtifactInput,
    Facts,
    fingerprint,
    manifest_digest,
    open_artifact,
    parse_manifest,
)
from pipelines.artifacts.runs import closed_records, write_run_record
from pipelines.artifacts.versions import open_input_version
from pipelines.errors import (
    CommitConflict,
    ConfigError,
    DamagedArtifact,
    FingerprintMismatch,
    InputError,
    StoreUnavailable,
    may_heal,
)
from pipelines.storage import ObjectStream, Store, canonical_json, sha256_of
from tests.support.memory import MemoryObjects, MemoryStore

MARK = "f" * 64


def commit(
    root: Path, data: bytes = b"data", kind: str = "shards", mark: str = MARK, inputs: tuple[ArtifactInput, ...] = ()
) -> Artifact:
    writer = ArtifactWriter(Store(root), kind, mark, inputs, {})
    part = writer.put_part("part.bin", data, rows=1)
    receipt = writer.put_receipt("part", QuantizerReceipt(part=part))
    return writer.commit([part], {"samples": 1}, {"classes": ["a"]}, {"part": receipt})


def tree(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


# ---------------------------------------------------------------------------------------------------------- store


@pytest.mark.parametrize("kind", ["folder", "pipe", "link to nothing"])
def test_what_is_no_object_in_the_place_of_one_is_said(tmp_path: Path, kind: str) -> None:
    make = {"folder": Path.mkdir, "pipe": os.mkfifo, "link to nothing": lambda path: path.symlink_to("nothing")}
    make[kind](tmp_path / "identity.json")
    with pytest.raises(StoreUnavailable, match=r"cannot write .*identity\.json: .* no plain file"):
        ArtifactWriter(Store(tmp_path), "shards", MARK, (), {})


def test_what_is_no_plain_file_is_no_object(tmp_path: Path) -> None:
    """A reader of a pipe would wait for ever, and one of a device would never see its end."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zeros").symlink_to("/dev/zero")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "file").write_bytes(b"x")
    store = Store(tmp_path)
    assert store.names("") == ["file", "link"]
    assert (store.size("link"), store.read("link")) == (1, b"x")
    for name in ("pipe", "zeros"):
        assert store.size(name) is None
        for ask in (store.read, store.open):
            with pytest.raises(FileNotFoundError):
                ask(name)


def test_a_write_that_fails_publishes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", full)
        with pytest.raises(StoreUnavailable, match=r"cannot write .*/x: No space left on device") as caught:
            store.put("x", b"data")
        assert may_heal(caught.value)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StoreUnavailable):
            store.put("x", b"data")
    assert list(tmp_path.iterdir()) == []
    assert store.put("x", b"data")


def test_a_store_that_fails_while_a_stream_is_read(tmp_path: Path) -> None:
    class Broken(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            raise TimeoutError("connection lost")

    with (
        pytest.raises(StoreUnavailable, match="cannot read here: connection lost"),
        ObjectStream(Broken(), "here") as s,
    ):
        s.read(10)


def test_a_folder_that_cannot_be_made_is_store_unavailable(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreUnavailable) as caught:
        commit(tmp_path / "file" / "out")
    assert caught.value.exit_code == 3 and not may_heal(caught.value)
    assert str(tmp_path / "file" / "out") in str(caught.value)


def test_what_is_not_there(tmp_path: Path) -> None:
    store = Store(tmp_path)
    (tmp_path / "folder").mkdir()
    assert store.size("x") is None
    assert store.names("x") == []
    for name in ("x", "folder"):
        with pytest.raises(FileNotFoundError):
            store.read(name)
    with pytest.raises(FileNotFoundError):
        store.open("x")
    store.delete("x")


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "~nobody-of-this-name/x",
        "s3://",
        "s3:///x",
        "s3://a b/c",
        "s3://b?x#y/c",
        "https://u:secret@host/x",
        "ftp://bucket/x",
        "hf://datasets",
        "hf://user:secret@x/y/z",
        "s3://user:secret@bucket/x",
        "s3://key:sec/secret@b",
    ],
)
def test_other_uris_and_credentials_are_refused(uri: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Store(uri)
    assert "secret" not in str(caught.value)


def test_an_unknown_scheme_names_those_there_are() -> None:
    with pytest.raises(ConfigError) as caught:
        Store("ftp://bucket/x")
    said = str(caught.value)
    assert said.startswith("ftp://... is no store: give a local path or s3://bucket/prefix, gs://bucket/prefix (pip")
    assert all(f"hhnet[{extra}]" in said for extra in ("gs", "az", "hf"))


@pytest.mark.parametrize("scheme", ["gs", "az", "hf"])
def test_a_library_that_is_not_installed_is_named(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("gcsfs.core", "adlfs", "huggingface_hub"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=rf"^{scheme}://\.\.\. needs .*: pip install 'hhnet\[{scheme}\]'$") as caught:
        Store(f"{scheme}://owner/name/x")
    assert caught.value.exit_code == 2


def test_file_uris_and_relative_paths_are_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Store(f"file://{tmp_path}/a").uri == Store("a").uri == str(tmp_path / "a")


# ------------------------------------------------------------------------------------------------------- artifact


def test_a_committed_artifact_opens_and_reads(tmp_path: Path) -> None:
    made = commit(tmp_path)
    opened = open_artifact(str(tmp_path), "shards")
    assert opened.digest == made.digest
    part = opened.manifest.part("part.bin")
    assert part.path == f"parts/part-{sha256_of(b'data')[:16]}.bin"
    assert opened.read(part) == b"data"
    assert opened.fetch(part, tmp_path / "scratch").read_bytes() == b"data"
    (receipt,) = opened.manifest.receipts
    assert json.loads(receipt.data)["part"]["rows"] == 1
    assert (receipt.bytes, receipt.sha256) == (len(receipt.data), sha256_of(tmp_path / receipt.path))


def test_committing_again_changes_nothing(tmp_path: Path) -> None:
    commit(tmp_path)
    before = tree(tmp_path)
    commit(tmp_path)
    assert tree(tmp_path) == before


def test_a_manifest_is_canonical_and_holds_no_place(tmp_path: Path) -> None:
    first, second = commit(tmp_path / "a"), commit(tmp_path / "b")
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    data = (tmp_path / "a/manifest.json").read_bytes()
    fields = json.loads(data)
    assert data == canonical_json(fields)
    assert fields["digest"] == manifest_digest(fields) == first.digest == second.digest
    assert str(tmp_path).encode() not in data


def test_another_manifest_is_a_conflict(tmp_path: Path) -> None:
    commit(tmp_path, b"one")
    before = tree(tmp_path)["manifest.json"]
    with pytest.raises(CommitConflict):
        commit(tmp_path, b"two")
    assert tree(tmp_path)["manifest.json"] == before


def test_a_root_of_another_fingerprint_is_refused_naming_it(tmp_path: Path) -> None:
    commit(tmp_path)
    with pytest.raises(FingerprintMismatch) as caught:
        commit(tmp_path, mark="e" * 64)
    assert f"fingerprint {'f' * 12} there" in str(caught.value)
    assert caught.value.exit_code == 2


class Attempt(Facts):
    attempt: int


def test_the_first_receipt_wins(tmp_path: Path) -> None:
    writer = ArtifactWriter(Store(tmp_path), "codes", MARK, (), {})
    assert writer.put_receipt("s", Attempt(attempt=1)) == Attempt(attempt=1)
    assert writer.put_receipt("s", Attempt(attempt=2)) == Attempt(attempt=1)
    assert writer.receipts(Attempt) == {"s": Attempt(attempt=1)}


def test_a_part_of_the_same_size_but_other_bytes_is_not_taken_for_it(tmp_path: Path) -> None:
    writer = ArtifactWriter(Store(tmp_path), "codes", MARK, (), {})
    part = writer.put_part("x.bin", b"data", 1)
    assert writer.put_part("x.bin", b"data", 1) == part
    (tmp_path / part.path).write_bytes(b"dbta")
    with pytest.raises(CommitConflict, match="exists with other bytes"):
        writer.put_part("x.bin", b"data", 1)
    assert (tmp_path / part.path).read_bytes() == b"dbta"


@pytest.mark.parametrize("name", ["../x.bin", "a/b.bin", "", "x\ny", "x?y"])
def test_a_part_name_cannot_leave_its_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError):
        ArtifactWriter(Store(tmp_path), "codes", MARK, (), {}).put_part(name, b"", 0)


def test_nothing_committed_is_an_input_error(tmp_path: Path) -> None:
    ArtifactWriter(Store(tmp_path), "codes", MARK, (), {}).put_part("x.bin", b"data", 1)
    with pytest.raises(InputError, match=r"no manifest\.json"):
        open_artifact(str(tmp_path))


def test_another_kind_is_an_input_error(tmp_path: Path) -> None:
    commit(tmp_path)
    with pytest.raises(InputError, match="is a shards artifact, not codes"):
        open_artifact(str(tmp_path), "codes")


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: b"DATA", lambda data: data + b"x", None])
def test_a_tampered_part_is_never_returned(tmp_path: Path, change: Callable[[bytes], bytes] | None) -> None:
    artifact = commit(tmp_path)
    part = artifact.manifest.part("part.bin")
    path = tmp_path / part.path
    path.write_bytes(change(b"data")) if change else path.unlink()
    for read in (artifact.read, lambda part: artifact.fetch(part, tmp_path)):
        with pytest.raises(DamagedArtifact, match=part.path):
            read(part)


def test_a_folder_that_one_run_removes_while_another_puts_ends_neither(tmp_path: Path) -> None:
    store, ended = Store(tmp_path), threading.Event()

    def remove() -> None:
        while not ended.is_set():
            store.discard("receipts")
            time.sleep(0.002)  # each put meets a removal, and not one after another

    with ThreadPoolExecutor(1) as pool:
        removing = pool.submit(remove)
        try:
            for number in range(500):
                assert store.put(f"receipts/a/{number}.json", b"x")
        finally:
            ended.set()
        removing.result()
    store.discard("receipts")
    assert store.names("") == [] and not (tmp_path / "receipts").exists()


class Fleeting(MemoryObjects):
    """At the first put another run has the object there, and deletes it before anybody reads it."""

    seen = False

    def put(self, name: str, data: bytes | Path, point: str) -> bool:
        self.seen, before = True, self.seen
        return before and super().put(name, data, point)


def test_what_is_deleted_while_it_is_compared_is_put_again() -> None:
    store = MemoryStore(Fleeting)
    store.put_same("a", b"data")
    assert store.read("a") == b"data"


class Line(MemoryObjects):
    """Objects that come over a line; `arrive` says what becomes of them on the way, by the number of the read."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = 0
        self.arrive: Callable[[bytes, int], bytes] = lambda data, number: data

    def open(self, name: str, block: int | None = None, start: int = 0) -> io.BytesIO:
        self.reads += 1
        return io.BytesIO(self.arrive(self.read(name), self.reads))


@pytest.mark.parametrize(
    ("arrive", "reads"),
    [
        (lambda data, number: b"DATA" if number == 1 else data, 2),
        (lambda data, number: data[:number] if number < 4 else data, 4),
        (lambda data, number: b"DATA", None),
        (lambda data, number: b"%04d" % number, None),
        (lambda data, number: data + b"x", None),
    ],
)
def test_a_copy_has_the_bytes_of_the_part_or_there_is_none(
    tmp_path: Path, arrive: Callable[[bytes, int], bytes], reads: int | None
) -> None:
    """Bytes that changed on the way are asked for again; what comes wrong again and again is damage."""
    store = MemoryStore(Line)
    writer = ArtifactWriter(store, "shards", MARK, (), {})
    part = writer.put_part("part.bin", b"data", 1)
    artifact = writer.commit([part], {}, {})
    line = cast(Line, store.memory)
    line.arrive = arrive
    if reads is None:
        with pytest.raises(DamagedArtifact, match=part.path):
            artifact.fetch(part, tmp_path)
    else:
        assert artifact.fetch(part, tmp_path).read_bytes() == b"data"
        assert line.reads == reads


@pytest.mark.parametrize(
    "change",
    [
        lambda fields: fields["parts"][0].update(rows=-1),
        lambda fields: fields["parts"][0].update(bytes=-1),
        lambda fields: fields["totals"].update(samples=2),
        lambda fields: fields.update(kind="codes"),
        lambda fields: fields["parts"].clear(),
        lambda fields: fields.update(digest="0" * 64),
        lambda fields: fields.pop("totals"),
        lambda fields: fields.update(extra=1),
    ],
)
def test_a_tampered_manifest_is_damage(tmp_path: Path, change: Callable[[dict[str, object]], object]) -> None:
    commit(tmp_path)
    path = tmp_path / "manifest.json"
    fields = json.loads(path.read_bytes())
    change(fields)
    path.write_bytes(canonical_json(fields))
    with pytest.raises(DamagedArtifact, match=r"manifest\.json"):
        open_artifact(str(tmp_path))


@pytest.mark.parametrize(
    "change",
    [{"meta": {"x": "\ud800"}}, {"receipts": [{"shard": "a", "path": "r", "receipt": "no"}]}, {"meta": {"x": 1e999}}],
)
def test_values_that_no_manifest_has_are_damage(tmp_path: Path, change: dict[str, object]) -> None:
    fields = json.loads(commit(tmp_path).manifest.to_bytes())
    data = json.dumps({**fields, **change}).encode()
    with pytest.raises(DamagedArtifact, match=r"manifest\.json"):
        parse_manifest(data, Store(tmp_path), "manifest.json")


@pytest.mark.parametrize("data", [b"", b"[]", b"null", b"{", b"\xff", b"[" * 100_000])
def test_bytes_that_are_no_manifest_are_damage(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(DamagedArtifact, match=r"manifest\.json is not a manifest"):
        parse_manifest(data, Store(tmp_path), "manifest.json")


def signed(fields: dict[str, object]) -> bytes:
    return canonical_json({**fields, "digest": manifest_digest(fields)})


def test_another_format_is_refused(tmp_path: Path) -> None:
    fields = json.loads(commit(tmp_path).manifest.to_bytes())
    for number, message in ((MANIFEST_FORMAT + 1, "upgrade hhnet"), (MANIFEST_FORMAT - 1, "make the artifact again")):
        with pytest.raises(ConfigError, match=message):
            parse_manifest(signed({**fields, "format": number, "unheard_of": {}}), Store(tmp_path), "manifest.json")


@pytest.mark.parametrize("path", ["/etc/passwd", "../other/part.bin", "parts/../../x"])
def test_a_manifest_cannot_name_files_outside(tmp_path: Path, path: str) -> None:
    fields = json.loads(commit(tmp_path).manifest.to_bytes())
    fields["parts"][0]["path"] = path
    with pytest.raises(DamagedArtifact, match="outside its artifact"):
        parse_manifest(signed(fields), Store(tmp_path), "manifest.json")


def test_an_unreadable_identity_is_damage(tmp_path: Path) -> None:
    (tmp_path / "identity.json").write_text("{")
    with pytest.raises(DamagedArtifact, match=r"identity\.json"):
        commit(tmp_path)


# ---------------------------------------------------------------------------------------------- inputs and versions


def derived(tmp_path: Path, upstream: Artifact, origin: dict[str, str]) -> Artifact:
    inputs = (ArtifactInput(role="shards", kind="shards", digest=upstream.digest),)
    writer = ArtifactWriter(Store(tmp_path / "codes"), "codes", MARK, inputs, origin)
    return writer.commit([], {}, {})


def test_inputs_are_followed_and_their_digest_checked(tmp_path: Path) -> None:
    upstream = commit(tmp_path / "shards")
    artifact = derived(tmp_path, upstream, {"shards": upstream.uri})
    assert open_input_version(artifact, "shards").digest == upstream.digest
    other = commit(tmp_path / "other", b"other")
    with pytest.raises(FingerprintMismatch) as caught:
        open_input_version(artifact, "shards", other.uri)
    assert upstream.digest[:12] in str(caught.value)
    assert other.digest[:12] in str(caught.value)
    moved = tmp_path / "moved"
    (tmp_path / "shards").rename(moved)
    with pytest.raises(InputError):
        open_input_version(artifact, "shards")
    assert open_input_version(artifact, "shards", str(moved)).digest == upstream.digest


def test_an_unknown_origin_asks_for_the_flag(tmp_path: Path) -> None:
    artifact = derived(tmp_path, commit(tmp_path / "shards"), {})
    with pytest.raises(InputError, match="--shards"):
        open_input_version(artifact, "shards")


def test_the_origin_is_outside_the_digest(tmp_path: Path) -> None:
    upstream = commit(tmp_path / "shards")
    first = derived(tmp_path / "a", upstream, {"shards": "/here"})
    second = derived(tmp_path / "b", upstream, {"shards": "/there"})
    assert first.digest == second.digest


def test_versions_are_taken_once(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert list_versions(store) == []
    assert publish_version(store, 1, "manifest.json", "a" * 64)
    assert publish_version(store, 1, "manifest.json", "a" * 64)
    assert not publish_version(store, 1, "manifest.json", "b" * 64)
    assert publish_version(store, 10, "manifest.json", "b" * 64)
    assert publish_version(store, 2, "manifest.json", "b" * 64)
    assert list_versions(store) == [1, 2, 10]


def test_a_number_that_no_version_is_written_with_is_none(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert publish_version(store, 1, "manifest.json", "a" * 64)
    for name in ("0", "01", "-1", "abc", "9" * 30):
        store.put(f"versions/{name}.json", b"{}")
    assert list_versions(store) == [1]


def test_run_records_are_outside_the_artifact(tmp_path: Path) -> None:
    artifact = commit(tmp_path)
    write_run_record(artifact.store, "work", {"seconds": 1.5})
    (record,) = closed_records(artifact.store)
    assert record["seconds"] == 1.5
    assert open_artifact(str(tmp_path)).digest == artifact.digest


def test_fingerprints_cover_kind_inputs_and_settings() -> None:
    marks = {
        fingerprint("codes", {"model": "a"}, {"x": 1}),
        fingerprint("index", {"model": "a"}, {"x": 1}),
        fingerprint("codes", {"model": "b"}, {"x": 1}),
        fingerprint("codes", {"model": "a"}, {"x": 2}),
    }
    assert len(marks) == 4
    assert fingerprint("codes", {"a": 1, "b": 2}, {}) == fingerprint("codes", {"b": 2, "a": 1}, {})
