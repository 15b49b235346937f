"""The cost model: its requests are those of docs/scale.md, and it is linear where nothing else is said."""

import json
import re
from collections.abc import Callable
from dataclasses import astuple, replace
from pathlib import Path

import pytest

from pipelines.artifacts import lists
from pipelines.config.settings import Config, CostSettings
from pipelines.cost.estimate import estimate
from pipelines.cost.model import Constants, Model, Planned, Work, cost_of
from pipelines.cost.requests import (
    BLOCK_BYTES,
    Requests,
    add_requests,
    blocks_of,
    build_requests,
    encode_requests,
    ingest_requests,
    lists_of,
    plan_requests,
    puts_of,
    verify_shards_requests,
)
from pipelines.storage.blocks import BLOCK_BYTES as FETCHED
from pipelines.storage.bucket import BucketLimits

PAGE = Path(__file__).parents[4] / "docs" / "scale.md"
FORMULAS: dict[str, Callable[[int], Requests]] = {
    "encode": encode_requests,
    "index build, one part": lambda n: build_requests(n, 1),
    "index build, n parts": lambda n: build_requests(n, n),
    "index add of n tars, one part": lambda n: add_requests(n, parts=1, built=1, merged=1),
    "index add of n tars to n, a part for each": lambda n: add_requests(n, parts=2 * n, built=n, merged=0),
    "plan": lambda n: plan_requests(),
    "verify of shards, first": verify_shards_requests,
    "ingest of n tars": ingest_requests,
}
SMALL = Planned(images=100_000, per_shard=1000, part_codes=10_000, night=1000, nodes=2, gpus=4, cpus=8)


def told() -> dict[str, list[str]]:
    """The formulas of each verb in all tables of the page that have a column for each kind of request."""
    rows = re.findall(r"^\| (.+?) \| (.+?) \| (.+?) \| (.+?) \| (.+?) \|$", PAGE.read_text(), re.MULTILINE)
    return {verb: formulas for verb, *formulas in rows if re.fullmatch(r"[\dn +]+", formulas[0])}


def value(formula: str, n: int) -> int:
    times, _, more = formula.partition("n") if "n" in formula else ("0", "", f"+ {formula}")
    return int(times or 1) * n + int(more.replace("+", "") or 0)


@pytest.mark.parametrize("verb", FORMULAS)
def test_the_requests_are_those_of_the_page(verb: str) -> None:
    formulas = told()[verb]
    for n in (1, 7, 1000):
        assert astuple(FORMULAS[verb](n)) == tuple(value(formula, n) for formula in formulas)


def test_blocks_and_uploads_are_those_of_the_store() -> None:
    limits = BucketLimits()
    assert BLOCK_BYTES == FETCHED
    assert (blocks_of(1), blocks_of(BLOCK_BYTES), blocks_of(BLOCK_BYTES + 1)) == (1, 1, 2)
    assert puts_of(limits.single_bytes) == 1
    assert puts_of(limits.single_bytes + 1) == 2 + -(-(limits.single_bytes + 1) // limits.part_bytes)


def test_lists_begin_where_manifests_stop_to_name_their_entries() -> None:
    half = lists.INLINE_ENTRIES // 2
    assert lists_of(half, half) == 0
    assert lists_of(half, half + 1) == 2
    assert lists_of(lists.LIST_ENTRIES, lists.LIST_ENTRIES + 1) == 3


def test_ten_times_the_images_take_ten_times_the_work() -> None:
    # Twice so large that both have lists, whose entries take less than those of a manifest.
    one, ten = (Model(Constants(), replace(SMALL, images=images)) for images in (10**8, 10**9))
    for name in ("ingest", "encode", "build", "verify"):
        less, more = getattr(one, name)(10**8), getattr(ten, name)(10**9)
        for figure in ("cpu_s", "gpu_s", "planning_s", "read", "written", "metadata"):
            assert getattr(more, figure) == pytest.approx(10 * getattr(less, figure), rel=0.01), (name, figure)
    assert ten.stored() == pytest.approx(10 * one.stored(), rel=0.001)


def test_more_nodes_take_less_time_and_no_other_hours() -> None:
    few, many = (Model(Constants(), replace(SMALL, nodes=nodes)).planned for nodes in (2, 4))
    work = Work(requests=Requests(), cpu_s=7200.0, gpu_s=28_800.0, planning_s=36.0)
    slow, fast = (cost_of("x", work, planned, CostSettings()) for planned in (few, many))
    assert (
        (slow.gpu_hours, slow.cpu_hours, slow.usd) == (fast.gpu_hours, fast.cpu_hours, fast.usd) == (8, 2.01, 24.0804)
    )
    assert (slow.hours, fast.hours) == (8 / 8 + 0.01, 8 / 16 + 0.01)


def test_prices_are_settings() -> None:
    asked = Work(requests=Requests(get=3000, head=1000, put=1500, list=500))
    prices = CostSettings(get_1000=0.5, put_1000=2)
    assert cost_of("x", asked, SMALL, prices).usd == 4 * 0.5 + 2 * 2


def test_without_gpus_the_cpus_do_the_forward_passes() -> None:
    constants = Constants(forward_cpu_s=1.0, forward_gpu_s=0.1, decode_cpu_s=0.01, driver_cpu_s=0.0)
    with_gpus, without = (Model(constants, replace(SMALL, gpus=gpus)).encode(1000) for gpus in (4, 0))
    assert (with_gpus.gpu_s, with_gpus.cpu_s) == pytest.approx((100, 10))
    assert (without.gpu_s, without.cpu_s) == pytest.approx((0, 1010))


def test_a_night_without_images_costs_nothing() -> None:
    found = estimate(replace(SMALL, night=0), Config())
    night = next(step for step in found.steps if step["step"] == "night")
    assert not any(figure for name, figure in night.items() if name != "step")


def test_the_page_names_each_constant_and_its_default() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| ([\d,.e-]+) ", PAGE.read_text(), re.MULTILINE))
    assert {name: float(text.replace(",", "")) for name, text in rows.items()} == {
        **vars(Constants()),
        **CostSettings().model_dump(),
    }


def test_the_result_is_plain_json() -> None:
    found = estimate(SMALL, Config(), image_bytes=5)
    told = json.loads(json.dumps(found.as_json()))
    assert [step["step"] for step in told["steps"]] == ["ingest", "encode", "index", "total", "night"]
    assert told["constants"]["image_bytes"] == 5 and told["measured"] == []
    total = next(step for step in told["steps"] if step["step"] == "total")
    assert total["put"] == sum(step["put"] for step in told["steps"][:3])
