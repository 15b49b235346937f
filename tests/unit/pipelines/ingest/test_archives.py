"""Archives give the same shards as their folders; what is hostile or damaged in them is refused."""

import io
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import pytest

from pipelines.config.settings import Config
from pipelines.errors import Degraded, InputError
from pipelines.ingest.bounds import SourceLimits
from pipelines.ingest.ingest import ingest
from tests.support.folders import SMALL, tar_of, tree, zip_of


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
    assert not (tmp_path / "out/manifest.json").exists()
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


def test_a_file_count_has_a_limit(folder: Path, tmp_path: Path) -> None:
    for source in (folder, zip_of(folder, tmp_path / "x.zip"), tar_of(folder, tmp_path / "x.tar")):
        with pytest.raises(InputError, match="more than 20 files"):
            ingest(str(source), str(tmp_path / "out"), Config(), limits=SourceLimits(files=20))
