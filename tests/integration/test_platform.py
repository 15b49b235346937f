"""The services of infra/compose.yaml that end, run as local processes against a real S3 server."""

from pathlib import Path

import pytest
import s3fs

from tests.support.platform import platform_folder, run_once
from tests.support.seaweed import seaweed


@pytest.mark.timeout(180)
def test_fill_makes_the_bucket_and_shards_and_finds_them_the_next_time(tmp_path: Path) -> None:
    with platform_folder() as platform, seaweed(tmp_path) as server:
        store = server.variables | {"AWS_ENDPOINT_URL": server.endpoint}
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
