"""A cluster begun with `ray start --head` and token authentication takes the verbs as jobs."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, cast

import pytest

from tests.integration.conftest import SETTINGS
from tests.integration.test_encode import tree
from tests.support.processes import stopped, trainers_below
from tests.support.proxy import proxy_to

pytestmark = pytest.mark.timeout(600)

BIN = Path(sys.executable).parent
# Jobs print what looks like a result, as a log of another library may do.
LIAR = """
import atexit, sys
if "pipelines" in sys.orig_argv:
    atexit.register(lambda: print('{"verb": "liar", "status": "done"}', flush=True))
"""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def environment(**more: str) -> dict[str, str]:
    """A clean environment for Ray; its head does not wait for half a minute at its end until its workers are idle."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "COV_"))}
    ours = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"}
    return {**kept, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", **ours, **more}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Environment of a client of a one-node cluster; its dashboard's address is in TEST_ADDRESS."""
    token = tmp_path_factory.mktemp("token") / "token"
    token.write_text("0123456789abcdef" * 4)
    token.chmod(0o600)
    port, dashboard = free_port(), free_port()
    env = environment(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(token), RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0")
    (site := tmp_path_factory.mktemp("site")).joinpath("sitecustomize.py").write_text(LIAR)
    paths = os.pathsep.join([str(site), *filter(None, [env.get("PYTHONPATH")])])
    words = ["start", "--head", "--block", "--num-cpus=2", "--node-ip-address=127.0.0.1", f"--port={port}"]
    words += ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", "--include-dashboard=true"]
    # Of its own: a job asks the files there for its cluster, and would be led to whatever other one was begun last.
    temporary = tempfile.mkdtemp(prefix="t-")
    words += [f"--temp-dir={temporary}"]
    words += ["--object-store-memory=200000000", f"--dashboard-agent-listen-port={free_port()}", "--labels=role=driver"]
    head = subprocess.Popen(
        [BIN / "ray", *words], env={**env, "PYTHONPATH": paths}, start_new_session=True, stdout=subprocess.DEVNULL
    )
    address = f"http://127.0.0.1:{dashboard}"
    try:
        assert wait_until_up(address, env), "the cluster did not come up"
        theirs = {"TEST_ADDRESS": address, "TEST_GCS": f"127.0.0.1:{port}", "TEST_FOLDER": temporary}
        yield {**env, **theirs, "TEST_HEAD": str(head.pid)}
    finally:
        head.terminate()
        head.wait(timeout=60)
        shutil.rmtree(temporary, ignore_errors=True)


def wait_until_up(address: str, env: dict[str, str]) -> bool:
    """A cluster is up when it has run a job: the agent that runs them comes last."""
    probe = [BIN / "ray", "job", "submit", "--address", address, "--", "python", "-V"]
    return any(subprocess.run(probe, env=env, capture_output=True).returncode == 0 for _ in range(30))


def encode_words(shards: Path, model: Path, out: Path) -> list[str]:
    words = ["encode", "--shards", str(shards / "train"), "--model", str(model), "--out", str(out)]
    for setting in SETTINGS:
        words += ["--set", setting]
    return words


def test_ray_job_submit_makes_the_same_bytes(
    cluster: dict[str, str], shards: Path, model: Path, codes: Path, tmp_path: Path
) -> None:
    out = tmp_path / "codes"
    submit = [BIN / "ray", "job", "submit", "--address", cluster["TEST_ADDRESS"], "--"]
    words = ["python", "-m", "pipelines", *encode_words(shards, model, out), "--set", "ray.address=auto"]
    done = subprocess.run([*submit, *words], env=cluster, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert tree(out) == tree(codes / "train")


def hhnet(*words: str | Path, env: dict[str, str], cwd: Path | None = None) -> "subprocess.CompletedProcess[str]":
    """Run the command line; the checkout is found from any folder."""
    here = {"PYTHONPATH": os.pathsep.join(filter(None, [str(Path.cwd()), env.get("PYTHONPATH")]))}
    command = [sys.executable, "-m", "pipelines", *map(str, words)]
    return subprocess.run(command, env=env | here, cwd=cwd, capture_output=True, text=True, timeout=240)


def test_an_http_address_submits_the_verb_itself(
    cluster: dict[str, str], shards: Path, model: Path, codes: Path, tmp_path: Path
) -> None:
    """A relative path is meant where the command is given; what the job prints is neither its result nor lost."""
    words = [*encode_words(shards, model, Path("codes")), "--set", f"ray.address={cluster['TEST_ADDRESS']}", "--json"]
    done = hhnet(*words, env=cluster, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["uri"] == str(tmp_path / "codes")
    assert tree(tmp_path / "codes") == tree(codes / "train")
    assert done.stderr.count('"liar"') == 1
    assert re.search(r"^encode: codes: 36/36 images in \d+ s", done.stderr, re.M), done.stderr
    assert "@hhnet" not in done.stderr


def test_a_job_and_its_workers_log_as_its_submitter_does(
    cluster: dict[str, str], shards: Path, model: Path, tmp_path: Path
) -> None:
    words = [*encode_words(shards, model, tmp_path / "codes"), "--set", f"ray.address={cluster['TEST_ADDRESS']}"]
    done = hhnet(*words, "--log-level", "debug", "--log-json", env=cluster)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert [line["job"][-2:] for line in lines if "is submitted" in line["message"]] == ["-1"]
    assert len([line for line in lines if line.get("worker") and "begun on" in line["message"]]) == 4
    assert [line["done"] for line in lines if line.get("stage") == "encode: codes"][-1] == 36
    logs = Path(cluster["TEST_FOLDER"]).glob("session_latest/logs/worker-*.err")
    spoken = [json.loads(line) for log in logs for line in log.read_text().splitlines() if line.startswith('{"time"')]
    done_there = [(line["shard"], line["samples"]) for line in spoken if line["logger"] == "pipelines.encode.workers"]
    assert sorted(done_there) == [*((f"train-{number:06d}.tar", 10) for number in range(3)), ("train-000003.tar", 6)]


JOINED = """
import sys, ray
from pipelines.cluster.session import ray_session
from pipelines.config.loading import load_config
from pipelines.console import log_variables, show_log
show_log("debug", as_json=True)
with ray_session(load_config(sets=[f"ray.address={sys.argv[1]}"])):
    print(ray.get(ray.remote(log_variables).remote()))
"""


def test_the_workers_of_a_joined_cluster_log_as_the_verb_does(cluster: dict[str, str]) -> None:
    command = [sys.executable, "-c", JOINED, cluster["TEST_GCS"]]
    done = subprocess.run(command, env=cluster, capture_output=True, text=True, timeout=240)
    assert done.stdout == "{'HHNET_LOG_LEVEL': 'debug', 'HHNET_LOG_JSON': '1'}\n", done.stderr
    assert all(json.loads(line)["level"] == "debug" for line in done.stderr.splitlines())


WATCHED = """
import json, sys
from pipelines.cluster.progress import reporting
from pipelines.config.loading import load_config
from pipelines.encode.encode import encode
seen = []
with reporting(lambda *told: seen.append(told)):
    result = encode(*sys.argv[1:4], load_config(sets=sys.argv[4:]))
print(json.dumps({"result": result.as_json(), "seen": seen}))
"""


def test_the_progress_of_a_job_reaches_the_reporter(
    cluster: dict[str, str], shards: Path, model: Path, tmp_path: Path
) -> None:
    words = [str(shards / "train"), str(model), str(tmp_path / "codes"), *SETTINGS]
    command = [sys.executable, "-c", WATCHED, *words, f"ray.address={cluster['TEST_ADDRESS']}"]
    done = subprocess.run(command, env=cluster, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["result"]["status"] == "done"
    assert told["seen"][0][:3] == ["encode: codes", 0, 36] and told["seen"][-1][:3] == ["encode: codes", 36, 36]


def test_a_job_that_fails_fails_here_with_its_own_code(cluster: dict[str, str], shards: Path, tmp_path: Path) -> None:
    words = [*encode_words(shards, tmp_path / "nowhere", tmp_path / "codes")]
    done = hhnet(*words, "--set", f"ray.address={cluster['TEST_ADDRESS']}", env=cluster)
    assert done.returncode == 2
    assert "holds no committed model" in done.stderr.splitlines()[-1]
    assert done.stderr.splitlines()[-1].startswith("hhnet: job hhnet-")


def started(words: list[str], env: dict[str, str]) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "pipelines", *words]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def await_true(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_broken_connections_neither_lose_nor_double_a_line(
    cluster: dict[str, str], shards: Path, tmp_path: Path
) -> None:
    """And when nobody answers any more, that is said in time; the same command attaches to the job."""
    dashboard = int(cluster["TEST_ADDRESS"].rpartition(":")[2])
    out = tmp_path / "model"
    more = ("train.epochs=60", "train.val_every=60", "ray.wait_s=6")
    words = ["train", "--shards", str(shards / "train"), "--out", str(out)]
    words += [word for setting in (*SETTINGS, *more) for word in ("--set", setting)]
    with proxy_to(dashboard) as proxy:
        verb = started([*words, "--set", f"ray.address=http://127.0.0.1:{proxy.port}"], cluster)
        await_true(lambda: any(out.rglob("checkpoints/*/manifest.json")))
        for _ in range(3):
            assert proxy.cut() > 0
            time.sleep(2)
        with stopped(trainers_below(int(cluster["TEST_HEAD"]))):  # the job does not end before it is found again
            proxy.close()
            printed, err = verb.communicate(timeout=60)
            again = started([*words, "--set", f"ray.address={cluster['TEST_ADDRESS']}", "--json"], cluster)
            told = read_to("Running entrypoint for job", again)
    assert (verb.returncode, printed) == (3, ""), err
    assert "has not answered for" in err.splitlines()[-1] and "the same command goes on" in err.splitlines()[-1]
    assert err.count("Running entrypoint for job") == 1
    steps = [int(step) for step in re.findall(r"^train: (\d+)/", err, re.M)]
    assert steps == sorted(set(steps))

    printed, rest = again.communicate(timeout=240)
    assert again.returncode == 0, told + rest
    (job,) = set(re.findall(r"Running entrypoint for job (\S+):", err + told))
    assert job.endswith("-1"), "the second command attached to the job of the first"
    assert json.loads(printed)["status"] == "done"


def read_to(words: str, verb: "subprocess.Popen[str]") -> str:
    """What a verb says on stderr up to the line with these words."""
    told = ""
    while words not in told:
        line = cast("IO[str]", verb.stderr).readline()
        assert line, told
        told += line
    return told


def test_the_driver_of_a_job_goes_to_a_node_with_its_labels(
    cluster: dict[str, str], shards: Path, model: Path, tmp_path: Path
) -> None:
    words = [*encode_words(shards, model, tmp_path / "codes"), "--set", f"ray.address={cluster['TEST_ADDRESS']}"]
    done = hhnet(*words, "--set", 'ray.driver_labels={"ray.io/market-type"="on-demand"}', *wait(3), env=cluster)
    assert done.returncode == 3, done.stderr
    assert "has not started job" in done.stderr.splitlines()[-1] and "market-type" in done.stderr.splitlines()[-1]
    done = hhnet(*words, "--set", 'ray.driver_labels={role="driver"}', *wait(60), "--json", env=cluster)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["status"] == "done"


def wait(seconds: int) -> tuple[str, str]:
    return "--set", f"ray.wait_s={seconds}"


def test_another_token_is_bad_usage_however_the_cluster_is_reached(
    cluster: dict[str, str], shards: Path, model: Path, tmp_path: Path
) -> None:
    (wrong := tmp_path / "token").write_text("f" * 64)
    for address in (cluster["TEST_ADDRESS"], cluster["TEST_GCS"]):
        words = [*encode_words(shards, model, tmp_path / "codes"), "--set", f"ray.address={address}"]
        done = hhnet(*words, env={**cluster, "RAY_AUTH_TOKEN_PATH": str(wrong)})
        assert done.returncode == 2, done.stderr
        assert "refuses this environment: set RAY_AUTH_MODE=token" in done.stderr.splitlines()[-1]


def test_without_the_token_nothing_is_submitted(cluster: dict[str, str], tmp_path: Path) -> None:
    wrong = tmp_path / "token"
    wrong.write_text("f" * 64)
    wrong.chmod(0o600)
    submit = [BIN / "ray", "job", "submit", "--address", cluster["TEST_ADDRESS"], "--", "python", "-V"]
    env = {**cluster, "RAY_AUTH_TOKEN_PATH": str(wrong)}
    done = subprocess.run(submit, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "401" in done.stdout + done.stderr or "nauthorized" in done.stdout + done.stderr or "nvalid" in done.stderr
