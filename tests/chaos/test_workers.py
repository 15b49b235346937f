"""R1, R3, R10 and P1: encode while its workers are killed, stopped or many, its nodes lost and its shards damaged.

The verb runs as a process of its own on a real Ray. What it publishes must be what an undisturbed run publishes.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.config.loading import load_config
from pipelines.encode.codes import open_codes
from pipelines.encode.encode import encode
from pipelines.shards.shards import open_shards
from pipelines.verify.gc import gc
from pipelines.verify.verify import verify
from tests.support.encodes import (
    IMAGES,
    PATIENCE,
    RUN_LIMIT_S,
    SETTINGS,
    SHARDS,
    Corpus,
    decoders,
    encode_words,
    encoders,
    held,
    hhnet,
    joined,
    more_receipts,
    result_of,
    started,
)
from tests.support.inline import InlinePool
from tests.support.nodes import cluster_of
from tests.support.report import SEED, report, scaled
from tests.support.runs import run_record

Victims = Callable[["subprocess.Popen[str]"], list[psutil.Process]]

pytestmark = pytest.mark.timeout(scaled(480, 3600))


def lost_and_doubled(corpus: Corpus, out: Path) -> tuple[int, int]:
    """Samples of the shard index that are neither code nor reject, and those that are more than once."""
    expected = [key for shard in open_shards(corpus.shards).shards for key in shard.table()["key"].to_pylist()]
    found = [key for table in open_codes(str(out)).tables() for key in table["key"].to_pylist()]
    parts = open_codes(str(out)).artifact.manifest.parts
    for part in parts:
        if part.path.startswith("rejects/"):
            found += pq.read_table(out / part.path)["key"].to_pylist()
    return len(set(expected) - set(found)), len(found) - len(set(found))


def require_clean(out: Path) -> None:
    """The store proves itself, and once gc has run nothing is left that nobody names."""
    verify(str(out))
    gc(str(out), older_than="0s")
    assert verify(str(out)).orphans == []
    assert list(out.rglob(".tmp-*")) == []


# ------------------------------------------------------------------------------------------------------------- kills


@pytest.mark.parametrize(
    ("victims", "settings", "wait_s"), [(encoders, (), 1.5), (decoders, ("encode.decode_processes=2",), 0.1)]
)
def test_killed_workers_change_no_byte(
    victims: Victims, settings: tuple[str, ...], wait_s: float, corpus: Corpus, tmp_path: Path
) -> None:
    """Workers, or the processes that decode for them, which are back sooner: so they are killed after shorter waits."""
    rng = random.Random(SEED)
    more = [word for setting in settings for word in ("--set", setting)]
    runs, kills = scaled(3, 20), scaled(5, 10)
    killed = again = number = 0
    while killed < runs * kills:  # a run may end before the last of its kills
        number += 1
        out = tmp_path / str(number)
        with started(encode_words(corpus.shards, corpus.model, out, *more)) as verb:
            hit = kill_some(verb, victims, kills, rng, wait_s)
            result_of(verb)
        assert hit, f"seed {SEED}: run {number} ended before the first kill"
        assert (out / "manifest.json").read_bytes() == corpus.manifest, f"seed {SEED}, run {number}"
        assert lost_and_doubled(corpus, out) == (0, 0)
        shards = run_record(out)["shards"]
        assert len({shard["shard"] for shard in shards}) == len(shards) == SHARDS
        repeated = sum(shard["attempts"] - 1 for shard in shards)
        assert repeated <= hit, "only a shard whose worker was killed may be begun again"
        require_clean(out)
        killed, again = killed + hit, again + repeated
    report(
        f"R1 killed {victims.__name__}",
        runs=number,
        kills=killed,
        begun_again=again,
        lost=0,
        doubled=0,
        other_manifests=0,
    )


def kill_some(
    verb: subprocess.Popen[str], victims: Victims, kills: int, rng: random.Random, wait_s: float = 1.5
) -> int:
    """SIGKILL a random one of the victims, `kills` times, after waits of up to `wait_s`, as long as the verb runs."""
    hit = 0
    while hit < kills and verb.poll() is None:
        time.sleep(rng.uniform(0.05, wait_s))
        processes = victims(verb)
        if processes:
            with suppress(psutil.Error):
                rng.choice(processes).kill()
                hit += 1
    return hit


def test_a_stopped_worker_loses_its_shard_to_another(corpus: Corpus, tmp_path: Path) -> None:
    out = tmp_path / "codes"
    with started(encode_words(corpus.shards, corpus.model, out, "--set", "encode.stuck_s=15")) as verb:
        while len(list(out.glob("receipts/*.json"))) < 4:
            assert verb.poll() is None
            time.sleep(0.02)
        while not (workers := encoders(verb)):
            assert verb.poll() is None
            time.sleep(0.01)
        workers[0].send_signal(signal.SIGSTOP)
        result_of(verb)
        assert not workers[0].is_running() or workers[0].status() == psutil.STATUS_ZOMBIE
    assert (out / "manifest.json").read_bytes() == corpus.manifest
    assert max(shard["attempts"] for shard in run_record(out)["shards"]) == 2
    require_clean(out)
    report("stopped worker", stopped=1, lost=0, other_manifests=0)


def test_a_killed_driver_is_resumed_without_encoding_a_finished_shard_again(corpus: Corpus, tmp_path: Path) -> None:
    out = tmp_path / "codes"
    with started(encode_words(corpus.shards, corpus.model, out)) as verb:
        while len(list(out.glob("receipts/*.json"))) < 6:
            assert verb.poll() is None
            time.sleep(0.02)
    done = {path.stem for path in out.glob("receipts/*.json")}
    with started(encode_words(corpus.shards, corpus.model, out)) as verb:
        result_of(verb)
    assert (out / "manifest.json").read_bytes() == corpus.manifest
    encoded = {shard["shard"].removesuffix(".tar") for shard in run_record(out)["shards"]}
    assert not encoded & done
    require_clean(out)
    report("killed driver", finished_before=len(done), encoded_again=len(encoded & done))


# ------------------------------------------------------------------------------------------------------------- nodes


def test_four_workers_change_no_byte(corpus: Corpus, tmp_path: Path) -> None:
    """Two of them made what is compared with. Four do not fit on two cores, but on four nodes of one CPU each."""
    workers, most, tries = 4, 0, 0
    while most < workers and tries < 3:  # the work may be done before the last worker has started
        tries += 1
        out = tmp_path / str(tries)
        with cluster_of(*[1] * workers) as cluster, joined(corpus, cluster, out, "--workers", str(workers)) as verb:
            while verb.poll() is None:
                most = max(most, len(encoders(cluster.process)))
                time.sleep(0.05)
            result_of(verb)
        assert (out / "manifest.json").read_bytes() == corpus.manifest
    assert most == workers
    report("P1 workers", workers=workers, other_manifests=0)


def test_the_order_of_the_shards_changes_no_byte(corpus: Corpus, tmp_path: Path) -> None:
    pool = InlinePool()
    pool.reverse = True
    encode(corpus.shards, corpus.model, str(tmp_path / "codes"), load_config(sets=SETTINGS), pool=pool)
    assert [task.shard for task in pool.done] == [shard.name for shard in reversed(open_shards(corpus.shards).shards)]
    assert (tmp_path / "codes" / "manifest.json").read_bytes() == corpus.manifest
    report("P1 order", reversed=SHARDS, other_manifests=0)


def test_lost_nodes_and_a_lost_head_change_no_byte(corpus: Corpus, tmp_path: Path) -> None:
    rng = random.Random(SEED)
    nodes, heads = scaled(2, 30), scaled(1, 10)
    out, lost_nodes, lost_heads = tmp_path / "nodes", 0, 0
    while lost_nodes < nodes:
        with cluster_of(1, 1) as cluster, joined(corpus, cluster, out) as verb:
            while lost_nodes < nodes and more_receipts(verb, out, rng.randrange(2, 5)):
                cluster.tell(f"lose {rng.randrange(2)}")
                lost_nodes += 1
                cluster.tell("add")
            result_of(verb)
        assert (out / "manifest.json").read_bytes() == corpus.manifest
        assert lost_and_doubled(corpus, out) == (0, 0)
        require_clean(out)
        out = tmp_path / f"nodes-{lost_nodes}"

    for number in range(heads):
        out = tmp_path / f"head-{number}"
        with cluster_of(1, 1) as cluster, joined(corpus, cluster, out) as verb:
            assert more_receipts(verb, out, rng.randrange(2, 8))
            with held(cluster.process):
                cluster.tell("behead")
                lost_heads += 1
                _, err = verb.communicate(timeout=RUN_LIMIT_S)
        assert verb.returncode == 3, err
        last = err.splitlines()[-1]
        assert last.startswith(f"hhnet: the head of Ray at {cluster.address} has not answered for 10 s"), err
        assert "what was committed stays" in last and "Traceback" not in err
        assert not (out / "manifest.json").exists()
        with cluster_of(1, 1) as cluster, joined(corpus, cluster, out) as verb:
            result_of(verb)
        assert (out / "manifest.json").read_bytes() == corpus.manifest
        assert lost_and_doubled(corpus, out) == (0, 0)
        require_clean(out)
    report("R3 nodes", nodes_lost=lost_nodes, heads_lost=lost_heads, lost=0, doubled=0, other_manifests=0)


def test_without_its_own_node_a_run_ends_and_is_resumed(corpus: Corpus, tmp_path: Path) -> None:
    """Ray goes on to accept work that it would never place."""
    out = tmp_path / "node"
    with started(encode_words(corpus.shards, corpus.model, out)) as verb:
        assert more_receipts(verb, out, 2)
        node = [p for p in psutil.Process(verb.pid).children(recursive=True) if p.name() == "raylet"]
        for process in [*node, *encoders(verb)]:
            process.kill()
        _, err = verb.communicate(timeout=120)
    assert verb.returncode == 3 and "node that this command runs on is lost" in err and "Traceback" not in err
    assert not (out / "manifest.json").exists()
    with started(encode_words(corpus.shards, corpus.model, out)) as verb:
        result_of(verb)
    assert (out / "manifest.json").read_bytes() == corpus.manifest
    assert lost_and_doubled(corpus, out) == (0, 0)
    require_clean(out)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_without_the_head_of_its_own_ray_a_run_ends_and_is_resumed(
    number: signal.Signals, corpus: Corpus, tmp_path: Path
) -> None:
    """A head that is stopped still takes connections; Ray itself would wait for it for minutes, also to be left."""
    out = tmp_path / "codes"
    with started(encode_words(corpus.shards, corpus.model, out), {**os.environ, **PATIENCE}) as verb:
        assert more_receipts(verb, out, 2)
        helpers = psutil.Process(verb.pid).children(recursive=True)
        (head,) = [process for process in helpers if process.name().startswith("gcs")]
        with held(verb):
            head.send_signal(number)
            _, err = verb.communicate(timeout=120)
    assert verb.returncode == 3, err
    assert "the head of Ray at local has not answered for 10 s" in err.splitlines()[-1] and "Traceback" not in err
    assert psutil.wait_procs(helpers, timeout=10)[1] == []
    with started(encode_words(corpus.shards, corpus.model, out)) as verb:
        result_of(verb)
    assert (out / "manifest.json").read_bytes() == corpus.manifest
    require_clean(out)


# ------------------------------------------------------------------------------------------------------------ damage


def test_a_storm_of_bad_shards_is_accounted_for(corpus: Corpus, tmp_path: Path) -> None:
    rng = random.Random(SEED)
    source = Path(shutil.copytree(corpus.shards, tmp_path / "shards"))
    opened = open_shards(str(source))
    bad = rng.sample(range(SHARDS), round(SHARDS * scaled(1 / 6, 0.5)))
    kinds = [flip, cut, empty, remove]  # at least one shard of each
    for number, shard in enumerate(bad):
        kinds[number % len(kinds)](source / opened.shards[shard].part.path, rng)
    out = tmp_path / "codes"
    with started(encode_words(str(source), corpus.model, out)) as verb:
        verb.communicate(timeout=RUN_LIMIT_S)
    assert verb.returncode == 4
    assert not (out / "manifest.json").exists()
    with started(encode_words(str(source), corpus.model, out, "--allow-degraded")) as verb:
        result = result_of(verb, code=4)
    assert (result["status"], result["codes"] + result["rejects"]) == ("degraded", SHARDS * IMAGES)
    assert lost_and_doubled(corpus, out) == (0, 0)
    receipts = {path.stem: json.loads(path.read_bytes()) for path in out.glob("receipts/*.json")}
    for number, shard in enumerate(opened.shards):
        receipt = receipts[shard.stem]
        rejected = receipt["rejects"]["rows"] if receipt["rejects"] else 0
        assert receipt["part"]["rows"] + rejected == shard.rows
        assert (rejected > 0) == (number in bad), f"seed {SEED}: {shard.name}"
    require_clean(out)

    shutil.copytree(corpus.shards, source, dirs_exist_ok=True)
    with started(hhnet("retry-rejects", "--codes", str(out))) as verb:
        mended = result_of(verb)
    assert (mended["status"], mended["version"], mended["rejects"]) == ("done", 2, 0)
    whole = tmp_path / "undisturbed"
    with started(encode_words(str(source), corpus.model, whole)) as verb:
        result_of(verb)
    assert (whole / "manifest.json").read_bytes() == corpus.manifest
    again, undisturbed = (pa.concat_tables(open_codes(str(codes)).tables()).to_pylist() for codes in (out, whole))
    assert again == undisturbed, "what was recovered lies in parts of its own, with the same rows"
    report(
        "R10 bad shards", damaged=len(bad), of=SHARDS, rejects=result["rejects"], lost=0, recovered=mended["recovered"]
    )


def flip(path: Path, rng: random.Random) -> None:
    """Bits all over the tar, one of them in the first image."""
    data = bytearray(path.read_bytes())
    for place in [600, *(rng.randrange(len(data)) for _ in range(20))]:
        data[place] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def cut(path: Path, rng: random.Random) -> None:
    """The tar ends somewhere inside its second half's images."""
    size = path.stat().st_size
    os.truncate(path, rng.randrange(size // 4, size // 2))


def empty(path: Path, rng: random.Random) -> None:
    """Nothing is left of it."""
    os.truncate(path, 0)


def remove(path: Path, rng: random.Random) -> None:
    """It is gone."""
    path.unlink()
