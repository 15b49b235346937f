"""Tars as an enemy, a bad disk or a broken writer would leave them, drawn from a seed.

`hostile_tar(random)` gives the bytes and what is known of them: the kind of harm, and the reason by which at least one
loss has to be named (None where the harm may or may not cost a sample).
"""

import io
import json
import random
import struct
import tarfile
from collections.abc import Callable
from dataclasses import dataclass

from pipelines.shards.tar import TarReason

FORMS = (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT)

Members = list[tuple[tarfile.TarInfo, bytes]]


@dataclass(frozen=True)
class Hostile:
    harm: str
    data: bytes
    reason: TarReason | None = None


def member(
    name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = ""
) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, len(data)
    return info, data


def samples(random: random.Random, first: int = 0, count: int | None = None) -> Members:
    """A few ordinary samples: an image and a `cls` or `json` each; in half of all tars each lies in some folder."""
    members: Members = []
    folders = random.choice([["", "d/", "./d/e/"], ["d/", "./d/e/"]])
    for number in range(first, first + (count or random.randint(2, 8))):
        key = random.choice(folders) + f"{number:04d}"
        members.append(
            member(f"{key}.{random.choice(['jpg', 'png', 'JPEG'])}", random.randbytes(random.randint(0, 1500)))
        )
        if random.random() < 0.5:
            members.append(member(f"{key}.cls", b"%d" % random.randint(0, 9)))
        else:
            members.append(member(f"{key}.json", json.dumps({"label": random.randint(0, 9)}).encode()))
    return members


def packed(members: Members, form: int = tarfile.PAX_FORMAT, end: bool = True) -> bytes:
    blocks = []
    for info, data in members:
        blocks.append(info.tobuf(form, "utf-8", "surrogateescape") + data + bytes(-len(data) % 512))
    return b"".join(blocks) + bytes(10240 if end else 0)


def raw_header(name: bytes, size: bytes, kind: bytes = b"0") -> bytes:
    """A header with a right checksum around fields that `tarfile` would not write."""
    header = bytearray(512)
    header[0 : len(name)] = name
    header[100:108], header[108:116], header[116:124] = b"0000644\0", b"0000000\0", b"0000000\0"
    header[124 : 124 + len(size)] = size
    header[136:148] = b"00000000000\0"
    header[156:157], header[257:265] = kind, b"ustar\x0000"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def pax(records: dict[bytes, bytes] | bytes) -> bytes:
    """An extended header before the next member."""
    content = records if isinstance(records, bytes) else b"".join(record(*item) for item in records.items())
    return raw_header(b"PaxHeader/x", b"%011o\0" % len(content), b"x") + content + bytes(-len(content) % 512)


def record(key: bytes, value: bytes) -> bytes:
    length = len(key) + len(value) + 3
    length += len(str(length + len(str(length))))
    return b"%d %s=%s\n" % (length, key, value)


# ------------------------------------------------------------------------------------------------------------- harms


def cut(random: random.Random) -> Hostile:
    data = packed(samples(random), random.choice(FORMS), end=False)
    return Hostile("cut", data[: random.randint(0, len(data))], TarReason.TRUNCATED)


def cut_at_a_member(random: random.Random) -> Hostile:
    members = samples(random)
    return Hostile(
        "cut at a member", packed(members[: random.randint(1, len(members))], end=False), TarReason.TRUNCATED
    )


def flipped(random: random.Random) -> Hostile:
    data = bytearray(packed(samples(random), random.choice(FORMS)))
    for _ in range(random.randint(1, 8)):
        data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    return Hostile("flipped bits", bytes(data))


def overwritten(random: random.Random) -> Hostile:
    data = bytearray(packed(samples(random), random.choice(FORMS)))
    start = random.randrange(len(data))
    length = random.choice([1, 7, 512, 3000])
    data[start : start + length] = random.choice([bytes(length), b"\xff" * length, random.randbytes(length)])
    return Hostile("overwritten", bytes(data))


def spliced(random: random.Random) -> Hostile:
    first, second = packed(samples(random), random.choice(FORMS)), packed(samples(random, 50), random.choice(FORMS))
    step = random.choice([1, 512])
    at, start = random.randrange(0, len(first), step), random.randrange(0, len(second), step)
    return Hostile("spliced", first[:at] + second[start : random.randint(start, len(second))] + first[at:])


def joined(random: random.Random) -> Hostile:
    return Hostile("joined", packed(samples(random)) + packed(samples(random, 50)), TarReason.TRAILING_DATA)


def negative_size(random: random.Random) -> Hostile:
    size = random.choice([b"\xff" * 12, b"\xff" + bytes(11), b"-0000000001\0"])
    start = packed(samples(random), end=False) if random.random() < 0.5 else b""
    return Hostile("negative size", start + raw_header(b"x.jpg", size) + bytes(4096), TarReason.BAD_HEADER)


def huge_size(random: random.Random) -> Hostile:
    size, reason = random.choice(
        [
            (b"77777777777\0", TarReason.TRUNCATED),
            (b"\x80\0\0\0\x7f" + b"\xff" * 7, TarReason.TRUNCATED),
            (b"\x80" + b"\x7f" * 11, TarReason.BAD_HEADER),
        ]
    )
    start = packed(samples(random), end=False)
    return Hostile("huge size", start + raw_header(b"x.jpg", size) + bytes(4096), reason)


def huge_pax_size(random: random.Random) -> Hostile:
    size = random.choice([b"9" * 18, b"9" * 40, b"-1", b"0x10", b"", "٣".encode(), b"1e9"])
    data = packed(samples(random), end=False) + pax({b"size": size}) + raw_header(b"x.jpg", b"00000000001\0")
    return Hostile("pax size", data + bytes(4096))


def no_number(random: random.Random) -> Hostile:
    header = raw_header(b"x.jpg", random.choice([b"abcdefghijk\0", b"99999999999\0", b"0_0_0_0_0_1\0"]))
    return Hostile("size that is no number", packed(samples(random), end=False) + header + bytes(4096))


def duplicate_keys(random: random.Random) -> Hostile:
    members = samples(random)
    chosen = random.randrange(len(members))
    return Hostile("duplicate keys", packed([*members, member("9999.jpg", b"x"), members[chosen]]))


def duplicate_member(random: random.Random) -> Hostile:
    members = samples(random)
    chosen = random.randrange(len(members))
    return Hostile("duplicate member", packed([*members[: chosen + 1], *members[chosen:]]), TarReason.DUPLICATE_KEY)


def interleaved(random: random.Random) -> Hostile:
    members = [member("a.jpg", b"1"), member("b.jpg", b"2"), member("a.cls", b"0"), member("b.cls", b"1")]
    return Hostile("interleaved keys", packed([*samples(random), *members]), TarReason.INTERLEAVED)


def links(random: random.Random) -> Hostile:
    kind = random.choice([tarfile.SYMTYPE, tarfile.LNKTYPE])
    target = random.choice(["/etc/passwd", "../../x", "0000.jpg", "d", "loop.jpg"])
    return Hostile("links", packed([*samples(random), member("loop.jpg", b"", kind, target)]), TarReason.LINK)


def devices(random: random.Random) -> Hostile:
    kind = random.choice([tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, b"Z"])
    return Hostile("devices", packed([*samples(random), member("dev.jpg", b"", kind)]), TarReason.SPECIAL)


def sparse(random: random.Random) -> Hostile:
    if random.random() < 0.5:
        data = pax({b"GNU.sparse.major": b"1", b"GNU.sparse.realsize": b"99999999999"})
        return Hostile("sparse", data + packed([member("x.jpg", b"0\n")]), TarReason.SPECIAL)
    header = bytearray(raw_header(b"x.jpg", b"00000000000\0", b"S"))
    header[386:410] = b"7" * 24
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return Hostile("sparse", bytes(header) + bytes(4096), TarReason.SPECIAL)


def unsafe_names(random: random.Random) -> Hostile:
    name = random.choice(
        ["/tmp/escaped.jpg", "../escaped.jpg", "a/../../escaped.jpg", "//x/escaped.jpg", "a/b/../c.jpg"]
    )
    return Hostile("unsafe names", packed([*samples(random), member(name, b"x")]), TarReason.UNSAFE_NAME)


def odd_names(random: random.Random) -> Hostile:
    name = random.choice(
        [b"a\0b.jpg", b"a\nb.jpg", b"\xff\xfe.jpg", b"\x1b[2J.jpg", b"x" * 2000 + b".jpg", b"\xed\xa0\x80.jpg"]
    )
    data = packed(samples(random), end=False) + pax({b"path": name}) + packed([member("x.jpg", b"x")])
    return Hostile("odd names", data, TarReason.BAD_NAME)


def keyless_names(random: random.Random) -> Hostile:
    name = random.choice(["README", ".hidden", "d/.jpg", "d/noext", "__meta__", "."])
    return Hostile("keyless names", packed([*samples(random), member(name, b"x")]), TarReason.NO_KEY)


def pax_bomb(random: random.Random) -> Hostile:
    choice = random.randrange(5)
    if choice == 0:  # each header is below the limit, all of them in front of one member are not
        data = b"".join(pax({b"k%d" % n: bytes(400_000)}) for n in range(8))
    elif choice == 1:  # a million bytes of the smallest records
        data = pax(b"5 a=\n" * 200_000)
    elif choice == 2:
        data = raw_header(b"x", b"00077777777\0", random.choice([b"x", b"g", b"L", b"K"])) + bytes(4096)
    elif choice == 3:
        data = b"".join(pax({b"path": b"d/%d.jpg" % n}) for n in range(500))
    else:
        data = pax(
            random.choice(
                [
                    b"9999 path=x\n",
                    b"0 path=x\n",
                    b"path=x\n",
                    b"12 path=abc",
                    b"\xff" * 700,
                    b"99999999999999999999 a=b\n",
                ]
            )
        )
    return Hostile("pax bomb", packed(samples(random), end=False) + data + packed([member("9999.jpg", b"x")]))


def no_image(random: random.Random) -> Hostile:
    members = random.choice([[member("n.cls", b"1")], [member("n.txt", b"x"), member("n.seg.png", b"x")]])
    return Hostile("no image", packed([*samples(random), *members]), TarReason.NO_IMAGE)


def two_images(random: random.Random) -> Hostile:
    members = [member("n.jpg", b"1"), member("n.png", b"2")]
    return Hostile("two images", packed([*samples(random), *members]), TarReason.SEVERAL_IMAGES)


def bad_metadata(random: random.Random) -> Hostile:
    suffix, content = random.choice(
        [
            *(("cls", data) for data in (b"\xff\xfe", b"1" * 5000, b"a\0b", "\u202e".encode())),
            *(("json", data) for data in (b"{", b"[" * 100_000, b'{"label": {}}', b"\xff", b"1" * 9000)),
            *(("json", data) for data in (b'{"label": 1.5}', b'{"labels": [NaN]}', b'{"label": [[1]]}')),
            ("json", b'{"x": "' + b"y" * (1 << 20) + b'"}'),
        ]
    )
    members = [member("m.jpg", b"1"), member(f"m.{suffix}", content)]
    return Hostile("bad metadata", packed([*samples(random), *members]), TarReason.BAD_METADATA)


def metadata_without_a_label(random: random.Random) -> Hostile:
    suffix, content = random.choice(
        [
            *(("cls", data) for data in (b"", b"\n", b" " * 10)),
            *(("json", data) for data in (b"[1]", b'"x"', b"null", b'{"label": ""}', b'{"labels": [null, ""]}')),
        ]
    )
    members = [member("m.jpg", b"1"), member(f"m.{suffix}", content)]
    return Hostile("metadata without a label", packed([*samples(random), *members]))


def huge_label(random: random.Random) -> Hostile:
    members = [member("m.jpg", b"1"), member("m.cls", random.choice([b"9" * 30, b"-1", b"99999999", "⁷".encode()]))]
    return Hostile("odd label", packed([*samples(random), *members]))


def tiny_members(random: random.Random) -> Hostile:
    blocks = [raw_header(b"%05d.jpg" % number, b"00000000001\0") + b"x" + bytes(511) for number in range(10_000)]
    return Hostile("10,000 tiny members", b"".join(blocks) + bytes(1024))


def noise(random: random.Random) -> Hostile:
    size = random.choice([0, 1, 511, 512, 513, 5000])
    data = random.choice([random.randbytes(size), b"PK\x03\x04" + random.randbytes(size), b"\x1f\x8b" + bytes(size)])
    return Hostile("noise", data)


HARMS: list[Callable[[random.Random], Hostile]] = [
    *(cut, cut_at_a_member, flipped, overwritten, spliced, joined),
    *(negative_size, huge_size, huge_pax_size, no_number),
    *(duplicate_keys, duplicate_member, interleaved, links, devices, sparse),
    *(unsafe_names, odd_names, keyless_names, pax_bomb),
    *(no_image, two_images, bad_metadata, metadata_without_a_label, huge_label, noise),
]
RANDOM = [cut, flipped, overwritten, spliced]
"""Harms whose effect is drawn rather than made; half of all tars have one of them."""


def hostile_tar(seed: int, number: int) -> Hostile:
    draw = random.Random(f"{seed} tar {number}")
    if number % 500 == 0:
        return tiny_members(draw)
    return draw.choice(RANDOM if draw.random() < 0.5 else HARMS)(draw)


def stock_members(data: bytes) -> list[tuple[str, bytes]]:
    """The plain files that Python's own reader finds in a stream before it ends or breaks: a second opinion."""
    found = []
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r|") as archive:
            for info in archive:
                stream = archive.extractfile(info) if info.isreg() else None
                if stream is not None and not info.issparse() and info.size < len(data):
                    found.append((info.name, stream.read()))
                archive.members = []  # type: ignore[attr-defined]
    except (
        tarfile.TarError,
        OSError,
        ValueError,
        struct.error,
        EOFError,
        OverflowError,
        AttributeError,
        RecursionError,
    ):
        pass  # RecursionError: it calls itself for each extended header in a row
    return found
