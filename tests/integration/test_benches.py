"""The benchmarks that no change runs whole: small, and on the CPU."""

import json
import os
import subprocess
import sys

import pytest

# With a GPU too: what is tried here is what runs without one.
ALONE = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}


def ran(*words: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *words], capture_output=True, text=True, env={**ALONE, **more}, timeout=280
    )


@pytest.mark.timeout(300)
def test_peers_of_the_verb_write_its_codes() -> None:
    tiny = "--images 0 --verb 40 --verb-photographs 0 --backbone test_resnet --precision fp32 --bare-s 0.1"
    done = ran("tests.bench.feed", *tiny.split())
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout.splitlines()[-1])["verb"]["small"]
    assert row["images"] == 40
    assert row["images_per_second"].keys() == {"verb", "webdataset", "ray"}
    for peer, equal in row["equal_bits"].items():
        assert equal > 0.95, f"{peer}: Pillow's pixels are nearly ours"
        assert row["ratio"][peer] == pytest.approx(
            row["images_per_second"]["verb"] / row["images_per_second"][peer], rel=0.1
        )
