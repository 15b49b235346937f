import json
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hhnet
from pipelines.artifacts.manifest import open_artifact
from pipelines.config.settings import AgreementSettings, Config
from pipelines.errors import DamagedArtifact, FingerprintMismatch, InputError
from pipelines.evaluate.agreement import report_agreement
from pipelines.evaluate.overlap import expected_overlaps, nearest_probabilities
from pipelines.verify.verify import verify
from tests.support.codes import Rows, class_codes, random_codes, write_codes

CONFIG = Config(agreement=AgreementSettings(queries=1000, k=3))
TARS = {"a-000000.tar": 14, "b-000000.tar": 9}


def rows_of(bits: int, seed: int, tars: dict[str, int], drop: int = 0) -> dict[str, Rows]:
    found = {}
    for place, (name, count) in enumerate(tars.items()):
        labels = [number % 3 for number in range(count)]
        codes = class_codes(labels, bits, 0.3, seed + place)
        keys = [f"{name}/{number}" for number in range(count)]
        sha256 = name[0] * 64
        kept = slice(drop, None)
        found[name] = Rows(keys[kept], codes[kept], [[n] for n in labels][kept], sha256, list(range(count))[kept])
    return found


def codes(out: Path, bits: int = 64, seed: int = 0, model: str = "a", drop: int = 0, **tars: Any) -> str:
    return write_codes(out, rows_of(bits, seed, tars.get("tars", TARS), drop), bits, model=model * 64).uri


def mean_over_tie_orders(old: list[int], new: list[int], k: int) -> float:
    """Mean size of the intersection of the k nearest over every pair of orders of the items."""

    def sets(distances: list[int]) -> list[set[int]]:
        return [set(sorted(order, key=lambda i: distances[i])[:k]) for order in permutations(range(len(distances)))]

    return float(np.mean([len(a & b) for a in sets(old) for b in sets(new)])) / k


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_the_overlap_is_the_mean_over_all_orders_of_the_ties(k: int) -> None:
    old, new = [2, 1, 2, 2, 0], [1, 1, 3, 1, 1]
    probabilities = [nearest_probabilities(np.array([side], np.int32), k) for side in (old, new)]
    assert [p.sum() for p in probabilities] == pytest.approx([k, k])
    assert expected_overlaps(probabilities[0], probabilities[1], k)[0] == pytest.approx(
        mean_over_tie_orders(old, new, k)
    )


def test_the_figures_are_those_of_a_plain_computation(tmp_path: Path) -> None:
    old, new = codes(tmp_path / "old", 8), codes(tmp_path / "new", 16, seed=5, model="c")
    answer = report_agreement(old, new, str(tmp_path / "report"), CONFIG).as_json()
    sides = [np.concatenate([rows.codes for rows in rows_of(b, s, TARS).values()]) for b, s in ((8, 0), (16, 5))]
    old_d, new_d = (hhnet.hamming_distances(side, side) for side in sides)
    off = ~np.eye(23, dtype=bool)
    both = [d[off].reshape(23, 22) for d in (old_d, new_d)]
    p_old, p_new = (nearest_probabilities(d, 3) for d in both)
    each = (p_old * p_new).sum(1) / 3
    assert answer["overlap"] == pytest.approx(each.mean(), abs=1e-6)
    assert answer["chance"] == pytest.approx(3 / 22, abs=1e-6)
    assert answer["correlation"] == pytest.approx(np.corrcoef(both[0].ravel(), both[1].ravel())[0, 1], abs=1e-6)
    metrics = json.loads(Path(answer["metrics"]).read_text())
    assert metrics["pairs"]["old_mean"] == pytest.approx(both[0].mean() / 8, abs=1e-6)
    assert metrics["pairs"]["new_mean"] == pytest.approx(both[1].mean() / 16, abs=1e-6)
    assert metrics["neighbours"]["new_mean"] == pytest.approx((both[1] * p_old).sum() / p_old.sum() / 16, abs=1e-6)
    assert [len(metrics["neighbours"][side]) for side in ("old", "new")] == [8, 8]
    assert metrics["self_overlap"] == pytest.approx([(p * p).sum(1).mean() / 3 for p in (p_old, p_new)], abs=1e-6)
    labels = np.array([n % 3 for count in TARS.values() for n in range(count)])
    for side, told in zip(sides, metrics["map"], strict=True):
        others = [np.arange(23) != n for n in range(23)]
        ap = [
            hhnet.average_precisions(side[[n]], labels[[n]], side[rest], labels[rest]) for n, rest in enumerate(others)
        ]
        assert told == pytest.approx(np.mean(ap), abs=1e-6)
    page = Path(answer["report"]).read_text()
    assert "Old codes with themselves" in page and page.count('<p class="soft">New codes</p>') == 6
    expected = [
        (name, int((labels == n).sum()), each[labels == n].mean()) for n, name in enumerate(("cat", "dog", "owl"))
    ]
    for entry, (name, count, mean) in zip(metrics["classes"], expected, strict=True):
        assert (entry["name"], entry["queries"], entry["overlap"]) == (name, count, pytest.approx(mean, abs=1e-6))


def test_a_code_agrees_with_itself_and_a_rerun_is_unchanged(tmp_path: Path) -> None:
    rows = {"a-000000.tar": Rows([str(n) for n in range(40)], random_codes(40, 256), [[]] * 40, "a" * 64)}
    old, new = (write_codes(tmp_path / m, rows, 256, model=m * 64).uri for m in "ac")
    # All 39 others are neighbours: where fewer are asked for, ties at the last place keep the overlap below 1.
    config = Config(agreement=AgreementSettings(k=39))
    answer = report_agreement(old, new, str(tmp_path / "report"), config).as_json()
    assert (answer["overlap"], answer["correlation"], answer["bits_old"]) == (1.0, 1.0, 256)
    again = report_agreement(old, new, str(tmp_path / "report"), config).as_json()
    assert again == {**answer, "status": "unchanged"}
    with pytest.raises(FingerprintMismatch):
        report_agreement(old, new, str(tmp_path / "report"), CONFIG)


def test_what_only_one_side_has_is_counted_and_left_out(tmp_path: Path) -> None:
    old = codes(tmp_path / "old", tars={**TARS, "c-000000.tar": 4})
    new = codes(tmp_path / "new", model="c", drop=2)
    answer = report_agreement(old, new, str(tmp_path / "report"), CONFIG).as_json()
    assert (answer["samples"], answer["old_only"], answer["new_only"]) == (19, 8, 0)
    same = report_agreement(new, new, str(tmp_path / "same"), CONFIG).as_json()
    assert (same["samples"], same["old_only"], same["new_only"]) == (19, 0, 0)
    assert answer["overlap"] == same["overlap"]


def test_codes_of_other_shards_are_refused_by_both_names(tmp_path: Path) -> None:
    old, new = codes(tmp_path / "old"), codes(tmp_path / "new", tars={"x-000000.tar": 5})
    with pytest.raises(InputError, match=rf"{old} and {new} are codes of different shards"):
        report_agreement(old, new, str(tmp_path / "report"), CONFIG)
    one = [codes(tmp_path / name, tars={"a-000000.tar": 1}) for name in ("one", "two")]
    with pytest.raises(InputError, match="share 1 samples: at least 2"):
        report_agreement(one[0], one[1], str(tmp_path / "report"), CONFIG)
    assert not (tmp_path / "report").exists()


def test_queries_are_a_seeded_sample(tmp_path: Path) -> None:
    old, new = codes(tmp_path / "old"), codes(tmp_path / "new", seed=9, model="c")

    def figures(name: str, seed: int) -> tuple[int, float]:
        config = Config(agreement=AgreementSettings(queries=4, k=3, seed=seed))
        answer = report_agreement(old, new, str(tmp_path / name), config).as_json()
        return answer["queries"], answer["overlap"]

    first = figures("one", 0)
    assert first == figures("two", 0) and first[0] == 4
    assert len({figures(f"seed{seed}", seed) for seed in range(1, 5)}) > 1


def test_verify_proves_the_report_and_its_two_codes(tmp_path: Path) -> None:
    old, new = codes(tmp_path / "old"), codes(tmp_path / "new", 128, seed=5, model="c")
    answer = report_agreement(old, new, str(tmp_path / "report"), CONFIG).as_json()
    proven = verify(answer["uri"]).as_json()
    assert (proven["kind"], proven["orphans"]) == ("report", [])
    for role, uri in (("old", old), ("new", new)):
        assert f"input {role}: {uri} has the digest that was used" in proven["checks"]
    page = Path(answer["report"]).read_text()
    assert open_artifact(old).digest in page and "http" not in page.replace("http-equiv", "")
    Path(answer["metrics"]).write_text("{}")
    with pytest.raises(DamagedArtifact, match=r"metrics.*does not match"):
        verify(answer["uri"])
