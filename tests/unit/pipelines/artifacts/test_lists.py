"""A large artifact keeps its parts and receipts in lists, which the next version shares where they stay as they are."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipelines.artifacts import lists, manifest, versions
from pipelines.artifacts.commit import ArtifactWriter, publish_version
from pipelines.artifacts.facts import QuantizerReceipt
from pipelines.artifacts.manifest import Artifact, Facts, Part, manifest_digest, open_artifact
from pipelines.artifacts.parquet import parquet_bytes
from pipelines.artifacts.versions import find_finished, list_lost, open_current, publish_next
from pipelines.errors import DamagedArtifact
from pipelines.storage import Store, canonical_json, sha256_of
from pipelines.verify.gc import gc
from pipelines.verify.verify import verify

MARK = "a" * 64
PARTS = 20


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "INLINE_ENTRIES", 8)
    monkeypatch.setattr(lists, "LIST_ENTRIES", 6)


def part_of(writer: ArtifactWriter, number: int) -> Part:
    return writer.put_part(f"p{number:04d}.bin", str(number).encode(), number)


def commit(root: Path, count: int = PARTS, turn: bool = False) -> Artifact:
    writer = ArtifactWriter(Store(root), "novel", MARK, (), {})
    parts = [part_of(writer, number) for number in range(count)]
    receipts = {
        f"s{number:04d}": writer.put_receipt(f"s{number:04d}", QuantizerReceipt(part=parts[number]))
        for number in range(count)
    }
    if turn:
        parts, receipts = parts[::-1], dict(reversed(receipts.items()))
    return writer.commit(parts, {"samples": count}, Facts(), receipts)


def fields_of(artifact: Artifact, name: str = "manifest.json") -> dict[str, Any]:
    fields: dict[str, Any] = json.loads(artifact.store.read(name))
    return fields


def grow(base: Artifact, number: int, count: int, without: int | None = None) -> Artifact:
    """Publish a version with all parts of `base` but one, and with new ones up to `count`."""
    writer = ArtifactWriter(base.store, "novel", MARK, (), {})
    parts = [part for part in base.manifest.parts if part.rows != without]
    parts += [part_of(writer, new) for new in range(len(base.manifest.parts), count)]
    return publish_next(base, number, parts, base.manifest.receipts, {"samples": count})


def test_many_entries_go_into_lists_and_come_back(tmp_path: Path) -> None:
    made = commit(tmp_path)
    fields = fields_of(made)
    assert (fields["parts"], fields["receipts"]) == ([], [])
    assert [entry["entries"] for entry in fields["lists"]] == [6, 6, 6, 2] * 2
    opened = open_artifact(str(tmp_path))
    assert opened.digest == made.digest
    assert opened.manifest.parts == made.manifest.parts
    assert opened.manifest.receipts == made.manifest.receipts
    assert [part.rows for part in opened.manifest.parts] == list(range(PARTS))
    receipt = opened.receipts["s0007"].parse(QuantizerReceipt, opened.uri, "")
    assert receipt.part == opened.manifest.parts[7]
    assert opened.read(receipt.part) == b"7"


def test_few_entries_stay_in_the_manifest(tmp_path: Path) -> None:
    fields = fields_of(commit(tmp_path, 4))
    assert (len(fields["parts"]), len(fields["receipts"]), fields["lists"]) == (4, 4, [])
    assert not list(tmp_path.glob("manifests/*"))


def test_the_order_of_the_work_does_not_change_a_byte(tmp_path: Path) -> None:
    assert commit(tmp_path / "one").digest == commit(tmp_path / "other", turn=True).digest


def test_one_part_is_looked_up_in_one_list(tmp_path: Path) -> None:
    commit(tmp_path)
    opened = open_artifact(str(tmp_path))
    for ref in opened.manifest.lists[:1] + opened.manifest.lists[2:]:
        (tmp_path / ref.path).unlink()
    assert opened.manifest.part("p0007.bin").rows == 7  # all other lists are gone
    with pytest.raises(DamagedArtifact, match="is missing"):
        opened.manifest.part("p0001.bin")


def test_a_version_shares_the_lists_that_stay(tmp_path: Path) -> None:
    first = commit(tmp_path)
    second = grow(first, 2, PARTS + 1)
    shared = set(first.manifest.lists) & set(second.manifest.lists)
    assert (len(shared), len(second.manifest.lists)) == (7, 8)  # the list of two parts is made anew
    third = grow(second, 3, PARTS + 1, without=8)
    assert set(second.manifest.lists) - set(third.manifest.lists) == {second.manifest.lists[1]}
    opened = open_current(str(tmp_path))
    assert [part.rows for part in opened.manifest.parts] == [n for n in range(PARTS + 1) if n != 8]
    assert opened.manifest.receipts == first.manifest.receipts
    assert verify(str(tmp_path)).orphans == []


def test_hundreds_of_nights_leave_few_lists(tmp_path: Path) -> None:
    artifact = commit(tmp_path)
    for night in range(2, 60):
        artifact = grow(artifact, night, PARTS + night - 1)
    of_parts = [ref for ref in artifact.manifest.lists if ref.holds == "parts"]
    assert len(artifact.manifest.parts) == PARTS + 58
    assert len(of_parts) <= 2 * len(artifact.manifest.parts) // lists.LIST_ENTRIES + 1
    assert open_current(str(tmp_path)).manifest.parts == artifact.manifest.parts


def test_a_lost_or_damaged_list_is_named(tmp_path: Path) -> None:
    made = commit(tmp_path)
    path = made.manifest.lists[1].path
    data = (tmp_path / path).read_bytes()
    (tmp_path / path).write_bytes(data[:-1] + b"!")
    with pytest.raises(DamagedArtifact, match=r"list-.*does not match the digest"):
        _ = open_artifact(str(tmp_path)).manifest.parts
    with pytest.raises(DamagedArtifact, match=r"list-.*does not match the digest"):
        verify(str(tmp_path))
    (tmp_path / path).unlink()
    with pytest.raises(DamagedArtifact, match=r"list-.*is missing"):
        verify(str(tmp_path))
    assert commit(tmp_path).digest == made.digest  # and the work, done again, puts it back
    assert verify(str(tmp_path)).digest == made.digest


def test_a_finished_artifact_has_all_its_lists(tmp_path: Path) -> None:
    made = commit(tmp_path)
    found = find_finished(made.store, "novel", MARK)
    assert found is not None and list_lost(found) == set()
    (tmp_path / made.manifest.lists[2].path).write_bytes(b"cut")
    opened = open_artifact(str(tmp_path))  # its parts are not in memory
    assert list_lost(opened) == {made.manifest.lists[2].path}
    assert find_finished(made.store, "novel", MARK) is None


def test_gc_keeps_the_lists_of_every_version(tmp_path: Path) -> None:
    first = commit(tmp_path)
    grow(first, 2, PARTS + 1)
    (tmp_path / "manifests/list-0123456789abcdef.parquet").write_bytes(b"of a lost race")
    assert gc(str(tmp_path), older_than="0s").names == ["manifests/list-0123456789abcdef.parquet"]
    assert verify(str(tmp_path)).orphans == []


def test_lists_that_gc_takes_during_a_publication_are_put_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = commit(tmp_path)

    def publish(store: Store, number: int, path: str, digest: str) -> bool:
        published = publish_version(store, number, path, digest)
        for ref in tmp_path.glob("manifests/list-*"):
            if number == 2 and str(ref.relative_to(tmp_path)) not in {one.path for one in first.manifest.lists}:
                ref.unlink()
        return published

    monkeypatch.setattr(versions, "publish_version", publish)
    second = grow(first, 2, PARTS + 1)
    assert open_current(str(tmp_path)).manifest.parts == second.manifest.parts


@pytest.mark.parametrize("count", [3, PARTS])
def test_what_stands_twice_is_not_published(tmp_path: Path, count: int) -> None:
    base = commit(tmp_path, count)
    parts, receipts = base.manifest.parts, base.manifest.receipts
    for twice in ((parts + parts[1:2], receipts), (parts, receipts + receipts[1:2])):
        with pytest.raises(DamagedArtifact, match=r"(p0001.*|s0001) would stand twice"):
            publish_next(base, 2, *twice, {"samples": count})
    assert verify(str(tmp_path)).digest == base.digest


Rows = list[dict[str, Any]]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda rows: rows.reverse(), "does not hold the 6 entries that its manifest says, in order"),
        (lambda rows: rows.pop(), "does not hold the 6 entries"),
        (lambda rows: rows[2].update(rows=-1), "has an entry that cannot be used"),
        (lambda rows: rows[2].update(path="parts/p0001x/../../../etc/passwd"), "names a path outside its artifact"),
    ],
)
def test_a_list_that_lies_with_a_right_digest(tmp_path: Path, change: Callable[[Rows], object], complaint: str) -> None:
    """As somebody would write it who can write to the store, manifest and all."""
    made = commit(tmp_path)
    fields = fields_of(made)
    ref = fields["lists"][0]
    rows = [asdict(part) for part in made.manifest.parts[:6]]
    change(rows)
    data = parquet_bytes(pa.Table.from_pylist(rows, schema=lists.list_schema("parts")))
    (tmp_path / ref["path"]).write_bytes(data)
    ref |= {"bytes": len(data), "sha256": sha256_of(data)}
    (tmp_path / "manifest.json").write_bytes(canonical_json({**fields, "digest": manifest_digest(fields)}))
    with pytest.raises(DamagedArtifact, match=complaint):
        _ = open_artifact(str(tmp_path)).manifest.parts
