"""Zips as an enemy, a bad disk or a broken writer would leave them, drawn from a seed.

`hostile_zip(seed, number)` gives the bytes and what is known of them: the kind of harm, and what has to become of it.
"""

import io
import json
import random
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from pipelines.ingest.skips import SkipReason

STORED, DEFLATED = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED
UNIX, WINDOWS = 3, 0
UTF8, ENCRYPTED = 0x800, 1
HUGE = [0xFFFFFFFE, 0xFFFFFFFF, 0x7FFFFFFF]
HUGE_64 = [2**64 - 1, 2**63, 2**63 - 1, 2**40]


@dataclass(frozen=True)
class Hostile:
    harm: str
    data: bytes
    reason: SkipReason | None = None
    """By which at least one entry has to be skipped, where the zip is taken."""
    refused: bool = False
    """Whether it must not be taken at all."""


@dataclass
class Item:
    """An entry whose every field can lie: `central` and `local` replace fields of its two headers."""

    name: bytes
    data: bytes = b""
    method: int = DEFLATED
    flags: int = 0
    system: int = UNIX
    attributes: int = 0
    extra: bytes = b""
    packed: bytes | None = None
    central: dict[str, int] = field(default_factory=dict)
    local: dict[str, int] = field(default_factory=dict)
    local_name: bytes | None = None


def squeezed(data: bytes) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return packer.compress(data) + packer.flush()


def written(items: list[Item], end: dict[str, int] | None = None, tail: bytes = b"") -> bytes:
    """The zip of these entries; `end` replaces fields of its last record."""
    body, directory = bytearray(), bytearray()
    for item in items:
        packed = item.packed
        if packed is None:
            packed = squeezed(item.data) if item.method == DEFLATED else item.data
        true = {"crc": zlib.crc32(item.data), "packed": len(packed), "size": len(item.data), "flags": item.flags}
        true |= {"offset": len(body), "version": 20, "method": item.method}
        local, central = true | item.local, true | item.central
        name = item.name if item.local_name is None else item.local_name
        fields = (local["version"], local["flags"], local["method"], 0, 33, local["crc"], local["packed"])
        body += struct.pack("<4sHHHHHIIIHH", b"PK\3\4", *fields, local["size"], len(name), 0) + name + packed
        fields = (central["version"], central["flags"], central["method"], 0, 33, central["crc"], central["packed"])
        directory += struct.pack("<4sBBHHHHHIII", b"PK\1\2", 20, item.system, *fields, central["size"])
        directory += struct.pack(
            "<HHHHHII", len(item.name), len(item.extra), 0, 0, 0, item.attributes, central["offset"]
        )
        directory += item.name + item.extra
    said = {"entries": len(items), "size": len(directory), "offset": len(body), "comment": 0} | (end or {})
    counts = (said["entries"] & 0xFFFF, said["entries"] & 0xFFFF, said["size"], said["offset"], said["comment"])
    return bytes(body + directory) + tail + struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, *counts)


def pictures(draw: random.Random, first: int = 0, count: int | None = None) -> list[Item]:
    """A few ordinary pictures in class folders, now and then with img2dataset's JSON."""
    numbers = range(first, first + (count or draw.randint(2, 6)))
    if draw.random() < 0.15:
        items = []
        for number in numbers:
            facts = draw.choice([json.dumps({"a": number}).encode(), b"{", b"[" * 50_000, b'{"a": "\\ud800"}', b"\xff"])
            stem = b"00000/00000%04d" % number
            items += [Item(stem + b".jpg", b"\xff\xd8" + draw.randbytes(90)), Item(stem + b".json", facts)]
        return items
    return [
        Item(
            draw.choice([b"a/", b"b/", "é/".encode()]) + b"%04d" % number + draw.choice([b".jpg", b".png", b".JPEG"]),
            draw.randbytes(draw.randint(1, 900)),
            draw.choice([STORED, DEFLATED]),
            flags=draw.choice([0, UTF8]),
        )
        for number in numbers
    ]


def lie(items: list[Item], draw: random.Random, **fields: int) -> bytes:
    """The zip with one entry that lies in its central header, its local one or both."""
    place, where = draw.randrange(len(items)), draw.choice(["central", "local", "both"])
    changed = replace(
        items[place], central=fields if where != "local" else {}, local=fields if where != "central" else {}
    )
    return written([*items[:place], changed, *items[place + 1 :]])


# ------------------------------------------------------------------------------------------------------------- harms


def whole(draw: random.Random) -> Hostile:
    return Hostile("whole", written(pictures(draw)))


def cut(draw: random.Random) -> Hostile:
    data = written(pictures(draw))
    return Hostile("cut", data[: draw.randrange(len(data))], refused=True)


def cut_in_front(draw: random.Random) -> Hostile:
    data = written(pictures(draw))
    return Hostile("cut in front", data[draw.randrange(1, len(data)) :])


def flipped(draw: random.Random) -> Hostile:
    data = bytearray(written(pictures(draw)))
    for _ in range(draw.randint(1, 8)):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return Hostile("flipped bits", bytes(data))


def flipped_directory(draw: random.Random) -> Hostile:
    data = bytearray(written(pictures(draw)))
    start = data.index(b"PK\1\2")
    for _ in range(draw.randint(1, 3)):
        data[draw.randrange(start, len(data))] ^= 1 << draw.randrange(8)
    return Hostile("flipped directory", bytes(data))


def overwritten(draw: random.Random) -> Hostile:
    data = bytearray(written(pictures(draw)))
    start, length = draw.randrange(len(data)), draw.choice([1, 4, 8, 300])
    data[start : start + length] = draw.choice([bytes(length), b"\xff" * length, draw.randbytes(length)])
    return Hostile("overwritten", bytes(data))


def spliced(draw: random.Random) -> Hostile:
    first, second = written(pictures(draw)), written(pictures(draw, 50))
    at, start = draw.randrange(len(first)), draw.randrange(len(second))
    return Hostile("spliced", first[:at] + second[start : draw.randint(start, len(second))] + first[at:])


def appended(draw: random.Random) -> Hostile:
    front = draw.choice([written(pictures(draw, 50)), draw.randbytes(700), b"#!/bin/sh\n"])
    return Hostile("appended to another", front + written(pictures(draw)))


def with_a_tail(draw: random.Random) -> Hostile:
    return Hostile("a tail", written(pictures(draw)) + draw.randbytes(draw.choice([1, 30, 70_000])))


def lying_sizes(draw: random.Random) -> Hostile:
    size = draw.choice([0, 1, 5, 2000, *HUGE])
    return Hostile("lying size", lie(pictures(draw), draw, **{draw.choice(["size", "packed"]): size}))


def lying_offset(draw: random.Random) -> Hostile:
    return Hostile("lying offset", lie(pictures(draw), draw, offset=draw.choice([1, 7, 200, *HUGE])))


def lying_crc(draw: random.Random) -> Hostile:
    items = pictures(draw, count=3)
    items[0].central = {"crc": draw.getrandbits(32)}
    return Hostile("lying CRC", written(items), SkipReason.UNREADABLE)


def lying_end(draw: random.Random) -> Hostile:
    name = draw.choice(["entries", "size", "offset", "comment"])
    value = draw.choice([0, 1, 30, 0xFFFF] if name in ("entries", "comment") else [0, 1, 46, 300, *HUGE])
    return Hostile("lying end", written(pictures(draw), {name: value}))


def other_local_header(draw: random.Random) -> Hostile:
    items = pictures(draw, count=3)
    items[0].local_name = draw.choice([b"a/other.jpg", b"\xff\xfe.jpg", b"", b"x" * 900])
    items[0].local = {"flags": draw.choice([0, UTF8])}
    return Hostile("another local name", written(items), SkipReason.UNREADABLE)


def before_the_start(draw: random.Random) -> Hostile:
    """Bytes are missing in front, so that places lie before the first byte."""
    items = pictures(draw, count=3)
    data = written(items)
    return Hostile("places before the start", data[draw.randint(5, data.index(b"PK\1\2")) :], SkipReason.UNREADABLE)


def zip64(draw: random.Random) -> Hostile:
    items = pictures(draw, count=3)
    lied = draw.choice(["size", "packed", "offset"])
    value = draw.choice([*HUGE_64, 0, 1])
    items[0].central = {lied: 0xFFFFFFFF}
    items[0].extra = draw.choice([struct.pack("<HHQ", 1, 8, value), struct.pack("<HHI", 1, 4, 9), b"\1\0\xff\xff"])
    return Hostile("zip64 of an entry", written(items))


def zip64_end(draw: random.Random) -> Hostile:
    numbers = [draw.choice([*HUGE_64, 0, 1, 46]) for _ in range(4)]
    record = struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, *numbers)
    locator = struct.pack("<4sIQI", b"PK\6\7", draw.choice([0, 1]), draw.choice(HUGE_64), draw.choice([1, 9]))
    return Hostile("zip64 end", written(pictures(draw), tail=record + locator))


def overlapping(draw: random.Random) -> Hostile:
    """Many names for the bytes of one entry, as in Fifield's bomb: 100 KiB that unfold to gigabytes."""
    kernel = Item(b"a/0.jpg", bytes(draw.choice([20, 30]) << 20))
    kernel.packed = _kernel(len(kernel.data))
    first, count = written([kernel]), draw.choice([40, 200])
    lies = {"packed": len(kernel.packed), "size": len(kernel.data), "crc": zlib.crc32(kernel.data), "offset": 0}
    items = [Item(b"a/%d.jpg" % number, b"", DEFLATED, packed=b"", central=lies) for number in range(count)]
    data = written(items)
    start = first.index(b"PK\1\2")
    directory = data[data.index(b"PK\1\2") : -22]
    return Hostile("overlapping entries", first[:start] + directory + _end(count, len(directory), start), refused=True)


_KERNELS: dict[int, bytes] = {}


def _kernel(size: int) -> bytes:
    return _KERNELS.setdefault(size, squeezed(bytes(size)))


def _end(count: int, size: int, offset: int) -> bytes:
    return struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, count, count, size, offset, 0)


def bomb(draw: random.Random) -> Hostile:
    """Each picture unfolds a thousand times, as far as deflate goes."""
    size = 30 << 20
    said = {"size": size, "crc": zlib.crc32(bytes(size))}
    count = draw.choice([4, 12])
    items = [Item(b"a/%d.jpg" % n, packed=_kernel(size), central=said, local=said) for n in range(count)]
    return Hostile("bomb", written(items), refused=True)


def quoted_size(draw: random.Random) -> Hostile:
    """An entry that says one byte and unfolds to far more, or the other way round."""
    said = draw.choice([1, 100, (64 << 20) - 10_000, 300 << 20])
    lies = {"size": said}
    items = pictures(draw, count=3)
    items[0] = Item(b"a/b.jpg", draw.choice([b"x", bytes(30 << 20)]), packed=None, central=lies, local=lies)
    items[0].packed = _kernel(30 << 20) if len(items[0].data) > 1 else None
    reason = SkipReason.TOO_LARGE if said > 256 << 20 else SkipReason.UNREADABLE
    return Hostile("quoted size", written(items), None if said == 1 else reason)


def short_data(draw: random.Random) -> Hostile:
    """The stream ends well, with a right CRC, before the size that is said."""
    items = pictures(draw, count=3)
    items[0] = Item(b"a/short.jpg", b"picture", central={"size": 9}, local={"size": 9})
    return Hostile("short data", written(items), SkipReason.UNREADABLE)


def deep(draw: random.Random) -> Hostile:
    name = draw.choice([b"d/" * 2000, b"d/" * 500, b"./" * 3000, b"d//" * 300]) + b"x.jpg"
    return Hostile("deep nesting", written([*pictures(draw), Item(name, b"x")]))


def unsafe_names(draw: random.Random) -> Hostile:
    names = [
        b"../escaped.jpg",
        b"/tmp/escaped.jpg",
        b"a/../../escaped.jpg",
        b"//x/escaped.jpg",
        b"a/..",
        b"a/b/../c.jpg",
    ]
    name = draw.choice(names)
    if name == b"a/..":
        return Hostile("unsafe names", written([*pictures(draw), Item(name, b"x")]))
    if draw.random() < 0.3:
        name = name.replace(b"/", b"\\")
        return Hostile(
            "unsafe names", written([*pictures(draw), Item(name, b"x", system=WINDOWS)]), SkipReason.UNSAFE_NAME
        )
    return Hostile("unsafe names", written([*pictures(draw), Item(name, b"x")]), SkipReason.UNSAFE_NAME)


def odd_names(draw: random.Random) -> Hostile:
    names = [
        b"a/\0b.jpg",
        b"a/\xff\xfe.jpg",
        b"a/x\ny.jpg",
        b"a/\x1b[2J.jpg",
        b"\xed\xa0\x80/x.jpg",
        b"",
        b".jpg",
        b"/",
    ]
    names += [
        b"C:\\x\\y.jpg",
        b"a\\b\\c.jpg",
        b"a/\xe2\x80\xae.jpg",
        b"a/" + b"x" * 5000 + b".jpg",
        b"a/%2e%2e.jpg",
        b"a/.jpg",
    ]
    item = Item(draw.choice(names), b"x", flags=draw.choice([0, 0, UTF8]), system=draw.choice([UNIX, WINDOWS]))
    return Hostile("odd names", written([*pictures(draw), item]))


def unicode_path(draw: random.Random) -> Hostile:
    name = b"a/name.jpg"
    said = draw.choice([b"../escaped.jpg", b"/tmp/escaped.jpg", b"\xff.jpg", b"", "é/ö.jpg".encode(), b"a/\0.jpg"])
    crc = draw.choice([zlib.crc32(name), 7])
    version = draw.choice([1, 1, 2])
    value = struct.pack("<BI", version, crc) + said
    extra = struct.pack("<HH", 0x7075, draw.choice([len(value), len(value), 3, 0])) + value
    true = extra[2:4] == struct.pack("<H", len(value)) and version == 1 and crc != 7
    unsafe = true and (said[:1] in (b".", b"/") or b"\0" in said)
    return Hostile(
        "Unicode path",
        written([*pictures(draw), Item(name, b"x", extra=extra)]),
        SkipReason.UNSAFE_NAME if unsafe else None,
    )


def links(draw: random.Random) -> Hostile:
    mode, reason = draw.choice(
        [(0o120777, SkipReason.LINK), (0o010644, SkipReason.SPECIAL), (0o020644, SkipReason.SPECIAL)]
    )
    item = Item(b"a/link.jpg", draw.choice([b"/etc/passwd", b"../../x", b"link.jpg"]), attributes=mode << 16)
    return Hostile("links and devices", written([*pictures(draw), item]), reason)


def encrypted(draw: random.Random) -> Hostile:
    flags = draw.choice([ENCRYPTED, ENCRYPTED | 0x40, 0x40, 0x20])
    item = Item(b"a/secret.jpg", draw.randbytes(60), flags=flags)
    return Hostile("encrypted", written([*pictures(draw), item]), SkipReason.UNREADABLE)


def methods(draw: random.Random) -> Hostile:
    item = Item(b"a/other.jpg", draw.randbytes(60), method=draw.choice([1, 9, 12, 14, 93, 95, 98, 0xFFFF]))
    return Hostile("other methods", written([*pictures(draw), item]), SkipReason.UNREADABLE)


def one_name(draw: random.Random) -> Hostile:
    names = draw.choice([(b"a/x.jpg", b"a/x.jpg"), (b"a/x.jpg", b"a//x.jpg"), (b"a/x.jpg", b"./a/x.jpg")])
    items = [*pictures(draw), *(Item(name, draw.randbytes(50)) for name in names)]
    return Hostile("one name twice", written(items), SkipReason.REPLACED)


def folders(draw: random.Random) -> Hostile:
    items = [
        Item(b"a/", draw.randbytes(99)),
        Item(b"a/x.jpg/", b"data"),
        Item(b"a/x.jpg/y.jpg", b"z"),
        Item(b"a/x.jpg", b"z"),
    ]
    return Hostile("folders with data", written([*pictures(draw), *items]))


def empty(draw: random.Random) -> Hostile:
    return Hostile("empty", draw.choice([b"", written([]), b"PK\5\6", bytes(22)]), refused=True)


def versions(draw: random.Random) -> Hostile:
    items = pictures(draw)
    items[0].central = {"version": draw.choice([46, 64, 255, 0xFFFF])}
    return Hostile("versions", written(items))


def noise(draw: random.Random) -> Hostile:
    return Hostile(
        "noise", draw.choice([b"", b"PK\3\4", b"PK\5\6"]) + draw.randbytes(draw.choice([3, 22, 5000])), refused=True
    )


HARMS: list[Callable[[random.Random], Hostile]] = [
    *(whole, cut, cut_in_front, flipped, flipped_directory, overwritten, spliced, appended, with_a_tail),
    *(lying_sizes, lying_offset, lying_crc, lying_end, other_local_header, before_the_start, zip64, zip64_end),
    *(overlapping, bomb, quoted_size, short_data, deep, unsafe_names, odd_names, unicode_path),
    *(links, encrypted, methods, one_name, folders, empty, versions, noise),
]


def hostile_zip(seed: int, number: int) -> Hostile:
    draw = random.Random(f"{seed} zip {number}")
    return HARMS[number % len(HARMS)](draw)


def stock_members(data: bytes) -> dict[bytes, set[bytes]]:
    """What Python's own reader unpacks, by the raw name of the entry: a second opinion."""
    found: dict[bytes, set[bytes]] = {}
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for info in archive.infolist():
            try:
                content = archive.read(info)
            except (zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError, ValueError, OverflowError):
                continue
            found.setdefault(info.orig_filename.encode("utf-8" if info.flag_bits & UTF8 else "cp437"), set()).add(
                content
            )
    return found
