"""Health of codes, as figures and in words."""

from collections import Counter
from html import escape
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest

import hhnet
from pipelines.evaluate.evaluate import evaluate
from tests.support.codes import (
    Rows,
    random_codes,
    write_codes,
)
from tests.support.evaluations import config, labels_of, metrics_of, page_of, range_keys


def ill_rows(name, count, bits, seed, ones=0.5):
    """Random codes in which bit 2 is constant, bit 3 seldom set, bit 5 equals bit 4 and 7 opposes 6; bit 8 is set in a
    share of `ones`; a quarter has one code."""
    random = np.random.default_rng(seed)
    chosen = random.random((count, bits)) < 0.5
    chosen[:, 8] = random.random(count) < ones
    chosen[:, 3] = random.random(count) < 0.03
    chosen[: count // 4] = np.arange(bits) % 4 == 1
    chosen[:, 2], chosen[:, 5], chosen[:, 7] = True, chosen[:, 4], ~chosen[:, 6]
    return chosen, Rows([f"{name}{n}" for n in range(count)], hhnet.pack_bits(chosen), [[n % 3] for n in range(count)])


@pytest.fixture
def ill(tmp_path):
    """Bits of queries and database, and the report on them."""
    (queries, q), (database, d) = ill_rows("q", 200, 24, 1, ones=0.9), ill_rows("d", 600, 24, 2)
    uris = [write_codes(tmp_path / name, {f"{name}-0.tar": rows}, 24).uri for name, rows in (("q", q), ("d", d))]
    return queries, database, evaluate(uris[0], uris[1:], str(tmp_path / "report"), config()).as_json()


def test_the_health_of_the_codes_is_in_the_metrics(ill):
    queries, database, result = ill
    metrics = metrics_of(result)
    health = metrics["health"]
    for bits, side in ((queries, health["queries"]), (database, health["database"])):
        np.testing.assert_allclose(side["balance"], bits.mean(0), atol=1e-6)
        assert side["items"] == side["sampled"] == len(bits) and side["constant"] == [2]
        assert side["entropy_total"] == pytest.approx(sum(side["entropy"]), abs=1e-4)
        names = Counter(code.tobytes().hex() for code in hhnet.pack_bits(bits))
        assert side["distinct"] == len(names)
        first = side["largest_buckets"][0]
        assert (first["code"], first["items"]) == names.most_common(1)[0] and len(side["largest_buckets"]) == 10
        assert sum(entry["items"] for entry in side["bucket_sizes"]) == len(bits)
        assert sum(entry["buckets"] for entry in side["bucket_sizes"]) == len(names)
        bounds = [(entry["smallest"], entry["largest"]) for entry in side["bucket_sizes"]]
        assert bounds == [(1, 1), (2, 3), (4, 7), (8, 15), (16, 31), (32, 63), (64, 127), (128, 255)][: len(bounds)]
        for entry in side["bucket_sizes"]:
            inside = [size for size in names.values() if entry["smallest"] <= size <= entry["largest"]]
            assert (entry["buckets"], entry["items"]) == (len(inside), sum(inside))
        moving = np.delete(np.arange(24), 2)
        phi = np.abs(np.corrcoef(bits[:, moving].astype(float), rowvar=False))[np.triu_indices(23, 1)]
        assert side["correlation_mean"] == pytest.approx(phi.sum() / (24 * 23 / 2), abs=1e-6)
        assert [(entry["bits"], entry["phi"]) for entry in side["most_correlated"][:2]] == [([4, 5], 1), ([6, 7], -1)]
        different = (bits[:, None] ^ bits[None]).sum(2)[np.triu_indices(len(bits), 1)]
        np.testing.assert_allclose(side["distances"], np.bincount(different, minlength=25) / len(different), atol=1e-6)
    assert health["database"]["weak"] == [3] and health["database"]["copies"] == 2
    assert metrics["distinct"] == health["database"]["distinct"]


def test_the_drift_from_database_to_queries_is_in_the_metrics(ill):
    queries, database, result = ill
    drift = metrics_of(result)["health"]["drift"]
    np.testing.assert_allclose(drift["balance_change"], queries.mean(0) - database.mean(0), atol=1e-6)
    pooled = np.concatenate([queries, database]).mean(0)
    limit = NormalDist().inv_cdf(1 - 0.005 / 24)
    np.testing.assert_allclose(drift["chance"], limit * np.sqrt(pooled * (1 - pooled) * (1 / 200 + 1 / 600)), atol=1e-6)
    assert drift["beyond_chance"] == [8]
    found = hhnet.code_drift(*(hhnet.code_health(hhnet.pack_bits(bits), 24) for bits in (database, queries)))
    assert drift["divergence_total"] == pytest.approx(found.divergence.sum(), abs=1e-6)
    assert drift["divergence_max"] == pytest.approx(found.divergence[8], abs=1e-6)
    assert drift["distance_variation"] == pytest.approx(found.distance_variation, abs=1e-6)
    assert (drift["common"], drift["jaccard"]) == (found.common, pytest.approx(found.jaccard, abs=1e-6))


def test_the_page_says_in_words_what_is_wrong_with_the_codes(ill):
    queries, database, result = ill
    page = page_of(result)
    said = metrics_of(result)["health"]["conclusions"]
    total, distinct = metrics_of(result)["health"]["database"]["entropy_total"], metrics_of(result)["distinct"]
    assert said == [
        f"Taken one by one, the 24 bits hold {total:.1f} bits of entropy. 1 bit (2) is constant and tells no two items "
        "apart; 1 bit (3) has the same value in more than 89% of the items.",
        "2 of the 276 pairs of bits are nearly equal or opposite (|φ| ≥ 0.9), first of all bits 4 and 5, φ = 1.00: "
        "fewer bits would do as well.",
        f"{distinct:,} of 600 codes are distinct. The most frequent one belongs to 150 items (25.0%), among which no "
        "ranking by distance can choose.",
        f"In 1 of 24 bits the queries differ from the database by more than chance explains, most in bit 8: "
        f"{queries[:, 8].mean():.1%} ones against {database[:, 8].mean():.1%}. The "
        f"database holds 1 of their {metrics_of(result)['health']['queries']['distinct']} distinct codes.",
    ]
    section = page.split("<h2>Code health</h2>")[1].split("</section>")[0]
    assert all(escape(line) in section for line in said)
    assert section.count('src="data:image/png') == 5 and section.count("<tr>") == 3 + 10 + 10 + 24
    parts = {path.name.rpartition("-")[0] for path in Path(result["report"]).parent.glob("*.png")}
    assert parts >= {"bit_balance", "bit_correlation", "bucket_sizes", "code_distances", "bit_drift"}


def test_a_single_copy_among_many_bits_is_no_reason_for_fewer(tmp_path):
    said = {}
    for bits in (16, 64):
        ones = np.random.default_rng(5).random((200, bits)) < 0.5
        ones[:, 1] = ones[:, 0]
        rows = Rows(range_keys(200), hhnet.pack_bits(ones), labels_of(200))
        uri = write_codes(tmp_path / f"c{bits}", {"c-0.tar": rows}, bits).uri
        answer = evaluate(uri, [uri], str(tmp_path / f"r{bits}"), config()).as_json()
        said[bits] = metrics_of(answer)["health"]["conclusions"][1]
    alike = "pairs of bits is nearly equal or opposite (|φ| ≥ 0.9), first of all bits 0 and 1, φ = 1.00"
    assert said == {16: f"1 of the 120 {alike}: fewer bits would do as well.", 64: f"1 of the 2,016 {alike}."}


def test_codes_without_fault_are_said_to_be_so(tmp_path):
    codes = {
        name: Rows(range_keys(n), random_codes(n, 64, seed=n), labels_of(n)) for name, n in (("q", 90), ("d", 400))
    }
    q, d = (write_codes(tmp_path / name, {f"{name}-0.tar": rows}).uri for name, rows in codes.items())
    said = metrics_of(evaluate(q, [d], str(tmp_path / "report"), config()).as_json())["health"]["conclusions"]
    assert "None is constant or nearly so." in said[0]
    assert said[1].startswith("No two bits are near copies of each other; the most correlated are bits ")
    assert said[2] == "All 400 codes of the database are distinct."
    assert said[3].startswith("In none of the 64 bits do the queries differ from the database by more than chance")
    assert said[3].endswith("The database holds 0 of their 90 distinct codes.")


def test_a_single_query_and_codes_that_are_all_equal(tmp_path):
    rows = {name: Rows(range_keys(n), np.full((n, 1), 5, np.uint8), labels_of(n)) for name, n in (("q", 1), ("d", 20))}
    q, d = (write_codes(tmp_path / name, {f"{name}-0.tar": entry}, 8).uri for name, entry in rows.items())
    health = metrics_of(evaluate(q, [d], str(tmp_path / "report"), config()).as_json())["health"]
    assert health["queries"]["distances"] == [] and health["drift"]["distance_variation"] is None
    assert health["database"]["distances"] == [1] + 8 * [0] and health["database"]["most_correlated"] == []
    assert health["database"]["constant"] == list(range(8)) and health["drift"]["beyond_chance"] == []
    assert "8 bits (0, 1, 2, 3, 4, 5, 6, 7) are constant and tell no two items apart." in health["conclusions"][0]
    assert health["conclusions"][1] == "No two bits are correlated."
