"""S2: damaged pictures are decoded or rejected with a reason, in a process that lives; other formats are not tried.

Of a damaged usual JPEG both decoders make the same.
"""

import io
import random
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from pipelines.artifacts.tables import Reason
from pipelines.shards.containers.limits import ImageReject
from pipelines.shards.images import decode_image
from tests.fuzz.apart import do_apart
from tests.fuzz.hostile_images import both_outcomes, foreign_images, outcome_of
from tests.support.report import SEED, report, scaled

pytestmark = pytest.mark.timeout(scaled(300, 3600))

IMAGES = scaled(3_000, 100_000)
MEMORY_MIB = 512
POSSIBLE = {"decoded", *(reason.value for reason in Reason)} - {Reason.DAMAGED.value, Reason.WORKER_DIED.value}


def test_damaged_pictures_are_decoded_or_rejected_and_nothing_dies(tmp_path: Path) -> None:
    apart = do_apart(partial(outcome_of, SEED), range(IMAGES), tmp_path)
    counts = Counter(apart.outcomes)
    killers = [number for number, outcome in enumerate(apart.outcomes) if outcome in ("died", "hung")]
    report("S2", images=IMAGES, outcomes=counts, parent_died=0, killers=killers, growth_mib=round(apart.growth_mib))
    assert not killers, f"seed {SEED}, images {killers}"
    assert set(counts) <= POSSIBLE and len(counts) >= 5
    assert apart.growth_mib < MEMORY_MIB


def test_damaged_usual_jpegs_become_the_same_by_both_decoders(tmp_path: Path) -> None:
    apart = do_apart(partial(both_outcomes, SEED), range(IMAGES), tmp_path)
    counts = Counter(apart.outcomes)
    report("S2", usual_jpegs=IMAGES, outcomes=counts, growth_mib=round(apart.growth_mib))
    others = [number for number, outcome in enumerate(apart.outcomes) if outcome in ("differs", "died", "hung")]
    assert not others, f"seed {SEED}, images {others}"
    assert {"decoded", Reason.TRUNCATED.value, Reason.UNDECODABLE.value} <= set(counts)


@pytest.mark.parametrize("name", foreign_images())
def test_other_formats_are_rejected_before_any_decoder_sees_them(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a decoder was asked")

    whole = foreign_images()[name]
    draw = random.Random(f"{SEED} {name}")
    monkeypatch.setattr(Image, "open", refuse)
    for _ in range(scaled(20, 1_000)):
        data = bytearray(whole)
        for _ in range(draw.randint(0, 4)):
            if len(data) > 16:
                data[draw.randrange(16, len(data))] = draw.randrange(256)
        with pytest.raises(ImageReject) as caught:
            decode_image(bytes(data))
        assert caught.value.reason is Reason.NOT_AN_IMAGE


def test_most_of_the_other_formats_would_be_decoded_without_the_list() -> None:
    """A test of the test above: what it feeds really are pictures."""
    readable = 0
    for data in foreign_images().values():
        try:
            with Image.open(io.BytesIO(data)) as image:
                image.load()
            readable += 1
        except Exception:
            continue
    assert readable >= 9
