"""Running a verb again: a finished run is recognised cheaply, what was lost comes back, and two runs agree."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from pipelines.artifacts.commit import ArtifactWriter
from pipelines.artifacts.facts import Receipt
from pipelines.artifacts.manifest import ArtifactInput, Part, open_artifact
from pipelines.config.loading import load_config
from pipelines.config.settings import Config
from pipelines.dedupe.dedupe import dedupe
from pipelines.encode.encode import encode
from pipelines.encode.job import plan_encode
from pipelines.errors import CommitConflict, DamagedArtifact, FingerprintMismatch
from pipelines.evaluate.evaluate import evaluate
from pipelines.index.build import build_index
from pipelines.ingest.adopt import adopt
from pipelines.ingest.ingest import ingest
from pipelines.storage import Store, canonical_json, sha256_of
from pipelines.train.train import train
from pipelines.verify.verify import verify
from tests.integration.conftest import SETTINGS
from tests.integration.test_encode import tree
from tests.support.inline import InlinePool
from tests.support.pictures import jpeg, picture
from tests.support.report import report

LOOK = """
import json, sys, time
begun = time.perf_counter()
from pipelines.storage import Store
calls, depth = {}, 0
def counted(name):
    plain = getattr(Store, name)
    def call(*args, **kwargs):
        global depth
        calls[name] = calls.get(name, 0) + (depth == 0)
        depth += 1
        try:
            return plain(*args, **kwargs)
        finally:
            depth -= 1
    return call
for name in ("read", "open", "size", "names", "entries", "put", "delete"):
    setattr(Store, name, counted(name))
from pipelines.cli.main import build_app
try:
    build_app()(sys.argv[1:], standalone_mode=False)
finally:
    heavy = [name for name in ("torch", "ray", "webdataset", "prefect", "faiss") if name in sys.modules]
    print(json.dumps({"heavy": heavy, "calls": calls, "seconds": time.perf_counter() - begun}))
"""


def looked_at(*words: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run a verb in a process of its own: its result, and what it imported and asked the store."""
    done = subprocess.run([sys.executable, "-c", LOOK, *words, "--json"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    result, seen = (json.loads(line) for line in done.stdout.splitlines()[-2:])
    return result, seen


def settings_as_words() -> list[str]:
    return [word for setting in SETTINGS for word in ("--set", setting)]


@pytest.fixture(scope="module")
def made(
    pictures: Path, shards: Path, model: Path, codes: Path, config: Config, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder with an index and a report of the session's codes."""
    folder = tmp_path_factory.mktemp("made")
    build_index([str(codes / "train"), str(codes / "database")], str(folder / "index"), config)
    evaluate(str(codes / "query"), [str(codes / "database")], str(folder / "report"), config)
    near = load_config(sets=["dedupe.radius=2"])
    dedupe([str(codes / "train")], str(folder / "duplicates"), near, against=str(folder / "index"))
    return folder


# ------------------------------------------------------------------------------------------------- what is finished


@pytest.mark.parametrize("verb", ["ingest", "train", "encode", "retry-rejects", "index", "evaluate", "dedupe"])
def test_a_finished_run_is_recognised_before_anything_heavy_is_imported(
    verb: str, pictures: Path, shards: Path, model: Path, codes: Path, made: Path
) -> None:
    words = {
        "ingest": ["ingest", str(pictures), "--out", str(shards), "--split", "train=.6,query=.2,database=.2"],
        "train": ["train", "--shards", str(shards / "train"), "--out", str(model)],
        "encode": ["encode", "--shards", str(shards / "query"), "--model", str(model), "--out", str(codes / "query")],
        "retry-rejects": ["retry-rejects", "--codes", str(codes / "query")],
        "index": [
            *("index", "build", "--codes", str(codes / "train"), "--codes", str(codes / "database")),
            *("--out", str(made / "index")),
        ],
        "evaluate": [
            *("evaluate", "--queries", str(codes / "query"), "--database", str(codes / "database")),
            *("--out", str(made / "report")),
        ],
        "dedupe": [
            *("dedupe", "--codes", str(codes / "train"), "--against", str(made / "index"), "--radius", "2"),
            *("--out", str(made / "duplicates")),
        ],
    }[verb]
    before = {path: tree(path) for path in (shards, model, codes, made)}
    result, seen = looked_at(*words, *settings_as_words())
    assert result["status"] == "unchanged"
    assert seen["heavy"] == []
    assert {path: tree(path) for path in before} == before


def finished_encode(folder: Path, count: int, config: Config) -> dict[str, str]:
    """Shards, a model and codes as a finished run of `count` shards leaves them; their bytes are of no concern."""
    classes, metrics = ["cat", "dog"], {"map": 0.5, "epoch": 1, "steps": 1, "skipped": 0}
    tars = [Part(path=f"parts/a-{n:06d}-{n:016x}.tar", bytes=9, sha256=f"{n:064x}", rows=1) for n in range(count)]
    writer = ArtifactWriter(Store(folder / "shards"), "shards", "1" * 64, (), {})
    shards = writer.commit(tars, {"samples": count}, {"classes": classes, "source": "", "split": None})
    inputs = (ArtifactInput(role="shards", kind="shards", digest=shards.digest),)
    writer = ArtifactWriter(Store(folder / "model"), "model", "2" * 64, inputs, {})
    model = writer.commit(
        [writer.put_part("model.json", b"{}", 1)], {}, {"bits": 16, "classes": classes, "metrics": metrics}
    )
    job = plan_encode(shards, model, str(folder / "codes"), config)
    for name in ("parts", "receipts"):
        (folder / "codes" / name).mkdir(parents=True)
    parts, receipts = [], {}
    for number in range(count):
        data = b"rows of %d" % number
        path = f"parts/a-{number:06d}-{sha256_of(data)[:16]}.parquet"
        part = Part(path=path, bytes=len(data), sha256=sha256_of(data), rows=1)
        tar = {"shard": f"a-{number:06d}.tar", "shard_sha256": tars[number].sha256, "samples": 1}
        receipt = Receipt.model_validate({**tar, "part": part, "rejects": None})
        (folder / "codes" / path).write_bytes(data)  # not put: a thousand fsyncs are not what this is about
        (folder / "codes" / f"receipts/a-{number:06d}.json").write_bytes(canonical_json(receipt))
        parts.append(part)
        receipts[f"a-{number:06d}"] = receipt
    totals = {"samples": count, "codes": count, "rejects": 0}
    job.writer().commit(
        parts, totals, {"bits": 16, "classes": classes, "carried": {}, "settings": {"encode.carry": []}}, receipts
    )
    return {name: str(folder / name) for name in ("shards", "model", "codes")}


def test_resume_asks_the_store_as_often_for_1000_shards_as_for_ten(tmp_path: Path, config: Config) -> None:
    seen = {}
    for count in (10, 1000):
        where = finished_encode(tmp_path / str(count), count, config)
        words = ["encode", "--shards", where["shards"], "--model", where["model"], "--out", where["codes"]]
        result, seen[count] = looked_at(*words, *settings_as_words())
        assert (result["status"], result["codes"], seen[count]["heavy"]) == ("unchanged", count, [])
    # The manifest of so many codes names a list of its parts and one of its receipts.
    assert seen[1000]["calls"] == {**seen[10]["calls"], "read": seen[10]["calls"]["read"] + 2}
    calls = seen[1000]["calls"]
    report("resume of 1,000 shards", calls=calls, requests=sum(calls.values()), seconds=round(seen[1000]["seconds"], 2))
    next((tmp_path / "1000" / "codes" / "parts").iterdir()).unlink()
    done = subprocess.run([sys.executable, "-m", "pipelines", *words, *settings_as_words()], capture_output=True)
    assert done.returncode == 1, "the loss of one part of a thousand is noticed: these tars cannot be encoded again"


# --------------------------------------------------------------------------------------------------- what was lost


Again = Callable[[Path], dict[str, Any]]


@pytest.fixture
def verbs(pictures: Path, shards: Path, model: Path, codes: Path, config: Config) -> dict[str, Again]:
    """By kind, the run that makes it at a root; what makes it again is not about Ray."""
    ivf = load_config(sets=[*SETTINGS, "index.kind=ivf", "index.nlist=2"])
    query, database = str(codes / "query"), str(codes / "database")
    return {
        "shards": lambda out: ingest(str(pictures), str(out), config).as_json(),
        "adopted": lambda out: adopt(str(shards / "train" / "parts"), str(out)).as_json(),
        "model": lambda out: train(str(shards / "train"), str(out), config).as_json(),
        "codes": lambda out: encode(str(shards / "query"), str(model), str(out), config, pool=InlinePool()).as_json(),
        "index": lambda out: build_index([query, database], str(out), ivf, pool=InlinePool()).as_json(),
        "report": lambda out: evaluate(query, [database], str(out), config).as_json(),
    }


@pytest.mark.parametrize("kind", ["shards", "adopted", "model", "codes", "index", "report"])
def test_whatever_is_deleted_by_hand_comes_back(
    kind: str, verbs: dict[str, Again], model: Path, tmp_path: Path
) -> None:
    out, again = tmp_path / kind, verbs[kind]
    first = {"digest": open_artifact(shutil.copytree(model, out)).digest} if kind == "model" else again(out)
    before = tree(out)
    names = [name for name in before if name.split("/")[0] not in ("versions", "checkpoints")]
    assert len(names) >= 4
    for name in names:
        (out / name).unlink()
        result = again(out)
        assert (name, result["digest"]) == (name, first["digest"])
        assert result["status"] == "done", f"{name} was not missed"
        assert tree(out) == before, name
    assert again(out)["status"] == "unchanged"


def test_a_part_that_cannot_come_back_the_same_is_said(
    shards: Path, model: Path, tmp_path: Path, config: Config
) -> None:
    out = tmp_path / "codes"
    source = shutil.copytree(shards / "query", tmp_path / "shards")
    encode(str(source), str(model), str(out), config)
    for tar in source.glob("parts/*.tar"):
        tar.unlink()
    next((out / "parts").iterdir()).unlink()
    with pytest.raises((DamagedArtifact, CommitConflict), match="gone"):
        encode(str(source), str(model), str(out), config)


def test_a_changed_input_shard_is_noticed(pictures: Path, model: Path, tmp_path: Path, config: Config) -> None:
    source = shutil.copytree(pictures, tmp_path / "photos")
    ingest(str(source), str(tmp_path / "shards"), config)
    encode(str(tmp_path / "shards"), str(model), str(tmp_path / "codes"), config)
    before = tree(tmp_path / "codes")
    changed = next(source.rglob("*.jpg"))
    changed.write_bytes(jpeg(picture(0, 99)))
    with pytest.raises(FingerprintMismatch):
        ingest(str(source), str(tmp_path / "shards"), config)
    shutil.rmtree(tmp_path / "shards")
    ingest(str(source), str(tmp_path / "shards"), config)
    with pytest.raises(FingerprintMismatch, match="choose another --out"):
        encode(str(tmp_path / "shards"), str(model), str(tmp_path / "codes"), config)
    assert tree(tmp_path / "codes") == before


# ------------------------------------------------------------------------------------------------------ two at once


def at_once(*words: str) -> list[dict[str, Any]]:
    """Two processes of one command, begun together; both must end well."""
    command = [sys.executable, "-m", "pipelines", *words, *settings_as_words(), "--json"]
    runs = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
        for _ in range(2)
    ]
    ended = [run.communicate(timeout=240) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], [err for _, err in ended]
    return [cast("dict[str, Any]", json.loads(out.splitlines()[-1])) for out, _ in ended]


def settled(out: Path, results: list[dict[str, Any]]) -> str:
    """The digest that both runs found, which is that of a proven artifact without leftovers."""
    (digest,) = {result["digest"] for result in results}
    assert verify(str(out)).digest == digest
    assert [name for name in tree(out) if ".tmp-" in name] == []
    return str(digest)


def test_two_encodes_of_one_root(shards: Path, model: Path, codes: Path, tmp_path: Path) -> None:
    words = ["encode", "--shards", str(shards / "train"), "--model", str(model), "--out", str(tmp_path / "codes")]
    results = at_once(*words, "--workers", "1")
    assert settled(tmp_path / "codes", results) == open_artifact(codes / "train").digest


def test_two_ingests_of_one_root(pictures: Path, tmp_path: Path, config: Config) -> None:
    alone = ingest(str(pictures), str(tmp_path / "alone"), config).as_json()
    results = at_once("ingest", str(pictures), "--out", str(tmp_path / "shards"))
    assert settled(tmp_path / "shards", results) == alone["digest"]


def test_two_index_builds_of_one_root(codes: Path, made: Path, tmp_path: Path) -> None:
    words = ["index", "build", "--codes", str(codes / "train"), "--codes", str(codes / "database")]
    results = at_once(*words, "--out", str(tmp_path / "index"), "--workers", "1")
    assert settled(tmp_path / "index", results) == open_artifact(made / "index").digest
    assert [result["version"] for result in results] == [1, 1]
