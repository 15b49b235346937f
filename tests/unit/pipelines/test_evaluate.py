import base64
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import hhnet
from pipelines.codes import open_codes
from pipelines.config import Config, EvaluateSettings
from pipelines.errors import FingerprintMismatch, InputError
from pipelines.evaluate import choose_queries, evaluate
from pipelines.gallery.figures import load_pair, measure
from tests.support.codes import Rows, class_codes, codes_of_shards, random_codes, simple_rows, write_codes, write_shards

PLAIN = Config(evaluate=EvaluateSettings(gallery=3))


def config(**settings):
    return Config(evaluate=EvaluateSettings(gallery=0, **settings))


def sets(root, bits=64, flip=0.3, queries=30, database=90):
    """Queries in one artifact, the database in two."""
    q = write_codes(root / "q", {"q-000000.tar": simple_rows("q", queries, bits, flip=flip)}, bits).uri
    half = database // 2
    first = write_codes(root / "d1", {"d-000000.tar": simple_rows("d1", half, bits, seed=1, flip=flip)}, bits).uri
    second = {"d-000000.tar": simple_rows("d2", half, bits, seed=2, flip=flip)}
    return q, [first, write_codes(root / "d2", second, bits).uri]


def arrays(uris):
    """Codes and labels read by another way than the job's own."""
    tables = [table for uri in uris for table in open_codes(uri).tables()]
    codes = [np.frombuffer(b"".join(table["code"].to_pylist()), np.uint8).reshape(len(table), -1) for table in tables]
    labels = [label for table in tables for (label,) in table["labels"].to_pylist()]
    return np.concatenate(codes), np.array(labels)


def naive_map(queries, query_labels, database, labels):
    """AP with ties in database order, as the text books have it."""
    total = 0.0
    for query, label in zip(queries, query_labels, strict=True):
        order = np.argsort(np.unpackbits(query ^ database, axis=1).sum(1), kind="stable")
        hits = labels[order] == label
        total += (np.cumsum(hits)[hits] / (np.flatnonzero(hits) + 1)).mean()
    return total / len(queries)


def metrics_of(result):
    return json.loads(Path(result["metrics"]).read_text())


def page_of(result):
    return Path(result["report"]).read_text()


def test_map_is_the_librarys_over_the_whole_database(tmp_path):
    q, database = sets(tmp_path)
    result = evaluate(q, database, str(tmp_path / "report"), config())
    expected = hhnet.mean_average_precision(*arrays([q]), *arrays(database))
    assert (result["verb"], result["status"]) == ("evaluate", "done")
    assert result["map"] == pytest.approx(expected, abs=1e-6) and 0.4 < result["map"] < 0.99
    assert result["chance"] == pytest.approx(1 / 3)
    assert result["convention"] == "mAP@all, ties=expected, denominator=retrieved, empty=zero"
    assert (result["queries"], result["database"], result["bits"]) == (30, 90, 64)


def test_the_stable_convention_is_the_text_books(tmp_path):
    q, database = sets(tmp_path, bits=8)
    result = evaluate(q, database, str(tmp_path / "report"), config(ties="stable"))
    assert result["map"] == pytest.approx(naive_map(*arrays([q]), *arrays(database)), abs=1e-6)


def test_the_convention_is_part_of_the_report_and_its_variant_is_published(tmp_path):
    q, database = sets(tmp_path)
    result = evaluate(q, database, str(tmp_path / "report"), config(at=20, ties="stable", empty="skip"))
    metrics = metrics_of(result)
    pair = *arrays([q]), *arrays(database)
    assert metrics["map"] == pytest.approx(
        hhnet.mean_average_precision(*pair, at=20, ties="stable", empty="skip"), abs=1e-6
    )
    assert metrics["map_min"] == pytest.approx(
        hhnet.mean_average_precision(*pair, at=20, ties="stable", empty="skip", denominator="min"), abs=1e-6
    )
    assert metrics["map_min"] < metrics["map"]
    assert metrics["convention"] == {"at": 20, "ties": "stable", "denominator": "retrieved", "empty": "skip"}
    page = page_of(result)
    assert "the first 20 of the ranking" in page and "is left out" in page and "mAP@20, min(m, K)" in page
    with pytest.raises(FingerprintMismatch):
        evaluate(q, database, str(tmp_path / "report"), config(at=10))


def test_the_other_figures(tmp_path):
    q, database = sets(tmp_path, flip=0.05, database=120)
    metrics = metrics_of(evaluate(q, database, str(tmp_path / "report"), config()))
    pair = *arrays([q]), *arrays(database)
    assert metrics["precision_at"] == {
        str(k): pytest.approx(hhnet.precision_at(*pair, k), abs=1e-6) for k in (10, 100)
    }  # fewer than 1000 items
    assert metrics["within_radius_2"] == pytest.approx(hhnet.precision_within_radius(*pair, 2), abs=1e-6)
    assert len(metrics["pr_curve"]["x"]) == len(metrics["pr_curve"]["y"]) == 65
    assert metrics["pr_curve"]["x"][-1] == 1.0 and metrics["pr_curve"]["y"][-1] == pytest.approx(1 / 3, abs=1e-6)
    assert metrics["precision_at_n"]["x"] == [1, 2, 5, 10, 20, 50, 100]
    for name in ("distances_relevant", "distances_other"):
        assert sum(metrics[name]["y"]) == pytest.approx(1, abs=1e-4)
    distances = np.unpackbits(pair[0][:, None] ^ pair[2][None], axis=2).sum(2)
    same = pair[1][:, None] == pair[3][None]
    for chosen, name in ((same, "distances_relevant"), (~same, "distances_other")):
        expected = np.bincount(distances[chosen], minlength=65) / chosen.sum()
        np.testing.assert_allclose(metrics[name]["y"], expected, atol=1e-6)
    assert metrics["distinct"] == len({code.tobytes() for code in pair[2]})
    assert [entry["name"] for entry in metrics["classes"]] == ["cat", "dog", "owl"]
    mean = np.mean([entry["map"] for entry in metrics["classes"]])
    assert mean == pytest.approx(metrics["map"], abs=1e-5)  # as many queries in each


def test_classes_are_mapped_by_name(tmp_path):
    """The same samples under class lists in another order."""
    labels = [number % 3 for number in range(60)]
    codes = class_codes(labels, flip=0.2)
    names, other = ("cat", "dog", "owl"), ("owl", "cat", "dog")
    q = write_codes(tmp_path / "q", {"q-0.tar": Rows([f"q{n}" for n in range(60)], codes, [[n] for n in labels])}).uri
    moved = [[other.index(names[n])] for n in labels]
    d = {"d-0.tar": Rows([f"d{n}" for n in range(60)], class_codes(labels, flip=0.2, seed=5), moved)}
    result = evaluate(q, [write_codes(tmp_path / "d", d, classes=other).uri], str(tmp_path / "report"), config())
    assert result["map"] > 0.8


def test_a_class_the_database_does_not_know_is_refused(tmp_path):
    q = write_codes(tmp_path / "q", {"q-0.tar": simple_rows("q", 9)}, classes=("cat", "cow", "emu")).uri
    d = write_codes(tmp_path / "d", {"d-0.tar": simple_rows("d", 9)}).uri
    with pytest.raises(InputError, match=r"has class 'cow' and 1 more, which .*/d does not know"):
        evaluate(q, [d], str(tmp_path / "report"), config())


def test_several_labels_and_none(tmp_path):
    codes = class_codes([0, 1, 2, 0])
    q = write_codes(tmp_path / "q", {"q-0.tar": Rows(list("abcd"), codes, [[0], [1, 2], [2], []])}).uri
    d = write_codes(tmp_path / "d", {"d-0.tar": Rows(list("efg"), codes[:3], [[0, 1], [2], []])}).uri
    result = evaluate(q, [d], str(tmp_path / "report"), PLAIN)
    metrics = metrics_of(result)
    hot = np.array([[1, 0, 0], [0, 1, 1], [0, 0, 1], [0, 0, 0]]), np.array([[1, 1, 0], [0, 0, 1], [0, 0, 0]])
    assert metrics["map"] == pytest.approx(hhnet.mean_average_precision(codes, hot[0], codes[:3], hot[1]), abs=1e-6)
    assert {entry["name"]: entry["queries"] for entry in metrics["classes"]} == {"cat": 1, "dog": 1, "owl": 2}
    assert "1 queries have no label" in metrics["notes"][0]
    skipped = evaluate(q, [d], str(tmp_path / "skip"), config(empty="skip"))
    assert metrics_of(skipped)["skipped"] == 1 and skipped["map"] == pytest.approx(result["map"] * 4 / 3, abs=1e-5)


def test_inputs_that_cannot_be_compared_are_refused(tmp_path):
    q, database = sets(tmp_path)
    out = str(tmp_path / "report")
    short = write_codes(tmp_path / "short", {"d-0.tar": simple_rows("d", 9, 32)}, 32).uri
    alien = write_codes(tmp_path / "alien", {"d-0.tar": simple_rows("d", 9)}, model="d" * 64).uri
    empty = write_codes(tmp_path / "empty", {"d-0.tar": Rows([], np.empty((0, 8), np.uint8), [])}).uri
    with pytest.raises(FingerprintMismatch, match=r"/q has bits 64, .*/short has bits 32"):
        evaluate(q, [database[0], short], out, config())
    with pytest.raises(FingerprintMismatch, match=r"/q has model aaaaaaaaaaaa, .*/alien has model dddddddddddd"):
        evaluate(q, [alien], out, config())
    with pytest.raises(InputError, match="codes of the same tar"):
        evaluate(q, [database[0], database[0]], out, config())
    with pytest.raises(InputError, match="empty holds no codes"):
        evaluate(q, [empty], out, config())
    with pytest.raises(InputError, match="at least one"):
        evaluate(q, [], out, config())
    with pytest.raises(InputError, match="is a report artifact, not codes"):
        evaluate(evaluate(q, database, out, config())["uri"], database, str(tmp_path / "no"), config())


def test_reports_are_equal_to_the_byte_and_a_second_run_does_nothing(tmp_path):
    shards = [write_shards(tmp_path, name, seed=seed) for seed, name in enumerate(("query", "database"), 1)]
    q, d = (codes_of_shards(tmp_path / f"c{n}", uri, seed=n).uri for n, uri in enumerate(shards))
    first = evaluate(q, [d], str(tmp_path / "one"), PLAIN)
    second = evaluate(q, [d], str(tmp_path / "two"), PLAIN)
    assert first["digest"] == second["digest"]
    again = evaluate(q, [d], str(tmp_path / "one"), PLAIN)
    assert again == {**first, "status": "unchanged"}


# ------------------------------------------------------------------------------------------------------------ page


@pytest.fixture
def with_pictures(tmp_path):
    shards = [write_shards(tmp_path, name, seed=seed) for seed, name in enumerate(("query", "database"), 1)]
    return [codes_of_shards(tmp_path / f"c{n}", uri, flip=0.35, seed=n).uri for n, uri in enumerate(shards)]


def test_the_page_is_self_contained_and_frames_what_is_right_and_wrong(tmp_path, with_pictures):
    q, d = with_pictures
    page = page_of(evaluate(q, [d], str(tmp_path / "report"), Config(evaluate=EvaluateSettings(gallery=6))))
    sources = re.findall(r'src="([^"]*)"', page)
    assert len(sources) == 3 + 6 * 11 and all(source.startswith("data:image/") for source in sources)
    assert "http" not in page.replace("http-equiv", "") and "<script" not in page and "url(" not in page
    rows = page.split('<article class="query">')[1:]
    assert len(rows) == 6
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
    page = page_of(evaluate(q, [d], str(tmp_path / "report"), Config(evaluate=EvaluateSettings(gallery=3))))
    colours = []
    for row in page.split('<article class="query">')[1:]:
        data = [base64.b64decode(text) for text in re.findall(r'base64,([^"]+)"', row)]
        means = np.stack([np.asarray(Image.open(io.BytesIO(entry)), np.float64).mean((0, 1)) for entry in data])
        assert np.abs(means[: 1 + 8] - means[0]).max() < 35  # eight of the class in the database
        colours.append(means[0])
    assert min(np.abs(colours[a] - colours[b]).max() for a in range(3) for b in range(a)) > 40


def test_the_page_says_when_shards_are_out_of_reach(tmp_path, with_pictures):
    q, d = with_pictures
    shutil.rmtree(tmp_path / "database")
    page = page_of(evaluate(q, [d], str(tmp_path / "report"), PLAIN))
    assert "Some pictures are missing" in page and "database holds no committed shards" in page
    assert len(re.findall('src="data:image/', page)) == 3 + 3 and page.count(">no picture<") == 30


def test_a_damaged_picture_is_left_out_and_the_rest_is_shown(tmp_path, with_pictures):
    q, d = with_pictures
    for tar in (tmp_path / "database" / "parts").glob("*.tar"):
        tar.write_bytes(tar.read_bytes()[: tar.stat().st_size // 2])
    page = page_of(evaluate(q, [d], str(tmp_path / "report"), PLAIN))
    shown = len(re.findall('src="data:image/', page)) - 3
    assert 3 < shown < 33 and page.count(">no picture<") == 33 - shown


def test_class_names_are_escaped(tmp_path):
    names = ("<script>alert(1)</script>", 'a"b', "c&d")
    q = write_codes(tmp_path / "q", {"q-0.tar": simple_rows("q", 9)}, classes=names).uri
    d = write_codes(tmp_path / "d", {"d-0.tar": simple_rows("d", 30)}, classes=names).uri
    page = page_of(evaluate(q, [d], str(tmp_path / "report"), PLAIN))
    assert "<script" not in page and "&lt;script&gt;" in page and 'alt="right, a"b' not in page


def test_queries_that_are_in_the_database_are_pointed_out(tmp_path):
    q, database = sets(tmp_path)
    page = page_of(evaluate(q, [q, *database], str(tmp_path / "report"), config()))
    assert "Some queries are in the database too" in page
    assert "Some queries" not in page_of(evaluate(q, database, str(tmp_path / "other"), config()))


def test_the_gallery_is_spread_over_the_classes_and_has_failures(tmp_path):
    q, database = sets(tmp_path, queries=60)
    pair = load_pair(open_codes(q), [open_codes(uri) for uri in database])
    _, ap = measure(pair, EvaluateSettings())
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


def test_random_codes_are_at_chance(tmp_path):
    q = write_codes(tmp_path / "q", {"q-0.tar": Rows(range_keys(40), random_codes(40), labels_of(40))}).uri
    d = write_codes(
        tmp_path / "d", {"d-0.tar": Rows(range_keys(2000), random_codes(2000, seed=1), labels_of(2000))}
    ).uri
    result = evaluate(q, [d], str(tmp_path / "report"), config())
    assert result["map"] == pytest.approx(result["chance"], abs=0.01)


def range_keys(count):
    return [f"k{number}" for number in range(count)]


def labels_of(count):
    return [[number % 3] for number in range(count)]
