"""Tables as labels are written in the field: cells, columns, files, and what goes wrong."""

import datetime
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.config.loading import load_config
from pipelines.encode.encode import encode
from pipelines.encode.job import ShardTask, plan_encode
from pipelines.encode.workers import ShardEncoder
from pipelines.errors import Degraded, FingerprintMismatch, InputError
from pipelines.shards.shards import open_shards
from pipelines.verify.verify import verify
from tests.support.image_tables import PICTURES, csv_of, labels_of, parquet_of, samples_of, take, write_pictures
from tests.support.models import write_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_pictures(tmp_path / "t")


# ------------------------------------------------------------------------------------------------------------- cells


@pytest.mark.parametrize(
    ("cells", "classes"),
    [
        (["007", "010", "7"], ["007", "010", "7"]),
        (["0x1F", "31", "1e3"], ["0x1F", "1e3", "31"]),
        (["true", "FALSE", "True"], ["FALSE", "True", "true"]),
        (["12:30", "2020-01-01", "1.0"], ["1.0", "12:30", "2020-01-01"]),
        (["12345678901234567890", "12345678901234567891", "9"], ["9", "12345678901234567890", "12345678901234567891"]),
        (["NA", "null", "NaN"], ["NA", "NaN", "null"]),
        (["10", "2", "-1"], ["-1", "2", "10"]),
        (["10", "2", "1.0"], ["1.0", "10", "2"]),
        ([" cat", "cat", "cat "], [" cat", "cat", "cat "]),
    ],
)
def test_a_cell_of_a_csv_is_text_as_it_is_written(
    folder: Path, tmp_path: Path, cells: list[str], classes: list[str]
) -> None:
    table = csv_of(folder, "path,label\n" + "".join(f"im/{n}.jpg,{cell}\n" for n, cell in enumerate(cells)))
    result = take(table, tmp_path)
    assert result["classes"] == classes
    assert labels_of(result) == {f"im/{n}": [cell] for n, cell in enumerate(cells)}


@pytest.mark.parametrize(
    ("values", "classes", "labels"),
    [
        (pa.array([2, 10, 0], pa.int8()), ["0", "2", "10"], [["2"], ["10"], ["0"]]),
        (pa.array(["2", "10", "0"]), ["0", "2", "10"], [["2"], ["10"], ["0"]]),
        (pa.array([2.0, None, float("nan")]), ["2"], [["2"], [], []]),
        (pa.array([True, False, None]), ["false", "true"], [["true"], ["false"], []]),
        (pa.array(["b", "a", "b"]).dictionary_encode(), ["a", "b"], [["b"], ["a"], ["b"]]),
        (pa.array([[10, 2], [], None]), ["2", "10"], [["10", "2"], [], []]),
    ],
)
def test_labels_of_a_parquet_table(
    folder: Path, tmp_path: Path, values: pa.Array, classes: list[str], labels: list[list[str]]
) -> None:
    table = parquet_of(folder, {"path": [f"im/{n}.jpg" for n in range(3)], "label": values})
    result = take(table, tmp_path)
    assert result["classes"] == classes
    assert labels_of(result) == {f"im/{n}": names for n, names in enumerate(labels)}


def test_a_label_that_is_no_whole_number_is_named(folder: Path, tmp_path: Path) -> None:
    table = parquet_of(folder, {"path": ["im/0.jpg", "im/1.jpg"], "label": [1.0, 2.5]})
    with pytest.raises(InputError, match=r"row 2: the label column 'label' is double: '2.5' is neither"):
        take(table, tmp_path)


def test_carried_columns_keep_what_was_written_and_the_types_of_parquet(folder: Path, tmp_path: Path) -> None:
    text = "path,label,sku,gtin,ver,size\nim/0.jpg,a,00123,12345678901234567890,3.10,08:30\nim/1.jpg,b,7,,2.0,09:00\n"
    assert carried(take(csv_of(folder, text), tmp_path, "csv"), ["sku", "gtin", "ver", "size"]) == {
        "im/0": {"sku": "00123", "gtin": "12345678901234567890", "ver": "3.10", "size": "08:30"},
        "im/1": {"sku": "7", "gtin": None, "ver": "2.0", "size": "09:00"},
    }
    day, moment = datetime.date(2020, 1, 2), datetime.datetime(2020, 1, 2, 3, 4, tzinfo=datetime.UTC)
    columns = {
        "path": ["im/0.jpg", "im/1.jpg"],
        "label": ["a", "b"],
        "count": pa.array([2**40, None], pa.int64()),
        "flag": [True, False],
        "day": [day, None],
        "moment": pa.array([moment, moment], pa.timestamp("us", "UTC")),
        "time": [datetime.time(8, 30), None],
        "share": pa.array([0.1, 2.0], pa.float32()),
        "kind": pa.array(["x", "y"]).dictionary_encode(),
    }
    result = take(parquet_of(folder, columns), tmp_path, "parquet")
    found = carried(result, [name for name in columns if name not in ("path", "label")])
    share = found["im/0"].pop("share")
    assert share == pytest.approx(0.1)
    assert found["im/0"] == {
        "count": 2**40, "flag": True, "day": day, "moment": moment, "time": datetime.time(8, 30), "kind": "x",
    }  # fmt: skip
    assert found["im/1"]["count"] is None and found["im/1"]["flag"] is False


def carried(result: dict[str, Any], names: list[str]) -> dict[str, dict[str, Any]]:
    """What the codes of the one shard carry, by key: encoded in this process, committed and proven."""
    shards = open_shards(result["uri"])
    model = write_model(f"{result['uri']}-model", result["uri"])
    config = load_config(sets=[f"encode.carry={json.dumps(names)}"])
    job = plan_encode(shards.artifact, model, f"{result['uri']}-codes", config)
    (shard,) = shards.shards
    ShardEncoder(job).run(ShardTask(shard.name, shard.stem))
    codes = encode(shards.artifact.uri, model.uri, job.out, config).uri
    assert verify(codes).status == "done"
    (part,) = Path(codes, "parts").glob("*.parquet")
    return {row["key"]: {name: row[name] for name in names} for row in pq.read_table(part).to_pylist()}


def test_the_type_of_a_column_belongs_to_the_fingerprint(folder: Path, tmp_path: Path) -> None:
    columns = {"path": ["im/0.jpg"], "label": ["a"]}
    take(parquet_of(folder, {**columns, "n": pa.array([1], pa.int32())}), tmp_path)
    with pytest.raises(FingerprintMismatch):
        take(parquet_of(folder, {**columns, "n": pa.array([1], pa.int64())}), tmp_path)


def test_what_cannot_be_metadata_is_left_out_with_a_line(folder: Path, tmp_path: Path) -> None:
    columns = {"path": ["im/0.jpg"], "label": ["a"], "emb": [[0.1]], "box": [{"x": 1}], "raw": [b"x"], "n": [1]}
    result = take(parquet_of(folder, columns), tmp_path)
    assert [note.split(" is left out")[0] for note in result["notes"]] == [
        f"the column '{name}'" for name in ("emb", "box", "raw")
    ]
    assert samples_of(open_shards(result["uri"]))["im/0"][2] == {"labels": [0], "n": 1}


# ------------------------------------------------------------------------------------------------------------- files


def test_missing_files_are_all_counted(folder: Path, tmp_path: Path) -> None:
    rows = ["im/0.jpg,a", *(f"im/no{n}.jpg,b" for n in range(1200)), "im,c", "../../up.jpg,d", "im/1.jpg,a"]
    result = take(csv_of(folder, "path,label\n" + "\n".join(rows) + "\n"), tmp_path, allow_degraded=True)
    assert (result["samples"], result["skipped"], result["found"]) == (2, 1202, 1204)
    assert result["skipped_reasons"] == {"missing": 1200, "special": 1, "unsafe_name": 1}
    assert result["skipped_files"][0] == {"path": "im/no0.jpg", "reason": "missing", "detail": "row 2"}
    assert result["classes"] == ["a"]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_row_whose_path_is_empty_is_skipped_and_named(folder: Path, tmp_path: Path, kind: str) -> None:
    paths, labels = ["im/0.jpg", "", "im/1.jpg", " "], ["a", "b", "b", "c"]
    table = (
        csv_of(folder, "path,label\n" + "".join(f"{path},{label}\n" for path, label in zip(paths, labels, strict=True)))
        if kind == "csv"
        else parquet_of(folder, {"path": [*paths[:3], None], "label": labels})
    )
    with pytest.raises(Degraded, match=r"missing 2; the first is t\.\w+: missing, row 2: the column 'path' is empty"):
        take(table, tmp_path)
    result = take(table, tmp_path, allow_degraded=True)
    assert (result["found"], result["samples"], result["skipped_reasons"]) == (4, 2, {"missing": 2})
    assert result["classes"] == ["a", "b"] and result["status"] == "degraded"
    assert [file["detail"] for file in result["skipped_files"]] == [
        f"row {number}: the column 'path' is empty" for number in (2, 4)
    ]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_file_of_several_rows_gets_all_its_labels(folder: Path, tmp_path: Path, kind: str) -> None:
    rows = [("im/0.jpg", "cat", "x"), ("im/1.jpg", "cat", "x"), ("./im/0.jpg", "dog", "y"), ("im/0.jpg", "cat", "x")]
    table = (
        csv_of(folder, "path,label,by\n" + "".join(",".join(row) + "\n" for row in rows))
        if kind == "csv"
        else parquet_of(folder, dict(zip(("path", "label", "by"), zip(*rows, strict=True), strict=True)))
    )
    result = take(table, tmp_path)
    found = samples_of(open_shards(result["uri"]))
    assert {key: names for key, (_, names, _) in found.items()} == {"im/0": ["cat", "dog"], "im/1": ["cat"]}
    assert found["im/0"][2]["by"] == "x"
    assert result["notes"] == ["1 rows name a file again with other metadata: that of its first row is kept"]


def test_a_file_cannot_be_in_two_parts(folder: Path, tmp_path: Path) -> None:
    table = csv_of(folder, "path,label,part\nim/0.jpg,a,train\nim/1.jpg,a,test\nim/0.jpg,a,test\n")
    with pytest.raises(InputError, match=r"row 3: im/0.jpg is in the part 'test', but row 1 puts it into 'train'"):
        take(table, tmp_path, split="column:part")


@pytest.mark.parametrize(
    "spelled",
    ["/data/photos/im/{}.jpg", "../elsewhere/im/{}.jpg", "C:\\Users\\me\\im\\{}.jpg", "x/y/im/{}.jpg", "im/{}.jpg"],
)
def test_a_root_finds_paths_of_elsewhere(folder: Path, tmp_path: Path, spelled: str) -> None:
    (tmp_path / "tables").mkdir()
    table = csv_of(tmp_path / "tables", "path,label\n" + "".join(f"{spelled.format(n)},c{n}\n" for n in range(6)))
    result = take(table, tmp_path, table_root=str(folder))
    assert labels_of(result) == {f"im/{n}": [f"c{n}"] for n in range(6)}


def test_absolute_paths_below_the_tables_folder_need_no_root(folder: Path, tmp_path: Path) -> None:
    table = csv_of(folder, f"path,label\n{folder}/im/0.jpg,a\n../{folder.name}/im/1.jpg,b\n")
    assert labels_of(take(table, tmp_path)) == {"im/0": ["a"], "im/1": ["b"]}


def test_a_root_never_takes_two_files_for_one(folder: Path, tmp_path: Path) -> None:
    table = csv_of(folder, "path,label\n/d/train/0.jpg,a\n/d/test/0.jpg,b\n/d/test/1.jpg,b\n")
    with pytest.raises(InputError, match=r"row 1: '/d/train/0.jpg': absolute path"):
        take(table, tmp_path, table_root=str(folder / "im"))
    with pytest.raises(InputError, match=r"--root .*nowhere is no folder"):
        take(table, tmp_path, table_root=str(folder / "nowhere"))


@pytest.mark.parametrize(("disk", "table"), [("cafe\u0301", "caf\u00e9"), ("caf\u00e9", "cafe\u0301")])
def test_accents_may_be_composed_otherwise_than_on_disk(folder: Path, tmp_path: Path, disk: str, table: str) -> None:
    (folder / f"{disk}.jpg").write_bytes(PICTURES[0])
    result = take(csv_of(folder, f"path,label\n{table}.jpg,a\n"), tmp_path)
    assert list(labels_of(result)) == [disk]


# ---------------------------------------------------------------------------------------- as others say it went wrong


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_several_labels_in_one_cell(folder: Path, tmp_path: Path, kind: str) -> None:
    columns = {"path": ["im/0.jpg", "im/1.jpg", "im/2.jpg"], "label": ["scab|frog eye", "healthy", "| scab |"]}
    rows = "".join(f"{path},{label}\n" for path, label in zip(*columns.values(), strict=True))
    table = csv_of(folder, "path,label\n" + rows) if kind == "csv" else parquet_of(folder, columns)
    result = take(table, tmp_path, label_separator="|")
    assert labels_of(result) == {"im/0": ["scab", "frog eye"], "im/1": ["healthy"], "im/2": ["scab"]}


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_column_for_each_class(folder: Path, tmp_path: Path, kind: str) -> None:
    table = (
        csv_of(folder, "path, cat, dog\nim/0.jpg, 1, 0\nim/1.jpg, 1, 1\nim/2.jpg, 0, \n")
        if kind == "csv"
        else parquet_of(
            folder, {"path": [f"im/{n}.jpg" for n in range(3)], "cat": [1, 1, 0], "dog": [False, True, None]}
        )
    )
    result = take(table, tmp_path, label_columns=["cat", "dog"], multi_hot=True)
    assert labels_of(result) == {"im/0": ["cat"], "im/1": ["cat", "dog"], "im/2": []}


def test_columns_of_yes_and_no_are_noticed(folder: Path, tmp_path: Path) -> None:
    table = csv_of(folder, "path,cat,dog\nim/0.jpg,1,0\nim/1.jpg,0,2\n")
    with pytest.raises(
        InputError, match=r"row 2 \(line 3\): --multi-hot takes 1 and 0, not '2' as in the column 'dog'"
    ):
        take(table, tmp_path, label_columns=["cat", "dog"], multi_hot=True)
    csv_of(folder, "path,cat,dog\nim/0.jpg,1,0\nim/1.jpg,0,1\n")
    assert "--multi-hot" in take(table, tmp_path, label_columns=["cat", "dog"])["notes"][0]


def test_names_without_their_suffix(folder: Path, tmp_path: Path) -> None:
    (folder / "im" / "000bec18.JPG").write_bytes(PICTURES[0])
    (folder / "im" / "5.png").write_bytes(PICTURES[1])  # beside 5.jpg, so `im/5` may be either
    result = take(
        csv_of(folder, "id,label\nim/000bec18,a\nim/1,b\nim/5,c\n"), tmp_path, path_column="id", allow_degraded=True
    )
    assert labels_of(result) == {"im/000bec18": ["a"], "im/1": ["b"]}
    assert result["skipped_files"] == [{"path": "im/5", "reason": "missing", "detail": "row 3"}]


def test_other_tables_from_the_field(folder: Path, tmp_path: Path) -> None:
    text = 'path|label|"boxes"\nim/0.jpg|cat|"[{""x"": 1, ""y"": ""2|3""}]"\n'
    found = samples_of(open_shards(take(csv_of(folder, text), tmp_path, "bar")["uri"]))
    assert found["im/0"][1:] == (["cat"], {"labels": [0], "boxes": '[{"x": 1, "y": "2|3"}]'})
    indexed = {"path": ["im/0.jpg"], "label": ["a"], "__index_level_0__": [7]}
    found = samples_of(open_shards(take(parquet_of(folder, indexed), tmp_path, "pandas")["uri"]))
    assert found["im/0"][2] == {}
    (folder / "im" / 'a, "b".jpg').write_bytes(PICTURES[0])
    quoted = take(csv_of(folder, 'path,label\n"im/a, ""b"".jpg",cat\n'), tmp_path, "quoted")
    assert labels_of(quoted) == {'im/a, "b"': ["cat"]}
    plain = take(parquet_of(folder, {"picture": [PICTURES[0]], "label": [3]}, name="x.parquet"), tmp_path, "bytes")
    assert labels_of(plain) == {"x/000000": ["3"]}
    images = [[{"bytes": PICTURES[0], "path": None}]]
    with pytest.raises(InputError, match="the column 'images' has lists of images: make a row of each image"):
        take(parquet_of(folder, {"images": images, "label": ["a"]}), tmp_path)
    with pytest.raises(
        InputError, match=r"no column 'path'; its columns are im/0.jpg, cat \(its first line names them\)"
    ):
        take(csv_of(folder, "im/0.jpg,cat\n"), tmp_path)
