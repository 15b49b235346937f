"""S6: what the platform of infra/compose.yaml answers to somebody without its secrets, on every route it has."""

import json
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import psutil
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from tests.support.platform import COMPOSE, INFRA, Platform, Service, platform_folder, ray_arguments, started
from tests.support.report import report

WRONG = "0123456789abcdef" * 4

# What Ray answers without a token: the page that asks for the token and its files, whether a token is needed, and
# probes that say no more than `success`.
OPEN_IN_RAY = {
    *(("GET", path) for path in ("/", "/favicon.ico", "/static/x", "/api/authentication_mode")),
    *(("GET", path) for path in ("/api/healthz", "/api/gcs_healthz", "/api/local_raylet_healthz")),
}
# What Prefect answers without a password: the two probes. Its page is static; what it shows comes from the API.
OPEN_IN_PREFECT = {("GET", "/api/health"), ("GET", "/api/ready")}

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def platform() -> Iterator[Platform]:
    with platform_folder() as found:
        yield found


@pytest.fixture(scope="module")
def head(platform: Platform) -> Iterator[Service]:
    with started("ray-head", platform, "--num-cpus=1", *ray_arguments()) as service:
        deadline = time.monotonic() + 120
        while "Registered" not in ray_log(platform, "dashboard_agent.log") and time.monotonic() < deadline:
            time.sleep(0.3)
        yield service


@pytest.fixture(scope="module")
def prefect(platform: Platform) -> Iterator[Service]:
    with started("prefect", platform) as service:
        yield service


# --------------------------------------------------------------------------------------------------------- Ray


def registered(log: str) -> set[tuple[str, str]]:
    """(method, path) of each route that a server of Ray's says it has, with `x` for what varies."""
    kinds = r"<ResourceRoute \[(\w+)\] <(Plain|Dynamic|Static)Resource\s+(\S+?)>?\s*->"
    found = {(method, path + "/x" * (kind == "Static")) for method, kind, path in re.findall(kinds, log)}
    return {("GET" if method == "*" else method, re.sub(r"\{[^}]*\}", "x", path)) for method, path in found}


def ray_log(platform: Platform, name: str) -> str:
    log = platform.folder / "ray" / "session_latest" / "logs" / name
    return log.read_text() if log.exists() else ""


def test_ray_answers_nobody_without_its_token(platform: Platform, head: Service) -> None:
    agent = re.search(r"Dashboard agent http address: (\S+)", ray_log(platform, "dashboard_agent.log"))
    assert agent
    servers = {
        head.url: registered(ray_log(platform, "dashboard.log")),
        f"http://{agent.group(1)}": registered(ray_log(platform, "dashboard_agent.log")),
    }
    open_routes: set[tuple[str, str]] = set()
    tried = 0
    client = httpx.Client(timeout=60)
    for url, routes in servers.items():
        assert len(routes) > 5
        for method, path in routes:
            for wrong in ({}, {"Authorization": f"Bearer {WRONG}"}, {"X-Ray-Authorization": f"Bearer {WRONG}"}):
                answer = client.request(method, url + path, headers=wrong)
                tried += 1
                assert platform.secret("ray_token") not in answer.text
                if answer.status_code not in (401, 403):
                    open_routes.add((method, path))
            cookie = {"Cookie": f"ray-authentication-token={WRONG}"}
            answer = client.request(method, url + path, headers=cookie)
            assert answer.status_code in (401, 403) or (method, path) in open_routes
    client.close()
    assert open_routes == OPEN_IN_RAY
    names = {path for routes in servers.values() for _, path in routes}
    known = {"/api/jobs/", "/api/version", "/nodes", "/api/cluster_status", "/api/serve/applications/", "/logs/x"}
    assert known <= names
    right = {"Authorization": f"Bearer {platform.secret('ray_token')}"}
    assert httpx.get(head.url + "/api/version", headers=right).json()["ray_version"]
    report("S6 Ray HTTP", routes=sum(map(len, servers.values())), requests=tried, open=sorted(map(list, open_routes)))


def test_a_job_that_is_submitted_without_the_token_never_runs(platform: Platform, head: Service) -> None:
    canary = platform.folder / "canary"
    job = {"entrypoint": f"touch {canary}"}
    for headers in ({}, {"Authorization": f"Bearer {WRONG}"}, {"Authorization": "Bearer x"}, {"Authorization": WRONG}):
        assert httpx.post(head.url + "/api/jobs/", json=job, headers=headers).status_code in (401, 403)
    right = {"Authorization": f"Bearer {platform.secret('ray_token')}"}
    assert httpx.get(head.url + "/api/jobs/", headers=right, timeout=60).json() == []
    assert not canary.exists()


def listening(service: Service) -> set[tuple[str, int, str]]:
    """(address, port, process) of every socket that the service and its children listen on."""
    found = set()
    root = psutil.Process(service.process.pid)
    for process in (root, *root.children(recursive=True)):
        for socket in process.net_connections("inet"):
            if socket.status == psutil.CONN_LISTEN:
                found.add((socket.laddr.ip, socket.laddr.port, " ".join(process.cmdline())[:60]))
    return found


def methods() -> list[str]:
    """Every method of Ray's gRPC services, as its generated clients call them."""
    import ray

    generated = (Path(ray.__file__).parent / "core" / "generated").glob("*_pb2_grpc.py")
    return sorted({name for file in generated for name in re.findall(r"'(/ray\.rpc[^']+)'", file.read_text())})


def answer_of(channel: grpc.Channel, method: str, token: str | None) -> str:
    metadata = [("authorization", f"Bearer {token}")] if token else []
    call = channel.unary_unary(method, request_serializer=bytes, response_deserializer=bytes)
    try:
        call(b"", timeout=10, metadata=metadata)
    except grpc.RpcError as error:
        return str(error.code().name)
    return "OK"


def test_ray_listens_on_loopback_only_and_every_port_asks_for_the_token(platform: Platform, head: Service) -> None:
    """But for the metrics, which Ray publishes to whoever asks: names, addresses and loads of nodes, names of tasks."""
    sockets = listening(head)
    assert len(sockets) >= 8
    assert {address.removeprefix("::ffff:") for address, _, _ in sockets} == {"127.0.0.1"}
    counts: Counter[str] = Counter()
    answered, metrics = [], 0
    for _, port, process in sorted(sockets):
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            if answer_of(channel, "/none/None", None) == "UNAVAILABLE":
                metrics += shows_metrics_alone(port)
                continue
            for method in methods():
                for token in (None, WRONG):
                    found = answer_of(channel, method, token)
                    counts[found] += 1
                    if found not in ("UNAUTHENTICATED", "UNIMPLEMENTED"):
                        answered.append(f"{process} {method} {found}")
    assert answered == []
    # Two of the ports of metrics are fixed: another Ray on this machine may have them.
    assert counts["UNAUTHENTICATED"] > 100 and 1 <= metrics <= 3
    report("S6 Ray ports", methods=len(methods()), sockets=len(sockets), metrics=metrics, **counts)


def shows_metrics_alone(port: int) -> bool:
    """If a port that speaks HTTP is one of metrics, without a secret in them; any other must refuse."""
    answer = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=30)
    if answer.status_code in (401, 403):
        return False
    assert answer.status_code == 200 and answer.text.startswith("# HELP"), answer.text[:200]
    return True


# ----------------------------------------------------------------------------------------------------- Prefect


def test_prefect_answers_nobody_without_its_password(platform: Platform, prefect: Service) -> None:
    user, password = platform.secret("prefect_auth").split(":")
    with httpx.Client(base_url=prefect.url, timeout=30) as client:
        document = client.get("/api/openapi.json", auth=(user, password)).json()
        paths = {re.sub(r"\{[^}]*\}", "x", path): set(verbs) for path, verbs in document["paths"].items()}
        paths |= {"/api/openapi.json": {"get"}, "/api/docs": {"get"}, "/api/redoc": {"get"}}
        assert len(paths) > 150
        open_routes: set[tuple[str, str]] = set()
        tried = 0
        for path, verbs in paths.items():
            for verb in verbs - {"parameters"}:
                for auth in (None, (user, WRONG), (WRONG, password), ("", "")):
                    answer = client.request(verb, path if path.startswith("/api") else f"/api{path}", auth=auth)
                    tried += 1
                    if answer.status_code not in (401, 403):
                        open_routes.add((verb.upper(), path if path.startswith("/api") else f"/api{path}"))
        assert open_routes == OPEN_IN_PREFECT
        assert client.get("/api/health").json() is True
        assert password not in client.get("/").text + client.get("/ui-settings").text
        assert client.get("/api/admin/version", auth=(user, password)).status_code == 200
    report("S6 Prefect HTTP", routes=len(paths), requests=tried, open=sorted(map(list, open_routes)))


def websockets(platform: Platform) -> list[str]:
    """The paths of the websockets in the server's own routers."""
    code = (
        "import json\nfrom prefect.server.api.server import API_ROUTERS\n"
        "print(json.dumps([route.path for router in API_ROUTERS for route in router.routes"
        " if 'WebSocket' in type(route).__name__]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=platform.environment("prefect"),
        capture_output=True,
        text=True,
        check=True,
    )
    return [re.sub(r"\{[^}]*\}", "x", path) for path in json.loads(done.stdout.splitlines()[-1])]


def test_prefects_websockets_close_before_a_word_to_whom_does_not_know_the_password(
    platform: Platform, prefect: Service
) -> None:
    found = websockets(platform)
    assert {"/events/in", "/events/out", "/logs/out"} <= set(found)
    for path in found:
        url = f"{prefect.url.replace('http', 'ws')}/api{path}"
        with pytest.raises(InvalidStatus), connect(url):
            pass
        for first in (
            {"type": "auth"},
            {"type": "auth", "token": None},
            {"type": "auth", "token": WRONG},
            {"type": "x"},
        ):
            with connect(url, subprotocols=["prefect"]) as socket:  # type: ignore[list-item]
                socket.send(json.dumps(first))
                with pytest.raises(ConnectionClosed) as closed:
                    socket.recv(timeout=30)
                assert closed.value.rcvd and closed.value.rcvd.code == 1008
        with connect(url, subprotocols=["prefect"]) as socket:  # type: ignore[list-item]
            socket.send(json.dumps({"type": "auth", "token": platform.secret("prefect_auth")}))
            assert json.loads(socket.recv(timeout=30)) == {"type": "auth_success"}
    report("S6 Prefect websockets", paths=sorted(found))


def test_prefect_listens_on_loopback_only(prefect: Service) -> None:
    assert {address for address, _, _ in listening(prefect)} == {"127.0.0.1"}


# -------------------------------------------------------------------------------------------------- no secret


@pytest.mark.parametrize(
    ("service", "variable"), [("prefect", "PREFECT_AUTH_FILE"), ("ray-head", "RAY_AUTH_TOKEN_PATH")]
)
def test_beyond_loopback_a_server_does_not_start_without_its_secret(
    platform: Platform, service: str, variable: str
) -> None:
    env: dict[str, Any] = platform.environment(service) | {"HHNET_BIND": "0.0.0.0"}
    for content in (None, "", "short"):
        secret = platform.folder / "other"
        secret.unlink(missing_ok=True)
        if content is not None:
            secret.write_text(content)
        done = subprocess.run(
            [INFRA / "entrypoint.sh", *COMPOSE["services"][service]["command"]],
            env=env | {variable: str(secret)},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"entrypoint: {variable}=") and done.stderr.count("\n") == 1
