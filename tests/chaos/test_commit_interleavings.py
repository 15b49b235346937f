"""Two attempts at one shard, in every order in which their steps can fall, and late writes of an attempt thought dead.

The attempts encode to different bytes, as two GPUs may. Whatever the order, one receipt wins, both commit the same
manifest, and what readers see never changes once it is there. The same search must fail on a store that overwrites
and on readers that list: a test that passes on these would prove nothing.
"""

import functools
import itertools
import json
import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from pipelines.artifacts.commit import ArtifactWriter
from pipelines.artifacts.manifest import Facts, Part, open_artifact
from pipelines.artifacts.parquet import parquet_bytes, read_parquet, table_of
from pipelines.artifacts.tables import codes_schema
from pipelines.errors import CommitConflict, HHNetError, InputError, WorkFailed
from pipelines.storage import Store
from tests.support.checker import stored_on_s3, violations
from tests.support.memory import MemoryObjects, MemoryStore, OverwritingObjects
from tests.support.report import report, scaled
from tests.support.seaweed import seaweed

MARK = "f" * 64
ROWS = 4
STEPS = 6

Rows = list[tuple[int, bytes]]
Reader = Callable[[Store], Rows]


def codes_of(number: int) -> bytes:
    """What attempt `number` makes of the shard."""
    columns: dict[str, Any] = {
        "key": [f"k{row}" for row in range(ROWS)],
        "shard": ["s.tar"] * ROWS,
        "row": list(range(ROWS)),
        "path": [f"k{row}.png" for row in range(ROWS)],
        "code": [bytes([number]) for _ in range(ROWS)],
        "labels": [[0]] * ROWS,
    }
    return parquet_bytes(table_of(codes_schema(8, MARK, ["a"]), columns))


@functools.cache
def rows_of(data: bytes) -> Rows:
    table = read_parquet(data, "part")
    return list(zip(table["row"].to_pylist(), table["code"].to_pylist(), strict=True))


class Attempt(Facts):
    attempt: int
    part: Part
    samples: int


def attempt(store: Store, number: int, data: bytes) -> Iterator[None]:
    """Encode's way to publish one shard and then the artifact, step by step."""
    writer = ArtifactWriter(store, "codes", MARK, (), {})
    yield
    part = writer.put_part("s.parquet", data, ROWS)
    yield
    writer.put_receipt("s", Attempt(attempt=number, part=part, samples=ROWS))
    yield
    receipts = writer.receipts(Attempt)
    yield
    parts = [receipt.part for receipt in receipts.values()]
    made = writer.commit(parts, {"samples": ROWS, "codes": ROWS, "rejects": 0}, {}, receipts)
    yield
    if made.digest != open_artifact(store, "codes").digest:
        raise WorkFailed("what was committed is not what lies there")
    yield


def read_manifest(store: Store) -> Rows:
    """How readers read."""
    artifact = open_artifact(store, "codes")
    return [row for part in artifact.manifest.parts for row in rows_of(artifact.read(part))]


def read_listing(store: Store) -> Rows:
    """How they must not."""
    open_artifact(store, "codes")
    return [row for name in store.names("parts") for row in rows_of(store.read(name))]


DATA = {number: codes_of(number) for number in (1, 2, 3)}


def faults_of(order: tuple[int, ...], store: MemoryStore, read: Reader) -> list[str]:
    """Run two attempts in this order, then a third as a zombie; everything that went wrong."""
    steps = {number: attempt(store, number, DATA[number]) for number in (1, 2)}
    first: tuple[bytes, Rows] | None = None
    wrong: list[str] = []
    try:
        for number in (*order, *[3] * STEPS):
            if number not in steps:
                steps[number] = attempt(store, number, DATA[number])
            next(steps[number])
            seen = what_readers_see(store, read)
            if first is not None and seen != first:
                wrong.append("what readers see has changed")
            first = first or seen
    except HHNetError as error:
        wrong.append(f"an attempt failed: {error}")
    if first is None:
        wrong.append("nothing was published")
    elif sorted(row for row, _ in first[1]) != list(range(ROWS)):
        wrong.append("readers see a sample twice or not at all")
    return wrong + violations(store.memory.held)


def what_readers_see(store: MemoryStore, read: Reader) -> tuple[bytes, Rows] | None:
    with suppress(InputError):  # nothing is committed yet
        rows = read(store)
        return store.read("manifest.json"), rows
    return None


def all_orders() -> list[tuple[int, ...]]:
    """Every interleaving of two attempts of six steps: 12! / (6! 6!)."""
    places = itertools.combinations(range(2 * STEPS), STEPS)
    return [tuple(1 if place in chosen else 2 for place in range(2 * STEPS)) for chosen in places]


def test_every_interleaving_of_two_attempts_publishes_one_of_them() -> None:
    orders = all_orders()
    failed = {order: wrong for order in orders if (wrong := faults_of(order, MemoryStore(), read_manifest))}
    report("R4 interleavings", orders=len(orders), failed=len(failed))
    assert len(orders) == 924
    assert failed == {}


@pytest.mark.parametrize(
    ("objects", "read"),
    [(OverwritingObjects, read_manifest), (MemoryObjects, read_listing)],
    ids=["a plain PUT commits", "readers list the parts"],
)
def test_the_search_finds_a_broken_protocol(objects: type[MemoryObjects], read: Reader) -> None:
    orders = all_orders()[:: scaled(20, 1)]
    failed = [order for order in orders if faults_of(order, MemoryStore(objects), read)]
    mutant = f"{objects.__name__} {read.__name__}"
    report("R7 interleavings", mutant=mutant, orders=len(orders), orders_that_fail=len(failed))
    assert failed


def test_a_zombie_with_a_manifest_of_its_own_is_refused() -> None:
    """It read no receipts before it went to sleep, and wakes up after the others have committed."""
    for has_part, tries_receipt in itertools.product((False, True), repeat=2):
        store = MemoryStore()
        writer = ArtifactWriter(store, "codes", MARK, (), {})
        if has_part:
            writer.put_part("s.parquet", DATA[2], ROWS)
        for _ in attempt(store, 1, DATA[1]):
            pass
        before = dict(store.memory.held)
        part = writer.put_part("s.parquet", DATA[2], ROWS)
        receipt = Attempt(attempt=2, part=part, samples=ROWS)
        if tries_receipt:
            assert writer.put_receipt("s", receipt).attempt == 1
        with pytest.raises(CommitConflict):
            writer.commit([part], {"samples": ROWS, "codes": ROWS, "rejects": 0}, {}, {"s": receipt})
        assert {name: store.memory.held[name] for name in before} == before
        assert read_manifest(store) == rows_of(DATA[1])
        assert violations(store.memory.held) == []


# ------------------------------------------------------------------------------------------------ real processes


def test_two_processes_race_for_one_shard_on_s3(tmp_path: Path) -> None:
    rounds = scaled(10, 200)
    context = multiprocessing.get_context("spawn")
    with seaweed(tmp_path / "weed") as server, server.environment():
        barrier, results = context.Barrier(2), context.Queue()
        racers = [
            context.Process(target=race_rounds, args=(server.uri("race"), number, rounds, barrier, results))
            for number in (1, 2)
        ]
        for racer in racers:
            racer.start()
        told = [results.get(timeout=120) for _ in range(2 * rounds)]
        for racer in racers:
            racer.join(60)
        assert [racer.exitcode for racer in racers] == [0, 0]
        wrong = {round_: violations(stored_on_s3(server, f"race/{round_}")) for round_ in range(rounds)}
    winners = {round_: {who for number, who in told if number == round_} for round_ in range(rounds)}
    report("R4 processes on S3", rounds=rounds, wins_of_first=sum(who == {1} for who in winners.values()))
    assert all(len(who) == 1 for who in winners.values()), "the two saw different winners"
    assert {round_: found for round_, found in wrong.items() if found} == {}


def race_rounds(uri: str, number: int, rounds: int, barrier: Any, results: Any) -> None:
    """One attempt per round in a process of its own; the two begin each round together."""
    for round_ in range(rounds):
        store = Store(f"{uri}/{round_}")
        barrier.wait(120)
        for _ in attempt(store, number, DATA[number]):
            pass
        results.put((round_, json.loads(store.read("receipts/s.json"))["attempt"]))
