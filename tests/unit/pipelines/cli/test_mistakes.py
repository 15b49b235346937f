"""Mistakes of places and inputs: each is one line that says what is wrong and what to do, with its exit code."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.artifacts.runs import RunLog
from pipelines.cli.main import build_app
from pipelines.config.loading import load_config
from pipelines.encode.encode import encode
from pipelines.errors import Degraded
from pipelines.index.build import build_index
from pipelines.ingest.ingest import ingest
from pipelines.storage import Store
from tests.support.inline import InlinePool
from tests.support.models import write_model
from tests.support.pictures import jpeg, picture, write_folder

SETTINGS = ("ingest.samples_per_shard=10", "data.image_size=32", "encode.batch_size=8")
CONFIG = load_config(sets=SETTINGS)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of photos and their shards, model, codes and index; one photo is none."""
    folder = tmp_path_factory.mktemp("made")
    write_folder(folder / "photos", classes=3, per_class=12)
    (folder / "photos" / "class_00" / "0000.jpg").write_bytes(b"no picture at all")
    (folder / "photos" / "class_00" / "notes.txt").write_text("a note")
    ingest(str(folder / "photos"), str(folder / "shards"), CONFIG, split="train=.6,query=.4")
    for part in ("train", "query"):
        write_model(folder / f"model-{part}", str(folder / "shards" / part))
        words = str(folder / "shards" / part), str(folder / "model-train"), str(folder / "codes" / part)
        encode(*words, CONFIG, allow_degraded=True, pool=InlinePool())
    build_index([str(folder / "codes" / "train")], str(folder / "index"), CONFIG, pool=InlinePool())
    return folder


def hhnet(*words: object, **variables: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | variables
    return subprocess.run(
        [sys.executable, "-m", "pipelines", *map(str, words)], capture_output=True, text=True, env=env
    )


def refused(done: subprocess.CompletedProcess[str]) -> str:
    """The one line of an error, after progress."""
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert "Traceback" not in done.stderr
    *_, line = done.stderr.splitlines()
    return line.removeprefix("hhnet: ")


SETS = [word for setting in SETTINGS for word in ("--set", setting)]
ENCODE = ["encode", "--shards", "{root}/shards/train", "--model", "{root}/model-train"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            [*ENCODE, "--out", "{root}/codes/train", *SETS, "--set", "encode.batch_size=4"],
            "{root}/codes/train holds another run's codes (encode.batch_size = 8 there, 4 here): choose another "
            "--out, or what it was begun with",
        ),
        (
            [*ENCODE, "--out", "{root}/codes/query", *SETS],
            "{root}/codes/query holds another run's codes (shards = {root}/shards/query there, {root}/shards/train "
            "here): choose another --out, or what it was begun with",
        ),
        (
            [*ENCODE, "--out", "{root}/index", *SETS],
            "{root}/index holds index, and this run would make codes: choose another --out",
        ),
        (
            ["index", "build", "--codes", "{root}/codes/train", "--out", "{root}/index", "--set", "index.gate.k=3"],
            "{root}/index holds another run's index (index.gate.k = 10 there, 3 here): choose another --out, or what "
            "it was begun with",
        ),
        (
            ["ingest", "{root}/photos", "--out", "{root}/shards", "--split", "train=.5,query=.5", *SETS],
            "{root}/shards/train holds another run's shards (split = train=.6,query=.4 there, train=.5,query=.5 "
            "here): choose another --out, or what it was begun with",
        ),
        (
            ["train", "--shards", "{root}/shards/train", "--out", "{root}/model-query", *SETS],
            "{root}/model-query holds another run's model (shards = {root}/shards/query there, {root}/shards/train "
            "here): choose another --out, or what it was begun with",
        ),
        (
            ["verify", "{root}/codes/quary"],
            "{root}/codes/quary holds no committed artifact (no manifest.json): nothing is there: did you mean "
            "{root}/codes/query?",
        ),
        (
            ["verify", "{root}/coeds/query"],
            "{root}/coeds/query holds no committed artifact (no manifest.json): nothing is there: did you mean "
            "{root}/codes/query?",
        ),
        (
            ["train", "--shards", "{root}/photos", "--out", "{root}/new"],
            "{root}/photos holds no committed shards (no manifest.json): these are pictures: `hhnet ingest "
            "{root}/photos --out SHARDS` makes shards of them",
        ),
        (
            ["train", "--shards", "{root}/shards", "--out", "{root}/new"],
            "{root}/shards holds no committed shards (no manifest.json): below it are query, train: name one of "
            "them, as in {root}/shards/train",
        ),
        (
            ["search", "--index", "{root}/codes/train", "--key", "class_00/0001"],
            "{root}/codes/train is a codes artifact, not index: `hhnet index build --codes {root}/codes/train --out "
            "INDEX` makes one",
        ),
        (
            ["encode", "--shards", "{root}/model-train", "--model", "{root}/model-train", "--out", "{root}/new"],
            "{root}/model-train is a model artifact, not shards: give it with --model",
        ),
        (
            ["evaluate", "--queries", "{root}/shards/query", "--database", "{root}/codes/train", "--out", "{root}/new"],
            "{root}/shards/query is a shards artifact, not codes: `hhnet encode --shards {root}/shards/query --model "
            "MODEL --out CODES` makes them",
        ),
        (
            ["ingest", "{root}/photos", "--out", "{root}/photos/shards"],
            "--out {root}/photos/shards is inside the source {root}/photos: choose a folder outside it",
        ),
        (
            ["verify", "{root}/photos/class_00/notes.txt"],
            "{root}/photos/class_00/notes.txt holds no committed artifact (no manifest.json): it is a file: name the "
            "folder of the artifact",
        ),
        (
            ["status", "{root}/photos/class_00/notes.txt"],
            "{root}/photos/class_00/notes.txt holds nothing that a verb has begun: name the --out of a verb, of `hhnet "
            "study`, or run.out of `hhnet run`",
        ),
        (["rejects", "{root}/index"], "{root}/index is index, which has no rejects: name codes or shards"),
    ],
)
def test_a_mistake_is_one_line_that_says_what_to_do(
    words: list[str], said: str, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        build_app()([word.format(root=root) for word in words])
    *_, line = capsys.readouterr().err.splitlines()
    whole = f"hhnet: {said.format(root=root)}"
    shown = line.removesuffix(" ... (all of it with --debug)")
    assert (end.value.code, shown) == (2, whole if shown == line else whole[: len(shown)])
    assert not (root / "new").exists() and not (root / "photos" / "shards").exists()


def test_a_root_that_was_only_begun_says_so(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "codes" / "train", tmp_path / "codes")
    (tmp_path / "codes" / "manifest.json").unlink()
    assert refused(hhnet("verify", tmp_path / "codes")).endswith(
        "it was begun and not finished: run the verb that makes it again"
    )


def test_a_root_that_is_being_made_says_where_to_look(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "codes" / "train", tmp_path / "codes")
    (tmp_path / "codes" / "manifest.json").unlink()
    with RunLog(Store(str(tmp_path / "codes")), "encode", total=1):
        line = refused(hhnet("verify", tmp_path / "codes"))
    assert line.endswith(f"it is being made now: `hhnet status {tmp_path / 'codes'}` shows how far")


def test_changed_contents_of_the_same_places_are_told_by_digest(root: Path, tmp_path: Path) -> None:
    for name in ("shards", "model-train", "codes"):
        shutil.copytree(root / name, tmp_path / name)
    words = ("--model", tmp_path / "model-train", "--out", tmp_path / "new", *SETS)
    config = (str(tmp_path / "shards/train"), str(tmp_path / "model-train"), str(tmp_path / "new"), CONFIG)
    encode(*config, allow_degraded=True, pool=InlinePool())
    shutil.rmtree(tmp_path / "shards/train")
    shutil.copytree(root / "shards/query", tmp_path / "shards/train")
    line = refused(hhnet("encode", "--shards", tmp_path / "shards/train", *words))
    assert "(shards = " in line and "here (by digest))" in line


def test_a_kind_without_faiss_is_one_line(root: Path, tmp_path: Path) -> None:
    (tmp_path / "faiss").mkdir()
    (tmp_path / "faiss" / "__init__.py").write_text("raise ModuleNotFoundError('No module named faiss', name='faiss')")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", str(Path.cwd()))])
    words = ("index", "build", "--codes", root / "codes/train", "--out", tmp_path / "index", "--kind", "ivf")
    assert refused(hhnet(*words, PYTHONPATH=path)) == (
        "index kind ivf needs Faiss, which is not installed: pip install 'hhnet[cpu]', or take --kind flat or multihash"
    )


def test_a_folder_of_artifacts_is_verified_whole_and_its_damage_named(root: Path, tmp_path: Path) -> None:
    valid = hhnet("verify", root)
    assert valid.returncode == 0 and valid.stdout.startswith("verify: valid"), valid.stderr
    for name in ("codes/train", "codes/query", "shards/train", "shards/query", "model-train", "index"):
        assert f"\n  {name} " in valid.stdout
    shutil.copytree(root, tmp_path / "made")
    assert "\n  made/codes/train " in hhnet("verify", tmp_path).stdout  # deeper folders too
    (part, *_) = (tmp_path / "made" / "index" / "parts").iterdir()
    part.write_bytes(b"other bytes")
    (tmp_path / "made" / "codes" / "query" / "manifest.json").unlink()
    damaged = hhnet("verify", tmp_path / "made")
    assert damaged.returncode == 1 and f"index/parts/{part.name} does not match" in damaged.stderr
    assert "codes/query holds no committed artifact" in damaged.stderr
    *_, last = damaged.stderr.splitlines()
    assert "hhnet: 2 of " in last and "are not whole: codes/query, index; " in last


def test_rejects_of_a_folder_are_those_of_all_its_codes_and_shards(root: Path) -> None:
    found = json.loads(hhnet("rejects", root, "--json").stdout)
    assert found["kind"] == "folder" and found["reasons"].items() >= {"not_an_image": 1, "wrong_suffix": 2}.items()
    assert {row["artifact"].split("/")[0] for row in found["rows"]} == {"codes", "shards"}


def test_shards_that_were_only_begun_do_not_hide_the_rejects_beside_them(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "codes", tmp_path / "codes")
    shutil.copytree(root / "shards" / "train", tmp_path / "shards")
    (tmp_path / "shards" / "manifest.json").unlink()
    found = json.loads(hhnet("rejects", tmp_path, "--json").stdout)
    assert found["reasons"] == {"not_an_image": 1}


def test_rejects_that_keep_codes_from_being_published_are_listed(root: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    write_folder(photos, classes=2, per_class=4)
    (photos / "class_00" / "0000.jpg").write_bytes(b"no picture at all")
    ingest(str(photos), str(tmp_path / "shards"), CONFIG)
    where = str(tmp_path / "shards"), str(root / "model-train"), str(tmp_path / "codes")
    with pytest.raises(Degraded, match=r"`hhnet rejects .*codes` names them; .* or raise the budget with --set"):
        encode(*where, CONFIG, pool=InlinePool())
    text = hhnet("rejects", tmp_path / "codes").stdout
    assert text.startswith("rejects: unpublished") and "not_an_image" in text and "class_00/0000" in text


def test_rejects_of_codes_are_listed_with_their_reasons(root: Path) -> None:
    found = [json.loads(hhnet("rejects", root / "codes" / part, "--json").stdout) for part in ("train", "query")]
    (codes,) = (one for one in found if one["rejects"])
    assert {"kind": "codes", "rejects": 1, "reasons": {"not_an_image": 1}}.items() <= codes.items()
    (row,) = codes["rows"]
    assert row["key"] == "class_00/0000" and row["reason"] == "not_an_image"
    text = hhnet("rejects", codes["uri"]).stdout
    assert "not an image 1" in text and "class_00/0000" in text


def test_skips_of_shards_are_capped_on_a_terminal_and_whole_in_json(tmp_path: Path) -> None:
    (tmp_path / "photos" / "cat").mkdir(parents=True)
    for number in range(60):
        (tmp_path / "photos" / "cat" / f"{number:02d}.txt").write_text("a caption")
    (tmp_path / "photos" / "cat" / "1.jpg").write_bytes(jpeg(picture(0, 0, 8)))
    ingest(str(tmp_path / "photos"), str(tmp_path / "shards"), CONFIG)
    found = json.loads(hhnet("rejects", tmp_path / "shards", "--json").stdout)
    assert (found["found"], found["rejects"], found["reasons"]) == (61, 60, {"wrong_suffix": 60})
    assert len(found["rows"]) == 60 and found["rows"][0] == {"path": "cat/00.txt", "reason": "wrong_suffix"}
    text = hhnet("rejects", tmp_path / "shards").stdout
    assert "cat/49.txt" in text and "cat/50.txt" not in text and "... and 10 more, all of them with --json" in text
