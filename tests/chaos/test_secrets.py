"""S7: a whole flow with secrets that can be recognised, and a search for them in everything it leaves behind."""

import base64
import json
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

import httpx
import psutil
import pytest

from pipelines.config.loading import load_config
from pipelines.storage import Store
from tests.integration.conftest import SETTINGS
from tests.support import seaweed
from tests.support.pictures import write_folder
from tests.support.platform import Platform, Service, platform_folder, ray_arguments, started
from tests.support.report import report, scaled

DEADLINE_S = 400.0
RAY_PAGES = (
    *("/api/jobs/", "/api/v0/jobs?detail=1", "/api/v0/runtime_envs?detail=1", "/api/v0/workers?detail=1"),
    *("/api/v0/actors?detail=1", "/api/v0/tasks?detail=1", "/api/v0/nodes?detail=1", "/api/v0/cluster_metadata"),
    *("/nodes?view=summary", "/api/cluster_status", "/events", "/logical/actors"),
)

pytestmark = pytest.mark.timeout(900)


@dataclass(frozen=True)
class Canaries:
    """One secret per credential, each found by its own word."""

    aws: str = field(default_factory=lambda: f"canary-aws-{secrets.token_hex(12)}")
    ray: str = field(default_factory=lambda: f"canary-ray-{secrets.token_hex(24)}")
    prefect: str = field(default_factory=lambda: f"canary-prefect-{secrets.token_hex(12)}")
    url: str = field(default_factory=lambda: f"canary-url-{secrets.token_hex(12)}")

    def forms(self) -> dict[str, bytes]:
        """What to look for: the words, and the header that Prefect's password travels in."""
        words = {name: getattr(self, name).encode() for name in ("aws", "ray", "prefect", "url")}
        return words | {"prefect as a header": base64.b64encode(f"hhnet:{self.prefect}".encode())}

    def found_in(self, places: Mapping[str, bytes]) -> list[str]:
        """`secret in place` for each secret that is where it must not be."""
        words = self.forms().items()
        return [f"{name} in {where}" for where, data in places.items() for name, word in words if word in data]


@pytest.fixture(scope="module")
def canaries() -> Canaries:
    return Canaries()


@pytest.fixture(scope="module")
def store(canaries: Canaries, tmp_path_factory: pytest.TempPathFactory) -> Iterator[seaweed.Seaweed]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(seaweed, "SECRET_KEY", canaries.aws)
        with seaweed.seaweed(tmp_path_factory.mktemp("weed")) as server, server.environment():
            yield server


@pytest.fixture(scope="module")
def platform(canaries: Canaries, store: seaweed.Seaweed) -> Iterator[Platform]:
    keys = f"[default]\naws_access_key_id = {seaweed.ACCESS_KEY}\naws_secret_access_key = {canaries.aws}\n"
    with platform_folder() as found:
        contents = {"ray_token": canaries.ray, "prefect_auth": f"hhnet:{canaries.prefect}", "aws_credentials": keys}
        for name, content in contents.items():
            (found.folder / "secrets" / name).unlink()
            (found.folder / "secrets" / name).write_text(content)
        yield found


@pytest.fixture(scope="module")
def prefect(platform: Platform) -> Iterator[Service]:
    with started("prefect", platform) as service:
        yield service


@pytest.fixture(scope="module")
def head(platform: Platform, store: seaweed.Seaweed) -> Iterator[Service]:
    with started("ray-head", platform, "--num-cpus=2", *ray_arguments(), AWS_ENDPOINT_URL=store.endpoint) as service:
        yield service


class Client:
    """Runs `hhnet` with every secret in its environment, and keeps how its children were called."""

    def __init__(self, platform: Platform, store: seaweed.Seaweed, canaries: Canaries) -> None:
        self.seen: dict[str, bytes] = {}
        self._folder = platform.folder
        self._env = platform.environment("flow") | store.variables
        self._env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": canaries.ray, "PREFECT_LOGGING_LEVEL": "DEBUG"}
        self._env |= {"PREFECT_API_AUTH_STRING": f"hhnet:{canaries.prefect}"}

    def __call__(self, *words: str, **env: str) -> tuple[int, str, str]:
        number = len(self.seen)
        out, err = self._folder / f"client-{number}.out", self._folder / f"client-{number}.err"
        children: set[str] = set()
        with out.open("wb") as stdout, err.open("wb") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-m", "pipelines", *words],
                env=self._env | env,
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
            )
            until = time.monotonic() + DEADLINE_S
            while process.poll() is None:
                children |= command_lines(process.pid)
                if time.monotonic() > until:
                    process.kill()
                time.sleep(0.3)
        self.seen[f"children of `{words[0]}` {number}"] = "\n".join(children).encode()
        return process.returncode, out.read_text(), err.read_text()


def command_lines(pid: int) -> set[str]:
    """How the descendants of a process were called, which every user of the machine can read."""
    with suppress(psutil.Error):
        return {" ".join(process.cmdline()) for process in psutil.Process(pid).children(recursive=True)}
    return set()


@pytest.fixture(scope="module")
def client(platform: Platform, store: seaweed.Seaweed, canaries: Canaries, head: Service, prefect: Service) -> Client:
    return Client(platform, store, canaries)


def flow_words(platform: Platform, out: str, *more: str) -> list[str]:
    """`hhnet run` over a few pictures, with the settings of the integration tests."""
    pictures = platform.folder / "photos"
    write_folder(pictures, classes=3, per_class=8)
    roles = f'source = "{pictures}"\nsplit = "train=.6,query=.2,database=.2"\n'
    (platform.folder / "run.toml").write_text(f"[run]\n{roles}")
    settings = (*SETTINGS, "train.epochs=1", "train.val_share=0.3", *more)
    return ["run", "--config", "run.toml", "--out", out, *(word for one in settings for word in ("--set", one))]


def left_behind(platform: Platform, prefect: Service, head: Service, store: seaweed.Seaweed) -> dict[str, bytes]:
    """Every file of the platform but its secrets, every object, and what Ray's pages say, by name."""
    places: dict[str, bytes] = {}
    for path in platform.folder.rglob("*"):
        if path.is_file() and not path.is_symlink() and path.parent.name != "secrets":
            places[str(path.relative_to(platform.folder))] = path.read_bytes()
    for name in Store(store.uri("")).names(""):
        places[f"s3 {name}"] = Store(store.uri("")).read(name)
    token = {"Authorization": f"Bearer {platform.secret('ray_token')}"}
    for page in RAY_PAGES:
        answer = httpx.get(head.url + page, headers=token, timeout=60)
        answer.raise_for_status()
        places[f"Ray's {page}"] = answer.content
    return places


@pytest.mark.parametrize("number", range(scaled(1, 5)))
def test_a_flow_and_its_failures_leave_no_secret_anywhere(
    number: int,
    platform: Platform,
    store: seaweed.Seaweed,
    prefect: Service,
    head: Service,
    client: Client,
    canaries: Canaries,
) -> None:
    out = store.uri(f"run-{number}")
    code, printed, err = client(*flow_words(platform, out), "--json")
    assert code == 0, err
    assert json.loads(printed.splitlines()[-1])["status"] == "done"
    code, _, err = client(*flow_words(platform, out, "model.bits=24"))
    assert code == 2 and "choose another --out" in err, err
    code, _, err = client("verify", f"{out}/model", "--debug", AWS_SECRET_ACCESS_KEY=f"{canaries.aws}x")
    assert code not in (0, 2), err
    code, _, err = client("verify", f"{out}/model", AWS_SECRET_ACCESS_KEY=f"{canaries.aws}x")
    assert code == 3, err
    code, _, err = client(*flow_words(platform, out), PREFECT_API_AUTH_STRING=f"hhnet:{canaries.prefect}x")
    assert code == 2 and "refuses this environment" in err, err
    code, _, err = client(*flow_words(platform, out), RAY_AUTH_TOKEN=f"{canaries.ray}x")
    assert code == 2 and "refuses this environment" in err, err

    places = left_behind(platform, prefect, head, store)
    kinds = ("manifest.json", "origin.json", "/runs/", "prefect.db", "ray/session_", "client-0.err", "job-driver-")
    assert all(any(kind in where for where in places) for kind in kinds), sorted(places)
    assert canaries.found_in(places | client.seen) == []
    pickles = [where for where in places if b"gASV" in places[where] and "prefect.db" in where]
    assert pickles == [], "Prefect keeps a pickle"
    report("S7", runs=6, places=len(places), bytes=sum(map(len, places.values())), found=0)


@pytest.mark.parametrize("where", ["--out", "source", "address", "Prefect", "job", "store"])
def test_a_url_with_a_secret_is_refused_before_it_is_sent_or_shown(
    where: str,
    platform: Platform,
    store: seaweed.Seaweed,
    prefect: Service,
    head: Service,
    client: Client,
    canaries: Canaries,
) -> None:
    uri = f"s3://key:{canaries.url}@{seaweed.BUCKET}/x"
    slash = f"s3://key:{canaries.url}/more@{seaweed.BUCKET}/x"  # the secret keys of AWS have slashes
    web = f"http://user:{canaries.url}@127.0.0.1:{platform.ports['8265']}"
    encode = ["encode", "--model", store.uri("model"), "--out", store.uri("codes")]
    words, env = {
        "--out": (flow_words(platform, slash), {}),
        "source": (flow_words(platform, store.uri("x"), f"run.source={uri}"), {}),
        "address": (flow_words(platform, store.uri("x"), f"ray.address={web}"), {}),
        "Prefect": (flow_words(platform, store.uri("x")), {"PREFECT_API_URL": f"{web}/api"}),
        "job": ([*encode, "--shards", slash], {}),
        "store": ([*encode, "--shards", uri], {"RAY_ADDRESS": "local"}),
    }[where]
    code, printed, err = client(*words, **env)
    assert (code, printed) == (2, ""), err
    assert err.startswith("hhnet: ") and err.count("\n") == 1 and "credentials" in err
    assert canaries.found_in(left_behind(platform, prefect, head, store) | client.seen) == []


def test_no_repr_shows_a_secret(store: seaweed.Seaweed, canaries: Canaries) -> None:
    opened = Store(store.uri("x"))
    shown = [repr(opened), str(vars(opened)), repr(load_config()), repr(store.variables)]
    assert canaries.found_in({str(place): text.encode() for place, text in enumerate(shown[:-1])}) == []
    assert canaries.found_in({"the environment": shown[-1].encode()}), "the search itself does not work"
