"""The flow against a real Prefect server, triggered by its API, and against the temporary one of `hhnet run`."""

import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from pipelines.artifacts import open_artifact, versions
from pipelines.config import Config, IngestSettings
from pipelines.ingest import ingest
from pipelines.kinds.artifact import open_index
from pipelines.storage import Store
from tests.support.pictures import write_folder

from .conftest import SETTINGS

HHNET = [sys.executable, "-m", "pipelines"]
ROOT = Path(__file__).parents[2]
DEADLINE_S = 600.0

pytestmark = pytest.mark.timeout(900)


@dataclass(frozen=True)
class Prefect:
    """A running server: its API and the password it asks for."""

    url: str
    password: str

    def call(self, method: str, path: str, **body: Any) -> Any:
        user, word = self.password.split(":")
        answer = httpx.request(method, f"{self.url}{path}", auth=(user, word), json=body or None, timeout=30)
        answer.raise_for_status()
        return answer.json()

    @property
    def env(self) -> dict[str, str]:
        return {"PREFECT_API_URL": self.url, "PREFECT_API_AUTH_STRING": self.password}


def environment(home: Path, **more: str) -> dict[str, str]:
    """A clean environment with a home of its own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "RAY_"))}
    (home / "tmp").mkdir(exist_ok=True)
    ours = {
        "HOME": str(home),
        "PREFECT_HOME": str(home / "prefect"),
        "TMPDIR": str(home / "tmp"),
        "OMP_NUM_THREADS": "1",
    }
    return {**kept, **ours, **more}


def until(what: str, check: Any, seconds: float = DEADLINE_S) -> Any:
    """Poll until `check` returns something; a deadline, not a measurement."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if found := check():
                return found
        except httpx.HTTPError:
            pass
        time.sleep(0.3)
    raise AssertionError(f"{what} did not happen in {seconds:g} s")


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    """A folder with a path short enough for Ray's sockets."""
    with tempfile.TemporaryDirectory(prefix="t-") as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def prefect(home: Path) -> Iterator[Prefect]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = Prefect(f"http://127.0.0.1:{port}/api", f"tester:{secrets.token_hex(16)}")
    quiet = {"PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1"}
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with (home / "server.log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--no-ui"],
            env=environment(home, PREFECT_SERVER_API_AUTH_STRING=server.password, **quiet),
            stdout=log,
            stderr=log,
        )
    try:
        until("the server's start", lambda: server.call("GET", "/health"))
        yield server
    finally:
        process.terminate()
        process.wait(timeout=30)


@pytest.fixture(scope="module")
def recipe(home: Path, pictures: Path) -> Path:
    """A configuration file for the session's pictures."""
    settings = [
        *SETTINGS,
        "train.rotate=itq",
        f"run.source={json.dumps(str(pictures))}",
        'run.split="train=.6,query=.2,database=.2"',
    ]
    sections: dict[str, list[str]] = {}
    for setting in settings:
        name, _, value = setting.partition("=")
        section, _, key = name.partition(".")
        quoted = value if value[0] in '"0123456789' else json.dumps(value)
        sections.setdefault(section, []).append(f"{key} = {quoted}")
    text = "\n".join("\n".join([f"[{section}]", *lines]) for section, lines in sections.items())
    (home / "recipe.toml").write_text(text)
    return home / "recipe.toml"


@pytest.fixture(scope="module")
def triggered(prefect: Prefect, recipe: Path, home: Path) -> Iterator[dict[str, Any]]:
    """A run of the served deployment, triggered by the API and ended."""
    command = [sys.executable, "-m", "flows.deploy", "--config", str(recipe), "--name", "test", "--cron", "0 2 1 1 *"]
    with (home / "serve.log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--out", str(home / "served")],
            env=environment(home, **prefect.env),
            cwd=ROOT,
            stdout=log,
            stderr=log,
        )
    try:
        deployment = until("the deployment", lambda: prefect.call("GET", "/deployments/name/hhnet/test"))
        start = {"state": {"type": "SCHEDULED"}, "idempotency_key": "once"}
        path = f"/deployments/{deployment['id']}/create_flow_run"
        run = until("the trigger", lambda: prefect.call("POST", path, **start))  # a busy SQLite answers 503
        ended = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")

        def end() -> dict[str, Any] | None:
            found: dict[str, Any] = prefect.call("GET", f"/flow_runs/{run['id']}")
            return found if found["state_type"] in ended else None

        yield {**until("the end of the run", end), "deployment": deployment}
    finally:
        process.terminate()
        process.wait(timeout=60)


def test_the_schedule_puts_runs_on_the_calendar(prefect: Prefect, triggered: dict[str, Any]) -> None:
    """What a broken scheduler service in the server would not do, although the deployment shows its schedule."""
    deployment = {"id": {"any_": [triggered["deployment"]["id"]]}}

    def planned() -> list[dict[str, Any]]:
        runs = prefect.call("POST", "/flow_runs/filter", deployments=deployment)
        return [run for run in runs if run["auto_scheduled"] and run["state_type"] == "SCHEDULED"]

    runs = until("a scheduled run", planned, 60)
    starts = [datetime.fromisoformat(run["next_scheduled_start_time"]) for run in runs]
    assert {(start.month, start.day, start.hour, start.minute) for start in starts} == {(1, 1, 2, 0)}


def run(recipe: Path, home: Path, out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`hhnet run` with the temporary server."""
    command = [*HHNET, "run", "--config", str(recipe), "--out", str(out), *arguments]
    return subprocess.run(command, env=environment(home), cwd=home, capture_output=True, text=True, timeout=DEADLINE_S)


@pytest.fixture(scope="module")
def local(recipe: Path, home: Path) -> dict[str, Any]:
    """The result of a run with the temporary server."""
    done = run(recipe, home, home / "local", "--json")
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def test_a_triggered_run_completes_and_shows_its_progress_and_report(
    prefect: Prefect, triggered: dict[str, Any], home: Path
) -> None:
    assert triggered["state_type"] == "COMPLETED", triggered["state"]
    assert triggered["deployment"]["schedules"][0]["schedule"]["cron"] == "0 2 1 1 *"
    artifacts = prefect.call("POST", "/artifacts/filter", artifacts={"flow_run_id": {"any_": [triggered["id"]]}})
    progress = {artifact["key"]: artifact["data"] for artifact in artifacts if artifact["type"] == "progress"}
    stages = ("ingest", "verify", "train", "rotate", "encode-query", "encode-database", "index", "evaluate", "publish")
    assert progress == {f"hhnet-{stage}": 100.0 for stage in stages}
    report = next(artifact["data"] for artifact in artifacts if artifact["type"] == "markdown")
    assert "mAP" in report and "images/s" in report and f"{home / 'served'}/model" in report


def test_both_servers_lead_to_the_same_bytes(triggered: dict[str, Any], local: dict[str, Any], home: Path) -> None:
    for part in ("model", "model-itq", "codes/query", "codes/database", "index"):
        assert open_artifact(home / "served" / part).digest == open_artifact(home / "local" / part).digest
    turned = open_artifact(home / "local" / "model-itq").digest
    assert open_artifact(home / "local" / "codes" / "query").manifest.input("model").digest == turned
    assert local["verb"] == "run" and local["status"] == "done"
    assert 0 < local["chance"] < 1 and 0 < local["map"] <= 1 and local["images_per_second"] > 0
    assert Path(local["report"]).is_file()
    assert (home / "local" / "index" / "versions" / "1.json").is_file()


def test_a_second_run_does_nothing_and_says_so(local: dict[str, Any], recipe: Path, home: Path) -> None:
    done = run(recipe, home, home / "local", "--json")
    assert done.returncode == 0, done.stderr
    again = json.loads(done.stdout.splitlines()[-1])
    assert again["status"] == "unchanged"
    assert {name: again[name] for name in ("digest", "map", "chance")} == {
        name: local[name] for name in ("digest", "map", "chance")
    }
    assert again["images_per_second"] > 0


def stages(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """The status of every stage but the proofs, by its verb."""
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    return {stage["verb"]: stage["status"] for stage in result["stages"] if stage["verb"] != "verify"}


def test_a_night_with_new_shards_makes_the_next_version(local: dict[str, Any], recipe: Path, home: Path) -> None:
    """The same command with a database that has grown, then one that has lost its first shards."""
    write_folder(home / "more", classes=3, per_class=6, seed=9, first=500)
    config = Config(ingest=IngestSettings(samples_per_shard=10, name="more"))
    shards, out = ingest(str(home / "more"), str(home / "more-shards"), config), home / "local"
    more, codes = shards["uri"], f"encode database-{shards['digest'][:12]}"
    grown = ["--json", "--set", f'run.database=["database", "{more}"]']
    expected = dict.fromkeys(("ingest", "train", "rotate", "encode query", "encode database"), "unchanged")
    new = dict.fromkeys((codes, "index add", "evaluate", "publish"), "done")
    assert stages(run(recipe, home, out, *grown)) == expected | new
    assert stages(run(recipe, home, out, *grown)) == dict.fromkeys(expected | new, "unchanged")
    keys = index_keys(out)
    assert sum(key.startswith("class_00/05") for key in keys) == 6
    left = stages(run(recipe, home, out, "--json", "--set", f'run.database=["{more}"]'))
    assert left == dict.fromkeys(("ingest", "train", "rotate", "encode query", codes), "unchanged") | dict.fromkeys(
        ("index add", "evaluate", "publish"), "done"
    )
    assert index_keys(out) < keys and len(index_keys(out)) == 18
    assert len(list((out / "reports").iterdir())) == 3
    assert versions(Store(out / "index")) == [1, 2, 3]


def index_keys(out: Path) -> set[str]:
    with open_index(str(out / "index")) as reader:
        return set(reader.all_keys())


def test_bad_settings_end_the_run_with_their_own_exit_code_and_nothing_stays_behind(
    local: dict[str, Any], recipe: Path, home: Path
) -> None:
    before = set(home.rglob("hhnet-*"))
    done = run(recipe, home, home / "local", "--set", "model.bits=24")
    assert done.returncode == 2
    assert done.stdout == ""
    complaints = [line for line in done.stderr.splitlines() if line.startswith("hhnet: ")]
    assert len(complaints) == 1 and "choose another --out" in complaints[0]
    assert "Traceback" not in done.stderr
    assert set(home.rglob("hhnet-*")) == before == set()
