"""Folders become shards: every byte as it was, the same twice, and what is refused."""

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset

from pipelines.artifacts.manifest import open_artifact
from pipelines.config.loading import load_config
from pipelines.config.settings import Config
from pipelines.errors import FingerprintMismatch, InputError, StoreUnavailable, WorkFailed
from pipelines.ingest import ingest as ingest_module
from pipelines.ingest import sources
from pipelines.ingest.ingest import ingest
from pipelines.ingest.samples import make_unique_keys, sample_key
from pipelines.shards.shards import open_shards
from pipelines.shards.tar import MAX_MEMBER_BYTES
from pipelines.verify.verify import verify
from tests.support import pictures
from tests.support.folders import SMALL, expected_images, images_of, tar_of, tree, zip_of
from tests.support.runs import run_record

# ------------------------------------------------------------------------------------------------------------ folder


def test_a_folder_becomes_shards_with_every_byte_as_it_was(folder: Path, tmp_path: Path) -> None:
    result = ingest(str(folder), str(tmp_path / "out"), SMALL).as_json()
    assert {name: result[name] for name in ("verb", "status", "uri", "samples", "skipped", "found")} == {
        **{"verb": "ingest", "status": "done", "uri": str(tmp_path / "out")},
        **{"samples": 24, "skipped": 0, "found": 24},
    }
    shards = open_shards(result["uri"])
    assert result["digest"] == shards.artifact.digest
    assert result["classes"] == list(shards.classes) == ["class_00", "class_01", "class_02"]
    assert [shard.name for shard in shards.shards] == [f"shard-00000{n}.tar" for n in range(3)]
    assert images_of(shards) == expected_images(folder)
    assert shards.artifact.manifest.totals == {"samples": 24, "skipped": 0, "found": 24}


def test_each_shard_mixes_the_classes(folder: Path, tmp_path: Path) -> None:
    ingest(str(folder), str(tmp_path / "out"), SMALL)
    shards = open_shards(str(tmp_path / "out"))
    assert all(len({record.labels for record in shard.records()}) == 3 for shard in shards.shards[:2])


def test_the_seed_changes_the_order_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        ingest(str(folder), str(tmp_path / str(seed)), load_config(sets=[f"ingest.seed={seed}"]))
    first, second = (open_shards(str(tmp_path / str(seed))) for seed in (0, 1))
    assert list(images_of(first)) != list(images_of(second))
    assert images_of(first) == images_of(second)
    assert first.artifact.manifest.fingerprint != second.artifact.manifest.fingerprint


def test_two_ingests_are_equal_to_the_byte(folder: Path, tmp_path: Path) -> None:
    ingest(str(folder), str(tmp_path / "a"), SMALL)
    ingest(str(folder), str(tmp_path / "b"), SMALL)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_the_stock_webdataset_library_reads_bytes_and_labels(folder: Path, tmp_path: Path) -> None:
    (folder / "class_00/0000.jpg").rename(folder / "class_00/0000.JPG")
    ingest(str(folder), str(tmp_path / "out"), SMALL)
    shards = open_shards(str(tmp_path / "out"))
    urls = [str(Path(shards.artifact.uri, shard.part.path)) for shard in shards.shards]
    found = {}
    for sample in webdataset.WebDataset(urls, shardshuffle=False):
        image = sample.get("jpg") or sample["png"]
        found[sample["__key__"]] = (image, [shards.classes[int(sample["cls"])]])
    assert found == expected_images(folder)


def test_a_rerun_finds_everything_done(folder: Path, tmp_path: Path) -> None:
    first = ingest(str(folder), str(tmp_path / "out"), SMALL).as_json()
    before = tree(tmp_path / "out")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    second = ingest(str(folder), str(tmp_path / "out"), SMALL).as_json()
    assert second["status"] == "unchanged"
    assert second["digest"] == first["digest"]
    assert tree(tmp_path / "out") == before
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == times


@pytest.mark.parametrize("change", ["add", "remove", "edit", "rename", "relabel", "seed"])
def test_a_changed_source_or_setting_is_refused_at_the_same_root(folder: Path, tmp_path: Path, change: str) -> None:
    ingest(str(folder), str(tmp_path / "out"), SMALL)
    before = tree(tmp_path / "out")
    victim = folder / "class_00/0000.jpg"
    match change:
        case "add":
            (folder / "class_00/new.jpg").write_bytes(victim.read_bytes())
        case "remove":
            victim.unlink()
        case "edit":
            victim.write_bytes(victim.read_bytes() + b"\0")
        case "rename":
            victim.rename(folder / "class_00/x.jpg")
        case "relabel":
            victim.rename(folder / "class_01/x.jpg")
    config = load_config(sets=["ingest.samples_per_shard=10", "ingest.seed=1"]) if change == "seed" else SMALL
    with pytest.raises(FingerprintMismatch):
        ingest(str(folder), str(tmp_path / "out"), config)
    assert tree(tmp_path / "out") == before


def test_an_ingest_that_was_cut_off_is_completed(folder: Path, tmp_path: Path) -> None:
    ingest(str(folder), str(tmp_path / "whole"), SMALL)
    ingest(str(folder), str(tmp_path / "cut"), SMALL)
    (tmp_path / "cut/manifest.json").unlink()
    next((tmp_path / "cut/parts").glob("shard-000001-*")).unlink()
    assert ingest(str(folder), str(tmp_path / "cut"), SMALL).status == "done"
    assert tree(tmp_path / "cut") == tree(tmp_path / "whole")


def test_a_source_that_changes_while_it_is_read_ends_the_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = ingest_module._fingerprint

    def meddle(*arguments: Any) -> Any:
        (folder / "class_01/0001.jpg").write_bytes(b"other")
        return real(*arguments)

    monkeypatch.setattr(ingest_module, "_fingerprint", meddle)
    with pytest.raises(WorkFailed, match=r"class_01/0001\.jpg changed"):
        ingest(str(folder), str(tmp_path / "out"), SMALL)
    assert not (tmp_path / "out/manifest.json").exists()


def test_only_decoding_judges_an_image(tmp_path: Path) -> None:
    names = pictures.write_specimens(tmp_path / "images/odd")
    result = ingest(str(tmp_path / "images"), str(tmp_path / "out"), Config(), allow_degraded=True).as_json()
    assert result["samples"] == len(names) - 1
    assert result["skipped_files"] == [{"path": "odd/empty.jpg", "reason": "empty"}]
    assert images_of(open_shards(result["uri"]))["odd/truncated"][0] == pictures.truncated_jpeg()


def test_what_is_no_sample_is_skipped_and_named(folder: Path, tmp_path: Path) -> None:
    (folder / "README.txt").write_text("x")
    (folder / "class_00/noext").write_text("x")
    (folder / "class_00/.jpg").write_text("x")
    (folder / "class_00/._0000.jpg").write_text("resource fork")
    os.mkfifo(folder / "class_00/pipe.jpg")
    (folder / "class_00/lost.jpg").symlink_to(folder / "nowhere.jpg")
    (folder / "class_00/linked.jpg").symlink_to(folder / "class_01/0000.jpg")
    result = ingest(str(folder), str(tmp_path / "out"), Config(), allow_degraded=True).as_json()
    assert {item["path"]: item["reason"] for item in result["skipped_files"]} == {
        "README.txt": "wrong_suffix",
        "class_00/noext": "wrong_suffix",
        "class_00/.jpg": "hidden",
        "class_00/._0000.jpg": "hidden",
        "class_00/pipe.jpg": "special",
        "class_00/lost.jpg": "link",
    }
    assert (result["samples"], result["skipped"], result["found"]) == (25, 6, 31)
    record = run_record(tmp_path / "out")
    assert record["skipped_files"] == result["skipped_files"]
    assert record["skipped_suffixes"] == result["skipped_suffixes"] == {"none": 1, ".txt": 1}
    assert record["skipped_reasons"] == result["skipped_reasons"]
    assert open_artifact(result["uri"]).manifest.totals == {"samples": 25, "skipped": 6, "found": 31}


def test_what_is_skipped_for_its_suffix_is_counted_by_suffix(folder: Path, tmp_path: Path) -> None:
    for number in range(3000):
        (folder / f"class_00/{number}.x{number}").touch()
    for name in ("a.ico", "b.ICO", "c.Ico", "d.jp2", "e"):
        (folder / "class_01" / name).touch()
    result = ingest(str(folder), str(tmp_path / "out"), Config()).as_json()
    counts = result["skipped_suffixes"]
    assert sum(counts.values()) == result["skipped"] == 3005
    assert len(counts) <= sources.SUFFIXES_COUNTED + 1 and max(counts, key=counts.__getitem__) == "others"


@pytest.mark.parametrize("kind", ["folder", "x.zip", "x.tar"])
def test_pictures_of_every_format_are_samples(tmp_path: Path, kind: str) -> None:
    names = [*("a.jfif", "b.jpe", "c.JPEG", "d.gif", "e.tif", "f.TIFF", "g.avif", "h.ppm", "i.pgm", "j.pbm", "k.pnm")]
    names += ["l.heic", "m.HEIF", "n.webp", "o.bmp"]
    (tmp_path / "images/cat").mkdir(parents=True)
    for name in [*names, "x.ico", "y.jp2"]:
        (tmp_path / "images/cat" / name).write_bytes(name.encode())
    make = zip_of if kind == "x.zip" else tar_of
    source = tmp_path / "images" if kind == "folder" else make(tmp_path / "images", tmp_path / kind)
    result = ingest(str(source), str(tmp_path / "out"), Config()).as_json()
    shards = open_shards(result["uri"])
    assert {record.path for record in shards.shards[0].records()} == {f"cat/{name}" for name in names}
    assert result["skipped_suffixes"] == {".ico": 1, ".jp2": 1}


def test_a_file_too_large_to_be_read_back_is_skipped(folder: Path, tmp_path: Path) -> None:
    (folder / "class_00/big.bmp").touch()
    os.truncate(folder / "class_00/big.bmp", MAX_MEMBER_BYTES + 1)
    result = ingest(str(folder), str(tmp_path / "out"), Config(), allow_degraded=True).as_json()
    assert result["skipped_files"] == [{"path": "class_00/big.bmp", "reason": "too_large"}]


@pytest.mark.parametrize(
    ("path", "key"),
    [
        ("cat/1.jpg", "cat/1"),
        ("a.b/c.d.jpg", "a%2Eb/c%2Ed"),
        ("100%/x%2E.png", "100%25/x%252E"),
        ("cat/a\nb.jpg", "cat/a%0Ab"),
        ("cat/ü ☃.jpg", "cat/ü ☃"),
        ("cat/\udcff.jpg", "cat/%FF"),
        ("__x__/1.jpg", "%5F_x__/1"),
    ],
)
def test_keys(path: str, key: str) -> None:
    assert sample_key(path) == key


STEMS = [
    (["cat/1.jpg", "cat/1.png", "cat/2.jpg"], ["cat/1%2Ejpg", "cat/1%2Epng", "cat/2"]),
    (["cat/1.jpg", "cat/1.JPG", "cat/1.jpeg"], ["cat/1%2Ejpg", "cat/1%2EJPG", "cat/1%2Ejpeg"]),
    (["cat/1.jpg", "dog/1.png"], ["cat/1", "dog/1"]),
    # A key that kept its suffix is the key of a third file, which then keeps its own, and so on.
    (["c/1.jpg", "c/1.png", "c/1.jpg.png"], ["c/1%2Ejpg", "c/1%2Epng", "c/1%2Ejpg%2Epng"]),
    (
        ["c/1.jpg", "c/1.png", "c/1.jpg.png", "c/1.jpg.png.bmp"],
        ["c/1%2Ejpg", "c/1%2Epng", "c/1%2Ejpg%2Epng", "c/1%2Ejpg%2Epng%2Ebmp"],
    ),
    (["c/1%2Ejpg.jpg", "c/1.jpg", "c/1.png"], ["c/1%252Ejpg", "c/1%2Ejpg", "c/1%2Epng"]),
    # One word in two Unicode forms: two names for the file system, and two keys.
    (["c/\u00fc.jpg", "c/u\u0308.png"], ["c/\u00fc", "c/u\u0308"]),
]


@pytest.mark.parametrize(("paths", "keys"), STEMS)
def test_files_of_one_stem_keep_their_suffixes_in_their_keys(paths: list[str], keys: list[str]) -> None:
    assert make_unique_keys(paths, "here") == keys
    assert make_unique_keys(paths[::-1], "here") == keys[::-1]


@pytest.mark.parametrize("kind", ["folder", "x.zip", "x.tar", "x.csv"])
def test_two_files_of_one_stem_are_two_samples(folder: Path, tmp_path: Path, kind: str) -> None:
    (folder / "class_00/0000.png").write_bytes((folder / "class_00/0003.png").read_bytes())
    source = folder
    if kind == "x.csv":
        source = folder / kind
        names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*g"))
        source.write_text("path,label\n" + "".join(f"{name},{name[:8]}\n" for name in names))
    elif kind != "folder":
        source = (zip_of if kind == "x.zip" else tar_of)(folder, tmp_path / kind)
    result = ingest(str(source), str(tmp_path / "out"), SMALL).as_json()
    assert (result["samples"], result["skipped"]) == (25, 0)
    shards = open_shards(result["uri"])
    found = {sample.record.key: sample for shard in shards.shards for sample in shards.read(shard)}
    for suffix in ("jpg", "png"):
        sample = found[f"class_00/0000%2E{suffix}"]
        assert sample.image == (folder / f"class_00/0000.{suffix}").read_bytes()
        assert sample.record.path == f"class_00/0000.{suffix}"
    assert "class_00/0001" in found and "class_00/0000" not in found
    assert verify(result["uri"]).status == "done"


def test_the_shard_index_has_each_path_as_it_was(tmp_path: Path) -> None:
    names = [
        "1.jpg",
        "IMG.2020.0.PNG",
        "100%.jpg",
        "x\ny.jpg",
        "\u00fc \u2603.jpg",
        "u\u0308.jpg",
        os.fsdecode(b"\xff.jpg"),
    ]
    (tmp_path / "images/a.b").mkdir(parents=True)
    for name in names:
        (tmp_path / "images/a.b" / name).write_bytes(os.fsencode(name))
    result = ingest(str(tmp_path / "images"), str(tmp_path / "out"), Config()).as_json()
    shards = open_shards(result["uri"])
    found = {sample.record.path: sample.image for sample in shards.read(shards.shards[0])}
    assert found == {f"a.b/{sources.make_printable(name)}": os.fsencode(name) for name in names}
    (index,) = (tmp_path / "out/parts").glob("index-*.parquet")
    assert pq.read_schema(index).names == ["key", "shard", "row", "path", "labels", "members"]


def test_odd_file_names_travel_through_stock_webdataset(tmp_path: Path) -> None:
    names = ["a.b.jpg", "100%.jpg", "x\ny.jpg", "ü ☃.jpg", "n" * 200 + ".jpg", "sp ace.jpg", os.fsdecode(b"\xff.jpg")]
    for class_name in ("__hidden__", "v1.0", "nested/deep"):
        (tmp_path / "images" / class_name).mkdir(parents=True)
        for name in names:
            (tmp_path / "images" / class_name / name).write_bytes(os.fsencode(class_name + name))
    result = ingest(str(tmp_path / "images"), str(tmp_path / "out"), Config()).as_json()
    assert result["samples"] == 3 * len(names)
    assert result["classes"] == ["__hidden__", "nested", "v1.0"]
    shards = open_shards(result["uri"])
    url = str(Path(result["uri"], shards.shards[0].part.path))
    found = {sample["__key__"]: sample["jpg"] for sample in webdataset.WebDataset(url, shardshuffle=False)}
    assert set(found.values()) == {
        os.fsencode(class_name + name) for class_name in ("__hidden__", "v1.0", "nested/deep") for name in names
    }
    assert set(found) == set(images_of(shards))


# ------------------------------------------------------------------------------------------------------------ refusals


def nothing(root: Path) -> Path:
    return root / "nowhere"


def empty(root: Path) -> Path:
    (root / "empty").mkdir()
    return root / "empty"


def only_text(root: Path) -> Path:
    (root / "texts/a").mkdir(parents=True)
    (root / "texts/a/x.txt").write_text("x")
    return root / "texts"


def unknown(root: Path) -> Path:
    (root / "x.rar").write_bytes(b"Rar!")
    return root / "x.rar"


def not_zip(root: Path) -> Path:
    (root / "x.zip").write_bytes(b"no zip")
    return root / "x.zip"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (nothing, "nowhere does not exist"),
        (empty, "holds no images$"),
        (only_text, r"holds no images \(1 skipped: wrong_suffix 1 \(.txt 1\); the first is a/x.txt: "),
        (unknown, "x.rar is not a source"),
        (not_zip, "cannot read .*x.zip as a zip"),
        (lambda root: "s3://bucket/images", "read from a local path"),
    ],
)
def test_sources_that_cannot_be_used(tmp_path: Path, make: Callable[[Path], Path], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        ingest(str(make(tmp_path)), str(tmp_path / "out"), Config())
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
    assert not (tmp_path / "out").exists()


def test_a_store_that_cannot_be_written(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreUnavailable):
        ingest(str(folder), str(tmp_path / "file/out"), Config())


def test_a_share_is_exact_where_floats_are_not() -> None:
    from pipelines.ingest.split import parse_split, split_by_shares

    plan = parse_split("a=.29,b=.71")
    parts = split_by_shares([("x",)] * 100, plan.shares, 0)
    assert Counter(parts) == {"a": 29, "b": 71}
    random = np.random.default_rng(0)
    labels = [(str(random.integers(40)),) for _ in range(1000)]
    counts = Counter(zip((label for (label,) in labels), split_by_shares(labels, plan.shares, 0), strict=True))
    for label, size in Counter(label for (label,) in labels).items():
        assert abs(counts[label, "a"] - 0.29 * size) < 1
    assert abs(sum(count for (_, part), count in counts.items() if part == "a") - 290) <= 1
