import faiss
import numpy as np
import pytest

from hhnet import hamming_knn, hamming_range
from pipelines.config.settings import IndexSettings
from pipelines.errors import DamagedArtifact
from pipelines.index.gate import tie_aware_recall
from pipelines.index.kinds import NO_ID, NOTHING_REMOVED
from pipelines.index.kinds.hnsw import HnswKind
from tests.support.codes import class_codes, random_codes

KIND = HnswKind()
CODES = class_codes([number % 20 for number in range(1500)], flip=0.2)
IDS = (2 << 32) + np.arange(1500, dtype=np.int64) * 3
PARAMETERS = {"m": 16, "ef_search": 64}
EVERYTHING = {"m": 16, "ef_search": 1500}


@pytest.fixture(scope="module")
def part(tmp_path_factory):
    path = tmp_path_factory.mktemp("hnsw") / "part.faiss"
    path.write_bytes(KIND.build(CODES, IDS, None, PARAMETERS))
    return path


def test_most_of_the_nearest_are_found_at_their_distances_under_their_ids(part):
    queries = np.concatenate([CODES[:40], random_codes(40, seed=3)])
    distances, ids = KIND.open(part, 8, 1500, None, PARAMETERS, NOTHING_REMOVED).search(queries, 10)
    assert (distances.dtype, ids.dtype) == (np.int32, np.int64)
    assert tie_aware_recall(distances, hamming_knn(queries, CODES, 10)[0]) > 0.97
    real = np.bitwise_count(queries[:, None] ^ CODES[(ids - IDS[0]) // 3]).sum(2)
    np.testing.assert_array_equal(distances, real)
    assert (ids[:40] == IDS[:40, None]).any(1).all()


def test_neighbours_are_ordered_by_distance_then_id(part):
    distances, ids = KIND.open(part, 8, 1500, None, PARAMETERS, NOTHING_REMOVED).search(CODES[:50], 30)
    steps = np.diff(distances, axis=1)
    assert (steps >= 0).all() and (np.diff(ids, axis=1)[steps == 0] > 0).all() and (steps == 0).any()


@pytest.mark.parametrize("radius", [0, 3, 20])
def test_range_search_is_exact(part, radius):
    queries = np.concatenate([CODES[:5], random_codes(5, seed=3)])
    offsets, distances, ids = KIND.open(part, 8, 1500, None, PARAMETERS, NOTHING_REMOVED).range_search(queries, radius)
    expected = hamming_range(queries, CODES, radius)
    assert (offsets.dtype, distances.dtype, ids.dtype) == (np.int64, np.int32, np.int64)
    for found, wanted in zip((offsets, (ids - IDS[0]) // 3, distances), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_k_is_cut_and_places_without_a_neighbour_are_marked_and_last(tmp_path, part):
    _, ids = KIND.open(part, 8, 1500, None, EVERYTHING, NOTHING_REMOVED).search(CODES[:3], 2000)
    assert ids.shape == (3, 1500) and set(ids[ids != NO_ID].tolist()) <= set(IDS.tolist())
    apart = np.repeat(np.array([[0] * 8, [255] * 8], np.uint8), 300, axis=0)  # two clusters of equals, unconnected
    path = tmp_path / "apart"
    path.write_bytes(KIND.build(apart, IDS[:600], None, PARAMETERS))
    distances, ids = KIND.open(path, 8, 600, None, PARAMETERS, NOTHING_REMOVED).search(apart[:1], 600)
    lacking = ids == NO_ID
    assert lacking.any() and (distances[lacking] == np.iinfo(np.int32).max).all()
    assert (np.diff(lacking.astype(int), axis=1) >= 0).all()


def test_what_was_removed_is_not_found(part):
    searcher = KIND.open(part, 8, 1500, None, EVERYTHING, IDS[::4])
    assert searcher.count == 1125
    _, ids = searcher.search(CODES[:8], 1125)
    assert ids.shape == (8, 1125) and not set(ids.ravel().tolist()) & set(IDS[::4].tolist())
    assert (ids != NO_ID).mean() > 0.99
    offsets, _, ids = searcher.range_search(CODES[:5], 64)
    assert offsets[1] == 1125 and not set(ids.tolist()) & set(IDS[::4].tolist())
    nothing = KIND.open(part, 8, 1500, None, PARAMETERS, IDS)
    assert nothing.count == 0 and nothing.search(CODES[:9], 4)[0].shape == (9, 0)


def test_a_wider_search_finds_no_less(part):
    queries = random_codes(60, seed=3)
    exact = hamming_knn(queries, CODES, 10)[0]
    recalls = [
        tie_aware_recall(
            KIND.open(part, 8, 1500, None, {"m": 16, "ef_search": ef}, NOTHING_REMOVED).search(queries, 10)[0], exact
        )
        for ef in (1, 1500)
    ]
    assert recalls[0] < recalls[1]


def test_building_is_reproducible_on_any_number_of_threads(part):
    threads = faiss.omp_get_max_threads()
    try:
        for number in (1, 2, 4):
            faiss.omp_set_num_threads(number)
            assert KIND.build(CODES, IDS, None, PARAMETERS) == part.read_bytes()
            assert faiss.omp_get_max_threads() == number
    finally:
        faiss.omp_set_num_threads(threads)


def test_a_part_of_another_class_width_or_count_is_refused(tmp_path, part):
    with pytest.raises(DamagedArtifact, match="holds 1500 codes of 64 bits with 1500 ids, expected 1499 of 64"):
        KIND.open(part, 8, 1499, None, PARAMETERS, NOTHING_REMOVED)
    with pytest.raises(DamagedArtifact, match="expected 1500 of 128"):
        KIND.open(part, 16, 1500, None, PARAMETERS, NOTHING_REMOVED)
    path = tmp_path / "other"
    bare, mapped_flat = faiss.IndexBinaryHNSW(64, 16), faiss.IndexBinaryIDMap(faiss.IndexBinaryFlat(64))
    bare.add(CODES)
    mapped_flat.add_with_ids(CODES, IDS)
    for index, name in ((bare, "IndexBinaryHNSW"), (mapped_flat, "IndexBinaryFlat")):
        faiss.write_index_binary(index, str(path))
        with pytest.raises(DamagedArtifact, match=f"holds {name}, expected IndexBinaryHNSW in IndexBinaryIDMap"):
            KIND.open(path, 8, 1500, None, PARAMETERS, NOTHING_REMOVED)
    for data in (b"no index at all", part.read_bytes()[:-100]):
        path.write_bytes(data)
        with pytest.raises(DamagedArtifact, match="not readable by Faiss"):
            KIND.open(path, 8, 1500, None, PARAMETERS, NOTHING_REMOVED)


def test_the_settings_are_its_parameters():
    assert KIND.parameters(IndexSettings(), 9) == {"m": 32, "ef_search": 64} and KIND.sample_size({}) == 0
    assert KIND.parameters(IndexSettings(m=8, ef_search=9), 9) == {"m": 8, "ef_search": 9} and not KIND.exact
