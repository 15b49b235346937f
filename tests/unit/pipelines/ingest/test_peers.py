"""What the programs of others write, and what their users bring: taken by the peer's own rules, or told what helps."""

import bz2
import gzip
import io
import json
import lzma
import shutil
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from torchvision.datasets import FakeData, ImageFolder

from pipelines.config.settings import Config
from pipelines.errors import Degraded, InputError
from pipelines.ingest.adopt import Adoption, adopt
from pipelines.ingest.ingest import ingest
from pipelines.shards.shards import open_shards
from tests.support.pictures import jpeg, picture


def shot(number: int) -> bytes:
    return jpeg(picture(number % 7, number, 8))


def tree(root: Path, *names: str) -> Path:
    """A folder with a picture of its own at each name."""
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(shot(number))
    return root


def classes_of(uri: str | Path) -> dict[str, list[str]]:
    """The class names of each sample, by its path."""
    opened = open_shards(str(uri))
    records = (record for shard in opened.shards for record in shard.records())
    return {record.path: [opened.classes[label] for label in record.labels] for record in records}


def write_tar(path: Path, members: Mapping[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def refusal(source: Path, out: Path, **options: Any) -> str:
    with pytest.raises((InputError, Degraded)) as caught:
        ingest(str(source), str(out), Config(), **options)
    return str(caught.value)


# -------------------------------------------------------------------------------------------------------- torchvision


def fake_data(root: Path) -> None:
    for number, (image, label) in enumerate(FakeData(size=24, image_size=(3, 8, 8), num_classes=12)):
        path = root / f"{label}" / f"{number:04d}.{['jpg', 'png', 'PPM', 'bmp'][number % 4]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)


def tiny_imagenet(root: Path) -> None:
    for wnid in ("n02123045", "n02690373", "n03095699"):
        tree(root, *(f"{wnid}/images/{wnid}_{number}.JPEG" for number in range(3)))
        (root / wnid / f"{wnid}_boxes.txt").write_text("n02123045_0.JPEG\t0\t0\t31\t31\n")


def nested(root: Path) -> None:
    tree(root, "cat/2020/1.jpg", "cat/2.jpg", "dog/a/b/c/3.png", "Dog/3.TIF", "é/4.jpeg", "cat.x/5.webp")
    (root / "cat" / "readme.txt").write_text("no picture")


@pytest.mark.parametrize("make", [fake_data, tiny_imagenet, nested])
def test_samples_and_classes_are_those_of_image_folder(make: Any, tmp_path: Path) -> None:
    make(tmp_path / "in")
    peer = ImageFolder(str(tmp_path / "in"))
    own = ingest(str(tmp_path / "in"), str(tmp_path / "out"), Config()).as_json()
    assert sorted(own["classes"]) == peer.classes
    expected = {str(Path(path).relative_to(tmp_path / "in")): [peer.classes[label]] for path, label in peer.samples}
    assert classes_of(tmp_path / "out") == expected


def test_a_folder_of_a_class_without_pictures_is_no_class(tmp_path: Path) -> None:
    (tree(tmp_path / "in", "cat/1.jpg", "dog/2.jpg") / "zebra").mkdir()
    with pytest.raises(FileNotFoundError):
        ImageFolder(str(tmp_path / "in"))
    allowed = ImageFolder(str(tmp_path / "in"), allow_empty=True)
    own = ingest(str(tmp_path / "in"), str(tmp_path / "out"), Config()).as_json()
    assert (own["samples"], own["classes"]) == (len(allowed), ["cat", "dog"])


@pytest.mark.parametrize("names", [("train/1.jpg", "test/2.jpg"), ("Train/cat/1.jpg", "val/cat/2.jpg")])
def test_parts_of_a_split_that_are_taken_for_classes_are_pointed_out(names: tuple[str, ...], tmp_path: Path) -> None:
    result = ingest(str(tree(tmp_path / "in", *names)), str(tmp_path / "out"), Config()).as_json()
    assert any("--split folder" in note and str(result["classes"][0]) in note for note in result["notes"])
    labelled = "/cat/" in names[0]
    columns = None if labelled else ()
    split = ingest(
        str(tmp_path / "in"), str(tmp_path / "split"), Config(), split="folder", label_columns=columns
    ).as_json()
    assert split["classes"] == (["cat"] if labelled else [])
    assert not any("--split folder" in note for note in split["notes"])


def test_classes_beside_one_that_is_called_as_a_part_are_classes(tmp_path: Path) -> None:
    source = tree(tmp_path / "in", "test/1.jpg", "cat/2.jpg")
    assert ingest(str(source), str(tmp_path / "out"), Config()).notes == []


# -------------------------------------------------------------------------------------------------------- img2dataset


def downloads(root: Path, names: list[str], statistics: bool = True) -> Path:
    """What img2dataset writes as `files`: names without suffix are made a picture, its JSON and its caption."""
    tree(root, *(f"{name}.jpg" for name in names))
    for name in names:
        (root / f"{name}.json").write_text(json.dumps({"key": name.rpartition("/")[2], "caption": name}))
        (root / f"{name}.txt").write_text(name)
        shard = name.partition("/")[0]
        (root / f"{shard}.parquet").write_bytes(b"PAR1")
        if statistics:
            (root / f"{shard}_stats.json").write_text("{}")
    return root


@pytest.mark.parametrize("form", ["folder", "zip", "tar"])
@pytest.mark.parametrize(
    "names",
    [
        ["00000/000000000", "00000/000000001", "00001/000010000"],
        ["00000/00000", "00001/00001"],  # --number_sample_per_shard 1
        ["00/000", "00/001", "01/010"],  # --oom_shard_count 2
        ["0/00", "0/01", "10/100"],
    ],
)
def test_img2datasets_files_are_known_however_long_its_numbers_are(names: list[str], form: str, tmp_path: Path) -> None:
    source = downloads(tmp_path / "in", names)
    if form != "folder":
        source = Path(shutil.make_archive(str(tmp_path / "x"), form, source))
    result = ingest(str(source), str(tmp_path / "out"), Config()).as_json()
    assert (result["samples"], result["classes"]) == (len(names), [])
    opened = open_shards(str(tmp_path / "out"))
    samples = [sample for shard in opened.shards for sample in opened.read(shard, metadata=True)]
    captions = {sample.record.key: json.loads(sample.metadata or b"{}")["caption"] for sample in samples}
    assert captions == {name: name for name in names}
    assert set(result["skipped_reasons"]) == {"wrong_suffix"}
    assert not any(".txt" in file["path"] for file in result["skipped_files"])


def test_short_numbers_without_img2datasets_statistics_are_classes(tmp_path: Path) -> None:
    source = downloads(tmp_path / "in", ["1/10", "2/20", "2/21"], statistics=False)
    assert ingest(str(source), str(tmp_path / "out"), Config()).classes == ["1", "2"]


def test_a_download_that_lost_its_json_is_a_sample(tmp_path: Path) -> None:
    source = downloads(tmp_path / "in", ["00000/000000000", "00000/000000001"])
    (source / "00000/000000001.json").unlink()
    (source / "00000/000000001.txt").write_text("")
    assert ingest(str(source), str(tmp_path / "out"), Config()).samples == 2


def test_img2datasets_parquet_files_are_a_source_together(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for shard in range(2):
        columns = {"url": ["http://x/1", "http://x/2"], "key": [f"{shard}0", f"{shard}1"], "jpg": [shot(1), shot(2)]}
        pq.write_table(pa.table(columns), tmp_path / "in" / f"{shard:05d}.parquet")
        (tmp_path / "in" / f"{shard:05d}_stats.json").write_text("{}")
    result = ingest(str(tmp_path / "in"), str(tmp_path / "out"), Config()).as_json()
    assert (result["samples"], result["classes"]) == (4, [])


# --------------------------------------------------------------------------------------------------------- webdataset


def test_what_the_webdataset_library_writes_is_adopted_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with webdataset.ShardWriter(str(tmp_path / "in" / "train-%06d.tar"), maxcount=5, verbose=0) as sink:
        for number in range(12):
            sink.write({"__key__": f"sample{number:05d}", "jpg": shot(number), "cls": number % 3})
    result = adopt(str(tmp_path / "in"), str(tmp_path / "out")).as_json()
    assert (result["samples"], result["skipped"], result["tars"]) == (12, 0, 3)
    peer = webdataset.WebDataset(
        sorted(map(str, (tmp_path / "in").glob("*.tar"))), shardshuffle=False, empty_check=False
    ).decode()
    expected = {sample["__key__"]: sample["cls"] for sample in peer}
    opened = open_shards(str(tmp_path / "out"))
    records = (record for shard in opened.shards for record in shard.records())
    assert {record.key: record.labels[0] for record in records} == expected


def test_members_that_do_not_stand_together_are_told_how_to(tmp_path: Path) -> None:
    pictures = {f"{number:04d}.jpg": shot(number) for number in range(4)}
    labels = {f"{number:04d}.cls": b"1" for number in range(4)}
    write_tar(tmp_path / "in" / "t-0.tar", pictures | labels)
    with pytest.raises(InputError, match=r"interleaved 4.*tar --sort=name"):
        adopt(str(tmp_path / "in"), str(tmp_path / "out"))
    write_tar(tmp_path / "in" / "t-1.tar", {f"1{name}": data for name, data in sorted((pictures | labels).items())})
    with pytest.raises(Degraded, match=r"interleaved 4.*tar --sort=name"):
        adopt(str(tmp_path / "in"), str(tmp_path / "out"))


def test_a_member_that_is_there_twice_is_told_how_to_mend(tmp_path: Path) -> None:
    with tarfile.open(write_tar(tmp_path / "in" / "t-0.tar", {"0.jpg": shot(0), "1.jpg": shot(1)}), "a") as tar:
        info = tarfile.TarInfo("1.jpg")
        info.size = len(shot(2))
        tar.addfile(info, io.BytesIO(shot(2)))
    with pytest.raises(Degraded, match=r"two members 1\.jpg.*write a tar anew that has a member twice"):
        adopt(str(tmp_path / "in"), str(tmp_path / "out"))


def test_a_key_with_a_dot_is_told_where_keys_end(tmp_path: Path) -> None:
    write_tar(tmp_path / "in" / "t-0.tar", {"Track 2.0 (Clean).jpg": shot(0), "22.0/1.1.png": shot(1)})
    with pytest.raises(InputError, match=r"no_image 2.*first dot"):
        adopt(str(tmp_path / "in"), str(tmp_path / "out"), Adoption())


@pytest.mark.parametrize(("pack", "name"), [(gzip.compress, "gzip"), (lzma.compress, "xz"), (bz2.compress, "bzip2")])
def test_a_compressed_tar_under_the_name_of_a_plain_one_is_named_as_that(pack: Any, name: str, tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "in" / "sa_000000.tar", {"./sa_1.jpg": shot(1), "./sa_1.json": b"{}"})
    tar.write_bytes(pack(tar.read_bytes()))
    with pytest.raises(InputError, match=f"compressed by {name}: unpack it"):
        adopt(str(tmp_path / "in"), str(tmp_path / "out"))
    write_tar(tmp_path / "in" / "sa_000001.tar", {f"BZh{name}.jpg": shot(1)})
    result = adopt(str(tmp_path / "in"), str(tmp_path / "out"), allow_degraded=True).as_json()
    assert (result["samples"], f"compressed by {name}" in result["skipped_files"][0]["detail"]) == (1, True)


def test_a_damaged_tar_is_not_called_compressed(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "in" / "t.tar", {"BZh.jpg": shot(1)})
    tar.write_bytes(tar.read_bytes()[:600])
    with pytest.raises(InputError, match="truncated") as caught:
        adopt(str(tmp_path / "in"), str(tmp_path / "out"))
    assert "compressed" not in str(caught.value)


# ------------------------------------------------------------------------------------------- archives inside a source


def test_archives_inside_a_source_are_told_what_to_do(tmp_path: Path) -> None:
    inner = write_tar(tmp_path / "n01440764.tar", {"n01440764_1.JPEG": shot(1)})
    outer = write_tar(tmp_path / "ILSVRC2012_img_train.tar", {inner.name: inner.read_bytes()})
    assert "--adopt" in refusal(outer, tmp_path / "out")
    assert "unpack" in refusal(outer, tmp_path / "out")
    (tmp_path / "in").mkdir()
    for name in ("data.zip", "more.tar.gz", "x.TGZ"):
        (tmp_path / "in" / name).write_bytes(b"x")
        message = refusal(tmp_path / "in", tmp_path / "out")
        assert "unpack the archives, or give one as SOURCE" in message
        (tmp_path / "in" / name).unlink()
    (tmp_path / "in" / "notes.txt").write_bytes(b"x")
    assert "unpack" not in refusal(tmp_path / "in", tmp_path / "out")


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_zip_by_another_method_is_told_how_to_be_packed(method: int, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w", method) as archive:
        archive.writestr("cat/1.jpg", shot(1))
    assert "other than deflate: pack it anew" in refusal(tmp_path / "x.zip", tmp_path / "out")


def test_paths_of_another_place_are_told_about_the_root(tmp_path: Path) -> None:
    tree(tmp_path / "pics", "cat/1.jpg")
    # As `datasets` writes images that lie in files: with paths from where it ran, and without bytes.
    images = pa.array(
        [{"bytes": None, "path": "pics/cat/1.jpg"}], pa.struct({"bytes": pa.binary(), "path": pa.string()})
    )
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"image": images, "label": [0]}), tmp_path / "in" / "t.parquet")
    assert "--root DIR" in refusal(tmp_path / "in" / "t.parquet", tmp_path / "out")
    own = ingest(
        str(tmp_path / "in" / "t.parquet"), str(tmp_path / "out"), Config(), table_root=str(tmp_path)
    ).as_json()
    assert own["samples"] == 1


@pytest.mark.parametrize("form", ["folder", "zip"])
def test_a_part_whose_one_class_is_none_of_the_others_is_pointed_out(form: str, tmp_path: Path) -> None:
    """Tiny-imagenet keeps the labels of val/images/ in a text file."""
    tiny_imagenet(tmp_path / "in" / "train")
    source = tree(tmp_path / "in", "val/images/val_0.JPEG", "val/images/val_1.JPEG", "test/images/test_0.JPEG")
    if form == "zip":
        source = Path(shutil.make_archive(str(tmp_path / "x"), "zip", source))
    notes = ingest(str(source), str(tmp_path / "out"), Config(), split="folder").notes
    told = [note for note in notes if "--unlabelled" in note]
    assert [note.partition(",")[0] for note in told] == ["test has one class", "val has one class"]
    assert all(" images, " in note for note in told)


@pytest.mark.parametrize(
    "names", [("query/cat/1.jpg", "database/cat/2.jpg", "database/dog/3.jpg"), ("a/x/1.jpg", "b/y/2.jpg")]
)
def test_parts_with_classes_of_their_own_are_usual(names: tuple[str, ...], tmp_path: Path) -> None:
    source = tree(tmp_path / "in", *names)
    assert ingest(str(source), str(tmp_path / "out"), Config(), split="folder").notes == []


def test_one_part_of_a_split_zip_is_told_how_to_be_joined(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("cat/1.jpg", shot(1))
        archive.writestr("cat/2.jpg", shot(2))
    data = bytearray((tmp_path / "x.zip").read_bytes())
    last = data.rindex(b"PK\1\2")
    data[last + 34 : last + 36] = b"\1\0"  # the disk on which the entry starts, from 0
    (tmp_path / "x.zip").write_bytes(data)
    assert "zip -s 0" in refusal(tmp_path / "x.zip", tmp_path / "out")


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (("00000/img00000000.png", "00000/img00000001.png"), True),  # dataset_tool.py of StyleGAN and its kin
        (("00000/00000.png", "00000/00999.png", "01000/01000.png"), True),  # FFHQ
        (("00000/1.png", "cat/2.png"), False),
        (("0/1.png", "1/2.png"), False),
        (("007/1.png", "010/2.png"), False),
    ],
)
def test_folders_that_only_number_pictures_are_pointed_out(names: tuple[str, ...], told: bool, tmp_path: Path) -> None:
    result = ingest(str(tree(tmp_path / "in", *names)), str(tmp_path / "out"), Config()).as_json()
    assert result["classes"] == sorted({name.partition("/")[0] for name in names})
    assert any("--unlabelled" in note for note in result["notes"]) is told
