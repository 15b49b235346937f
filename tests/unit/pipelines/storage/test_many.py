"""Thousands of shards: opening codes costs the same for each of them, and what lies far away is read many at a time."""

import itertools
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines.artifacts.commit import ArtifactWriter
from pipelines.artifacts.facts import Receipt
from pipelines.artifacts.manifest import Artifact, open_artifact
from pipelines.config.settings import Config
from pipelines.encode.codes import open_codes
from pipelines.encode.receipts import read_whole_receipts
from pipelines.errors import DamagedArtifact
from pipelines.index.parts import ShardSource
from pipelines.shards.shards import Shard, ShardSet
from pipelines.storage import Store, map_in_order
from pipelines.storage.local import LocalObjects
from pipelines.verify.codes import _receipts
from pipelines.verify.findings import Findings
from pipelines.verify.proofs import Proofs
from pipelines.verify.spread import Spread
from tests.support.codes import simple_rows, write_codes, write_many_codes

FEW, MANY = 1000, 4000
GROWTH = 1.1 * MANY / FEW


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    folder = tmp_path_factory.mktemp("many")
    return {count: write_many_codes(folder / str(count), count) for count in (FEW, MANY)}


class CountedObjects(LocalObjects):
    """A folder that counts what it is asked for, by operation."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.asked: Counter[str] = Counter()

    def __getattribute__(self, name: str) -> Any:
        if name in ("read", "open", "size", "entries"):
            self.asked[name] += 1
        return super().__getattribute__(name)


def calls_of(work: Callable[[], object]) -> int:
    """How many Python and C functions `work` calls, in all threads."""
    count = 0

    def tick(_frame: Any, event: str, _argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    threading.setprofile(tick)
    sys.setprofile(tick)
    try:
        work()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
    return count


def findings_on(artifact: Artifact) -> Findings:
    return Findings(artifact, {}, Proofs(artifact.store, {}), Spread(artifact.store, Config(), None))


WORKS: dict[str, Callable[[str], object]] = {
    "shards of codes": lambda uri: open_codes(uri).shards,
    "receipts that are claimed": lambda uri: read_whole_receipts(Store(uri), [f"many-{n:06d}" for n in range(MANY)]),
    "receipts of a writer": lambda uri: ArtifactWriter(
        Store(uri), "codes", open_codes(uri).artifact.manifest.fingerprint, (), {}
    ).receipts(Receipt),
    "receipts that are proven": lambda uri: list(_receipts(findings_on(open_codes(uri).artifact))),
}


@pytest.mark.parametrize("name", WORKS)
def test_four_times_the_shards_are_four_times_the_work(name: str, roots: dict[int, str]) -> None:
    WORKS[name](roots[FEW])  # what is done once
    few, many = (calls_of(lambda count=count: WORKS[name](roots[count])) for count in (FEW, MANY))  # type: ignore[misc]
    assert many < GROWTH * few, f"{few} calls for {FEW} shards, {many} for {MANY}"


def test_opening_codes_reads_lists_and_no_receipt(roots: dict[int, str]) -> None:
    objects = CountedObjects(Path(roots[FEW]))
    opened = open_codes(open_artifact(Store(roots[FEW], objects)))
    objects.asked.clear()
    assert len(opened.shards) == FEW
    assert objects.asked == {"read": 2}  # one list of parts and one of receipts


def test_looking_for_claimed_receipts_lists_once_and_reads_each(roots: dict[int, str]) -> None:
    objects = CountedObjects(Path(roots[FEW]))
    read_whole_receipts(Store(roots[FEW], objects), [f"many-{n:06d}" for n in range(FEW)])
    assert objects.asked == {"entries": 1, "read": FEW}


def test_the_codes_of_a_shard_are_read_without_the_manifest(tmp_path: Path) -> None:
    """A manifest names every shard: read for each of them it would be quadratic."""
    entry = open_codes(write_codes(tmp_path / "codes", {"a.tar": simple_rows("a", 5)}).uri)
    (shard,) = entry.shards
    source = ShardSource(0, shard.name, shard.sha256, entry.artifact.uri, entry.artifact.digest, shard.parts, 64, False)
    for name in ("manifest.json", "receipts", "identity.json"):
        (tmp_path / "codes" / name).rename(tmp_path / name)
    assert source.keys().num_rows == 5


def test_a_shard_is_found_by_its_name_in_one_step(roots: dict[int, str]) -> None:
    codes = open_codes(roots[MANY])
    opened = ShardSet(codes.artifact, (), tuple(Shard(s.name, s.parts[0], None, None) for s in codes.shards))  # type: ignore[arg-type]
    opened.shard("many-000000.tar")
    assert calls_of(lambda: opened.shard(f"many-{MANY - 1:06d}.tar")) < 20
    assert codes.artifact.receipts["many-000000"].shard == "many-000000"
    assert calls_of(lambda: codes.artifact.receipts[f"many-{MANY - 1:06d}"]) < 20


# --------------------------------------------------------------------------------------------------- many at a time


class WaitingObjects(LocalObjects):
    """A folder that answers no read of a receipt before eight are under way."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.under_way, self.enough = itertools.count(1), threading.Event()

    def read(self, name: str, limit: int | None = None) -> bytes:
        if name.startswith("receipts/"):
            if next(self.under_way) == 8:
                self.enough.set()
            assert self.enough.wait(60)
        return super().read(name, limit)


def test_reads_are_under_way_together(roots: dict[int, str]) -> None:
    mark = open_codes(roots[FEW]).artifact.manifest.fingerprint
    writer = ArtifactWriter(Store(roots[FEW], WaitingObjects(Path(roots[FEW]))), "codes", mark, (), {})
    assert list(writer.receipts(Receipt)) == [f"many-{n:06d}" for n in range(FEW)]


def test_results_are_in_order_and_few_are_held() -> None:
    begun: list[int] = []
    results = map_in_order(lambda number: begun.append(number) or number, range(1000), at_once=4)  # type: ignore[func-returns-value]
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    assert len(begun) <= 3 + 2 * 4
    results.close()  # type: ignore[attr-defined]
    assert len(begun) < 1000
    assert list(map_in_order(str, range(50))) == [str(number) for number in range(50)]


def test_the_first_error_in_order_is_raised() -> None:
    later = threading.Event()

    def work(number: int) -> int:
        if number == 3:
            assert later.wait(60)
            raise ValueError("first")
        if number == 5:
            later.set()
            raise KeyError("earlier in time")
        return number

    results = map_in_order(work, range(10), at_once=10)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="first"):
        next(results)


def test_damage_of_the_first_of_several_receipts_is_named(tmp_path: Path) -> None:
    uri = write_many_codes(tmp_path / "codes", 50)
    for number in (30, 12, 41):
        Path(uri, f"receipts/many-{number:06d}.json").write_bytes(b"{}")
    for _ in range(3):
        with pytest.raises(DamagedArtifact, match=r"many-000012\.json cannot be used"):
            read_whole_receipts(Store(uri), [f"many-{number:06d}" for number in range(50)])


def test_an_object_larger_than_its_manifest_says_is_not_read_whole(tmp_path: Path) -> None:
    codes = open_codes(write_codes(tmp_path / "codes", {"a.tar": simple_rows("a", 5)}).uri)
    uri = codes.artifact.uri
    name = codes.shards[0].parts[0].path
    with Path(uri, name).open("ab") as stream:
        stream.truncate(1 << 40)
    with pytest.raises(DamagedArtifact, match="does not match"):
        codes.read(codes.shards[0])
    assert len(Store(uri).read(name, limit=10)) == 11
