"""Which version of an index is published: what waits, what was overtaken, what is gone, and what is no index."""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import pipelines.artifacts.versions
import pipelines.index.pool
from pipelines.artifacts.commit import list_versions
from pipelines.cli.main import build_app
from pipelines.config.settings import Config, IndexSettings
from pipelines.dedupe.dedupe import dedupe
from pipelines.errors import DamagedArtifact, FingerprintMismatch, InputError
from pipelines.index import update as reindex
from pipelines.index.alias import alias_history, set_alias
from pipelines.index.build import build_index
from pipelines.index.diff import plan_changes
from pipelines.index.publish import describe_index, publish_index, rollback_index
from pipelines.index.reader import open_index
from pipelines.index.update import add_codes, remove_rows
from pipelines.search.search import search
from pipelines.storage import Store
from pipelines.verify.gc import gc
from pipelines.verify.verify import verify
from tests.support.codes import Rows, random_codes, simple_rows, write_codes
from tests.support.inline import InlinePool

FLAT = Config(index=IndexSettings(workers=1))


def codes_at(root: Path, name: str) -> str:
    contents = {f"{name}-{n:06d}.tar": simple_rows(f"{name}/{n}", 20, seed=n + len(name)) for n in range(2)}
    return write_codes(root / name, contents).uri


@pytest.fixture
def index(tmp_path: Path) -> str:
    return str(build_index([codes_at(tmp_path, "base")], str(tmp_path / "index"), FLAT, pool=InlinePool()).uri)


def test_a_first_version_is_published_by_its_own_digest_only(tmp_path: Path) -> None:
    built = build_index(
        [codes_at(tmp_path, "base")], str(tmp_path / "index"), FLAT, publish=False, pool=InlinePool()
    ).as_json()
    with pytest.raises(InputError, match=f"deadbeef is not there: give {built['digest'][:12]}, which waits"):
        publish_index(built["uri"], FLAT, digest="deadbeef")
    assert list_versions(Store(built["uri"])) == []
    assert publish_index(built["uri"], FLAT, digest=built["digest"][:8]).version == 1


def test_a_version_that_was_overtaken_is_told(index: str) -> None:
    hidden = remove_rows(index, FLAT, ["base/0/00002"], publish=False).as_json()
    remove_rows(index, FLAT, ["base/0/00009"])
    result = publish_index(index, FLAT).as_json()
    assert (result["status"], result["version"]) == ("unchanged", 2)
    assert result["overtaken"] == [f"{hidden['digest'][:12]} was made as version 2, not as 3: make it again"]
    with pytest.raises(InputError, match="was made as version 2, not as 3: make it again"):
        publish_index(index, FLAT, digest=hidden["digest"][:9])


def test_what_is_no_index_is_not_rolled_back(tmp_path: Path, index: str) -> None:
    alias, other = str(tmp_path / "photos"), str(tmp_path / "other")
    build_index([codes_at(tmp_path, "more")], other, FLAT, pool=InlinePool())
    set_alias(alias, index)
    set_alias(alias, other)
    before = alias_history(alias).as_json()
    for change in (lambda: rollback_index(alias).as_json(), lambda: publish_index(alias, FLAT).as_json()):
        with pytest.raises(InputError, match=r"photos is an alias artifact, not index: `hhnet alias --alias .*photos`"):
            change()
    assert alias_history(alias).as_json() == before
    with pytest.raises(InputError, match="base is a codes artifact, not index"):
        rollback_index(str(tmp_path / "base"), 1)
    assert list_versions(Store(tmp_path / "base")) == []


def test_an_alias_is_read_like_the_index_that_it_names(tmp_path: Path, index: str) -> None:
    alias, tonight = str(tmp_path / "photos"), codes_at(tmp_path, "tonight")
    set_alias(alias, index)
    assert describe_index(alias).as_json() == describe_index(index).as_json()
    codes = [str(tmp_path / "base"), tonight]
    planned = plan_changes((), codes, alias).as_json()
    assert planned | {"commands": 0} == plan_changes((), codes, index).as_json() | {"commands": 0}
    assert planned["commands"] == [f"hhnet index add --index {alias} --codes {tonight}"]
    found = dedupe([tonight], str(tmp_path / "alike"), FLAT, against=alias).as_json()
    assert found["indexed"] == 40
    assert add_codes(alias, [tonight], FLAT, pool=InlinePool()).uri == index


def collects(index: str, monkeypatch: pytest.MonkeyPatch, when: str, module: Any) -> None:
    """Have gc run after the function `when` of a change, as if it took a moment there."""
    real: Callable[..., Any] = getattr(module, when)

    def and_then_gc(*args: Any, **kwargs: Any) -> Any:
        result = real(*args, **kwargs)
        gc(index)
        return result

    monkeypatch.setattr(module, when, and_then_gc)


def left_behind(index: str, codes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A change that was killed two days ago, before it published anything."""

    class KilledError(Exception):
        pass

    def killed(*_: Any) -> None:
        raise KilledError

    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(reindex, "measure_index", killed)
        add_codes(index, [codes], FLAT, pool=InlinePool())
    age(index)


def age(index: str) -> None:
    long_ago = time.time() - 48 * 3600
    for path in Path(index).rglob("*"):
        os.utime(path, (long_ago, long_ago))


def test_parts_that_gc_takes_from_a_change_are_not_published(
    tmp_path: Path, index: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes = codes_at(tmp_path, "more")
    left_behind(index, codes, monkeypatch)
    with monkeypatch.context() as patch, pytest.raises(DamagedArtifact, match="is gone, so version 2 cannot name it"):
        collects(index, patch, "measure_index", reindex)
        add_codes(index, [codes], FLAT, pool=InlinePool())
    assert list_versions(Store(index)) == [1]
    assert add_codes(index, [codes], FLAT, pool=InlinePool()).version == 2
    assert search(index, FLAT, keys=["more/0/00001"], k=1).results[0]["neighbours"][0]["distance"] == 0


@pytest.mark.parametrize("name", ["keys-000000", "ordinals"])
def test_parts_that_gc_takes_while_a_version_is_published_are_told(
    tmp_path: Path, index: str, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    before = set(Path(index).glob("parts/*"))
    hidden = add_codes(index, [codes_at(tmp_path, "more")], FLAT, publish=False, pool=InlinePool()).as_json()
    (part,) = {path for path in Path(index).glob("parts/*") if path.name.startswith(name)} - before
    with (
        deleted_meanwhile(part, monkeypatch),
        pytest.raises(DamagedArtifact, match=r"was deleted while version 2, .* published: .*`hhnet index rollback`"),
    ):
        publish_index(index, FLAT, digest=hidden["digest"])
    rollback_index(index)
    assert search(index, FLAT, keys=["base/0/00001"], k=1).version == 3
    assert add_codes(index, [str(tmp_path / "more")], FLAT, pool=InlinePool()).version == 4
    assert [entry["version"] for entry in describe_index(index).versions] == [4, 3, 2, 1]


def test_a_manifest_that_gc_takes_while_it_is_published_is_put_again(
    tmp_path: Path, index: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden = add_codes(index, [codes_at(tmp_path, "more")], FLAT, publish=False, pool=InlinePool()).as_json()
    (manifest,) = Path(index).glob("manifests/*")
    with deleted_meanwhile(manifest, monkeypatch):
        assert publish_index(index, FLAT, digest=hidden["digest"]).version == 2
    assert verify(index).status == "done"


@contextmanager
def deleted_meanwhile(path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Between the look for all that a version names and its record."""
    real = pipelines.artifacts.versions.publish_version

    def after_gc(*args: Any) -> bool:
        path.unlink()
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(pipelines.artifacts.versions, "publish_version", after_gc)
        yield


def test_an_alias_of_what_is_gone_or_another_index_is_refused(tmp_path: Path, index: str) -> None:
    alias, tonight = str(tmp_path / "photos"), codes_at(tmp_path, "tonight")
    set_alias(alias, index)
    reads = (
        lambda: describe_index(alias).as_json(),
        lambda: plan_changes((), [tonight], alias).as_json(),
        lambda: dedupe([tonight], str(tmp_path / "alike"), FLAT, against=alias).as_json(),
    )
    shutil.rmtree(index)
    for read in reads:
        with pytest.raises(InputError, match=r"alias .*photos: .*index holds no committed index"):
            read()
    build_index([tonight], index, FLAT, pool=InlinePool())
    for read in reads:
        with pytest.raises(FingerprintMismatch, match="set the alias again"):
            read()


def test_keys_of_a_file_are_its_lines(index: str, tmp_path: Path) -> None:
    """Not what Python cuts at the other characters that separate lines: a key may hold them."""
    keys = ["x", "y", "x\u2028y", "z\x0bz", "last"]
    codes = write_codes(tmp_path / "odd", {"odd-000000.tar": Rows(keys, random_codes(5), [[0]] * 5)}).uri
    add_codes(index, [codes], FLAT, pool=InlinePool())
    (tmp_path / "gone.txt").write_bytes("\ufeffx\u2028y\r\n\nz\x0bz\nlast".encode())
    words = ["index", "remove", "--index", index, "--keys", str(tmp_path / "gone.txt")]
    build_app()(words, standalone_mode=False)
    with open_index(index) as reader:
        assert set(reader.all_keys()) & set(keys) == {"x", "y"}
