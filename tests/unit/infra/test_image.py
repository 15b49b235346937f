"""What the Dockerfile copies and installs, and in which order, as far as that can be tried without an engine."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
INFRA = ROOT / "infra"
DOCKERFILE = (INFRA / "Dockerfile").read_text()


def instructions() -> list[tuple[str, str]]:
    """(instruction, arguments) of the Dockerfile, continuation lines joined."""
    text = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.M))
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in text.splitlines() if line.strip()]


def arguments(name: str) -> list[str]:
    return [rest for instruction, rest in instructions() if instruction == name]


def test_the_base_image_is_pinned_and_recent_enough() -> None:
    (base,) = arguments("FROM")
    match = re.fullmatch(r"python:3\.11\.(\d+)-slim-\w+", base)
    assert match and int(match.group(1)) >= 14  # tarfile's filters could be bypassed before


def test_what_the_dockerfile_copies_exists_and_is_not_ignored() -> None:
    kept = {line[1:] for line in (INFRA / "Dockerfile.dockerignore").read_text().splitlines() if line[0] == "!"}
    for rest in arguments("COPY"):
        for source in rest.split()[:-1]:
            assert (ROOT / source).exists(), source
            assert source in kept
    assert not arguments("ADD")


def test_a_change_of_the_code_leaves_the_layer_of_the_dependencies() -> None:
    """Whatever is copied before they are installed makes that layer anew when it changes."""
    (dependencies,) = (
        place for place, (_, rest) in enumerate(instructions()) if rest.startswith('infra/dependencies.sh "$')
    )
    before = {word for name, rest in instructions()[:dependencies] if name == "COPY" for word in rest.split()[:-1]}
    assert before == {
        *("requirements.lock", "pyproject.toml"),
        *("infra/dependencies.sh", "infra/wheel.py", "infra/hhnet-packages.pth"),
    }
    after = [rest for name, rest in instructions()[dependencies + 1 :] if name == "RUN"]
    assert len(after) == 1 and "--no-index --no-deps --no-build-isolation ." in after[0]


def test_the_image_runs_as_nobody_special() -> None:
    assert arguments("USER") == ["1000:1000"]
    last_run = max(place for place, (name, _) in enumerate(instructions()) if name == "RUN")
    assert instructions().index(("USER", "1000:1000")) > last_run
    assert any("PATH=/opt/venv/bin:$PATH" in rest for rest in arguments("ENV"))
    assert "/opt/hhnet/entrypoint.sh" in arguments("ENTRYPOINT")[0]


# -------------------------------------------------------------------------------------------- dependencies


@pytest.fixture
def calls(tmp_path: Path) -> Path:
    """A file in which the pip of a new environment notes how it was called; it fails with the status in `status`."""
    folder = tmp_path / "bin"
    folder.mkdir()
    note = f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n'
    (tmp_path / "pip").write_text(note + f'case "$*" in *--index-url*) exit $(cat {tmp_path}/status) ;; esac\n')
    (tmp_path / "pip").chmod(0o755)
    (tmp_path / "status").write_text("0")
    venv = f'#!/bin/sh\necho "venv $3" >> {tmp_path}/calls\nmkdir -p $3/bin && cp {tmp_path}/pip $3/bin/pip\n'
    (folder / "python").write_text(venv)
    (folder / "python").chmod(0o755)
    return tmp_path / "calls"


def install_dependencies(calls: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [INFRA / "dependencies.sh", *words],
        cwd=ROOT,
        env={"PATH": f"{calls.parent}/bin:/usr/bin:/bin", "TMPDIR": str(calls.parent)},
        capture_output=True,
        text=True,
    )


INDEX = "https://wheels.example.org/cpu"


def test_on_a_cpu_torch_comes_first_and_from_its_own_index(calls: Path) -> None:
    done = install_dependencies(calls, "cpu", str(calls.parent / "env"), INDEX)
    assert done.returncode == 0, done.stderr
    made, torch, *rest = calls.read_text().splitlines()
    assert made == f"venv {calls.parent}/env"
    assert torch.endswith(f"install --no-deps --index-url {INDEX} -c requirements.lock torch torchvision")
    assert not any("index-url" in line for line in rest), "an index of torch's provides nothing else"
    assert "-c requirements.lock" in rest[1] and "hhnet[flows,cpu] @ file://" in rest[1]
    assert rest[-1].endswith("uninstall --yes hhnet")
    assert done.stderr == "" and not list(calls.parent.glob("tmp.*"))


def test_an_index_without_the_locked_torch_is_named_and_the_build_goes_on(calls: Path) -> None:
    (calls.parent / "status").write_text("1")
    done = install_dependencies(calls, "cpu", str(calls.parent / "env"), INDEX)
    assert done.returncode == 0
    assert done.stderr == (
        f"dependencies: {INDEX} has no CPU wheels of the locked torch: taking PyPI's, with 3.2 GB of CUDA\n"
    )
    assert "hhnet[flows,cpu]" in calls.read_text()


@pytest.mark.parametrize("words", [("gpu", INDEX), ("cpu", ""), ("cpu",)])
def test_a_gpu_and_an_image_without_an_index_take_pypis_wheels(calls: Path, words: tuple[str, ...]) -> None:
    extra, *index = words
    assert install_dependencies(calls, extra, str(calls.parent / "env"), *index).returncode == 0
    assert "index-url" not in calls.read_text() and f"hhnet[flows,{extra}]" in calls.read_text()


def test_another_extra_is_refused_before_anything_is_installed(calls: Path) -> None:
    done = install_dependencies(calls, "tpu", str(calls.parent / "env"), INDEX)
    assert (done.returncode, done.stderr) == (2, "dependencies: EXTRA is cpu or gpu, not tpu\n")
    assert not calls.exists()
