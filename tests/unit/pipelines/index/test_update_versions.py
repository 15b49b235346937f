"""Versions of an index: readers, rollbacks, races, kills, the gate, what is published later and what is told."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines.artifacts.commit import list_versions
from pipelines.artifacts.manifest import open_artifact
from pipelines.artifacts.versions import open_current
from pipelines.errors import (
    CommitConflict,
    InputError,
    StoreUnavailable,
    WorkFailed,
)
from pipelines.index import update as reindex
from pipelines.index.build import build_index
from pipelines.index.kinds.flat import FlatKind
from pipelines.index.publish import describe_index, publish_index, rollback_index
from pipelines.index.reader import open_index
from pipelines.index.update import add_codes, compact_index, remove_rows
from pipelines.storage import Store, failpoints
from tests.support.codes import random_codes
from tests.support.indexes import FLAT, IVF, ask, codes_at, keys_of
from tests.support.inline import InlinePool


def test_a_running_reader_finishes_on_its_version(tmp_path: Path, index: str) -> None:
    expected = ask(index)
    with open_index(index) as reader:
        first = reader.search(random_codes(12, seed=77)[:1], 9)
        remove_rows(index, FLAT, [item.key for item in reader.items(first[1].ravel().tolist()).values()])
        add_codes(index, [codes_at(tmp_path, "more")], FLAT, pool=InlinePool())
        compact_index(index, FLAT, pool=InlinePool())
        distances, ids = reader.search(random_codes(12, seed=77), 9)
        assert [distances.tolist(), ids.tolist()] == expected
        assert len(reader.items(ids.ravel().tolist())) and reader.count == 60
    assert ask(index) != expected and ask(index, version=1) == expected


def test_a_rollback_is_a_version_and_ordinals_are_not_given_again(tmp_path: Path, index: str) -> None:
    expected = ask(index)
    add_codes(index, [codes_at(tmp_path, "more", shards=1)], FLAT, pool=InlinePool())
    back = rollback_index(index).as_json()
    assert (back["status"], back["version"], back["to"], back["digest"]) == ("done", 3, 1, open_artifact(index).digest)
    assert ask(index) == expected
    assert (rollback_index(index, 1).status, rollback_index(index, 3).status) == (
        "unchanged",
        "unchanged",
    )
    add_codes(index, [codes_at(tmp_path, "other", shards=1)], FLAT, pool=InlinePool())
    add_codes(index, [str(tmp_path / "more")], FLAT, pool=InlinePool())
    with open_index(index) as reader:
        found = {shard.shard: shard.ordinal for shard in reader.shards.values()}
    assert (found["more-000000.tar"], found["other-000000.tar"]) == (3, 4)
    for number, complaint in (
        (9, "no version 9, it is not there: name one of its versions 1, 2, 3, 4, 5"),
        (0, "no version 0"),
    ):
        with pytest.raises(InputError, match=complaint):
            rollback_index(index, number)
    assert [rollback_index(index).to for _ in range(2)] == [4, 3]
    assert rollback_index(index, 2).version == 8
    assert rollback_index(index).to == 1
    with pytest.raises(InputError, match="content is that of version 1: there is no older one"):
        rollback_index(index)


@pytest.mark.parametrize("change", ["add", "remove", "compact"])
def test_of_two_runs_at_once_one_publishes(
    tmp_path: Path, index: str, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    remove_rows(index, FLAT, ["base/0/00000"])
    work: dict[str, Callable[[], Any]] = {
        "add": lambda: add_codes(index, [codes_at(tmp_path, "more")], FLAT, pool=InlinePool()).as_json(),
        "remove": lambda: remove_rows(index, FLAT, ["base/0/00001"]).as_json(),
        "compact": lambda: compact_index(index, FLAT, pool=InlinePool()).as_json(),
    }
    measure = reindex.measure_index

    def overtaken(*arguments: Any) -> Any:
        monkeypatch.setattr(reindex, "measure_index", measure)
        remove_rows(index, FLAT, ["base/2/00002"])
        return measure(*arguments)

    monkeypatch.setattr(reindex, "measure_index", overtaken)
    with pytest.raises(CommitConflict, match="another run published version 3 meanwhile: run again"):
        work[change]()
    assert list_versions(Store(index)) == [1, 2, 3]
    assert "base/2/00002" not in keys_of(index)
    assert work[change]()["version"] == 4
    assert not {"base/0/00000", "base/2/00002"} & set(keys_of(index))


POINTS = [f"{step}.put.{when}" for step in ("part", "receipt", "manifest", "version") for when in ("before", "after")]


@pytest.mark.parametrize("change", ["add", "remove", "compact"])
@pytest.mark.parametrize("point", POINTS)
def test_a_change_that_was_cut_off_is_done_by_running_it_again(
    tmp_path: Path, pool: InlinePool, monkeypatch: pytest.MonkeyPatch, change: str, point: str
) -> None:
    base, more = codes_at(tmp_path, "base", shards=3), codes_at(tmp_path, "more", shards=3)
    work: dict[str, Callable[[str], Any]] = {
        "add": lambda index: add_codes(index, [more], FLAT, pool=pool).as_json(),
        "remove": lambda index: remove_rows(index, FLAT, ["base/0/00001"]).as_json(),
        "compact": lambda index: compact_index(index, FLAT, pool=pool).as_json(),
    }
    results = []
    for name in ("whole", "cut"):
        index = str(build_index([base], str(tmp_path / name), FLAT, pool=pool).uri)
        remove_rows(index, FLAT, ["base/1/00003", "base/2/00004"])
        failpoints._hits.clear()
        pool.done.clear()
        if name == "cut":
            known = keys_of(index)
            hit = 2 if point.startswith(("part", "receipt")) and change != "remove" else 1
            monkeypatch.setenv(failpoints.FAILPOINTS_VARIABLE, f"{point}=enospc@{hit}")
            cut = point.startswith("receipt") and change == "remove"  # removes put no receipt
            if not cut:
                with pytest.raises(StoreUnavailable):
                    work[change](index)
                if point != "version.put.after":
                    assert (keys_of(index), list_versions(Store(index))) == (known, [1, 2])
            monkeypatch.delenv(failpoints.FAILPOINTS_VARIABLE)
        work[change](index)
        results.append((open_current(index).digest, list_versions(Store(index)), ask(index)))
        if change == "add":  # what was finished before the cut was not built again
            again = 4 if name == "cut" and point in ("part.put.before", "part.put.after", "receipt.put.before") else 3
            assert len(pool.done) <= again
    assert results[0] == results[1]


def test_what_another_change_left_is_not_taken_for_this_one(
    tmp_path: Path, index: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both give ordinal 3; the receipt of the one that was cut off must not serve the other."""
    one, two = codes_at(tmp_path, "one", shards=1), codes_at(tmp_path, "two", shards=1)
    monkeypatch.setenv(failpoints.FAILPOINTS_VARIABLE, "manifest.put.before=enospc")
    with pytest.raises(StoreUnavailable):
        add_codes(index, [one], FLAT, pool=InlinePool())
    monkeypatch.delenv(failpoints.FAILPOINTS_VARIABLE)
    add_codes(index, [two], FLAT, pool=InlinePool())
    assert {key.split("/")[0] for key in keys_of(index)} == {"base", "two"}


def test_a_version_below_the_gate_is_not_published_and_the_figures_are_told(
    tmp_path: Path, index: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = FlatKind.build
    monkeypatch.setattr(FlatKind, "build", lambda self, codes, *rest: build(self, codes ^ 255, *rest))
    with pytest.raises(WorkFailed, match=r"self_recall 0\.\d+ is below 1; .*measured: self-recall 0\.\d.*p99 .* ms"):
        add_codes(index, [codes_at(tmp_path, "more")], FLAT, pool=InlinePool())
    assert list_versions(Store(index)) == [1]


def test_what_was_not_published_waits_for_it(tmp_path: Path, index: str) -> None:
    assert publish_index(index, FLAT).status == "unchanged"
    hidden = add_codes(index, [codes_at(tmp_path, "more")], FLAT, publish=False, pool=InlinePool()).as_json()
    assert (hidden["status"], hidden["version"], list_versions(Store(index))) == ("done", None, [1])
    other = remove_rows(index, FLAT, ["base/0/00000"], publish=False).as_json()
    with pytest.raises(
        InputError, match=f"2 were made as version 2: name one with --digest, .*{hidden['digest'][:12]}"
    ):
        publish_index(index, FLAT)
    shown = publish_index(index, FLAT, digest=hidden["digest"][:9]).as_json()
    assert (shown["status"], shown["version"], shown["digest"]) == ("done", 2, hidden["digest"])
    assert len(keys_of(index)) == 100
    with pytest.raises(InputError, match=f"{other['digest'][:12]} was made as version 2, not as 3: make it again"):
        publish_index(index, FLAT, digest=other["digest"])
    with pytest.raises(InputError, match="0000 is not there"):
        publish_index(index, FLAT, digest="0000")


def test_info_tells_what_the_versions_hold(tmp_path: Path, index: str) -> None:
    remove_rows(index, FLAT, ["base/0/00000"])
    add_codes(index, [codes_at(tmp_path, "more", shards=1)], FLAT, pool=InlinePool())
    remove_rows(index, FLAT, shards=["base-000001.tar"])
    rollback_index(index, 3)
    result = describe_index(index).as_json()
    assert (result["version"], result["card"]["count"], result["kind"]) == (5, 79, "flat")
    rows = [
        tuple(v[key] for key in ("version", "made_as", "codes", "removed", "shards", "ordinals"))
        for v in result["versions"]
    ]
    assert rows == [
        (5, 3, 79, 1, 4, 4),
        (4, 4, 59, 21, 3, 4),
        (3, 3, 79, 1, 4, 4),
        (2, 2, 59, 1, 3, 3),
        (1, 1, 60, 0, 3, 3),
    ]
    assert all(entry["bytes"] > 0 and entry["recall"] == 1.0 for entry in result["versions"])


def test_a_corpus_that_outgrew_its_quantizer_is_noted(tmp_path: Path, pool: InlinePool) -> None:
    index = build_index([codes_at(tmp_path, "base", shards=1)], str(tmp_path / "index"), IVF, pool=pool).uri
    assert "note" not in add_codes(index, [codes_at(tmp_path, "some", shards=2)], IVF, pool=pool).card
    grown = add_codes(index, [codes_at(tmp_path, "more", shards=4)], IVF, pool=pool).as_json()
    assert grown["card"]["trained_on"] == 20
    assert grown["card"]["note"].startswith("7.0 times the codes that the quantizer was trained on")
