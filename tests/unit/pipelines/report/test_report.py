import base64
import io

import numpy as np
import pytest
from jinja2 import UndefinedError
from PIL import Image

from pipelines.report import page, plots
from pipelines.report.pictures import SampleLocation, find_pictures, thumbnail
from pipelines.shards.shards import open_shards
from pipelines.study.grid import Description
from pipelines.study.page import study_page
from pipelines.study.results import Trial
from tests.support.codes import codes_of_shards, write_shards
from tests.support.pictures import jpeg, picture, png


def opened(uri):
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def test_small_pictures_stay_as_they_are():
    pixels = picture(0, 0, size=28)
    uri = thumbnail(png(pixels))
    assert uri.startswith("data:image/png;base64,")
    np.testing.assert_array_equal(np.asarray(opened(uri)), pixels)


def test_large_pictures_shrink_and_keep_their_shape():
    uri = thumbnail(jpeg(np.zeros((300, 900, 3), np.uint8)))
    assert uri.startswith("data:image/jpeg;base64,") and opened(uri).size == (128, 43)


@pytest.mark.parametrize("data", [b"", b"not an image", jpeg(picture(0, 0))[:200]])
def test_what_does_not_decode_has_no_thumbnail(data):
    assert thumbnail(data) is None


def test_pictures_come_from_their_place_in_the_tar(tmp_path):
    uri = write_shards(tmp_path, "shard")
    pictures = find_pictures([codes_of_shards(tmp_path / "codes", uri)], ())
    shard = open_shards(uri).shards[1]
    places = [SampleLocation(shard.part.sha256, row) for row in (7, 0, 7)]
    found = pictures.get([*places, SampleLocation("0" * 64, 0), SampleLocation(shard.part.sha256, 10_000)])
    assert set(found) == set(places) and not pictures.problems
    for place in places:
        (sample,) = open_shards(uri).read(shard, [place.row])
        np.testing.assert_array_equal(
            np.asarray(opened(found[place])), np.asarray(Image.open(io.BytesIO(sample.image)))
        )


def test_named_shards_must_open_but_remembered_ones_may_be_gone(tmp_path):
    codes = codes_of_shards(tmp_path / "codes", write_shards(tmp_path, "shard"))
    (tmp_path / "shard").rename(tmp_path / "elsewhere")
    pictures = find_pictures([codes], ())
    assert len(pictures.problems) == 1 and "holds no committed shards" in pictures.problems[0]
    elsewhere = open_shards(str(tmp_path / "elsewhere"))
    needed = {shard.part.sha256 for shard in elsewhere.shards}
    assert find_pictures([codes], [elsewhere], needed).problems == []
    assert len(find_pictures([codes], [elsewhere], {*needed, "0" * 64}).problems) == 1


def test_remembered_shards_that_became_others_are_not_shown(tmp_path):
    codes = codes_of_shards(tmp_path / "codes", write_shards(tmp_path, "shard"))
    (tmp_path / "shard").rename(tmp_path / "gone")
    (tmp_path / "other").mkdir()
    write_shards(tmp_path / "other", "shard", seed=5)
    (tmp_path / "other" / "shard").rename(tmp_path / "shard")
    assert "was made from shards" in find_pictures([codes], ()).problems[0]


CURVES = {
    "pr": lambda: plots.pr_curve([0.0, 0.9, 0.5], [0.0, 0.4, 1.0], 0.1),
    "pr without a hit": lambda: plots.pr_curve([0.0, 0.0], [0.0, 0.0], 0.0),
    "at n": lambda: plots.precision_at_n([1, 10, 100], [0.9, 0.8, 0.4], 0.1),
    "at n of one": lambda: plots.precision_at_n([1], [0.9], 0.1),
    "distances": lambda: plots.distance_histogram([0.5, 0.5, 0.0], [0.0, 0.2, 0.8]),
    "balance": lambda: plots.bit_balance([0.0, 0.5, 0.9], [0.0, 1.0, 0.47]),
    "balance of many": lambda: plots.bit_balance([0.5] * 256, [1.0] * 256),
    "correlation": lambda: plots.bit_correlation(np.array([[1.0, -0.5], [-0.5, 1.0]])),
    "correlation of one": lambda: plots.bit_correlation(np.array([[1.0]])),
    "buckets": lambda: plots.bucket_sizes([(1, 1, 0.5), (2, 3, 0.5)]),
    "buckets of many": lambda: plots.bucket_sizes([(1 << n, (2 << n) - 1, 0.05) for n in range(20)]),
    "within": lambda: plots.code_distances([0.2, 0.8], [0.1, 0.9], 1),
    "within of one": lambda: plots.code_distances([], [], 1),
    "learning": lambda: plots.learning_curve([1, 2, 3], [2.0, 1.0, 0.5], [None, 0.3, 0.4]),
    "learning without validation": lambda: plots.learning_curve([1], [2.0], [None]),
    "drift": lambda: plots.bit_drift([0.3, -0.1], [0.1, 0.2]),
    "drift of nothing": lambda: plots.bit_drift([0.0], [0.0]),
}


@pytest.mark.parametrize("name", CURVES)
def test_plots_are_equal_to_the_byte(name):
    first = CURVES[name]()
    assert first == CURVES[name]()
    image = Image.open(io.BytesIO(first))
    assert image.format == "PNG" and image.size[0] > 600 and "Software" not in image.info
    assert image.getextrema()[3] == (0, 255)  # ink on a transparent ground


def test_plots_show_the_figures():
    assert CURVES["pr"]() != plots.pr_curve([0.0, 0.9, 0.6], [0.0, 0.4, 1.0], 0.1)
    assert CURVES["at n"]() != plots.precision_at_n([1, 10, 100], [0.9, 0.8, 0.4], 0.2)
    assert CURVES["balance"]() != plots.bit_balance([0.0, 0.5, 0.9], [0.0, 1.0, 0.6])
    assert CURVES["correlation"]() != plots.bit_correlation(np.array([[1.0, 0.5], [0.5, 1.0]]))
    assert CURVES["buckets"]() != plots.bucket_sizes([(1, 1, 0.4), (2, 3, 0.6)])
    assert CURVES["within"]() != plots.code_distances([0.2, 0.8], [0.2, 0.8], 1)
    assert CURVES["drift"]() != plots.bit_drift([0.3, -0.2], [0.1, 0.2])
    assert CURVES["drift"]() != plots.bit_drift([0.3, -0.1], [0.1, 0.15])


def search_page(rows, **given):
    facts = {"total": len(rows), "problems": [], "rerank": None, "skipped": [], "subject": {}}
    return page.render("search", **{"rows": rows, **facts, **given})


def test_everything_on_a_page_is_escaped():
    evil = "<b onload='x'>\"&"
    tile = page.Tile(evil, [evil], "data:image/png;base64,", 3, True, evil)
    cell = {"group": evil, "seed": 0, "map": 0.5, "val_map": None, "lr": 0.1, "model": None, "report": evil}
    entry = {f"axis.{evil}": evil, "map": 0.5, "deviation": None, "seeds": 1, "failed": 1, "val_map": None, "lr": 0.1}
    study = study_page(
        Description(title=evil, about=evil, settings={evil: evil}),
        [{**cell, **entry, "error": None}, {**cell, **entry, "error": evil}],
        [{**entry, "bits": 16, "flops": None, "parameters": None, "images": None}],
        [0.1],
        [Trial(evil, 0, evil, None, None, False, evil)],
        {},
        {evil: evil},
        {evil: evil},
    )
    found = search_page([page.GalleryRow(tile, [tile])], problems=[evil], unreadable=False, subject={evil: evil})
    for html, times in ((study, 15), (found, 11)):
        assert "<b onload" not in html and "onload='" not in html
        assert html.count("&lt;b onload=&#39;x&#39;&gt;&#34;&amp;") >= times


def test_a_page_without_one_of_its_facts_is_an_error():
    with pytest.raises(UndefinedError, match="unreadable"):
        search_page([])


def test_a_verdict_is_told_by_more_than_colour():
    tiles = [page.Tile("n", ["cat"], None, 1, right) for right in (True, False, None)]
    html = search_page([page.GalleryRow(page.Tile("q"), tiles)], unreadable=False)
    assert html.count("✓</b>") == 1 and html.count("✗</b>") == 1
    assert html.count('class="unseen">right<') == 1 and html.count('class="unseen">wrong<') == 1
    assert all(f'class="soft rank">{rank}.<' in html for rank in (1, 2, 3))
    assert html.count('class="tile right"') == 1 and html.count('class="tile wrong"') == 1


def test_the_legend_of_marks_is_shown_where_a_picture_has_one():
    query, unmarked, marked = page.Tile("q"), page.Tile("n", ["cat"], None, 1), page.Tile("n", ["cat"], None, 1, False)
    rows = [page.GalleryRow(query, [unmarked]), page.GalleryRow(query, [marked])]
    assert "solid blue frame" not in search_page(rows[:1], unreadable=False)
    assert "solid blue frame" in search_page(rows, unreadable=False)


def test_a_picture_names_its_file_short_and_whole_in_its_tooltip():
    tile = page.Tile("photos/kiwi/golden-kiwi-in-a-basket_001.jpg", ["Kiwi"], None, 3)
    html = search_page([page.GalleryRow(page.Tile("a/query.jpg"), [tile])], unreadable=False)
    assert 'title="photos/kiwi/golden-kiwi-in-a-basket_001.jpg"' in html and 'title="a/query.jpg"' in html
    assert html.count("golden-kiwi…sket_001.jpg<") == 1
    assert html.count("<b>query.jpg</b>") == 1 and html.count("query.jpg<") == 1  # not twice without a label


def test_distance_0_is_said_to_be_the_same_code():
    tiles = [page.Tile("n", ["cat"], "data:", distance) for distance in (0, 1)]
    html = search_page([page.GalleryRow(page.Tile("q"), tiles)], unreadable=False)
    assert 'soft">distance 0: same code<' in html and 'alt="cat, distance 0: same code"' in html
    assert 'soft">distance 1<' in html and html.count("same code") == 2


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("with --set train.epochs=16.", "with <code><span>--set</span> <span>train.epochs=16</span></code>."),
        ("search with --rerank.", "search with <code><span>--rerank</span></code>."),
        (
            "type `hhnet index build`, <b>",
            "type <code><span>hhnet</span> <span>index</span> <span>build</span></code>, &lt;b&gt;",
        ),
        ("`<i>`", "<code><span>&lt;i&gt;</span></code>"),
        ("a well-known word -- and 2--3", "a well-known word -- and 2--3"),
    ],
)
def test_what_a_sentence_tells_to_type_is_code_that_breaks_between_words_only(text, html):
    assert page.mark_commands(text) == html
    assert "code span { white-space: nowrap; }" in page.TEMPLATES.get_template("style.css").render()


@pytest.mark.parametrize(
    ("key", "short"),
    [("a/b/0001.jpg", "0001.jpg"), ("0123456789" * 4, "01234567890…890123456789"), ("a/", "a"), ("", "")],
)
def test_a_long_key_is_shown_short(key, short):
    assert page.short_key(key) == short


def contrast(ink, ground):
    def luminance(colour):
        shares = np.array([int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)])
        return np.where(shares <= 0.04045, shares / 12.92, ((shares + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]

    low, high = sorted((luminance(ink), luminance(ground)))
    return (high + 0.05) / (low + 0.05)


def inverted(colour):
    """The colour under the style sheet's `invert(1) hue-rotate(180deg)`."""
    turn = np.array([[-0.574, 1.43, 0.144], [0.426, 0.43, 0.144], [0.426, 1.43, -0.856]])
    rgb = 255 - np.array([int(colour[place : place + 2], 16) for place in (1, 3, 5)])
    return "#" + "".join(f"{round(value):02x}" for value in (turn @ rgb).clip(0, 255))


def test_the_text_of_plots_is_readable_on_light_and_dark_pages():
    assert contrast(plots.INK, "#ffffff") >= 4.5 and contrast(inverted(plots.INK), "#1c2025") >= 4.5
    style = page.TEMPLATES.get_template("style.css").render()
    assert "filter: invert(1) hue-rotate(180deg)" in style and "--surface: #1c2025" in style
    for colour in (plots.BLUE, plots.ORANGE):
        assert contrast(colour, "#ffffff") >= 3 and contrast(inverted(colour), "#1c2025") >= 3


def test_no_card_stands_alone_in_a_row():
    cards = page.TEMPLATES.get_template("parts.html.j2").module.cards
    for rest in range(1, 10):
        html = cards([("name", "1", "")] * (rest + 1))
        assert (int(html.partition("--span:")[2][0]) + rest) % 4 == 0


def test_bars_follow_the_numbers():
    bar = page.TEMPLATES.get_template("parts.html.j2").module.bar
    assert "width:25.0%" in bar(0.25) and "width:100.0%" in bar(1.0) and "width" not in bar(None)
