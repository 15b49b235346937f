"""Figures of `evaluate`: mAP in every convention, curves, classes, and what is refused."""

import re

import numpy as np
import pytest

import hhnet
from pipelines.encode.codes import open_codes
from pipelines.errors import FingerprintMismatch, InputError, UsageError
from pipelines.evaluate.conventions import convention_settings
from pipelines.evaluate.evaluate import evaluate
from tests.support.codes import (
    Rows,
    class_codes,
    codes_of_shards,
    random_codes,
    simple_rows,
    with_real_codes,
    write_codes,
    write_shards,
)
from tests.support.evaluations import PLAIN, config, labels_of, metrics_of, page_of, range_keys, sets


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


def test_map_is_the_librarys_over_the_whole_database(tmp_path):
    q, database = sets(tmp_path)
    result = evaluate(q, database, str(tmp_path / "report"), config()).as_json()
    expected = hhnet.mean_average_precision(*arrays([q]), *arrays(database))
    assert (result["verb"], result["status"]) == ("evaluate", "done")
    assert result["map"] == pytest.approx(expected, abs=1e-6) and 0.4 < result["map"] < 0.99
    assert result["chance"] == pytest.approx(1 / 3, abs=np.log(90) / 90)
    assert result["convention"] == "mAP@all, ties=expected, denominator=retrieved, empty=zero"
    assert (result["queries"], result["database"], result["bits"]) == (30, 90, 64)


def test_the_re_ranked_map_is_that_of_the_lists_of_a_search(tmp_path):
    rows = {name: simple_rows(name, 60, 8, seed=seed, flip=0.3) for seed, name in enumerate("qd")}
    q, d = (write_codes(tmp_path / n, {f"{n}.tar": with_real_codes(r, 8)}, 8).uri for n, r in rows.items())
    for n in (1, 20, 1000):
        result = evaluate(q, [d], str(tmp_path / f"report-{n}"), config(rerank=n, ties="stable")).as_json()
        (codes, labels), (query_codes, query_labels) = arrays([d]), arrays([q])
        real_codes, queries = (hhnet.saturate(with_real_codes(rows[name], 8).real_codes) for name in "dq")
        total = 0.0
        for code, label, z in zip(query_codes, query_labels, queries, strict=True):
            order = np.argsort(np.unpackbits(code ^ codes, axis=1).sum(1), kind="stable")
            cosine = real_codes @ z / np.linalg.norm(real_codes, axis=1)
            order[:n] = order[:n][np.argsort(-cosine[order[:n]], kind="stable")]
            hits = labels[order] == label
            total += (np.cumsum(hits)[hits] / (np.flatnonzero(hits) + 1)).mean()
        assert result["reranked"] == {
            "first": min(n, 60),
            "map": pytest.approx(total / 60, abs=1e-6),
        }
        assert metrics_of(result)["reranked"] == result["reranked"]
        assert f"the first {min(n, 60)} by real codes" in page_of(result)
    assert result["map"] == evaluate(q, [d], str(tmp_path / "plain"), config(ties="stable")).map


def test_ties_in_a_random_order_stand_for_their_expectation(tmp_path):
    """Database order would say much here: all that is relevant to the queries stands first."""
    rows = Rows([str(n) for n in range(2000)], np.zeros((2000, 1), np.uint8), [[int(n >= 200)] for n in range(2000)])
    one = Rows(["q"], rows.codes[:1], [[0]])
    q, d = (write_codes(tmp_path / n, {f"{n}.tar": with_real_codes(r, 8)}, 8).uri for n, r in (("q", one), ("d", rows)))
    result = evaluate(q, [d], str(tmp_path / "report"), config(rerank=1)).as_json()
    assert result["reranked"]["map"] == pytest.approx(result["map"], abs=0.03)
    assert evaluate(q, [d], str(tmp_path / "stable"), config(rerank=1, ties="stable")).reranked["map"] == 1


def test_codes_without_real_codes_are_not_re_ranked(tmp_path):
    q, database = sets(tmp_path)
    with pytest.raises(InputError, match=r"q has no real codes to re-rank by: encode with encode\.real_codes=true"):
        evaluate(q, database, str(tmp_path / "report"), config(rerank=10))
    assert not (tmp_path / "report").exists()
    assert "reranked" not in metrics_of(evaluate(q, database, str(tmp_path / "report"), config()).as_json())


def test_the_stable_convention_is_the_text_books(tmp_path):
    q, database = sets(tmp_path, bits=8)
    result = evaluate(q, database, str(tmp_path / "report"), config(ties="stable")).as_json()
    assert result["map"] == pytest.approx(naive_map(*arrays([q]), *arrays(database)), abs=1e-6)


def test_the_convention_is_part_of_the_report_and_its_variant_is_published(tmp_path):
    q, database = sets(tmp_path)
    result = evaluate(q, database, str(tmp_path / "report"), config(at=20, ties="stable", empty="skip")).as_json()
    metrics = metrics_of(result)
    pair = *arrays([q]), *arrays(database)
    assert metrics["map"] == pytest.approx(
        hhnet.mean_average_precision(*pair, at=20, ties="stable", empty="skip"), abs=1e-6
    )
    assert metrics["map_min"] == pytest.approx(
        hhnet.mean_average_precision(*pair, at=20, ties="stable", empty="skip", denominator="min"), abs=1e-6
    )
    assert metrics["map_min"] < metrics["map"]
    assert metrics["convention"] == {
        "at": 20,
        "ties": "stable",
        "denominator": "retrieved",
        "empty": "skip",
        "unlabelled": "zero",
    }
    page = page_of(result)
    assert "the first 20 of the ranking" in page and "is left out" in page and "mAP@20, min(m, K)" in page
    with pytest.raises(FingerprintMismatch):
        evaluate(q, database, str(tmp_path / "report"), config(at=10))


def test_the_other_figures(tmp_path):
    q, database = sets(tmp_path, flip=0.05, database=120)
    metrics = metrics_of(evaluate(q, database, str(tmp_path / "report"), config()).as_json())
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
    result = evaluate(
        q, [write_codes(tmp_path / "d", d, classes=other).uri], str(tmp_path / "report"), config()
    ).as_json()
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
    result = evaluate(q, [d], str(tmp_path / "report"), PLAIN).as_json()
    metrics = metrics_of(result)
    hot = np.array([[1, 0, 0], [0, 1, 1], [0, 0, 1], [0, 0, 0]]), np.array([[1, 1, 0], [0, 0, 1], [0, 0, 0]])
    assert metrics["map"] == pytest.approx(hhnet.mean_average_precision(codes, hot[0], codes[:3], hot[1]), abs=1e-6)
    assert {entry["name"]: entry["queries"] for entry in metrics["classes"]} == {"cat": 1, "dog": 1, "owl": 2}
    assert "1 queries have no label" in metrics["notes"][0]
    skipped = evaluate(q, [d], str(tmp_path / "skip"), config(empty="skip")).as_json()
    assert metrics_of(skipped)["skipped"] == 1 and skipped["map"] == pytest.approx(result["map"] * 4 / 3, abs=1e-5)


def test_every_convention_is_in_the_report_by_name(tmp_path):
    codes = random_codes(40, 16, seed=5)
    labels = [[0], [1], [0], [1], [], [2], *[[n % 2] for n in range(34)]]  # one without a label, one of a class alone
    q = write_codes(tmp_path / "q", {"q-0.tar": Rows([f"q{n}" for n in range(6)], codes[:6], labels[:6])}, 16).uri
    d = write_codes(tmp_path / "d", {"d-0.tar": Rows([f"d{n}" for n in range(34)], codes[6:], labels[6:])}, 16).uri
    metrics = metrics_of(evaluate(q, [d], str(tmp_path / "report"), config(at=5)).as_json())
    found = {name: entry for entry in metrics["by_convention"] for name in entry["names"]}
    hot = (
        np.eye(3, dtype=bool)[[0, 1, 0, 1, 0, 2]] & (np.arange(6) != 4)[:, None],
        np.eye(3, dtype=bool)[np.arange(34) % 2],
    )
    ap = {
        empty: hhnet.average_precisions(codes[:6], hot[0], codes[6:], hot[1], at=5, empty=empty)
        for empty in ("zero", "skip")
    }
    assert found["deephash-pytorch"]["map"] == pytest.approx(ap["zero"].mean(), abs=1e-6) == metrics["map"]
    assert found["hashnet"]["map"] == pytest.approx(np.nanmean(ap["skip"]), abs=1e-6)
    assert found["csq"]["map"] == pytest.approx(ap["zero"][[0, 1, 2, 3, 5]].mean(), abs=1e-6)
    assert (found["hashnet"]["queries"], found["csq"]["queries"], found["dhd"]["queries"]) == (4, 5, 6)
    assert found["h2q"]["map"] is None
    low, high = metrics["tie_bounds"]
    assert low < metrics["map"] < high
    for name in ("hashnet", "csq", "modfire", "dsh-analysis"):
        settings = {key.removeprefix("evaluate."): value for key, value in convention_settings(name).items()}
        chosen = evaluate(q, [d], str(tmp_path / name), config(at=5, **settings)).as_json()
        assert chosen["map"] == found[name]["map"]


def test_ties_in_the_order_of_outputs_are_measured_where_there_are_real_codes(tmp_path):
    sides = {
        name: with_real_codes(simple_rows(name, count, 16, seed=count, flip=0.4), 16)
        for name, count in (("q", 20), ("d", 200))
    }
    q, d = (write_codes(tmp_path / name, {f"{name}-0.tar": rows}, 16).uri for name, rows in sides.items())
    report = evaluate(q, [d], str(tmp_path / "report"), config(rerank=10)).as_json()
    (found,) = (entry for entry in metrics_of(report)["by_convention"] if "h2q" in entry["names"])
    real_codes = tuple(rows.real_codes for rows in sides.values())
    expected = hhnet.mean_average_precision(*arrays([q]), *arrays([d]), ties="scores", tie_scores=real_codes)
    assert found["map"] == pytest.approx(expected, abs=1e-6) and found["map"] != report["map"]


def test_unknown_conventions_are_refused_by_name():
    with pytest.raises(UsageError, match="--convention 'hashnett' is not known: choose from hashnet, "):
        convention_settings("hashnett")
    with pytest.raises(UsageError, match="--convention h2q orders ties by the outputs"):
        convention_settings("h2q")


def test_curves_say_how_many_queries_they_average(tmp_path):
    codes = random_codes(20, 16, seed=1)
    q = write_codes(tmp_path / "q", {"q-0.tar": Rows(list("abcd"), codes[:4], [[0], [1], [2], []])}, 16).uri
    d = write_codes(tmp_path / "d", {"d-0.tar": Rows(list("efgh"), codes[4:8], [[0], [1], [0], [1]])}, 16).uri
    metrics = metrics_of(evaluate(q, [d], str(tmp_path / "report"), config()).as_json())
    assert metrics["pr_curve"]["queries"] == metrics["pr_by_rank"]["queries"] == 2
    hot = np.eye(3, dtype=bool)[[0, 1, 2, 0]] & (np.arange(4) != 3)[:, None], np.eye(3, dtype=bool)[[0, 1, 0, 1]]
    precision, recall = hhnet.precision_recall_at(codes[:4], hot[0], codes[4:8], hot[1], metrics["pr_by_rank"]["ranks"])
    assert metrics["pr_by_rank"]["ranks"] == [1, 2, 3, 4]
    assert metrics["pr_by_rank"]["precision"] == pytest.approx(precision, abs=1e-6)
    assert metrics["pr_by_rank"]["recall"] == pytest.approx(recall, abs=1e-6)


@pytest.mark.parametrize("empty", ["zero", "skip"])
def test_queries_to_which_nothing_is_relevant_are_refused_with_the_reason(tmp_path, empty):
    codes = random_codes(4, 16)

    def written(name, labels):
        return write_codes(
            tmp_path / name, {f"{name}-0.tar": Rows([f"{name}1", f"{name}2"], codes[:2], labels)}, 16
        ).uri

    bare, cats, dogs = written("bare", [[], []]), written("cats", [[0], [0]]), written("dogs", [[1], [1]])
    out = tmp_path / "report"
    for q, d, reason in (
        (bare, cats, "no image of the queries has a label"),
        (cats, bare, "no image of the database has a label"),
        (cats, dogs, "queries and database share no class"),
    ):
        with pytest.raises(InputError, match=reason):
            evaluate(q, [d], str(out), config(empty=empty))
    assert not list(out.glob("manifest.json"))


def test_the_worst_queries_are_shown_worst_first(tmp_path):
    q, database = sets(tmp_path)
    page = page_of(evaluate(q, database, str(tmp_path / "report"), PLAIN).as_json())
    shown = re.findall(r"AP (\d\.\d{3})", page[page.index('id="the-worst-queries"') :])
    ap = hhnet.average_precisions(*arrays([q]), *arrays(database))
    assert shown == [f"{value:.3f}" for value in np.sort(ap)[:3]]


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
        evaluate(evaluate(q, database, out, config()).uri, database, str(tmp_path / "no"), config())


def test_reports_are_equal_to_the_byte_and_a_second_run_does_nothing(tmp_path):
    shards = [write_shards(tmp_path, name, seed=seed) for seed, name in enumerate(("query", "database"), 1)]
    q, d = (codes_of_shards(tmp_path / f"c{n}", uri, seed=n).uri for n, uri in enumerate(shards))
    first = evaluate(q, [d], str(tmp_path / "one"), PLAIN).as_json()
    second = evaluate(q, [d], str(tmp_path / "two"), PLAIN).as_json()
    assert first["digest"] == second["digest"]
    again = evaluate(q, [d], str(tmp_path / "one"), PLAIN).as_json()
    assert again == {**first, "status": "unchanged"}


def test_random_codes_are_at_chance(tmp_path):
    q = write_codes(tmp_path / "q", {"q-0.tar": Rows(range_keys(40), random_codes(40), labels_of(40))}).uri
    d = write_codes(
        tmp_path / "d", {"d-0.tar": Rows(range_keys(2000), random_codes(2000, seed=1), labels_of(2000))}
    ).uri
    for at, spread in ((None, 0.05), (10, 0.25)):
        result = evaluate(q, [d], str(tmp_path / f"report-{at}"), config(at=at)).as_json()
        assert result["map"] == pytest.approx(result["chance"], rel=spread)
    assert result["chance"] > 0.4  # random hits among the first ten lower the denominator too
