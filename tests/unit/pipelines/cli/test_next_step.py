"""The line `next:` below a result: a command that can be run, with the places of this run."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipelines.artifacts.result import Result
from pipelines.cli.next_step import next_step
from pipelines.encode.encode import EncodeResult
from pipelines.evaluate.evaluate import EvaluateResult
from pipelines.index.build import BuildResult
from pipelines.ingest.result import IngestResult
from pipelines.search.search import SearchResult
from pipelines.train.train import TrainResult
from tests.support.pictures import write_folder

DONE: dict[str, Any] = {"status": "done", "digest": "d" * 64}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def ingested(here: Path, **facts: Any) -> IngestResult:
    counts: dict[str, Any] = {"samples": 9, "skipped": 0, "found": 9, "skipped_reasons": {}, "skipped_files": []}
    return IngestResult(**DONE, uri=f"{here}/out/shards", **counts, **{"classes": ["cat"], **facts})


def encoded(here: Path, name: str) -> EncodeResult:
    return EncodeResult(**DONE, uri=f"{here}/out/codes/{name}", samples=9, codes=9, rejects=0)


def indexed(here: Path, **facts: Any) -> BuildResult:
    return BuildResult(**DONE, uri=f"{here}/out/index", kind="flat", card={}, **facts)


def committed(root: Path) -> None:
    root.mkdir(parents=True)
    (root / "manifest.json").write_text("{}")


def test_each_verb_leads_to_the_next(here: Path) -> None:
    splits = {name: {"uri": f"{here}/out/shards/{name}", "samples": 3} for name in ("query", "train")}
    assert next_step(ingested(here, splits=splits), {}) == "next: hhnet train --shards out/shards/train --out out/model"
    assert next_step(ingested(here), {}) == "next: hhnet train --shards out/shards --out out/model"
    unlabelled = next_step(ingested(here, classes=[]), {})
    assert unlabelled == "next: hhnet encode --shards out/shards --model MODEL --out out/codes"
    grown = next_step(ingested(here, version=2), {"config": "c.toml"})
    assert grown == "next: hhnet plan --shards out/shards --config c.toml"
    learnt = TrainResult(**DONE, uri=f"{here}/out/model", map=0.5, epoch=1, steps=2, skipped=0)
    words = "next: hhnet encode --shards out/shards/train --model out/model --out out/codes/train"
    assert next_step(learnt, {"shards": "out/shards/train"}) == words
    words = "next: hhnet index build --codes out/codes/train --out out/index"
    assert next_step(encoded(here, "train"), {}) == words
    search = "next: hhnet search --index out/index --image PHOTO.jpg -k 10 --html found.html"
    assert next_step(indexed(here, version=1), {"publish": True}) == search
    assert next_step(indexed(here, version=None), {"publish": False}) == "next: hhnet index publish --index out/index"


def test_an_index_is_built_of_all_codes_that_are_there_but_the_queries(here: Path) -> None:
    for name in ("train", "query", "database"):
        committed(here / "out" / "codes" / name)
    words = "next: hhnet index build --codes out/codes/train --codes out/codes/database --out out/index"
    assert next_step(encoded(here, "database"), {}) == words


def test_codes_beside_an_index_are_added_to_it_and_queries_are_evaluated(here: Path) -> None:
    committed(here / "out" / "index")
    assert next_step(encoded(here, "night"), {}) == "next: hhnet index add --index out/index --codes out/codes/night"
    committed(here / "out" / "codes" / "database")
    words = "next: hhnet evaluate --queries out/codes/query --database out/codes/database --out out/report"
    assert next_step(encoded(here, "query"), {}) == words


def test_pages_are_to_be_opened_and_a_search_without_one_needs_nothing(here: Path) -> None:
    found = {**DONE, "uri": "u", "version": 1, "results": []}
    assert next_step(SearchResult(**found), {}) == ""
    page = f"{here}/found.html"
    assert next_step(SearchResult(**found, html=page), {}) == "next: open found.html in a browser"
    figures: dict[str, Any] = {"map": 0.5, "convention": "all", "chance": 0.1, "precision_at": {}, "bits": 8}
    figures |= {
        "queries": 1,
        "database": 1,
        "queries_searched": [],
        "metrics": "m",
        "report": f"{here}/out/report.html",
    }
    report = EvaluateResult(**DONE, uri="u", **figures)
    assert next_step(report, {}) == "next: open out/report.html in a browser"
    assert next_step(Result(**DONE, verb="another", uri="u"), {}) == ""


def test_what_says_where_ray_and_the_stores_are_is_kept(here: Path) -> None:
    given = {"config": Path("my run.toml"), "sets": ["ray.address=http://h:8265", "train.epochs=3"]}
    line = next_step(ingested(here), given)
    assert line.endswith("--out out/model --config 'my run.toml' --set ray.address=http://h:8265")


def test_ingest_ends_with_tables_and_a_command_and_json_knows_none_of_it(here: Path) -> None:
    write_folder(here / "photos", classes=2, per_class=10)
    (here / "photos" / "notes.txt").write_text("no picture")
    command = [sys.executable, "-m", "pipelines", "ingest", "photos", "--out", "shards"]
    command += ["--split", "train=.5,query=.5"]
    text = subprocess.run(command, capture_output=True, text=True).stdout
    lines = [line.split() for line in text.splitlines()]
    assert ["split", "images", "uri", "digest"] in lines
    assert any(line[:3] == ["query", "10", "shards/query"] for line in lines)
    assert ["wrong_suffix", "1", ".txt", "1"] in lines
    assert not set("{}'[]") & set(text)
    assert text.splitlines()[-1] == "next: hhnet train --shards shards/train --out model"
    record = json.loads(subprocess.run([*command, "--json"], capture_output=True, text=True).stdout)
    assert "next" not in record and record["splits"]["query"]["samples"] == 10
