"""The benchmarks that no change runs whole: small, and on the CPU."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

# With a GPU too: what is tried here is what runs without one.
ALONE = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}


def ran(*words: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *words], capture_output=True, text=True, env={**ALONE, **more}, timeout=580
    )


@pytest.mark.timeout(600)
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


@pytest.mark.timeout(600)
def test_rehearsal_of_make_gpu_runs_every_part(tmp_path: Path) -> None:
    """But the last, which runs below after one that failed."""
    out = tmp_path / "gpu.md"
    parts = ("--parts", "encode", "training", "search", "tests")
    done = ran("tests.bench.gpu", "--rehearse", "--out", str(out), *parts)
    page = out.read_text()
    assert done.returncode == 0, page
    assert page.startswith("# GPU, 20") and "A rehearsal on the CPU" in page
    for fact in ("date", "commit", "card", "driver", "CUDA of torch", "CPUs", "Python", "versions"):
        assert re.search(rf"^\| {fact} \| .+ \|$", page, re.M), fact
    sections = dict(section.split("\n", 1) for section in page.split("## ")[1:])
    assert list(sections) == ["Encode", "Training steps", "Search", "Tests on the card"]
    for title, section in sections.items():
        assert re.search(r"`python -m .*`: done after \d+ s\.", section), title
    columns = {
        "Encode": ("bare", "steady", "whole", "steady / bare", "of_products: steady"),
        "Training steps": ("images_per_s", "bare_images_per_s", "of_bare", "of_products"),
        "Search": ("seconds: hhnet", "seconds: scan on the CPUs", "of_products"),
    }
    for title, names in columns.items():
        for name in names:
            assert f"| {name} |" in sections[title], f"{name} of {title}"
    assert " passed" in sections["Tests on the card"]


def test_a_part_that_fails_is_written_down_and_the_next_one_runs(tmp_path: Path) -> None:
    out = tmp_path / "gpu.md"
    words = ["--rehearse", "--out", str(out), "--parts", "tests", "recipe"]
    done = ran("tests.bench.gpu", *words, PYTEST_ADDOPTS="--nonsense")
    broken, following = out.read_text().split("## ")[1:]
    assert done.returncode == 1
    assert "failed with exit code 4 after" in broken and "unrecognized arguments: --nonsense" in broken
    assert following.startswith("CIFAR-10 from scratch\n")
    assert re.search(r"`python -m .*`: done after \d+ s\.", following)
    for name in ("map", "chance", "seconds: train"):
        assert f"| {name} |" in following, name


def test_parts_for_which_no_time_is_left(tmp_path: Path) -> None:
    out = tmp_path / "gpu.md"
    done = ran("tests.bench.gpu", "--rehearse", "--out", str(out), "--minutes", "0")
    assert done.returncode == 1
    page = out.read_text()
    titles = ["Encode", "Training steps", "Search", "Tests on the card", "CIFAR-10 from scratch"]
    assert re.findall(r"^## (.+)$", page, re.M) == titles
    assert page.count(": not begun: the 0 minutes were over.") == len(titles)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), r"make gpu needs a machine with an Nvidia GPU: torch, built for CUDA .+, sees none here; REHEARSE=1 .+"),
        (("--rehearse", "--data", "nowhere"), r".*nowhere is no folder: DATA is the folder of CIFAR-10, see .+"),
    ],
)
def test_what_make_gpu_needs(words: tuple[str, ...], said: str, tmp_path: Path) -> None:
    out = tmp_path / "gpu.md"
    done = ran("tests.bench.gpu", *words, "--out", str(out))
    assert done.returncode == 2 and not out.exists()
    assert re.fullmatch(said + "\n", done.stderr)
