"""Codes of several class lists in one index: ids are united by name, and every answer has the right names."""

from pathlib import Path
from typing import Any

import pytest

from pipelines.artifacts.facts import IndexMeta
from pipelines.artifacts.manifest import Manifest, manifest_digest
from pipelines.artifacts.versions import open_current
from pipelines.encode.codes import open_codes
from pipelines.errors import DamagedArtifact, FingerprintMismatch, WorkFailed
from pipelines.index.build import build_index
from pipelines.index.keys import keys_bytes, keys_of_codes
from pipelines.index.layout import keys_name
from pipelines.index.publish import rollback_index
from pipelines.index.reader import open_index
from pipelines.index.update import add_codes, compact_index, remove_rows
from pipelines.search.search import search
from pipelines.storage import canonical_json
from pipelines.verify.verify import verify
from tests.support.codes import Rows, simple_rows, write_codes
from tests.support.indexes import FLAT
from tests.support.inline import InlinePool

FIRST = ("cat", "dog", "owl")
LISTS = {
    "subset": ("cat", "owl"),
    "superset": ("ant", "cat", "dog", "owl", "yak"),
    "continued": (*FIRST, "ant"),
    "disjoint": ("ant", "bee"),
    "unlabelled": (),
}


def labelled(name: str, classes: tuple[str, ...], count: int = 9) -> Rows:
    """Rows of these classes in turn; the first has all of them, and all have none where there are no classes."""
    rows = simple_rows(name, count, classes=max(len(classes), 1), seed=len(name))
    labels = [[n % len(classes)] if classes else [] for n in range(count)]
    return Rows(rows.keys, rows.codes, [[*range(len(classes))], *labels[1:]], rows.sha256)


def codes_of(root: Path, name: str, classes: tuple[str, ...], **options: Any) -> str:
    return write_codes(root / name, {f"{name}-000000.tar": labelled(name, classes)}, classes=classes, **options).uri


def names_in(classes: tuple[str, ...], name: str, count: int = 9) -> dict[str, list[str]]:
    rows = labelled(name, classes, count)
    return {key: [classes[label] for label in labels] for key, labels in zip(rows.keys, rows.labels, strict=True)}


def found_in(index: str, version: int | None = None) -> dict[str, list[str]]:
    """The class names of every key, as a search shows them."""
    result = search(index, FLAT, hex_codes=["00" * 8], k=1000, version=version).results[0]
    return {entry["key"]: list(entry["labels"]) for entry in result["neighbours"]}


def build(codes: list[str], out: Path) -> str:
    return build_index(codes, str(out), FLAT, pool=InlinePool()).uri


@pytest.mark.parametrize("other", LISTS.values(), ids=LISTS)
def test_an_index_of_several_class_lists_answers_with_the_names_of_each(tmp_path: Path, other: tuple[str, ...]) -> None:
    pair = [codes_of(tmp_path, "one", FIRST), codes_of(tmp_path, "other", other)]
    wanted = names_in(FIRST, "one") | names_in(other, "other")
    built = build(pair, tmp_path / "built")
    added = build(pair[:1], tmp_path / "added")
    add_codes(added, pair[1:], FLAT, pool=InlinePool())
    for index in (built, added):
        assert found_in(index) == wanted
        assert open_current(index).facts(IndexMeta).classes == (*FIRST, *sorted({*other} - {*FIRST}))
        assert verify(index).status == "done"
    assert found_in(added, 1) == names_in(FIRST, "one")
    backwards = build(pair[::-1], tmp_path / "backwards")
    assert found_in(backwards) == wanted
    assert open_current(backwards).facts(IndexMeta).classes == (*other, *(name for name in FIRST if name not in other))
    assert verify(backwards).status == "done"


def test_codes_of_one_class_list_keep_the_bytes_that_they_had(tmp_path: Path) -> None:
    pair = [codes_of(tmp_path, "one", FIRST), codes_of(tmp_path, "more", FIRST)]
    index = build(pair[:1], tmp_path / "index")
    add_codes(index, pair[1:], FLAT, pool=InlinePool())
    with open_index(index) as reader:
        for ordinal, uri in enumerate(pair):
            codes = open_codes(uri)
            plain = keys_of_codes(codes.read(codes.shards[0]), ordinal, 64, False)
            assert reader.artifact.read(reader.part(keys_name(ordinal))) == keys_bytes(plain)
    assert open_current(index).facts(IndexMeta).classes == FIRST


def test_what_was_built_stays_as_it_is_when_classes_come_behind_it(tmp_path: Path) -> None:
    index = build([codes_of(tmp_path, "one", FIRST)], tmp_path / "index")
    before = {path: path.read_bytes() for path in Path(index).rglob("*") if path.is_file()}
    first = open_current(index).manifest
    superset = codes_of(tmp_path, "more", LISTS["superset"])
    add_codes(index, [superset], FLAT, pool=InlinePool())
    assert all(path.read_bytes() == data for path, data in before.items())
    kept = {part.path for part in first.parts if "ordinals" not in part.path}
    assert kept < {part.path for part in open_current(index).manifest.parts}
    assert add_codes(index, [superset], FLAT, pool=InlinePool()).status == "unchanged"


def test_the_names_survive_removals_a_compaction_and_a_rollback(tmp_path: Path) -> None:
    index = build([codes_of(tmp_path, "one", FIRST)], tmp_path / "index")
    pairs = {name: codes_of(tmp_path, name, LISTS[name]) for name in ("superset", "disjoint")}
    add_codes(index, [pairs["superset"]], FLAT, pool=InlinePool())
    remove_rows(index, FLAT, ["superset/00003", "one/00001"])
    compact_index(index, FLAT, pool=InlinePool())
    wanted = names_in(FIRST, "one") | names_in(LISTS["superset"], "superset")
    del wanted["superset/00003"], wanted["one/00001"]
    assert found_in(index) == wanted
    assert add_codes(index, [pairs["superset"]], FLAT, pool=InlinePool()).status == "unchanged"
    rollback_index(index, 1)
    add_codes(index, [pairs["disjoint"], pairs["superset"]], FLAT, pool=InlinePool())
    assert open_current(index).facts(IndexMeta).classes == (*FIRST, "ant", "bee", "yak")
    everything = {**names_in(FIRST, "one"), **{k: v for name in pairs for k, v in names_in(LISTS[name], name).items()}}
    assert found_in(index) == everything
    for version in (1, 2, 4, 5, 6):
        found_in(index, version)
    assert found_in(index, 4) == wanted
    assert verify(index).status == "done"


def test_a_held_tar_is_the_same_whatever_ids_its_classes_have(tmp_path: Path) -> None:
    """The same tar under a list in another order is unchanged; under other names its codes have changed."""
    rows = labelled("one", FIRST)
    rows.sha256 = "5" * 64
    index = build([write_codes(tmp_path / "one", {"one-000000.tar": rows}, classes=FIRST).uri], tmp_path / "index")
    turned = Rows(rows.keys, rows.codes, [[2 - label for label in labels] for labels in rows.labels], rows.sha256)
    turned.labels[0].sort(reverse=True)
    same = write_codes(tmp_path / "same", {"one-000000.tar": turned}, classes=FIRST[::-1]).uri
    assert add_codes(index, [same], FLAT, pool=InlinePool()).status == "unchanged"
    renamed = write_codes(tmp_path / "renamed", {"one-000000.tar": rows}, classes=("cat", "dog", "fox")).uri
    with pytest.raises(FingerprintMismatch, match="add --replace to take the new ones"):
        add_codes(index, [renamed], FLAT, pool=InlinePool())
    assert add_codes(index, [renamed], FLAT, replace_changed=True, pool=InlinePool()).shards_replaced == 1
    assert found_in(index) == names_in(("cat", "dog", "fox"), "one")
    assert open_current(index).facts(IndexMeta).classes == (*FIRST, "fox")
    assert verify(index).status == "done"


def test_a_killed_build_of_several_lists_resumes_to_the_same_index(tmp_path: Path) -> None:
    pair = [codes_of(tmp_path, "one", FIRST), codes_of(tmp_path, "other", LISTS["superset"])]
    whole = build(pair, tmp_path / "whole")
    pool = InlinePool()
    pool.fatal = lambda task: task.number == 1
    with pytest.raises(WorkFailed, match="run again to resume"):
        build_index(pair, str(tmp_path / "killed"), FLAT, pool=pool)
    assert open_current(build(pair, tmp_path / "killed")).digest == open_current(whole).digest


def test_a_class_id_without_a_name_is_damage_and_not_another_class(tmp_path: Path) -> None:
    rows = simple_rows("odd", 4, classes=4)
    odd = write_codes(tmp_path / "odd", {"odd-000000.tar": rows}, classes=("yak", "cat")).uri
    first = codes_of(tmp_path, "one", FIRST)
    with pytest.raises(DamagedArtifact, match="/odd: class id 3 is outside the 2 classes of the manifest"):
        build_index([first, odd], str(tmp_path / "index"), FLAT, pool=InlinePool())


def with_classes(index: str, classes: list[str]) -> None:
    """Put a manifest in place of the index's own that names other classes, right in all its digests."""
    path = Path(index, "manifest.json")
    fields = open_current(index).manifest.model_dump(mode="json")
    fields["meta"]["classes"] = classes
    fields["digest"] = manifest_digest(fields)
    path.write_bytes(Manifest.model_validate(fields).to_bytes())
    record = {"version": 1, "manifest": "manifest.json", "digest": fields["digest"]}
    Path(index, "versions/1.json").write_bytes(canonical_json(record))


@pytest.mark.parametrize(
    ("classes", "complaint"),
    [
        (["cat", "dog", "owl", "yak", "ant"], "keys-000001.* has other rows than .*/other/parts"),
        (["dog", "cat", "owl", "ant", "yak"], "keys-00000.* has other rows than"),
        (["cat", "dog", "owl", "ant"], "has no class 'yak', which its input .*/other has"),
    ],
)
def test_verify_tells_an_index_whose_classes_are_not_those_of_its_codes(
    tmp_path: Path, classes: list[str], complaint: str
) -> None:
    pair = [codes_of(tmp_path, "one", FIRST), codes_of(tmp_path, "other", LISTS["superset"])]
    index = build(pair, tmp_path / "index")
    with_classes(index, classes)
    with pytest.raises(DamagedArtifact, match=complaint):
        verify(index)
