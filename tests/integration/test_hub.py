"""Artifacts on Hugging Face are read and never written: the verbs against a stand-in for its server."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.config.loading import load_config
from pipelines.errors import InputError, ReadOnlyStore
from pipelines.ingest.ingest import ingest
from pipelines.shards.shards import open_shards
from pipelines.storage import Store
from tests.support import pictures
from tests.support.hub import REPOSITORY, hub

DATA_SET = f"hf://datasets/{REPOSITORY}"


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that is served as a data set, with shards in it."""
    library, constants = pytest.importorskip("huggingface_hub"), pytest.importorskip("huggingface_hub.constants")
    pictures.write_folder(tmp_path / "images", classes=2, per_class=4)
    ingest(str(tmp_path / "images"), str(tmp_path / "served" / "shards"), load_config())
    with hub(tmp_path / "served") as (endpoint, _):
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)  # both are set at the import, from HF_ENDPOINT
        template = f"{endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        library.HfFileSystem.clear_instance_cache()
        yield tmp_path / "served"
    library.HfFileSystem.clear_instance_cache()


def run(*words: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "pipelines", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | {"HF_TOKEN": ""})


def test_a_store_on_the_hub_is_read(served: Path) -> None:
    (served / "x").write_bytes(b"0123456789")
    (served / "empty").write_bytes(b"")
    for store in (Store(DATA_SET), Store(f"{DATA_SET}@main")):
        assert (store.read("x"), store.read("x", limit=3), store.size("x")) == (b"0123456789", b"0123", 10)
        assert (store.read("empty"), store.size("none"), store.size("shards")) == (b"", None, None)
        assert store.folders() == ["shards"] and "shards/manifest.json" in store.names("shards")
        assert (store.names("none"), store.folders("none")) == ([], [])
        for name, start, whole in (("x", 0, b"0123456789"), ("x", 7, b"789"), ("x", 99, b"")):
            with store.open(name, block=4, start=start) as stream:
                assert b"".join(iter(lambda stream=stream: stream.read(3), b"")) == whole
        with pytest.raises(FileNotFoundError):
            store.read("none")


def test_shards_on_the_hub_hold_the_same_samples(served: Path) -> None:
    here, there = open_shards(str(served / "shards")), open_shards(f"{DATA_SET}/shards")
    for mine, theirs in zip(here.shards, there.shards, strict=True):
        assert list(here.read(mine)) == list(there.read(theirs))


def test_nothing_is_written_to_the_hub(served: Path) -> None:
    store = Store(f"{DATA_SET}/out")
    for change in (lambda: store.put("x", b"data"), lambda: store.put_same("x", b""), lambda: store.delete("x")):
        with pytest.raises(
            ReadOnlyStore, match=r"^hf://.*/out is for reading: .* write to a local folder, s3://"
        ) as it:
            change()
        assert it.value.exit_code == 2
    assert not (served / "out").exists()


def test_a_data_set_that_is_not_there(served: Path) -> None:
    with pytest.raises(InputError, match="the repository of hf://datasets/owner/none/shards does not exist"):
        open_shards("hf://datasets/owner/none/shards")


def test_verbs_read_from_the_hub_and_refuse_to_write_there(served: Path, tmp_path: Path) -> None:
    done = run("verify", f"{DATA_SET}/shards", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["orphans"] == []
    refused = run("ingest", str(tmp_path / "images"), "--out", f"{DATA_SET}/new")
    assert refused.returncode == 2
    assert "is for reading" in refused.stderr and "Traceback" not in refused.stderr
    assert not (served / "new").exists()
