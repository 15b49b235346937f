"""The index built on a real Ray and read from a real S3 server."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipelines.config.settings import Config, DedupeSettings, EvaluateSettings, IndexSettings
from pipelines.dedupe.dedupe import dedupe
from pipelines.evaluate.evaluate import evaluate
from pipelines.index.alias import set_alias
from pipelines.index.build import build_index
from pipelines.index.publish import rollback_index
from pipelines.index.update import add_codes, compact_index, remove_rows
from pipelines.search.search import search
from pipelines.storage import Store
from pipelines.verify.gc import gc
from pipelines.verify.verify import verify
from tests.support.codes import codes_of_shards, random_codes, simple_rows, write_codes, write_shards
from tests.support.inline import InlinePool
from tests.support.pictures import class_names
from tests.support.seaweed import seaweed


@pytest.mark.parametrize("kind", ["flat", "hnsw", "ivf", "multihash"])
def test_one_and_two_workers_build_the_same_bytes(tmp_path: Path, kind: str, local_ray: None) -> None:
    contents = {f"x-{n:06d}.tar": simple_rows(f"x/{n}", 50, seed=n, flip=0.3) for n in range(6)}
    uri = write_codes(tmp_path / "codes", contents).uri
    results = [
        build_index(
            [uri], str(tmp_path / f"index-{n}"), Config(index=IndexSettings(kind=kind, workers=n, part_codes=100))
        ).as_json()
        for n in (1, 2)
    ]
    assert results[0]["digest"] == results[1]["digest"] and results[0]["version"] == 1

    query = random_codes(1)[0]
    (answer,) = search(results[1]["uri"], Config(), hex_codes=[query.tobytes().hex()], k=9).results
    codes = np.concatenate([rows.codes for rows in contents.values()])
    nearest = np.sort(np.unpackbits(query ^ codes, axis=1).sum(1))[:9]
    assert len(answer["neighbours"]) == 9
    if kind in ("flat", "multihash"):
        assert [entry["distance"] for entry in answer["neighbours"]] == nearest.tolist()


def more(out: str) -> str:
    rows = simple_rows("more", 12, seed=4)
    rows.sha256 = "5" * 64  # wherever the tar lies
    return write_codes(out, {"more-000000.tar": rows}, classes=class_names(3)).uri


@pytest.mark.parametrize("kind", ["flat", "hnsw", "ivf"])
def test_one_and_two_workers_change_an_index_to_the_same_bytes(tmp_path: Path, kind: str, local_ray: None) -> None:
    contents = {f"x-{n:06d}.tar": simple_rows(f"x/{n}", 50, seed=n, flip=0.3) for n in range(4)}
    uri = write_codes(tmp_path / "codes", contents).uri
    later = write_codes(tmp_path / "later", {f"y-{n:06d}.tar": simple_rows(f"y/{n}", 20, seed=n + 9) for n in range(3)})
    digests = []
    for workers in (1, 2):
        config = Config(index=IndexSettings(kind=kind, workers=workers, part_codes=110))
        index = build_index([uri], str(tmp_path / f"index-{workers}"), config).uri
        add_codes(index, [later.uri], config)
        remove_rows(index, config, ["x/0/00003", "x/2/00004", "y/1/00000"])
        digests.append(compact_index(index, config).digest)
        assert verify(index).digest == digests[-1]
    assert digests[0] == digests[1]


@pytest.mark.parametrize("kind", ["flat", "ivf", "multihash"])
def test_s3_and_a_local_path_give_the_same(tmp_path: Path, kind: str) -> None:
    shards = write_shards(tmp_path, "shard")
    config = Config(
        index=IndexSettings(kind=kind, workers=1),
        evaluate=EvaluateSettings(gallery=2),
        dedupe=DedupeSettings(radius=20),
    )
    with seaweed(tmp_path / "weed") as server, server.environment():
        answers = []
        for root in (str(tmp_path), server.uri("run")):
            codes = codes_of_shards(f"{root}/codes", shards).uri
            index = build_index([codes], f"{root}/index", config, pool=InlinePool()).as_json()
            assert set_alias(f"{root}/alias", index["uri"]).version == 1
            found = search(f"{root}/alias", config, keys=["class_01/0001"]).as_json()
            pairs = dedupe([codes], f"{root}/duplicates", config).as_json()
            assert verify(pairs["uri"]).orphans == verify(f"{root}/alias").orphans == []
            changed = [
                remove_rows(index["uri"], config, ["class_00/0000", "class_02/0003"]).as_json(),
                add_codes(index["uri"], [more(f"{root}/more")], config, pool=InlinePool()).as_json(),
                compact_index(index["uri"], config, pool=InlinePool()).as_json(),
                rollback_index(index["uri"], 2).as_json(),
                remove_rows(index["uri"], config, shards=["shard-000001.tar"]).as_json(),
            ]
            assert [result["version"] for result in changed] == [2, 3, 4, 5, 6]
            assert gc(index["uri"], "0s", keep=2).collected == [1, 2, 3, 4]
            assert verify(index["uri"]).orphans == []
            report = evaluate(codes, [codes], f"{root}/report", config).as_json()
            name = report["metrics"].removeprefix(f"{report['uri']}/")
            metrics = json.loads(Store(report["uri"]).read(name))
            made = [result["digest"] for result in (pairs, *changed)]
            answers.append((index["card"], found["results"], metrics, pairs["pairs"] > 0, made))
    assert answers[0] == answers[1]


def test_a_build_killed_after_the_planner_chose_goes_on_with_its_kind(tmp_path: Path) -> None:
    uri = write_codes(tmp_path / "codes", {"x-000000.tar": simple_rows("x", 200)}).uri
    command = [sys.executable, "-m", "pipelines", "index", "build", "--codes", uri, "--out", str(tmp_path / "index")]
    environment = {**os.environ, "HHNET_FAILPOINTS": "identity.put.after=kill"}
    died = subprocess.run([*command, "--kind", "auto"], capture_output=True, env=environment, timeout=120)
    assert died.returncode == -signal.SIGKILL and b"recall@10" in died.stderr
    assert [path.name for path in (tmp_path / "index").iterdir()] == ["identity.json"]

    def asked_again(*_: object) -> None:
        raise AssertionError("a second run plans anew")

    resumed = build_index(
        [uri],
        str(tmp_path / "index"),
        Config(index=IndexSettings(kind="auto", workers=1)),
        pool=InlinePool(),
        plan=asked_again,
    ).as_json()
    named = build_index(
        [uri], str(tmp_path / "named"), Config(index=IndexSettings(kind="flat", workers=1)), pool=InlinePool()
    ).as_json()
    assert resumed["digest"] == named["digest"]
