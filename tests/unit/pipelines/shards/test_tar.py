"""The strict tar reader: what it accepts is read whole, what is cut or altered is an error."""

import io
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipelines.ingest.foreign import scan_foreign_tar
from pipelines.shards.tar import MAX_HEADER_BYTES, TarBeyondLimits, TarDamaged, TarLimits, TarReason, read_tar


def make_tar(form: int = tarfile.PAX_FORMAT, names: tuple[str, ...] = ("a/1.jpg", "a/2.jpg")) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=form) as archive:
        for number, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = 700 * (number + 1)
            archive.addfile(info, io.BytesIO(bytes([number + 1]) * info.size))
    return sink.getvalue()


def names_of(data: bytes) -> list[str]:
    return [entry.name for entry, _ in read_tar(io.BytesIO(data))]


LONG = ("d/" + "x" * 90 + "/" + "y" * 120 + ".jpg", "z" * 300 + ".jpg", "ünï/çødé.jpg")


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_and_foreign_names_are_read_as_tarfile_reads_them(form: int) -> None:
    data = make_tar(form, LONG)
    assert names_of(data) == list(LONG)
    for entry, content in read_tar(io.BytesIO(data)):
        assert content == data[entry.offset : entry.offset + entry.size]


def test_links_folders_and_devices_have_no_content() -> None:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as archive:
        for name, kind in [
            ("d", tarfile.DIRTYPE),
            ("s", tarfile.SYMTYPE),
            ("h", tarfile.LNKTYPE),
            ("f", tarfile.FIFOTYPE),
        ]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
    found = list(read_tar(io.BytesIO(sink.getvalue())))
    assert [(entry.name, entry.kind) for entry, _ in found] == [
        *[("d", "folder"), ("s", "link"), ("h", "link"), ("f", "special")]
    ]
    assert all(content is None for _, content in found)


def test_unwanted_files_are_passed_over() -> None:
    found = list(read_tar(io.BytesIO(make_tar()), lambda entry: entry.name == "a/2.jpg"))
    assert [content is not None for _, content in found] == [False, True]


def test_every_cut_is_noticed() -> None:
    data = make_tar()
    end = 512 + 1024 + 512 + 1536 + 1024  # both members and the end-of-archive marker
    for length in [*range(0, end, 97), 512, 1536, 3584, 4096, end - 1]:
        with pytest.raises(TarDamaged):
            names_of(data[:length])
    assert names_of(data[:end]) == ["a/1.jpg", "a/2.jpg"]


def test_a_cut_at_a_member_border_is_noticed_where_tarfile_sees_a_normal_end() -> None:
    cut = make_tar()[:1536]
    with tarfile.open(fileobj=io.BytesIO(cut), mode="r|") as archive:
        assert len(list(archive)) == 1
    with pytest.raises(TarDamaged, match="ends inside a header"):
        names_of(cut)


def set_size(text: bytes) -> Callable[[bytearray], None]:
    def change(data: bytearray) -> None:
        data[124:136] = text.ljust(12, b"\0")
        data[148:156] = b" " * 8
        data[148:156] = b"%06o\0 " % sum(data[:512])

    return change


def flip_header(data: bytearray) -> None:
    data[1540] ^= 1


def append_archive(data: bytearray) -> None:
    data += make_tar(names=("b/3.jpg",))


def half_marker(data: bytearray) -> None:
    data[4200] = 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (flip_header, "no valid tar header at byte 1536"),
        (append_archive, "goes on after its end-of-archive marker"),
        (half_marker, "half an end-of-archive marker"),
        (set_size(b"\xff" * 12), "negative size"),
        (set_size(b"77777777777"), "ends inside a/1.jpg"),
        (set_size(b"xyz"), "no valid tar header"),
    ],
)
def test_altered_tars_are_refused(change: Callable[[bytearray], None], message: str) -> None:
    data = bytearray(make_tar())
    change(data)
    with pytest.raises(TarDamaged, match=message):
        list(read_tar(io.BytesIO(bytes(data)), lambda entry: entry.size < 1 << 20))


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XGLTYPE])
def test_a_header_of_any_length_is_not_read_into_memory(kind: bytes) -> None:
    info = tarfile.TarInfo("x")
    info.type, info.size = kind, MAX_HEADER_BYTES + 1
    with pytest.raises(TarDamaged, match="the limit is"):
        names_of(info.tobuf() + bytes(4096))


@pytest.mark.parametrize(
    "record", [b"9999 path=x\n", b"0 path=x\n", b"path=x\n", b"11 pathxxx\n", b"12 path=abc", b"8 size=-1\n"]
)
def test_damaged_extended_headers_are_refused(record: bytes) -> None:
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, len(record)
    data = header.tobuf() + record.ljust(512, b"\0") + tarfile.TarInfo("y").tobuf() + bytes(1024)
    with pytest.raises(TarDamaged):
        names_of(data)


def test_mutated_tars_end_or_raise_but_never_hang() -> None:
    random = np.random.default_rng(0)
    source = make_tar(names=LONG)
    refused = 0
    for _ in range(500):
        data = bytearray(source[: random.integers(1, len(source) + 1)] if random.random() < 0.3 else source)
        for _ in range(random.integers(1, 6)):
            data[random.integers(len(data))] = random.integers(256)
        try:
            assert len(names_of(bytes(data))) <= 50
        except TarDamaged:
            refused += 1
    assert refused > 100


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        (TarLimits(entries=1), TarReason.TOO_MANY),
        (TarLimits(total_bytes=2000), TarReason.TOO_LARGE),
        (TarLimits(seconds=0), TarReason.TOO_SLOW),
    ],
)
def test_an_archive_beyond_a_limit_is_refused(limits: TarLimits, reason: TarReason) -> None:
    with pytest.raises(TarDamaged) as caught:
        list(read_tar(io.BytesIO(make_tar()), limits=limits))
    assert caught.value.reason is reason


@pytest.mark.parametrize("limits", [TarLimits(entries=1), TarLimits(total_bytes=2000), TarLimits(seconds=0)])
def test_beyond_a_limit_nothing_more_is_read(limits: TarLimits) -> None:
    stream = io.BytesIO(make_tar() + bytes(100 << 20))
    with pytest.raises(TarBeyondLimits):
        scan_foreign_tar(stream, (".jpg",), None, limits)
    assert stream.tell() <= 1 << 20


def test_zeros_after_the_end_count_too() -> None:
    data = make_tar()
    assert len(list(read_tar(io.BytesIO(data + bytes(1000)), limits=TarLimits(total_bytes=len(data) + 1000)))) == 2
    with pytest.raises(TarDamaged, match="more than"):
        list(read_tar(io.BytesIO(data + bytes(1001)), limits=TarLimits(total_bytes=len(data) + 1000)))


def test_a_member_beyond_its_limit_comes_without_content() -> None:
    found = list(read_tar(io.BytesIO(make_tar()), limits=TarLimits(member_bytes=1000)))
    assert [content is None for _, content in found] == [False, True]


def test_extended_headers_in_a_row_share_one_limit() -> None:
    header = tarfile.TarInfo("x")
    header.size = MAX_HEADER_BYTES // 2
    several = b""
    for header.type in (tarfile.XGLTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME):
        several += header.tobuf() + bytes(MAX_HEADER_BYTES // 2)
        if header.type == tarfile.XHDTYPE:
            assert names_of(several + make_tar()) == ["a/1.jpg", "a/2.jpg"]
    with pytest.raises(TarDamaged, match="the limit is"):
        names_of(several + make_tar())


def pax(kind: bytes, **fields: str) -> bytes:
    """One extended header with these fields."""
    info = tarfile.TarInfo("pax")
    content = b"".join(b"%d %s\n" % (len(text) + 4, text) for text in (f"{k}={v}".encode() for k, v in fields.items()))
    info.type, info.size = kind, len(content)
    return info.tobuf() + content + bytes(-len(content) % 512)


@pytest.mark.parametrize(
    ("headers", "message"),
    [
        (pax(tarfile.XHDTYPE, path="x.jpg") + pax(tarfile.XHDTYPE, path="y.jpg"), "contradict each other"),
        (pax(tarfile.XGLTYPE, path="x.jpg"), "global header"),
        (pax(tarfile.XGLTYPE, size="100000"), "global header"),
    ],
)
def test_headers_that_readers_understand_differently_are_refused(headers: bytes, message: str) -> None:
    with pytest.raises(TarDamaged, match=message) as caught:
        names_of(headers + make_tar())
    assert caught.value.reason is TarReason.BAD_HEADER
    assert names_of(pax(tarfile.XGLTYPE, comment="a commit") + make_tar()) == ["a/1.jpg", "a/2.jpg"]


@pytest.mark.parametrize("kind", [tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE])
def test_what_has_no_content_hides_nothing_behind_its_size(kind: bytes) -> None:
    info = tarfile.TarInfo("x.jpg")
    info.type, info.size = kind, 1024
    assert names_of(info.tobuf() + make_tar())[1:] == ["a/1.jpg", "a/2.jpg"]


@pytest.mark.parametrize("form", ["gnu", "posix", "oldgnu"])
@pytest.mark.parametrize("holes", [1, 4, 5, 26, 200])
def test_a_sparse_file_is_passed_over_and_what_follows_is_read(form: str, holes: int, tmp_path: Path) -> None:
    """GNU tar writes the map of a file with many holes into further blocks, which do not count for its size."""
    (tmp_path / "a.jpg").write_bytes(b"first")
    (tmp_path / "z.jpg").write_bytes(b"last")
    with (tmp_path / "b.npy").open("wb") as stream:
        for number in range(holes):
            stream.seek(number * 65536 + 32768)
            stream.write(b"x" * 4096)
    names = ["a.jpg", "b.npy", "z.jpg"]
    command = ["tar", f"--format={form}", "--sparse", "--hole-detection=raw", "-cf", "x.tar", *names]
    subprocess.run(command, cwd=tmp_path, check=True)
    with (tmp_path / "x.tar").open("rb") as stream:
        found = [(entry.name, entry.kind, content) for entry, content in read_tar(stream)]
    assert found == [("a.jpg", "file", b"first"), ("b.npy", "special", None), ("z.jpg", "file", b"last")]


def test_a_map_of_a_sparse_file_without_end_is_refused() -> None:
    header = bytearray(tarfile.TarInfo("x.npy").tobuf(tarfile.GNU_FORMAT))
    header[156:157], header[482] = tarfile.GNUTYPE_SPARSE, 1
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    more = bytearray(512)
    more[504] = 1
    with pytest.raises(TarDamaged, match="a header of 1049088 bytes") as caught:
        list(read_tar(io.BytesIO(bytes(header) + bytes(more) * 3000)))
    assert caught.value.reason is TarReason.TOO_LARGE
