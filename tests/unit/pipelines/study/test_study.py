"""A tiny study whose verbs run in this process; tests/integration/test_study.py has it on Ray."""

import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from pipelines.artifacts.commit import ArtifactWriter
from pipelines.artifacts.manifest import open_artifact
from pipelines.artifacts.parquet import parquet_bytes
from pipelines.config.loading import load_config
from pipelines.encode.encode import encode
from pipelines.errors import DamagedArtifact, StoreUnavailable, UsageError, WorkFailed
from pipelines.ingest.ingest import ingest
from pipelines.storage import Store, canonical_json
from pipelines.study.grid import Grid, read_description
from pipelines.study.results import cells_table, summarise_groups
from pipelines.study.study import study
from pipelines.train.job import TrainJob
from pipelines.train.train import train
from pipelines.train.worker import train_worker
from pipelines.verify.status import status
from pipelines.verify.verify import verify
from tests.support.inline import InlinePool
from tests.support.pictures import write_folder

STUDY = """
title = "Tiny <study>"
seeds = [0, 1]
[settings]
data.image_size = 32
data.batch_size = 8
model.backbone = "test_convnext"
model.head = "ln"
train.epochs = 1
train.val_share = 0.25
encode.batch_size = 8
evaluate.gallery = 0
[axes]
model.bits = [16, 24]
"""
SEARCH = "[search]\ntrain.lr = [1e-5, 1e-3]\n"


class Trainings:
    """What was trained, by (bits, lr, seed); those that `fails` names do not come to an end."""

    def __init__(self) -> None:
        self.done: list[tuple[int, float, int]] = []
        self.fails: dict[tuple[int, float, int], BaseException] = {}
        self.meanwhile: Callable[[], object] | None = None  # what happens during the next training

    def run(self, job: TrainJob, data: Any, done: int) -> None:
        settings = job.config.train
        mark = (job.config.model.bits, settings.lr, settings.seed)
        if mark in self.fails:
            raise self.fails[mark]
        if self.meanwhile is not None:
            happens, self.meanwhile = self.meanwhile, None
            happens()
        train_worker(job, lambda step, note: None)
        self.done.append(mark)

    def study(self, *args: Any, **options: Any) -> Any:
        """Run a study that trains and encodes in this process."""
        how = {"train": partial(train, run=self.run), "encode": partial(encode, pool=InlinePool())}
        return study(*args, **how, **options)


@pytest.fixture
def trainings() -> Iterator[Trainings]:
    found = Trainings()
    threads = torch.get_num_threads()
    yield found
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    write_folder(folder / "photos", classes=3, per_class=20)
    sets = ["ingest.samples_per_shard=20"]
    ingest(
        str(folder / "photos"), str(folder / "shards"), load_config(sets=sets), split="train=.6,query=.2,database=.2"
    )
    return folder / "shards"


def grid_of(folder: Path, shards: Path | None, text: str = STUDY) -> Grid:
    file = folder / "study.toml"
    file.write_text(text)
    named = {"train": "train", "query": "query"} if shards else {}
    sets = [f'run.{role}="{shards}/{name}"' for role, name in named.items()]
    database = [f'run.database=["{shards}/train", "{shards}/database"]'] if shards else []
    return Grid.make(read_description(str(file)), sets=[*sets, *database])


def test_rows_mean_and_deviation_are_those_of_the_reports(trainings: Trainings, shards: Path, tmp_path: Path) -> None:
    grid, out = grid_of(tmp_path, shards), str(tmp_path / "out")
    answer = trainings.study(grid, out).as_json()
    assert (answer["status"], answer["cells"], answer["failed"]) == ("done", 4, 0)
    reports = {}
    for manifest in Path(out).glob("report/*/manifest.json"):
        report = open_artifact(str(manifest.parent))
        metrics = json.loads(report.read(report.manifest.part("metrics.json")))
        reports[report.digest] = metrics["map"]
    rows = pq.read_table(answer["table"]).to_pylist()
    assert {row["report"]: row["map"] for row in rows} == reports and len(reports) == 4
    assert [(row["axis.model.bits"], row["bits"], row["seed"]) for row in rows] == [
        (str(bits), bits, seed) for bits in (16, 24) for seed in (0, 1)
    ]
    assert {(row["images"], row["steps"]) for row in rows} == {(27, 4)}
    for entry in answer["summary"]:
        maps = [reports[row["report"]] for row in rows if row["bits"] == entry["bits"]]
        assert entry["map"] == pytest.approx(mean(maps), abs=1e-12)
        assert entry["deviation"] == pytest.approx(stdev(maps), abs=1e-12)
    page = Path(answer["report"]).read_text()
    assert "Tiny &lt;study&gt;" in page and "http" not in page.replace("http-equiv", "")
    drawn = {path.name.partition("-")[0] for path in Path(answer["uri"]).glob("parts/*.png")}
    assert drawn == {"map_bits"}  # of their FLOPs the groups differ by the last layer alone


def test_the_page_has_the_best_group_first_and_links_to_the_reports(
    trainings: Trainings, shards: Path, tmp_path: Path
) -> None:
    answer = trainings.study(grid_of(tmp_path, shards), str(tmp_path / "out")).as_json()
    page = Path(answer["report"])
    table = page.read_text().partition('id="groups"')[2].partition("</section>")[0]
    shown = re.findall(r"<td>(\d\.\d{4}) ±", table)
    assert shown == sorted((f"{entry['map']:.4f}" for entry in answer["summary"]), reverse=True) and len(shown) == 2
    chance = pq.read_table(answer["table"])["chance"][0].as_py()
    assert table.count(f"<td>{chance:.4f}</td>") == 2
    links = {(page.parent / link).resolve() for link in re.findall(r'href="([^"#]+)"', table)}
    assert links == set((tmp_path / "out").resolve().glob("report/*/parts/report-*.html")) and len(links) == 4


def test_a_dry_run_tells_what_is_left(trainings: Trainings, shards: Path, tmp_path: Path) -> None:
    grid, out = grid_of(tmp_path, shards), str(tmp_path / "out")
    left = trainings.study(grid, out, dry_run=True)
    assert (left.trainings, left.images, left.training_seconds) == (4, 4 * 27, None)
    assert "unknown before the first training" in left.as_text()
    trainings.study(grid, out, share=(1, 2))
    left = trainings.study(grid, out, dry_run=True)
    assert (left.trainings, left.images) == (2, 2 * 27) and left.training_seconds > 0
    assert re.search(r"training seconds +about \d", left.as_text())
    rates = SEARCH.replace("1e-3", "1e-4")  # none of them is the default
    searched = trainings.study(grid_of(tmp_path, shards, STUDY + rates), str(tmp_path / "other"), dry_run=True)
    assert searched.trainings == 2 * (2 + 1)  # two candidates with the first seed, the chosen one with the other


def test_its_status_counts_cells_and_artifacts(trainings: Trainings, shards: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    answer = trainings.study(grid_of(tmp_path, shards), out).as_json()
    found = status(out).as_json()
    assert (found["kind"], found["status"], found["digest"]) == ("study", "done", answer["digest"])
    assert (found["done"], found["of"], found["unit"]) == (4, 4, "cells")
    assert found["made"]["report"] == {"done": 4}
    assert found["run"]["verb"] == "study"


def test_a_rerun_trains_nothing_and_says_unchanged(trainings: Trainings, shards: Path, tmp_path: Path) -> None:
    grid, out = grid_of(tmp_path, shards), str(tmp_path / "out")
    first = trainings.study(grid, out).as_json()
    trained = list(trainings.done)
    again = trainings.study(grid, out).as_json()
    assert again == {**first, "status": "unchanged"} and trainings.done == trained


def test_the_rate_is_chosen_on_validation_for_each_group_and_its_training_counts(
    trainings: Trainings, shards: Path, tmp_path: Path
) -> None:
    answer = trainings.study(grid_of(tmp_path, shards, STUDY + SEARCH), str(tmp_path / "out")).as_json()
    searches = pq.read_table(next(Path(answer["uri"]).glob("parts/searches-*"))).to_pylist()
    rows = pq.read_table(answer["table"]).to_pylist()
    assert len(searches) == 4 and len(trainings.done) == len(set(trainings.done)) == 6
    for bits in ("16", "24"):
        tried = [entry for entry in searches if entry["group"] == f"model.bits={bits}"]
        assert {entry["seed"] for entry in tried} == {0}
        best = max(tried, key=lambda entry: entry["val_map"])
        assert [entry for entry in tried if entry["chosen"]] == [best]
        mine = [row for row in rows if row["axis.model.bits"] == bits]
        assert {f"train.lr={json.dumps(row['lr'])}" for row in mine} == {best["candidate"]}
        assert mine[0]["model"] == best["model"]


def test_a_candidate_that_fails_is_not_chosen_and_is_shown(trainings: Trainings, shards: Path, tmp_path: Path) -> None:
    trainings.fails[16, 1e-3, 0] = WorkFailed("the loss became nan")
    grid, out = grid_of(tmp_path, shards, STUDY + SEARCH), str(tmp_path / "out")
    answer = trainings.study(grid, out).as_json()
    assert answer["failed"] == 0 and answer["summary"][0]["lr"] == 1e-5
    assert trainings.study(grid, out, dry_run=True).done == 4
    assert "the loss became nan" in Path(answer["report"]).read_text()


def test_a_cell_that_fails_is_a_row_with_its_error_and_is_tried_again(
    trainings: Trainings, shards: Path, tmp_path: Path
) -> None:
    grid, out = grid_of(tmp_path, shards), str(tmp_path / "out")
    trainings.fails[24, 1e-3, 0] = WorkFailed("the loss became nan")
    with pytest.raises(WorkFailed, match=r"1 of 4 cells failed \(model.bits=24, seed 0: the loss became nan\), see"):
        trainings.study(grid, out)
    (table,) = Path(out).glob("study/*/parts/cells-*.parquet")
    rows = {(row["bits"], row["seed"]): row for row in pq.read_table(table).to_pylist()}
    assert rows[24, 0]["error"] == "the loss became nan" and rows[24, 0]["map"] is None
    assert all(row["error"] is None and row["map"] for place, row in rows.items() if place != (24, 0))
    assert verify(str(table.parents[1])).kind == "study"
    states = [entry["state"] for entry in trainings.study(grid, out, dry_run=True).states]
    assert states == ["done", "done", "failed", "done"]
    with pytest.raises(WorkFailed, match="1 of 4 cells failed"):  # of another share than its own
        trainings.study(grid, out, share=(1, 2))
    trainings.fails[24, 1e-3, 0] = WorkFailed("the disk is full")
    with pytest.raises(WorkFailed, match="the disk is full"):
        trainings.study(grid, out)
    assert status(out).found["failures"] == ["the disk is full"]
    with pytest.raises(WorkFailed, match="the disk is full"):
        trainings.study(grid, out, share=(1, 2))
    trainings.fails.clear()
    answer = trainings.study(grid, out).as_json()
    assert (answer["status"], answer["failed"], len(trainings.done)) == ("done", 0, 4)
    assert status(out).found["failures"] == []
    assert [entry["seeds"] for entry in answer["summary"]] == [2, 2]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), StoreUnavailable("the store is gone")])
def test_what_is_no_cells_fault_ends_the_study_and_a_rerun_goes_on(
    trainings: Trainings, shards: Path, tmp_path: Path, error: BaseException
) -> None:
    grid, out = grid_of(tmp_path, shards), str(tmp_path / "out")
    trainings.fails[24, 1e-3, 0] = error
    with pytest.raises(type(error)):
        trainings.study(grid, out)
    listed = trainings.study(grid, out, dry_run=True).as_json()
    assert [entry["state"] for entry in listed["states"]] == ["done", "done", "missing", "missing"]
    assert (listed["done"], listed["missing"], listed["digest"]) == (2, 2, None)
    trainings.fails.clear()
    assert trainings.study(grid, out).status == "done"
    assert len(trainings.done) == len(set(trainings.done)) == 4


def test_shares_do_their_groups_and_the_last_one_publishes(trainings: Trainings, shards: Path, tmp_path: Path) -> None:
    grid, out = grid_of(tmp_path, shards), str(tmp_path / "out")
    first = trainings.study(grid, out, share=(2, 2)).as_json()
    assert {bits for bits, _, _ in trainings.done} == {24} and first["missing"] == 2 and first["digest"] is None
    last = trainings.study(grid, out, share=(1, 2)).as_json()
    assert last["cells"] == 4 and len(trainings.done) == 4
    assert trainings.study(grid, out, share=(2, 2)).as_json() == {**last, "status": "unchanged"}


def test_the_last_of_two_shares_side_by_side_publishes(trainings: Trainings, shards: Path, tmp_path: Path) -> None:
    grid, out = grid_of(tmp_path, shards), str(tmp_path / "out")
    others: list[dict[str, Any]] = []
    trainings.meanwhile = lambda: others.append(
        trainings.study(grid, out, share=(1, 2)).as_json()
    )  # begins and ends while (2, 2) trains
    last = trainings.study(grid, out, share=(2, 2)).as_json()
    assert [answer["missing"] for answer in others] == [2]
    assert last["digest"] is not None and len(last["summary"]) == 2


def test_without_data_only_a_dry_run_lists_the_cells(tmp_path: Path) -> None:
    grid = grid_of(tmp_path, None)
    listed = study(grid, str(tmp_path / "out"), dry_run=True).as_json()
    assert (listed["trainings"], listed["images"], listed["training_seconds"]) == (4, None, None)
    assert listed["missing"] == 4 and not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="the study has no data: give --train, --query and --database"):
        study(grid, str(tmp_path / "out"))
    with pytest.raises(UsageError, match="names no protocol"):
        study(grid, str(tmp_path / "out"), root=str(tmp_path))


def rewritten(uri: str, out: Path, change: dict[str, Any], summary: bool = True) -> str:
    """The study again with the first row changed, committed as if it had been made so."""
    source = open_artifact(uri)
    table = pq.read_table(next(Path(uri).glob("parts/cells-*")))
    axes = source.manifest.meta["axes"]
    first, *others = table.to_pylist()
    cells = cells_table(axes, [{**first, **change}, *others])
    writer = ArtifactWriter(
        *(Store(out), "study", source.manifest.fingerprint, source.manifest.inputs),
        json.loads((Path(uri) / "origin.json").read_text()),
    )
    files = {part.name: source.read(part) for part in source.manifest.parts}
    files["cells.parquet"] = parquet_bytes(cells)
    if summary:
        files["summary.json"] = canonical_json(summarise_groups(cells))
    parts = [writer.put_part(name, data, 4) for name, data in files.items()]
    return writer.commit(parts, source.manifest.totals, source.manifest.meta).uri


def test_verify_follows_every_figure_to_the_artifact_it_is_from(
    trainings: Trainings, shards: Path, tmp_path: Path
) -> None:
    uri = trainings.study(grid_of(tmp_path, shards), str(tmp_path / "out")).uri
    proven = verify(uri).as_json()
    assert "4 cells with the figures of the reports and models they name" in proven["checks"]
    assert proven["orphans"] == []
    other = pq.read_table(next(Path(uri).glob("parts/cells-*"))).to_pylist()[1]
    wrong = {
        "says map 2.0, but report": {"map": 2.0},
        "says val_map 2.0, but model": {"val_map": 2.0},
        "says parameters 7, but model": {"parameters": 7},
        "says backbone resnet18, but model": {"backbone": "resnet18"},
        "names a report that is not an input": {"report": "f" * 64},
        "names a report of another model than its own": {"model": other["model"]},
        "has neither report nor error": {"report": None, "map": None},
        "the totals say": {"error": "it failed", "report": None, "map": None},
    }
    for place, (said, change) in enumerate(wrong.items()):
        with pytest.raises(DamagedArtifact, match=said):
            verify(rewritten(uri, tmp_path / f"wrong{place}", change))
    with pytest.raises(DamagedArtifact, match="is not the summary of its cells"):
        verify(rewritten(uri, tmp_path / "summary", {"map": 2.0}, summary=False))
