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
    Requests,
    add_requests,
    blocks_of,
    build_requests,
    encode_requests,
    ingest_requests,
    lists_of,
    plan_requests,
    puts_of,
    upload_lists_of,
    verify_shards_requests,
)
from pipelines.storage.blocks import BLOCK_BYTES
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
    assert (blocks_of(1), blocks_of(BLOCK_BYTES), blocks_of(BLOCK_BYTES + 1)) == (1, 1, 2)
    single, upload = limits.single_bytes, limits.single_bytes + 1
    assert (puts_of(single), upload_lists_of(single)) == (1, 0)
    assert (puts_of(upload), upload_lists_of(upload)) == (2 + -(-upload // limits.part_bytes), 1)


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
        for figure in ("cpu_s", "gpu_s", "busy_s", "planning_s", "read", "written", "metadata"):
            assert getattr(more, figure) == pytest.approx(10 * getattr(less, figure), rel=0.01), (name, figure)
    assert ten.stored() == pytest.approx(10 * one.stored(), rel=0.001)


def test_more_nodes_take_less_time_and_no_other_hours() -> None:
    # 57,600 tars of 1,000 images are whole rounds of 8 and of 16 GPUs, and take a second each.
    constants = Constants(forward_gpu_s=1e-3, decode_cpu_s=1e-4, driver_cpu_s=0.0, plan_tar_s=36 / 57_600)
    few, many = (Model(constants, replace(SMALL, nodes=nodes)).encode(57_600_000) for nodes in (2, 4))
    slow, fast = (cost_of("x", work, CostSettings(get_1000=0, put_1000=0)) for work in (few, many))
    assert (
        (slow.gpu_hours, slow.cpu_hours, slow.usd) == (fast.gpu_hours, fast.cpu_hours, fast.usd) == (16, 1.61, 48.0644)
    )
    assert (slow.hours, fast.hours) == (16 / 8 + 0.01, 16 / 16 + 0.01)


def test_a_worker_takes_whole_tars() -> None:
    planned = replace(SMALL, per_shard=100_000, nodes=1000, gpus=8, cpus=16)
    constants = Constants(forward_gpu_s=5e-4, decode_cpu_s=6e-4, driver_cpu_s=0.0)
    busy = {images: Model(constants, planned).encode(images).busy_s for images in (1_000_000, 100_000, 10)}
    assert busy == pytest.approx({1_000_000: 50, 100_000: 50, 10: 0.005})  # 10 tars, one, and a few images
    no_gpus = Model(
        Constants(forward_cpu_s=9e-4, decode_cpu_s=1e-4, driver_cpu_s=0.0), replace(planned, nodes=1, gpus=0)
    )
    tars = {16: 1_600_000, 17: 1_650_000, 18: 1_750_000}
    assert {n: no_gpus.encode(images).busy_s for n, images in tars.items()} == pytest.approx(
        {16: 100, 17: 150, 18: 200}
    )


def test_a_gpu_waits_for_its_part_of_the_cpus() -> None:
    constants = Constants(forward_gpu_s=1e-3, decode_cpu_s=4e-3, driver_cpu_s=0.0)
    for cpus, seconds in ((4, 4.0), (8, 2.0), (32, 1.0)):
        one_round = Model(constants, replace(SMALL, nodes=1, gpus=4, cpus=cpus)).encode(4000)
        assert one_round.busy_s == pytest.approx(seconds)


def test_ingest_verify_and_index_wait_for_the_last_tar_or_part() -> None:
    constants = Constants(ingest_cpu_s=1e-3, verify_cpu_s=1e-3, index_cpu_s=1e-3)
    model = Model(constants, replace(SMALL, nodes=100, part_codes=10_000))
    assert [work.busy_s for work in (model.ingest(3000), model.verify(3000), model.build(15_000))] == [1, 1, 10]


def test_steps_follow_each_other() -> None:
    planned = replace(SMALL, images=10**9, night=10**6, nodes=16, gpus=8, cpus=16)
    hours = {step["step"]: step["hours"] for step in estimate(planned, Config()).steps}
    assert hours["total"] == pytest.approx(sum(hours[step] for step in ("ingest", "encode", "index")), abs=2e-4)
    model = Model(Constants(), planned)
    nights = model.ingest(10**6), model.verify(10**6), model.encode(10**6), model.plan(10**9, 10**6)
    steps = [cost_of("x", work, CostSettings()).hours for work in (*nights, model.add(10**9, 10**6))]
    assert hours["night"] == pytest.approx(sum(steps), abs=3e-4)
    assert sum(hours[step] for step in ("ingest", "encode")) > 1.2 * max(hours["ingest"], hours["encode"])


def test_a_tar_is_as_large_as_the_images_in_it() -> None:
    planned = replace(SMALL, images=10, night=1000, per_shard=100_000)
    found = estimate(planned, Config())
    night = next(step for step in found.steps if step["step"] == "night")
    assert 10 * 100_000 < found.stored_bytes < 1.1 * 10**6
    assert 1000 * 100_000 < night["bytes_written"] < 1.1 * 10**8
    assert 2 * 10**8 < night["bytes_read"] - 54_000_000 < 2.1 * 10**8  # by verify and encode, beside the model
    assert night["put"] < 50 and night["get"] < 100


def test_new_images_have_tars_of_their_own() -> None:
    model = Model(Constants(), replace(SMALL, per_shard=100_000, part_codes=100_000))
    assert model.add(10, 10).requests.put == 3 * 1 + 8  # the last tar is not filled up, and its part not either


def test_a_tar_that_is_not_full_has_its_own_blocks_and_puts() -> None:
    model = Model(Constants(image_bytes=100_000, sample_overhead_bytes=0), SMALL)
    full, more = model.verify(1000).requests.get, model.verify(1050).requests.get
    assert more - full == 1  # 5 MB are one block
    full, more = model.ingest(1000).requests, model.ingest(1050).requests
    assert (more.put - full.put, more.list - full.list) == (3, 0)


def test_each_put_in_parts_looks_for_what_broken_ones_left() -> None:
    large = Model(Constants(), SMALL)
    assert large.ingest(100_000).requests.list == 5 + 100
    assert Model(Constants(image_bytes=10_000), SMALL).ingest(100_000).requests.list == 5
    parts = Model(Constants(part_code_bytes=16, key_bytes=40), replace(SMALL, part_codes=10**6))
    assert parts.build(10**7).requests.list == 11 + 10  # a part has 16 MB, its key table 40


def test_prices_are_settings() -> None:
    asked = Work(requests=Requests(get=3000, head=1000, put=1500, list=500))
    prices = CostSettings(get_1000=0.5, put_1000=2)
    assert cost_of("x", asked, prices).usd == 4 * 0.5 + 2 * 2


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
