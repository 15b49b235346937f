"""What an epoch reads: every training sample once over all workers, and nothing that is held out."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from hhnet.augment import trivial_augment
from pipelines.config.loading import load_config
from pipelines.config.settings import Config
from pipelines.console import show_log
from pipelines.errors import InputError
from pipelines.ingest.ingest import ingest
from pipelines.shards.images import decode_image, decode_square
from pipelines.shards.shards import ShardSet, open_shards
from pipelines.train.batches import (
    DecodedCache,
    TrainData,
    epoch_batches,
    epoch_leg,
    least_side_of,
    preprocess_of,
    views_of,
)
from tests.support.pictures import jpeg, picture, png, write_folder, write_specimens

STRONG = ("data.policy=trivial", "train.mixup=0.4", "train.label_smoothing=0.1")
SETS = ("ingest.samples_per_shard=7", "data.image_size=32", "data.batch_size=8", "train.val_share=0.2")


def configure(*sets: str) -> Config:
    return load_config(sets=[*SETS, *sets])


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    folder = tmp_path_factory.mktemp("trainset")
    write_folder(folder / "photos", classes=3, per_class=15)
    ingest(str(folder / "photos"), str(folder / "shards"), configure())
    return open_shards(str(folder / "shards"))


def epoch_keys(
    data: TrainData, config: Config, epoch: int, world: int, first: int = 0, before: Sequence[Sequence[int]] = ()
) -> list[list[list[str]]]:
    """keys[rank][step]."""
    return [
        [list(batch.keys) for batch, _ in epoch_batches(epoch_leg(data, config, epoch, before, world), first, rank)]
        for rank in range(world)
    ]


def pixels_of(shards: ShardSet, key: str) -> npt.NDArray[np.uint8]:
    for shard in shards.shards:
        keys = shard.table()["key"].to_pylist()
        if key in keys:
            [sample] = shards.read(shard, [keys.index(key)])
            return decode_image(sample.image)
    raise KeyError(key)


def test_images_without_labels_teach_nothing(tmp_path: Path) -> None:
    write_folder(tmp_path / "photos", classes=2, per_class=4)
    names = sorted(str(path.relative_to(tmp_path)) for path in (tmp_path / "photos").rglob("*.*"))
    (tmp_path / "table.csv").write_text("\n".join(["path", *names]) + "\n")
    ingest(str(tmp_path / "table.csv"), str(tmp_path / "shards"), configure(), label_columns=[])
    with pytest.raises(InputError, match="shards: no image has a label to learn from"):
        TrainData.make(open_shards(str(tmp_path / "shards")), None, configure())


@pytest.mark.parametrize("world", [1, 2, 3])
def test_an_epoch_has_each_training_sample_once_over_all_workers(world: int, shards: ShardSet) -> None:
    config = configure()
    data = TrainData.make(shards, None, config)
    held = {shards.shards[s].table()["key"][row].as_py() for s, row in data.val_rows}
    everything = {key for shard in shards.shards for key in shard.table()["key"].to_pylist()}
    for epoch in range(2):
        ranks = epoch_keys(data, config, epoch, world)
        seen = [key for rank in ranks for step in rank for key in step]
        assert sorted(seen) == sorted(everything - held)
        assert {len(rank) for rank in ranks} == {-(-36 // 8)}
    assert len(held) == 9


def test_epochs_differ_and_a_position_resumes_exactly(shards: ShardSet) -> None:
    config = configure()
    data = TrainData.make(shards, None, config)
    first, second = epoch_keys(data, config, 0, 2), epoch_keys(data, config, 1, 2)
    assert first != second
    assert epoch_keys(data, config, 0, 2) == first
    assert epoch_keys(data, config, 0, 2, first=3) == [rank[3:] for rank in first]


def test_another_number_of_workers_takes_what_the_others_left(shards: ShardSet) -> None:
    config = configure()
    data = TrainData.make(shards, None, config)
    expected = sorted(key for rank in epoch_keys(data, config, 3, 2) for step in rank for key in step)
    for worlds in [(2, 1, 2), (1, 3, 1), (3, 2, 1)]:
        seen: list[str] = []
        before: list[tuple[int, int]] = []
        for world, steps in zip(worlds, (1, 2, 2), strict=True):
            ranks = epoch_keys(data, config, 3, world, before=before)
            assert {len(rank) for rank in ranks} == {5 - sum(taken for _, taken in before)}
            seen += [key for rank in ranks for step in rank[:steps] for key in step]
            before.append((world, steps))
        assert sorted(seen) == expected


@pytest.mark.parametrize("sets", [(), STRONG], ids=["plain", "strong"])
def test_batches_are_a_function_of_the_position_alone(sets: tuple[str, ...], shards: ShardSet) -> None:
    """Not of where a run began, nor of how many threads it has, nor of the generators of torch."""
    config, narrow = configure(*sets, "data.workers=4"), configure(*sets, "data.workers=1")
    data = TrainData.make(shards, None, config)
    whole = [batch for batch, _ in epoch_batches(epoch_leg(data, config, 5, (), 1), 0, 0)]
    torch.manual_seed(1)
    rest = [batch for batch, _ in epoch_batches(epoch_leg(data, narrow, 5, (), 1), 2, 0)]
    for mine, theirs in zip(rest, whole[2:], strict=True):
        assert np.array_equal(mine.squares, theirs.squares) and np.array_equal(mine.labels, theirs.labels)
    other = [batch for batch, _ in epoch_batches(epoch_leg(data, config, 6, (), 1), 0, 0)]
    assert not any(np.array_equal(mine.squares, theirs.squares) for mine, theirs in zip(other, whole, strict=True))


def test_the_policy_comes_after_the_crop_and_not_to_the_weak_view() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    [crop], [strong] = views_of(configure(), 1), views_of(configure("data.policy=trivial"), 1)
    weak, second = views_of(configure("data.policy=trivial"), 2)
    [plain_weak, _] = views_of(configure(), 2)
    changed = 0
    for seed in range(20):
        rngs = [np.random.default_rng(seed) for _ in range(5)]
        expected = trivial_augment(crop(pixels, rngs[0]), rngs[0])
        assert np.array_equal(strong(pixels, rngs[1]), expected) and np.array_equal(second(pixels, rngs[2]), expected)
        assert np.array_equal(weak(pixels, rngs[3]), plain_weak(pixels, rngs[4]))
        changed += not np.array_equal(expected, crop(pixels, np.random.default_rng(seed)))
    assert changed > 10


@pytest.mark.parametrize("kept", [0, 9, 45], ids=["nothing", "some", "all"])
def test_what_is_kept_decoded_changes_nothing(
    kept: int, shards: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not a batch; and where all is kept, the tars are read once."""
    config = configure("data.interleave=1")
    data = TrainData.make(shards, None, config)
    cache = DecodedCache(kept * pixels_of(shards, shards.shards[0].table()["key"][0].as_py()).nbytes)
    read: list[int] = []
    whole = ShardSet.read
    monkeypatch.setattr(ShardSet, "read", lambda self, shard, rows: read.append(len(rows)) or whole(self, shard, rows))
    for epoch in range(3):
        leg = epoch_leg(data, config, epoch, (), 1)
        for (mine, _), (plain, _) in zip(epoch_batches(leg, 0, 0, 1, cache), epoch_batches(leg, 0, 0), strict=True):
            assert mine.keys == plain.keys
            assert np.array_equal(mine.squares, plain.squares) and np.array_equal(mine.labels, plain.labels)
    assert (sum(read) == (1 + 3) * data.samples) == (kept == 45)


def test_labels_are_those_of_the_keys(shards: ShardSet) -> None:
    config = configure()
    data = TrainData.make(shards, None, config)
    for batch, bad in epoch_batches(epoch_leg(data, config, 0, (), 1), 0, 0):
        assert [shards.classes[row.argmax()] for row in batch.labels] == [key.split("/")[0] for key in batch.keys]
        assert bad == 0 and batch.labels.sum() == len(batch.keys)


def test_two_views_of_a_sample_stand_side_by_side(shards: ShardSet) -> None:
    """The first is the picture or its mirror image, the second what is configured, and neither depends on the place."""
    config = configure()
    data = TrainData.make(shards, None, config)
    [plain] = views_of(configure("data.augment=none"), 1)
    leg, strong = epoch_leg(data, config, 0, (), 1), 0
    one, two = list(epoch_batches(leg, 0, 0)), list(epoch_batches(leg, 0, 0, 2))
    for (batch, _), (pairs, _) in zip(one, two, strict=True):
        assert pairs.keys == [key for key in batch.keys for _ in range(2)]
        assert np.array_equal(pairs.labels, batch.labels.repeat(2, 0)) and len(pairs.squares) == len(pairs.keys)
        for key, weak, other in zip(batch.keys, pairs.squares[::2], pairs.squares[1::2], strict=True):
            picture = plain(pixels_of(shards, key), np.random.default_rng(0))
            assert any(np.array_equal(weak, each) for each in (picture, picture[:, ::-1]))
            strong += not any(np.array_equal(other, each) for each in (picture, picture[:, ::-1]))
    assert strong > 0.9 * data.samples
    assert np.array_equal(next(epoch_batches(leg, 2, 0, 2))[0].squares, two[2][0].squares)


def test_what_is_held_out_beyond_the_limit_is_not_trained_on_either(shards: ShardSet) -> None:
    data = TrainData.make(shards, None, configure("train.val_limit=4"))
    assert (data.samples, len(data.val_rows)) == (36, 4)


def test_a_validation_set_of_its_own_holds_nothing_back(shards: ShardSet) -> None:
    config = configure("train.val_limit=10")
    data = TrainData.make(shards, shards, config)
    assert (data.samples, len(data.val_rows), data.queries) == (45, 10, 2)


def test_what_does_not_decode_is_left_out_counted_and_logged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_folder(tmp_path / "photos", classes=2, per_class=15)
    write_specimens(tmp_path / "photos" / "class_00", readable=False)
    config = configure("ingest.samples_per_shard=1000")
    ingest(str(tmp_path / "photos"), str(tmp_path / "shards"), config, allow_degraded=True)
    bad_names = open_shards(str(tmp_path / "shards")).samples - 30
    data = TrainData.make(open_shards(str(tmp_path / "shards")), None, config)
    show_log("debug")
    try:
        batches = list(epoch_batches(epoch_leg(data, config, 0, (), 1), 0, 0))
    finally:
        show_log()
    named = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hhnet: left out: class_00/")]
    assert len(named) == len(set(named)) == sum(bad for _, bad in batches)
    assert bad_names > 0
    assert sum(len(batch.keys) + bad for batch, bad in batches) == data.samples
    assert 0 < sum(bad for _, bad in batches) <= bad_names


def test_a_single_class_has_nothing_to_tell_apart(tmp_path: Path) -> None:
    write_folder(tmp_path / "photos", classes=1, per_class=8)
    ingest(str(tmp_path / "photos"), str(tmp_path / "shards"), configure())
    with pytest.raises(InputError, match="all images are of the class class_00, so there is nothing to tell apart"):
        TrainData.make(open_shards(str(tmp_path / "shards")), None, configure())


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["train.workers=20"], "too few for 20 workers"),
        (
            ["train.val_share=0.01"],
            "leave . to validate on: validation needs a query and one sample to find, 2 at least; add images",
        ),
    ],
)
def test_too_little_data_is_said(sets: list[str], message: str, shards: ShardSet) -> None:
    with pytest.raises(InputError, match=message):
        TrainData.make(shards, None, configure(*sets))


@pytest.mark.parametrize("kind", ["flip", "crop_flip", "resized_crop", "none"])
def test_every_augmentation_gives_the_configured_square(kind: str) -> None:
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (40, 60, 3), dtype=np.uint8)
    [augment] = views_of(configure(f"data.augment={kind}"), 1)
    assert augment(pixels, random).shape == (32, 32, 3)


def test_a_flip_is_the_picture_or_its_mirror_image() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    [augment] = views_of(configure("data.augment=flip"), 1)
    found = {augment(pixels, np.random.default_rng(seed)).tobytes() for seed in range(20)}
    assert found == {pixels.tobytes(), pixels[:, ::-1].tobytes()}


# ----------------------------------------------------------------------------------------------------- data.decode


@pytest.mark.parametrize(
    ("sets", "least"),
    [
        (
            ["data.image_size=224"],
            1035,
        ),  # the smallest window is a quarter of the image, 4 to 3 long: 0.433 of its side
        (["data.image_size=224", "data.augment=flip"], 512),
        (["data.image_size=32"], 64),
        (["data.image_size=32", "data.augment=resized_crop"], 148),
        (["data.image_size=32", "data.resize=100", "data.augment=resized_crop"], 200),
        (["data.image_size=224", "data.decode=exact"], 0),
    ],
)
def test_a_jpeg_keeps_twice_what_its_views_are_resampled_from(sets: list[str], least: int) -> None:
    assert least_side_of(configure(*sets)) == least


def test_no_window_of_a_scaled_jpeg_is_enlarged_or_shrunk_by_less_than_two(monkeypatch: pytest.MonkeyPatch) -> None:
    config = configure("data.augment=resized_crop")
    least, seen = least_side_of(config), []
    monkeypatch.setattr("hhnet.augment.resample", lambda window, size: (seen.append(window.shape), window)[1])
    [augment] = views_of(config, 1)
    for height, width in ((least, least), (least, 3 * least), (2 * least, least)):
        for number in range(300):
            augment(np.zeros((height, width, 3), np.uint8), np.random.default_rng(number))
    shortest = min(min(shape[:2]) for shape in seen)
    assert 64 <= shortest < 70


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """Large JPEGs, and pictures that have one size however they are decoded."""
    folder = tmp_path_factory.mktemp("photos")
    for klass in range(2):
        (folder / "photos" / f"class_{klass}").mkdir(parents=True)
        for number in range(8):
            pixels = picture(klass, number, 300)
            files = {"large.jpg": jpeg(pixels), "wide.jpg": jpeg(pixels[:270]), "png.png": png(pixels[:, :90])}
            for name, data in files.items():
                (folder / "photos" / f"class_{klass}" / f"{number}_{name}").write_bytes(data)
    ingest(str(folder / "photos"), str(folder / "shards"), configure())
    return open_shards(str(folder / "shards"))


def test_training_sees_and_keeps_the_squares_that_encode_sees(photos: ShardSet) -> None:
    shown: dict[str, dict[str, npt.NDArray[np.uint8]]] = {}
    for decode in ("scaled", "exact"):
        config = configure("data.augment=none", "data.resize=40", f"data.decode={decode}")
        data, preprocess = TrainData.make(photos, photos, config), preprocess_of(config)
        cache = DecodedCache(data.samples * 32 * 32 * 3)
        batches = [batch for batch, _ in epoch_batches(epoch_leg(data, config, 0, (), 1), 0, 0, 1, cache)]
        shown[decode] = {
            key: square for batch in batches for key, square in zip(batch.keys, batch.squares, strict=True)
        }
        for shard in photos.shards:
            for sample in photos.read(shard, range(shard.rows)):
                square, _ = decode_square(sample.image, preprocess)
                np.testing.assert_array_equal(shown[decode][sample.record.key], square)
                held = cache.get(shard.name, sample.record.row)
                assert held is not None and np.array_equal(held.pixels, square)
    for key, square in shown["exact"].items():
        assert np.array_equal(square, shown["scaled"][key]) == key.endswith("png")


@pytest.mark.parametrize(("decode", "side"), [("scaled", 150), ("exact", 300)])
def test_where_views_are_random_windows_whole_images_are_kept(decode: str, side: int, photos: ShardSet) -> None:
    config = configure("data.augment=resized_crop", f"data.decode={decode}")
    data, cache = TrainData.make(photos, photos, config), DecodedCache(1 << 30)
    list(epoch_batches(epoch_leg(data, config, 0, (), 1), 0, 0, 1, cache))
    held = [cache.get(shard.name, row) for shard in photos.shards for row in range(shard.rows)]
    shapes = {sample.key.split("_")[-1]: sample.pixels.shape for sample in held if sample and sample.pixels is not None}
    assert shapes == {"large": (side, side, 3), "wide": (270, 300, 3), "png": (300, 90, 3)}
