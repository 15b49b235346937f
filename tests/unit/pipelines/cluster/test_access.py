"""Who is talked to, and how: beyond the loopback address only with a token, and never with a secret in a URL."""

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.cluster import access
from pipelines.cluster.access import has_ray_token, is_loopback, refuse_credentials, require_ray_token
from pipelines.cluster.session import ray_session
from pipelines.config.loading import load_config
from pipelines.errors import UsageError

NEAR = (
    "127.0.0.1:6379",
    "127.8.9.1:6379",
    "localhost:6379",
    "http://localhost",
    "https://127.0.0.1:8265/x",
    "[::1]:6379",
)
FAR = (
    *("10.0.0.5:6379", "ray-head:6379", "http://ray-head:8265", "https://[2001:db8::1]:8265", "ray://0.0.0.0:10001"),
    *("http://127.evil.example", "http://localhost.evil.example", "http://127.0.0.1@evil.example", "0.0.0.0:6379"),
    *("http://evil.example/127.0.0.1", "http://evil.example#127.0.0.1", "http://[oops", "[::]:6379", "127.1:6379", ""),
)


@pytest.fixture(autouse=True)
def no_ray_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An environment in which Ray finds no token."""
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.mark.parametrize("address", NEAR)
def test_this_machine_needs_no_token(address: str) -> None:
    assert is_loopback(address)
    require_ray_token(address)


@pytest.mark.parametrize("address", [*FAR[:5], *FAR[-4:]])
def test_another_machine_needs_a_token_and_the_mode_that_uses_it(
    address: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(
        UsageError, match=r"without a token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH"
    ) as refused:
        require_ray_token(address)
    assert refused.value.exit_code == 2
    monkeypatch.setenv("RAY_AUTH_TOKEN", "x" * 32)
    with pytest.raises(UsageError, match="RAY_AUTH_MODE=token"):
        require_ray_token(address)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    require_ray_token(address)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "")
    with pytest.raises(UsageError, match="without a token: set RAY_AUTH_TOKEN_PATH"):
        require_ray_token(address)


@pytest.mark.parametrize("address", FAR)
def test_what_only_looks_like_this_machine_is_another(address: str) -> None:
    assert not is_loopback(address)


# What Ray's own loader says about the same environment, one line per case.
LOADER = """
import json, os, sys
from ray._raylet import AuthenticationTokenLoader
loader = AuthenticationTokenLoader.instance()
for variables in json.loads(sys.argv[1]):
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "HOME"):
        os.environ.pop(name, None)
    os.environ.update(variables)
    loader.reset_cache()
    print(json.dumps(loader.has_token(ignore_auth_mode=True)))
"""


def test_a_token_is_found_where_ray_finds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import json

    for name, content in {"full": "0123456789abcdef\n", "blank": " \n", "empty": ""}.items():
        (tmp_path / name / ".ray").mkdir(parents=True)
        (tmp_path / name / ".ray" / "auth_token").write_text(content)
    homes = {name: {"HOME": str(tmp_path / name)} for name in ("full", "blank", "empty", "none")}
    paths = {name: {"RAY_AUTH_TOKEN_PATH": f"{tmp_path}/{name}/.ray/auth_token"} for name in ("full", "none")}
    cases = {
        "nothing": homes["none"],
        "default": homes["full"],
        "default is empty": homes["empty"],
        "variable": homes["none"] | {"RAY_AUTH_TOKEN": "x"},
        "empty variable": homes["none"] | {"RAY_AUTH_TOKEN": ""},
        "empty variable before the default": homes["full"] | {"RAY_AUTH_TOKEN": ""},
        "path": homes["none"] | paths["full"],
        "variable before a path": homes["none"] | paths["full"] | {"RAY_AUTH_TOKEN": "x"},
    }
    command = [sys.executable, "-c", LOADER, json.dumps(list(cases.values()))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    rays = dict(zip(cases, map(json.loads, done.stdout.split()), strict=True))
    ours = {}
    for case, variables in cases.items():
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            ours[case] = has_ray_token()
    assert ours == rays
    assert ours["path"] and not ours["nothing"]


def test_a_file_that_cannot_be_read_is_no_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (tmp_path / "none", tmp_path):
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
        assert not has_ray_token()


@pytest.mark.parametrize(
    "text",
    [
        *(
            "http://user:secret@host/api",
            "https://secret@host",
            "s3://key:secret@bucket/x",
            "s3://key:sec/ret@bucket/x",
        ),
        *(
            "python -m pipelines encode --shards 's3://key:secret@bucket'",
            '{"out":"s3://secret@b"}',
            "ray://:secret@h:1",
        ),
    ],
)
def test_a_url_with_a_secret_is_refused_and_not_shown(text: str) -> None:
    with pytest.raises(UsageError, match=r"the thing must not carry credentials") as refused:
        refuse_credentials("the thing", text)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/a@b/c:d",
        "http://host:8265/x@y",
        "/data/a@b",
        '{"a":"s3://bucket","b":"user@host:x"}',
        "a@b s3://c d:e",
    ],
)
def test_an_address_without_a_secret_is_fine(text: str) -> None:
    assert refuse_credentials("the thing", text) is None


@pytest.fixture
def listener() -> Iterator[tuple[int, list[bytes]]]:
    """A port of this machine, and what was sent to it."""
    received: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def listen() -> None:
            while True:
                try:
                    peer, _ = server.accept()
                except OSError:
                    return
                with peer:
                    peer.settimeout(1)
                    received.append(b"connected")

        threading.Thread(target=listen, daemon=True).start()
        yield int(server.getsockname()[1]), received
        server.shutdown(socket.SHUT_RDWR)


# `127.1` leads to the listener, but is no name of this machine's that a verb knows.
VERBS = {
    "train": ["train", "--shards", "x", "--out", "out"],
    "encode": ["encode", "--shards", "x", "--model", "y", "--out", "out"],
    "index build": ["index", "build", "--codes", "x", "--out", "out"],
    "run": ["run", "--config", "run.toml", "--out", "out"],
}


@pytest.mark.parametrize("verb", VERBS)
def test_nothing_is_sent_to_ray_without_a_token(verb: str, listener: tuple[int, list[bytes]], tmp_path: Path) -> None:
    port, received = listener
    (tmp_path / "run.toml").write_text("[run]\ntrain = 'a'\nquery = 'b'\ndatabase = ['c']\n")
    done = subprocess.run(
        [sys.executable, "-m", "pipelines", *VERBS[verb], "--set", f"ray.address=http://127.1:{port}"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(access.__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert done.stderr == (
        f"hhnet: Ray at http://127.1:{port} is not on the loopback address and would be joined without a token: set "
        "RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to the file with the cluster's token\n"
    )
    assert received == [] and not (tmp_path / "out").exists()


def test_no_cluster_is_joined_without_a_token(
    listener: tuple[int, list[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    port, received = listener
    with (
        pytest.raises(UsageError, match="without a token"),
        ray_session(load_config(sets=[f"ray.address=127.1:{port}"])),
    ):
        pass
    monkeypatch.setenv("RAY_ADDRESS", f"127.1:{port}")
    for address in ("ray.address=auto", "ray.wait_s=1"):
        with pytest.raises(UsageError, match="without a token"), ray_session(load_config(sets=[address])):
            pass
    assert received == []
