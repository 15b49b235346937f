"""Indexes are changed by publishing their next version: what is added, removed, compacted, and what can go wrong."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pipelines.index.pool
from pipelines.artifacts.commit import list_versions, publish_version
from pipelines.artifacts.manifest import Artifact, manifest_digest, open_artifact
from pipelines.artifacts.tables import parquet_bytes, read_parquet, table_of
from pipelines.artifacts.versions import open_current, publish_next
from pipelines.config.settings import Config, GateSettings, IndexSettings
from pipelines.dedupe.dedupe import dedupe
from pipelines.encode.codes import open_codes
from pipelines.errors import (
    CommitConflict,
    DamagedArtifact,
    FingerprintMismatch,
    InputError,
    StoreUnavailable,
    WorkFailed,
)
from pipelines.index import update as reindex
from pipelines.index.build import build_index
from pipelines.index.kinds.flat import FlatKind
from pipelines.index.publish import describe_index, publish_index, rollback_index
from pipelines.index.reader import QUANTIZER_NAME, REMOVED, REMOVED_NAME, open_index
from pipelines.index.update import add_codes, compact_index, remove_rows
from pipelines.search.search import search
from pipelines.storage import Store, canonical_json, failpoints, sha256_of
from pipelines.verify.verify import verify
from tests.support.codes import Rows, random_codes, simple_rows, write_codes
from tests.support.inline import InlinePool, use_inline_pool

FLAT = Config(index=IndexSettings(workers=1))
IVF = Config(index=IndexSettings(kind="ivf", nlist=6, nprobe=6, workers=1))
HNSW = Config(index=IndexSettings(kind="hnsw", ef_search=400, workers=1))
MULTIHASH = Config(index=IndexSettings(kind="multihash", workers=1))
KINDS = pytest.mark.parametrize("config", [FLAT, IVF, HNSW], ids=["flat", "ivf", "hnsw"])


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> InlinePool:
    return use_inline_pool(monkeypatch, pipelines.index.pool)


@pytest.fixture(autouse=True)
def fresh_failpoints() -> Iterator[None]:
    failpoints._hits.clear()
    yield
    failpoints._hits.clear()


def tars(name: str, shards: int = 2, count: int = 20, bits: int = 64) -> dict[str, Rows]:
    return {
        f"{name}-{n:06d}.tar": simple_rows(f"{name}/{n}", count, bits, seed=hash_of(name) + n, flip=0.3)
        for n in range(shards)
    }


def hash_of(name: str) -> int:
    return sum(name.encode())


def codes_at(root: Path, name: str, **options: Any) -> str:
    contents = tars(name, **{key: options.pop(key) for key in ("shards", "count", "bits") if key in options})
    bits = 8 * next(iter(contents.values())).codes.shape[1]
    return write_codes(root / name, contents, bits, **options).uri


@pytest.fixture
def index(tmp_path: Path, pool: InlinePool) -> str:
    uri = str(build_index([codes_at(tmp_path, "base", shards=3)], str(tmp_path / "index"), FLAT).uri)
    pool.done.clear()
    return uri


def ask(index: str, count: int = 12, k: int = 9, version: int | None = None) -> list[Any]:
    """Distances and ids of seeded queries."""
    with open_index(index, version) as reader:
        distances, ids = reader.search(random_codes(count, reader.bits, seed=77), k)
    return [distances.tolist(), ids.tolist()]


def sure(answers: list[Any]) -> list[Any]:
    """What no order of equal distances changes: the distances, and the ids below the last of them."""
    distances, ids = np.array(answers[0]), np.array(answers[1])
    return [distances.tolist(), [set(i[d < d[-1]].tolist()) for d, i in zip(distances, ids, strict=True)]]


def keys_of(index: str) -> list[str]:
    with open_index(index) as reader:
        return list(reader.all_keys())


# ------------------------------------------------------------------------------------------------------------- add


@KINDS
def test_new_tars_are_added_and_nothing_else_is_touched(tmp_path: Path, pool: InlinePool, config: Config) -> None:
    index = build_index([codes_at(tmp_path, "base", shards=3)], str(tmp_path / "index"), config).uri
    before = {path: path.read_bytes() for path in Path(index).rglob("*") if path.is_file()}
    first = open_current(index).manifest
    pool.done.clear()
    result = add_codes(index, [codes_at(tmp_path, "more")], config).as_json()
    assert (result["verb"], result["status"], result["version"]) == ("index add", "done", 2)
    assert (result["added"], result["shards_added"], result["card"]["count"]) == (40, 2, 100)
    assert [(task.ordinal, task.shard) for task in pool.done] == [(3, "more-000000.tar"), (4, "more-000001.tar")]
    second = open_current(index).manifest
    assert {part.path for part in second.parts} > {part.path for part in first.parts if "ordinals" not in part.path}
    assert all(path.read_bytes() == data for path, data in before.items())
    assert {entry.role for entry in second.inputs} == {"codes-0", "codes-1", "model"}
    both = build_index([str(tmp_path / "base"), str(tmp_path / "more")], str(tmp_path / "both"), config).as_json()[
        "uri"
    ]
    assert sure(ask(index)) == sure(ask(both))
    assert config.index.kind == "ivf" or ask(index) == ask(both)
    assert second.meta["quantizer_sha256"] == first.meta["quantizer_sha256"]


def test_only_what_is_not_held_is_added(tmp_path: Path, index: str, pool: InlinePool) -> None:
    base = str(tmp_path / "base")
    again = add_codes(index, [base], FLAT).as_json()
    assert (again["status"], again["version"], again["added"], pool.done) == ("unchanged", 1, 0, [])
    held = {shard.name: shard.sha256 for shard in open_codes(base).shards}
    contents = {**tars("base", shards=3), **tars("new", shards=1)}
    for name, sha256 in held.items():
        contents[name].sha256 = sha256
    grown = write_codes(tmp_path / "grown", contents, shards_digest="b" * 64).uri
    result = add_codes(index, [grown], FLAT).as_json()
    assert (result["version"], result["added"], [task.shard for task in pool.done]) == (2, 20, ["new-000000.tar"])
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
        add_codes(index, [other.uri], FLAT)
    remove_rows(index, FLAT, shards=["base-000001.tar"])
    assert add_codes(index, [other.uri], FLAT).added == 20


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
    index = build_index([first.uri], str(tmp_path / "index"), config).uri
    remove_rows(index, config, ["a/0/00004"])
    if compacted:
        compact_index(index, config)
    remove_rows(index, config, ["a/0/00006"])
    number = list_versions(Store(index))[-1]
    codes = retried(tmp_path, first, every)
    with pytest.raises(
        FingerprintMismatch, match=r"holds a-000000.tar .* and has others: add --replace to take the new"
    ):
        add_codes(index, [codes], config)
    result = add_codes(index, [codes], config, replace_changed=True).as_json()
    facts = {name: result[name] for name in ("version", "added", "shards_added", "shards_replaced")}
    assert facts == {"version": number + 1, "added": 0, "shards_added": 0, "shards_replaced": 1}
    (rows,) = every.values()
    left = [n for n in range(20) if n not in (4, 6)]
    assert keys_of(index) == [rows.keys[n] for n in left]
    with open_index(index) as reader:
        assert reader.search(rows.codes[left], 1)[1].ravel().tolist() == left, "an ordinal is given once, to one tar"
    assert add_codes(index, [codes], config, replace_changed=True).status == "unchanged"
    assert compact_index(index, config).dropped == 2
    assert verify(index).status == "done"


def test_what_was_compacted_away_is_not_brought_back_unseen(tmp_path: Path, pool: InlinePool) -> None:
    first, every = half_rejected(tmp_path)
    index = build_index([first.uri], str(tmp_path / "index"), FLAT).uri
    remove_rows(index, FLAT, ["a/0/00004"])
    compact_index(index, FLAT)
    elsewhere = write_codes(tmp_path / "elsewhere", every).uri
    Path(first.uri).rename(tmp_path / "moved")
    with pytest.raises(InputError, match=f"cannot keep 1 earlier removals of .*{first.digest[:12]}"):
        add_codes(index, [elsewhere], FLAT, replace_changed=True)
    (tmp_path / "moved").rename(first.uri)
    assert add_codes(index, [elsewhere], FLAT, replace_changed=True).shards_replaced == 1
    assert "a/0/00004" not in keys_of(index) and len(keys_of(index)) == 19


def test_a_tar_of_which_just_removed_samples_have_codes_now_goes(tmp_path: Path, index: str) -> None:
    remove_rows(index, FLAT, ["base/1/00003"])
    contents = tars("base", shards=3)
    for shard in open_codes(str(tmp_path / "base")).shards:
        contents[shard.name].sha256 = shard.sha256
    rows = contents["base-000001.tar"]
    contents["base-000001.tar"] = Rows(rows.keys[3:4], rows.codes[3:4], rows.labels[3:4], rows.sha256, [3])
    other = write_codes(tmp_path / "other", contents).uri
    assert add_codes(index, [other], FLAT, replace_changed=True).shards_replaced == 1
    assert len(keys_of(index)) == 40
    assert verify(index).status == "done"


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"bits": 32}, "index has bits 64, .*/odd has bits 32"),
        ({"model": "c" * 64}, "index has model aaaaaaaaaaaa, .*/odd has model cccccccccccc"),
        ({"classes": ("cat", "dog", "fox")}, "index has classes 3, .*/odd has classes 3 with other names"),
    ],
)
def test_codes_that_do_not_belong_to_the_index_are_refused_naming_both(
    tmp_path: Path, index: str, options: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(FingerprintMismatch, match=complaint):
        add_codes(index, [codes_at(tmp_path, "odd", **options)], FLAT)
    assert list_versions(Store(index)) == [1]


def test_a_tar_twice_and_an_empty_artifact_are_refused(tmp_path: Path, index: str) -> None:
    more = codes_at(tmp_path, "more")
    with pytest.raises(InputError, match="codes of the same tar: name it once"):
        add_codes(index, [more, more], FLAT)
    empty = write_codes(tmp_path / "empty", {"e-000000.tar": Rows([], np.empty((0, 8), np.uint8), [])}).uri
    with pytest.raises(InputError, match="there are no codes to add"):
        add_codes(index, [empty], FLAT)
    with pytest.raises(InputError, match="no codes to add"):
        add_codes(index, [], FLAT)


def test_an_index_that_was_never_published_is_not_changed(tmp_path: Path, pool: InlinePool) -> None:
    index = build_index([codes_at(tmp_path, "base")], str(tmp_path / "index"), FLAT, publish=False).uri
    for change in (
        lambda: remove_rows(index, FLAT, ["base/0/00000"]).as_json(),
        lambda: rollback_index(index).as_json(),
    ):
        with pytest.raises(InputError, match="never published"):
            change()
    assert publish_index(index, FLAT).version == 1
    assert remove_rows(index, FLAT, ["base/0/00000"]).version == 2


def test_codes_of_a_later_version_are_found_where_they_lie(tmp_path: Path, index: str) -> None:
    add_codes(index, [codes_at(tmp_path, "more")], FLAT)
    assert open_current(index).origin("codes-1") == str(tmp_path / "more")
    assert open_current(index).origin("codes-0") == str(tmp_path / "base")


# ---------------------------------------------------------------------------------------------------------- remove


@KINDS
def test_what_is_removed_is_not_found_and_not_counted(tmp_path: Path, pool: InlinePool, config: Config) -> None:
    index = str(build_index([codes_at(tmp_path, "base", shards=3)], str(tmp_path / "index"), config).uri)
    gone = ["base/0/00003", "base/2/00000", "base/2/00019"]
    result = remove_rows(index, config, gone).as_json()
    assert (result["status"], result["version"], result["removed"], result["card"]["count"]) == ("done", 2, 3, 57)
    assert pool.done == [task for task in pool.done if task.ordinal < 3]  # nothing was built
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
    assert {part.name for part in open_current(index).manifest.parts} == {
        *("ordinals.parquet", "keys-000000.parquet", "keys-000002.parquet"),
        *("part-000000.safetensors", "part-000002.safetensors"),
    }
    assert remove_rows(index, FLAT, shards=["base-000001.tar"]).status == "unchanged"
    add_codes(index, [codes_at(tmp_path, "more", shards=1)], FLAT)
    add_codes(index, [str(tmp_path / "base")], FLAT)
    assert [(task.ordinal, task.shard) for task in pool.done] == [(3, "more-000000.tar"), (1, "base-000001.tar")]
    remove_rows(index, FLAT, shards=["more-000000.tar"])
    assert ask(index) == kept


@pytest.mark.parametrize("config", [FLAT, IVF, HNSW, MULTIHASH], ids=["flat", "ivf", "hnsw", "multihash"])
def test_a_shard_whose_last_row_went_is_not_taken_for_a_new_one(
    tmp_path: Path, pool: InlinePool, config: Config
) -> None:
    base = codes_at(tmp_path, "base", shards=3)
    index = str(build_index([base], str(tmp_path / "index"), config).uri)
    gone = [f"base/1/{n:05d}" for n in range(20)]
    remove_rows(index, config, gone[:19])
    assert remove_rows(index, config, gone[19:]).removed == 1
    assert compact_index(index, config).status == "unchanged", "the part is what says that they were removed"
    remove_rows(index, config, ["base/2/00003"])
    assert compact_index(index, config).compacted == 1
    codes = [base, codes_at(tmp_path, "more", shards=1)]
    result = add_codes(index, codes, config, prune=True, replace_changed=True).as_json()
    assert (result["added"], result["shards_replaced"], result["shards_removed"]) == (20, 0, 0)
    assert len(keys_of(index)) == 59 and not set(gone) & set(keys_of(index))
    with open_index(index) as reader:
        assert reader.search(random_codes(3), 99)[1].shape == (3, 59)
        assert dedupe([codes[1]], str(tmp_path / "alike"), config, against=index).indexed == 59
    assert verify(index).status == "done"
    remove_rows(index, config, shards=["base-000001.tar"])
    assert add_codes(index, codes, config).added == 20, "a tar that was removed as a whole may come again"


def test_a_sample_that_came_for_one_that_was_compacted_away_is_a_change(tmp_path: Path, pool: InlinePool) -> None:
    (rows,) = tars("a", shards=1).values()
    first = Rows(rows.keys[:9], rows.codes[:9], rows.labels[:9], "5" * 64)
    kept = [0, 1, 2, 4, 5, 6, 7, 8, 9]
    other = Rows([rows.keys[n] for n in kept], rows.codes[kept], [rows.labels[n] for n in kept], "5" * 64, kept)
    codes = write_codes(tmp_path / "codes", {"a-000000.tar": first})
    index = build_index([codes.uri], str(tmp_path / "index"), FLAT).uri
    remove_rows(index, FLAT, ["a/0/00003"])
    compact_index(index, FLAT)
    now = write_codes(tmp_path / "now", {"a-000000.tar": other}).uri
    assert add_codes(index, [now], FLAT, replace_changed=True).shards_replaced == 1
    assert keys_of(index) == [rows.keys[n] for n in kept]


def test_a_tar_that_has_no_codes_any_more_goes(tmp_path: Path, index: str) -> None:
    contents = tars("base", shards=3)
    for shard in open_codes(str(tmp_path / "base")).shards:
        contents[shard.name].sha256 = shard.sha256
    sha256 = contents["base-000001.tar"].sha256
    contents["base-000001.tar"] = Rows([], np.empty((0, 8), np.uint8), [], sha256)
    remove_rows(index, FLAT, ["base/1/00003"])
    result = add_codes(index, [write_codes(tmp_path / "other", contents).uri], FLAT, replace_changed=True).as_json()
    assert (result["added"], result["shards_added"], result["shards_replaced"]) == (0, 0, 1)
    assert len(keys_of(index)) == 40
    assert verify(index).status == "done"


def test_an_index_is_never_emptied(index: str) -> None:
    with pytest.raises(InputError, match="no code would be left"):
        remove_rows(index, FLAT, shards=[f"base-{n:06d}.tar" for n in range(3)])
    assert list_versions(Store(index)) == [1]


def test_tars_of_one_name_are_told_apart_by_their_sha256(tmp_path: Path, pool: InlinePool) -> None:
    uris = [write_codes(tmp_path / n, {"s-000000.tar": simple_rows(n, 5, seed=len(n))}).uri for n in ("a", "bb")]
    index = build_index(uris, str(tmp_path / "index"), FLAT).uri
    with pytest.raises(InputError, match=r"names 2 tars: .* [0-9a-f]{12} \(ordinal 0\)"):
        remove_rows(index, FLAT, shards=["s-000000.tar"])
    second = open_codes(uris[1]).shards[0].sha256
    assert remove_rows(index, FLAT, shards=[second[:10]]).removed == 5
    assert keys_of(index)[0] == "a/00000"


# --------------------------------------------------------------------------------------------------------- compact


@KINDS
def test_compacting_changes_no_answer(tmp_path: Path, pool: InlinePool, config: Config) -> None:
    index = str(build_index([codes_at(tmp_path, "base", shards=3)], str(tmp_path / "index"), config).uri)
    assert compact_index(index, config).status == "unchanged"
    remove_rows(index, config, [f"base/0/{n:05d}" for n in range(5)] + ["base/2/00007"])
    before, everything = ask(index), ask(index, k=60)
    pool.done.clear()
    (tmp_path / "base").rename(tmp_path / "away")  # the codes are not needed
    result = compact_index(index, config).as_json()
    assert (result["version"], result["compacted"], result["dropped"]) == (3, 2, 6)
    assert [task.ordinal for task in pool.done] == [0, 2]
    assert REMOVED_NAME not in {part.name for part in open_current(index).manifest.parts}
    assert ask(index, k=60) == everything
    assert sure(ask(index)) == sure(before)
    assert config.index.kind == "ivf" or ask(index) == before
    assert compact_index(index, config).status == "unchanged"
    (tmp_path / "away").rename(tmp_path / "base")
    assert add_codes(index, [str(tmp_path / "base")], config).status == "unchanged"


def test_rows_that_were_compacted_away_are_no_difference_of_codes(tmp_path: Path, index: str) -> None:
    remove_rows(index, FLAT, ["base/0/00003"])
    compact_index(index, FLAT)
    remove_rows(index, FLAT, ["base/0/00009"])
    compact_index(index, FLAT)
    contents = {**tars("base", shards=3), **tars("new", shards=1)}
    for shard in open_codes(str(tmp_path / "base")).shards:
        contents[shard.name].sha256 = shard.sha256
    grown = write_codes(tmp_path / "grown", contents, shards_digest="b" * 64).uri
    assert add_codes(index, [grown], FLAT).added == 20
    assert not {"base/0/00003", "base/0/00009"} & set(keys_of(index))


# ------------------------------------------------------------------------------------------------------- ten nights


@KINDS
def test_ten_nights_end_with_the_answers_of_a_fresh_build(tmp_path: Path, pool: InlinePool, config: Config) -> None:
    """1% added and 1% removed each night, twice a whole tar, twice compacted, once rolled back and done again."""
    gate = GateSettings(probes=20)
    config = config.model_copy(update={"index": config.index.model_copy(update={"gate": gate})})
    random = np.random.default_rng(5)
    nights: dict[str, dict[str, Rows]] = {"base": tars("base", shards=5, count=100)}
    index = str(
        build_index([write_codes(tmp_path / "base", nights["base"]).uri], str(tmp_path / "index"), config).as_json()[
            "uri"
        ]
    )
    gone: set[str] = set()
    for night in range(10):
        name = f"night{night}"
        nights[name] = tars(name, shards=1, count=5)
        added = write_codes(tmp_path / name, nights[name]).uri
        keys = random.choice(keys_of(index), 5, replace=False).tolist()
        if night == 6:
            add_codes(index, [added], config)
            remove_rows(index, config, keys)
            rollback_index(index, list_versions(Store(index))[-3])
        add_codes(index, [added], config)
        remove_rows(index, config, keys)
        gone |= set(keys)
        if night in (2, 8):
            shard = f"night{night - 1}-000000.tar"
            remove_rows(index, config, shards=[shard])
            gone |= set(nights[f"night{night - 1}"][shard].keys)
        if night in (4, 7):
            compact_index(index, config)
    left = {
        name: write_codes(tmp_path / f"left-{name}", {tar: without(rows, gone) for tar, rows in contents.items()}).uri
        for name, contents in nights.items()
    }
    same = str(build_index(list(left.values()), str(tmp_path / "same"), config).uri)
    assert sorted(keys_of(index)) == sorted(keys_of(same))
    with open_index(index) as reader, open_index(same) as fresh:
        assert {n: s.shard for n, s in reader.shards.items()} == {n: s.shard for n, s in fresh.shards.items()}
    answers, expected = ask(index, 50, 20), ask(same, 50, 20)
    assert sure(answers) == sure(expected)
    assert config.index.kind == "ivf" or answers == expected
    assert ask(index, 5, 5000) == ask(same, 5, 5000)

    other = str(build_index(list(left.values())[::-1], str(tmp_path / "other"), config).uri)
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


# ------------------------------------------------------------------------------------- versions, races, kills, gate


def test_a_running_reader_finishes_on_its_version(tmp_path: Path, index: str) -> None:
    expected = ask(index)
    with open_index(index) as reader:
        first = reader.search(random_codes(12, seed=77)[:1], 9)
        remove_rows(index, FLAT, [item.key for item in reader.items(first[1].ravel().tolist()).values()])
        add_codes(index, [codes_at(tmp_path, "more")], FLAT)
        compact_index(index, FLAT)
        distances, ids = reader.search(random_codes(12, seed=77), 9)
        assert [distances.tolist(), ids.tolist()] == expected
        assert len(reader.items(ids.ravel().tolist())) and reader.count == 60
    assert ask(index) != expected and ask(index, version=1) == expected


def test_a_rollback_is_a_version_and_ordinals_are_not_given_again(tmp_path: Path, index: str) -> None:
    expected = ask(index)
    add_codes(index, [codes_at(tmp_path, "more", shards=1)], FLAT)
    back = rollback_index(index).as_json()
    assert (back["status"], back["version"], back["to"], back["digest"]) == ("done", 3, 1, open_artifact(index).digest)
    assert ask(index) == expected
    assert (rollback_index(index, 1).status, rollback_index(index, 3).status) == (
        "unchanged",
        "unchanged",
    )
    add_codes(index, [codes_at(tmp_path, "other", shards=1)], FLAT)
    add_codes(index, [str(tmp_path / "more")], FLAT)
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
        "add": lambda: add_codes(index, [codes_at(tmp_path, "more")], FLAT).as_json(),
        "remove": lambda: remove_rows(index, FLAT, ["base/0/00001"]).as_json(),
        "compact": lambda: compact_index(index, FLAT).as_json(),
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
        "add": lambda index: add_codes(index, [more], FLAT).as_json(),
        "remove": lambda index: remove_rows(index, FLAT, ["base/0/00001"]).as_json(),
        "compact": lambda index: compact_index(index, FLAT).as_json(),
    }
    results = []
    for name in ("whole", "cut"):
        index = str(build_index([base], str(tmp_path / name), FLAT).uri)
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
        add_codes(index, [one], FLAT)
    monkeypatch.delenv(failpoints.FAILPOINTS_VARIABLE)
    add_codes(index, [two], FLAT)
    assert {key.split("/")[0] for key in keys_of(index)} == {"base", "two"}


def test_a_version_below_the_gate_is_not_published_and_the_figures_are_told(
    tmp_path: Path, index: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = FlatKind.build
    monkeypatch.setattr(FlatKind, "build", lambda self, codes, *rest: build(self, codes ^ 255, *rest))
    with pytest.raises(WorkFailed, match=r"self_recall 0\.\d+ is below 1; .*measured: self-recall 0\.\d.*p99 .* ms"):
        add_codes(index, [codes_at(tmp_path, "more")], FLAT)
    assert list_versions(Store(index)) == [1]


def test_what_was_not_published_waits_for_it(tmp_path: Path, index: str) -> None:
    assert publish_index(index, FLAT).status == "unchanged"
    hidden = add_codes(index, [codes_at(tmp_path, "more")], FLAT, publish=False).as_json()
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
    add_codes(index, [codes_at(tmp_path, "more", shards=1)], FLAT)
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
        (4, 4, 59, 1, 3, 4),
        (3, 3, 79, 1, 4, 4),
        (2, 2, 59, 1, 3, 3),
        (1, 1, 60, 0, 3, 3),
    ]
    assert all(entry["bytes"] > 0 and entry["recall"] == 1.0 for entry in result["versions"])


def test_a_corpus_that_outgrew_its_quantizer_is_noted(tmp_path: Path, pool: InlinePool) -> None:
    index = build_index([codes_at(tmp_path, "base", shards=1)], str(tmp_path / "index"), IVF).uri
    assert "note" not in add_codes(index, [codes_at(tmp_path, "some", shards=2)], IVF).card
    grown = add_codes(index, [codes_at(tmp_path, "more", shards=4)], IVF).as_json()
    assert grown["card"]["trained_on"] == 20
    assert grown["card"]["note"].startswith("7.0 times the codes that the quantizer was trained on")


# --------------------------------------------------------------------------------------------------- hostile versions


def forge(index: str, number: int, change: Callable[[dict[str, Any]], None]) -> None:
    """Publish a manifest that somebody wrote by hand, with a digest that is right."""
    fields = open_current(index).manifest.model_dump(mode="json")
    change(fields)
    fields["digest"] = manifest_digest(fields)
    path = f"manifests/{fields['digest'][:16]}.json"
    store = Store(index)
    store.put(path, canonical_json(fields))
    publish_version(store, number, path, fields["digest"])


@pytest.mark.parametrize(
    ("pairs", "complaint"),
    [
        ([(0, 5), (0, 3)], "is not sorted"),
        ([(0, 3), (0, 3)], "is not sorted"),
        ([(0, -1)], "is not sorted"),
        ([(7, 0)], "more rows of shard ordinal 7"),
        ([(0, n) for n in range(21)], "more rows of shard ordinal 0"),
        ([(0, 99)], "names rows that"),
    ],
)
def test_a_table_of_removed_rows_that_lies_is_found(index: str, pairs: list[tuple[int, int]], complaint: str) -> None:
    data = parquet_bytes(table_of(REMOVED, {"ordinal": [o for o, _ in pairs], "row": [r for _, r in pairs]}))
    path = "parts/removed-0123456789abcdef.parquet"
    part = {"path": path, "bytes": len(data), "rows": len(pairs), "sha256": sha256_of(data)}
    Store(index).put(path, data)
    forge(index, 2, lambda fields: fields["parts"].append(part))
    with pytest.raises(DamagedArtifact, match=complaint):
        ask(index)


def test_a_flipped_bit_in_the_table_of_removed_rows_is_found(index: str) -> None:
    remove_rows(index, FLAT, ["base/0/00000"])
    (path,) = (Path(index) / "parts").glob("removed-*")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    with pytest.raises(DamagedArtifact, match="does not match the digest"):
        ask(index)


def test_a_swapped_quantizer_is_refused_naming_both(tmp_path: Path, pool: InlinePool) -> None:
    config = IVF.model_copy(update={"index": IVF.index.model_copy(update={"seed": 9})})
    index = str(build_index([codes_at(tmp_path, "base")], str(tmp_path / "index"), IVF).uri)
    other = str(build_index([str(tmp_path / "base")], str(tmp_path / "other"), config).uri)
    own, foreign = (open_current(uri).manifest.part(QUANTIZER_NAME) for uri in (index, other))
    Store(index).put(foreign.path, Store(other).read(foreign.path))

    def swap(fields: dict[str, Any]) -> None:
        parts = [part for part in fields["parts"] if part["path"] != own.path]
        fields["parts"] = sorted([*parts, foreign.model_dump()], key=lambda part: str(part["path"]))

    forge(index, 2, swap)
    with pytest.raises(
        DamagedArtifact, match=f"built with quantizer {own.sha256[:12]}, .* lists {foreign.sha256[:12]}"
    ):
        ask(index)


def test_a_part_that_is_gone_is_not_named_again(index: str) -> None:
    (path,) = (Path(index) / "parts").glob("part-000001-*")
    path.unlink()
    with pytest.raises(DamagedArtifact, match=r"part-000001-.* is gone, so version 2 cannot name it"):
        remove_rows(index, FLAT, ["base/0/00000"])
    assert list_versions(Store(index)) == [1]


# ---------------------------------------------------------------------------------------------------------- verify


@KINDS
def test_verify_proves_every_version(tmp_path: Path, pool: InlinePool, config: Config) -> None:
    index = str(build_index([codes_at(tmp_path, "base", shards=3)], str(tmp_path / "index"), config).uri)
    remove_rows(index, config, ["base/0/00003", "base/1/00004"])
    add_codes(index, [codes_at(tmp_path, "more")], config)
    compact_index(index, config)
    remove_rows(index, config, ["more/0/00000"], ["base-000002.tar"])
    rollback_index(index, 2)
    last = rollback_index(index, 5).as_json()
    result = verify(index).as_json()
    assert result["digest"] == last["digest"]
    assert result["orphans"] == []
    for check in (
        "versions 1 to 7 name",
        "77 codes in 4 parts that open, 1 of their rows removed",
        "98 codes in 5 parts",
    ):
        assert any(check in line for line in result["checks"]), check


def test_verify_finds_rows_that_are_not_those_of_the_codes(tmp_path: Path, index: str) -> None:
    store, artifact = Store(index), open_current(index)
    part = artifact.manifest.part("keys-000001.parquet")
    table = read_parquet(store.read(part.path), "keys")
    data = parquet_bytes(table.set_column(1, table.schema.field(1), [[f"x{n}" for n in range(20)]]))
    changed = {"path": "parts/keys-000001-0123456789abcdef.parquet", "bytes": len(data), "sha256": sha256_of(data)}
    store.put(str(changed["path"]), data)

    def swap(fields: dict[str, Any]) -> None:
        fields["parts"] = [entry | changed if entry["path"] == part.path else entry for entry in fields["parts"]]

    forge(index, 2, swap)
    with pytest.raises(
        DamagedArtifact, match=r"keys-000001-0123456789abcdef.parquet has other rows than .*/base/parts"
    ):
        verify(index)


def test_verify_finds_rows_that_went_without_being_compacted(tmp_path: Path, index: str) -> None:
    """A version that leaves a shard's rows out and tells nobody."""
    remove_rows(index, FLAT, ["base/0/00003"])
    compact_index(index, FLAT)
    old = open_artifact(index).manifest.receipts

    def hide(fields: dict[str, Any]) -> None:
        fields["receipts"] = [ref.model_dump() for ref in old]
        fields["meta"]["version"] = 4

    forge(index, 4, hide)
    with pytest.raises(DamagedArtifact, match=r"does not list the tars of .*/base with their codes"):
        verify(index)


def test_verify_finds_a_part_that_belongs_to_no_shard(index: str) -> None:
    remove_rows(index, FLAT, shards=["base-000001.tar"])
    dropped = open_artifact(index).manifest.part("part-000001.safetensors")
    forge(index, 3, lambda fields: (fields["parts"].append(dropped.model_dump()), fields["meta"].update(version=3)))
    with pytest.raises(DamagedArtifact, match="the ordinal table gives it no rows"):
        verify(index)
