"""A study's groups for people: best first, with deviation, chance and what lies within the noise of the seeds."""

from typing import Any

from pipelines.study.results import cells_table, group_chances, rank_groups, summarise_groups


def cell(group: str, seed: int, value: float | None) -> dict[str, Any]:
    known = {"backbone": "b", "loss": "l", "bits": 16, "image_size": 32, "lr": 0.1}
    figures = {"map": value, "val_map": value, "chance": None if value is None else 0.25}
    return {**known, **figures, "group": group, "seed": seed, "error": None, "axis.loss": group}


def ranked(maps: dict[str, tuple[float | None, ...]]) -> list[dict[str, Any]]:
    table = cells_table(
        ["loss"], [cell(group, n, one) for group, values in maps.items() for n, one in enumerate(values)]
    )
    return rank_groups(summarise_groups(table), group_chances(table))


def test_the_best_comes_first_with_its_deviation_and_chance() -> None:
    rows = ranked({"far": (0.3, 0.31), "failed": (None, None), "best": (0.7, 0.74), "near": (0.70, 0.72)})
    assert [row["loss"] for row in rows] == ["best", "near", "far", "failed"]
    assert [row["mAP"] for row in rows] == ["0.7200 ± 0.0283", "0.7100 ± 0.0141", "0.3050 ± 0.0071", None]
    assert [row["note"] for row in rows] == ["best", "within the noise of 2 seeds", "", ""]
    assert [row["chance"] for row in rows] == [0.25, 0.25, 0.25, None]
    assert rows[-1]["failed"] == 2


def test_a_single_seed_says_nothing_about_noise() -> None:
    assert [(row["mAP"], row["note"]) for row in ranked({"a": (0.5,), "b": (0.51,)})] == [
        ("0.5100", "best"),
        ("0.5000", ""),
    ]
