"""gc at the command line and on a real S3 server."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, cast

import pytest

from pipelines.artifacts.manifest import open_artifact
from pipelines.errors import InputError
from pipelines.storage import Store
from pipelines.verify.gc import gc
from tests.support.checker import client_of
from tests.support.codes import simple_rows, write_codes
from tests.support.seaweed import BUCKET, seaweed

ORPHANS = [f"parts/a-{number:06d}-0123456789abcdef.parquet" for number in range(5)]


def written(root: str) -> tuple[Store, set[str]]:
    """Codes at `root` with five orphans; the names that must stay."""
    artifact = write_codes(root, {"a-000000.tar": simple_rows("a", 5), "a-000001.tar": simple_rows("b", 5)})
    kept = set(artifact.store.entries())
    for name in ORPHANS:
        artifact.store.put(name, b"litter")
    return artifact.store, kept


def hhnet(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "pipelines", *words], capture_output=True, text=True)


def result_of(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    return cast("dict[str, Any]", json.loads(done.stdout.splitlines()[-1]))


def test_on_s3_too(tmp_path: Path) -> None:
    with seaweed(tmp_path / "weed") as server, server.environment():
        store, kept = written(server.uri("codes"))
        assert gc(store.uri).young == 5
        time.sleep(2)  # the server's clock counts whole seconds
        planned = gc(store.uri, older_than="1s", dry_run=True).as_json()
        assert (planned["deleted"], planned["bytes"]) == (5, 30)
        assert set(store.entries()) == kept | set(ORPHANS)
        assert gc(store.uri, older_than="1s").names == ORPHANS
        assert set(store.entries()) == kept
        assert open_artifact(store.uri, "codes").manifest.totals == {"samples": 10}


def test_uploads_that_were_killed_are_freed(tmp_path: Path) -> None:
    """One of a name that another run has put, one of a name that no run will use again, and one of somebody else."""
    with seaweed(tmp_path / "weed") as server, server.environment():
        store, kept = written(server.uri("codes"))
        client = client_of(server)
        names = [sorted(kept)[-1], "runs/20261125T120000-0123abcd.json"]
        for key in (*(f"codes/{name}" for name in names), "codes-of-others/x"):
            client.call_s3("create_multipart_upload", Bucket=BUCKET, Key=key)
        assert gc(store.uri).young == 5 + 2
        time.sleep(2)
        assert gc(store.uri, older_than="1s", dry_run=True).uploads == 2
        done = gc(store.uri, older_than="1s").as_json()
        assert (done["uploads"], done["deleted"], done["young"]) == (2, 5, 0)
        assert set(store.entries()) == kept
        assert [upload["Key"] for upload in client.list_multipart_uploads(BUCKET)] == ["codes-of-others/x"]
        assert gc(store.uri, older_than="1s").status == "unchanged"
        for uri in (server.uri("nothing"), "s3://no-such-bucket/codes"):
            with pytest.raises(InputError, match="holds nothing"):
                gc(uri)


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
