"""Tables as people bring them: what a cell means, how files are found, and images that lie in the rows."""

import datetime
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.config.loading import load_config
from pipelines.config.settings import Config
from pipelines.encode.encode import encode
from pipelines.encode.job import ShardTask, plan_encode
from pipelines.encode.workers import ShardEncoder
from pipelines.errors import Degraded, FingerprintMismatch, InputError
from pipelines.ingest.csv_rows import MAX_CELL_CHARS, MAX_LINE_CHARS
from pipelines.ingest.ingest import ingest
from pipelines.shards.shards import ShardSet, open_shards
from pipelines.verify.verify import verify
from tests.support import pictures
from tests.support.models import write_model

PICTURES = [pictures.jpeg(pictures.picture(0, number)) for number in range(6)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six pictures im/0.jpg to im/5.jpg."""
    (tmp_path / "t" / "im").mkdir(parents=True)
    for number, data in enumerate(PICTURES):
        (tmp_path / "t" / "im" / f"{number}.jpg").write_bytes(data)
    return tmp_path / "t"


def csv_of(folder: Path, text: str | bytes, name: str = "t.csv") -> str:
    (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)
    return str(folder / name)


def parquet_of(
    folder: Path, columns: dict[str, Any], hub: dict[str, Any] | None = None, name: str = "t.parquet"
) -> str:
    table = pa.table(columns)
    if hub is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": hub}})})
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, folder / name)
    return str(folder / name)


def labels_of(result: dict[str, Any]) -> dict[str, list[str]]:
    """Key -> class names."""
    return {key: names for key, (_, names, _) in samples_of(open_shards(result["uri"])).items()}


def samples_of(shards: ShardSet) -> dict[str, tuple[bytes, list[str], dict[str, Any]]]:
    """Key -> image, class names, metadata."""
    return {
        sample.record.key: (
            sample.image,
            [shards.classes[label] for label in sample.record.labels],
            json.loads(sample.metadata or b"{}"),
        )
        for shard in shards.shards
        for sample in shards.read(shard, metadata=True)
    }


def take(source: str | Path, tmp_path: Path, out: str = "out", **how: Any) -> dict[str, Any]:
    return ingest(str(source), str(tmp_path / out), Config(), **how).as_json()


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


# -------------------------------------------------------------------------------------------------------- CSV as text


@pytest.mark.parametrize("rows", [3, 4000])
def test_any_size_of_csv_parses_alike(folder: Path, tmp_path: Path, rows: int) -> None:
    caption = '"one ' + "x" * 300 + '\ntwo, of it\n""three"" ' + "y" * 200 + '"'
    for number in range(6, rows):
        (folder / "im" / f"{number}.jpg").write_bytes(PICTURES[0])
    table = csv_of(
        folder, "path,label,caption\r\n" + "".join(f"im/{n}.jpg,c{n % 3},{caption}\r\n" for n in range(rows))
    )
    result = take(table, tmp_path)
    assert (result["samples"], result["classes"]) == (rows, ["c0", "c1", "c2"])
    facts = samples_of(open_shards(result["uri"]))[f"im/{rows - 1}"][2]
    assert facts["caption"] == caption[1:-1].replace('""', '"')


@pytest.mark.parametrize(
    "text",
    [
        "path,label\nim/0.jpg,a\nim/1.jpg,b\n,\n\n  , \n",
        "\n\npath,label\n,,,\nim/0.jpg,a\n\nim/1.jpg,b",
        "path,label,,\nim/0.jpg,a,,\nim/1.jpg,b,,\n,,,\n",
        "path,label\nim/0.jpg,a,\nim/1.jpg,b,,\n",
        "path;label\nim/0.jpg;a\nim/1.jpg;b\n",
        "path\tlabel\r\nim/0.jpg\ta\r\nim/1.jpg\tb\r\n",
        "sep=;\npath;label\nim/0.jpg;a\nim/1.jpg;b\n",
        " path , label\nim/0.jpg,a\nim/1.jpg,b\n",
        "path,label\rim/0.jpg,a\rim/1.jpg,b\r",
        "\ufeffpath,label\nim/0.jpg,a\nim/1.jpg,b\n",
        '"path","label"\n"im/0.jpg","a"\n"im/1.jpg","b"\n',
        "path,label\n.\\im\\0.jpg,a\nim\\1.jpg,b\n",
        "path,label\nim/0.jpg,a\nim//1.jpg,b\nim/../im/1.jpg,b\n",
    ],
)
def test_the_ways_a_csv_is_written(folder: Path, tmp_path: Path, text: str) -> None:
    result = take(csv_of(folder, text), tmp_path)
    assert labels_of(result) == {"im/0": ["a"], "im/1": ["b"]}
    assert result["found"] == 2


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig", "utf-32"])
def test_a_byte_order_mark_says_the_encoding(folder: Path, tmp_path: Path, encoding: str) -> None:
    table = csv_of(folder, "path,label\nim/0.jpg,café\nim/1.jpg,犬\n".encode(encoding))
    assert take(table, tmp_path)["classes"] == ["café", "犬"]


@pytest.mark.parametrize(
    "text", ["label,path\ncafé,im/0.jpg\n", "label,path\na,im/é.jpg\n", "label,path,é\na,im/0.jpg,x\n"]
)
def test_another_encoding_is_named_and_can_be_given(folder: Path, tmp_path: Path, text: str) -> None:
    (folder / "im" / "é.jpg").write_bytes(PICTURES[0])
    table = csv_of(folder, text.encode("cp1252"))
    with pytest.raises(InputError, match=r"is not UTF-8: byte 0xe9 in row . \(line .\): give its --encoding"):
        take(table, tmp_path)
    assert take(table, tmp_path, encoding="cp1252")["samples"] == 1


@pytest.mark.parametrize(
    ("text", "how", "message"),
    [
        ("path,label\nim/0.jpg,a\nim/1.jpg\n", {}, r"row 2 \(line 3\): 1 cells, but the header has 2"),
        ("path,label\nim/0.jpg,a,b\n", {}, r"row 1 \(line 2\): 3 cells, but the header has 2: quote"),
        ('path,label\nim/0.jpg,"a\nim/1.jpg,b\n', {}, r"row 1 \(line 2\): unexpected end of data"),
        ('path,label\nim/0.jpg,"' + "a\n" * MAX_CELL_CHARS, {}, "field larger than field limit"),
        ("path,label\n" + "x" * MAX_LINE_CHARS, {}, "has a line of more than"),
        ("path,label\n,a\n", {}, r"the column 'path' is empty in every row"),
        ("path,label\nim/0.jpg,a\n", {"encoding": "klingon"}, "no such text encoding"),
        ("path,label\nim/0.jpg,a\n", {"encoding": "hex"}, "no such text encoding"),
        ("path,label\nim/0.jpg,a\n".encode("utf-16-le"), {}, "give --encoding utf-16-le"),
        ("path,label\nim/0.jpg,a\xff\n", {"encoding": "ascii"}, "is not ascii"),
        ("\n\n", {}, "is empty: its first line names the columns"),
        ("path,label,path\n", {}, "two columns of one name"),
        ("a,b\nim/0.jpg,a\n", {}, "has no column 'path'; its columns are a, b"),
        ("path,kind\nim/0.jpg,a\n", {}, "has no column 'label'.*--label COLUMN, or --unlabelled"),
        ("path,label\nim/9.jpg,a\nim/8.jpg,b\n", {}, r"row 1: cannot read .*9.jpg.*\(and 1 more\).*--root DIR"),
        ("path,label\n/no/0.jpg,a\n", {}, "absolute path.*--root DIR"),
        ("path,label\n../im/0.jpg,a\n", {}, "path leaves its root.*--root DIR"),
    ],
)
def test_what_is_wrong_with_a_csv_is_said(
    folder: Path, tmp_path: Path, text: str | bytes, how: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        take(csv_of(folder, text), tmp_path, **how)
    assert not (tmp_path / "out").exists()


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


# ------------------------------------------------------------------------------------------------ images in the rows

NUMBERED = [f"data/train-{row}" for row in ("00000-of-00002/000000", "00000-of-00002/000001", "00001-of-00002/000000")]
CLASSES = {"names": ["zebra", "ant"], "_type": "ClassLabel"}


def rows_of(numbers: list[int], path: str | None = None) -> list[dict[str, Any]]:
    return [{"bytes": PICTURES[n], "path": path and path.format(n)} for n in numbers]


@pytest.mark.parametrize(
    ("path", "keys"),
    [
        (None, NUMBERED),
        ("image.png", NUMBERED),
        ("/home/me/{}.jpg", NUMBERED),
        ("img_{}.jpg", ["img_0", "img_1", "img_2"]),
    ],
)
def test_a_folder_of_image_tables(tmp_path: Path, path: str | None, keys: list[str]) -> None:
    hub = {"image": {"_type": "Image"}, "label": CLASSES}
    parquet_of(
        tmp_path / "hub", {"image": rows_of([0, 1], path), "label": [1, 0]}, hub, "data/train-00000-of-00002.parquet"
    )
    parquet_of(tmp_path / "hub", {"image": rows_of([2], path), "label": [1]}, hub, "data/train-00001-of-00002.parquet")
    (tmp_path / "hub" / "README.md").write_text("# hub")
    result = take(tmp_path / "hub", tmp_path)
    found = samples_of(open_shards(result["uri"]))
    assert result["classes"] == ["ant", "zebra"] and result["found"] == 3
    assert sorted(found) == keys
    assert [found[key][:2] for key in keys] == [
        (PICTURES[0], ["ant"]), (PICTURES[1], ["zebra"]), (PICTURES[2], ["ant"]),
    ]  # fmt: skip
    assert verify(result["uri"]).status == "done"
    assert take(tmp_path / "hub", tmp_path)["status"] == "unchanged"


@pytest.mark.parametrize("under", ["", "data/"])
@pytest.mark.parametrize("path", ["im/{}.jpg", None])
def test_a_hub_folder_is_split_by_the_names_of_its_files(tmp_path: Path, under: str, path: str | None) -> None:
    files = {"train-00000-of-00002": [0, 1], "train-00001-of-00002-0a1b2c": [2], "test-00000-of-00001": [3]}
    files["validation-00000-of-00001"] = [4, 5]
    for name, numbers in files.items():
        columns = {"image": rows_of(numbers, path), "label": [number % 2 for number in numbers]}
        parquet_of(tmp_path / "hub", columns, name=f"{under}{name}.parquet")
    result = take(tmp_path / "hub", tmp_path, split="folder")
    sizes = {name: part["samples"] for name, part in result["splits"].items()}
    assert sizes == {"test": 1, "train": 3, "validation": 2} and result["notes"] == []
    (data, _, _) = next(iter(samples_of(open_shards(str(tmp_path / "out" / "test"))).values()))
    assert data == PICTURES[3]

    whole = take(tmp_path / "hub", tmp_path, "whole")
    assert whole["samples"] == 6 and len(whole["notes"]) == 1
    assert "test, train, validation" in whole["notes"][0] and "--split folder" in whole["notes"][0]


def test_tables_that_are_not_called_as_a_split_go_by_the_folders_of_their_images(tmp_path: Path) -> None:
    parquet_of(tmp_path / "hub", {"image": rows_of([0], "train/{}.jpg"), "label": [0]}, name="one.parquet")
    parquet_of(tmp_path / "hub", {"image": rows_of([1], "test/{}.jpg"), "label": [0]}, name="two.parquet")
    assert set(take(tmp_path / "hub", tmp_path, split="folder")["splits"]) == {"train", "test"}
    parquet_of(tmp_path / "hub", {"image": rows_of([2], "{}.jpg"), "label": [0]}, name="three.parquet")
    with pytest.raises(InputError, match=r"2\.jpg lies in no folder"):
        take(tmp_path / "hub", tmp_path, "other", split="folder")


def test_the_columns_of_an_image_table(tmp_path: Path) -> None:
    hub = {"img": {"_type": "Image"}, "fine_label": CLASSES, "tags": {"feature": CLASSES, "_type": "Sequence"}}
    columns = {"img": rows_of([0, 1]), "fine_label": [1, -1], "tags": [[0, 1], []], "caption": ["x", None]}
    table = parquet_of(tmp_path, columns, hub)
    found = samples_of(open_shards(take(table, tmp_path)["uri"]))
    assert found["t/000000"] == (PICTURES[0], ["ant"], {"labels": [0], "caption": "x"})
    assert found["t/000001"][1] == []
    tagged = take(table, tmp_path, "tags", label_columns=["tags"])
    assert labels_of(tagged) == {"t/000000": ["zebra", "ant"], "t/000001": []}


def test_an_image_table_without_labels_is_unlabelled(tmp_path: Path) -> None:
    columns = {"image": rows_of([0, 1]), "mask": rows_of([2, 3]), "caption": ["x", "y"]}
    result = take(parquet_of(tmp_path, columns), tmp_path)
    assert (result["samples"], result["classes"]) == (2, [])
    assert any("unlabelled" in note for note in result["notes"])
    assert samples_of(open_shards(result["uri"]))["t/000000"][0] == PICTURES[0]
    masks = take(str(tmp_path / "t.parquet"), tmp_path, "masks", path_column="mask", label_columns=[])
    assert samples_of(open_shards(masks["uri"]))["t/000000"][0] == PICTURES[2]


def test_rows_without_bytes_name_a_file_or_are_skipped(folder: Path, tmp_path: Path) -> None:
    images = [{"bytes": PICTURES[0], "path": None}, {"bytes": None, "path": "im/1.jpg"}, {"bytes": None, "path": None},
              {"bytes": None, "path": "/etc/hostname.jpg"}, None]  # fmt: skip
    result = take(
        parquet_of(folder, {"image": images, "label": ["a", "b", "c", "d", "e"]}), tmp_path, allow_degraded=True
    )
    found = samples_of(open_shards(result["uri"]))
    assert {key: sample[:2] for key, sample in found.items()} == {
        "t/000000": (PICTURES[0], ["a"]), "im/1": (PICTURES[1], ["b"]),
    }  # fmt: skip
    assert [skip["reason"] for skip in result["skipped_files"]] == ["missing", "unsafe_name", "missing"]


def test_plain_bytes_are_images_where_the_column_is_named(tmp_path: Path) -> None:
    png = pictures.png(pictures.picture(0, 1))
    table = parquet_of(tmp_path, {"jpg": [PICTURES[0], png], "label": ["a", "b"]})
    shards = open_shards(take(table, tmp_path, path_column="jpg")["uri"])
    assert samples_of(shards)["t/000001"][:2] == (png, ["b"])
    assert sorted(record.members[0].name for record in shards.shards[0].records()) == ["t/000000.jpg", "t/000001.png"]


@pytest.mark.parametrize(
    ("columns", "hub", "message"),
    [
        (
            {"image": rows_of([0]), "label": [7]},
            {"label": CLASSES},
            "row 1: the label column 'label' is int64: 7 is none",
        ),
        ({"image": [[1.0]], "label": ["a"]}, None, "has no column 'path'; its columns are image, label"),
        ({"path": [1], "label": ["a"]}, None, "the column 'path' is int64, which is neither paths nor images"),
        ({"path": ["a.jpg"], "label": [{"x": 1}]}, None, "labels are texts, whole numbers or lists of them"),
    ],
)
def test_image_tables_that_cannot_be_used(tmp_path: Path, columns: dict[str, Any], hub: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        take(parquet_of(tmp_path, columns, hub), tmp_path)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"info": 1}', '{"info": {"features": {"label": {"names": [1], "_type": "ClassLabel"}}}}']
)
def test_odd_metadata_of_a_schema_is_passed_over(tmp_path: Path, text: str) -> None:
    table = pa.table({"image": rows_of([0]), "label": [1]}).replace_schema_metadata({"huggingface": text})
    pq.write_table(table, tmp_path / "t.parquet")
    assert take(tmp_path / "t.parquet", tmp_path)["classes"] == ["1"]


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
