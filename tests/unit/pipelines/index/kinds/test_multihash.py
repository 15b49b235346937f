import numpy as np
import pytest
from safetensors.numpy import load, save

from hhnet import hamming_knn, hamming_range
from hhnet.search.multi_index import ScanCosts
from pipelines.config.settings import IndexSettings
from pipelines.errors import DamagedArtifact
from pipelines.index.kinds import NOTHING_REMOVED
from pipelines.index.kinds.multihash import MihKind
from tests.support.codes import class_codes, random_codes

KIND = MihKind()
IDS = (5 << 32) + np.arange(2000, dtype=np.int64) * 3


@pytest.fixture(params=[ScanCosts(compare=1e18, least=0), ScanCosts()], ids=["buckets", "scan"])
def kind(request):
    """Parts this small are scanned: also without that."""
    return MihKind(request.param)


def part(tmp_path, codes):
    path = tmp_path / "part.safetensors"
    path.write_bytes(KIND.build(codes, IDS[: len(codes)], None, {}))
    return path


def clustered(bits, seed=0, count=2000):
    return class_codes([number % 20 for number in range(count)], bits, flip=0.1, seed=seed)


@pytest.mark.parametrize("bits", [12, 16, 48, 64, 72, 128])
def test_searches_are_those_of_a_scan(tmp_path, bits, kind):
    codes, queries = clustered(bits), clustered(bits, seed=1)[:30]
    searcher = kind.open(part(tmp_path, codes), codes.shape[1], 2000, None, {}, NOTHING_REMOVED)
    for k in (1, 7, 3000) if bits < 64 else (1, 7):
        distances, ids = searcher.search(queries, k)
        expected = hamming_knn(queries, codes, k)
        np.testing.assert_array_equal(distances, expected[0])
        np.testing.assert_array_equal(ids, IDS[expected[1]])
        assert (distances.dtype, ids.dtype) == (np.int32, np.int64)
    offsets, distances, ids = searcher.range_search(queries, 5)
    expected = hamming_range(queries, codes, 5)
    np.testing.assert_array_equal(offsets, expected[0])
    np.testing.assert_array_equal(ids, IDS[expected[1]])
    np.testing.assert_array_equal(distances, expected[2])


def test_what_was_removed_is_not_found(tmp_path, kind):
    codes = clustered(16)
    searcher = kind.open(part(tmp_path, codes), 2, 2000, None, {}, IDS[::3])
    kept = np.delete(np.arange(2000), np.s_[::3])
    assert searcher.count == len(kept)
    distances, rows = hamming_knn(codes[:9], codes[kept], 40)
    found = searcher.search(codes[:9], 40)
    np.testing.assert_array_equal(found[0], distances)
    np.testing.assert_array_equal(found[1], IDS[kept[rows]])
    assert searcher.search(codes[:9], 9999)[1].shape == (9, len(kept))
    offsets, _, ids = searcher.range_search(codes[:9], 16)
    assert offsets[1] == len(kept) and not set(ids.tolist()) & set(IDS[::3].tolist())
    nothing = kind.open(part(tmp_path, codes), 2, 2000, None, {}, IDS)
    assert nothing.count == 0 and nothing.search(codes[:9], 4)[0].shape == (9, 0)
    assert nothing.range_search(codes[:9], 4)[0].tolist() == [0] * 10


def test_a_part_is_mapped_plain_and_reproducible(tmp_path, kind):
    codes = clustered(72)
    path = part(tmp_path, codes)
    searcher = kind.open(path, 9, 2000, None, {}, NOTHING_REMOVED)
    for array in (searcher.table.codes, searcher.table.starts, searcher.table.rows, searcher.ids):
        assert isinstance(array, np.memmap)
    assert searcher.table.codes.ctypes.data % 8 == 0, "words that are not aligned would be copied by every search"
    tensors = load(path.read_bytes())
    np.testing.assert_array_equal(tensors["codes"].view(np.uint8)[:, :9], codes)
    np.testing.assert_array_equal(tensors["ids"], IDS)
    assert kind.build(codes, IDS, None, {}) == path.read_bytes()


@pytest.mark.parametrize("rows, width", [(1999, 8), (2001, 8), (2000, 9), (2000, 16)])
def test_a_part_of_another_shape_is_refused(tmp_path, rows, width, kind):
    with pytest.raises(DamagedArtifact, match="expected"):
        kind.open(part(tmp_path, clustered(64)), width, rows, None, {}, NOTHING_REMOVED)


def test_tables_of_other_shapes_are_refused(tmp_path, kind):
    tensors = load(part(tmp_path, clustered(64)).read_bytes())
    path = tmp_path / "other"
    for name, value in (
        ("starts", tensors["starts"][:-1]),
        ("starts", tensors["starts"].astype(np.int32)),
        ("rows", np.ascontiguousarray(tensors["rows"][:2])),
        ("rows", np.ascontiguousarray(tensors["rows"][:, :-1])),
        ("rows", np.zeros((0, 2000), np.uint32)),
        ("rows", np.zeros((65, 2000), np.uint32)),
    ):
        path.write_bytes(save({**tensors, name: value}))
        with pytest.raises(DamagedArtifact, match="other"):
            kind.open(path, 8, 2000, None, {}, NOTHING_REMOVED)
    path.write_bytes(save({name: value for name, value in tensors.items() if name != "rows"}))
    with pytest.raises(DamagedArtifact, match="with a tensor rows"):
        kind.open(path, 8, 2000, None, {}, NOTHING_REMOVED)


def test_tables_that_point_outside_are_damage_and_no_crash(tmp_path, kind):
    codes = clustered(64)
    tensors = load(part(tmp_path, codes).read_bytes())
    path = tmp_path / "other"
    path.write_bytes(save({**tensors, "rows": np.full_like(tensors["rows"], 1 << 31)}))
    searcher = kind.open(path, 8, 2000, None, {}, NOTHING_REMOVED)
    if kind.costs == ScanCosts():
        np.testing.assert_array_equal(searcher.search(codes[:5], 9)[0], hamming_knn(codes[:5], codes, 9)[0])
        return
    with pytest.raises(DamagedArtifact, match="other: the tables point outside the codes"):
        searcher.search(codes[:5], 9)
    with pytest.raises(DamagedArtifact, match="other: the tables point outside the codes"):
        searcher.range_search(codes[:5], 9)


def test_there_is_nothing_to_set(tmp_path, kind):
    assert kind.parameters(IndexSettings(nlist=9), 50) == {} and kind.sample_size({}) == 0 and kind.exact
    one = random_codes(1)
    assert kind.open(part(tmp_path, one), 8, 1, None, {}, NOTHING_REMOVED).search(one, 3)[1].tolist() == [[IDS[0]]]
