"""S8: calls by which stored bytes or arguments could become code stand nowhere in the product."""

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = {"pickle", "_pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "jsonpickle"}
CALLS = {
    *("eval", "exec", "compile", "__import__", "builtins.eval", "builtins.exec"),
    *("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"),
    *("torch.load", "torch.jit.load", "torch.export.load", "torch.hub.load", "torch.package.PackageImporter"),
    *(
        "torch.distributed.checkpoint.load",
        "tarfile.open",
        "tarfile.TarFile",
        "shutil.unpack_archive",
        "tempfile.mktemp",
    ),
    *("yaml.load", "yaml.full_load", "yaml.unsafe_load", "yaml.load_all", "pandas.read_pickle"),
    *("webdataset.WebDataset", "webdataset.gopen", "webdataset.tariterators.url_opener", "ray.data.read_webdataset"),
}
METHODS = {"extract", "extractall", "read_pickle", "to_pickle"}
"""Whatever they are called on: no archive is unpacked to a disk by the names in it."""


def findings(source: str) -> Iterator[str]:
    """What in a module's source is banned, as `line: name`."""
    tree = ast.parse(source)
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
                if MODULES & set(alias.name.split(".")):
                    yield f"{node.lineno}: {alias.name}"
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                names[alias.asname or alias.name] = full
                if MODULES & set(full.split(".")) or full in CALLS:
                    yield f"{node.lineno}: {full}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Load):
            full = dotted(node, names)
            if full in CALLS:
                yield f"{node.lineno}: {full}"
            elif isinstance(node, ast.Attribute) and node.attr in METHODS:
                yield f"{node.lineno}: .{node.attr}"
        if isinstance(node, ast.Call):
            for keyword in node.keywords:
                true = not (isinstance(keyword.value, ast.Constant) and not keyword.value.value)
                if keyword.arg in ("shell", "allow_pickle", "trust_remote_code") and true:
                    yield f"{node.lineno}: {keyword.arg}="
                if keyword.arg == "weights_only":
                    yield f"{node.lineno}: weights_only="


def dotted(node: ast.expr, names: dict[str, str]) -> str:
    """The full name of an expression such as `t.load`, by the module's own imports."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value, names)}.{node.attr}"
    return "?"


def product() -> list[Path]:
    return [path for package in ("hhnet", "pipelines", "flows") for path in sorted((ROOT / package).rglob("*.py"))]


def test_nothing_in_the_product_turns_bytes_into_code() -> None:
    files = product()
    assert len(files) > 50
    assert [f"{path.relative_to(ROOT)}:{found}" for path in files for found in findings(path.read_text())] == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import pickle as harmless",
        "from pickle import loads",
        "from _pickle import Unpickler",
        "import ray.cloudpickle",
        "from ray import cloudpickle as c",
        "import torch\ntorch.load(f)",
        "import torch as t\nread = t.load",
        "from torch import load as read",
        "import torch.jit\ntorch.jit.load(f)",
        "import tarfile\ntarfile.open(f)",
        "archive.extractall('.')",
        "import yaml\nyaml.load(f)",
        "eval('1')",
        "run = exec",
        "import os\nos.system('ls')",
        "import subprocess\nsubprocess.run('ls', shell=True)",
        "import subprocess\nsubprocess.run('ls', shell=flag)",
        "import numpy as np\nnp.load(f, allow_pickle=True)",
        "import webdataset as wds\nwds.WebDataset(url)",
    ],
)
def test_each_of_them_would_be_found(source: str) -> None:
    assert list(findings(source))


@pytest.mark.parametrize(
    "source",
    [
        "import safetensors.torch\nsafetensors.torch.load(data)",
        "import tarfile\ntarfile.TarInfo.frombuf(header)",
        "model.eval()",
        "import subprocess\nsubprocess.run(['ls'], shell=False)",
        "import re\nre.compile('x')",
        "import numpy as np\nnp.load(f, allow_pickle=False)",
    ],
)
def test_what_is_harmless_is_not(source: str) -> None:
    assert list(findings(source)) == []


def test_ruffs_security_rules_are_on_but_for_three() -> None:
    lint = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]["lint"]
    assert "S" in lint["select"]
    assert sorted(rule for rule in lint["ignore"] if rule.startswith("S")) == ["S101", "S603", "S607"]
    silenced = [
        line for path in product() for line in path.read_text().splitlines() if re.search(r"noqa:.*\bS\d", line)
    ]
    assert all("S310" in line for line in silenced), "only downloads from addresses of our own making are let pass"
