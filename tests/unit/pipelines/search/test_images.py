"""Queries by image: files, folders, patterns and URLs, with real folders and a real server on loopback."""

import json
import os
import sys

import pytest

from pipelines.__main__ import run_command_line
from pipelines.config.settings import Config, SearchSettings
from pipelines.errors import InputError
from pipelines.report.pictures import LARGE_SIDE, thumbnail
from pipelines.search.search import SearchLimits, search
from tests.support.pictures import jpeg, picture, png
from tests.support.web import body, endless, redirect, web_server

CONFIG = Config(search=SearchSettings(k=4))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Pictures in several folders, and what lies about among them."""
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "photos"
    names = ["b.jpg", "a.PNG", "trip/c.jpg", "trip/deep/d.jpeg", "[x]/e.jpg"]
    hidden = [".h.jpg", ".thumbs/t.jpg", "@eaDir/u.jpg", "trip/.v/w.jpg"]
    for number, name in enumerate(names + hidden):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(picture(1, number)) if name.endswith("PNG") else jpeg(picture(1, number)))
    (root / "notes.txt").write_text("not a picture")
    (root / "trip" / "round").symlink_to(root)
    return root


def names_of(answer):
    return [entry["query"] for entry in answer.results]


def test_a_folder_means_its_pictures_and_those_below_in_order(folder, with_model):
    answer = search(with_model[0], CONFIG, images=["photos"])
    assert names_of(answer) == [f"photos/{name}" for name in ("[x]/e.jpg", "a.PNG", "b.jpg", "trip/c.jpg")] + [
        "photos/trip/deep/d.jpeg"
    ]
    assert answer.status == "done" and "skipped" not in answer.as_json()
    assert {entry["by"] for entry in answer.results} == {"image"}
    assert names_of(search(with_model[0], CONFIG, images=["photos/.thumbs"])) == ["photos/.thumbs/t.jpg"]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("photos/*.jpg", ["b.jpg"]),
        ("photos/*.[jP]*", ["a.PNG", "b.jpg"]),
        ("photos/**/*.jpg", ["[x]/e.jpg", "b.jpg", "trip/c.jpg"]),
        ("photos/t*p", ["trip/c.jpg", "trip/deep/d.jpeg"]),
        ("ph?tos/*", ["[x]/e.jpg", "a.PNG", "b.jpg", "trip/c.jpg", "trip/deep/d.jpeg"]),
        ("photos/[x]/e.jpg", ["[x]/e.jpg"]),
        ("photos/[x]", ["[x]/e.jpg"]),
    ],
)
def test_a_pattern_means_the_pictures_that_it_matches(folder, with_model, pattern, names):
    answer = search(with_model[0], CONFIG, images=[pattern])
    assert [name.removeprefix("photos/") for name in names_of(answer)] == names
    absolute = search(with_model[0], CONFIG, images=[str(folder.parent / pattern)])
    assert names_of(absolute) == [str(folder / name) for name in names]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("photos/*.webp", r"photos/\*\.webp matches no image: give files with an image's suffix, such as \.jpg"),
        ("photos/n*.txt", r"photos/n\*\.txt matches no image"),
        ("photos/.h*", r"photos/\.h\* matches no image"),
        ("nowhere/*.jpg", r"nowhere/\*\.jpg matches no image"),
        ("photos/**c.jpg", r"photos/\*\*c\.jpg is not a valid pattern: \*\* stands for whole folders"),
        ("empty", "empty holds no image: give files"),
        ("photos/z.jpg", "photos/z.jpg does not exist: name an image file, a folder of images or a pattern"),
        ("photos/notes.txt", "photos/notes.txt cannot be decoded: not_an_image"),
        ("photos/b.jpg/c.jpg", "photos/b.jpg/c.jpg cannot be read: Not a directory"),
        ("~nobody-of-that-name/x.jpg", "~nobody-of-that-name/x.jpg: .*: write the path without ~"),
        (
            "ftp://host/x.jpg",
            r"ftp://\.\.\. is no image: give a path, or a URL that begins with http, https, file or s3",
        ),
        ("file://host/x.jpg", "file://host/x.jpg names another machine: write file:///path"),
        (
            "http://me:pass@host/x.jpg",
            r"^http://\.\.\.@\.\.\. carries credentials: give a URL without user and password",
        ),
        ("http://host:pass/x.jpg", r"^http://\.\.\. is not a valid URL: write http://host/path"),
        ("https:///x.jpg", "https:///x.jpg names no file: write https://host/path"),
        ("s3://bucket", "s3://bucket names no file: write s3://bucket/path"),
    ],
)
def test_a_value_that_means_no_image_is_refused_in_one_line(folder, with_model, value, words):
    (folder.parent / "empty").mkdir()
    with pytest.raises(InputError, match=words) as caught:
        search(with_model[0], CONFIG, images=["photos/b.jpg", value])
    assert "\n" not in str(caught.value)


def test_a_file_url_is_a_local_path(folder, with_model):
    (folder / "b.jpg").rename(folder / "my cat?.jpg")
    url = f"file://{folder}/my%20cat%3F.jpg"
    assert names_of(search(with_model[0], CONFIG, images=[url])) == [url]
    assert len(search(with_model[0], CONFIG, images=[f"file://localhost{folder}/trip"]).results) == 2


def broken(folder):
    (folder / "bad.jpg").write_text("not a picture")
    (folder / "cut.jpg").write_bytes(jpeg(picture(1, 77, size=128))[:900])
    (folder / "gone.jpg").symlink_to(folder / "nowhere.jpg")
    os.mkfifo(folder / "pipe.jpg")
    return {"bad.jpg": "not_an_image", "cut.jpg": "truncated", "gone.jpg": "unreadable", "pipe.jpg": "unreadable"}


def test_found_pictures_that_cannot_be_used_are_skipped_named_and_exit_4(folder, with_model, monkeypatch, capsys):
    reasons = broken(folder)
    monkeypatch.setattr(
        sys, "argv", ["hhnet", "search", "--index", with_model[0], "--image", "photos", "-k", "2", "--json"]
    )
    with pytest.raises(SystemExit) as ended:
        run_command_line()
    answer = json.loads(capsys.readouterr().out)
    assert ended.value.code == 4 and answer["status"] == "degraded" and len(answer["results"]) == 5
    assert {entry["path"]: entry["reason"] for entry in answer["skipped"]} == {
        f"photos/{name}": reason for name, reason in reasons.items()
    }
    text = search(with_model[0], CONFIG, images=["photos"], html="found.html").as_text()
    assert "skipped  photos/gone.jpg: unreadable, No such file or directory" in text
    assert "skipped  photos/pipe.jpg: unreadable, not a plain file" in text
    page = (folder.parent / "found.html").read_text()
    assert "Images that cannot be used were skipped (4): photos/bad.jpg, photos/cut.jpg, photos/gone.jpg" in page


def test_where_none_can_be_used_or_a_named_one_cannot_the_search_is_refused(folder, with_model):
    broken(folder)
    with pytest.raises(
        InputError, match=r"none of the 2 images can be used, the first is photos/bad\.jpg: not_an_image"
    ):
        search(with_model[0], CONFIG, images=["photos/bad.*", "photos/c*.jpg"])
    with pytest.raises(InputError, match=r"photos/cut\.jpg cannot be decoded: truncated"):
        search(with_model[0], CONFIG, images=["photos/trip", "photos/cut.jpg"])


def test_too_many_pictures_are_refused_before_one_is_read(folder, with_model):
    broken(folder)
    with pytest.raises(InputError, match="9 queries with 2 neighbours each are too many for one answer"):
        search(with_model[0], CONFIG, images=["photos"], k=2, limits=SearchLimits(answer=17))


def test_many_pictures_are_answered_in_their_order(tmp_path, with_model):
    for number in range(70):  # more than the model encodes at a time
        (tmp_path / "many").mkdir(exist_ok=True)
        (tmp_path / "many" / f"{number:03d}.png").write_bytes(png(picture(number % 3, number)))
    results = search(with_model[0], CONFIG, images=[str(tmp_path / "many")], k=1).results
    found = [entry["neighbours"][0]["labels"] for entry in results]
    assert len(found) == 70 and len({label for [label] in found}) == 3
    assert all(found[number] == found[number % 3] for number in range(70))


def test_pictures_come_from_a_web_server(tmp_path, with_model, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    data = jpeg(picture(1, 77, size=200))
    answers = {
        "/cat.jpg": body(data),
        "/get?id=7": body(data, kind="application/octet-stream"),
        "/moved.jpg": redirect("/cat.jpg"),
        "/page.jpg": body(b"<html>sign in</html>", kind="text/html"),
        "/cut.jpg": body(data[:900]),
        "/endless.jpg": endless,
        "/loop.jpg": redirect("/loop.jpg"),
        "/busy.jpg": body(b"", 503),
    }
    with web_server(answers) as server:
        urls = [f"{server}/cat.jpg", f"{server}/get?id=7", f"{server}/moved.jpg"]
        answer = search(with_model[0], CONFIG, images=urls, html=str(tmp_path / "found.html"))
        assert names_of(answer) == urls and answer.status == "done"
        assert all(entry["neighbours"][0]["labels"] == ["dog"] for entry in answer.results)
        page = (tmp_path / "found.html").read_text()
        assert page.count(thumbnail(data, LARGE_SIDE)) == 3 and f"{server}/get?id=7" in page

        refusals = {
            "none.jpg": "404 Not Found: check the address",
            "page.jpg": "cannot be decoded: not_an_image",
            "cut.jpg": "cannot be decoded: truncated",
            "endless.jpg": "cannot be decoded: too_large, the limit for an image is 67,108,864 bytes",
            "loop.jpg": "redirects more than 5 times",
        }
        for name, words in refusals.items():
            with pytest.raises(InputError, match=f"^{server}/{name}:? .*{words}"):
                search(with_model[0], CONFIG, images=[urls[0], f"{server}/{name}"])
        monkeypatch.setattr(sys, "argv", ["hhnet", "search", "--index", with_model[0], "--image", f"{server}/busy.jpg"])
        with pytest.raises(SystemExit) as ended:
            run_command_line()
        assert ended.value.code == 3
