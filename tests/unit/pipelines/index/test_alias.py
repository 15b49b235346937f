import json
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier, Event
from typing import Any

import pytest
from typer.testing import CliRunner

import pipelines.index.alias
import pipelines.index.pool
from pipelines.artifacts.commit import list_versions, publish_version
from pipelines.artifacts.manifest import open_artifact
from pipelines.artifacts.versions import next_artifact, put_manifest
from pipelines.cli.main import build_app
from pipelines.config.settings import Config, GateSettings, IndexSettings
from pipelines.errors import CommitConflict, DamagedArtifact, FingerprintMismatch, InputError
from pipelines.index.alias import alias_history, rollback_alias, set_alias
from pipelines.index.build import build_index
from pipelines.index.reader import open_index
from pipelines.index.update import add_codes
from pipelines.search.search import search
from pipelines.storage import Store
from pipelines.verify.gc import gc
from pipelines.verify.verify import verify
from tests.support.codes import simple_rows, write_codes
from tests.support.inline import InlinePool

CONFIG = Config(index=IndexSettings(workers=1, gate=GateSettings(probes=5)))
KEY = "base/00003"
MODELS = {"v1": "a" * 64, "v2": "c" * 64, "v3": "d" * 64}

Build = Callable[..., str]


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """Codes of the same samples by the model of that name, and the index of them below `under`."""

    def build(name: str, under: Path = tmp_path, publish: bool = True, bits: int = 64) -> str:
        rows = {"base-000000.tar": simple_rows("base", 20, bits, seed=sorted(MODELS).index(name), flip=0.3)}
        codes = write_codes(under / f"codes-{name}-{bits}", rows, bits, model=MODELS[name])
        return str(build_index([codes.uri], str(under / name), CONFIG, publish=publish, pool=InlinePool()).uri)

    return build


@pytest.fixture
def alias(tmp_path: Path) -> str:
    return str(tmp_path / "photos")


def found(index: str) -> tuple[str, str, list[dict[str, Any]]]:
    """What a search for the key says: of which index and version, and the neighbours."""
    answer = search(index, CONFIG, keys=[KEY], k=5).as_json()
    return answer["uri"], answer["digest"], answer["results"][0]["neighbours"]


def test_a_search_through_an_alias_is_one_of_the_index_that_it_stands_for(build: Build, alias: str) -> None:
    first, second = build("v1"), build("v2", bits=128)
    made = set_alias(alias, first).as_json()
    assert (made["status"], made["version"], made["uri"], made["index"]) == ("done", 1, alias, first)
    assert found(alias) == found(first)
    assert set_alias(alias, first).status == "unchanged"
    switched = set_alias(alias, second).as_json()
    assert (switched["version"], switched["bits"], switched["model"]) == (2, 128, MODELS["v2"])
    assert found(alias) == found(second) != found(first)
    assert [(v["version"], v["index"]) for v in alias_history(alias).versions] == [(2, second), (1, first)]


def test_a_version_of_the_index_is_followed_when_it_is_published(build: Build, alias: str, tmp_path: Path) -> None:
    index = build("v1")
    set_alias(alias, index)
    before = found(alias)
    more = write_codes(tmp_path / "more", {"more-000000.tar": simple_rows("more", 5)}).uri
    add_codes(index, [more], CONFIG, pool=InlinePool())
    assert found(alias) == found(index) != before
    assert set_alias(alias, index).status == "unchanged"
    assert search(alias, CONFIG, keys=[KEY], version=1, k=5).digest == before[1]
    with pytest.raises(InputError, match=rf"alias {alias}: {index} has no version 7"):
        search(alias, CONFIG, keys=[KEY], version=7)


def test_rollbacks_go_back_one_by_one(build: Build, alias: str) -> None:
    indexes = [build(name) for name in MODELS]
    for index in indexes:
        set_alias(alias, index)
    backs = [rollback_alias(alias).as_json() for _ in range(2)]
    assert [(b["version"], b["to"], b["index"]) for b in backs] == [(4, 2, indexes[1]), (5, 1, indexes[0])]
    assert found(alias) == found(indexes[0])
    with pytest.raises(InputError, match="content is that of version 1: there is no older one"):
        rollback_alias(alias)
    assert set_alias(alias, indexes[2]).version == 6
    assert rollback_alias(alias).index == indexes[0]
    set_alias(alias, indexes[2])
    shutil.rmtree(indexes[0])
    with pytest.raises(InputError, match=rf"{indexes[0]} holds no committed index"):
        rollback_alias(alias)
    assert found(alias)[0] == indexes[2]


# ------------------------------------------------------------------------------------------------------- at once


def test_every_answer_comes_wholly_from_one_index_while_it_is_switched(build: Build, alias: str) -> None:
    expected = {index: found(index) for index in (build("v1"), build("v2", bits=128))}
    first, second = expected
    set_alias(alias, first)
    enough = Event()

    def switch() -> int:
        turns = 0
        while not enough.is_set():
            set_alias(alias, (second, first)[turns % 2])
            turns += 1
        return turns

    with ThreadPoolExecutor(1) as pool:
        switching = pool.submit(switch)
        try:
            answers = [found(alias) for _ in range(40)]
        finally:
            enough.set()
    assert switching.result() > 2
    assert {answer[0] for answer in answers} == {first, second}
    assert all(answer == expected[answer[0]] for answer in answers)


def test_a_reader_finishes_on_the_index_that_it_opened(build: Build, alias: str) -> None:
    first, second = build("v1"), build("v2", bits=128)
    set_alias(alias, first)
    with open_index(alias) as reader:
        set_alias(alias, second)
        assert (reader.artifact.uri, reader.bits, len(reader.find([KEY])[0])) == (first, 64, 1)
    with open_index(alias) as reader:
        assert (reader.artifact.uri, reader.bits) == (second, 128)


@pytest.mark.parametrize("begun", [False, True], ids=["first", "later"])
def test_of_two_switches_at_once_one_wins(
    build: Build, alias: str, begun: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    indexes = [build(name) for name in MODELS]
    if begun:
        set_alias(alias, indexes[2])
    both, publish = Barrier(2), pipelines.index.alias.publish_manifest

    def publish_together(*args: Any) -> None:
        both.wait(30)
        publish(*args)

    monkeypatch.setattr(pipelines.index.alias, "publish_manifest", publish_together)
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(set_alias, alias, index) for index in indexes[:2]]
    (lost,) = [error for run in runs if (error := run.exception())]
    assert isinstance(lost, CommitConflict) and "run again" in str(lost)
    (won,) = [run.result() for run in runs if not run.exception()]
    assert found(alias)[0] == won.index and len(list_versions(Store(alias))) == 1 + begun
    monkeypatch.setattr(pipelines.index.alias, "publish_manifest", publish)
    assert [set_alias(alias, index).status for index in indexes[:2]].count("unchanged") <= 1
    assert verify(alias).kind == "alias"


def test_an_alias_whose_first_setting_was_killed_is_set_by_the_next(
    build: Build, alias: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    first, second = build("v1"), build("v2")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pipelines.index.alias, "publish_manifest", killed)
        set_alias(alias, first)
    for use in (lambda: found(alias), lambda: alias_history(alias).as_json(), lambda: rollback_alias(alias).as_json()):
        with pytest.raises(InputError, match="names no index yet: set it with --to"):
            use()
    assert (set_alias(alias, second).version, found(alias)[0]) == (1, second)
    (orphan,) = verify(alias).orphans
    assert gc(alias, older_than="0s").names == [orphan]
    assert found(alias)[0] == second


# ------------------------------------------------------------------------------------------------- what is refused


def test_only_a_published_index_can_be_named(build: Build, alias: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no committed index"):
        set_alias(alias, str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="never published"):
        set_alias(alias, build("v1", publish=False))
    with pytest.raises(InputError, match="is a codes artifact, not index"):
        set_alias(alias, write_codes(tmp_path / "codes", {"c-000000.tar": simple_rows("c", 3)}).uri)
    assert not Path(alias).exists()
    index = build("v2")
    set_alias(alias, index)
    with pytest.raises(InputError, match=rf"is an alias itself: name the index that it stands for, {index}"):
        set_alias(str(tmp_path / "other"), alias)
    with pytest.raises(InputError, match="is an index artifact, not alias"):
        set_alias(index, index)
    with pytest.raises(InputError, match="holds no committed alias"):
        alias_history(str(tmp_path / "nowhere"))


def test_another_index_in_the_place_of_the_one_that_was_named_is_refused(build: Build, alias: str) -> None:
    index = build("v1")
    set_alias(alias, index)
    shutil.rmtree(index)
    with pytest.raises(InputError, match=rf"alias {alias}: {index} holds no committed index"):
        found(alias)
    assert any("not checked" in check for check in verify(alias).checks)
    shutil.copytree(build("v2"), index)
    for use in (found, verify):
        with pytest.raises((FingerprintMismatch, DamagedArtifact), match=rf"but {index} has"):
            use(alias)
    assert set_alias(alias, index).version == 2
    assert found(alias)[1] == found(index)[1]


# ---------------------------------------------------------------------------------------------- verify, gc, copies


def test_a_copied_tree_names_its_own_index(build: Build, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    index = build("v1", under=tree)
    set_alias(str(tree / "names" / "photos"), index)
    shutil.move(tree, tmp_path / "elsewhere")
    moved = str(tmp_path / "elsewhere" / "names" / "photos")
    assert found(moved)[0] == str(tmp_path / "elsewhere" / "v1")
    assert any(str(tmp_path / "elsewhere" / "v1") in check for check in verify(moved).checks)


def test_verify_says_that_every_version_names_a_published_index(build: Build, alias: str) -> None:
    first, second = build("v1"), build("v2")
    set_alias(alias, first)
    set_alias(alias, second)
    proven = verify(alias).as_json()
    assert (proven["digest"], proven["orphans"]) == (alias_history(alias).digest, [])
    for index in (first, second):
        assert any(f"index {index} is published" in check for check in proven["checks"])


def test_verify_notices_a_version_that_names_nothing_or_something_else(build: Build, alias: str) -> None:
    set_alias(alias, build("v1"))
    root = open_artifact(alias, "alias")
    publish_version(root.store, 2, "manifest.json", root.digest)
    with pytest.raises(DamagedArtifact, match=r"versions \[2\] name no index"):
        verify(alias)
    other = next_artifact(root, [], [], {}, meta={"version": 3, "index": 7})
    publish_version(root.store, 3, put_manifest(other), other.digest)
    for use in (found, verify):
        with pytest.raises(DamagedArtifact, match=r"the alias manifest cannot be used \(index is wrong: "):
            use(alias)


def test_verify_looks_for_the_index_of_every_version_each_time(build: Build, alias: str, tmp_path: Path) -> None:
    first = build("v1")
    set_alias(alias, first)
    set_alias(alias, build("v2"))
    for path in Path(alias).rglob("*"):
        os.utime(path, (time.time() - 3600,) * 2)
    shutil.move(first, tmp_path / "away")
    assert any("not checked" in check for check in verify(alias).checks)
    shutil.move(build("v3"), first)
    with pytest.raises(DamagedArtifact, match="v1"):
        verify(alias)


def test_gc_keeps_what_the_alias_says_now(build: Build, alias: str) -> None:
    indexes = [build(name) for name in MODELS]
    for index in indexes:
        set_alias(alias, index)
    assert gc(alias, older_than="0s").status == "unchanged"
    assert gc(alias, older_than="0s", keep=1).collected == [1, 2]
    assert found(alias) == found(indexes[2])
    with pytest.raises(InputError, match="there is no older one"):
        rollback_alias(alias)
    assert set_alias(alias, indexes[0]).version == 4
    assert verify(alias).orphans == []


def test_the_command_shows_whole_uris_and_refuses_both_ways_at_once(build: Build, alias: str) -> None:
    run, app = CliRunner(), build_app()
    index = build("v1")
    made = run.invoke(app, ["alias", "--alias", alias, "--to", index, "--json"])
    assert (made.exit_code, json.loads(made.stdout)["index"]) == (0, index)
    shown = run.invoke(app, ["alias", "--alias", alias])
    (row,) = [line.split() for line in shown.stdout.splitlines() if line.strip().startswith("1  ")]
    assert row[:5] == ["1", "1", index, "64", MODELS["v1"][:12]]
    both = run.invoke(app, ["alias", "--alias", alias, "--to", index, "--rollback"])
    assert (both.exit_code, "exclude each other" in both.stderr) == (2, True)
