import numpy as np
import pytest

from pipelines.errors import ConfigError, DamagedArtifact
from pipelines.index.kinds import NO_DISTANCE, NO_ID, NOTHING_REMOVED, index_kind
from pipelines.index.kinds.flat import FlatKind
from tests.support.codes import random_codes

KIND = FlatKind()


def brute_force(queries, codes, ids, k):
    distances = np.unpackbits(queries[:, None] ^ codes[None], axis=2).sum(2)
    order = np.lexsort((np.broadcast_to(ids, distances.shape), distances), axis=1)[:, :k]
    return np.take_along_axis(distances, order, 1), ids[order]


@pytest.mark.parametrize("bits", [12, 16, 64, 72, 256])
@pytest.mark.parametrize("k", [1, 7, 500])
def test_search_is_a_stable_brute_force(tmp_path, bits, k):
    codes, queries = random_codes(300, bits), random_codes(9, bits, seed=1)
    ids = (5 << 32) + np.arange(300, dtype=np.int64) * 3
    path = tmp_path / "part.safetensors"
    path.write_bytes(KIND.build(codes, ids, None, {}))

    searcher = KIND.open(path, codes.shape[1], 300, None, {}, NOTHING_REMOVED)
    distances, found = searcher.search(queries, k)

    expected = brute_force(queries, codes, ids, k)
    assert distances.dtype == np.int32 and found.dtype == np.int64
    np.testing.assert_array_equal(distances, expected[0])
    np.testing.assert_array_equal(found, expected[1])


def test_range_search_is_all_within_the_radius(tmp_path):
    codes, queries = random_codes(300, 16), random_codes(9, 16, seed=1)
    ids = (5 << 32) + np.arange(300, dtype=np.int64) * 3
    path = tmp_path / "part.safetensors"
    path.write_bytes(KIND.build(codes, ids, None, {}))
    offsets, distances, found = KIND.open(path, 2, 300, None, {}, NOTHING_REMOVED).range_search(queries, 4)
    every = brute_force(queries, codes, ids, 300)
    for q in range(9):
        near = every[0][q] <= 4
        np.testing.assert_array_equal(distances[offsets[q] : offsets[q + 1]], every[0][q][near])
        np.testing.assert_array_equal(found[offsets[q] : offsets[q + 1]], every[1][q][near])


def test_what_lies_beyond_the_radius_is_no_id(tmp_path):
    codes, queries = random_codes(300, 16), random_codes(3, 16, seed=1)
    ids = (5 << 32) + np.arange(300, dtype=np.int64) * 3
    path = tmp_path / "part.safetensors"
    path.write_bytes(KIND.build(codes, ids, None, {}))
    radius = np.array([3, 16, 0], np.int32)
    found = KIND.open(path, 2, 300, None, {}, NOTHING_REMOVED).search(queries, 40, radius)
    distances, expected = brute_force(queries, codes, ids, 40)
    beyond = distances > radius[:, None]
    assert beyond[0].any() and not beyond[0].all() and not beyond[1].any()
    np.testing.assert_array_equal(found[0], np.where(beyond, NO_DISTANCE, distances))
    np.testing.assert_array_equal(found[1], np.where(beyond, NO_ID, expected))


def test_what_was_removed_is_not_found(tmp_path):
    codes, ids = random_codes(300), (5 << 32) + np.arange(300, dtype=np.int64)
    path = tmp_path / "part.safetensors"
    path.write_bytes(KIND.build(codes, ids, None, {}))
    searcher = KIND.open(path, 8, 300, None, {}, ids[::3])
    assert searcher.count == 200
    kept = np.delete(np.arange(300), np.s_[::3])
    expected = brute_force(codes[:9], codes[kept], ids[kept], 300)
    np.testing.assert_array_equal(searcher.search(codes[:9], 300), expected)
    offsets, _, found = searcher.range_search(codes[:9], 64)
    assert offsets[1] == 200 and not set(found.tolist()) & set(ids[::3].tolist())


def test_a_part_is_mapped_and_not_read(tmp_path):
    path = tmp_path / "part.safetensors"
    path.write_bytes(KIND.build(random_codes(10), np.arange(10), None, {}))
    searcher = KIND.open(path, 8, 10, None, {}, NOTHING_REMOVED)
    assert isinstance(searcher.codes, np.memmap) and searcher.codes.ctypes.data % 8 == 0
    assert isinstance(searcher.ids, np.memmap)


def test_the_file_is_plain_safetensors(tmp_path):
    from safetensors.numpy import load

    codes = random_codes(10, 16)
    tensors = load(KIND.build(codes, np.arange(10), None, {}))
    np.testing.assert_array_equal(tensors["codes"], codes)
    np.testing.assert_array_equal(tensors["ids"], np.arange(10))


@pytest.mark.parametrize("rows, width", [(9, 8), (11, 8), (10, 4), (5, 16)])
def test_a_part_of_another_shape_is_refused(tmp_path, rows, width):
    path = tmp_path / "part.safetensors"
    path.write_bytes(KIND.build(random_codes(10), np.arange(10), None, {}))
    with pytest.raises(DamagedArtifact, match="expected"):
        KIND.open(path, width, rows, None, {}, NOTHING_REMOVED)


@pytest.mark.parametrize("cut", [0, 4, 8, 40, -1])
def test_a_cut_part_is_refused(tmp_path, cut):
    path = tmp_path / "part.safetensors"
    path.write_bytes(KIND.build(random_codes(10), np.arange(10), None, {})[:cut])
    with pytest.raises(DamagedArtifact):
        KIND.open(path, 8, 10, None, {}, NOTHING_REMOVED)


def test_an_unknown_kind_names_the_known_ones():
    with pytest.raises(ConfigError, match="'tree' is unknown: choose one of flat, hnsw, ivf, multihash"):
        index_kind("tree")
