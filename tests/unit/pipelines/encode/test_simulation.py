"""Encodes on a simulated cluster in bad weather, by several seeds: nothing is lost, nothing doubled.

The planner, the pool, receipts and the commit are the real ones; tests/bench/simulate.py runs the same at scale.
"""

from pathlib import Path

import pytest

from tests.bench.simulate import Report, simulate
from tests.support.simulation import Weather

TARS, SAMPLES = 200, 3
STORM = Weather(
    nodes=10,
    image_s=30.0,
    losses_an_hour=6.0,
    cut_off=0.6,
    died=0.05,
    hung=0.02,
    slow=0.2,
    refused=0.1,
    lost_answers=0.1,
    driver_ends=(600.0, 1500.0),
    poison=frozenset({"s-0000007.tar"}),
)


def run(tmp_path: Path, seed: int, careless: bool = False) -> Report:
    return simulate(tmp_path / str(seed), TARS, SAMPLES, STORM, seed, careless, rows=True)


@pytest.mark.parametrize("seed", range(4))
def test_nothing_is_lost_or_doubled(tmp_path: Path, seed: int) -> None:
    report = run(tmp_path, seed)
    assert report.problems == []
    # The storm was one: what it is to show has happened.
    assert report.drivers >= 3 and report.orphans and report.attempts > TARS
    assert {"lost nodes", "cut off", "died", "hung", "refused", "lost answers"} <= report.happened.keys()
    # A poisoned tar ends as rejects; a tar may be unlucky as often.
    assert report.rejects >= SAMPLES and report.rejects % SAMPLES == 0


def test_the_same_seed_is_the_same_run(tmp_path: Path) -> None:
    one, other = (simulate(tmp_path / name, 50, SAMPLES, STORM, 5, rows=True) for name in ("one", "other"))
    assert (one.hours, one.happened, one.orphans) == (other.hours, other.happened, other.orphans)


def test_receipts_that_are_not_put_if_absent_are_found_out(tmp_path: Path) -> None:
    """Else the check would prove nothing: a worker that is cut off would replace what was published."""
    problems = [problem for seed in range(4) for problem in run(tmp_path, seed, careless=True).problems]
    assert any("is not the one that was published" in problem for problem in problems)
