"""Corpora that change every night: what `hhnet plan` finds, and an index that follows its codes in one version."""

import shlex
from pathlib import Path
from typing import Any

import pytest

from pipelines.artifacts.commit import list_versions
from pipelines.artifacts.versions import open_current
from pipelines.cli.main import build_app
from pipelines.config.settings import Config, IndexSettings
from pipelines.encode.codes import open_codes
from pipelines.errors import DamagedArtifact, FingerprintMismatch, InputError
from pipelines.index.build import build_index
from pipelines.index.diff import plan_changes
from pipelines.index.pool import require_settings
from pipelines.index.publish import publish_index
from pipelines.index.reader import open_index
from pipelines.index.update import add_codes, compact_index, remove_rows
from pipelines.search.search import search
from pipelines.storage import Store
from pipelines.verify.verify import verify
from tests.support.codes import Rows, codes_of_shards, random_codes, simple_rows, write_codes, write_shards
from tests.support.inline import InlinePool

FLAT = Config(index=IndexSettings(workers=1))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two artifacts of three tars each."""
    root = tmp_path_factory.mktemp("shards")
    return {name: write_shards(root, name, seed=seed) for seed, name in enumerate(("old", "new"))}


@pytest.fixture(scope="module")
def codes(shards: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("codes")
    return {name: codes_of_shards(root / name, uri).uri for name, uri in shards.items()}


def named(found: dict[str, Any], change: str) -> list[str]:
    return [entry["shard"] for entry in found["changes"] if entry["change"] == change]


def run(command: str) -> None:
    """A command of the plan, as a user would type it; without Ray it cannot ask how many workers there may be."""
    name, *words = shlex.split(command)
    assert name == "hhnet"
    build_app()([*words, *(["--workers", "1"] if words[:2] == ["index", "add"] else [])], standalone_mode=False)


# ----------------------------------------------------------------------------------------------------------- plan


def test_before_anything_is_done_all_is_to_come(shards: dict[str, str], tmp_path: Path) -> None:
    out, index = str(tmp_path / "codes"), str(tmp_path / "index")
    found = plan_changes([shards["old"]], [out], index).as_json()
    assert (found["verb"], found["status"], found["encode"], found["add"]) == ("plan", "pending", 3, 0)
    assert named(found, "encode") == [f"old-{n:06d}.tar" for n in range(3)]
    assert [entry["samples"] for entry in found["changes"]] == [10, 10, 4]
    assert found["commands"] == [
        f"hhnet encode --shards {shards['old']} --model MODEL --out {out}",
        f"hhnet index build --codes {out} --out {index}",
    ]
    assert not (tmp_path / "codes").exists()
    assert not (tmp_path / "index").exists()


def test_a_night_is_planned_and_its_commands_leave_nothing_to_do(
    shards: dict[str, str], codes: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = build_index([codes["old"]], str(tmp_path / "index"), FLAT, pool=InlinePool()).uri
    assert plan_changes([shards["old"]], [codes["old"]], index).status == "unchanged"
    found = plan_changes([shards["new"]], [codes["old"], codes["new"]], index).as_json()
    assert (found["encode"], found["add"], found["replace"], found["remove"]) == (0, 3, 0, 3)
    assert named(found, "remove") == [f"old-{n:06d}.tar" for n in range(3)]
    for command in found["commands"]:
        run(command)
    again = plan_changes([shards["new"]], [codes["old"], codes["new"]], index).as_json()
    assert (again["status"], again["changes"], again["commands"]) == ("unchanged", [], [])
    assert (again["tars"], again["encoded"], again["indexed"]) == (3, 6, 3)


def test_tars_whose_receipts_are_there_are_not_to_be_encoded_again(shards: dict[str, str], tmp_path: Path) -> None:
    """As a run leaves it that was killed before its manifest: two tars are done, of the third a part is gone."""
    out, index = codes_of_shards(tmp_path / "codes", shards["old"]).uri, str(tmp_path / "index")
    Path(out, "manifest.json").unlink()
    found = plan_changes([shards["old"]], [out], index).as_json()
    assert (found["status"], found["encode"], found["publish"], found["encoded"]) == ("pending", 0, 3, 0)
    next(Path(out, "parts").glob("old-000002-*")).unlink()
    found = plan_changes([shards["old"]], [out], index).as_json()
    assert (found["encode"], found["publish"]) == (1, 2)
    assert named(found, "publish") == ["old-000000.tar", "old-000001.tar"]
    assert found["commands"] == [
        f"hhnet encode --shards {shards['old']} --model MODEL --out {out}",
        f"hhnet index build --codes {out} --out {index}",
    ]


def test_without_codes_of_them_new_tars_are_to_be_encoded(
    shards: dict[str, str], codes: dict[str, str], tmp_path: Path
) -> None:
    index = build_index([codes["old"]], str(tmp_path / "index"), FLAT, pool=InlinePool()).uri
    found = plan_changes(list(shards.values()), [codes["old"]], index).as_json()
    assert named(found, "encode") == [f"new-{n:06d}.tar" for n in range(3)]
    assert found["commands"] == [
        f"hhnet encode --shards {shards['new']} --model MODEL --out CODES",
        f"hhnet index add --index {index} --codes CODES",
    ]


def test_codes_are_to_come_where_they_were_named_beside_their_shards(
    shards: dict[str, str], codes: dict[str, str], tmp_path: Path
) -> None:
    third, out, index = write_shards(tmp_path, "third", seed=5), str(tmp_path / "codes-new"), str(tmp_path / "index")
    beside = plan_changes([shards["old"], shards["new"]], [codes["old"], out], index).as_json()
    assert beside["commands"][0] == f"hhnet encode --shards {shards['new']} --model MODEL --out {out}"
    fewer = plan_changes([shards["old"], shards["new"], third], [codes["old"], out], index).as_json()
    assert fewer["commands"][:2] == [
        f"hhnet encode --shards {shards['new']} --model MODEL --out CODES",
        f"hhnet encode --shards {third} --model MODEL --out CODES-2",
    ]


def test_a_tar_with_the_name_of_one_that_is_gone_has_changed(
    shards: dict[str, str], codes: dict[str, str], tmp_path: Path
) -> None:
    before = write_codes(tmp_path / "before", {"new-000001.tar": simple_rows("n", 4)})
    found = plan_changes([shards["new"]], [str(before.uri)]).as_json()
    changed = [entry for entry in found["changes"] if "changed" in entry]
    assert [(entry["shard"], entry["changed"]) for entry in changed] == [
        ("new-000001.tar", open_codes(before.uri).shards[0].sha256)
    ]


def test_codes_that_were_published_anew_replace_those_in_the_index(tmp_path: Path) -> None:
    rows = simple_rows("a", 6)
    fewer = Rows(rows.keys[:4], rows.codes[:4], rows.labels[:4], sha256="5" * 64)
    more = Rows(rows.keys, rows.codes, rows.labels, sha256="5" * 64)
    other = {"b-000000.tar": simple_rows("b", 5, seed=3)}
    first = write_codes(tmp_path / "first", {"a-000000.tar": fewer, **other})
    second = write_codes(tmp_path / "second", {"a-000000.tar": more})
    index = build_index([first.uri], str(tmp_path / "index"), FLAT, pool=InlinePool()).uri
    found = plan_changes([], [second.uri], index).as_json()
    assert (named(found, "replace"), named(found, "remove")) == (["a-000000.tar"], ["b-000000.tar"])
    for command in found["commands"]:
        run(command)
    assert plan_changes([], [second.uri], index).status == "unchanged"
    with open_index(index) as reader:
        assert reader.count == 6


def test_rows_that_were_compacted_away_are_no_change(tmp_path: Path) -> None:
    codes = write_codes(tmp_path / "codes", {"a-000000.tar": simple_rows("a", 9)}).uri
    index = build_index([codes], str(tmp_path / "index"), FLAT, pool=InlinePool()).uri
    remove_rows(index, FLAT, ["a/00003"])
    assert plan_changes([], [codes], index).removed_samples == 1
    compact_index(index, FLAT, pool=InlinePool())
    found = plan_changes([], [codes], index).as_json()
    assert (found["status"], found["removed_samples"]) == ("unchanged", 0)


def test_what_cannot_be_compared_is_refused(shards: dict[str, str], codes: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing to compare"):
        plan_changes([], [])
    with pytest.raises(InputError, match=r"hold the same tar"):
        plan_changes([shards["old"], shards["old"]])
    with pytest.raises(InputError, match="no committed shards"):
        plan_changes([str(tmp_path / "nowhere")])
    index = build_index([codes["old"]], str(tmp_path / "index"), FLAT, pool=InlinePool()).uri
    foreign = write_codes(tmp_path / "foreign", {"x-000000.tar": simple_rows("x", 3)}, model="c" * 64)
    with pytest.raises(FingerprintMismatch, match=r"aaaaaaaaaaaa.*cccccccccccc"):
        plan_changes([], [foreign.uri], index)


def test_the_table_and_the_commands_are_shown(
    shards: dict[str, str], codes: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    run(f"hhnet plan --shards {shards['old']} --shards {shards['new']} --codes {codes['old']}")
    shown = capsys.readouterr().out
    assert "plan: pending" in shown
    assert sum("new-00000" in line for line in shown.splitlines()) == 3
    assert shown.rstrip().endswith(f"next:\n  hhnet encode --shards {shards['new']} --model MODEL --out CODES")


# --------------------------------------------------------------------------------------------------------- follow


def test_an_index_follows_its_codes_in_one_version(codes: dict[str, str], tmp_path: Path) -> None:
    index = build_index([codes["old"]], str(tmp_path / "index"), FLAT, pool=InlinePool()).uri
    classes = open_codes(codes["old"]).classes
    kept = write_codes(tmp_path / "kept", {"kept-000000.tar": simple_rows("kept", 12)}, classes=classes).uri
    add_codes(index, [kept], FLAT, pool=InlinePool())
    remove_rows(index, FLAT, ["kept/00002"])
    result = add_codes(index, [kept, codes["new"]], FLAT, prune=True, pool=InlinePool()).as_json()
    assert (result["version"], result["added"], result["shards_removed"], result["card"]["count"]) == (4, 24, 3, 35)
    assert list_versions(Store(index)) == [1, 2, 3, 4]
    with open_index(index) as reader:
        found, lacking = reader.find(["kept/00001", "kept/00002"])
        assert (len(found), lacking) == (1, ["kept/00002"])
        fresh = build_index([codes["new"], kept], str(tmp_path / "fresh"), FLAT, pool=InlinePool()).uri
        remove_rows(fresh, FLAT, ["kept/00002"])
        with open_index(fresh) as other:
            queries = random_codes(20, seed=5)
            assert (reader.search(queries, 35)[0] == other.search(queries, 35)[0]).all()
    again = add_codes(index, [kept, codes["new"]], FLAT, prune=True, pool=InlinePool()).as_json()
    assert (again["status"], again["version"]) == ("unchanged", 4)
    assert verify(index).status == "done"


def test_following_codes_without_one_row_is_refused(codes: dict[str, str], tmp_path: Path) -> None:
    index = build_index([codes["old"]], str(tmp_path / "index"), FLAT, pool=InlinePool()).uri
    classes = open_codes(codes["old"]).classes
    empty = write_codes(tmp_path / "empty", {"e-000000.tar": Rows([], random_codes(0), [])}, classes=classes).uri
    with pytest.raises(InputError, match="there are no codes to add"):
        add_codes(index, [empty], FLAT, prune=True, pool=InlinePool())


def test_what_is_prepared_is_published_once(codes: dict[str, str], tmp_path: Path) -> None:
    index = build_index([codes["old"]], str(tmp_path / "index"), FLAT, pool=InlinePool()).uri
    made = add_codes(index, [codes["new"]], FLAT, publish=False, prune=True, pool=InlinePool()).as_json()
    key = search(index, FLAT, hex_codes=["00" * 8], k=1).results[0]["neighbours"][0]["shard"]
    assert (made["version"], key[:3]) == (None, "old")
    assert publish_index(index, FLAT, digest=made["digest"]).version == 2
    assert publish_index(index, FLAT, digest=made["digest"]).status == "unchanged"


def test_an_index_that_lost_a_part_does_not_pass_for_unchanged(codes: dict[str, str], tmp_path: Path) -> None:
    index = build_index([codes["old"]], str(tmp_path / "index"), FLAT, pool=InlinePool()).uri
    next((tmp_path / "index/parts").glob("part-*")).unlink()
    with pytest.raises(DamagedArtifact, match=r"parts/part-.* is gone"):
        add_codes(index, [codes["old"]], FLAT, prune=True, pool=InlinePool())


def test_an_index_of_another_kind_or_other_lists_is_refused(codes: dict[str, str], tmp_path: Path) -> None:
    asked = Config(index=IndexSettings(kind="ivf", nlist=4, workers=1))
    index = build_index([codes["old"]], str(tmp_path / "index"), asked, pool=InlinePool()).uri
    add_codes(index, [codes["new"]], FLAT, pool=InlinePool())
    require_settings(open_current(index), asked)
    sized = Config(index=IndexSettings(kind="ivf", nlist=4, part_codes=99))
    for other in (FLAT, Config(index=IndexSettings(kind="ivf", nlist=5)), sized):
        with pytest.raises(FingerprintMismatch, match=r"is of kind ivf with .*'nlist': 4.* ask for"):
            require_settings(open_current(index), other)
    require_settings(open_current(index), Config(index=IndexSettings(kind="auto", nlist=4)))
    automatic = Config(index=IndexSettings(kind="ivf", workers=1))
    grown = build_index([codes["old"]], str(tmp_path / "automatic"), automatic, pool=InlinePool()).uri
    add_codes(grown, [codes["new"]], FLAT, pool=InlinePool())
    require_settings(open_current(grown), automatic)
