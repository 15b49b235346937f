"""`hhnet status` from the store alone: what it tells of each kind of root, while a run works and after it ended."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pipelines.artifacts.commit import ArtifactWriter
from pipelines.artifacts.facts import Receipt
from pipelines.artifacts.manifest import Part
from pipelines.artifacts.runs import RunLog
from pipelines.config.loading import load_config
from pipelines.config.settings import Config
from pipelines.encode.encode import encode
from pipelines.encode.job import ShardTask
from pipelines.encode.workers import ShardEncoder
from pipelines.errors import InputError, WorkFailed
from pipelines.index.build import build_index
from pipelines.index.diff import plan_changes
from pipelines.ingest.ingest import ingest
from pipelines.storage import Store, canonical_json
from pipelines.verify import status as status_module
from pipelines.verify.gc import gc
from pipelines.verify.status import status
from pipelines.verify.status.words import format_line, format_span, format_status
from pipelines.verify.verify import verify
from tests.support.inline import InlinePool
from tests.support.models import train_model, write_model
from tests.support.pictures import truncated_jpeg, write_folder

SETTINGS = ("ingest.samples_per_shard=10", "data.image_size=32", "encode.batch_size=8", "encode.reject_budget=0.5")


@dataclass(frozen=True)
class Tried:
    """An attempt as a pool has it."""

    began: float
    ended: float
    host: str
    pid: int
    gpu: str | None
    end: str


@pytest.fixture(scope="module")
def config() -> Config:
    return load_config(sets=SETTINGS)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, config: Config) -> Path:
    """Shards of four tars, two of whose 35 images are none, and a model."""
    folder = tmp_path_factory.mktemp("root")
    write_folder(folder / "photos", classes=3, per_class=11)
    first = sorted((folder / "photos").iterdir())[0]
    (first / "text.jpg").write_text("this is no picture")
    (first / "short.jpg").write_bytes(truncated_jpeg())
    ingest(str(folder / "photos"), str(folder / "shards"), config)
    write_model(folder / "model", str(folder / "shards"))
    return folder


def files(folder: Path) -> dict[Path, float]:
    return {path: path.stat().st_mtime for path in folder.rglob("*")}


class Interrupted(ShardEncoder):
    """Looks at the status when it is given the third shard, and fails with the fourth."""

    seen: dict[str, Any]
    turns: Iterator[int]

    def run(self, task: ShardTask) -> Any:
        turn = next(type(self).turns)
        if turn == 2:
            before = files(Path(self.job.out))
            type(self).seen = status(self.job.out).as_json()
            assert files(Path(self.job.out)) == before, "a look changes nothing"
        if turn == 3:
            raise WorkFailed("the fourth shard will not do")
        return super().run(task)


def test_an_encode_is_seen_while_it_works_when_it_failed_and_when_it_is_done(
    root: Path, tmp_path: Path, config: Config
) -> None:
    out = str(tmp_path / "codes")
    arguments = (str(root / "shards"), str(root / "model"), out, config)
    Interrupted.turns = itertools.count()
    with pytest.raises(WorkFailed):
        encode(*arguments, pool=InlinePool(Interrupted))
    seen = Interrupted.seen
    assert (seen["verb"], seen["status"], seen["digest"], seen["kind"]) == ("status", "working", None, "codes")
    assert (seen["shards"], seen["done"], seen["of"], seen["unit"]) == ({"done": 2, "of": 4}, 20, 35, "images")
    assert seen["run"]["verb"] == "encode"
    assert seen["run"]["settings"]["encode.batch_size"] == 8
    assert "hhnet" in seen["run"]["versions"]

    failed = status(out).as_json()
    assert (failed["status"], failed["run"]["error"]) == ("failed", "the fourth shard will not do")
    assert (failed["shards"]["done"], failed["done"], failed["left_s"]) == (3, 30, None)
    assert (
        plan_changes([arguments[0]], [out]).as_json()["encode"],
        plan_changes([arguments[0]], [out]).as_json()["publish"],
    ) == (1, 3)

    result = encode(*arguments, pool=InlinePool()).as_json()
    done = status(out).as_json()
    assert (done["status"], done["digest"], done["shards"]["done"]) == ("done", result["digest"], 4)
    assert done["rejects"] == {"total": 2, "reasons": {"not_an_image": 1, "truncated": 1}}
    assert (done["done"], done["of"]) == (35, 35)


def test_records_outlive_gc_and_are_no_orphans(root: Path, tmp_path: Path, config: Config) -> None:
    out = str(tmp_path / "codes")
    encode(str(root / "shards"), str(root / "model"), out, config, pool=InlinePool())
    before = sorted(Path(out, "runs").rglob("*.json"))
    assert len(before) == 2
    assert gc(out, older_than="0s").as_json()["deleted"] == 0
    assert sorted(Path(out, "runs").rglob("*.json")) == before
    assert verify(out).as_json()["orphans"] == []


# --------------------------------------------------------------------------------------------------------- attempts


def begun_codes(folder: Path) -> Store:
    """A root as an encode leaves it that has begun."""
    ArtifactWriter(Store(folder), "codes", "f" * 64, (), {})
    return Store(folder)


def test_slow_and_retried_shards_and_hosts_are_named(tmp_path: Path) -> None:
    store, now = begun_codes(tmp_path), time.time()
    with RunLog(store, "encode", total=40, unit="images", shards=4) as log:
        assert re.search("rate +none yet: Ray", format_status(status(str(tmp_path)).as_json()))
        for number in range(3):
            began = now - 100 + 10 * number
            tries = [Tried(began, began + 10, "quick", 11, "0", "done")]
            log.record_attempts(f"{number}.tar", tries, {"samples": 10, "rejects": 0})
        died = Tried(now - 100, now - 90, "slow", 21, "1", "died")
        stuck = Tried(now - 90, now - 80, "", 0, None, "stuck")
        log.record_attempts("3.tar", [died, stuck, Tried(now - 80, now - 30, "slow", 22, "1", "done")], {"samples": 10})
        log.reach(40)
        found = status(str(tmp_path)).as_json()
        assert found["status"] == "working"
    found = status(str(tmp_path)).as_json()
    assert found["retried"] == [
        {"shard": "3.tar", "attempts": 3, "ends": ["died", "stuck", "done"], "hosts": ["slow", "?"]}
    ]
    assert [(one["shard"], one["seconds"], one["host"]) for one in found["slowest"][:2]] == [
        ("3.tar", 50.0, "slow"),
        ("0.tar", 10.0, "quick"),
    ]
    slow, quick, unknown = found["hosts"]
    assert (slow["host"], slow["workers"], slow["gpus"], slow["shards"], slow["failed"]) == ("slow", 2, 1, 1, 1)
    assert (quick["host"], quick["shards"], quick["images_per_second"], quick["mean_s"]) == ("quick", 3, 1.0, 10.0)
    assert unknown["host"] == "?"
    text = format_status(found)
    assert "3.tar" in text
    assert "2 of 6 attempts" in text
    assert "died, stuck, done" in text


class QuickLog(RunLog):
    progress_every_s = 0.05


def test_rate_and_time_left_count_from_the_first_shard_that_was_done(tmp_path: Path) -> None:
    """Workers took 100 s to start: 10 images a second after that, and 80 of 110 are left."""
    store, now = begun_codes(tmp_path), time.time()
    with QuickLog(store, "encode", total=110, unit="images", shards=11) as log:
        for number in range(3):
            log.record_attempts(
                f"{number}.tar", [Tried(now - 100, now + number, "n", 1, None, "done")], {"samples": 10}
            )
            part = Part(path=f"parts/{number}.parquet", bytes=1, sha256="0" * 64, rows=10)
            receipt = Receipt(shard=f"{number}.tar", shard_sha256="0" * 64, samples=10, part=part, rejects=None)
            store.put(f"receipts/{number}.json", canonical_json(receipt))
        log.reach(30)
        deadline = time.monotonic() + 60
        while (found := status(str(tmp_path)).as_json())["rate"] is None:
            assert time.monotonic() < deadline
        assert (found["done"], found["of"], found["rate"], found["left_s"]) == (30, 110, 10.0, 8)
        assert "10 images/s" in format_status(found)
        assert "about 8 s, until " in format_status(found)


# ------------------------------------------------------------------------------------------------------ other kinds


def test_a_training_tells_steps_epoch_and_the_map_so_far(root: Path, tmp_path: Path) -> None:
    """As a training leaves it that was killed before it published."""
    sets = ["train.epochs=2", "data.batch_size=12", "model.backbone=test_resnet", "model.stem_stride=4"]
    config = load_config(sets=[*SETTINGS, *sets, "model.bits=16", "train.checkpoint_steps=2"])
    trained = train_model(str(root / "shards"), tmp_path / "model", config)
    (tmp_path / "model" / "manifest.json").unlink()
    store, steps = Store(tmp_path / "model"), trained.manifest.meta["metrics"]["steps"]
    with RunLog(store, "train", config, done=1, total=steps, unit="steps", epochs=2, epoch_steps=steps // 2) as log:
        log.reach(steps // 2, "epoch 1/2  loss 0.5")
        found = status(store.uri).as_json()
        assert (found["status"], found["kind"], found["epochs"]) == ("working", "model", 2)
    found = status(store.uri).as_json()
    assert (found["status"], found["digest"]) == ("pending", None)
    assert (found["done"], found["of"]) == (steps, steps), "the last checkpoint is further than the last word"
    assert (found["epoch"], found["checkpoint_step"]) == (2, steps)
    assert found["map"] == pytest.approx(trained.manifest.meta["metrics"]["map"])
    assert [one["epoch"] for one in found["validations"]] == [1, 2]
    assert "best so far" in format_status(found)


def test_status_of_an_index(root: Path, tmp_path: Path, config: Config) -> None:
    out = str(tmp_path / "codes")
    encode(str(root / "shards"), str(root / "model"), out, config, pool=InlinePool())
    built = build_index(
        [out], str(tmp_path / "index"), load_config(sets=["index.workers=1", "index.part_codes=1"]), pool=InlinePool()
    ).as_json()
    found = status(built["uri"]).as_json()
    assert (found["status"], found["kind"], found["version"], found["digest"]) == ("done", "index", 1, built["digest"])
    assert (found["done"], found["of"], found["unit"]) == (4, 4, "parts")
    assert found["run"]["verb"] == "index build"


# ---------------------------------------------------------------------------------------------------------- folders


def test_a_whole_run_is_listed_stage_by_stage(root: Path, tmp_path: Path, config: Config) -> None:
    for name in ("shards", "model"):
        os.symlink(root / name, tmp_path / name)
    found = status(str(tmp_path)).as_json()
    assert [(one["stage"], one["status"]) for one in found["stages"]] == [("shards", "done"), ("model", "done")]
    assert (found["status"], found["to_come"]) == ("pending", ["codes", "index", "reports"])
    with RunLog(begun_codes(tmp_path / "codes/database"), "encode", total=35, unit="images", shards=4) as log:
        log.reach(20)
        found = status(str(tmp_path)).as_json()
        assert (found["status"], found["active"]) == ("working", ["codes/database"])
        assert "codes/database: working" in format_status(found)
        assert format_line(found).startswith("working: codes/database 0 of 4 shards")
    assert status(str(tmp_path)).status == "pending"


def test_a_study_tells_cells_and_failures(tmp_path: Path) -> None:
    with RunLog(Store(tmp_path), "study", total=6, unit="cells") as log:
        log.advance(2, "loss=dsh")
        Store(tmp_path).put("failures/model-0/000001.json", b'{"error": "the loss is not finite"}')
        found = status(str(tmp_path)).as_json()
    assert (found["status"], found["kind"], found["digest"]) == ("working", "study", None)
    assert found["failures"] == ["the loss is not finite"]
    assert status(str(tmp_path)).as_json()["done"] == 2
    assert status(str(tmp_path)).status == "pending"


def test_nothing_at_the_place_is_bad_usage(tmp_path: Path) -> None:
    (tmp_path / "some/where").mkdir(parents=True)
    with pytest.raises(InputError, match="holds nothing that a verb has begun: name the --out"):
        status(str(tmp_path))
    done = hhnet("status", tmp_path / "no")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"hhnet: {tmp_path}/no holds nothing")


# ------------------------------------------------------------------------------------------------------------ watch


def hhnet(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "pipelines", *map(str, words)], capture_output=True, text=True)


def looks(found: Sequence[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """What one look after another finds."""
    rest = iter([{"uri": "u", "digest": None, **one} for one in found])
    monkeypatch.setattr(status_module.Survey, "look", lambda self: next(rest))


def test_watching_ends_when_the_work_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = {"uri": "u", "kind": "codes", "of": 3, "unit": "images"}
    states = [("working", 0), ("working", 1), ("working", 1), ("pending", 2), ("done", 3)]
    looks([{**base, "status": state, "done": done} for state, done in states], monkeypatch)
    assert status(str(tmp_path), watch=True, every=0).status == "done"
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" ", 1)[1] for line in lines] == [
        "working: 0 of 3 images (0 %)",
        "working: 1 of 3 images (33 %)",
        "pending: 2 of 3 images (67 %)",
    ]


@pytest.mark.parametrize("state", ["died", "failed", "interrupted"])
def test_watching_ends_when_nothing_works_any_more(state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks([{"status": "working", "kind": "codes"}, {"status": state}], monkeypatch)
    assert status(str(tmp_path), watch=True, every=0).status == state


def test_the_command_prints_one_line_of_json(root: Path) -> None:
    done = hhnet("status", root / "shards", "--json")
    (line,) = done.stdout.splitlines()
    found = json.loads(line)
    assert {"verb": "status", "status": "done", "kind": "shards", "uri": str(root / "shards")}.items() <= found.items()
    assert len(found["digest"]) == 64


def test_an_interrupted_watch_is_130(root: Path, tmp_path: Path) -> None:
    with RunLog(begun_codes(tmp_path), "encode", total=35, unit="images"):
        command = [sys.executable, "-m", "pipelines", "status", str(tmp_path), "--watch"]
        # A shell's background jobs ignore Ctrl-C, and so would what they start.
        heard = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **heard) as process:
            assert process.stderr is not None
            assert "working" in process.stderr.readline()
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 130
            assert process.stderr.read().splitlines()[-1] == "hhnet: interrupted"  # it commits nothing


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0 s"), (59.9, "59 s"), (60, "1 min"), (200, "3 min 20 s"), (7500, "2 h 5 min"), (97_200, "1 d 3 h")],
)
def test_spans_of_time_in_words(seconds: float, words: str) -> None:
    assert format_span(seconds) == words
