"""Indexes are changed by publishing their next version: what is added, removed and compacted."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.artifacts.commit import list_versions
from pipelines.artifacts.manifest import Artifact
from pipelines.artifacts.versions import open_current, publish_next
from pipelines.config.settings import Config, GateSettings, IndexSettings
from pipelines.dedupe.dedupe import dedupe
from pipelines.encode.codes import open_codes
from pipelines.errors import (
    FingerprintMismatch,
    InputError,
)
from pipelines.index.build import build_index
from pipelines.index.layout import REMOVED_NAME
from pipelines.index.publish import publish_index, rollback_index
from pipelines.index.reader import open_index
from pipelines.index.update import add_codes, compact_index, remove_rows
from pipelines.search.search import search
from pipelines.storage import Store
from pipelines.verify.verify import verify
from tests.support.codes import Rows, random_codes, simple_rows, write_codes
from tests.support.indexes import FLAT, HNSW, IVF, KINDS, ask, codes_at, keys_of, tars
from tests.support.inline import InlinePool

MULTIHASH = Config(index=IndexSettings(kind="multihash", workers=1, part_codes=1))
PACKED = Config(index=IndexSettings(workers=1, part_codes=250))


def sure(answers: list[Any]) -> list[Any]:
    """What no order of equal distances changes: the distances, and the ids below the last of them."""
    distances, ids = np.array(answers[0]), np.array(answers[1])
    return [distances.tolist(), [set(i[d < d[-1]].tolist()) for d, i in zip(distances, ids, strict=True)]]


def tars_of(pool: InlinePool) -> list[tuple[int, str]]:
    """The tars whose codes were put into parts."""
    return [(source.ordinal, source.shard) for task in pool.done for source in task.sources]


# ------------------------------------------------------------------------------------------------------------- add


@KINDS
def test_new_tars_are_added_and_nothing_else_is_touched(tmp_path: Path, pool: InlinePool, config: Config) -> None:
    index = build_index([codes_at(tmp_path, "base", shards=3)], str(tmp_path / "index"), config, pool=pool).uri
    before = {path: path.read_bytes() for path in Path(index).rglob("*") if path.is_file()}
    first = open_current(index).manifest
    pool.done.clear()
    result = add_codes(index, [codes_at(tmp_path, "more")], config, pool=pool).as_json()
    assert (result["verb"], result["status"], result["version"]) == ("index add", "done", 2)
    assert (result["added"], result["shards_added"], result["card"]["count"]) == (40, 2, 100)
    assert tars_of(pool) == [(3, "more-000000.tar"), (4, "more-000001.tar")]
    second = open_current(index).manifest
    assert {part.path for part in second.parts} > {part.path for part in first.parts if "ordinals" not in part.path}
    assert all(path.read_bytes() == data for path, data in before.items())
    assert {entry.role for entry in second.inputs} == {"codes-0", "codes-1", "model"}
    both = build_index(
        [str(tmp_path / "base"), str(tmp_path / "more")], str(tmp_path / "both"), config, pool=pool
    ).as_json()["uri"]
    assert sure(ask(index)) == sure(ask(both))
    assert config.index.kind == "ivf" or ask(index) == ask(both)
    assert second.meta["quantizer_sha256"] == first.meta["quantizer_sha256"]


def test_only_what_is_not_held_is_added(tmp_path: Path, index: str, pool: InlinePool) -> None:
    base = str(tmp_path / "base")
    again = add_codes(index, [base], FLAT, pool=pool).as_json()
    assert (again["status"], again["version"], again["added"], pool.done) == ("unchanged", 1, 0, [])
    held = {shard.name: shard.sha256 for shard in open_codes(base).shards}
    contents = {**tars("base", shards=3), **tars("new", shards=1)}
    for name, sha256 in held.items():
        contents[name].sha256 = sha256
    grown = write_codes(tmp_path / "grown", contents, shards_digest="b" * 64).uri
    result = add_codes(index, [grown], FLAT, pool=pool).as_json()
    assert (result["version"], result["added"], tars_of(pool)) == (2, 20, [(3, "new-000000.tar")])
    assert len(open_current(index).manifest.inputs) == 3


def test_a_tar_that_has_other_codes_now_is_refused_naming_both(tmp_path: Path, index: str) -> None:
    held = open_codes(str(tmp_path / "base"))
    contents = tars("base", shards=3)
    for shard in held.shards:
        contents[shard.name].sha256 = shard.sha256
    contents["base-000001.tar"].codes[7] ^= 1
    other = write_codes(tmp_path / "other", contents)
    with pytest.raises(
        FingerprintMismatch, match=f"base-000001.tar .* of {held.artifact.digest[:12]}, .*/other is {other.digest[:12]}"
    ):
        add_codes(index, [other.uri], FLAT, pool=InlinePool())
    remove_rows(index, FLAT, shards=["base-000001.tar"])
    assert add_codes(index, [other.uri], FLAT, pool=InlinePool()).added == 20


def retried(root: Path, first: Artifact, contents: dict[str, Rows]) -> str:
    """The next version of codes, as `retry-rejects` publishes it."""
    second = write_codes(root / "retried", contents)
    shutil.copytree(root / "retried" / "parts", Path(first.uri) / "parts", dirs_exist_ok=True)
    receipts = []
    for receipt in second.manifest.receipts:
        path = receipt.path.replace(".json", "-retried.json")
        shutil.copy(root / "retried" / receipt.path, Path(first.uri) / path)
        receipts.append(receipt.model_copy(update={"path": path}))
    return publish_next(first, 2, second.manifest.parts, receipts, second.manifest.totals).uri


def half_rejected(root: Path) -> tuple[Artifact, dict[str, Rows]]:
    """Codes of a tar of which every second sample is a reject, and all of them."""
    every = tars("a", shards=1)
    for rows in every.values():
        rows.sha256 = "5" * 64
    half = {n: Rows(r.keys[::2], r.codes[::2], r.labels[::2], r.sha256, range(0, 20, 2)) for n, r in every.items()}
    return write_codes(root / "codes", half), every


@pytest.mark.parametrize("compacted", [False, True])
@KINDS
def test_codes_that_were_retried_replace_all_that_an_index_holds(
    tmp_path: Path, pool: InlinePool, config: Config, compacted: bool
) -> None:
    first, every = half_rejected(tmp_path)
    index = build_index([first.uri], str(tmp_path / "index"), config, pool=pool).uri
    remove_rows(index, config, ["a/0/00004"])
    if compacted:
        compact_index(index, config, pool=pool)
    remove_rows(index, config, ["a/0/00006"])
    number = list_versions(Store(index))[-1]
    codes = retried(tmp_path, first, every)
    with pytest.raises(
        FingerprintMismatch, match=r"holds a-000000.tar .* and has others: add --replace to take the new"
    ):
        add_codes(index, [codes], config, pool=pool)
    result = add_codes(index, [codes], config, replace_changed=True, pool=pool).as_json()
    facts = {name: result[name] for name in ("version", "added", "shards_added", "shards_replaced")}
    assert facts == {"version": number + 1, "added": 0, "shards_added": 0, "shards_replaced": 1}
    (rows,) = every.values()
    left = [n for n in range(20) if n not in (4, 6)]
    assert keys_of(index) == [rows.keys[n] for n in left]
    with open_index(index) as reader:
        assert reader.search(rows.codes[left], 1)[1].ravel().tolist() == left, "an ordinal is given once, to one tar"
    assert add_codes(index, [codes], config, replace_changed=True, pool=pool).status == "unchanged"
    assert compact_index(index, config, pool=pool).dropped == 2
    assert verify(index).status == "done"


def test_what_was_compacted_away_is_not_brought_back_unseen(tmp_path: Path, pool: InlinePool) -> None:
    first, every = half_rejected(tmp_path)
    index = build_index([first.uri], str(tmp_path / "index"), FLAT, pool=pool).uri
    remove_rows(index, FLAT, ["a/0/00004"])
    compact_index(index, FLAT, pool=pool)
    elsewhere = write_codes(tmp_path / "elsewhere", every).uri
    Path(first.uri).rename(tmp_path / "moved")
    with pytest.raises(InputError, match=f"cannot keep 1 earlier removals of .*{first.digest[:12]}"):
        add_codes(index, [elsewhere], FLAT, replace_changed=True, pool=pool)
    (tmp_path / "moved").rename(first.uri)
    assert add_codes(index, [elsewhere], FLAT, replace_changed=True, pool=pool).shards_replaced == 1
    assert "a/0/00004" not in keys_of(index) and len(keys_of(index)) == 19


def test_a_tar_of_which_just_removed_samples_have_codes_now_goes(tmp_path: Path, index: str) -> None:
    remove_rows(index, FLAT, ["base/1/00003"])
    contents = tars("base", shards=3)
    for shard in open_codes(str(tmp_path / "base")).shards:
        contents[shard.name].sha256 = shard.sha256
    rows = contents["base-000001.tar"]
    contents["base-000001.tar"] = Rows(rows.keys[3:4], rows.codes[3:4], rows.labels[3:4], rows.sha256, [3])
    other = write_codes(tmp_path / "other", contents).uri
    assert add_codes(index, [other], FLAT, replace_changed=True, pool=InlinePool()).shards_replaced == 1
    assert len(keys_of(index)) == 40
    assert verify(index).status == "done"


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"bits": 32}, "index has bits 64, .*/odd has bits 32"),
        ({"model": "c" * 64}, "index has model aaaaaaaaaaaa, .*/odd has model cccccccccccc"),
    ],
)
def test_codes_that_do_not_belong_to_the_index_are_refused_naming_both(
    tmp_path: Path, index: str, options: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(FingerprintMismatch, match=complaint):
        add_codes(index, [codes_at(tmp_path, "odd", **options)], FLAT, pool=InlinePool())
    assert list_versions(Store(index)) == [1]


def test_a_tar_twice_and_an_empty_artifact_are_refused(tmp_path: Path, index: str) -> None:
    more = codes_at(tmp_path, "more")
    with pytest.raises(InputError, match="codes of the same tar: name it once"):
        add_codes(index, [more, more], FLAT, pool=InlinePool())
    empty = write_codes(tmp_path / "empty", {"e-000000.tar": Rows([], np.empty((0, 8), np.uint8), [])}).uri
    with pytest.raises(InputError, match="there are no codes to add"):
        add_codes(index, [empty], FLAT, pool=InlinePool())
    with pytest.raises(InputError, match="no codes to add"):
        add_codes(index, [], FLAT, pool=InlinePool())


def test_an_index_that_was_never_published_is_not_changed(tmp_path: Path, pool: InlinePool) -> None:
    index = build_index([codes_at(tmp_path, "base")], str(tmp_path / "index"), FLAT, publish=False, pool=pool).uri
    for change in (
        lambda: remove_rows(index, FLAT, ["base/0/00000"]).as_json(),
        lambda: rollback_index(index).as_json(),
    ):
        with pytest.raises(InputError, match="never published"):
            change()
    assert publish_index(index, FLAT).version == 1
    assert remove_rows(index, FLAT, ["base/0/00000"]).version == 2


def test_codes_of_a_later_version_are_found_where_they_lie(tmp_path: Path, index: str) -> None:
    add_codes(index, [codes_at(tmp_path, "more")], FLAT, pool=InlinePool())
    assert open_current(index).origin("codes-1") == str(tmp_path / "more")
    assert open_current(index).origin("codes-0") == str(tmp_path / "base")


# ---------------------------------------------------------------------------------------------------------- remove


@KINDS
def test_what_is_removed_is_not_found_and_not_counted(tmp_path: Path, pool: InlinePool, config: Config) -> None:
    index = str(build_index([codes_at(tmp_path, "base", shards=3)], str(tmp_path / "index"), config, pool=pool).uri)
    gone = ["base/0/00003", "base/2/00000", "base/2/00019"]
    result = remove_rows(index, config, gone).as_json()
    assert (result["status"], result["version"], result["removed"], result["card"]["count"]) == ("done", 2, 3, 57)
    assert pool.done == [task for task in pool.done if task.number < 3]  # nothing was built
    assert not set(gone) & set(keys_of(index))
    with open_index(index) as reader, open_index(index, 1) as old:
        assert (reader.count, old.count) == (57, 60)
        ids = np.array([3, 2 << 32, 2 << 32 | 19])
        found = old.search(random_codes(5), 60)[1]
        assert np.isin(ids, found).all()
        assert not np.isin(ids, reader.search(random_codes(5), 60)[1]).any()
        assert reader.search(random_codes(5), 60)[1].shape == (5, 57)
    for key in gone:
        with pytest.raises(InputError, match=f"key '{key}' was removed from"):
            search(index, config, keys=[key])
    with pytest.raises(
        InputError, match=r"'base/0/0000' is not in .*; near it are base/0/00000, base/0/00001, base/0/00002"
    ):
        search(index, config, keys=["base/0/0000"])


def test_what_was_removed_already_is_fine_and_what_never_was_is_not(index: str) -> None:
    first = remove_rows(index, FLAT, ["base/0/00003"]).as_json()
    assert remove_rows(index, FLAT, ["base/0/00003"]).status == "unchanged"
    with pytest.raises(InputError, match=r"key 'base/0/0003' is not in .*; near it are base/0/.*--ignore-missing"):
        remove_rows(index, FLAT, ["base/0/00004", "base/0/0003"])
    with pytest.raises(InputError, match=r"shard 'base-00001.tar' is not in .*; near it are base-00000\d.tar"):
        remove_rows(index, FLAT, shards=["base-00001.tar"])
    assert open_current(index).digest == first["digest"]
    result = remove_rows(
        index, FLAT, ["base/0/00004", "base/0/0003"], ["base-00001.tar"], ignore_missing=True
    ).as_json()
    assert (result["removed"], result["version"]) == (1, 3)
    assert remove_rows(index, FLAT, ["nothing"], ignore_missing=True).status == "unchanged"
    assert remove_rows(index, FLAT, []).status == "unchanged"
    with pytest.raises(InputError, match="nothing to remove"):
        remove_rows(index, FLAT)


def test_a_whole_shard_goes_and_its_ordinal_stays_its_own(tmp_path: Path, index: str, pool: InlinePool) -> None:
    kept = ask(index)
    result = remove_rows(index, FLAT, shards=["base-000001.tar"]).as_json()
    assert (result["removed"], result["shards_removed"]) == (20, 1)
    assert not any(key.startswith("base/1/") for key in keys_of(index))
    assert remove_rows(index, FLAT, shards=["base-000001.tar"]).status == "unchanged"
    add_codes(index, [codes_at(tmp_path, "more", shards=1)], FLAT, pool=pool)
    add_codes(index, [str(tmp_path / "base")], FLAT, pool=pool)
    assert tars_of(pool) == [(3, "more-000000.tar"), (1, "base-000001.tar")]
    remove_rows(index, FLAT, shards=["more-000000.tar"])
    assert ask(index) == kept


@pytest.mark.parametrize("compacted", [False, True])
@pytest.mark.parametrize("config", [FLAT, IVF, HNSW, MULTIHASH], ids=["flat", "ivf", "hnsw", "multihash"])
def test_a_shard_whose_last_row_went_is_not_taken_for_a_new_one(
    tmp_path: Path, pool: InlinePool, config: Config, compacted: bool
) -> None:
    base = codes_at(tmp_path, "base", shards=3)
    index = str(build_index([base], str(tmp_path / "index"), config, pool=pool).uri)
    gone = [f"base/1/{n:05d}" for n in range(20)]
    remove_rows(index, config, gone[:19])
    assert remove_rows(index, config, gone[19:]).removed == 1
    remove_rows(index, config, ["base/2/00003"])
    if compacted:
        assert (result := compact_index(index, config, pool=pool)).compacted == 2 and result.dropped == 21
    codes = [base, codes_at(tmp_path, "more", shards=1)]
    result = add_codes(index, codes, config, prune=True, replace_changed=True, pool=pool).as_json()
    assert (result["added"], result["shards_replaced"], result["shards_removed"]) == (20, 0, 0)
    assert len(keys_of(index)) == 59 and not set(gone) & set(keys_of(index))
    with open_index(index) as reader:
        assert reader.search(random_codes(3), 99)[1].shape == (3, 59)
        assert dedupe([codes[1]], str(tmp_path / "alike"), config, against=index).indexed == 59
    assert verify(index).status == "done"
    remove_rows(index, config, shards=["base-000001.tar"])
    assert add_codes(index, codes, config, pool=pool).added == 20, "a tar that was removed as a whole may come again"


def test_a_sample_that_came_for_one_that_was_compacted_away_is_a_change(tmp_path: Path, pool: InlinePool) -> None:
    (rows,) = tars("a", shards=1).values()
    first = Rows(rows.keys[:9], rows.codes[:9], rows.labels[:9], "5" * 64)
    kept = [0, 1, 2, 4, 5, 6, 7, 8, 9]
    other = Rows([rows.keys[n] for n in kept], rows.codes[kept], [rows.labels[n] for n in kept], "5" * 64, kept)
    codes = write_codes(tmp_path / "codes", {"a-000000.tar": first})
    index = build_index([codes.uri], str(tmp_path / "index"), FLAT, pool=pool).uri
    remove_rows(index, FLAT, ["a/0/00003"])
    compact_index(index, FLAT, pool=pool)
    now = write_codes(tmp_path / "now", {"a-000000.tar": other}).uri
    assert add_codes(index, [now], FLAT, replace_changed=True, pool=pool).shards_replaced == 1
    assert keys_of(index) == [rows.keys[n] for n in kept]


def test_a_tar_that_has_no_codes_any_more_goes(tmp_path: Path, index: str) -> None:
    contents = tars("base", shards=3)
    for shard in open_codes(str(tmp_path / "base")).shards:
        contents[shard.name].sha256 = shard.sha256
    sha256 = contents["base-000001.tar"].sha256
    contents["base-000001.tar"] = Rows([], np.empty((0, 8), np.uint8), [], sha256)
    remove_rows(index, FLAT, ["base/1/00003"])
    result = add_codes(
        index, [write_codes(tmp_path / "other", contents).uri], FLAT, replace_changed=True, pool=InlinePool()
    ).as_json()
    assert (result["added"], result["shards_added"], result["shards_replaced"]) == (0, 0, 1)
    assert len(keys_of(index)) == 40
    assert verify(index).status == "done"


def test_an_index_is_never_emptied(index: str) -> None:
    with pytest.raises(InputError, match="no code would be left"):
        remove_rows(index, FLAT, shards=[f"base-{n:06d}.tar" for n in range(3)])
    assert list_versions(Store(index)) == [1]


def test_tars_of_one_name_are_told_apart_by_their_sha256(tmp_path: Path, pool: InlinePool) -> None:
    uris = [write_codes(tmp_path / n, {"s-000000.tar": simple_rows(n, 5, seed=len(n))}).uri for n in ("a", "bb")]
    index = build_index(uris, str(tmp_path / "index"), FLAT, pool=pool).uri
    with pytest.raises(InputError, match=r"names 2 tars: .* [0-9a-f]{12} \(ordinal 0\)"):
        remove_rows(index, FLAT, shards=["s-000000.tar"])
    second = open_codes(uris[1]).shards[0].sha256
    assert remove_rows(index, FLAT, shards=[second[:10]]).removed == 5
    assert keys_of(index)[0] == "a/00000"


# --------------------------------------------------------------------------------------------------------- compact


@KINDS
def test_compacting_changes_no_answer(tmp_path: Path, pool: InlinePool, config: Config) -> None:
    index = str(build_index([codes_at(tmp_path, "base", shards=3)], str(tmp_path / "index"), config, pool=pool).uri)
    assert compact_index(index, config, pool=pool).status == "unchanged"
    remove_rows(index, config, [f"base/0/{n:05d}" for n in range(5)] + ["base/2/00007"])
    before, everything = ask(index), ask(index, k=60)
    pool.done.clear()
    (tmp_path / "base").rename(tmp_path / "away")  # the codes are not needed
    result = compact_index(index, config, pool=pool).as_json()
    assert (result["version"], result["compacted"], result["dropped"]) == (3, 2, 6)
    assert [task.number for task in pool.done] == [0, 2]
    assert REMOVED_NAME not in {part.name for part in open_current(index).manifest.parts}
    assert ask(index, k=60) == everything
    assert sure(ask(index)) == sure(before)
    assert config.index.kind == "ivf" or ask(index) == before
    assert compact_index(index, config, pool=pool).status == "unchanged"
    (tmp_path / "away").rename(tmp_path / "base")
    assert add_codes(index, [str(tmp_path / "base")], config, pool=pool).status == "unchanged"


def test_rows_that_were_compacted_away_are_no_difference_of_codes(tmp_path: Path, index: str) -> None:
    remove_rows(index, FLAT, ["base/0/00003"])
    compact_index(index, FLAT, pool=InlinePool())
    remove_rows(index, FLAT, ["base/0/00009"])
    compact_index(index, FLAT, pool=InlinePool())
    contents = {**tars("base", shards=3), **tars("new", shards=1)}
    for shard in open_codes(str(tmp_path / "base")).shards:
        contents[shard.name].sha256 = shard.sha256
    grown = write_codes(tmp_path / "grown", contents, shards_digest="b" * 64).uri
    assert add_codes(index, [grown], FLAT, pool=InlinePool()).added == 20
    assert not {"base/0/00003", "base/0/00009"} & set(keys_of(index))


# ------------------------------------------------------------------------------------------------------- ten nights


@pytest.mark.parametrize("config", [FLAT, IVF, HNSW, PACKED], ids=["flat", "ivf", "hnsw", "packed"])
def test_ten_nights_end_with_the_answers_of_a_fresh_build(tmp_path: Path, pool: InlinePool, config: Config) -> None:
    """1% added and 1% removed each night, twice a whole tar, twice compacted, once rolled back and done again."""
    gate = GateSettings(probes=20)
    config = config.model_copy(update={"index": config.index.model_copy(update={"gate": gate})})
    random = np.random.default_rng(5)
    nights: dict[str, dict[str, Rows]] = {"base": tars("base", shards=5, count=100)}
    index = str(
        build_index(
            [write_codes(tmp_path / "base", nights["base"]).uri], str(tmp_path / "index"), config, pool=pool
        ).as_json()["uri"]
    )
    gone: set[str] = set()
    for night in range(10):
        name = f"night{night}"
        nights[name] = tars(name, shards=1, count=5)
        added = write_codes(tmp_path / name, nights[name]).uri
        keys = random.choice(keys_of(index), 5, replace=False).tolist()
        if night == 6:
            add_codes(index, [added], config, pool=pool)
            remove_rows(index, config, keys)
            rollback_index(index, list_versions(Store(index))[-3])
        add_codes(index, [added], config, pool=pool)
        remove_rows(index, config, keys)
        gone |= set(keys)
        if night in (2, 8):
            shard = f"night{night - 1}-000000.tar"
            remove_rows(index, config, shards=[shard])
            gone |= set(nights[f"night{night - 1}"][shard].keys)
        if night in (4, 7):
            compact_index(index, config, pool=pool)
    left = {
        name: write_codes(tmp_path / f"left-{name}", {tar: without(rows, gone) for tar, rows in contents.items()}).uri
        for name, contents in nights.items()
    }
    same = str(build_index(list(left.values()), str(tmp_path / "same"), config, pool=pool).uri)
    assert sorted(keys_of(index)) == sorted(keys_of(same))
    with open_index(index) as reader, open_index(same) as fresh:
        assert {n: s.shard for n, s in reader.shards.items()} == {n: s.shard for n, s in fresh.shards.items()}
    answers, expected = ask(index, 50, 20), ask(same, 50, 20)
    assert sure(answers) == sure(expected)
    assert config.index.kind == "ivf" or answers == expected
    assert ask(index, 5, 5000) == ask(same, 5, 5000)

    other = str(build_index(list(left.values())[::-1], str(tmp_path / "other"), config, pool=pool).uri)
    assert answers[0] == ask(other, 50, 20)[0]
    assert below(index, 50, 20) == below(other, 50, 20)


def without(rows: Rows, gone: set[str]) -> Rows:
    kept = [n for n, key in enumerate(rows.keys) if key not in gone]
    return Rows([rows.keys[n] for n in kept], rows.codes[kept], [rows.labels[n] for n in kept], row=kept)


def below(index: str, count: int, k: int) -> list[set[str]]:
    """Keys nearer than the k-th."""
    with open_index(index) as reader:
        distances, ids = reader.search(random_codes(count, reader.bits, seed=77), k)
        items = reader.items(ids.ravel().tolist())
    return [{items[n].key for n in i[d < d[-1]].tolist()} for d, i in zip(distances, ids, strict=True)]
