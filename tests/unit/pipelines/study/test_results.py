"""A study's groups for people: best first, with deviation, chance and what lies within the noise of the seeds."""

import re
from typing import Any

from pipelines.study.grid import Description
from pipelines.study.page import study_page, study_plots
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


def groups_shown(rows: list[dict[str, Any]], links: dict[str, str]) -> tuple[str, list[str]]:
    """Return the section of the groups on the page, and the loss of each row there."""
    table = cells_table(["loss"], rows)
    summary = summarise_groups(table)
    page = study_page(
        *(Description(title="Losses", seeds=(0, 1)), table.to_pylist(), summary, group_chances(table)),
        *([], study_plots(summary), {}, links),
    )
    section = page.partition('id="groups"')[2].partition("</section>")[0]
    return section, re.findall(r"<tr>\s*<td>(\w+)</td>", section)


def test_the_page_has_the_best_first_and_tells_once_what_all_groups_share() -> None:
    rows = [cell("far", 0, 0.3), cell("far", 1, 0.31), cell("best", 0, 0.7), {**cell("best", 1, None), "error": "nan"}]
    rows = [{**row, "images": 100, "flops": 10**9, "report": f"{row['group']}{row['seed']}"} for row in rows]
    section, order = groups_shown(rows, {"far0": "reports/far0.html"})
    assert order == ["best", "far"] and "In all groups: bits 16, lr 0.1, GFLOP 1.0000, images seen 100." in section
    assert section.count("0.2500") == 2 and section.count('class="tick" style="left:25.0%"') == 2  # chance
    assert '<a href="reports/far0.html">0</a>, 1<' in section and "<td>0, 1 failed</td>" in section
    several, _ = groups_shown([{**row, "images": 100 + 100 * (row["group"] == "far")} for row in rows], {})
    assert ">images seen</th>" in several and "<td>200</td>" in several


def test_a_figure_that_hardly_differs_is_no_axis() -> None:
    rows = [{**cell("a", 0, 0.5), "flops": 1000, "bits": 16}, {**cell("b", 0, 0.6), "flops": 1001, "bits": 32}]
    assert list(study_plots(summarise_groups(cells_table(["loss"], rows)))) == ["map_bits"]
