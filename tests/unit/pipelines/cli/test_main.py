"""The command line as a user meets it: exit codes, one-line errors, JSON on stdout."""

import itertools
import json
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import typer

from pipelines.artifacts.result import Result
from pipelines.cli.verb import verb
from pipelines.config.loading import changed_settings, load_config
from pipelines.errors import Degraded, HHNetError, StoreUnavailable, UsageError, WorkFailed
from pipelines.index.publish import InfoResult
from pipelines.search.search import SearchResult
from tests.support.pictures import write_folder


def hhnet(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "pipelines", *map(str, words)], capture_output=True, text=True)


def refused(done: subprocess.CompletedProcess[str], code: int = 2) -> str:
    """The one line of an error; only progress may stand above it."""
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    *progress, line = done.stderr.splitlines()
    assert line.startswith("hhnet: ")
    assert all(re.match(r"[\w: ]+: [\d,]+/[\d,]+ ", entry) for entry in progress), done.stderr
    return line


def test_a_result_is_one_line_of_json(tmp_path: Path) -> None:
    write_folder(tmp_path / "photos", classes=2, per_class=3)
    done = hhnet("ingest", tmp_path / "photos", "--out", tmp_path / "shards", "--json")
    (line,) = done.stdout.splitlines()
    result = json.loads(line)
    assert {"verb": "ingest", "status": "done", "uri": str(tmp_path / "shards")}.items() <= result.items()
    assert len(result["digest"]) == 64


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ingest", "{tmp}/nowhere", "--out", "{tmp}/out"], "nowhere"),
        (["ingest", "{tmp}", "--out", "{tmp}/out", "--set", "ingest.sed=1"], "did you mean ingest.seed?"),
        (["ingest", "{tmp}", "--out", "{tmp}/out", "--set", "ingest.seed"], "write section.key=value"),
        (["ingest", "{tmp}", "--out", "{tmp}/out", "--config", "{tmp}/no.toml"], "no.toml does not exist"),
        (["ingest", "{tmp}", "--out", "ftp://user:secret@host/x"], "ftp://... is no store: give a local path or s3://"),
        (["train", "--shards", "{tmp}", "--out", "{tmp}/out"], "holds no committed shards"),
        (["train", "--shards", "{tmp}", "--out", "{tmp}/out", "--bits", "0"], "multiple of 8"),
        (["train", "--shards", "{tmp}", "--out", "{tmp}/out", "--bits", "12"], "multiple of 8"),
        (
            ["train", "--shards", "{tmp}", "--out", "{tmp}/out", "--recipe", "best"],
            "take one of auto, plain, scratch32",
        ),
        (["verify", "{tmp}"], "holds no committed artifact"),
        (["search", "--index", "{tmp}"], "nothing to search for"),
        (["dedupe", "--codes", "{tmp}", "--out", "{tmp}/out"], "holds no committed codes"),
        (["dedupe", "--codes", "{tmp}", "--out", "{tmp}/out", "--radius", "5000"], "dedupe.radius = 5000"),
        (["dedupe", "--codes", "{tmp}", "--out", "{tmp}/out", "--memory", "1MiB"], "dedupe.memory = '1MiB'"),
        (["index", "add", "--index", "{tmp}", "--codes", "{tmp}"], "holds no committed index"),
        (["index", "remove", "--index", "{tmp}"], "nothing to remove"),
        (["index", "remove", "--index", "{tmp}", "--keys", "{tmp}/no.txt"], "no.txt cannot be read"),
        (["index", "rollback", "--index", "{tmp}"], "holds no committed index"),
        (["plan", "--index", "{tmp}"], "nothing to compare"),
        (["plan", "--cost"], "--cost needs a number of images: give --images N"),
        (["plan", "--cost", "--images", "1e6", "--shards", "{tmp}"], "--cost compares nothing: leave out --shards"),
        (["plan", "--shards", "{tmp}", "--nodes", "2"], "goes with --cost: add that, or leave it out"),
        (["plan", "--cost", "--images", "1e6", "--from", "{tmp}"], "holds no committed artifact"),
        (["ingest", "{tmp}", "--out", "o", "--class-from", "last"], "'last' is not known: give first or parent"),
        (["ingest", "{tmp}", "--out", "o", "--class-from", "first", "--unlabelled"], "give one of them"),
        (["ingest", "{tmp}", "--out", "o", "--adopt", "--class-from", "parent"], "--adopt does not change tars"),
        (["status", "{tmp}"], "holds nothing that a verb has begun: name the --out of a verb"),
    ],
)
def test_bad_usage_is_one_line_and_exit_2(words: list[str], message: str, tmp_path: Path) -> None:
    assert message in refused(hhnet(*(word.format(tmp=tmp_path) for word in words)))


def test_a_cost_is_a_table_and_json() -> None:
    asked = ("plan", "--cost", "--images", "1e6", "--night", "0", "--nodes", "2", "--gpus-per-node", "4")
    shown = hhnet(*asked, "--set", "cost.put_1000=1000")
    assert shown.returncode == 0, shown.stderr
    rows = {line.split("  ")[1].strip(): line.split() for line in shown.stdout.splitlines() if line.startswith("  ")}
    assert rows["figure"][1:] == ["ingest", "encode", "index", "total", "night"]
    told = json.loads(hhnet(*asked, "--json").stdout.splitlines()[-1])
    ingest = told["steps"][0]
    assert (told["verb"], told["status"], told["tars"], ingest["step"]) == ("plan", "estimated", 1000, "ingest")
    # A thousand PUT at 1,000 dollars instead of half a cent.
    dollars = float(rows["USD"][1].replace(",", ""))
    assert dollars == pytest.approx(ingest["usd"] + (ingest["put"] + ingest["list"]) * 0.999995, abs=0.01)


def test_usage_errors_of_the_parser_exit_2_too() -> None:
    done = hhnet("train", "--out", "x")
    assert done.returncode == 2
    assert "--shards" in done.stderr


@pytest.mark.parametrize("given", ["inf", "nan", "1e400"])
def test_a_size_that_is_no_number_is_a_usage_error(given: str) -> None:
    done = hhnet("plan", "--cost", "--images", "1e6", "--image-bytes", given)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Invalid value for '--image-bytes'" in done.stderr and "Traceback" not in done.stderr


def test_the_words_of_help_fill_its_lines() -> None:
    text = hhnet("index", "build", "--help").stdout
    (paragraph,) = (part for part in re.split(r"\n\s*\n", text) if "a planner tries" in part)
    lines = [line.strip() for line in paragraph.splitlines()]
    assert len(lines) > 3
    for line, following in itertools.pairwise(lines):
        assert len(line) + 1 + len(following.split()[0]) > 78, f"{following!r} begins on the line {line!r}"


def test_a_store_that_cannot_be_written_exits_3(tmp_path: Path) -> None:
    write_folder(tmp_path / "photos", classes=2, per_class=3)
    (tmp_path / "file").write_text("in the way")
    line = refused(hhnet("ingest", tmp_path / "photos", "--out", tmp_path / "file" / "out"), code=3)
    assert str(tmp_path / "file") in line


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (WorkFailed("no"), 1),
        (UsageError("no"), 2),
        (StoreUnavailable("no"), 3),
        (Degraded("no"), 4),
        (KeyboardInterrupt(), 130),
    ],
)
def test_every_error_has_its_exit_code(error: BaseException, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    app = typer.Typer()

    @verb(app, "work")
    def work() -> Result:
        """Fail."""
        raise error

    with pytest.raises(SystemExit) as end:
        app([])
    assert end.value.code == code
    assert "Traceback" not in capsys.readouterr().err


def test_debug_shows_the_traceback() -> None:
    app = typer.Typer(pretty_exceptions_enable=False)

    @verb(app, "work")
    def work() -> Result:
        """Fail."""
        raise WorkFailed("no")

    with pytest.raises(HHNetError):
        app(["--debug"])


def test_a_degraded_result_is_printed_and_exits_4(capsys: pytest.CaptureFixture[str]) -> None:
    app = typer.Typer()

    @verb(app, "work")
    def work() -> Result:
        """Half."""
        return Result(verb="work", status="degraded", uri="u", digest="d")

    with pytest.raises(SystemExit) as end:
        app(["--json"])
    assert end.value.code == 4
    assert json.loads(capsys.readouterr().out)["status"] == "degraded"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_whose_exception_python_drops_still_ends_the_verb(number: signal.Signals, code: int) -> None:
    """It is dropped where a hook runs: at a fork, in a destructor."""
    app = typer.Typer()

    class Destroyed:
        def __del__(self) -> None:
            signal.raise_signal(number)

    @verb(app, "work")
    def work() -> Result:
        """Wait."""
        Destroyed()
        time.sleep(30)
        return Result(verb="work", status="done", uri="u", digest="d")

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's job in the background ignores it
    try:
        with pytest.raises(SystemExit) as end:
            app([])
    finally:
        signal.signal(signal.SIGINT, before)
    assert end.value.code == code


def found(results: list[dict[str, object]], html: str | None = None) -> SearchResult:
    return SearchResult(status="done", uri="u", digest=None, version=None, results=results, html=html)


def test_neighbours_are_shown_as_a_table() -> None:
    near = {"id": 7, "key": "cat/1", "path": "cat/1.png", "shard": "s", "row": 7, "distance": 3, "labels": ["cat"]}
    far = near | {"key": "dog/2", "distance": 14, "labels": ["dog", "an uncommonly long name"]}
    text = found([{"query": "q.jpg", "neighbours": [near, far]}]).as_text()
    assert text.splitlines() == [
        "query q.jpg",
        "  rank  distance  labels                        key",
        "     1         3  cat                           cat/1",
        "     2        14  dog, an uncommonly long name  dog/2",
    ]


@pytest.mark.parametrize(("terminal", "tables"), [(True, 10), (False, 12)])
def test_a_terminal_shows_the_first_queries_and_how_many_there_are_more(
    monkeypatch: pytest.MonkeyPatch, terminal: bool, tables: int
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    near = {"key": "cat/1", "distance": 3, "labels": ["cat"]}
    lines = found([{"query": f"{n}.jpg", "neighbours": [near]} for n in range(12)]).as_text().splitlines()
    assert sum(line.startswith("query ") for line in lines) == tables
    assert ("and 2 more: --json has all" in lines) == terminal


def test_a_search_without_neighbours_or_with_a_page_says_so() -> None:
    assert found([]).as_text().splitlines() == ["search: done", "  uri  u"]
    page = found([{"query": "q.jpg", "neighbours": []}], html="found.html").as_text()
    assert page.splitlines()[-1] == "page  found.html"


def test_versions_are_shown_as_a_table() -> None:
    rows = [
        {"version": 12, "digest": "0123456789ab" + 52 * "0", "removed": 3},
        {"version": None, "digest": "f", "removed": 0},
    ]
    text = InfoResult(status="done", uri="u", digest=None, version=12, kind="", card={}, versions=rows).as_text()
    assert [line.split() for line in text.splitlines()] == [
        ["index", "info:", "done"],
        ["uri", "u"],
        ["version", "12"],
        [],
        ["version", "digest", "removed"],
        ["12", "0123456789ab", "3"],
        ["-", "f", "0"],
    ]


@dataclass(frozen=True, kw_only=True)
class Facts(Result):
    """A result with a fact of each type."""

    dry_run: bool
    codes: int
    map: float
    card: dict[str, float]
    collected: list[int] = field(default_factory=lambda: [1, 2])
    orphans: list[str] = field(default_factory=list)
    checks: list[str]
    later: int | None = None
    absent: int | None = field(default_factory=lambda: None)


def test_json_has_what_is_none_but_not_what_is_unset() -> None:
    record = Facts(
        verb="v", status="done", uri="u", digest=None, dry_run=True, codes=1, map=0.5, card={}, checks=[]
    ).as_json()
    assert list(record)[:4] == ["verb", "status", "uri", "digest"] and record["digest"] is None
    assert "absent" in record and "later" not in record


def test_facts_are_shown_for_people() -> None:
    checks = [f"part {number} matches its sha256" for number in range(60)]
    facts = {"dry_run": False, "codes": 1988, "map": 0.335212, "card": {"recall": 0.99997, "count": 1988}}
    result = Facts(verb="v", status="done", uri="u", digest=None, **facts, checks=checks)
    text = result.as_text()
    head, shown = text.splitlines()[:7], text.splitlines()[7:]
    assert head == [
        "v: done",
        "  uri        u",
        "  dry run    no",
        "  codes      1,988",
        "  mAP        0.3352",
        "  card       recall 0.99997, count 1,988",
        "  collected  1, 2",
    ]
    indent = " " * len("  collected  ")
    assert shown[0] == f"  checks     {checks[0]}"
    assert shown[1:] == [
        *(indent + check for check in checks[1:50]),
        indent + "and 10 more: --json has all",
    ]


def test_what_is_submitted_are_the_settings_that_are_no_defaults() -> None:
    sets = ["index.gate.min_recall=0.7", "index.nprobe=3", "train.loss_options.margin=0.3", "run.database=['a']"]
    changed = changed_settings(load_config(sets=[*sets, "ray.address=http://x"]))
    assert sorted(changed) == sorted(
        [
            *("index.gate.min_recall=0.7", "index.nprobe=3", 'train.loss_options={"margin" = 0.3}'),
            *('run.database=["a"]', "ray.address=auto"),
        ]
    )
    assert load_config(sets=changed).index == load_config(sets=sets).index


def test_labels_with_dots_in_their_names_are_submitted_whole() -> None:
    config = load_config(sets=['encode.labels={"ray.io/market-type" = "!spot", zone = "in(a, b)"}'])
    assert load_config(sets=changed_settings(config)).encode.labels == config.encode.labels
