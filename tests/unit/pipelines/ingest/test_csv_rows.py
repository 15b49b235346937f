"""CSV files of any size, dialect and encoding."""

from pathlib import Path
from typing import Any

import pytest

from pipelines.errors import InputError
from pipelines.ingest.csv_rows import MAX_CELL_CHARS, MAX_LINE_CHARS
from pipelines.shards.shards import open_shards
from tests.support.image_tables import PICTURES, csv_of, labels_of, samples_of, take, write_pictures


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_pictures(tmp_path / "t")


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
