"""Commands of infra/compose.yaml and infra/kubernetes that no other test starts, run as local processes."""

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import s3fs

from tests.support.manifests import KUBERNETES, POOL, named, rendered
from tests.support.platform import COMPOSE, INFRA, Platform, platform_folder, run_once, started
from tests.support.seaweed import seaweed

pytestmark = pytest.mark.timeout(240)
TRIAL = "overlays/kind"


@pytest.fixture(scope="module")
def platform() -> Iterator[Platform]:
    with platform_folder() as found:
        (found.folder / "config").mkdir()
        settings = named(TRIAL, "ConfigMap", "hhnet-settings")["data"]["hhnet.toml"]
        (found.folder / "config" / "hhnet.toml").write_text(settings.replace('"/data', f'"{found.folder}/data'))
        yield found


def container_of(manifest: dict[str, Any], kind: str = "containers") -> dict[str, Any]:
    """The one container of a Deployment, a Job or a CronJob."""
    spec = manifest["spec"].get("jobTemplate", manifest)["spec"]["template"]["spec"]
    (container,) = spec[kind]
    return dict(container)


def run_in(platform: Platform, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the words of a manifest, with folders of the test in the place of those of a container."""
    places = {
        "/opt/hhnet/entrypoint.sh": str(INFRA / "entrypoint.sh"),
        "/opt/hhnet": str(INFRA.parent),
        "/etc/prefect": f"{platform.folder}/config",
        "/config": f"{platform.folder}/config",
        "/data": f"{platform.folder}/data",
    }
    inside = re.compile(rf"(?<![^=])({'|'.join(places)})")
    return subprocess.run(
        [inside.sub(lambda found: places[found.group()], word) for word in words],
        env=platform.environment("fill") | {"AWS_ENDPOINT_URL": "http://127.0.0.1:1"} | variables,
        cwd=platform.folder,
        capture_output=True,
        text=True,
        timeout=120,
    )


# ------------------------------------------------------------------------------------------------- compose


def test_fill_makes_the_bucket_and_shards_and_finds_them_the_next_time(tmp_path: Path) -> None:
    with platform_folder() as platform, seaweed(tmp_path) as server:
        store = server.variables | {"AWS_ENDPOINT_URL": server.endpoint}
        refused = run_once("fill", platform, **store | {"HHNET_LOG_LEVEL": "none"})
        with server.environment():
            made = s3fs.S3FileSystem().exists("hhnet")
        assert refused.returncode == 2 and made, "the bucket is there before the ingest, which here ends at once"
        for state in ("done", "unchanged"):
            done = run_once("fill", platform, **store)
            assert done.returncode == 0 and done.stdout.startswith(f"ingest: {state}"), done.stderr
        with server.environment():
            found = s3fs.S3FileSystem().ls("hhnet/photos/shards")
        assert {name.rpartition("/")[2] for name in found} >= {"train", "query", "database"}
        refused = run_once("fill", platform, **store | {"AWS_SECRET_ACCESS_KEY": "wrong"})
        assert refused.returncode != 0
        settings = run_once("run", platform, "--print-config", **store)
        assert settings.returncode == 0 and "s3://hhnet/photos/shards/train" in settings.stdout, settings.stderr


# ---------------------------------------------------------------------------------------------- kubernetes


@pytest.fixture(scope="module")
def data(platform: Platform) -> Path:
    """What /data is in the Pods, with the shards that the trial's first Job makes."""
    done = run_in(platform, "/opt/hhnet/entrypoint.sh", *container_of(named(TRIAL, "Job", "hhnet-fill"))["args"])
    assert done.returncode == 0 and done.stdout.startswith("ingest: done"), done.stderr
    return platform.folder / "data"


def entrypoint(name: str, store: str = "/data") -> list[str]:
    """The entry point of a RayJob as the shells of the submitter and of the head read it."""
    return shlex.split(named("jobs", "RayJob", name)["spec"]["entrypoint"].replace("$HHNET_STORE", store))


@pytest.mark.parametrize("manifest", rendered("jobs"), ids=lambda manifest: str(manifest["metadata"]["name"]))
def test_the_entry_point_of_each_rayjob_is_a_verb_with_valid_settings(
    platform: Platform, manifest: dict[str, Any]
) -> None:
    done = run_in(platform, *entrypoint(manifest["metadata"]["name"]), "--print-config")
    assert done.returncode == 0 and "test_resnet" in done.stdout, done.stderr


def test_the_jobs_that_need_no_ray_do_their_work(platform: Platform, data: Path, tmp_path: Path) -> None:
    """Verification of what the trial has, adoption of tars, and an end that is not tried again."""
    done = run_in(platform, *entrypoint("hhnet-verify"))
    assert done.returncode == 0, done.stderr
    (tmp_path / "tars").mkdir()
    for tar in (data / "shards" / "database").rglob("*.tar"):
        shutil.copy(tar, tmp_path / "tars")
    done = run_in(platform, *entrypoint("hhnet-ingest", str(tmp_path)))
    assert done.returncode == 0 and json.loads(done.stdout)["samples"] == 90, done.stderr
    done = run_in(platform, *entrypoint("hhnet-verify", str(tmp_path / "none")), HHNET_RETRY_AFTER="0")
    assert done.returncode == 2 and "the next try" not in done.stderr


def test_the_nightly_run_has_both_secrets_and_valid_settings(platform: Platform) -> None:
    container = container_of(named(TRIAL, "CronJob", "hhnet-nightly"))
    secrets = {
        "PREFECT_AUTH_FILE": f"{platform.folder}/secrets/prefect_auth",
        "RAY_AUTH_TOKEN_PATH": f"{platform.folder}/secrets/ray_token",
    }
    assert set(secrets) <= {each["name"] for each in container["env"]}
    command = ("/opt/hhnet/entrypoint.sh", *container["args"])
    done = run_in(platform, *command, "--print-config", **secrets)
    assert done.returncode == 0 and f"{platform.folder}/data/shards/train" in done.stdout, done.stderr
    refused = run_in(platform, *command, **secrets | {"PREFECT_AUTH_FILE": "/nonexistent"})
    assert refused.returncode == 2 and "PREFECT_AUTH_FILE" in refused.stderr


def test_the_server_of_prefect_gets_the_work_pool_with_its_template(platform: Platform) -> None:
    server = container_of(named(TRIAL, "Deployment", "prefect-server"))
    assert server["args"] == COMPOSE["services"]["prefect"]["command"]
    compose = COMPOSE["services"]["prefect"]["environment"]
    theirs = {each["name"]: each["value"] for each in server["env"]}
    assert set(theirs) == set(compose)
    assert all(theirs[name] == compose[name] for name in set(compose) - {"PREFECT_AUTH_FILE"})
    shutil.copy(KUBERNETES / "base" / "pool.json", platform.folder / "config")
    pool = container_of(named(TRIAL, "Deployment", "prefect-worker"), "initContainers")
    command = ("/opt/hhnet/entrypoint.sh", *pool["args"])
    with started("prefect", platform) as service:
        api = {"PREFECT_API_URL": f"{service.url}/api", "PREFECT_HOME": f"{platform.folder}/home"}
        password = {"PREFECT_API_AUTH_STRING": platform.secret("prefect_auth")}
        assert run_in(platform, *command, **api).returncode != 0, "without the password"
        for _ in range(2):  # a restarted worker makes it again
            done = run_in(platform, *command, **api, **password)
            assert done.returncode == 0, done.stderr
        auth = httpx.BasicAuth(*platform.secret("prefect_auth").split(":"))
        found = httpx.get(f"{service.url}/api/work_pools/hhnet", auth=auth, timeout=30).json()
    assert found["type"] == "kubernetes"
    assert found["base_job_template"] == POOL


def test_the_worker_of_prefect_is_called_by_flags_that_it_has(platform: Platform) -> None:
    """It needs a cluster and prefect-kubernetes, so only its help is run."""
    program, *words = container_of(named(TRIAL, "Deployment", "prefect-worker"))["command"]
    done = run_in(platform, program, *words[:2], "--help", COLUMNS="200")
    flags = {word for word in words if word.startswith("--")}
    assert flags == {"--pool", "--type", "--with-healthcheck"}
    assert flags <= set(re.findall(r"--[a-z-]+", done.stdout)), done.stdout


def test_redis_reads_its_password_from_where_nobody_sees_it(platform: Platform, tmp_path: Path) -> None:
    container = container_of(named(TRIAL, "StatefulSet", "hhnet-redis"))
    stand_in = tmp_path / "redis-server"
    stand_in.write_text('#!/bin/sh\necho "$$ $@"\ncat\n')
    stand_in.chmod(0o755)
    process = subprocess.Popen(
        container["command"],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", "REDIS_PASSWORD": "0123"},
        stdout=subprocess.PIPE,
        text=True,
    )
    out, _ = process.communicate(timeout=30)
    assert out == f"{process.pid} - --appendonly yes --dir /data\nrequirepass 0123\n", "it gets the signals itself"
