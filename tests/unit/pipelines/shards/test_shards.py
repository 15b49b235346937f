"""Shards: reproducible tars, reads that survive damage, epoch plans in which no sample is lost."""

import io
import json
import random
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.artifacts.commit import ArtifactWriter
from pipelines.artifacts.facts import ShardsMeta
from pipelines.artifacts.manifest import Artifact, make_manifest
from pipelines.artifacts.parquet import parquet_bytes, read_parquet
from pipelines.artifacts.tables import SHARD_INDEX
from pipelines.config.loading import load_config
from pipelines.config.settings import Config
from pipelines.errors import DamagedArtifact, InputError
from pipelines.ingest.ingest import ingest
from pipelines.shards import index as shard_index
from pipelines.shards.index import DIRECTORY_NAME, ROW_GROUP_ROWS, ShardIndex, is_tar, piece_name, put_index
from pipelines.shards.plan import batch_sizes, epoch_spans, mix_sources
from pipelines.shards.shards import (
    Sample,
    Shard,
    ShardSet,
    open_shards,
    scan_tar,
    write_tar,
)
from pipelines.storage import map_in_order, sha256_of
from tests.support import pictures
from tests.support.memory import MemoryStore

LONG_KEY = "ünïçødé/" + "d" * 150 + "/" + "k" * 180


def samples() -> list[dict[str, Any]]:
    return [
        {"__key__": "a/1", "jpg": b"one", "cls": b"0"},
        {"__key__": LONG_KEY, "PNG": b"two" * 500, "json": b'{"labels": [1, 2]}'},
        {"__key__": "a/3", "bmp": b"", "cls": b"1"},
    ]


def scanned(path: Path) -> pa.Table:
    labels = {"a/1": [0], LONG_KEY: [1, 2], "a/3": [1]}
    images = {"a/1": "a/1.jpg", LONG_KEY: f"{LONG_KEY}.PNG", "a/3": "a/3.bmp"}
    return scan_tar(path, path.name, labels, images, {key: f"{name} as it was" for key, name in images.items()})


# --------------------------------------------------------------------------------------------------------- writing


def test_a_tar_depends_on_its_samples_alone(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", samples())
    write_tar(tmp_path / "b.tar", (dict(reversed(sample.items())) for sample in samples()))
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()


def test_the_index_knows_where_each_member_lies(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    write_tar(path, samples())
    data = path.read_bytes()
    rows = scanned(path).to_pylist()
    assert [row["key"] for row in rows] == ["a/1", LONG_KEY, "a/3"]
    assert [row["row"] for row in rows] == [0, 1, 2]
    assert [row["labels"] for row in rows] == [[0], [1, 2], [1]]
    assert [row["path"] for row in rows] == ["a/1.jpg as it was", f"{LONG_KEY}.PNG as it was", "a/3.bmp as it was"]
    assert [row["members"][0]["name"] for row in rows] == ["a/1.jpg", f"{LONG_KEY}.PNG", "a/3.bmp"]
    for row, sample in zip(rows, samples(), strict=True):
        for member in row["members"]:
            suffix = member["name"].rpartition(".")[2]
            assert data[member["offset"] : member["offset"] + member["size"]] == sample[suffix]


def test_tarfile_reads_long_and_foreign_names(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", samples())
    with tarfile.open(tmp_path / "a.tar") as archive:
        names = archive.getnames()
    assert names == ["a/1.cls", "a/1.jpg", f"{LONG_KEY}.PNG", f"{LONG_KEY}.json", "a/3.bmp", "a/3.cls"]


def test_members_apart_from_each_other_are_not_indexed(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name in ("a/1.jpg", "a/3.bmp", "a/1.cls"):
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    with pytest.raises(DamagedArtifact, match="apart from each other"):
        scanned(tmp_path / "a.tar")


def test_a_short_tar_is_not_indexed(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", samples())
    data = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(data[:1024])
    with pytest.raises(DamagedArtifact, match=r"a\.tar"):
        scanned(tmp_path / "a.tar")


# --------------------------------------------------------------------------------------------------------- reading


@pytest.fixture
def opened(tmp_path: Path) -> ShardSet:
    """24 samples of 3 classes in tars of 10, 10 and 4."""
    pictures.write_folder(tmp_path / "images")
    ingest(str(tmp_path / "images"), str(tmp_path / "out"), load_config(sets=["ingest.samples_per_shard=10"]))
    return open_shards(str(tmp_path / "out"))


def path_of(opened: ShardSet, shard: Shard) -> Path:
    return Path(opened.artifact.uri, shard.part.path)


def test_samples_come_in_order_with_their_bytes(opened: ShardSet, tmp_path: Path) -> None:
    assert [shard.rows for shard in opened.shards] == [10, 10, 4]
    assert opened.samples == 24
    assert opened.classes == ("class_00", "class_01", "class_02")
    seen = []
    for shard in opened.shards:
        for row, sample in enumerate(opened.read(shard)):
            assert sample.damage is None
            assert (sample.record.shard, sample.record.row) == (shard.name, row)
            suffix = sample.record.members[0].name.rpartition(".")[2]
            assert sample.image == (tmp_path / "images" / f"{sample.record.key}.{suffix}").read_bytes()
            assert opened.classes[sample.record.labels[0]] == sample.record.key.split("/")[0]
            seen.append(sample.record.key)
    assert len(set(seen)) == 24
    assert [len(record.labels) for shard in opened.shards for record in shard.records()] == [1] * 24


def test_some_rows_can_be_read(opened: ShardSet) -> None:
    shard = opened.shards[1]
    every = list(opened.read(shard))
    assert list(opened.read(shard, [7, 2])) == [every[7], every[2]]


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def cut_at_a_member(data: bytes) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return data[: archive.getmembers()[6].offset]


@pytest.mark.parametrize("damage", [cut, cut_at_a_member])
def test_a_truncated_tar_gives_its_whole_samples_and_names_the_rest(
    opened: ShardSet, damage: Callable[[bytes], bytes]
) -> None:
    shard = opened.shards[0]
    whole = list(opened.read(shard))
    path = path_of(opened, shard)
    path.write_bytes(damage(path.read_bytes()))
    found = list(opened.read(shard))
    assert [sample.record for sample in found] == [sample.record for sample in whole]
    intact = [sample for sample in found if sample.damage is None]
    assert 0 < len(intact) < 10
    assert intact == whole[: len(intact)]
    assert all(sample.image == b"" and "the tar ends inside" in str(sample.damage) for sample in found[len(intact) :])


def test_a_flipped_bit_damages_one_sample(opened: ShardSet) -> None:
    shard = opened.shards[0]
    whole = list(opened.read(shard))
    path = path_of(opened, shard)
    data = bytearray(path.read_bytes())
    data[whole[4].record.members[0].offset + 100] ^= 1
    path.write_bytes(data)
    found = list(opened.read(shard))
    assert [sample.damage is None for sample in found] == [row != 4 for row in range(10)]
    assert "does not match its sha256" in str(found[4].damage)
    assert found[:4] + found[5:] == whole[:4] + whole[5:]


def test_a_flipped_bit_in_a_header_damages_nothing(opened: ShardSet) -> None:
    shard = opened.shards[0]
    whole = list(opened.read(shard))
    path = path_of(opened, shard)
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(data)
    assert list(opened.read(shard)) == whole


def test_a_missing_tar_is_ten_damaged_samples(opened: ShardSet) -> None:
    path_of(opened, opened.shards[0]).unlink()
    found = list(opened.read(opened.shards[0]))
    assert len(found) == 10
    assert all("is missing" in str(sample.damage) for sample in found)


def test_metadata_is_read_where_asked_for(tmp_path: Path) -> None:
    pictures.write_folder(tmp_path, classes=1, per_class=2)
    (tmp_path / "t.csv").write_text("path,label,where\nclass_00/0000.jpg,x,Rome\nclass_00/0001.jpg,x,Oslo\n")
    ingest(str(tmp_path / "t.csv"), str(tmp_path / "out"), Config())
    opened = open_shards(str(tmp_path / "out"))
    found = {sample.record.key: sample for sample in opened.read(opened.shards[0], metadata=True)}
    assert json.loads(found["class_00/0001"].metadata or b"") == {"labels": [0], "where": "Oslo"}
    assert all(sample.metadata is None for sample in opened.read(opened.shards[0]))


def elsewhere(opened: ShardSet, index: Sequence[pa.Table] | None = None) -> Artifact:
    """The artifact as it would lie on a store that is not local, with another shard index if its tables are given."""
    manifest, store = opened.artifact.manifest, MemoryStore()
    store.memory.held = {part.path: Path(opened.artifact.uri, part.path).read_bytes() for part in manifest.parts}
    if index is None:
        return Artifact(store, manifest)
    writer = ArtifactWriter(store, "shards", manifest.fingerprint, (), {})
    parts = [*filter(is_tar, manifest.parts), *put_index(writer, index)]
    return writer.commit(parts, manifest.totals, opened.artifact.facts(ShardsMeta))


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of one or two tars of the three; one of them stays in memory."""
    monkeypatch.setattr(shard_index, "PIECE_ROWS", 15)
    monkeypatch.setattr(shard_index, "PIECES_KEPT", 1)


def test_a_tampered_index_is_refused_before_it_is_parsed(opened: ShardSet) -> None:
    for name in (DIRECTORY_NAME, piece_name(0)):
        path = Path(opened.artifact.uri, opened.artifact.manifest.part(name).path)
        before = path.read_bytes()
        data = bytearray(before)
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        with pytest.raises(DamagedArtifact, match="does not match the digest"):
            open_shards(opened.artifact.uri).shards[0].table()
        path.write_bytes(before)


def test_a_remote_index_leaves_no_file(opened: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    there = open_shards(elsewhere(opened))
    for mine, theirs in zip(opened.shards, there.shards, strict=True):
        assert list(opened.read(mine)) == list(there.read(theirs))
    assert list((tmp_path / "scratch").iterdir()) == []


def test_only_the_piece_of_a_tar_is_read(opened: ShardSet, small_pieces: None) -> None:
    made = elsewhere(opened, [shard.table() for shard in opened.shards])
    pieces = [part for part in made.manifest.parts if part.name.startswith("index-")]
    assert [part.rows for part in pieces] == [20, 4]
    there = open_shards(made)
    memory = made.store.memory  # type: ignore[attr-defined]
    del memory.held[pieces[0].path]
    assert there.shards[2].records() == opened.shards[2].records()
    for shard in there.shards[:2]:
        with pytest.raises(DamagedArtifact, match=r"index-000000-.* is missing"):
            shard.records()
    assert there.shards[2].records() == opened.shards[2].records()


def test_threads_read_the_rows_of_all_tars(opened: ShardSet, small_pieces: None) -> None:
    there = open_shards(elsewhere(opened, [shard.table() for shard in opened.shards]))
    wanted = [n % 3 for n in range(60)]
    found = map_in_order(lambda n: there.shards[n].records(), wanted, at_once=8)
    assert list(found) == [opened.shards[n].records() for n in wanted]


def test_the_rows_of_a_tar_lie_apart_in_the_index_in_small_groups(opened: ShardSet) -> None:
    metadata = pq.read_metadata(Path(opened.artifact.uri, opened.artifact.manifest.part(piece_name(0)).path))
    assert [metadata.row_group(n).num_rows for n in range(metadata.num_row_groups)] == [10, 10, 4]
    assert ROW_GROUP_ROWS <= 4096


def test_the_index_grows_by_pieces(opened: ShardSet, small_pieces: None) -> None:
    tables = [shard.table() for shard in opened.shards]
    first = elsewhere(opened, tables[:2])
    writer = ArtifactWriter(first.store, "shards", first.manifest.fingerprint, (), {})
    before = ShardIndex(first)
    parts = put_index(writer, tables[2:], before)
    assert list(before.pieces.values()) == parts[:1]
    fields = {"kind": "shards", "fingerprint": "a" * 64, "inputs": [], "totals": {}, "meta": first.manifest.meta}
    tars = list(filter(is_tar, opened.artifact.manifest.parts))
    grown = open_shards(Artifact(first.store, make_manifest(first.store, fields, [*tars, *parts], ())))
    assert [shard.records() for shard in grown.shards] == [shard.records() for shard in opened.shards]


def test_an_index_that_lies_about_one_tar_can_be_read_for_the_others(opened: ShardSet) -> None:
    tables = [shard.table() for shard in opened.shards]
    lie = tables[1].set_column(1, SHARD_INDEX.field(1), pa.array(["x.tar"] * 10, SHARD_INDEX.field(1).type))
    index = [tables[0], pa.concat_tables([tables[1].slice(0, 1), lie.slice(1)]).unify_dictionaries(), tables[2]]
    there = open_shards(elsewhere(opened, index))
    assert [there.shards[n].records() for n in (0, 2)] == [opened.shards[n].records() for n in (0, 2)]
    for look in (there.shards[1].records, lambda: there.read(there.shards[1])):
        with pytest.raises(DamagedArtifact, match=f"rows of {there.shards[1].name}"):
            look()


def test_a_directory_of_other_tars_is_refused(opened: ShardSet) -> None:
    tables = [shard.table() for shard in opened.shards]
    for index, complaint in (
        (tables[:2], r"has not the 4 rows of shard-000002\.tar"),
        ([tables[0], tables[1].slice(1), tables[2]], r"has not the 10 rows of shard-000001\.tar"),
        ([*tables, tables[0].set_column(1, SHARD_INDEX.field(1), other_tar(tables[0]))], "has 4 tars of 3"),
    ):
        with pytest.raises(DamagedArtifact, match=complaint):
            open_shards(elsewhere(opened, index))


def other_tar(table: pa.Table) -> pa.Array:
    return pa.array(["shard-000009.tar"] * len(table), SHARD_INDEX.field(1).type)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda rows: rows[1].update(start=9), r"gives shard-000001\.tar rows that are not its own"),
        (lambda rows: rows[1].update(start=11), "rows that are not its own"),
        (lambda rows: rows[2].update(piece=1), "rows that are not its own"),
        (lambda rows: rows[0].update(rows=0), "rows that are not its own"),
        (lambda rows: rows[2].update(rows=5), r"has 24 rows, the directory 25"),
    ],
)
def test_a_directory_that_lies_is_refused(
    opened: ShardSet, change: Callable[[list[dict[str, Any]]], None], complaint: str
) -> None:
    made = elsewhere(opened, [shard.table() for shard in opened.shards])
    part = made.manifest.part(DIRECTORY_NAME)
    rows = read_parquet(made.read(part), "directory").to_pylist()
    change(rows)
    data = parquet_bytes(pa.Table.from_pylist(rows, schema=shard_index.DIRECTORY))
    made.store.memory.held[part.path] = data  # type: ignore[attr-defined]
    put = replace(part, bytes=len(data), sha256=sha256_of(data))
    fields = {"kind": "shards", "fingerprint": "a" * 64, "inputs": [], "totals": {}, "meta": made.manifest.meta}
    parts = [put, *(other for other in made.manifest.parts if other != part)]
    with pytest.raises(DamagedArtifact, match=complaint):
        open_shards(Artifact(made.store, make_manifest(made.store, fields, parts, ())))


def test_an_unknown_shard_is_named(opened: ShardSet) -> None:
    assert opened.shard("shard-000001.tar") is opened.shards[1]
    with pytest.raises(InputError, match=r"shard-000009\.tar"):
        opened.shard("shard-000009.tar")


# ------------------------------------------------------------------------------------------------------ epoch plan

SIZES = ([7], [1, 1, 1], [10, 3, 0, 25, 1], [64] * 5, [1000, 1, 999])


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("world", [1, 2, 3, 7, 16])
def test_every_sample_belongs_to_exactly_one_rank(sizes: list[int], world: int) -> None:
    rows = [np.arange(size, dtype=np.int64) for size in sizes]
    for epoch in range(3):
        spans = [epoch_spans(rows, 5, epoch, world, rank) for rank in range(world)]
        seen = Counter((shard, int(row)) for own in spans for shard, taken in own for row in taken)
        assert seen == Counter((shard, row) for shard, size in enumerate(sizes) for row in range(size))
        counts = [sum(len(taken) for _, taken in own) for own in spans]
        assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("world", [1, 2, 5])
def test_held_out_rows_stay_out(world: int) -> None:
    generator = np.random.default_rng(0)
    rows = [np.flatnonzero(generator.random(size) < 0.8).astype(np.int64) for size in (50, 3, 120)]
    seen = Counter(
        (shard, int(row))
        for rank in range(world)
        for shard, taken in epoch_spans(rows, 0, 0, world, rank)
        for row in taken
    )
    assert seen == Counter((shard, int(row)) for shard, own in enumerate(rows) for row in own)


def test_epochs_and_seeds_differ_and_repeat() -> None:
    rows = [np.arange(5, dtype=np.int64)] * 20

    def order(seed: int, epoch: int) -> list[int]:
        return [shard for shard, _ in epoch_spans(rows, seed, epoch, 1, 0)]

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


@pytest.mark.parametrize("total", [1, 7, 64, 65, 1000])
@pytest.mark.parametrize("batch", [2, 8, 64])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_batches_add_up_over_steps_and_ranks(total: int, batch: int, world: int) -> None:
    sizes = [batch_sizes(total, -(-total // batch), world, rank) for rank in range(world)]
    assert {len(own) for own in sizes} == {-(-total // batch)}
    assert sum(map(sum, sizes)) == total
    for own in sizes:
        assert max(own) - min(own) <= 1
        assert min(own) >= 0
    steps = [sum(step) for step in zip(*sizes, strict=True)]
    assert max(steps) <= batch + world


def sources(sizes: list[int]) -> list[Callable[[], Any]]:
    return [lambda s=s, size=size: iter([(s, i) for i in range(size)]) for s, size in enumerate(sizes)]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(("interleave", "buffer"), [(1, 1), (2, 5), (4, 16), (100, 10_000)])
def test_mixing_yields_every_element_once_in_an_order_of_the_key_alone(
    sizes: list[int], interleave: int, buffer: int
) -> None:
    first = list(mix_sources(sources(sizes), interleave, buffer, (1, 2, 3)))
    random.seed(1)
    np.random.seed(1)  # the order must not depend on global generators
    assert list(mix_sources(sources(sizes), interleave, buffer, (1, 2, 3))) == first
    assert sorted(first) == [(s, i) for s, size in enumerate(sizes) for i in range(size)]


def test_mixing_mixes_and_differs_by_key() -> None:
    first, second = (list(mix_sources(sources([50] * 4), 4, 32, (key,))) for key in (0, 1))
    assert first != second
    assert len({shard for shard, _ in first[:20]}) >= 3
    assert first != sorted(first)


def test_mixing_opens_no_more_sources_than_it_draws_from() -> None:
    open_now, most = set(), 0

    def source(number: int) -> Any:
        nonlocal most
        open_now.add(number)
        most = max(most, len(open_now))
        yield from range(10)
        open_now.discard(number)

    list(mix_sources([lambda n=n: source(n) for n in range(12)], 3, 8, (0,)))
    assert most == 3


def test_mixing_keeps_each_samples_bytes(opened: ShardSet) -> None:
    reads = [lambda shard=shard: opened.read(shard) for shard in opened.shards]
    found: list[Sample] = list(mix_sources(reads, 2, 8, (0,)))
    assert {sample.record.key for sample in found} == {
        record.key for shard in opened.shards for record in shard.records()
    }
    assert all(sample.image for sample in found)
