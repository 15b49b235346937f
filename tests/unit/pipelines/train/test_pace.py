"""What a training of many hours on a CPU says at its first steps."""

import pytest

from pipelines.artifacts.runs import RunLog
from pipelines.cluster import progress
from pipelines.config.loading import load_config
from pipelines.storage import Store
from pipelines.train.pace import format_speed, watch_pace


@pytest.mark.parametrize(("recipe", "advice"), [("plain", "--recipe auto"), ("auto", "--set data.image_size=32")])
@pytest.mark.parametrize(("on_cpu", "seconds", "warns"), [(True, 64.0, True), (False, 64.0, False), (True, 0.3, False)])
def test_a_training_of_days_says_so_and_what_takes_less(
    recipe: str,
    advice: str,
    on_cpu: bool,
    seconds: float,
    warns: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    config = load_config(sets=[f"train.recipe={recipe}", "data.batch_size=64"])
    log = RunLog(Store("nowhere"), "train", config, total=10_000)
    follow = watch_pace(log, config, on_cpu)
    follow(0, "first batch")
    now[0] += 3600  # the first step, which tells nothing of the others
    for step in range(1, 100):
        follow(step, "")
        now[0] += seconds
    assert log.done == 99
    said = capsys.readouterr().err.splitlines()
    assert len(said) == warns
    if warns:
        assert said[0].startswith("hhnet: at 1.0 images/s this takes 7 d 9 h on this CPU: try ")
        assert advice in said[0]


def test_a_slow_pace_is_not_rounded_to_nothing() -> None:
    assert [format_speed(rate) for rate in (0.42, 12.3, 1234.0)] == ["0.4 images/s", "12 images/s", "1,234 images/s"]
