"""Tables as an enemy, a bad disk or a broken writer would leave them, drawn from a seed.

`hostile_table(seed, number)` gives a CSV or a Parquet file and the kind of harm. Beside the file lie
`im/0.jpg` to `im/5.jpg`.
"""

import io
import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

FILES = 6
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
MIB = 1 << 20


@dataclass(frozen=True)
class Hostile:
    harm: str
    data: bytes
    suffix: str = ".parquet"
    refused: bool = False
    """Whether it must not be taken at all."""
    options: Mapping[str, Any] | None = None
    """Further arguments of `ingest`."""


def picture(number: int) -> bytes:
    return b"\xff\xd8\xff" + b"%d" % number * 20


def lines(draw: random.Random, end: str = "\n") -> str:
    rows = [f"im/{number}.jpg,{draw.choice('abc')},{draw.randint(0, 9)}" for number in range(draw.randint(2, FILES))]
    return end.join(["path,label,x", *rows, ""])


def csv(harm: str, text: str | bytes, **known: Any) -> Hostile:
    return Hostile(harm, text.encode() if isinstance(text, str) else text, ".csv", **known)


# --------------------------------------------------------------------------------------------------------------- CSV


def plain_csv(draw: random.Random) -> Hostile:
    return csv("plain CSV", lines(draw))


def odd_quotes(draw: random.Random) -> Hostile:
    row = draw.choice(
        ['"im/0.jpg,a,1', 'im/0.jpg,"a"b,1', 'im/0.jpg,a"b,1', '"im/0.jpg"",a,1', '"""im/0.jpg",a,1', '"', '""']
    )
    return csv("odd quotes", lines(draw) + row + "\n" + draw.choice(["", lines(draw)]))


def nuls(draw: random.Random) -> Hostile:
    text = bytearray(lines(draw).encode())
    at = draw.randrange(len(text))
    text[at:at] = bytes(draw.choice([1, 3, 5000]))
    return csv("NULs", bytes(text))


def marks(draw: random.Random) -> Hostile:
    mark = draw.choice(
        [b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff", b"\xff\xfe\0\0", b"\0\0\xfe\xff", b"\xef\xbb\xbf" * 2, b"+/v8-"]
    )
    encoding = draw.choice(["utf-8", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
    data = mark + lines(draw).encode(encoding)
    return csv("byte-order marks", data[: len(data) - draw.choice([0, 0, 1, 3])])


def ends(draw: random.Random) -> Hostile:
    rows = lines(draw).split("\n")
    return csv(
        "mixed line ends",
        "".join(row + draw.choice(["\n", "\r\n", "\r", "\n\r", "\r\r\n", "\x0b", "\u2028"]) for row in rows),
    )


def stray_return(draw: random.Random) -> Hostile:
    text = lines(draw)
    at = draw.randrange(len(text))
    return csv("stray CR", text[:at] + "\r" + text[at:])


def long_cell(draw: random.Random) -> Hostile:
    size = draw.choice([MIB - 1, MIB, MIB + 1, 3 * MIB])
    row = draw.choice(["{},a,1", "im/0.jpg,{},1", "im/0.jpg,a,{}", '"{}']).format("y" * size)
    return csv("very long cell", f"path,label,x\n{row}\n{lines(draw)[13:]}")


def long_line(draw: random.Random) -> Hostile:
    return csv("very long line", "path,label" + draw.choice([",", " ", "\0"]) * (17 * MIB), refused=True)


def many_columns(draw: random.Random) -> Hostile:
    count = draw.choice([500, 20_000])
    names = [f"c{number}" for number in range(count)]
    start = draw.choice(["path,label", "path", "file,label", "path,label,c0"])
    return csv("very many columns", f"{start},{','.join(names)}\nim/0.jpg,a{',1' * count}\n")


def one_name(draw: random.Random) -> Hostile:
    head = draw.choice(
        ["path,label,path", "path,label,label", "path,label,x,x", "path,path,label", "path, path ,label"]
    )
    return csv("duplicate columns", f"{head}\nim/0.jpg,a,b,c\nim/1.jpg,a,b,c\n", refused=True)


def paths(draw: random.Random) -> Hostile:
    path = draw.choice(
        [
            *("../secret.jpg", "/etc/passwd", "/etc/hostname.jpg", "a/../../secret.jpg", "http://localhost:1/x.jpg"),
            *(
                "file:///etc/passwd",
                "s3://bucket/x.jpg",
                "pipe:touch fired",
                "C:\\x.jpg",
                "..\\secret.jpg",
                "im",
                ".",
                "~",
            ),
            *(
                "im/0.jpg\0",
                "/dev/zero",
                "/dev/stdin",
                "im/" * 900 + "0.jpg",
                "im/" + "n" * 300 + ".jpg",
                "\u202e.jpg",
                " ",
            ),
            *("im//0.jpg", "im/./0.jpg", "im/../im/0.jpg", "im/0", "secret.jpg/", "\ufeff", "-", "im/0.jpg/x.jpg"),
        ]
    )
    root = draw.choice([None, None, "im", "."])
    text = f'{lines(draw)}"{path}",a,1\n'
    if draw.random() < 0.5:
        table = pa.table({"path": ["im/0.jpg", "im/1.jpg", path], "label": ["a", "b", "c"]})
        return Hostile("odd paths", parquet(table), options={"table_root": root} if root else None)
    return csv("odd paths", text, options={"table_root": root} if root else None)


def encodings(draw: random.Random) -> Hostile:
    text = lines(draw).replace("a", draw.choice(["ä", "€", "日本", "\U0001f600", "\x85", "\ufffe"]))
    data = text.encode(draw.choice(["cp1252", "utf-16-le", "utf-8", "shift-jis", "utf-7", "utf-32"]), "replace")
    given = draw.choice(
        [
            None,
            None,
            "cp1252",
            "utf-16",
            "utf-16-be",
            "utf-7",
            "ascii",
            "hex",
            "no such",
            "idna",
            "\0",
            "raw_unicode_escape",
        ]
    )
    return csv("wrong encoding", data, options={"encoding": given} if given else None)


def halves(draw: random.Random) -> Hostile:
    """Half characters, which a few encodings can spell."""
    cell = draw.choice(["path", "label", "x"])
    row = {"path": "im/1.jpg", "label": "a", "x": "1"} | {cell: "\\ud800.jpg"}
    text = f"path,label,x\nim/0.jpg,a,1\n{','.join(row.values())}\n"
    return csv("half characters", text, options={"encoding": draw.choice(["unicode_escape", "raw_unicode_escape"])})


def only_a_header(draw: random.Random) -> Hostile:
    text = draw.choice(
        [
            "",
            "\n",
            "path,label",
            "path,label\n",
            "\n\n\npath,label\n\n",
            "sep=;\n",
            "sep=,\npath,label",
            "path,label\n,\n",
        ]
    )
    return csv("only a header", text, refused=True)


def numbers(draw: random.Random) -> Hostile:
    number = draw.choice(
        ["9" * 5000, "-" + "9" * 99, "1e999", "nan", "-0", "0x" + "f" * 99, "٣", "1" * 101, "inf", "1_0"]
    )
    return csv("huge numbers", lines(draw).replace(",a,", f",{number},") + f"im/0.jpg,{number},{number}\n")


def separators(draw: random.Random) -> Hostile:
    mark = draw.choice(["sep=,", "sep=\x00", 'sep="', "sep=\r", "sep=p", "sep=;;"])
    return csv("odd separators", f"{mark}\n{lines(draw)}")


def damaged_csv(draw: random.Random) -> Hostile:
    return csv("damaged CSV", damaged(draw, lines(draw).encode()))


# ----------------------------------------------------------------------------------------------------------- Parquet


def parquet(table: pa.Table, hub: Any = None, **options: Any) -> bytes:
    if hub is not None:
        text = hub if isinstance(hub, bytes) else json.dumps({"info": {"features": hub}}).encode()
        table = table.replace_schema_metadata({b"huggingface": text})
    sink = io.BytesIO()
    pq.write_table(table, sink, **options)
    return sink.getvalue()


def images(count: int, draw: random.Random) -> pa.Array:
    cells = [{"bytes": picture(n), "path": draw.choice([f"{n}.jpg", f"{n}.jpg", None])} for n in range(count)]
    return pa.array(cells, IMAGE)


def some_table(draw: random.Random) -> bytes:
    """A whole table of images or paths, of any encoding and compression."""
    count = draw.choice([1, 3, FILES])
    columns: dict[str, Any] = {}
    if draw.random() < 0.5:
        columns["image"] = images(count, draw)
    else:
        columns["path"] = pa.array([f"im/{number}.jpg" for number in range(count)])
    texts = pa.array([f"c{number % 3}" for number in range(count)])
    columns["label"] = draw.choice(
        [texts, texts.dictionary_encode(), pa.array(range(count)), pa.array([["a", "b"]] * count)]
    )
    columns |= {"x": pa.array([number / 3 for number in range(count)])} if draw.random() < 0.5 else {}
    columns |= (
        {"t": pa.array([number * 10**15 for number in range(count)], pa.timestamp("us", "UTC"))}
        if draw.random() < 0.4
        else {}
    )
    plain = draw.random() < 0.5
    encoding = {"label": "DELTA_BYTE_ARRAY"} if plain and columns["label"] is texts else None
    return parquet(
        pa.table(columns),
        {"label": {"_type": "ClassLabel", "names": list("abcdef")}} if draw.random() < 0.3 else None,
        compression=draw.choice(["none", "snappy", "zstd", "gzip", "brotli"]),
        use_dictionary=not plain,
        column_encoding=encoding,
        data_page_version=draw.choice(["1.0", "2.0"]),
        row_group_size=draw.choice([2, 1000]),
    )


def damaged(draw: random.Random, whole: bytes) -> bytes:
    """Bytes flipped, overwritten, cut out, put in; often in the footer, whose length stands before its last mark."""
    data = bytearray(whole)
    for _ in range(draw.choice([1, 1, 2, 5])):
        footer = max(0, len(data) - 8 - min(int.from_bytes(data[-8:-4], "little"), len(data)))
        at = draw.randrange(footer if draw.random() < 0.5 else 0, len(data))
        action = draw.randrange(6)
        if action < 3:
            data[at] ^= 1 << draw.randrange(8)
        elif action == 3:
            value = draw.choice([b"\xff" * 8, bytes(8), b"\0\0\0\x80", b"\xff\xff\xff\x7f", draw.randbytes(8)])
            data[at : at + len(value)] = value
        elif action == 4:
            del data[at : at + draw.randint(1, 40)]
        else:
            data[at:at] = draw.randbytes(draw.randint(1, 40))
        data = data or bytearray(b"\0")
    return bytes(data)


def whole_parquet(draw: random.Random) -> Hostile:
    return Hostile("whole Parquet", some_table(draw))


def damaged_parquet(draw: random.Random) -> Hostile:
    return Hostile("damaged Parquet", damaged(draw, some_table(draw)))


def cut_parquet(draw: random.Random) -> Hostile:
    data = some_table(draw)
    return Hostile("cut Parquet", data[: draw.randrange(len(data))], refused=True)


def schema_that_lies(draw: random.Random) -> Hostile:
    names = draw.choice(
        [[], ["a"], ["a"] * 6, list("abcdefghij"), [1, 2, 3, 4, 5, 6], [None] * 6, "abcdef", {"a": 1}, ["\ud800"] * 9]
    )
    names = draw.choice([names, ["", " "] * 3, ["x" * 100_000] * 6, ["../x", "/", "\0", "\n", "\u202e", "é"]])
    kind = draw.choice(["ClassLabel", "ClassLabel", "Image", "Sequence", 7, None, {"_type": "ClassLabel"}])
    hub = draw.choice(
        [
            *(b"{", b"\xff", b"[]", b"null", b'{"info": 3}', b'{"info": {"features": [1]}}', b"[" * 100_000),
            *({"label": {"_type": kind, "names": names}} for _ in range(9)),
            *({"label": [{"_type": "ClassLabel", "names": names}]}, {"image": {"_type": "ClassLabel", "names": names}}),
            b'{"info": {"features": {"label": %s}}}' % (b"[" * 940 + b"]" * 940),
            b'{"info": {"features": {"label": %s}}}' % (b'{"_type": "List", "feature": ' * 940 + b"1" + b"}" * 940),
        ]
    )
    labels = draw.choice([[0, 1, 2], [0, 5, 2], [-1, 0, 1], [-2, 0, 1], [2**62, 0, 1], [None, 0, 1]])
    column = draw.choice([images(3, draw), pa.array([picture(number) for number in range(3)])])
    return Hostile("schema that lies", parquet(pa.table({"image": column, "label": pa.array(labels)}), hub))


def nested(draw: random.Random) -> Hostile:
    kind: pa.DataType = pa.int64()
    value: Any = 1
    for number in range(draw.choice([1, 3, 40])):
        kind, value = (
            (pa.list_(kind), [value])
            if draw.random() < 0.5
            else (pa.struct([(f"f{number}", kind)]), {f"f{number}": value})
        )
    column = draw.choice(["label", "x", "path", "image"])
    columns: dict[str, Any] = {"path": ["im/0.jpg"], "label": ["a"], column: pa.array([value], kind)}
    return Hostile("nested types", parquet(pa.table(columns)))


def other_structs(draw: random.Random) -> Hostile:
    cells = draw.choice(
        [
            [{"bytes": picture(1)}, {"bytes": None}, None],
            [{"bytes": picture(1), "path": 7}] * 3,
            [{"path": "im/0.jpg"}] * 3,
            [{"bytes": "text", "path": "im/0.jpg"}] * 3,
            [{"bytes": picture(1), "path": "im/0.jpg", "more": 1}] * 3,
            [{"bytes": None, "path": "im/0.jpg"}, {"bytes": None, "path": None}, None],
            [{"bytes": b"", "path": "im/0.jpg"}] * 3,
            [{"BYTES": picture(1), "path": "im/0.jpg"}] * 3,
            [[{"bytes": picture(1), "path": "im/0.jpg"}]] * 3,
            [None] * 3,
        ]
    )
    return Hostile("other structs", parquet(pa.table({"image": pa.array(cells), "label": ["a", "b", "a"]})))


def paths_of_images(draw: random.Random) -> Hostile:
    names = [
        "../escaped.jpg",
        "/tmp/escaped.jpg",
        "a/../b.jpg",
        "\0.jpg",
        "..\\escaped.jpg",
        "x.jpg/",
        "",
        ".",
        "n" * 3000 + ".jpg",
    ]
    names += ["same.jpg", "\u202e.jpg", "im/0.jpg", "http://x/y.jpg", "../secret.jpg", "a/./b.jpg", "é.jpg", "x.exe"]
    cells = [{"bytes": draw.choice([picture(n), None]), "path": draw.choice(names)} for n in range(draw.choice([1, 4]))]
    columns = {"image": pa.array(cells, IMAGE), "label": ["a"] * len(cells)}
    return Hostile("paths of images", parquet(pa.table(columns)))


def bad_indices(draw: random.Random) -> Hostile:
    """A dictionary that has fewer values than its indices say; the page that says so is found by its bytes."""
    data = parquet(
        pa.table({"path": [f"im/{n % 6}.jpg" for n in range(64)], "label": ["a", "b"] * 32}), compression="none"
    )
    place = (
        data.rindex(b"\x02\x00", 0, data.index(b"PAR1", 4) - 400) if draw.random() < 0.3 else data.index(b"im/0") - 4
    )
    return Hostile("bad indices", data[:place] + draw.randbytes(2) + data[place + 2 :])


def odd_columns(draw: random.Random) -> Hostile:
    odd = draw.choice(
        [
            *(pa.array([2**40] * 3, pa.timestamp("s")), pa.array([2**50] * 3, pa.timestamp("s", "UTC"))),
            *(pa.array([0] * 3, pa.timestamp("ms", "No/Where")), pa.array([2**30] * 3, pa.date32())),
            *(pa.array([1] * 3, pa.duration("ns")), pa.array([[2**62]] * 3, pa.list_(pa.timestamp("us")))),
            *(
                pa.array([float("inf"), 1e300, -0.0]),
                pa.array([b"\xff"] * 3),
                pa.nulls(3),
                pa.array([10**37] * 3, pa.decimal128(38)),
            ),
            pa.array([[["a"]]] * 3),
        ]
    )
    columns: dict[str, Any] = {
        "path": [f"im/{n}.jpg" for n in range(3)],
        "label": ["a"] * 3,
        draw.choice(["label", "x", "path"]): odd,
    }
    split = "column:x" if "x" in columns and draw.random() < 0.6 else None
    return Hostile("odd columns", parquet(pa.table(columns)), options={"split": split} if split else None)


def odd_column_names(draw: random.Random) -> Hostile:
    name = draw.choice(
        [
            "",
            " ",
            "\0",
            "\n",
            "a.b",
            "path.x",
            "labels",
            "\u202e",
            "n" * 100_000,
            "__index_level_0__",
            "label9" * 9,
            "key",
        ]
    )
    data = parquet(pa.table({"path": ["im/0.jpg"], "label": ["a"], name: [1], "QQQQ": [2]}))
    if draw.random() < 0.6:
        data = data.replace(b"QQQQ", draw.choice([b"\xff\xfe\xff\xfe", b"path", b"Q\0QQ", b"\xed\xa0\x80Q"]))
    return Hostile("odd column names", data)


def images_with_odd_fields(draw: random.Random) -> Hostile:
    kind = pa.struct([("bytes", pa.binary()), ("QQQQ", pa.string())])
    data = parquet(pa.table({"image": pa.array([{"bytes": picture(1), "QQQQ": "x"}], kind), "label": ["a"]}))
    return Hostile("odd field names", data.replace(b"QQQQ", draw.choice([b"\xff\xfe\xff\xfe", b"path"])))


def many_parquet_columns(draw: random.Random) -> Hostile:
    columns = {f"c{number}": [1] for number in range(2000)} | draw.choice(
        [{"path": ["im/0.jpg"]}, {}, {"label": ["a"]}]
    )
    return Hostile("very many columns", parquet(pa.table(columns)))


def shared(cell: str | bytes, rows: int) -> pa.Array:
    """A column whose rows share one cell, which is held once here too."""
    return pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array([cell]))


def image_bomb(draw: random.Random) -> Hostile:
    """One picture that many rows share: the dictionary holds it once."""
    column = shared(b"\xff\xd8\xff" + bytes(draw.choice([2, 7]) * MIB), draw.choice([40, 1000]))
    table = pa.table({"image": column, "label": ["a"] * len(column)})
    return Hostile("bomb of images", parquet(table, compression="zstd", store_schema=False), refused=True)


def text_bomb(draw: random.Random) -> Hostile:
    """The same with texts, of which more rows are read at once: up to 4 GiB."""
    rows = draw.choice([80, 4000])
    columns = {"path": shared("im/0.jpg", rows), "label": shared("a", rows)}
    table = pa.table(columns | {draw.choice(["x", "label", "path"]): shared("y" * MIB, rows)})
    return Hostile("bomb of texts", parquet(table, compression="zstd", store_schema=False), refused=True)


HARMS: list[Callable[[random.Random], Hostile]] = [
    *(plain_csv, odd_quotes, nuls, marks, ends, stray_return, long_cell, many_columns, one_name, paths, encodings),
    *(halves, only_a_header, numbers, separators, damaged_csv),
    *(whole_parquet, cut_parquet, schema_that_lies, nested, other_structs, paths_of_images, bad_indices, odd_columns),
    *(odd_column_names, images_with_odd_fields),
]
RARE = [long_line, many_parquet_columns, image_bomb, text_bomb]
"""Harms that cost more; one of fifty tables has one of them."""


def hostile_table(seed: int, number: int) -> Hostile:
    draw = random.Random(f"{seed} table {number}")
    if number % 50 == 0:
        return RARE[number // 50 % len(RARE)](draw)
    return damaged_parquet(draw) if number % 2 else HARMS[number // 2 % len(HARMS)](draw)
