"""The arithmetic of `encode --dry-run`, from what a trial took. The integration test tries shards."""

from dataclasses import replace

import pytest

from pipelines.encode.preflight import Estimate, Fleet, TrialFigures, TrialReceipt, format_duration

GPU = Fleet(workers=2, gpus=1, hosts=1)
TRIAL = TrialFigures(
    shards=2,
    images=2000,
    rejects=0,
    seconds=42.0,
    startup=10.0,
    rows=1000,
    wall=20.0,
    cpu=30.0,
    rates={"read": 5000.0, "decode": 51.0, "forward": 1250.0, "write": 9000.0},
    bytes_per_image=40.0,
    puts_per_shard=2.0,
    last=TrialReceipt.model_construct(host="node-1", device="NVIDIA H200", cpus=16.0),
)


def test_the_slowest_step_binds_and_the_network_says_what_it_could_do() -> None:
    estimate = Estimate(TRIAL, GPU, [1000] * 10)
    assert estimate.binding() == "decode-bound: 100 of 2,500 images/s, which forward could do"
    assert estimate.figures()["images_per_second"] == 100.0


def test_a_slow_network_is_held_against_what_reaches_it() -> None:
    trial = replace(TRIAL, rates={"read": 900.0, "decode": 400.0, "forward": 51.0, "write": 9000.0})
    assert Estimate(trial, GPU, [1000]).binding() == "forward-bound: 100 of 800 images/s, which decode could do"


def test_workers_share_the_cpus_of_their_hosts() -> None:
    many = Fleet(workers=40, gpus=0, hosts=2)  # 40 times 50 images/s, of which each takes 30 ms of 32 CPUs
    estimate = Estimate(TRIAL, many, [1000] * 40)
    assert estimate.rate == pytest.approx(32 / 0.03)
    assert estimate.binding().startswith("cpu-bound: 1,067 of 2,000 images/s: 40 workers share 32 CPUs")


@pytest.mark.parametrize(("rows", "seconds"), [([1000, 1000], 20), ([1000, 1000, 1000], 40), ([3000, 1000, 1000], 60)])
def test_a_worker_takes_the_next_shard_when_it_is_free(rows: list[int], seconds: float) -> None:
    assert Estimate(TRIAL, GPU, rows).seconds == pytest.approx(TRIAL.startup + seconds)


def test_hours_and_cost_are_those_of_all_workers() -> None:
    told = Estimate(TRIAL, GPU, [1000] * 10).cost(price=3.0)
    assert told["gpu_hours"] == pytest.approx(2 * 110 / 3600, abs=1e-4)
    assert told["cost"] == pytest.approx(3.0 * 2 * 110 / 3600, abs=1e-4)
    assert told["million_images"] == {"hours": 2.7778, "gpu_hours": 5.5556, "cost": 16.6667}
    assert "cost" not in Estimate(TRIAL, GPU, [1000]).cost(price=None)
    assert "cpu_hours" in Estimate(TRIAL, Fleet(2, 0, 1), [1000]).cost(price=None)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(4.24, "4.2 s"), (42.3, "42 s"), (59.7, "1 min 0 s"), (200, "3 min 20 s"), (18_600, "5 h 10 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
