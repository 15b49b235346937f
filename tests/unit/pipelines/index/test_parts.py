"""Parts hold many tars: how they are filled, go on being filled, are merged, and are read."""

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.artifacts.manifest import Artifact
from pipelines.artifacts.parquet import ParquetRows, parquet_bytes, read_parquet, table_of
from pipelines.artifacts.versions import open_current
from pipelines.config.settings import Config, IndexSettings
from pipelines.encode.codes import open_codes
from pipelines.errors import DamagedArtifact, WorkFailed
from pipelines.index.build import build_index
from pipelines.index.keys import KEY_GROUP_ROWS
from pipelines.index.layout import NO_PART, ORDINALS, ORDINALS_NAME
from pipelines.index.parts import pack
from pipelines.index.publish import rollback_index
from pipelines.index.reader import open_index
from pipelines.index.update import add_codes, compact_index, remove_rows
from pipelines.storage import Store, sha256_of
from pipelines.storage.local import LocalObjects
from pipelines.verify.verify import verify
from tests.support.codes import Rows, random_codes, simple_rows, write_codes
from tests.support.indexes import ask, codes_at, keys_of
from tests.support.inline import InlinePool
from tests.unit.pipelines.index.test_update_hostile import forge

OF_50 = Config(index=IndexSettings(workers=1, part_codes=50))
"""Two tars of 20 codes in each part."""
HNSW_OF_50 = Config(index=IndexSettings(kind="hnsw", ef_search=400, workers=1, part_codes=50))
WITH_100 = Config(index=IndexSettings(workers=1, part_codes=100))
WHOLE = Config(index=IndexSettings(workers=1))


def build(codes: list[str], out: Path, config: Config = OF_50) -> str:
    return str(build_index(codes, str(out), config, pool=InlinePool()).uri)


def dealt(index: str) -> dict[int, list[int]]:
    """The ordinals of each part."""
    with open_index(index) as reader:
        return {number: [shard.ordinal for shard in part.shards] for number, part in reader.parts.items()}


def bytes_of_parts(index: str) -> dict[str, str]:
    """The digest of each part and key table, by name."""
    parts = open_current(index).manifest.parts
    return {part.name: part.sha256 for part in parts if part.name.startswith(("part-", "keys-"))}


# ------------------------------------------------------------------------------------------------------------ packing


def test_parts_are_filled_one_after_another_and_go_on_where_they_ended() -> None:
    draw = random.Random(5)
    for _ in range(200):
        most = draw.randint(1, 40)
        sizes = [draw.choice((0, 1, 7, draw.randint(1, 60))) for _ in range(draw.randint(1, 30))]
        numbers = pack(sizes, most)
        totals = Counter[int]()
        firsts: dict[int, int] = {}
        for size, number in zip(sizes, numbers, strict=True):
            totals[number] += size
            if size:
                firsts.setdefault(number, size)
        assert numbers == sorted(numbers) and set(np.diff([0, *numbers]).tolist()) <= {0, 1}
        assert all(total <= most or total == firsts[number] for number, total in totals.items())
        assert all(totals[number - 1] + firsts[number] > most for number in firsts if number)
        cut = draw.randint(0, len(sizes))
        last = max(numbers[:cut], default=0)
        begun = sum(size for size, number in zip(sizes[:cut], numbers[:cut], strict=True) if number == last)
        assert numbers[:cut] + [last + number for number in pack(sizes[cut:], most, begun)] == numbers


@pytest.mark.parametrize("config", [OF_50, HNSW_OF_50], ids=["flat", "hnsw"])
def test_additions_give_the_parts_of_one_build(tmp_path: Path, config: Config) -> None:
    codes = [codes_at(tmp_path, name, shards=shards) for name, shards in (("a", 3), ("b", 1), ("c", 2), ("d", 1))]
    index = build(codes[:1], tmp_path / "grown", config)
    for uri in codes[1:]:
        add_codes(index, [uri], config, pool=InlinePool())
        assert verify(index).status == "done"
    whole = build(codes, tmp_path / "whole", config)
    assert dealt(index) == dealt(whole) == {0: [0, 1], 1: [2, 3], 2: [4, 5], 3: [6]}
    assert bytes_of_parts(index) == bytes_of_parts(whole)
    assert ask(index) == ask(whole)


def test_an_addition_builds_the_last_part_and_new_ones_only(tmp_path: Path) -> None:
    index = build([codes_at(tmp_path, "a", shards=3)], tmp_path / "index")
    first, pool = bytes_of_parts(index), InlinePool()
    remove_rows(index, OF_50, ["a/2/00004"])
    codes = codes_at(tmp_path, "b", shards=2)
    assert add_codes(index, [codes], OF_50, pool=pool).added == 40
    assert [(task.number, task.rows) for task in pool.done] == [(1, 40), (2, 20)]
    second = bytes_of_parts(index)
    assert second["part-000000.safetensors"] == first["part-000000.safetensors"]
    assert "a/2/00004" not in keys_of(index) and len(keys_of(index)) == 99
    assert verify(index).status == "done"


def test_many_small_additions_leave_one_part(tmp_path: Path) -> None:
    index = build([codes_at(tmp_path, "a", shards=1)], tmp_path / "index", WHOLE)
    for number in range(6):
        add_codes(index, [codes_at(tmp_path, f"more{number}", shards=1)], WHOLE, pool=InlinePool())
    assert dealt(index) == {0: list(range(7))}


def test_the_size_of_parts_is_kept_by_the_index_and_not_by_who_adds(tmp_path: Path) -> None:
    index = build([codes_at(tmp_path, "a", shards=3)], tmp_path / "index")
    add_codes(index, [codes_at(tmp_path, "b", shards=3)], WHOLE, pool=InlinePool())
    assert dealt(index) == {0: [0, 1], 1: [2, 3], 2: [4, 5]}


def test_a_build_that_lost_a_worker_goes_on_with_the_missing_parts(tmp_path: Path) -> None:
    codes, pool = codes_at(tmp_path, "a", shards=6), InlinePool()
    pool.fatal = lambda task: task.number == 1
    with pytest.raises(WorkFailed, match="run again to resume"):
        build_index([codes], str(tmp_path / "broken"), OF_50, pool=pool)
    pool.fatal = lambda task: False
    resumed = build_index([codes], str(tmp_path / "broken"), OF_50, pool=pool)
    assert [task.number for task in pool.done] == [0, 1, 2], "the part that was built is not built again"
    assert resumed.digest == build_index([codes], str(tmp_path / "whole"), OF_50, pool=InlinePool()).digest


def test_an_addition_that_lost_a_worker_goes_on_with_the_missing_parts(tmp_path: Path) -> None:
    index, pool = build([codes_at(tmp_path, "a", shards=3)], tmp_path / "index"), InlinePool()
    more = codes_at(tmp_path, "b", shards=4)
    pool.fatal = lambda task: task.number == 2
    with pytest.raises(WorkFailed, match="run again to resume"):
        add_codes(index, [more], OF_50, pool=pool)
    pool.fatal = lambda task: False
    add_codes(index, [more], OF_50, pool=pool)
    assert [task.number for task in pool.done] == [1, 2, 3]
    assert bytes_of_parts(index) == bytes_of_parts(build([str(tmp_path / "a"), more], tmp_path / "whole"))


# -------------------------------------------------------------------------------------------- replace, remove, compact


def test_a_tar_with_other_codes_takes_its_place_in_its_part(tmp_path: Path) -> None:
    index, pool = build([codes_at(tmp_path, "a", shards=4)], tmp_path / "index"), InlinePool()
    remove_rows(index, OF_50, ["a/1/00003"])
    shards = open_codes(str(tmp_path / "a")).shards
    fresh = simple_rows("a/1", 20, seed=99)
    fresh.sha256 = shards[1].sha256
    other = write_codes(tmp_path / "other", {shards[1].name: fresh}).uri
    assert add_codes(index, [other], OF_50, replace_changed=True, pool=pool).shards_replaced == 1
    assert [(task.number, task.rows) for task in pool.done] == [(0, 40)]
    assert dealt(index) == {0: [0, 1], 1: [2, 3]}
    with open_index(index) as reader:
        found, lacking = reader.find(["a/1/00003", "a/1/00004"])
    assert lacking == ["a/1/00003"] and found[0][1] == fresh.codes[4].tobytes()
    assert verify(index).status == "done"


def test_a_tar_that_was_removed_as_a_whole_comes_again_to_its_part_or_to_the_last(tmp_path: Path) -> None:
    codes = codes_at(tmp_path, "a", shards=4)
    index = build([codes], tmp_path / "index")
    before = ask(index)
    for compacted in (False, True):
        assert remove_rows(index, OF_50, shards=["a-000001.tar"]).removed == 20
        assert not any(key.startswith("a/1/") for key in keys_of(index)) and verify(index).status == "done"
        if compacted:
            assert compact_index(index, OF_50, pool=InlinePool()).dropped == 20
            assert dealt(index) == {0: [0], 1: [2, 3]}
        assert add_codes(index, [codes], OF_50, pool=InlinePool()).added == 20
        assert dealt(index) == ({0: [0], 1: [2, 3], 2: [1]} if compacted else {0: [0, 1], 1: [2, 3]})
        assert ask(index) == before and verify(index).status == "done"


def test_compacting_drops_removed_rows_and_merges_small_neighbours(tmp_path: Path) -> None:
    index, pool = build([codes_at(tmp_path, "a", shards=8)], tmp_path / "index"), InlinePool()
    assert compact_index(index, OF_50, pool=pool).status == "unchanged"
    remove_rows(index, OF_50, [f"a/0/{n:05d}" for n in range(15)] + ["a/6/00001"], ["a-000001.tar", "a-000003.tar"])
    before = ask(index, k=200)
    (tmp_path / "a").rename(tmp_path / "away")  # the codes are not needed
    result = compact_index(index, OF_50, pool=pool).as_json()
    assert (result["compacted"], result["dropped"]) == (3, 56)
    assert [(task.number, task.rows) for task in pool.done] == [(0, 25), (3, 39)]
    assert dealt(index) == {0: [0, 2], 2: [4, 5], 3: [6, 7]}
    assert ask(index, k=200) == before and verify(index).status == "done"
    assert compact_index(index, OF_50, pool=pool).status == "unchanged"
    (tmp_path / "away").rename(tmp_path / "a")
    assert add_codes(index, [str(tmp_path / "a")], OF_50, pool=pool).added == 40, "the two tars come again"
    assert dealt(index) == {0: [0, 2], 2: [4, 5], 3: [6, 7], 4: [1, 3]}


def test_a_part_without_a_row_left_goes(tmp_path: Path) -> None:
    codes = codes_at(tmp_path, "a", shards=6)
    index, pool = build([codes], tmp_path / "index"), InlinePool()
    remove_rows(index, OF_50, [f"a/{tar}/{n:05d}" for tar in (2, 3) for n in range(20)])
    assert compact_index(index, OF_50, pool=pool).as_json()["compacted"] == 1
    assert pool.done == [] and dealt(index) == {0: [0, 1], 2: [4, 5]}
    with open_index(index) as reader:
        shard = reader.shards[2]
        assert (shard.part, shard.rows, shard.compacted, shard.held) == (NO_PART, 0, 20, True)
    assert add_codes(index, [codes], OF_50, pool=pool).status == "unchanged", "its samples were removed one by one"
    assert verify(index).status == "done"


def test_a_rollback_forgets_the_parts_and_keeps_the_ordinals(tmp_path: Path) -> None:
    index = build([codes_at(tmp_path, "a", shards=3)], tmp_path / "index")
    add_codes(index, [codes_at(tmp_path, "b", shards=2)], OF_50, pool=InlinePool())
    rollback_index(index)
    add_codes(index, [codes_at(tmp_path, "c", shards=1), str(tmp_path / "b")], OF_50, pool=InlinePool())
    assert dealt(index) == {0: [0, 1], 1: [2, 3], 2: [4, 5]}
    with open_index(index) as reader:
        assert [reader.shards[n].shard for n in (3, 4, 5)] == ["b-000000.tar", "b-000001.tar", "c-000000.tar"]
    assert verify(index).status == "done"


# ------------------------------------------------------------------------------------------------------------ reading


def recorded(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, say: Callable[..., Any]) -> list[Any]:
    """What the calls of a method say of their arguments."""
    said: list[Any] = []
    plain = getattr(owner, name)

    def call(self: Any, *arguments: Any) -> Any:
        said.append(say(*arguments))
        return plain(self, *arguments)

    monkeypatch.setattr(owner, name, call)
    return said


def test_a_query_opens_few_parts_of_many_tars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = build([codes_at(tmp_path, "many", shards=60, count=5)], tmp_path / "index", WITH_100)
    names = recorded(monkeypatch, Artifact, "fetch", lambda part, folder: part.name)
    with open_index(index) as reader:
        assert len(reader.shards) == 60
        _, ids = reader.search(random_codes(1), 3)
        reader.items(ids.ravel().tolist())
    assert len(names) <= 3 + 3, names


def test_of_a_key_table_only_the_row_groups_and_columns_of_the_hits_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [simple_rows(f"x/{n}", 3 * KEY_GROUP_ROWS // 2, seed=n, flip=0.5) for n in range(4)]
    codes = write_codes(tmp_path / "codes", {f"x-{n:06d}.tar": one for n, one in enumerate(rows)}).uri
    index = build([codes], tmp_path / "index", WHOLE)
    read = recorded(monkeypatch, ParquetRows, "read_groups", lambda groups, columns=None: (list(groups), columns))
    with open_index(index) as reader:
        wanted = [0, 5, 1 << 32, (3 << 32) + 3 * KEY_GROUP_ROWS // 2 - 1]
        items = reader.items(wanted)
        assert [item.key for item in items.values()] == ["x/0/00000", "x/0/00005", "x/1/00000", "x/3/06143"]
        assert [groups for groups, _ in read] == [[0], [1], [5]]
        assert all("real_codes" not in columns for _, columns in read)
        reader.items(wanted)
        assert len(read) == 3, "a row group that was read stays for the next query"
        read.clear()
        assert reader.read_shard_keys(reader.shards[2], ["id"]).num_rows == 3 * KEY_GROUP_ROWS // 2
        assert [(groups, list(columns)) for groups, columns in read] == [([3], ["id"]), ([4], ["id"])]


def test_an_id_that_no_row_has_is_damage(tmp_path: Path) -> None:
    index = build([codes_at(tmp_path, "a", shards=3)], tmp_path / "index")
    with open_index(index) as reader:
        for number in (20, (2 << 32) + 20):
            with pytest.raises(DamagedArtifact, match=r"keys-00000\d.parquet lacks rows that the part returned"):
                reader.items([number])
        with pytest.raises(DamagedArtifact, match="does not know shard ordinal 3"):
            reader.items([3 << 32])


def test_samples_of_one_name_come_in_the_order_of_their_ids(tmp_path: Path) -> None:
    """Also where a tar that was removed and compacted away came again, and so lies in a later part."""
    contents = {f"x-{n:06d}.tar": Rows(["same"], random_codes(1, seed=n), [[0]]) for n in range(4)}
    codes = write_codes(tmp_path / "codes", contents).uri
    config = Config(index=IndexSettings(workers=1, part_codes=2))
    index = build([codes], tmp_path / "index", config)
    remove_rows(index, config, shards=["x-000000.tar"])
    compact_index(index, config, pool=InlinePool())
    add_codes(index, [codes], config, pool=InlinePool())
    assert dealt(index) == {0: [1], 1: [2, 3], 2: [0]}
    with open_index(index) as reader:
        found, _ = reader.find(["same"])
        assert [item.id >> 32 for item, _ in found] == [0, 1, 2, 3]
        assert reader.find_ids(["same"])[0].tolist() == [n << 32 for n in range(4)]


def test_a_shard_that_is_not_where_the_ordinal_table_says_is_noticed(tmp_path: Path) -> None:
    index = build([codes_at(tmp_path, "a", shards=4)], tmp_path / "index")
    listed = open_current(index).manifest.part(ORDINALS_NAME)
    table = read_parquet(Store(index).read(listed.path), "ordinals").to_pylist()
    columns = {name: [row[name] for row in table] for name in ORDINALS.names} | {"part": [0, 1, 0, 1]}
    data = parquet_bytes(table_of(ORDINALS, columns))
    other = {"path": "parts/ordinals-0123456789abcdef.parquet", "bytes": len(data), "sha256": sha256_of(data)}
    Store(index).put(str(other["path"]), data)

    def swap(fields: dict[str, Any]) -> None:
        fields["parts"] = [entry | other if entry["path"] == listed.path else entry for entry in fields["parts"]]

    forge(index, 2, swap)
    with pytest.raises(DamagedArtifact, match=r"keys-000000.parquet does not hold the shards that the ordinal table"):
        verify(index)


# ----------------------------------------------------------------------------------------------------------- requests


def asked(monkeypatch: pytest.MonkeyPatch, work: Callable[[], object]) -> Counter[str]:
    """How often `work` asks a store, by operation."""
    counts = Counter[str]()
    with monkeypatch.context() as patch:
        for name in ("read", "open", "size", "entries", "put", "delete"):
            plain = getattr(LocalObjects, name)

            def call(self: Any, *arguments: Any, name: str = name, plain: Any = plain) -> Any:
                counts[name] += 1
                return plain(self, *arguments)

            patch.setattr(LocalObjects, name, call)
        work()
    return counts


def test_a_build_reads_each_tar_once_and_asks_all_else_once_for_a_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for tars in (10, 30):
        codes = codes_at(tmp_path / str(tars), "many", shards=tars, count=5)
        out = tmp_path / f"index-{tars}"
        found.append(asked(monkeypatch, lambda codes=codes, out=out: build([codes], out, WHOLE)))  # type: ignore[misc]
    few, many = found
    assert many - few == {"read": 20}, "its codes: its receipt is in the manifest"
    assert few - many == {}
