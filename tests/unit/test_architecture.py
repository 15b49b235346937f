"""The walls of the tree: who may import whom, which versions are the floor, and what help must not cost."""

import re
import subprocess
import sys
import tomllib
from itertools import chain
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLOORS = {
    "ray": (2, 56),  # CVE-2026-57516: code in WebDataset members; token authentication is of 2.52
    "torch": (2, 10),  # CVE-2026-24747: memory corruption in the unpickler of torch.load, which is not used here
    "pillow": (13,),  # CVE-2026-112403: overflow in the JPEG decoder
    "prefect": (3, 6, 14),  # CVE-2026-7723: a websocket without authentication
    "faiss-cpu": (1, 15),
    "fastapi": (0, 150),
}
# CVE-2025-8194: before these patch levels `tarfile` reads a prepared archive for ever. Archives are read by
# `pipelines/shards/tar.py`, which does not use that loop, so an older Python is no reason to refuse; the image has a
# newer one.
PYTHON_FLOORS = {(3, 11): 14, (3, 12): 12, (3, 13): 6}
HEAVY = ("torch", "ray", "faiss", "prefect", "numba", "pyarrow", "webdataset", "onnx", "onnxruntime")


def locked() -> dict[str, tuple[int, ...]]:
    lines = re.findall(r"^([A-Za-z0-9_.-]+)==(\d[\d.]*)", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    return {name.lower(): tuple(map(int, version.strip(".").split("."))) for name, version in lines}


def test_import_rules_hold() -> None:
    done = subprocess.run(
        [Path(sys.executable).parent / "lint-imports", "--no-cache"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_lock_is_above_the_floors_of_known_vulnerabilities() -> None:
    versions = locked()
    assert {name: versions[name] for name in FLOORS if versions[name] < FLOORS[name]} == {}


def test_what_may_be_installed_is_not_below_the_floors() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *chain(*project["optional-dependencies"].values())]
    allowed = dict(re.findall(r"([A-Za-z0-9_-]+)(?:\[[^]]*\])?>=(\d[\d.]*)", "\n".join(asked)))
    floors = {name: tuple(map(int, allowed[name].split("."))) for name in ("ray", "torch", "pillow", "prefect")}
    assert {name: floor for name, floor in floors.items() if floor < FLOORS[name]} == {}


def test_the_image_has_a_python_above_the_floor_of_its_line() -> None:
    base = re.search(r"^FROM python:(\d+)\.(\d+)\.(\d+)-", (ROOT / "infra" / "Dockerfile").read_text(), re.MULTILINE)
    assert base
    major, minor, patch = map(int, base.groups())
    assert patch >= PYTHON_FLOORS[major, minor]


def test_the_lock_has_every_dependency_and_no_second_faiss() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = ("train", "cluster", "flows", "cpu", "heic", "export", "dev")  # `all` is made of them
    wanted = [*project["dependencies"], *chain(*(project["optional-dependencies"][extra] for extra in extras))]
    names = {re.match(r"[A-Za-z0-9_.-]+", entry).group().lower() for entry in wanted}  # type: ignore[union-attr]
    assert {name.replace("_", "-") for name in names} - {name.replace("_", "-") for name in locked()} == {"hhnet"}
    assert not any(name.startswith("faiss-gpu") for name in locked())


@pytest.mark.parametrize(
    "words",
    [
        [],
        *([verb] for verb in ("ingest", "train", "encode", "verify", "index", "search", "evaluate", "dedupe", "plan")),
        *([verb] for verb in ("run", "demo", "agreement", "alias", "export", "study")),
        *(["index", verb] for verb in ("build", "add", "remove", "compact", "publish", "rollback", "info")),
    ],
    ids=" ".join,
)
def test_help_has_an_example_and_imports_nothing_heavy(words: list[str]) -> None:
    code = (
        "import sys\nfrom pipelines.cli.main import build_app\n"
        f"try: build_app()({[*words, '--help']!r})\n"
        "except SystemExit as end: status = end.code\n"
        f"heavy = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "sys.exit(f'imported {heavy}' if heavy else status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert words in ([], ["index"]) or "Example: hhnet" in " ".join(done.stdout.split())
