"""What a SOURCE of `ingest --adopt` names: a folder of tars, one of them, or a pattern in braces."""

from pathlib import Path

import pytest

from pipelines.errors import InputError
from pipelines.ingest.tarlists import list_tars


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in (*(f"t-{number:02d}.tar" for number in range(12)), "val.tar", "train 0 (1).tar", "laion+en=1.tar", "x"):
        (tmp_path / "wds" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "wds" / name).write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "wds"


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("wds/val.tar", ["val.tar"]),
        ("wds/t-{03..05}.tar", ["t-03.tar", "t-04.tar", "t-05.tar"]),
        ("wds/t-{09..10}.tar", ["t-09.tar", "t-10.tar"]),
        ("wds/t-0{0..2}.tar", ["t-00.tar", "t-01.tar", "t-02.tar"]),
        ("wds/t-{0,1}{1..1}.tar", ["t-01.tar", "t-11.tar"]),
        ("wds/{val,t-00}.tar", ["t-00.tar", "val.tar"]),
        ("wds/{val,val}.tar", ["val.tar"]),
        ("wds/train 0 (1).tar", ["train 0 (1).tar"]),
        ("{wds}/laion+en=1.tar", ["laion+en=1.tar"]),
    ],
)
def test_tars_that_are_named(source: str, names: list[str], folder: Path) -> None:
    origin, found = list_tars(source)
    assert (origin.uri, found) == (str(folder), names)
    assert list_tars("wds")[1] == sorted(path.name for path in folder.glob("*.tar"))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("wds/none.tar", r"wds/none\.tar does not exist"),
        ("nowhere/none.tar", r"nowhere/none\.tar does not exist"),
        ("wds/t-{00..12}.tar", r"wds/t-12\.tar does not exist"),
        ("wds/t-{05..03}.tar", r"\{05\.\.03\} is to count up"),
        ("wds/t-{0..99999999}.tar", "at most 1000000 tars"),
        ("wds/t-{0..9}{0..9}{0..9}{0..9}{0..9}{0..9}{0..9}.tar", "at most 1000000 tars"),
        ("wds/t-{0{1,2}}.tar", "braces that do not lie in one another"),
        ("{wds,other}/val.tar", "tars of 2 folders"),
        ("wds/{t,u}", r"does not name \.tar files"),
        ("wds/x", r"holds no \.tar file"),
    ],
)
def test_what_names_no_tars(source: str, message: str, folder: Path) -> None:
    with pytest.raises(InputError, match=message):
        list_tars(source)


def test_names_are_taken_as_they_are_where_they_are_there(folder: Path) -> None:
    (folder / "odd{a,b}").mkdir()
    (folder / "odd{a,b}" / "val.tar").write_bytes(b"")
    (folder / "like.tar").mkdir()
    (folder / "like.tar" / "inside.tar").write_bytes(b"")
    assert list_tars("wds/odd{a,b}")[1] == ["val.tar"]
    assert list_tars("wds/like.tar")[1] == ["inside.tar"]
