"""The flow against a real Prefect server, triggered by its API, and against the temporary one of `hhnet run`."""

import json
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
import pytest

from flows.reporting import artifact_key
from pipelines.artifacts.commit import list_versions
from pipelines.artifacts.manifest import open_artifact
from pipelines.artifacts.versions import open_current
from pipelines.config.settings import Config, IngestSettings
from pipelines.index.reader import open_index
from pipelines.ingest.adopt import Adoption, adopt
from pipelines.ingest.ingest import ingest
from pipelines.shards.shards import write_tar
from pipelines.storage import Store
from tests.support.corpus import Corpus
from tests.support.pictures import class_names, jpeg, picture, write_folder
from tests.support.prefect import DEADLINE_S, Prefect, environment, serving, until

from .conftest import SETTINGS

HHNET = [sys.executable, "-m", "pipelines"]

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    """A folder with a path short enough for Ray's sockets."""
    with tempfile.TemporaryDirectory(prefix="t-") as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def prefect(home: Path) -> Iterator[Prefect]:
    server = Prefect(home)
    try:
        server.start()
        yield server
    finally:
        server.stop()


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
def served(prefect: Prefect, recipe: Path, home: Path) -> Iterator[str]:
    """A deployment that is served, by name."""
    arguments = ("--config", str(recipe), "--name", "test", "--out", str(home / "served"))
    with serving(prefect, home, *arguments, "--cron", "0 2 1 1 *", "--timezone", "Europe/Berlin", "--tag", "night"):
        yield "test"


@pytest.fixture(scope="module")
def triggered(prefect: Prefect, served: str) -> dict[str, Any]:
    """A run of the deployment, triggered by the API with a setting of its own, and ended."""
    uid = prefect.trigger(served, "once", sets=["encode.batch_size=8"], config={"search": {"k": 3}})
    deployment = prefect.call("GET", f"/deployments/name/hhnet/{served}")
    return {**prefect.end_of(uid), "deployment": deployment}


def test_the_schedule_puts_runs_on_the_calendar(prefect: Prefect, triggered: dict[str, Any]) -> None:
    """What a broken scheduler service in the server would not do, although the deployment shows its schedule."""
    deployment = {"id": {"any_": [triggered["deployment"]["id"]]}}

    def planned() -> list[dict[str, Any]]:
        runs = prefect.call("POST", "/flow_runs/filter", deployments=deployment)
        return [run for run in runs if run["auto_scheduled"] and run["state_type"] == "SCHEDULED"]

    runs = until("a scheduled run", planned, 60)
    starts = [datetime.fromisoformat(run["next_scheduled_start_time"]) for run in runs]
    assert {(start.month, start.day, start.hour, start.minute) for start in starts} == {(1, 1, 1, 0)}  # in UTC


def run(recipe: Path, home: Path, out: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """`hhnet run` with the temporary server."""
    command = [*HHNET, "run", "--config", str(recipe), "--out", str(out), *arguments]
    clean = environment(home, **env)
    return subprocess.run(command, env=clean, cwd=home, capture_output=True, text=True, timeout=DEADLINE_S)


@pytest.fixture(scope="module")
def local(recipe: Path, home: Path) -> dict[str, Any]:
    """The result of a run with the temporary server, which what the user has set for another one does not reach."""
    hostile = {
        **{"PREFECT_PROFILE": "nowhere", "PREFECT_SERVER_API_BASE_PATH": "/other", "PREFECT_SERVER_DATABASE_NAME": "x"},
        **{"PREFECT_UI_SERVE_BASE": "/page", "HTTP_PROXY": "http://127.0.0.1:9", "ALL_PROXY": "http://127.0.0.1:9"},
    }
    (home / ".env").write_text("PREFECT_SERVER_API_BASE_PATH=/elsewhere\n")
    done = run(recipe, home, home / "local", "--json", **hostile)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def test_a_triggered_run_completes_and_shows_its_progress_and_report(
    prefect: Prefect, triggered: dict[str, Any], home: Path
) -> None:
    assert triggered["state_type"] == "COMPLETED", triggered["state"]
    schedule = triggered["deployment"]["schedules"][0]["schedule"]
    assert (schedule["cron"], schedule["timezone"]) == ("0 2 1 1 *", "Europe/Berlin")
    assert triggered["deployment"]["tags"] == triggered["tags"] == ["night"]
    assert re.fullmatch(r"test \d{4}-\d\d-\d\d orthohash-16", triggered["name"])
    shown = prefect.artifacts(triggered["id"])
    assert len({artifact["key"] for artifact in shown}) == len(shown)
    stages = (
        *("ingest shards", "verify shards/train", "verify shards/query", "verify shards/database", "train model"),
        *("rotate model-itq", "encode query", "encode database", "build index", "evaluate reports", "publish index"),
    )
    assert prefect.progress(triggered["id"]) == {artifact_key(stage): 100.0 for stage in stages}
    tasks = prefect.call("POST", "/task_runs/filter", flow_runs={"id": {"any_": [triggered["id"]]}})
    assert {task["name"] for task in tasks} == set(stages)
    by_key = {artifact["key"]: artifact["data"] for artifact in shown}
    assert "mAP" in by_key["hhnet-report"] and "images/s" in by_key["hhnet-report"]
    assert f"{home / 'served'}/model" in by_key["hhnet-report"]
    rows = json.loads(by_key["hhnet-stages"])
    assert [(row["stage"], row["status"]) for row in rows] == [(stage, "done") for stage in stages]
    slowest = json.loads(by_key["hhnet-slowest-shards"])
    assert {row["codes"] for row in slowest} == {"query", "database"} and all(row["seconds"] > 0 for row in slowest)


def test_settings_of_a_run_lie_over_those_of_its_deployment(triggered: dict[str, Any], home: Path) -> None:
    """The deployment's own tree stays as the user wrote it, and a run says what it changes."""
    parameters = triggered["parameters"]
    assert parameters["base"]["run"]["out"] == str(home / "served")
    assert parameters["base"]["train"]["epochs"] == 2 and "lr" not in parameters["base"]["train"]
    assert (parameters["config"], parameters["sets"]) == ({"search": {"k": 3}}, ["encode.batch_size=8"])


def test_a_run_that_fails_shows_how_far_it_came_and_leaves_no_file(
    prefect: Prefect, served: str, triggered: dict[str, Any], home: Path
) -> None:
    """Its settings are another model's, for which --out is taken."""
    uid = prefect.trigger(served, "fails", sets=["model.bits=24"])
    ended = prefect.end_of(uid)
    assert ended["state_type"] == "FAILED" and "choose another --out" in ended["state"]["message"]
    by_key = {artifact["key"]: artifact["data"] for artifact in prefect.artifacts(uid)}
    rows = {row["stage"]: row for row in json.loads(by_key["hhnet-stages"])}
    assert rows["verify shards/train"]["status"] == "unchanged"
    assert rows["train model"]["status"] == "failed" and "choose another --out" in rows["train model"]["detail"]
    assert "**train model failed:**" in by_key["hhnet-report"]
    assert not list((home / "prefect").glob("storage/*"))


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


def stages(done: subprocess.CompletedProcess[str]) -> dict[str, dict[str, Any]]:
    """The record of every stage of a run that ended well, by its name."""
    assert done.returncode == 0, done.stderr
    return {row["stage"]: row for row in json.loads(done.stdout.splitlines()[-1])["stages"]}


def statuses(rows: dict[str, dict[str, Any]]) -> dict[str, str]:
    """The status of every stage but the proofs, by its verb."""
    return {row["verb"]: row["status"] for row in rows.values() if row["verb"] != "verify"}


OLD = dict.fromkeys(("ingest", "train", "rotate", "encode query"), "unchanged")
NEW = dict.fromkeys(("index add", "evaluate", "publish"), "done")


def index_keys(out: Path) -> set[str]:
    with open_index(str(out / "index")) as reader:
        return set(reader.all_keys())


def test_bad_settings_end_the_run_with_their_own_exit_code_and_nothing_stays_behind(
    local: dict[str, Any], recipe: Path, home: Path
) -> None:
    before = set(home.rglob("hh*-????????"))
    done = run(recipe, home, home / "local", "--set", "model.bits=24")
    assert done.returncode == 2
    assert done.stdout == ""
    complaints = [line for line in done.stderr.splitlines() if line.startswith("hhnet: ")]
    assert len(complaints) == 1 and "choose another --out" in complaints[0]
    assert "Traceback" not in done.stderr
    assert set(home.rglob("hh*-????????")) == before == set()


def test_a_damaged_image_is_a_reject_and_the_night_goes_on(
    prefect: Prefect, local: dict[str, Any], recipe: Path, home: Path
) -> None:
    """What was proven before is not read again; the damaged tar is named, and its sample missing from the index."""
    write_folder(home / "damaged", classes=3, per_class=4, seed=11, first=900)
    config = Config(ingest=IngestSettings(samples_per_shard=10, name="damaged"))
    corpus = Corpus(Path(ingest(str(home / "damaged"), str(home / "damaged-shards"), config).uri), home)
    corpus.damage(0, [2])
    out, database = home / "local", ("--set", f'run.database=["database", "{corpus.uri}"]')
    strict = run(recipe, home, out, *database, **prefect.env)
    assert strict.returncode == 4, strict.stderr  # 1 of 12 is more than one per cent
    arguments = ("--json", *database, "--set", "encode.reject_budget=0.1")
    done = run(recipe, home, out, *arguments, **prefect.env)
    rows = stages(done)
    (checked,) = [row for row in rows.values() if row["verb"] == "verify" and row["damaged"]]
    assert checked["tars"] == 2 and checked["known"] == 1 and "damaged-000000" in checked["damaged"][0]
    assert "the damaged samples become rejects" in done.stderr
    assert [row["rejects"] for name, row in rows.items() if name.startswith("encode database-")] == [1]
    assert sum("/09" in key for key in index_keys(out)) == 11
    again = stages(run(recipe, home, out, *arguments, **prefect.env))
    known = {name: (row["known"], row["proven"]) for name, row in again.items() if row["verb"] == "verify"}
    assert sum(proven for _, proven in known.values()) == 0 and known["verify shards/train"][0] == 4
    assert statuses(again) == dict.fromkeys(statuses(rows), "unchanged")


def test_a_prefix_that_grows_is_encoded_from_its_new_tar_on(
    prefect: Prefect, local: dict[str, Any], recipe: Path, home: Path
) -> None:
    """Adopt and run, a night later again: what was encoded before stays. Then the first database is left out."""
    wds, out, how = home / "wds", home / "local", Adoption(classes=tuple(class_names(3)))
    wds.mkdir()

    def go(*database: str) -> dict[str, dict[str, Any]]:
        told = ("--json", "--set", f"run.database={json.dumps(database)}")
        return stages(run(recipe, home, out, *told, **prefect.env))

    def night(number: int) -> dict[str, dict[str, Any]]:
        """A tar of five samples comes, is adopted and goes through a run; the stages of that by name."""
        samples = [jpeg(picture(place % 3, 700 + 10 * number + place)) for place in range(5)]
        named = ({"__key__": f"{number}-{place}", "jpg": image, "cls": b"0"} for place, image in enumerate(samples))
        write_tar(wds / f"night-{number}.tar", named)
        assert adopt(str(wds), str(wds), how).samples == 5 * number
        return go("database", str(wds))

    version, reports = list_versions(Store(out / "index"))[-1], len(list((out / "reports").iterdir()))
    rows = night(1)
    (codes,) = (out / "codes").glob(f"database-{open_artifact(wds).digest[:12]}")
    assert statuses(rows) == OLD | NEW | {"encode database": "unchanged", f"encode {codes.name}": "done"}
    before = {path: path.read_bytes() for path in (codes / "parts").iterdir()}
    keys = index_keys(out)
    assert {key for key in keys if key.startswith("1-")} == {f"1-{place}" for place in range(5)}

    rows = night(2)
    new = set((codes / "parts").iterdir()) - before.keys()
    assert [path.name.rpartition("-")[0] for path in new] == ["night-2"]
    assert {path: path.read_bytes() for path in before} == before
    assert statuses(rows) == OLD | NEW | {"encode database": "unchanged", f"encode {codes.name}": "done"}
    assert open_current(Store(codes), "codes").manifest.totals == {"samples": 10, "codes": 10, "rejects": 0}
    assert index_keys(out) == keys | {f"2-{place}" for place in range(5)}

    assert statuses(go(str(wds))) == OLD | NEW | {f"encode {codes.name}": "unchanged"}
    assert index_keys(out) == {f"{number}-{place}" for number in (1, 2) for place in range(5)}
    assert list_versions(Store(out / "index"))[-1] == version + 3
    assert len(list((out / "reports").iterdir())) == reports + 3


def test_a_run_that_loses_its_terminal_leaves_nothing_behind(recipe: Path, home: Path) -> None:
    out = home / "hung"
    command = [*HHNET, "run", "--config", str(recipe), "--out", str(out), "--set", "train.epochs=500"]
    with (home / "hung.log").open("wb") as log:
        process = subprocess.Popen(
            command,
            env=environment(home),
            cwd=home,
            stdout=log,
            stderr=log,
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # below nohup it is not heard
        )
    until("a checkpoint", lambda: list(out.glob("model/checkpoints/*/manifest.json")))
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=90) == 143, (home / "hung.log").read_text()
    _, alive = psutil.wait_procs(family, timeout=30)
    assert alive == []
    assert set(home.rglob("hh*-????????")) == set()


def test_a_server_that_is_gone_for_good_costs_the_picture_alone(
    prefect: Prefect, local: dict[str, Any], recipe: Path, home: Path
) -> None:
    """The last test of the module: it ends the server."""
    command = [*HHNET, "run", "--config", str(recipe), "--out", str(home / "local"), "--set", "search.k=4"]
    env = environment(home, **prefect.env, PREFECT_CLIENT_MAX_RETRIES="0")

    def bars() -> int:
        return len(prefect.call("POST", "/artifacts/filter", artifacts={"type": {"any_": ["progress"]}}))

    before = bars()
    with subprocess.Popen(command, env=env, cwd=home, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        until("a stage at work", lambda: bars() > before)
        prefect.stop()
        out, err = process.communicate(timeout=180)
    assert (process.returncode, out) == (3, b"")
    last = err.decode().splitlines()[-1]
    assert last.startswith(f"hhnet: everything was made in {home / 'local'}, but Prefect is out of reach"), err
    assert "Traceback" not in err.decode()
    assert set(home.rglob("hh*-????????")) == set()
