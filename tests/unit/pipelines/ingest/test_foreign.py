"""Samples of tars that others wrote: what is skipped with its reason, and where labels come from."""

import tarfile
from pathlib import Path

import pytest

from pipelines.config.settings import Config, IngestSettings
from pipelines.encode.shard import _metadata_fields, _metadata_text
from pipelines.errors import Degraded, FingerprintMismatch, InputError
from pipelines.ingest.adopt import Adoption, adopt, read_class_names
from pipelines.shards.shards import open_shards
from pipelines.verify.verify import verify
from tests.support.foreign import IMAGES, numbered, read_all, skipped, write_foreign
from tests.support.runs import run_record

# Names whose characters are held together by one that has no width.
PERSIAN, SCIENTIST = "\u0645\u06cc\u200c\u062e", "\U0001f469\u200d\U0001f52c"


# ---------------------------------------------------------------------------------------------------- what is skipped


def test_what_cannot_be_taken_is_named_with_its_reason_and_counted(tmp_path: Path) -> None:
    good = numbered(0, 2)
    write_foreign(
        tmp_path / "a.tar",
        {
            **good,
            "apart.jpg": IMAGES[0],
            "between.jpg": IMAGES[1],
            "apart.cls": b"0",
            "only.cls": b"1",
            "two.jpg": IMAGES[0],
            "two.png": IMAGES[0],
            "../up.jpg": IMAGES[0],
            "/abs.jpg": IMAGES[0],
            "README": b"x",
            "odd.jpg": IMAGES[0],
            "odd.json": b"[",
            "new\nline.jpg": IMAGES[0],
        },
    )
    with tarfile.open(tmp_path / "a.tar", "a") as archive:
        for name, kind in (
            ("soft.jpg", tarfile.SYMTYPE),
            ("hard.jpg", tarfile.LNKTYPE),
            ("pipe.jpg", tarfile.FIFOTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
    write_foreign(tmp_path / "b.tar", {**numbered(1, 2), "last.jpg": IMAGES[0]}, end=False)
    result = adopt(str(tmp_path), str(tmp_path), allow_degraded=True).as_json()
    assert [sample.record.key for sample in read_all(tmp_path)] == ["00000", "00001", "between", "00002"]
    assert skipped(result) == {
        "a.tar: apart": "interleaved",
        "a.tar: only": "no_image",
        "a.tar: two": "several_images",
        "a.tar: ../up": "unsafe_name",
        "a.tar: /abs": "unsafe_name",
        "a.tar: README": "no_key",
        "a.tar: odd": "bad_metadata",
        "a.tar: new\nline": "bad_name",
        "a.tar: soft": "link",
        "a.tar: hard": "link",
        "a.tar: pipe": "special",
        "b.tar: 00001": "duplicate_key",
        "b.tar: last": "truncated",
        "b.tar": "truncated",
    }
    assert result["found"] == 18 and result["skipped"] == 14
    assert result["skipped_reasons"]["link"] == 2 and sum(result["skipped_reasons"].values()) == 14
    record = run_record(tmp_path)
    assert record["skipped_files"] == result["skipped_files"] and record["skipped_reasons"] == result["skipped_reasons"]
    verify(str(tmp_path))


def test_names_are_cut_to_a_thousand_but_counts_are_not(tmp_path: Path) -> None:
    write_foreign(tmp_path / "a.tar", {**numbered(0, 1), **{f"x{number}.txt": b"" for number in range(1500)}})
    result = adopt(str(tmp_path), str(tmp_path), allow_degraded=True).as_json()
    assert (result["skipped"], len(result["skipped_files"])) == (1500, 1000)
    assert result["skipped_reasons"] == {"no_image": 1500}


def test_keys_that_begin_anew_in_each_tar_can_be_told_apart(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_foreign(tmp_path / "in" / f"{name}.tar", numbered(0, 3))
    with pytest.raises(Degraded, match=r"3 of 6 pictures .*duplicate_key 3; .*--keys-by-tar tells equal keys"):
        adopt(str(tmp_path / "in"), str(tmp_path / "plain"))
    assert not (tmp_path / "plain").exists()
    plain = adopt(str(tmp_path / "in"), str(tmp_path / "plain"), allow_degraded=True).as_json()
    assert (plain["status"], plain["skipped_reasons"]) == ("degraded", {"duplicate_key": 3})
    more = Config(ingest=IngestSettings(skip_budget=0.5))
    assert adopt(str(tmp_path / "in"), str(tmp_path / "plain"), config=more).status == "unchanged"
    result = adopt(str(tmp_path / "in"), str(tmp_path / "out"), Adoption(keys_by_tar=True)).as_json()
    assert result["samples"] == 6
    assert [sample.record.key for sample in read_all(tmp_path / "out")][2:4] == ["a/00002", "b/00000"]


def test_a_tar_without_a_sample_is_named_and_is_no_part(wds: Path) -> None:
    (wds / "empty.tar").write_bytes(bytes(10240))
    (wds / "noise.tar").write_bytes(b"x" * 2000)
    result = adopt(str(wds), str(wds), allow_degraded=True).as_json()
    assert skipped(result) == {"noise.tar": "bad_header"}
    assert result["tars"] == 2 and len(open_shards(str(wds)).shards) == 2


# ------------------------------------------------------------------------------------------------------------ classes


@pytest.mark.parametrize(
    ("members", "classes", "labels"),
    [
        ({"a.cls": b"2", "b.cls": b" 0\n"}, ["0", "1", "2"], [(2,), (0,)]),
        ({"a.cls": b"007", "b.cls": b"7"}, ["007", "7"], [(0,), (1,)]),
        ({"a.json": b'{"label": "owl"}', "b.json": b'{"labels": ["cat", "owl"]}'}, ["cat", "owl"], [(1,), (0, 1)]),
        ({"a.json": b'{"labels": [1, 1, 0]}', "b.json": b"{}"}, ["0", "1"], [(1, 0), ()]),
        ({"a.cls": b"1", "a.json": b'{"label": 0}', "b.cls": b"0"}, ["0", "1"], [(1,), (0,)]),
        ({"a.cls": b"100000", "b.cls": b"5"}, ["100000", "5"], [(0,), (1,)]),
        ({"a.cls": b"3", "b.cls": "\u0663".encode()}, ["3", "\u0663"], [(0,), (1,)]),
        ({}, [], [(), ()]),
        ({"a.json": b'{"label": 3.0}', "b.json": b'{"label": 0.0}'}, ["0", "1", "2", "3"], [(3,), (0,)]),
        ({"a.json": b'{"label": true}', "b.json": b'{"label": false}'}, ["false", "true"], [(1,), (0,)]),
        ({"a.cls": b"", "b.cls": b" \n"}, [], [(), ()]),
        ({"a.json": b'{"label": ""}', "b.json": b'{"labels": ["", null, "owl"]}'}, ["owl"], [(), (0,)]),
        ({"a.cls": PERSIAN.encode(), "b.cls": SCIENTIST.encode()}, [PERSIAN, SCIENTIST], [(0,), (1,)]),
        (
            {"a.cls": "big\u00a0cat".encode(), "b.cls": "\U0001fae8".encode()},
            ["big\xa0cat", "\U0001fae8"],
            [(0,), (1,)],
        ),
        ({"a.cls": b"\xef\xbb\xbf1", "b.cls": b"0"}, ["0", "1"], [(1,), (0,)]),
        # Boxes in a list say nothing of a class, and beside a class they are not even parsed.
        ({"a.cls": b"1", "a.json": b"[[1, 2]]", "b.cls": b"0", "b.json": b"{"}, ["0", "1"], [(1,), (0,)]),
        ({"a.json": b"[[1, 2]]", "b.json": b'{"label": 0}'}, ["0"], [(), (0,)]),
    ],
)
def test_labels_come_from_cls_or_json(
    members: dict[str, bytes], classes: list[str], labels: list[tuple[int, ...]], tmp_path: Path
) -> None:
    both = {"a.jpg": IMAGES[0], "b.jpg": IMAGES[1], **members}
    write_foreign(tmp_path / "x.tar", dict(sorted(both.items())))
    result = adopt(str(tmp_path), str(tmp_path)).as_json()
    assert result["classes"] == classes
    assert [sample.record.labels for sample in read_all(tmp_path)] == labels
    verify(str(tmp_path))


@pytest.mark.parametrize(
    ("member", "content", "detail"),
    [
        ("json", b'{"label": 1.5}', "the label 1.5 is neither a text nor true or false nor a whole number"),
        ("json", b'{"label": {"id": 3}}', 'the label {"id": 3} is neither'),
        ("json", b'{"label": NaN}', "the label NaN is neither"),
        ("json", b"[1", "its json is not JSON"),
        ("json", b"\xff", "its json is not UTF-8"),
        ("json", b'{"label": "a\\tb"}', "the label 'a\\tb' holds the character U+0009"),
        ("cls", "cat\u202egod".encode(), "the label 'cat\\u202egod' holds the character U+202E"),
        ("cls", b"x" * 201, "has more than 200 characters"),
        ("cls", b" " * (1 << 20) + b"1", "its cls has more than 1048576 bytes"),
    ],
)
def test_a_label_that_is_refused_is_named_with_its_value(
    member: str, content: bytes, detail: str, tmp_path: Path
) -> None:
    write_foreign(tmp_path / "x.tar", {"a.jpg": IMAGES[0], f"a.{member}": content, "b.jpg": IMAGES[1]})
    result = adopt(str(tmp_path), str(tmp_path), Adoption(), allow_degraded=True).as_json()
    assert skipped(result) == {"x.tar: a": "bad_metadata"} and detail in result["skipped_files"][0]["detail"]
    assert run_record(tmp_path)["skipped_files"] == result["skipped_files"]


def test_json_of_which_no_label_is_asked_costs_its_metadata_at_most(tmp_path: Path) -> None:
    members = {"a.jpg": IMAGES[0], "a.json": b"[3]", "b.jpg": IMAGES[1], "b.json": b"{" + b" " * (1 << 20)}
    write_foreign(tmp_path / "x.tar", members)
    result = adopt(str(tmp_path), str(tmp_path), Adoption(fields=())).as_json()
    assert (result["samples"], result["skipped"]) == (2, 0)
    assert [sample.metadata for sample in read_all(tmp_path)] == [b"[3]", None]
    verify(str(tmp_path))


def test_a_json_that_is_no_object_carries_nothing_into_the_codes() -> None:
    fields = [_metadata_fields(data) for data in (b'{"age": 3}', b"[3]", b"null", b"{", b"[" * 100_000, b"\xff", None)]
    assert fields == [{"age": 3}, {}, {}, {}, {}, {}, {}]
    assert [_metadata_text(value) for value in ("x", {"b": 1}, "\ud83d", None)] == ["x", '{"b": 1}', "?", None]


def test_the_image_among_several_can_be_named(tmp_path: Path) -> None:
    members = {"a.input.JPG": IMAGES[0], "a.mask.png": IMAGES[1], "a.cls": b"1", "b.jpg": IMAGES[2], "b.png": IMAGES[3]}
    write_foreign(tmp_path / "in" / "x.tar", members)
    with pytest.raises(InputError, match=r"no sample that can be taken .*its members: .*--image-member SUFFIX"):
        adopt(str(tmp_path / "in"), str(tmp_path / "none"))
    for name, key in (("input.jpg", "a"), (".png", "b")):
        out = tmp_path / name
        result = adopt(str(tmp_path / "in"), str(out), Adoption(image_member=name), allow_degraded=True).as_json()
        assert result["samples"] == 1 and result["skipped_reasons"] == {"no_image": 1}
        (sample,) = read_all(out)
        assert sample.record.key == key and sample.image == members[sample.record.members[0].name]
        verify(str(out))
    with pytest.raises(FingerprintMismatch):
        adopt(str(tmp_path / "in"), str(tmp_path / "input.jpg"), Adoption(image_member="png"), allow_degraded=True)


def test_the_label_beside_a_named_image_may_have_a_name_too(tmp_path: Path) -> None:
    members = {
        **{"a.input.jpg": IMAGES[0], "a.output.cls": b"1"},
        **{"b.input.jpg": IMAGES[1], "b.seg.cls": b"5", "b.cls": b"0"},  # the plain one states it
        **{"c.input.jpg": IMAGES[2], "c.seg.cls": b"5", "c.output.cls": b"1"},  # none says which
        **{"d.input.jpg": IMAGES[3], "d.seg.cls": b"x" * (1 << 21)},  # too large for a label
    }
    write_foreign(tmp_path / "in" / "x.tar", members)
    result = adopt(str(tmp_path / "in"), str(tmp_path / "out"), Adoption(image_member="input.jpg")).as_json()
    assert (result["samples"], result["skipped"]) == (4, 0)
    labels = {sample.record.key: sample.record.labels for sample in read_all(tmp_path / "out")}
    assert labels == {"a": (1,), "b": (0,), "c": (), "d": ()}
    verify(str(tmp_path / "out"))


def test_what_is_not_there_is_named(wds: Path, tmp_path: Path) -> None:
    for source, said in (
        (tmp_path / "nowhere", "nowhere does not exist"),
        (wds / "*.tar", r"give the folder for all its tars, or a pattern"),
        (wds / "x.tar.gz", "x.tar.gz is compressed"),
    ):
        with pytest.raises(InputError, match=said):
            adopt(str(source), str(tmp_path / "out"))


def test_a_member_that_nobody_reads_costs_no_sample(tmp_path: Path) -> None:
    write_foreign(tmp_path / "x.tar", {"a.jpg": IMAGES[0], "a.cls": b"0"})
    with tarfile.open(tmp_path / "x.tar", "a") as archive:
        link = tarfile.TarInfo("a.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "b.txt"
        archive.addfile(link)
    result = adopt(str(tmp_path), str(tmp_path)).as_json()
    assert (result["samples"], skipped(result)) == (1, {"x.tar: a.txt": "link"})


def test_a_field_of_the_json_can_be_named_and_labels_can_be_left_out(tmp_path: Path) -> None:
    facts = b'{"species": "lynx", "age": 3, "labels": [9]}'
    write_foreign(tmp_path / "in" / "x.tar", {"a.jpg": IMAGES[0], "a.json": facts, "a.cls": b"5"})
    named = adopt(str(tmp_path / "in"), str(tmp_path / "named"), Adoption(fields=("species", "age"))).as_json()
    assert named["classes"] == ["3", "lynx"]
    left_out = adopt(str(tmp_path / "in"), str(tmp_path / "out"), Adoption(fields=())).as_json()
    assert left_out["classes"] == [] and read_all(tmp_path / "out")[0].record.labels == ()


def test_a_file_names_the_classes_by_number(wds: Path, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("cat\ndog\nowl\nyak\n\n")
    names = read_class_names(tmp_path / "names.txt")
    result = adopt(str(wds), str(tmp_path / "out"), Adoption(classes=names)).as_json()
    assert result["classes"] == ["cat", "dog", "owl", "yak"]
    assert [sample.record.labels for sample in read_all(tmp_path / "out")][:3] == [(0,), (1,), (2,)]
    with pytest.raises(InputError, match="'2' is not among the 2 classes given"):
        adopt(str(wds), str(tmp_path / "short"), Adoption(classes=("cat", "dog")))


@pytest.mark.parametrize("text", ["", "a\n\nb\n", "a\na\n", "\xff"])
def test_class_files_that_cannot_be_used(text: str, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=r"names\.txt"):
        read_class_names(tmp_path / "names.txt")
    with pytest.raises(InputError, match=r"nowhere"):
        read_class_names(tmp_path / "nowhere")
