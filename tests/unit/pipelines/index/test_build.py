import json
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from hhnet import hamming_knn
from pipelines.artifacts.commit import list_versions, publish_version
from pipelines.artifacts.manifest import Artifact, open_artifact
from pipelines.config.settings import Config, IndexSettings
from pipelines.encode.codes import open_codes
from pipelines.errors import DamagedArtifact, FingerprintMismatch, InputError, WorkFailed
from pipelines.index import parts
from pipelines.index.build import build_index, list_sources
from pipelines.index.gate import tie_aware_recall
from pipelines.index.kinds.flat import FlatKind
from pipelines.index.layout import index_id
from pipelines.index.reader import open_index
from pipelines.index.update import add_codes
from pipelines.storage import Store
from tests.support.codes import Rows, class_codes, random_codes, simple_rows, write_codes
from tests.support.inline import InlinePool

FLAT = Config(index=IndexSettings(workers=1, part_codes=1))
IVF = Config(index=IndexSettings(kind="ivf", nlist=8, nprobe=4, workers=1, part_codes=1))
HNSW = Config(index=IndexSettings(kind="hnsw", workers=1, part_codes=1))


def some_codes(root, name="codes", shards=3, count=40, **options):
    contents = {f"{name}-{n:06d}.tar": simple_rows(f"{name}/{n}", count, seed=n) for n in range(shards)}
    return write_codes(root / name, contents, **options).uri


def test_a_published_index_finds_every_code_by_its_id_and_key(tmp_path, pool):
    rows = Rows(["a", "b", "c"], random_codes(3), [[0], [], [1, 2]], row=[0, 4, 7])  # 1-3, 5, 6 were rejects
    uri = write_codes(tmp_path / "codes", {"x-000000.tar": simple_rows("x", 5), "x-000001.tar": rows}).uri
    result = build_index([uri], str(tmp_path / "index"), FLAT, pool=pool).as_json()

    assert (result["verb"], result["status"], result["version"], result["kind"]) == ("index build", "done", 1, "flat")
    assert result["card"]["count"] == 8 and result["card"]["recall"] == 1.0
    with open_index(result["uri"]) as reader:
        distances, ids = reader.search(rows.codes, 1)
        assert ids[:, 0].tolist() == [1 << 32 | 0, 1 << 32 | 4, 1 << 32 | 7] and not distances.any()
        items = reader.items(ids.ravel().tolist())
    assert [item.key for item in items.values()] == ["a", "b", "c"]
    assert [item.labels for item in items.values()] == [("cat",), (), ("dog", "owl")]
    assert {(item.shard, item.row) for item in items.values()} == {("x-000001.tar", n) for n in (0, 4, 7)}


@pytest.mark.parametrize("threads", [True, False])
@pytest.mark.parametrize("kind", ["flat", "multihash"])
def test_parts_together_answer_like_one_scan(tmp_path, pool, kind, threads):
    rows = [simple_rows(f"x/{n}", 7 + 60 * (n % 3), 16, seed=n, flip=0.3) for n in range(7)]
    uri = write_codes(tmp_path / "codes", {f"x-{n:06d}.tar": part for n, part in enumerate(rows)}, 16).uri
    built = build_index(
        [uri], str(tmp_path / "index"), Config(index=IndexSettings(kind=kind, workers=1, part_codes=100)), pool=pool
    ).as_json()["uri"]
    codes = np.concatenate([part.codes for part in rows])
    ids = np.concatenate([index_id(n, np.arange(len(part.codes))) for n, part in enumerate(rows)])
    queries = random_codes(1500 if threads else 9, 16, seed=5)  # the many are work enough to be shared out
    with open_index(built) as reader:
        for k in (1, 10, 100, 9999):
            distances, places = hamming_knn(queries, codes, k)
            found = reader.search(queries, k)
            np.testing.assert_array_equal(found[0], distances)
            np.testing.assert_array_equal(found[1], ids[places])
            np.testing.assert_array_equal(reader.search(queries[:1], k)[1], ids[places[:1]])
        backwards = reader.search(queries, 10, reader.searched()[::-1])
        np.testing.assert_array_equal(backwards[1], reader.search(queries, 10)[1])
        assert reader.search(queries, 10, [])[1].shape == (len(queries), 0)


def test_a_part_is_fetched_once_by_however_many_threads(tmp_path, pool, monkeypatch):
    """From a store of objects it is a copy, and to copy it again cuts a file that others have mapped."""
    built = build_index([some_codes(tmp_path)], str(tmp_path / "index"), FLAT, pool=pool).uri
    fetched, fetch = [], Artifact.fetch

    def slow(self, part, folder):
        fetched.append(part.name)
        time.sleep(0.05)
        return fetch(self, part, folder)

    monkeypatch.setattr(Artifact, "fetch", slow)
    with open_index(built) as reader, ThreadPoolExecutor(4) as callers:
        answers = list(callers.map(lambda _: reader.search(random_codes(3), 5)[1], range(4)))
        with pytest.raises(ValueError, match="k must be at least 1: got 0"):
            reader.search(random_codes(3), 0)
    assert sorted(fetched) == [f"part-{n:06d}.safetensors" for n in range(3)]
    for found in answers:
        np.testing.assert_array_equal(found, answers[0])


def test_artifacts_whose_tars_share_a_name_are_indexed_side_by_side(tmp_path, pool):
    first = write_codes(tmp_path / "one", {"shard-000000.tar": simple_rows("one", 10)}).uri
    second = write_codes(tmp_path / "two", {"shard-000000.tar": simple_rows("two", 12, seed=9)}).uri
    result = build_index([first, second], str(tmp_path / "index"), FLAT, pool=pool).as_json()
    with open_index(result["uri"]) as reader:
        assert reader.count == 22
        assert sorted(reader.all_keys())[::21] == ["one/00000", "two/00011"]
    names = {part.name for part in open_artifact(result["uri"]).manifest.parts}
    assert names == {"ordinals.parquet"} | {
        f"{kind}-00000{n}.{end}" for n in (0, 1) for kind, end in (("part", "safetensors"), ("keys", "parquet"))
    }


@pytest.mark.parametrize("config", [FLAT, IVF, HNSW])
def test_bytes_do_not_depend_on_the_order_of_the_work(tmp_path, pool, config):
    uri = some_codes(tmp_path, shards=4)
    forward = build_index([uri], str(tmp_path / "forward"), config, pool=pool).as_json()
    pool.reverse = True
    backward = build_index([uri], str(tmp_path / "backward"), config, pool=pool).as_json()
    assert forward["digest"] == backward["digest"]


def test_a_second_run_does_nothing(tmp_path, pool):
    uri = some_codes(tmp_path)
    first = build_index([uri], str(tmp_path / "index"), FLAT, pool=pool).as_json()
    pool.done.clear()
    second = build_index([uri], str(tmp_path / "index"), FLAT, pool=pool).as_json()
    assert (second["status"], second["digest"], pool.done) == ("unchanged", first["digest"], [])


@pytest.mark.parametrize("config", [FLAT, IVF, HNSW])
def test_a_broken_off_build_redoes_only_what_is_missing(tmp_path, pool, config):
    uri = some_codes(tmp_path, shards=4)
    whole = build_index([uri], str(tmp_path / "whole"), config, pool=pool).as_json()
    pool.done.clear()

    pool.fatal = lambda task: task.number == 2
    with pytest.raises(WorkFailed, match="run again to resume"):
        build_index([uri], str(tmp_path / "broken"), config, pool=pool)
    assert [task.number for task in pool.done] == [0, 1]
    with pytest.raises(InputError, match="no committed index"), open_index(str(tmp_path / "broken")):
        pass

    pool.fatal = lambda task: False
    resumed = build_index([uri], str(tmp_path / "broken"), config, pool=pool).as_json()
    assert [task.number for task in pool.done] == [0, 1, 2, 3]
    assert resumed["digest"] == whole["digest"]


def test_other_settings_in_the_same_place_are_refused(tmp_path, pool):
    uri = some_codes(tmp_path)
    build_index([uri], str(tmp_path / "index"), FLAT, pool=pool)
    with pytest.raises(FingerprintMismatch, match="choose another --out"):
        build_index([uri], str(tmp_path / "index"), IVF, pool=pool)


@pytest.mark.parametrize(
    "other, complaint",
    [
        ({"bits": 32}, "has bits 64, .*/other has bits 32"),
        ({"model": "c" * 64}, "has model aaaaaaaaaaaa, .*/other has model cccccccccccc"),
    ],
)
def test_codes_that_do_not_belong_together_are_refused_naming_both(tmp_path, pool, other, complaint):
    first = some_codes(tmp_path)
    contents = {"other-000000.tar": simple_rows("other", 5, bits=other.get("bits", 64))}
    second = write_codes(tmp_path / "other", contents, **other).uri
    with pytest.raises(FingerprintMismatch, match=f"{tmp_path}/codes {complaint}"):
        build_index([first, second], str(tmp_path / "index"), FLAT, pool=pool)
    assert not (tmp_path / "index").exists()


def test_codes_of_the_same_tar_twice_are_refused(tmp_path, pool):
    first = some_codes(tmp_path)
    copy = simple_rows("copy", 5)
    copy.sha256 = open_codes(first).shards[1].sha256
    second = write_codes(tmp_path / "copy", {"copy-000000.tar": copy}).uri
    for pair in ([first, first], [first, second]):
        with pytest.raises(InputError, match="codes of the same tar: name it once"):
            build_index(pair, str(tmp_path / "index"), FLAT, pool=pool)


def test_a_tar_without_codes_keeps_its_ordinal_and_has_no_part(tmp_path, pool):
    empty = Rows([], np.empty((0, 8), np.uint8), [])
    contents = {"x-000000.tar": empty, "x-000001.tar": simple_rows("x", 6)}
    result = build_index(
        [write_codes(tmp_path / "codes", contents).uri], str(tmp_path / "index"), FLAT, pool=pool
    ).as_json()
    with open_index(result["uri"]) as reader:
        assert [(shard.ordinal, shard.rows) for shard in reader.shards.values()] == [(0, 0), (1, 6)]
        _, ids = reader.search(random_codes(1), 9)
        assert set((ids >> 32).ravel().tolist()) == {1} and ids.shape == (1, 6)


def test_nothing_to_index_is_an_input_error(tmp_path, pool):
    uri = write_codes(tmp_path / "codes", {"x-000000.tar": Rows([], np.empty((0, 8), np.uint8), [])}).uri
    with pytest.raises(InputError, match="no codes to index"):
        build_index([uri], str(tmp_path / "index"), FLAT, pool=pool)
    with pytest.raises(InputError, match="at least one"):
        build_index([], str(tmp_path / "index"), FLAT, pool=pool)


def test_ivf_parts_share_one_quantizer_and_the_card_tells_the_recall(tmp_path, pool):
    uri = some_codes(tmp_path, shards=4, count=100)
    result = build_index([uri], str(tmp_path / "index"), IVF, pool=pool).as_json()
    artifact = open_artifact(result["uri"], "index")
    quantizer = artifact.manifest.part("quantizer.faiss").sha256
    receipts = [json.loads(reference.data) for reference in artifact.manifest.receipts]
    assert artifact.manifest.meta["quantizer_sha256"] == quantizer
    assert {r["quantizer_sha256"] for r in receipts if "number" in r} == {quantizer}
    assert result["card"]["self_recall"] == 1.0 and 0.5 < result["card"]["recall"] <= 1.0
    assert artifact.manifest.meta["parameters"] == {"nlist": 8, "nprobe": 4}

    everything = IVF.model_copy(update={"index": IVF.index.model_copy(update={"nprobe": 8})})
    full = build_index([uri], str(tmp_path / "full"), everything, pool=pool).as_json()
    assert full["card"]["recall"] == 1.0 > build_one_probe(tmp_path, uri)["card"]["recall"]


def build_one_probe(tmp_path, uri):
    config = IVF.model_copy(update={"index": IVF.index.model_copy(update={"nprobe": 1})})
    return build_index([uri], str(tmp_path / "one"), config, pool=InlinePool()).as_json()


def test_recall_counts_equal_distances_and_not_equal_ids():
    exact = np.array([[0, 2, 2], [1, 1, 4]])
    assert tie_aware_recall(np.array([[0, 2, 2], [1, 1, 4]]), exact) == 1.0
    assert tie_aware_recall(np.array([[0, 2, 3], [1, 4, 5]]), exact) == pytest.approx(4 / 6)


def test_an_index_that_loses_its_codes_is_not_published(tmp_path, pool, monkeypatch):
    build = FlatKind.build
    monkeypatch.setattr(FlatKind, "build", lambda self, codes, *rest: build(self, codes ^ 255, *rest))
    uri = some_codes(tmp_path)
    with pytest.raises(WorkFailed, match=r"not published: self_recall 0 is below 1; .*\d answers are not"):
        build_index([uri], str(tmp_path / "index"), FLAT, pool=pool)
    assert list_versions(Store(tmp_path / "index")) == []


def test_many_equal_codes_pass_the_gate(tmp_path, pool):
    rows = Rows([f"k{n}" for n in range(60)], np.zeros((60, 8), np.uint8), [[0]] * 60)
    uri = write_codes(tmp_path / "codes", {"x-000000.tar": rows}).uri
    assert build_index([uri], str(tmp_path / "index"), FLAT, pool=pool).version == 1


def test_an_unpublished_index_is_not_searched_until_it_is_published(tmp_path, pool):
    uri = some_codes(tmp_path)
    hidden = build_index([uri], str(tmp_path / "index"), FLAT, publish=False, pool=pool).as_json()
    assert (hidden["status"], hidden["version"]) == ("done", None)
    with pytest.raises(InputError, match="never published"), open_index(hidden["uri"]):
        pass
    shown = build_index([uri], str(tmp_path / "index"), FLAT, pool=pool).as_json()
    assert (shown["status"], shown["version"], shown["digest"]) == ("done", 1, hidden["digest"])
    with open_index(shown["uri"]) as reader:
        assert reader.version == 1


def test_the_highest_version_is_current_and_an_unknown_one_is_refused(tmp_path, pool):
    result = build_index([some_codes(tmp_path)], str(tmp_path / "index"), FLAT, pool=pool).as_json()
    publish_version(Store(result["uri"]), 2, "manifest.json", result["digest"])
    with open_index(result["uri"]) as reader:
        assert reader.version == 2
    with open_index(result["uri"], 1) as reader:
        assert reader.version == 1
    with (
        pytest.raises(InputError, match="no version 7, it is not there: name one of its versions 1, 2"),
        open_index(result["uri"], 7),
    ):
        pass
    publish_version(Store(result["uri"]), 3, "manifest.json", "0" * 64)
    with pytest.raises(DamagedArtifact, match="names manifest 000000000000"), open_index(result["uri"]):
        pass


@pytest.mark.parametrize("config", [FLAT, IVF, HNSW])
@pytest.mark.parametrize("name", ["part-000001", "keys-000001"])
def test_an_altered_part_is_found_before_it_is_parsed(tmp_path, pool, config, name):
    result = build_index([some_codes(tmp_path)], str(tmp_path / "index"), config, pool=pool).as_json()
    (path,) = (tmp_path / "index" / "parts").glob(f"{name}-*")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    with open_index(result["uri"]) as reader, pytest.raises(DamagedArtifact, match="does not match the digest"):
        _, ids = reader.search(class_codes([0, 1, 2]), 120)
        reader.items(ids.ravel().tolist())


@pytest.mark.parametrize("config", [FLAT, IVF, HNSW])
@pytest.mark.parametrize("name", ["part-000001", "keys-000001"])
def test_a_part_that_is_missing_is_named(tmp_path, pool, config, name):
    result = build_index([some_codes(tmp_path)], str(tmp_path / "index"), config, pool=pool).as_json()
    (path,) = (tmp_path / "index" / "parts").glob(f"{name}-*")
    path.unlink()
    with open_index(result["uri"]) as reader, pytest.raises(DamagedArtifact, match=f"{name}-.* is missing"):
        _, ids = reader.search(class_codes([0, 1, 2]), 120)
        reader.items(ids.ravel().tolist())


def test_a_version_that_lacks_parts_of_other_codes_is_not_rebuilt_from_these(tmp_path, pool):
    uri = some_codes(tmp_path)
    index = build_index([uri], str(tmp_path / "index"), FLAT, pool=pool).uri
    add_codes(index, [some_codes(tmp_path, "more", shards=1)], FLAT, pool=pool)
    (tmp_path / "index/parts" / next((tmp_path / "index/parts").glob("part-000000-*")).name).unlink()
    restored = build_index([uri], index, FLAT, pool=pool).as_json()
    assert (restored["status"], restored["version"], restored["card"]["count"]) == ("done", 2, 160)
    next((tmp_path / "index/parts").glob("part-000003-*")).unlink()
    with pytest.raises(DamagedArtifact, match=r"version 2 lacks parts .*: roll back to a whole version"):
        build_index([uri], index, FLAT, pool=pool)


def test_rows_out_of_order_are_refused(tmp_path, pool):
    rows = Rows(["a", "b"], random_codes(2), [[0], [0]], row=[3, 1])
    uri = write_codes(tmp_path / "codes", {"x-000000.tar": rows}).uri
    with pytest.raises(DamagedArtifact, match="rows do not ascend"):
        build_index([uri], str(tmp_path / "index"), FLAT, pool=pool)


def test_a_sample_takes_from_each_shard_its_share(tmp_path):
    contents = {"x-000000.tar": simple_rows("x", 90), "x-000001.tar": simple_rows("y", 10)}
    sources = list_sources([open_codes(write_codes(tmp_path / "c", contents).uri)])
    drawn = parts.sample_rows(sources, 20, seed=0)
    assert [len(set(rows.tolist())) for _, rows in drawn] == [18, 2]
    assert all((rows < source.rows).all() for source, rows in drawn)
    np.testing.assert_array_equal(drawn[0][1], parts.sample_rows(sources, 20, seed=0)[0][1])
    assert (drawn[0][1] != parts.sample_rows(sources, 20, seed=1)[0][1]).any()
    assert sum(len(rows) for _, rows in parts.sample_rows(sources, 10_000, seed=0)) == 100
