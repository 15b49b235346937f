"""What every verb of the command line shares: outputs that fail, long errors, and how a job is told what to do."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.core import TyperGroup

from pipelines.artifacts.result import Result
from pipelines.cli.main import build_app
from pipelines.cli.verb import verb
from pipelines.cluster.ray_private import JOB_CONFIG_VARIABLE
from pipelines.cluster.records import RECORDS_METADATA, read_record, record_mark
from pipelines.config.loading import changed_settings, load_config
from pipelines.encode.encode import EncodeResult, encode
from pipelines.encode.preflight import preflight
from pipelines.encode.retry_rejects import retry_rejects
from pipelines.errors import InputError, StoreRefused, UsageError, WorkFailed
from pipelines.index.build import PlannedResult, build_index
from pipelines.index.publish import publish_index
from pipelines.index.update import add_codes, compact_index
from pipelines.ingest.ingest import ingest
from pipelines.train.rehead import rotate
from pipelines.train.train import train
from pipelines.verify.verify import verify, verify_tars
from tests.support.codes import simple_rows, write_codes
from tests.support.pictures import jpeg, picture, write_folder

HHNET = [sys.executable, "-m", "pipelines"]


@pytest.fixture(scope="module")
def codes(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_codes(tmp_path_factory.mktemp("codes") / "codes", {"a.tar": simple_rows("a", 3, seed=0)}).uri


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("shards")
    write_folder(folder / "photos", classes=2, per_class=3)
    return str(ingest(str(folder / "photos"), str(folder / "shards"), load_config()).uri)


@pytest.mark.parametrize(
    ("redirect", "reason"), [("> /dev/full", "No space left on device"), (">&-", "Bad file descriptor")]
)
def test_a_result_that_cannot_be_written_is_one_line(redirect: str, reason: str, codes: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = f"{sys.executable} -m pipelines dedupe --codes {codes} --out {out} {redirect}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line.startswith("hhnet:")]
    assert lines == [f"hhnet: the result cannot be written to stdout: {reason}; what was published stays"]
    assert "Traceback" not in done.stderr and (out / "manifest.json").exists()


def test_a_result_that_cannot_be_written_promises_nothing_where_nothing_was_published(shards: str) -> None:
    command = f"{sys.executable} -m pipelines verify {shards} > /dev/full"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last == "hhnet: the result cannot be written to stdout: No space left on device"


_INTERRUPTED = """
import sys
import typer
from pipelines.artifacts.commit import ArtifactWriter
from pipelines.cli.verb import verb
from pipelines.storage import Store

app = typer.Typer()

@verb(app, "work")
def work():
    if len(sys.argv) > 1:
        ArtifactWriter(Store(sys.argv[1]), "codes", "0" * 64, (), {})
    raise KeyboardInterrupt

sys.exit(app([]))
"""


@pytest.mark.parametrize(
    ("begins", "line"),
    [
        (False, "hhnet: interrupted"),
        (True, "hhnet: interrupted; what was committed stays, the same command goes on from there"),
    ],
)
def test_an_interrupt_says_what_stays_where_something_was_begun(begins: bool, line: str, tmp_path: Path) -> None:
    words = [str(tmp_path / "out")] if begins else []
    done = subprocess.run([sys.executable, "-c", _INTERRUPTED, *words], capture_output=True, text=True)
    assert (done.returncode, done.stderr.splitlines()) == (130, [line])


@pytest.mark.parametrize("words", ["--help", "search --help", "--version"])
def test_help_that_cannot_be_written_is_one_line(words: str) -> None:
    command = f"{sys.executable} -m pipelines {words} > /dev/full"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "hhnet: the help cannot be written to stdout: No space left on device\n"


@pytest.mark.parametrize("redirect", ["2> /dev/full", "2>&-"])
def test_progress_that_nobody_reads_is_no_error(redirect: str, shards: str) -> None:
    command = f"{sys.executable} -m pipelines verify {shards} --json {redirect}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == 0
    assert json.loads(done.stdout)["status"] == "done"


def test_a_long_error_is_cut_and_whole_with_debug(tmp_path: Path) -> None:
    name = "/".join(["x" * 200] * 3)
    command = [*HHNET, "verify", str(tmp_path / name)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert len(done.stderr) < 350 and done.stderr.endswith("... (all of it with --debug)\n")
    assert name in subprocess.run([*command, "--debug"], capture_output=True, text=True).stderr


def test_a_job_writes_its_outcome_as_a_record(shards: str, tmp_path: Path) -> None:
    submission = "hhnet-0123-1"
    config = {"metadata": {"job_submission_id": submission, RECORDS_METADATA: "1"}}
    env = os.environ | {JOB_CONFIG_VARIABLE: json.dumps(config)}
    for uri, code in ((shards, 0), (str(tmp_path / "nothing"), 2)):
        done = subprocess.run([*HHNET, "verify", uri, "--full"], env=env, capture_output=True, text=True)
        assert done.returncode == code
        records = [read_record(line, submission)[1] for line in done.stdout.splitlines()]
        outcome = records[-1]
        assert outcome is not None
        if code == 0:
            assert outcome["result"]["uri"] == shards
            stages = [record for record in records[:-1] if record is not None]
            assert {record["stage"] for record in stages} == {"verify: shards"}
            assert stages[-1]["done"] == stages[-1]["total"]
        else:
            assert outcome == {"error": done.stderr.removeprefix("hhnet: ").rstrip("\n"), "code": 2}


def test_a_job_whose_store_refuses_for_good_says_so_in_its_record(capsys: pytest.CaptureFixture[str]) -> None:
    app = typer.Typer()

    @verb(app, "work")
    def work() -> Result:
        """Fail."""
        raise StoreRefused("cannot write s3://b/x: 403")

    config = {"metadata": {"job_submission_id": "it", RECORDS_METADATA: "1"}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(JOB_CONFIG_VARIABLE, json.dumps(config))
        with pytest.raises(SystemExit) as end:
            app([])
    record = read_record(capsys.readouterr().out.rstrip("\n"), "it")[1]
    assert (end.value.code, record) == (3, {"error": "cannot write s3://b/x: 403", "code": 3, "refused": True})


@pytest.mark.parametrize(
    ("line", "text", "record"),
    [
        ('{"verb": "encode"}', '{"verb": "encode"}', None),
        (record_mark("other") + '{"result": {}}', record_mark("other") + '{"result": {}}', None),
        (record_mark("it") + "torn {", record_mark("it") + "torn {", None),
        (record_mark("it") + "[1]", record_mark("it") + "[1]", None),
        (record_mark("it") + '{"code": 1}', "", {"code": 1}),
        ("no end of line" + record_mark("it") + '{"code": 1}', "no end of line", {"code": 1}),
    ],
)
def test_only_a_line_with_the_mark_of_the_job_is_a_record(line: str, text: str, record: object) -> None:
    assert read_record(line, "it") == (text, record)


@pytest.mark.parametrize(
    ("codes", "out", "sets", "named"),
    [
        (["/a"], "index", [], "--out index"),
        (["/a", "b"], "/index", [], "--codes b"),
        (["/a"], "/index", ["model.weights=w.safetensors"], "model.weights w.safetensors"),
        (["/a"], "/index", ["train.teacher_weights=./w"], "train.teacher_weights ./w"),
    ],
)
def test_a_relative_path_that_the_cluster_does_not_see_is_refused(
    codes: list[str], out: str, sets: list[str], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "x" * 32)
    config = load_config(sets=[*sets, "ray.address=http://192.0.2.1:8265"])
    with pytest.raises(UsageError, match=rf"^{named} is relative to this folder"):
        build_index(codes, out, config)


HERE = load_config(sets=["ray.address=http://127.0.0.1:1", "train.rotate=itq"])
SENT: list[tuple[Callable[[], Result], list[str]]] = [
    (lambda: train("/s", "/o", HERE, val="/v"), ["train", "--shards", "/s", "--out", "/o", "--val", "/v"]),
    (lambda: rotate("/m", "/o", HERE), ["train", "--rotate", "itq", "--model", "/m", "--out", "/o"]),
    (
        lambda: encode("/s", "/m", "/o", HERE, allow_degraded=True),
        ["encode", "--shards", "/s", "--model", "/m", "--out", "/o", "--allow-degraded"],
    ),
    (
        lambda: preflight("/s", "/m", "/o", HERE, price=2.5),
        ["encode", "--dry-run", "--shards", "/s", "--model", "/m", "--out", "/o", "--price", "2.5"],
    ),
    (lambda: retry_rejects("/c", HERE, model="/m"), ["retry-rejects", "--codes", "/c", "--model", "/m"]),
    (lambda: verify_tars("/a b", "/o", HERE), ["verify", "/a b", "--for-run", "/o"]),
    (lambda: verify("s3://photos/a", HERE, full=True), ["verify", "s3://photos/a", "--full"]),
    (
        lambda: build_index(["/c", "/d"], "/o", HERE, publish=False, dry_run=False),
        ["index", "build", "--codes", "/c", "--codes", "/d", "--out", "/o", "--no-publish"],
    ),
    (
        lambda: add_codes("/i", ["/c"], HERE, publish=True, prune=True, replace_changed=True),
        ["index", "add", "--index", "/i", "--codes", "/c", "--prune", "--replace"],
    ),
    (lambda: compact_index("/i", HERE, publish=False), ["index", "compact", "--index", "/i", "--no-publish"]),
    (lambda: publish_index("/i", HERE, digest="ab"), ["index", "publish", "--index", "/i", "--digest", "ab"]),
]


class Sent(Exception):
    """What would have been sent to the cluster."""


@pytest.mark.parametrize(("call", "words"), SENT, ids=lambda one: " ".join(one[:2]) if isinstance(one, list) else "")
def test_a_verb_is_sent_as_words_that_its_own_command_line_takes(
    call: Callable[[], Result], words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def sent(address: str, arguments: list[str], **options: object) -> None:
        raise Sent(arguments)

    monkeypatch.setattr("pipelines.cluster.jobs.submit_verb", sent)
    with pytest.raises(Sent) as told:
        call()
    (arguments,) = told.value.args
    cut = arguments.index("--set")
    assert arguments[:cut] == words and "ray.address=auto" in arguments[cut:]
    command: Any = typer.main.get_command(build_app())
    while isinstance(command, TyperGroup):
        name, *arguments = arguments
        command = command.commands[name]
    assert command.make_context("hhnet", list(arguments)).params["sets"]


def test_what_lies_here_is_verified_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")
    with pytest.raises(InputError, match="holds no committed artifact"):
        verify(str(tmp_path))


def test_the_answer_of_a_job_is_typed_and_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = {"verb": "encode", "status": "done", "uri": "/o", "digest": "d", "samples": 3, "codes": 2, "rejects": 1}
    monkeypatch.setattr("pipelines.cluster.jobs.submit_verb", lambda *_, **__: answer)
    result = encode("/s", "/m", "/o", HERE)
    assert isinstance(result, EncodeResult) and result.as_json() == answer
    planned = {"verb": "index build", "status": "planned", "uri": "/o", "digest": None, "kind": "flat"}
    planned |= {"begun_as": None, "why": "smallest", "kinds": [], "sample": {}}
    monkeypatch.setattr("pipelines.cluster.jobs.submit_verb", lambda *_, **__: planned)
    result = build_index(["/c"], "/o", HERE, dry_run=True)
    assert isinstance(result, PlannedResult) and result.as_json() == planned
    monkeypatch.setattr("pipelines.cluster.jobs.submit_verb", lambda *_, **__: {"verb": "encode", "status": "done"})
    with pytest.raises(WorkFailed, match="install the same version on both sides"):
        encode("/s", "/m", "/o", HERE)


def test_labels_of_the_driver_are_not_for_the_job() -> None:
    config = load_config(sets=['ray.driver_labels={"ray.io/market-type"="on-demand"}', "ray.address=http://h:1"])
    assert config.ray.driver_labels == {"ray.io/market-type": "on-demand"}
    assert changed_settings(config) == ["ray.address=auto"]


ODD = ("emoji\N{GRINNING FACE}", "caf\N{LATIN SMALL LETTER E WITH ACUTE}", os.fsdecode(b"lat\xe9"))


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_what_a_console_cannot_encode_is_shown_escaped(encoding: str, tmp_path: Path) -> None:
    source = tmp_path / os.fsdecode(b"photos\xff")
    for number, name in enumerate(ODD):
        (source / name).mkdir(parents=True)
        (source / name / f"{name}.jpg").write_bytes(jpeg(picture(0, number, 8)))
        (source / name / f"{name}.txt").write_text("x")
    command, env = [*HHNET, "ingest", str(source)], os.environ | {"PYTHONIOENCODING": encoding}
    done = subprocess.run([*command, "--out", str(tmp_path / "out")], env=env, capture_output=True)
    assert (done.returncode, b"Traceback" in done.stderr) == (0, False)
    text = done.stdout.decode(encoding)
    for name in ODD[:2]:
        assert name.encode(encoding, "backslashreplace").decode(encoding) in text
    assert r"lat\xe9" in text
    done = subprocess.run([*command, "--out", str(tmp_path / "out"), "--json"], env=env, capture_output=True)
    result = json.loads(done.stdout.decode(encoding))
    assert (result["status"], result["classes"]) == ("unchanged", sorted([*ODD[:2], r"lat\xe9"]))


def test_names_do_nothing_to_the_console(tmp_path: Path) -> None:
    for number, name in enumerate(("esc\x1b[31m", "turn\u202e", "two\nlines")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        (tmp_path / "photos" / name / "1.jpg").write_bytes(jpeg(picture(0, number, 8)))
    command = [*HHNET, "ingest", str(tmp_path / "photos"), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert r"esc\x1b[31m, turn\u202e, two\nlines" in done.stdout
    assert "\x1b" not in done.stdout and "\u202e" not in done.stdout
    done = subprocess.run(
        [*HHNET, "ingest", "no\x1b[31m", "--out", str(tmp_path / "no")], capture_output=True, text=True
    )
    assert done.returncode == 2 and r"no\x1b[31m does not exist" in done.stderr


def test_the_first_skipped_files_are_named_and_the_rest_counted(tmp_path: Path) -> None:
    write_folder(tmp_path / "photos", classes=1, per_class=3)
    for number in range(1500):
        (tmp_path / "photos" / "class_00" / f"{number:04d}.txt").write_text("a caption")
    done = subprocess.run(
        [*HHNET, "ingest", str(tmp_path / "photos"), "--out", str(tmp_path / "out")], capture_output=True, text=True
    )
    assert done.returncode == 0
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert "skipped files suffixes" in lines and "wrong_suffix 1,500 .txt 1,500" in lines
    assert "skipped files class_00/0000.txt wrong_suffix" in lines and "class_00/0009.txt wrong_suffix" in lines
    assert "and 1,490 more: --json has the first 1,000" in lines and "class_00/0010.txt wrong_suffix" not in lines
