import faiss
import numpy as np
import pytest

from hhnet import hamming_knn, hamming_range
from pipelines.config.settings import IndexSettings
from pipelines.errors import ConfigError, DamagedArtifact
from pipelines.index.kinds import NO_DISTANCE, NO_ID, NOTHING_REMOVED
from pipelines.index.kinds.ivf import IvfKind
from tests.support.codes import class_codes, random_codes

KIND = IvfKind()
CODES = class_codes([number % 20 for number in range(2000)], flip=0.1)
IDS = (2 << 32) + np.arange(2000, dtype=np.int64)
PARAMETERS = {"nlist": 20, "nprobe": 4}


@pytest.fixture(scope="module")
def shared():
    return KIND.train(CODES[: KIND.sample_size(PARAMETERS)], PARAMETERS, seed=0)


def part(tmp_path, shared):
    path = tmp_path / "part.faiss"
    path.write_bytes(KIND.build(CODES, IDS, shared, PARAMETERS))
    return path


def test_with_every_list_probed_the_distances_are_exact(tmp_path, shared):
    queries = random_codes(20, seed=3)
    searcher = KIND.open(part(tmp_path, shared), 8, 2000, shared, {"nlist": 20, "nprobe": 20}, NOTHING_REMOVED)
    distances, ids = searcher.search(queries, 15)
    np.testing.assert_array_equal(distances, hamming_knn(queries, CODES, 15)[0])
    real = np.unpackbits(queries[:, None] ^ CODES[ids - IDS[0]], axis=2).sum(2)
    np.testing.assert_array_equal(distances, real)


def test_neighbours_are_ordered_by_distance_then_id(tmp_path, shared):
    searcher = KIND.open(part(tmp_path, shared), 8, 2000, shared, PARAMETERS, NOTHING_REMOVED)
    distances, ids = searcher.search(CODES[:50], 30)
    steps = np.diff(distances, axis=1)
    assert (steps >= 0).all() and (np.diff(ids, axis=1)[steps == 0] > 0).all() and (steps == 0).any()


@pytest.mark.parametrize("radius", [0, 3, 20])
def test_range_search_with_every_list_probed_is_exact(tmp_path, shared, radius):
    queries = np.concatenate([CODES[:5], random_codes(5, seed=3)])
    searcher = KIND.open(part(tmp_path, shared), 8, 2000, shared, {"nlist": 20, "nprobe": 20}, NOTHING_REMOVED)
    offsets, distances, ids = searcher.range_search(queries, radius)
    expected = hamming_range(queries, CODES, radius)
    assert (offsets.dtype, distances.dtype, ids.dtype) == (np.int64, np.int32, np.int64)
    for found, wanted in zip((offsets, ids - IDS[0], distances), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_what_was_removed_is_not_found(tmp_path, shared):
    searcher = KIND.open(part(tmp_path, shared), 8, 2000, shared, {"nlist": 20, "nprobe": 20}, IDS[::4])
    assert searcher.count == 1500
    _, ids = searcher.search(CODES[:5], 2000)
    assert ids.shape == (5, 1500) and (np.sort(ids) == np.delete(IDS, np.s_[::4])).all()


def test_nprobe_is_what_decides_how_much_is_searched(tmp_path, shared):
    path = part(tmp_path, shared)
    found = []
    for nprobe in (1, 20):
        _, ids = KIND.open(path, 8, 2000, shared, {"nlist": 20, "nprobe": nprobe}, NOTHING_REMOVED).search(
            CODES[:1], 5000
        )
        found.append(int((ids != NO_ID).sum()))
    assert 0 < found[0] < found[1] == 2000


def test_places_without_a_neighbour_are_marked_and_last(tmp_path, shared):
    searcher = KIND.open(part(tmp_path, shared), 8, 2000, shared, {"nlist": 20, "nprobe": 1}, NOTHING_REMOVED)
    distances, ids = searcher.search(CODES[:3], 2000)
    lacking = ids == NO_ID
    assert lacking.any() and (distances[lacking] == NO_DISTANCE).all()
    assert (np.diff(lacking.astype(int), axis=1) >= 0).all()


def test_training_and_building_are_reproducible(shared):
    again = KIND.train(CODES[: KIND.sample_size(PARAMETERS)], PARAMETERS, seed=0)
    assert again == shared
    assert KIND.build(CODES, IDS, shared, PARAMETERS) == KIND.build(CODES, IDS, again, PARAMETERS)


def test_a_part_under_another_quantizer_is_refused(tmp_path, shared):
    other = KIND.train(CODES[:1280] ^ 255, PARAMETERS, seed=5)
    with pytest.raises(DamagedArtifact, match="another quantizer"):
        KIND.open(part(tmp_path, other), 8, 2000, shared, PARAMETERS, NOTHING_REMOVED)


def test_a_part_of_another_class_width_or_count_is_refused(tmp_path, shared):
    path = part(tmp_path, shared)
    with pytest.raises(DamagedArtifact, match="expected IndexBinaryIVF of 1999 codes of 64 bits"):
        KIND.open(path, 8, 1999, shared, PARAMETERS, NOTHING_REMOVED)
    with pytest.raises(DamagedArtifact, match="of 2000 codes of 128 bits"):
        KIND.open(path, 16, 2000, shared, PARAMETERS, NOTHING_REMOVED)
    flat = faiss.IndexBinaryFlat(64)
    flat.add(CODES)
    faiss.write_index_binary(flat, str(path))
    with pytest.raises(DamagedArtifact, match="holds IndexBinaryFlat"):
        KIND.open(path, 8, 2000, shared, PARAMETERS, NOTHING_REMOVED)
    path.write_bytes(b"no index at all")
    with pytest.raises(DamagedArtifact, match="not readable by Faiss"):
        KIND.open(path, 8, 2000, shared, PARAMETERS, NOTHING_REMOVED)


def test_unset_parameters_follow_the_number_of_codes():
    assert KIND.parameters(IndexSettings(), 10_000) == {"nlist": 100, "nprobe": 16}
    assert KIND.parameters(IndexSettings(), 9) == {"nlist": 3, "nprobe": 3}
    with pytest.raises(ConfigError, match="nlist = 50 is more than the number of codes, 9"):
        KIND.parameters(IndexSettings(nlist=50), 9)


@pytest.mark.parametrize("other", ["noise", "cut", "flat"])
def test_a_quantizer_that_faiss_refuses_is_damage(tmp_path, shared, other):
    flat = faiss.serialize_index_binary(faiss.IndexBinaryFlat(64)).tobytes()
    data = {"noise": b"cos\nsystem\n(S'true'\ntR.", "cut": shared[: len(shared) // 2], "flat": flat}[other]
    with pytest.raises(DamagedArtifact, match="quantizer is"):
        KIND.open(part(tmp_path, shared), 8, 2000, data, PARAMETERS, NOTHING_REMOVED)
    with pytest.raises(DamagedArtifact, match="quantizer is"):
        KIND.build(CODES, IDS, data, PARAMETERS)
