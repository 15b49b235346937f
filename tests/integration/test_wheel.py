"""The sdist and its wheel, in an environment of their own that holds just the packages that they ask for."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import Distribution, PathDistribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from pipelines.config.settings import Config, IndexSettings
from pipelines.index.build import build_index
from tests.support.codes import simple_rows, write_codes
from tests.support.inline import InlinePool

ROOT = Path(__file__).parents[2]
LIBRARIES = Path(sysconfig.get_paths()["purelib"])


@dataclass(frozen=True)
class Environment:
    """A virtual environment in `folder`."""

    folder: Path

    @property
    def site(self) -> Path:
        """Its site-packages."""
        return next(self.folder.glob("lib/python*/site-packages"))

    def run(self, *words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        """Run one of its programs in `cwd`, without this process's paths."""
        variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        command = [str(self.folder / "bin" / words[0]), *words[1:]]
        return subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=200)


def needed(wheel: Path, extras: Sequence[str]) -> list[Distribution]:
    """The distributions that a wheel asks for with these extras, theirs included, as this environment has them."""
    (inside,) = (path for path in zipfile.Path(wheel).iterdir() if path.name.endswith(".dist-info"))
    own = PathDistribution(inside)  # type: ignore[arg-type]  # a path in a zip has all that it calls
    asked = [(own, extra) for extra in ("", *extras)]
    found = {}
    while asked:
        one, extra = asked.pop()
        for requirement in map(Requirement, one.requires or ()):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                wanted = distribution(requirement.name)
                for each in ("", *requirement.extras):
                    if (wanted.name, each) not in found:
                        found[wanted.name, each] = wanted
                        asked.append((wanted, each))
    return list({one.name: one for one in found.values()}.values())


def linked_environment(folder: Path, packages: Sequence[Distribution]) -> Environment:
    """Make an environment that has these packages by links."""
    venv.create(folder, symlinks=True)
    environment = Environment(folder)
    for each in packages:
        for top in {file.parts[0] for file in each.files or ()} - {"..", "__pycache__"}:
            if not (environment.site / top).exists():
                (environment.site / top).symlink_to(LIBRARIES / top)
    return environment


def new_environment(folder: Path, wheel: Path, extras: Sequence[str]) -> Environment:
    """Make an environment that has the wheel and, by links, what it asks for with these extras."""
    environment = linked_environment(folder, needed(wheel, extras))
    install(environment, wheel)
    return environment


def install(environment: Environment, wheel: Path) -> None:
    words = ["install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(environment.folder)]
    subprocess.run([*pip, *words], check=True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that the sdist's own files make."""
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "hatchling", "build", "-d", str(folder), "-t"]
    subprocess.run([*build, "sdist"], check=True, cwd=ROOT, capture_output=True)
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as tar:
        tar.extractall(folder, filter="data")
    subprocess.run([*build, "wheel"], check=True, cwd=folder / sdist.name.removesuffix(".tar.gz"), capture_output=True)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def light(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return new_environment(tmp_path_factory.mktemp("light") / "env", wheel, ())


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Codes of two tars in `codes`, and an exact and an approximate index of them in `flat` and `ivf`."""
    folder = tmp_path_factory.mktemp("corpus")
    codes = write_codes(folder / "codes", {f"x-{n}.tar": simple_rows(f"x/{n}", 40, seed=n) for n in range(2)})
    for kind in ("flat", "ivf"):
        settings = Config(index=IndexSettings(kind=kind, nlist=2, nprobe=2))
        build_index([codes.uri], str(folder / kind), settings, pool=InlinePool())
    return folder


def test_a_wheel_holds_every_file_of_the_packages_and_no_package_of_a_common_name(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    tracked = subprocess.run(
        ["git", "ls-files", "hhnet", "pipelines", "flows"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split()
    expected = {name if name.startswith("hhnet/") else f"hhnet/_packages/{name}" for name in tracked}
    assert {name for name in names if ".dist-info/" not in name} == expected | {"hhnet-packages.pth"}


def test_the_light_core_has_neither_ray_nor_prefect_nor_faiss(light: Environment, tmp_path: Path) -> None:
    script = "import importlib.util as u; print([n for n in ('ray', 'prefect', 'faiss') if u.find_spec(n)])"
    assert light.run("python", "-c", script, cwd=tmp_path).stdout == "[]\n"


def test_the_light_core_proves_searches_and_measures(light: Environment, corpus: Path, tmp_path: Path) -> None:
    for words in (
        ("verify", f"{corpus}/flat"),
        ("search", "--index", f"{corpus}/flat", "--key", "x/0/00001", "-k", "3"),
        ("evaluate", "--queries", f"{corpus}/codes", "--database", f"{corpus}/codes", "--out", "report"),
    ):
        done = light.run("hhnet", *words, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert list(tmp_path.glob("report/parts/report-*.html"))


def test_the_library_alone_makes_codes_and_finds_neighbours(light: Environment, tmp_path: Path) -> None:
    script = (
        "import hhnet, numpy as np; from importlib.metadata import version\n"
        "assert hhnet.__version__ == version('hhnet')\n"
        "codes = hhnet.pack_bits(np.random.default_rng(0).random((9, 64)) > .5)\n"
        "distances, ids = hhnet.hamming_knn(codes[:2], codes, 3)\n"
        "print(ids[:, 0].tolist(), distances[:, 0].tolist())"
    )
    done = light.run("python", "-c", script, cwd=tmp_path)
    assert done.stdout == "[0, 1] [0, 0]\n", done.stderr


@pytest.mark.parametrize(
    ("words", "package", "extra"),
    [
        (("index", "build", "--codes", "codes", "--out", "new"), "ray", "train"),
        (("search", "--index", "ivf", "--key", "x/0/00001"), "Faiss", "cpu"),
        (("run", "--config", "run.toml"), "prefect", "flows"),
    ],
)
def test_a_verb_that_needs_more_names_the_extra(
    light: Environment, corpus: Path, tmp_path: Path, words: Sequence[str], package: str, extra: str
) -> None:
    work = shutil.copytree(corpus, tmp_path / "work")
    (work / "run.toml").write_text('[run]\ntrain = "t"\nquery = "q"\ndatabase = ["t"]\nout = "out"\n')
    done = light.run("hhnet", *words, cwd=work)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert package in line and f"pip install 'hhnet[{extra}]'" in line


def test_a_users_own_packages_of_these_names_stay(wheel: Path, corpus: Path, tmp_path: Path) -> None:
    """Both installed ones and those in the folder that the user works in; Ray's workers are not led astray either."""
    environment = new_environment(tmp_path / "env", wheel, ["all"])
    for place in (environment.site, tmp_path):
        for name in ("pipelines", "flows"):
            (place / name).mkdir()
            (place / name / "__init__.py").write_text("mine = 1\n")
    script = "import pipelines, flows; print(pipelines.mine, flows.mine)"
    assert environment.run("python", "-c", script, cwd=tmp_path).stdout == "1 1\n"
    words = ("index", "build", "--codes", f"{corpus}/codes", "--out", "new", "--kind", "flat")
    done = environment.run("hhnet", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert environment.run("hhnet", "verify", "new", cwd=tmp_path).returncode == 0
    install(environment, wheel)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(environment.folder)]
    subprocess.run([*pip, "uninstall", "--quiet", "--yes", "hhnet"], check=True)
    assert environment.run("python", "-c", script, cwd=tmp_path).stdout == "1 1\n"
    assert not (environment.site / "hhnet-packages.pth").exists()


def test_a_job_may_name_the_module_of_the_verbs(light: Environment, tmp_path: Path) -> None:
    for module in ("pipelines", "hhnet"):
        done = light.run("python", "-m", module, "--version", cwd=tmp_path)
        assert done.stdout.startswith("hhnet ") and done.returncode == 0, done.stderr


def test_the_code_layer_of_the_image_builds_on_that_of_its_dependencies(wheel: Path, tmp_path: Path) -> None:
    """The Dockerfile's own files and pip line, in an environment of what the image's extras ask for."""
    dockerfile = re.sub(r"\\\n", " ", (ROOT / "infra" / "Dockerfile").read_text())
    copied = {word for line in re.findall(r"^COPY (.*)", dockerfile, re.M) for word in line.split()[:-1]}
    for name in copied:
        (tmp_path / "opt" / name).parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, tmp_path / "opt" / name)
    build = [distribution(name) for name in ("hatchling", "pathspec", "pluggy", "packaging", "trove-classifiers")]
    environment = linked_environment(tmp_path / "env", [*needed(wheel, ["flows", "cpu"]), *build])
    (line,) = re.findall(r"^RUN /opt/venv/bin/pip (install .*)$", dockerfile, re.M)
    pip = [sys.executable, "-m", "pip", "--python", str(environment.folder)]
    subprocess.run([*pip, *shlex.split(line)], cwd=tmp_path / "opt", check=True, capture_output=True)
    assert environment.run("hhnet", "--version", cwd=tmp_path).stdout.startswith("hhnet ")
    deploy = environment.run("python", "-m", "flows.deploy", "--help", cwd=tmp_path)
    assert deploy.returncode == 0 and "--cron" in deploy.stdout, deploy.stderr


def test_type_checkers_see_an_editable_install(light: Environment, tmp_path: Path) -> None:
    script = f"import os, hatchling.build as b; os.chdir({str(ROOT)!r}); print(b.build_editable({str(tmp_path)!r}))"
    name = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout.split()[-1]
    venv.create(tmp_path / "env", symlinks=True)
    install(Environment(tmp_path / "env"), tmp_path / name)
    user = tmp_path / "user.py"
    user.write_text(
        "from pipelines.artifacts.result import Result\nfrom hhnet.codes import pack_bits\nx: int = Result\n"
    )
    words = ["--python-executable", str(tmp_path / "env/bin/python"), "--follow-imports=silent", str(user)]
    variables = os.environ | {"MYPYPATH": ""}
    command = [sys.executable, "-m", "mypy", "--config-file=", *words]
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert 'expression has type "type[Result]"' in done.stdout and "import" not in done.stdout, done.stdout
