"""The page of `evaluate`: galleries of neighbours, pictures, and what it points out."""

import base64
import io
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from pipelines.config.settings import Config, EvaluateSettings
from pipelines.encode.codes import open_codes
from pipelines.evaluate.evaluate import evaluate
from pipelines.evaluate.figures import measure_pair
from pipelines.evaluate.gallery import choose_queries
from pipelines.evaluate.health import examine_codes
from pipelines.evaluate.pair import load_pair
from pipelines.shards.shards import open_shards
from tests.support.codes import (
    Rows,
    codes_of_shards,
    random_codes,
    simple_rows,
    write_codes,
    write_shards,
)
from tests.support.evaluations import PLAIN, config, metrics_of, page_of, range_keys, sets

PLOTS = 9


@pytest.fixture
def with_pictures(tmp_path):
    shards = [write_shards(tmp_path, name, seed=seed) for seed, name in enumerate(("query", "database"), 1)]
    return [codes_of_shards(tmp_path / f"c{n}", uri, flip=0.35, seed=n).uri for n, uri in enumerate(shards)]


def test_the_page_is_self_contained_and_frames_what_is_right_and_wrong(tmp_path, with_pictures):
    q, d = with_pictures
    page = page_of(evaluate(q, [d], str(tmp_path / "report"), Config(evaluate=EvaluateSettings(gallery=6))).as_json())
    sources = re.findall(r'src="([^"]*)"', page)
    assert len(sources) == PLOTS + (6 + 6) * 11 and all(source.startswith("data:image/") for source in sources)
    assert "http" not in page.replace("http-equiv", "") and "<script" not in page and "url(" not in page
    rows = page.split('<article class="query">')[1:]
    assert len(rows) == 6 + 6  # those spread over the classes, and the worst
    for row in rows:
        query, *neighbours = re.findall(r'class="tile( right| wrong)?".*?<b>(class_\d\d)</b>', row)
        assert len(neighbours) == 10 and query[0] == ""
        assert all((verdict == " right") == (name == query[1]) for verdict, name in neighbours)
    assert page.count('class="tile right"') == page.count("✓</b>") and page.count("✗</b>") > 0
    assert 'alt="right, class_' in page and 'alt="wrong, class_' in page


def test_pictures_are_those_of_the_samples_shown(tmp_path, with_pictures):
    """With codes that never err, each row shows one colour only."""
    q = codes_of_shards(tmp_path / "exact-q", str(tmp_path / "query"), flip=0.0).uri
    d = codes_of_shards(tmp_path / "exact-d", str(tmp_path / "database"), flip=0.0).uri
    page = page_of(evaluate(q, [d], str(tmp_path / "report"), Config(evaluate=EvaluateSettings(gallery=3))).as_json())
    colours = []
    for row in page.split('<article class="query">')[1:]:
        data = [base64.b64decode(text) for text in re.findall(r'base64,([^"]+)"', row.partition("</article>")[0])]
        means = np.stack([np.asarray(Image.open(io.BytesIO(entry)), np.float64).mean((0, 1)) for entry in data])
        assert np.abs(means[: 1 + 8] - means[0]).max() < 35  # eight of the class in the database
        colours.append(means[0])
    assert min(np.abs(colours[a] - colours[b]).max() for a in range(3) for b in range(a)) > 40


def test_the_page_says_when_shards_are_out_of_reach(tmp_path, with_pictures):
    q, d = with_pictures
    shutil.rmtree(tmp_path / "database")
    page = page_of(evaluate(q, [d], str(tmp_path / "report"), PLAIN).as_json())
    assert "Some pictures are missing" in page and "database holds no committed shards" in page
    assert len(re.findall('src="data:image/', page)) == PLOTS + 2 * 3 and page.count(">no picture<") == 2 * 30


def test_a_damaged_picture_is_left_out_and_the_rest_is_shown(tmp_path, with_pictures):
    q, d = with_pictures
    for tar in (tmp_path / "database" / "parts").glob("*.tar"):
        tar.write_bytes(tar.read_bytes()[: tar.stat().st_size // 2])
    page = page_of(evaluate(q, [d], str(tmp_path / "report"), PLAIN).as_json())
    shown = len(re.findall('src="data:image/', page)) - PLOTS
    assert 2 * 3 < shown < 2 * 33 and page.count(">no picture<") == 2 * 33 - shown


def test_class_names_are_escaped(tmp_path):
    names = ("<script>alert(1)</script>", 'a"b', "c&d")
    q = write_codes(tmp_path / "q", {"q-0.tar": simple_rows("q", 9)}, classes=names).uri
    d = write_codes(tmp_path / "d", {"d-0.tar": simple_rows("d", 30)}, classes=names).uri
    page = page_of(evaluate(q, [d], str(tmp_path / "report"), PLAIN).as_json())
    assert "<script" not in page and "&lt;script&gt;" in page and 'alt="right, a"b' not in page


def test_queries_that_are_in_the_database_are_pointed_out(tmp_path):
    q, database = sets(tmp_path)
    page = page_of(evaluate(q, [q, *database], str(tmp_path / "report"), config()).as_json())
    assert "Some queries are in the database too" in page
    assert "Some queries" not in page_of(evaluate(q, database, str(tmp_path / "other"), config()).as_json())


def test_the_gallery_is_spread_over_the_classes_and_has_failures(tmp_path):
    q, database = sets(tmp_path, queries=60)
    pair = load_pair(open_codes(q), [open_codes(uri) for uri in database])
    _, ap = measure_pair(pair, examine_codes(pair.queries.codes, pair.database.codes, 64), EvaluateSettings())
    chosen = choose_queries(pair, ap, 9)
    labels = [int(pair.queries.labels[query].argmax()) for query, _ in chosen]
    assert len({query for query, _ in chosen}) == 9 and sorted(labels) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    hard = [query for query, is_hard in chosen if is_hard]
    assert len(hard) == 3
    for query in hard:
        mine = ap[pair.queries.labels[:, pair.queries.labels[query].argmax()]]
        assert ap[query] <= np.partition(mine, 2)[2]
    assert choose_queries(pair, ap, 9) == chosen
    assert choose_queries(pair, ap, 0) == [] and len(choose_queries(pair, ap, 200)) == 60
    everything = load_pair(open_codes(q), [open_codes(q)])
    assert len(choose_queries(everything, ap, 1)) == 1


def test_the_page_says_what_was_measured_and_what_to_do_next(tmp_path):
    q, database = sets(tmp_path)
    page = page_of(evaluate(q, database, str(tmp_path / "report"), config()).as_json())
    assert "30 queries in 90 database images, 3 classes: cat, dog, owl" in page
    assert "64 bits, model aaaaaaaaaaaa" in page  # the model is out of reach
    said = re.search('id="what-to-do-next">(.*?)</section>', page, re.S)
    assert said and said[1].count("<p>") == 2
    links = re.findall('href="#([^"]+)"', page)
    assert len(links) >= 7 and all(f'id="{link}"' in page for link in links)
    assert page.index("What to do next</h2>") < page.index("By every convention</h2>")


def test_confusions_are_the_classes_of_the_nearest_neighbours(tmp_path):
    """Queries of class dog have the codes of class cat in the database."""
    cat, dog, owl = random_codes(3, 64, seed=1234)
    q = {"q-0.tar": Rows(["a", "b"], np.stack([cat, cat]), [[0], [1]])}
    d = {"d-0.tar": Rows(range_keys(30), np.repeat([cat, dog, owl], 10, axis=0), [[n // 10] for n in range(30)])}
    args = write_codes(tmp_path / "q", q).uri, [write_codes(tmp_path / "d", d).uri]
    answer = evaluate(*args, str(tmp_path / "report"), config()).as_json()
    confusion = metrics_of(answer)["confusion"]
    assert confusion["classes"] == ["cat", "dog", "owl"]
    assert confusion["shares"] == [[1, 0, 0], [1, 0, 0], None]
    assert confusion["most"] == [{"query": "dog", "neighbour": "cat", "share": 1.0}]
    page = page_of(answer)
    assert "▼ at chance" in page and "dog is found hardly better than by chance" in page
    assert "100% of the nearest neighbours of dog are cat" in page


def test_conventions_that_agree_are_folded(tmp_path):
    cat, dog, owl = random_codes(3, 64, seed=1234)
    q = {"q-0.tar": Rows(["a", "b", "c"], np.stack([cat, dog, owl]), [[0], [1], [2]])}
    d = {"d-0.tar": Rows(range_keys(30), np.repeat([cat, dog, owl], 10, axis=0), [[n // 10] for n in range(30)])}
    args = write_codes(tmp_path / "q", q).uri, [write_codes(tmp_path / "d", d).uri]
    page = page_of(evaluate(*args, str(tmp_path / "report"), config()).as_json())
    assert "to three digits all of them give 1.000." in page and "<summary>Every convention</summary>" in page
    q, database = sets(tmp_path / "other")
    cut = evaluate(q, database, str(tmp_path / "r"), config(at=10)).as_json()
    page = page_of(cut)
    assert "<summary>Every convention" not in page
    # On a phone, where the row of heads is not shown, each cell has its own.
    (table,) = re.findall('<table class="words stacked">(.*?)</table>', page, re.S)
    heads = re.findall('<th scope="col">(.*?)</th>', table)
    cells = [re.findall('<td data-head="(.*?)">', row) for row in table.split("<tr>")[2:]]
    assert len(heads) == 6 and len(cells) > 3 and all(row == heads for row in cells)
    assert ".stacked td::before { content: attr(data-head)" in page


def test_bounds_of_ties_and_both_levels_of_chance_are_told_apart(tmp_path):
    q, database = sets(tmp_path, bits=16)
    answer = evaluate(q, database, str(tmp_path / "report"), config()).as_json()
    page, figures = page_of(answer), metrics_of(answer)
    worst, best = figures["tie_bounds"]
    assert f"relevant items last in each tie, they would give {worst:.4f}; put the best way" in page
    assert f"relevant items first, {best:.4f}. These are bounds" in page and worst < figures["map"] < best
    assert "expected mAP of a random order" in page
    share, chance = figures["relevant_share"], figures["chance"]
    assert f"the share of relevant items, {share:.3f}." in page and f"the mAP of a random order, {chance:.4f}." in page


@pytest.mark.parametrize(("database", "small"), [(240, True), (330, False)])
def test_a_precision_that_no_class_can_fill_says_so(tmp_path, database, small):
    q, database = sets(tmp_path, database=database)
    page = page_of(evaluate(q, database, str(tmp_path / "report"), config()).as_json())
    assert ("of the nearest 100; the largest class has 80 items" in page) == small
    assert "of the nearest 10<" in page


def test_pictures_of_a_gallery_name_their_files(tmp_path, with_pictures):
    q, d = with_pictures
    shards = [open_shards(str(tmp_path / name)).shards for name in ("query", "database")]
    paths = [{f"{record.key}.png" for shard in side for record in shard.records()} for side in shards]
    page = page_of(evaluate(q, [d], str(tmp_path / "report"), PLAIN).as_json())
    rows = page.split('<article class="query">')[1:]
    assert len(rows) == 2 * 3
    for row in rows:
        query, *near = re.findall('class="tile[^"]*" title="([^"]+)"', row)
        assert query in paths[0] and len(near) == 10 and set(near) <= paths[1]
        assert all(f'<span class="soft">{name.rpartition("/")[2]}</span>' in row for name in (query, *near))
