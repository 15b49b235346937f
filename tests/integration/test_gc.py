"""gc at the command line and on a real S3 server, and a gc that is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, cast

import pytest

from pipelines.artifacts import open_artifact
from pipelines.gc import gc
from pipelines.storage import Store
from tests.support.codes import simple_rows, write_codes
from tests.support.seaweed import seaweed

ORPHANS = [f"parts/a-{number:06d}-0123456789abcdef.parquet" for number in range(5)]


def written(root: str) -> tuple[Store, set[str]]:
    """Codes at `root` with five orphans; the names that must stay."""
    artifact = write_codes(root, {"a-000000.tar": simple_rows("a", 5), "a-000001.tar": simple_rows("b", 5)})
    kept = set(artifact.store.entries())
    for name in ORPHANS:
        artifact.store.put(name, b"litter")
    return artifact.store, kept


def hhnet(*words: str, **more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipelines", *words]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | more)


def result_of(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    return cast("dict[str, Any]", json.loads(done.stdout.splitlines()[-1]))


def test_on_s3_too(tmp_path: Path) -> None:
    with seaweed(tmp_path / "weed") as server, server.environment():
        store, kept = written(server.uri("codes"))
        assert gc(store.uri)["young"] == 5
        time.sleep(2)  # the server's clock counts whole seconds
        planned = gc(store.uri, older_than="1s", dry_run=True)
        assert (planned["deleted"], planned["bytes"]) == (5, 30)
        assert set(store.entries()) == kept | set(ORPHANS)
        assert gc(store.uri, older_than="1s")["names"] == ORPHANS
        assert set(store.entries()) == kept
        assert open_artifact(store.uri, "codes").manifest.totals == {"samples": 10}


def test_at_the_command_line(tmp_path: Path) -> None:
    store, kept = written(str(tmp_path / "codes"))
    planned = result_of(hhnet("gc", store.uri, "--older-than", "0s", "--dry-run", "--json"))
    assert {"verb": "gc", "status": "done", "uri": store.uri, "deleted": 5, "bytes": 30, "dry_run": True}.items() <= (
        planned.items()
    )
    assert result_of(hhnet("gc", store.uri, "--json"))["status"] == "unchanged"
    assert result_of(hhnet("gc", store.uri, "--older-than", "0s", "--json"))["deleted"] == 5
    assert set(store.entries()) == kept
    refused = hhnet("gc", store.uri, "--older-than", "soon")
    assert (refused.returncode, len(refused.stderr.splitlines())) == (2, 1)


@pytest.mark.parametrize("point", ["gc.delete.before", "gc.delete.after"])
def test_killed_on_the_way_it_has_only_less_left_to_do(point: str, tmp_path: Path) -> None:
    store, kept = written(str(tmp_path / "codes"))
    killed = hhnet("gc", store.uri, "--older-than", "0s", HHNET_FAILPOINTS=f"{point}=kill@3")
    assert killed.returncode == -signal.SIGKILL
    left = set(store.entries()) - kept
    assert len(left) == (3 if point.endswith("before") else 2)
    assert set(result_of(hhnet("gc", store.uri, "--older-than", "0s", "--json"))["names"]) == left
    assert set(store.entries()) == kept


def test_an_error_of_the_disk_is_one_line_and_exit_3(tmp_path: Path) -> None:
    store, kept = written(str(tmp_path / "codes"))
    done = hhnet("gc", store.uri, "--older-than", "0s", HHNET_FAILPOINTS="gc.delete.before=enospc")
    assert (done.returncode, done.stdout) == (3, "")
    assert "cannot delete" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert set(store.entries()) == kept | set(ORPHANS)
