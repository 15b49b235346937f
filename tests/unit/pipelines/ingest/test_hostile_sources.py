"""Zips and tables that lie: each costs one file or one clear line, and no more memory and disk than pictures would."""

import io
import json
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.config.settings import Config
from pipelines.errors import InputError
from pipelines.ingest.bounds import SourceLimits
from pipelines.ingest.ingest import ingest

MIB = 1 << 20
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def take(source: Path, tmp_path: Path, **how: Any) -> dict[str, Any]:
    return ingest(str(source), str(tmp_path / "out"), Config(), allow_degraded=True, **how).as_json()


# -------------------------------------------------------------------------------------------------------------- zips


def zip_of(members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytearray:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return bytearray(sink.getvalue())


def not_utf8(data: bytearray) -> bytearray:
    """The local header of the first file says that its name is UTF-8, which it is not."""
    data[6:8], data[30] = b"\0\x08", 0xFF
    return data


def before_the_start(data: bytearray) -> bytearray:
    """Its first bytes are lost, so that the first file begins before the zip."""
    return data[5:]


def far_behind(data: bytearray) -> bytearray:
    """The first file begins at 2^63, as a zip64 field says."""
    at = data.index(b"PK\1\2")
    field = struct.pack("<HHQ", 1, 8, 1 << 63)
    data[at + 30 : at + 32], data[at + 42 : at + 46] = struct.pack("<H", len(field)), b"\xff" * 4
    size = 46 + struct.unpack_from("<H", data, at + 28)[0]
    data[at + size : at + size] = field
    end = data.rindex(b"PK\5\6")
    struct.pack_into("<I", data, end + 12, struct.unpack_from("<I", data, end + 12)[0] + len(field))
    return data


def too_short(data: bytearray) -> bytearray:
    """The first file ends, with its right CRC, before the size that is said."""
    at = data.index(b"PK\1\2")
    struct.pack_into("<I", data, at + 24, 9999)
    return data


@pytest.mark.parametrize("harm", [not_utf8, before_the_start, far_behind, too_short])
def test_a_member_that_lies_costs_itself_alone(harm: Callable[[bytearray], bytearray], tmp_path: Path) -> None:
    whole = zip_of({"a/0.jpg": b"picture " * 9, "a/1.jpg": b"another"}, zipfile.ZIP_DEFLATED)
    (tmp_path / "x.zip").write_bytes(harm(whole))
    result = take(tmp_path / "x.zip", tmp_path)
    assert (result["samples"], result["skipped_reasons"]) == (1, {"unreadable": 1})
    assert result["skipped_files"][0]["path"] == "a/0.jpg" and result["skipped_files"][0]["detail"]


def test_a_zip_that_unfolds_further_than_pictures_do_is_refused(tmp_path: Path) -> None:
    members = {f"a/{number}.jpg": bytes(5 * MIB) for number in range(14)}
    (tmp_path / "x.zip").write_bytes(zip_of(members, zipfile.ZIP_DEFLATED))
    with pytest.raises(InputError, match="unfolds to more than 64 MiB, 200 times its size"):
        take(tmp_path / "x.zip", tmp_path)
    assert not (tmp_path / "out").exists()


def test_what_is_no_picture_may_unfold_since_nobody_reads_it(tmp_path: Path) -> None:
    members = {"a/1.jpg": b"picture", "a/big.txt": bytes(70 * MIB)}
    (tmp_path / "x.zip").write_bytes(zip_of(members, zipfile.ZIP_DEFLATED))
    assert take(tmp_path / "x.zip", tmp_path)["samples"] == 1


# ------------------------------------------------------------------------------------------------------------ tables


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "t").mkdir()
    for number in range(3):
        (tmp_path / "t" / f"{number}.jpg").write_bytes(b"picture %d" % number)
    return tmp_path / "t"


def parquet_of(folder: Path, columns: dict[str, Any], hub: str | None = None) -> Path:
    table = pa.table(columns)
    if hub is not None:
        table = table.replace_schema_metadata({"huggingface": hub})
    pq.write_table(table, folder / "t.parquet", compression="zstd")
    return folder / "t.parquet"


PATHS = ["0.jpg", "1.jpg", "2.jpg"]


@pytest.mark.parametrize(
    "columns",
    [
        {"image": pa.array([{"bytes": bytes(2 * MIB), "path": None}] * 40, IMAGE), "label": ["a"] * 40},
        {"path": ["0.jpg"] * 70, "label": ["a"] * 70, "x": ["x" * MIB] * 70},
        {"path": ["0.jpg"] * 70, "label": [["x" * MIB]] * 70},
        {"path": ["0.jpg"] * 70, "label": pa.array(["x" * MIB] * 70).dictionary_encode()},
    ],
    ids=["image", "metadata", "list", "dictionary"],
)
def test_a_cell_that_many_rows_share_is_counted_for_each(columns: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unfolds to more than 64 MiB"):
        take(parquet_of(folder, columns), tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_dictionary_that_is_large_and_used_once_is_no_bomb(folder: Path, tmp_path: Path) -> None:
    cells = pa.array([f"{number:09d}" * 20 for number in range(3)]).dictionary_encode()
    assert take(parquet_of(folder, {"path": PATHS, "label": ["a"] * 3, "x": cells}), tmp_path)["samples"] == 3


def test_rows_that_take_too_much_memory_at_once_are_refused(folder: Path, tmp_path: Path) -> None:
    table = parquet_of(folder, {"path": ["0.jpg"] * 2000, "label": ["a"] * 2000, "x": ["x" * MIB] * 2000})
    with pytest.raises(InputError, match="take more memory than is given"):
        take(table, tmp_path, limits=SourceLimits(reading_bytes=64 * MIB))


def test_the_memory_of_the_process_is_free_again_after_a_table(folder: Path, tmp_path: Path) -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_DATA)
    take(parquet_of(folder, {"path": PATHS, "label": PATHS}), tmp_path)
    assert resource.getrlimit(resource.RLIMIT_DATA) == before


@pytest.mark.parametrize(
    "feature",
    [
        {"_type": "ClassLabel", "names": ["\ud800", "b", "c"]},
        json.loads("[" * 900 + "]" * 900),
        {"_type": "ClassLabel", "names": [1, 2, 3]},
    ],
    ids=["half characters", "deep", "numbers"],
)
def test_class_names_that_are_none_leave_the_numbers(feature: Any, folder: Path, tmp_path: Path) -> None:
    images = pa.array([{"bytes": b"picture %d" % number, "path": None} for number in range(3)], IMAGE)
    hub = json.dumps({"info": {"features": {"label": feature}}})
    assert take(parquet_of(folder, {"image": images, "label": [0, 1, 2]}, hub), tmp_path)["classes"] == ["0", "1", "2"]


def test_class_names_below_very_many_lists_are_found_or_not_but_end_nothing(folder: Path, tmp_path: Path) -> None:
    images = pa.array([{"bytes": b"picture", "path": None}], IMAGE)
    for depth in range(880, 1000, 3):  # one of them is as deep as Python may parse
        label = '{"_type": "List", "feature": ' * depth + "1" + "}" * depth
        table = parquet_of(folder, {"image": images, "label": [0]}, f'{{"info": {{"features": {{"label": {label}}}}}}}')
        assert take(table, tmp_path)["samples"] == 1


@pytest.mark.parametrize("inner", [False, True])
def test_a_column_whose_name_is_no_text_is_refused_in_one_line(inner: bool, folder: Path, tmp_path: Path) -> None:
    odd = pa.array([{"bytes": b"picture", "QQQQ": 1}]) if inner else pa.array([1])
    table = parquet_of(folder, {"path": ["0.jpg"], "label": ["a"], "image" if inner else "QQQQ": odd})
    table.write_bytes(table.read_bytes().replace(b"QQQQ", b"\xff\xfe\xff\xfe"))
    with pytest.raises(InputError, match=r"cannot read .* as a table"):
        take(table, tmp_path)


@pytest.mark.parametrize(
    "times",
    [pa.array([0] * 3, pa.timestamp("ms", "No/Where")), pa.array([2**30] * 3, pa.date32())],
    ids=["zone", "date"],
)
def test_times_that_python_does_not_know_are_refused_in_one_line(times: pa.Array, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read .* as a table"):
        take(parquet_of(folder, {"path": PATHS, "label": PATHS, "x": times}), tmp_path, split="column:x")


def test_an_error_names_a_few_of_very_many_columns(folder: Path, tmp_path: Path) -> None:
    (folder / "t.csv").write_text(",".join(f"column{number}" for number in range(20_000)) + "\n1\n")
    with pytest.raises(InputError, match=r"\(20000 in all\)") as caught:
        take(folder / "t.csv", tmp_path)
    assert len(str(caught.value)) < 5_000


@pytest.mark.parametrize("row", ["\\ud800.jpg,a,1", "0.jpg,\\ud800,1", "0.jpg,a,\\ud800"])
def test_half_characters_of_a_csv_are_refused_in_one_line(row: str, folder: Path, tmp_path: Path) -> None:
    (folder / "t.csv").write_text(f"path,label,x\n1.jpg,a,1\n{row}\n")
    with pytest.raises(InputError, match="is not unicode_escape: surrogates not allowed"):
        take(folder / "t.csv", tmp_path, encoding="unicode_escape")


def test_an_encoding_with_a_nul_is_none(folder: Path, tmp_path: Path) -> None:
    (folder / "t.csv").write_text("path,label\n0.jpg,a\n")
    with pytest.raises(InputError, match="no such text encoding"):
        take(folder / "t.csv", tmp_path, encoding="a\0b")
