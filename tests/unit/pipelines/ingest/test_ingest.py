"""Ingest from every kind of source: what is found, keyed, split, written; and what is refused, in one line."""

import bz2
import gzip
import io
import json
import lzma
import os
import tarfile
import tracemalloc
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset

from pipelines.artifacts.manifest import open_artifact
from pipelines.config.loading import load_config
from pipelines.config.settings import Config
from pipelines.errors import Degraded, FingerprintMismatch, InputError, StoreUnavailable, WorkFailed
from pipelines.ingest import ingest as ingest_module
from pipelines.ingest import sources
from pipelines.ingest.ingest import ingest, make_unique_keys, sample_key
from pipelines.shards.shards import ShardSet, open_shards
from pipelines.verify.verify import verify
from tests.support import pictures
from tests.support.runs import run_record

SMALL = load_config(sets=["ingest.samples_per_shard=10"])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """24 pictures of 3 classes."""
    pictures.write_folder(tmp_path / "images")
    return tmp_path / "images"


def tree(root: Path) -> dict[str, bytes]:
    """All stored bytes except the run records, which hold clocks."""
    found = {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    return {name: data for name, data in found.items() if "runs/" not in name}


def images_of(shards: ShardSet) -> dict[str, tuple[bytes, list[str]]]:
    """Key -> image bytes and class names."""
    return {
        sample.record.key: (sample.image, [shards.classes[label] for label in sample.record.labels])
        for shard in shards.shards
        for sample in shards.read(shard)
    }


def expected_images(folder: Path) -> dict[str, tuple[bytes, list[str]]]:
    return {
        f"{path.parent.name}/{path.stem}": (path.read_bytes(), [path.parent.name])
        for path in folder.rglob("*")
        if path.is_file()
    }


def zip_of(folder: Path, path: Path, prefix: str = "", method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for file in sorted(folder.rglob("*"), reverse=True):
            archive.write(file, prefix + str(file.relative_to(folder)))
    return path


def tar_of(folder: Path, path: Path, prefix: str = "") -> Path:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as archive:
        archive.add(folder, prefix or ".")
    compress: Callable[[bytes], bytes] = {
        ".gz": gzip.compress,
        ".tgz": gzip.compress,
        ".xz": lzma.compress,
        ".bz2": bz2.compress,
    }.get(path.suffix, bytes)
    path.write_bytes(compress(sink.getvalue()))
    return path


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


def test_a_file_too_large_to_be_read_back_is_skipped(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "MAX_MEMBER_BYTES", 5000)
    (folder / "class_00/big.bmp").write_bytes(bytes(5001))
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


# ---------------------------------------------------------------------------------------------------------- archives


@pytest.mark.parametrize("name", ["x.zip", "x.tar", "x.tar.gz", "x.tgz", "x.tar.xz", "x.tar.bz2"])
def test_an_archive_gives_the_same_artifact_as_its_folder(folder: Path, tmp_path: Path, name: str) -> None:
    make = zip_of if name.endswith(".zip") else tar_of
    make(folder, tmp_path / name)
    ingest(str(folder), str(tmp_path / "a"), SMALL)
    result = ingest(str(tmp_path / name), str(tmp_path / "b"), SMALL).as_json()
    assert result["status"] == "done"
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    assert ingest(str(tmp_path / name), str(tmp_path / "b"), SMALL).status == "unchanged"


def test_members_that_leave_the_archive_are_skipped_and_nothing_is_extracted(folder: Path, tmp_path: Path) -> None:
    image = (folder / "class_00/0000.jpg").read_bytes()
    names = ["/abs/cat/1.jpg", "../up/cat/1.jpg", "ok/../../cat/1.jpg"]
    reasons = dict.fromkeys(names, "unsafe_name")
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name in [*names, "cat/1.jpg"]:
            archive.writestr(name, image)
        link = zipfile.ZipInfo("cat/link.jpg")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
        method = zipfile.ZipInfo("cat/lzma.jpg")
        method.compress_type = zipfile.ZIP_LZMA
        archive.writestr(method, image)
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name in [*names, "cat/1.jpg"]:
            info = tarfile.TarInfo(name)
            info.size = len(image)
            tar.addfile(info, io.BytesIO(image))
        for name, kind in [("cat/link.jpg", tarfile.SYMTYPE), ("cat/dev.jpg", tarfile.CHRTYPE)]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    more = {
        "x.zip": {"cat/lzma.jpg": "unreadable"},
        "x.tar": {"cat/dev.jpg": "special"},
    }
    for name, extra in more.items():
        result = ingest(str(tmp_path / name), str(tmp_path / f"out-{name}"), Config(), allow_degraded=True).as_json()
        found = {item["path"]: item["reason"] for item in result["skipped_files"]}
        assert found == reasons | {"cat/link.jpg": "link"} | extra
        assert result["samples"] == 1
    written = {path for path in tmp_path.rglob("*") if path.is_file()} - before
    assert all(path.relative_to(tmp_path).parts[0].startswith("out-") for path in written)


@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz", "x.tar.xz", "x.tar.bz2", "x.zip"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.95])
def test_a_truncated_archive_is_an_input_error(folder: Path, tmp_path: Path, name: str, share: float) -> None:
    path = (zip_of if name.endswith(".zip") else tar_of)(folder, tmp_path / name)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(InputError) as caught:
        ingest(str(path), str(tmp_path / "out"), Config())
    assert str(path) in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_damaged_member_of_a_zip_is_named(folder: Path, tmp_path: Path) -> None:
    path = zip_of(folder, tmp_path / "x.zip", method=zipfile.ZIP_STORED)
    data = bytearray(path.read_bytes())
    place = data.find((folder / "class_01/0002.jpg").read_bytes())
    data[place + 50] ^= 1
    path.write_bytes(data)
    with pytest.raises(Degraded, match=r"class_01/0002\.jpg: unreadable, Bad CRC"):
        ingest(str(path), str(tmp_path / "out"), Config())
    assert not (tmp_path / "out").exists()
    result = ingest(str(path), str(tmp_path / "out"), Config(), allow_degraded=True).as_json()
    assert (result["status"], result["samples"], result["skipped_reasons"]) == ("degraded", 23, {"unreadable": 1})


def test_a_member_that_unfolds_to_more_than_it_declares_is_not_unfolded(tmp_path: Path) -> None:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("cat/bomb.jpg", bytes(50_000_000))
    data = sink.getvalue().replace((50_000_000).to_bytes(4, "little"), (1000).to_bytes(4, "little"))
    (tmp_path / "x.zip").write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match="bomb"):
            ingest(str(tmp_path / "x.zip"), str(tmp_path / "out"), Config())
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


def test_a_file_count_has_a_limit(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_FILES", 20)
    for source in (folder, zip_of(folder, tmp_path / "x.zip"), tar_of(folder, tmp_path / "x.tar")):
        with pytest.raises(InputError, match="more than 20 files"):
            ingest(str(source), str(tmp_path / "out"), Config())


# ------------------------------------------------------------------------------------------------------------- tables


def write_table(path: Path, columns: dict[str, list[Any]]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.table(columns), path)
    else:
        rows = zip(*columns.values(), strict=True)
        lines = [",".join("" if cell is None else str(cell) for cell in row) for row in rows]
        path.write_text("\n".join([",".join(columns), *lines]) + "\n")
    return path


PATHS = [f"class_0{klass}/000{number}.jpg" for klass in range(3) for number in range(3)]


@pytest.mark.parametrize("name", ["t.csv", "t.parquet"])
def test_a_table_gives_labels_and_metadata(folder: Path, tmp_path: Path, name: str) -> None:
    table = write_table(
        folder / name,
        {
            "path": PATHS,
            "label": ["cat", "dog", None, "NA", "cat", "dog", "cat", "dog", "cat"],
            "label2": ["pet", None, None, "pet", "pet", "pet", "pet", "cat", "cat"],
            "stars": [1, 2, 3, None, 5, 6, 7, 8, 9],
            "place": ["Rome", "Oslo", "", *["x"] * 6],
        },
    )
    result = ingest(str(table), str(tmp_path / "out"), Config()).as_json()
    assert result["classes"] == ["NA", "cat", "dog", "pet"]
    shards = open_shards(result["uri"])
    found = images_of(shards)
    assert found["class_00/0000"] == ((folder / PATHS[0]).read_bytes(), ["cat", "pet"])
    assert found["class_00/0002"][1] == []
    assert found["class_01/0000"][1] == ["NA", "pet"]
    assert found["class_02/0002"][1] == ["cat"]
    url = str(Path(result["uri"], shards.shards[0].part.path))
    stock = {sample["__key__"]: sample for sample in webdataset.WebDataset(url, shardshuffle=False)}
    stars = "1" if name == "t.csv" else 1
    assert json.loads(stock["class_00/0000"]["json"]) == {"labels": [1, 3], "place": "Rome", "stars": stars}
    assert json.loads(stock["class_01/0000"]["json"])["stars"] is None
    assert "cls" not in stock["class_00/0000"]
    assert verify(result["uri"]).status == "done"


def test_one_label_without_metadata_is_a_cls_member(folder: Path, tmp_path: Path) -> None:
    table = write_table(folder / "t.csv", {"path": PATHS[:2], "label": ["7", "10"]})
    result = ingest(str(table), str(tmp_path / "out"), Config()).as_json()
    assert result["classes"] == ["7", "10"]
    url = str(Path(result["uri"], open_shards(result["uri"]).shards[0].part.path))
    stock = {sample["__key__"]: sample for sample in webdataset.WebDataset(url, shardshuffle=False)}
    assert stock["class_00/0000"]["cls"] == b"0"
    assert stock["class_00/0001"]["cls"] == b"1"


def test_parquet_lists_are_labels(folder: Path, tmp_path: Path) -> None:
    table = write_table(folder / "t.parquet", {"path": PATHS[:3], "labels": [["a", "b"], [], None]})
    result = ingest(str(table), str(tmp_path / "out"), Config()).as_json()
    found = images_of(open_shards(result["uri"]))
    assert [found[path.removesuffix(".jpg")][1] for path in PATHS[:3]] == [["a", "b"], [], []]


def test_columns_can_be_named_and_labels_left_out(folder: Path, tmp_path: Path) -> None:
    table = write_table(folder / "t.csv", {"file": PATHS[:3], "kind": ["a", "b", "a"], "label": ["x", "y", "z"]})
    result = ingest(str(table), str(tmp_path / "a"), Config(), path_column="file", label_columns=["kind"]).as_json()
    assert result["classes"] == ["a", "b"]
    result = ingest(str(table), str(tmp_path / "b"), Config(), path_column="file", label_columns=[]).as_json()
    assert result["classes"] == []
    assert {tuple(labels) for _, labels in images_of(open_shards(result["uri"])).values()} == {()}


def test_metadata_of_a_row_belongs_to_the_fingerprint(folder: Path, tmp_path: Path) -> None:
    table = write_table(folder / "t.csv", {"path": PATHS[:2], "label": ["a", "b"], "n": [1, 2]})
    ingest(str(table), str(tmp_path / "out"), Config())
    write_table(folder / "t.csv", {"path": PATHS[:2], "label": ["a", "b"], "n": [1, 3]})
    with pytest.raises(FingerprintMismatch):
        ingest(str(table), str(tmp_path / "out"), Config())


def test_dates_become_text_and_nan_null(folder: Path, tmp_path: Path) -> None:
    day = pa.array([86_400_000_000, None], pa.timestamp("us"))
    pq.write_table(
        pa.table({"path": PATHS[:2], "label": ["a", "b"], "day": day, "x": [float("nan"), 1.5]}), folder / "t.parquet"
    )
    result = ingest(str(folder / "t.parquet"), str(tmp_path / "out"), Config()).as_json()
    shards = open_shards(result["uri"])
    facts = {s.record.key: json.loads(s.metadata or b"") for s in shards.read(shards.shards[0], metadata=True)}
    assert facts["class_00/0000"] == {"labels": [0], "day": "1970-01-02 00:00:00.000000", "x": None}
    assert facts["class_00/0001"] == {"labels": [1], "day": None, "x": 1.5}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"file": PATHS[:1], "label": ["a"]}, "has no column 'path'; its columns are file, label"),
        ({"path": PATHS[:1], "kind": ["a"]}, "has no column 'label'; its columns are path, kind"),
        ({"path": ["class_00/none.jpg"], "label": ["a"]}, "row 1: cannot read .*none.jpg: No such file"),
        ({"path": ["../class_00/0000.jpg"], "label": ["a"]}, "path leaves its root"),
        ({"path": ["/etc/passwd"], "label": ["a"]}, "absolute path"),
        ({"path": ["class_00"], "label": ["a"]}, "is not a plain file"),
        ({"path": [], "label": []}, "holds no images"),
        ({"path": PATHS[:1], "label": [b"\xff"]}, "label column 'label' is binary"),
        ({"path": PATHS[:1], "label": [1.5]}, "label column 'label' is double"),
    ],
)
def test_tables_that_cannot_be_used(folder: Path, tmp_path: Path, columns: dict[str, list[Any]], message: str) -> None:
    table = write_table(folder / "t.parquet", columns)
    with pytest.raises(InputError, match=message):
        ingest(str(table), str(tmp_path / "out"), Config())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("data", [b"", b"path,label\na.jpg\n", b"\x00\xff\xfe", b"path,path,label\na,b,c\n"])
def test_bytes_that_are_no_table(tmp_path: Path, data: bytes) -> None:
    for name in ("t.csv", "t.parquet"):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match=name):
            ingest(str(tmp_path / name), str(tmp_path / "out"), Config())


# ------------------------------------------------------------------------------------------------------------- splits


def parts_of(result: dict[str, Any]) -> dict[str, dict[str, tuple[bytes, list[str]]]]:
    return {name: images_of(open_shards(part["uri"])) for name, part in result["splits"].items()}


def test_shares_split_each_class_and_lose_nothing(tmp_path: Path) -> None:
    pictures.write_folder(tmp_path / "images", per_class=20, size=8)
    result = ingest(str(tmp_path / "images"), str(tmp_path / "out"), SMALL, "train=.8,query=.1,database=.1").as_json()
    parts = parts_of(result)
    assert list(parts) == ["train", "query", "database"]
    for name, count in [("train", 16), ("query", 2), ("database", 2)]:
        assert Counter(labels[0] for _, labels in parts[name].values()) == dict.fromkeys(result["classes"], count)
        assert result["splits"][name]["samples"] == 3 * count
        shards = open_shards(result["splits"][name]["uri"])
        assert list(shards.classes) == result["classes"]
        assert all(shard.name.startswith(f"{name}-") for shard in shards.shards)
        assert verify(shards.artifact.uri).status == "done"
    every: dict[str, Any] = {}
    for part in parts.values():
        assert not every.keys() & part.keys()
        every |= part
    assert every == expected_images(tmp_path / "images")
    again = ingest(str(tmp_path / "images"), str(tmp_path / "out"), SMALL, "train=.8,query=.1,database=.1").as_json()
    assert (again["status"], again["digest"]) == ("unchanged", result["digest"])


def test_small_classes_are_rounded_fairly(tmp_path: Path) -> None:
    pictures.write_folder(tmp_path / "images", classes=10, per_class=5, size=8)
    result = ingest(
        str(tmp_path / "images"), str(tmp_path / "out"), Config(), "train=.8,query=.1,database=.1"
    ).as_json()
    parts = parts_of(result)
    assert {name: part["samples"] for name, part in result["splits"].items()} == {
        "train": 40,
        "query": 5,
        "database": 5,
    }
    assert Counter(labels[0] for _, labels in parts["train"].values()) == dict.fromkeys(result["classes"], 4)


def test_the_seed_of_a_split(tmp_path: Path) -> None:
    pictures.write_folder(tmp_path / "images", per_class=20, size=8)
    chosen = []
    for number, seed in enumerate((0, 0, 1)):
        config = load_config(sets=[f"ingest.seed={seed}"])
        result = ingest(str(tmp_path / "images"), str(tmp_path / str(number)), config, "a=.5,b=.5").as_json()
        chosen.append(set(parts_of(result)["a"]))
    assert chosen[0] == chosen[1] != chosen[2]


def test_many_labels_split_by_the_rarest(folder: Path, tmp_path: Path) -> None:
    labels = [[f"c{n % 2}", f"odd{n}"] if n % 3 == 0 else [f"c{n % 2}"] for n in range(9)]
    table = write_table(folder / "t.parquet", {"path": PATHS, "labels": labels})
    result = ingest(str(table), str(tmp_path / "out"), Config(), "a=.5,b=.5").as_json()
    assert sorted(part["samples"] for part in result["splits"].values()) == [4, 5]


def test_the_top_folder_can_name_the_split(tmp_path: Path) -> None:
    pictures.write_folder(tmp_path / "images/train", classes=3)
    pictures.write_folder(tmp_path / "images/test", classes=2, per_class=3, first=100)
    for source, out in ((tmp_path / "images", "a"), (tar_of(tmp_path / "images", tmp_path / "x.tar.gz"), "b")):
        result = ingest(str(source), str(tmp_path / out), SMALL, "folder").as_json()
        parts = parts_of(result)
        assert {name: len(part) for name, part in parts.items()} == {"test": 6, "train": 24}
        assert "train/class_00/0000" in parts["train"]
        assert open_shards(result["splits"]["test"]["uri"]).classes == ("class_00", "class_01", "class_02")
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


@pytest.mark.parametrize("name", ["t.csv", "t.parquet"])
def test_a_column_can_name_the_split(folder: Path, tmp_path: Path, name: str) -> None:
    part = ["train", "train", "query"] * 3
    table = write_table(folder / name, {"path": PATHS, "label": ["a", "b", "c"] * 3, "part": part})
    result = ingest(str(table), str(tmp_path / "out"), Config(), "column:part").as_json()
    assert {name: part["samples"] for name, part in result["splits"].items()} == {"query": 3, "train": 6}
    assert open_shards(result["splits"]["query"]["uri"]).classes == ("a", "b", "c")
    write_table(folder / name, {"path": PATHS, "label": ["a", "b", "c"] * 3, "part": part[::-1]})
    with pytest.raises(FingerprintMismatch):
        ingest(str(table), str(tmp_path / "out"), Config(), "column:part")


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("train=.8,query=.1", "sum to 0.9, not 1"),
        ("train=.8,train=.2", "named twice"),
        ("train=1,query=0", "has no share"),
        ("train=.8,../x=.2", "write train="),
        ("train=.8;query=.2", "write train="),
        ("train=-1,query=2", "write train="),
        ("train", "write train="),
        ("", "write train="),
        ("column:", "write train="),
        ("train=.9999,query=.0001", "query would get none"),
        ("column:part", "is not a CSV or Parquet table"),
        ("folder", "SPLIT/CLASS/FILE"),
    ],
)
def test_splits_that_cannot_be_made(folder: Path, tmp_path: Path, split: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ingest(str(folder), str(tmp_path / "out"), Config(), split)
    assert not (tmp_path / "out").exists()


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
