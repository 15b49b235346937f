"""The S3 store while answers are lost, connections cut, bytes falsified, and the server says no.

A proxy in front of a real server does the harm. What a call returns must be right or an error, and an error must come
in time and say what was asked for; what lies in the store afterwards is read from the server itself.
"""

import random
from collections import Counter
from collections.abc import Callable

import pytest

from pipelines.artifacts.commit import ArtifactWriter
from pipelines.artifacts.facts import QuantizerReceipt
from pipelines.artifacts.manifest import open_artifact
from pipelines.errors import CommitConflict, CommitUnknown
from pipelines.storage import Store
from tests.support.checker import stored_on_s3, violations
from tests.support.faults import Fault, Harm, Request
from tests.support.report import SEED, report, scaled
from tests.support.rig import HASTE_S, LARGE, READS, SMALL, WRITES, Rig, data_of, direct, failure, hasty, on
from tests.support.seaweed import BUCKET

pytestmark = pytest.mark.timeout(scaled(300, 3600))

MARK = "f" * 64


def at_rate(rate: float, draw: random.Random) -> Callable[[Request], Fault | None]:
    """At this share of all requests the fault that was the rarest so far among those that can befall them."""
    drawn: Counter[Fault] = Counter()

    def choose(request: Request) -> Fault | None:
        if draw.random() >= rate:
            return None
        possible = [fault for fault in Fault if can_befall(fault, request.operation)]
        fault = min(possible, key=lambda fault: (drawn[fault], draw.random()))
        drawn[fault] += 1
        return fault

    return choose


def can_befall(fault: Fault, operation: str) -> bool:
    if fault in (Fault.CONFLICT, Fault.FALSE_EXISTS):
        return operation in ("PUT", "COMPLETE")
    if fault in (Fault.SHORT, Fault.WRONG):  # a listing has no digest to tell by; transport security guards it
        return operation == "GET"
    if fault is Fault.SENT_WRONG:
        return operation in ("PUT", "PART")
    return fault is not Fault.CUT or operation in ("GET", "LIST")


# --------------------------------------------------------------------------------------------------------- R5: answers


LOST = [Fault.LOST, Fault.LOST_RESET, Fault.LOST_SILENCE]


@pytest.mark.parametrize("fault", LOST, ids=lambda fault: fault.name)
@pytest.mark.parametrize(
    ("operation", "size"), [("PUT", SMALL), ("CREATE", LARGE), ("PART", LARGE), ("COMPLETE", LARGE)]
)
def test_a_put_whose_answer_is_lost_succeeds(rig: Rig, operation: str, size: int, fault: Fault) -> None:
    rounds = scaled(10, 200)
    store = rig.store()
    for number in range(rounds):
        name, data = f"o{number}", data_of(size, number)
        rig.proxy.choose = on(operation, fault)
        made = store.put(name, data)
        assert made or fault is Fault.LOST_RESET  # which the connection pool repeats by itself, unseen
        assert rig.stored() == {name: data}
        if number == 0:
            store.put_same(name, data)
            with pytest.raises(CommitConflict):
                store.put_same(name, data + b"x")
            assert rig.stored() == {name: data}
        rig.client().rm(f"{BUCKET}/{rig.prefix}/{name}")
    assert rig.proxy.done[fault.name] >= rounds
    requests = {name: round(count / rounds, 2) for name, count in rig.proxy.seen.items()}
    report("R5 lost answers", operation=operation, fault=fault.name, rounds=rounds, requests_per_round=requests)


@pytest.mark.parametrize("fault", [Fault.LOST, Fault.LOST_RESET], ids=lambda fault: fault.name)
def test_an_artifact_whose_every_put_loses_its_answer_is_committed_once(rig: Rig, fault: Fault) -> None:
    rounds = scaled(3, 50)
    for round_ in range(rounds):
        store = rig.store(str(round_))
        seen: set[str] = set()

        def first_put_of_each(request: Request, seen: set[str] = seen) -> Fault | None:
            fresh = request.operation == "PUT" and request.key not in seen
            seen.add(request.key)
            return fault if fresh else None

        rig.proxy.choose = first_put_of_each
        for _ in range(2):
            writer = ArtifactWriter(store, "novel", MARK, (), {"here": "there"})
            part = writer.put_part("s.bin", data_of(SMALL, round_), 1)
            receipt = writer.put_receipt("s", QuantizerReceipt(part=part))
            assert receipt.part == part
            digest = writer.commit([part], {}, {}, writer.receipts(QuantizerReceipt)).digest
        rig.proxy.choose = lambda request: None
        assert open_artifact(store).digest == digest
        assert violations(stored_on_s3(rig.server, f"{rig.prefix}/{round_}")) == []
    report("R5 artifacts", fault=fault.name, rounds=rounds, lost=rig.proxy.done[fault.name], conflicts=0)


@pytest.mark.parametrize(("operation", "size"), [("PUT", SMALL), ("COMPLETE", LARGE)])
def test_another_put_that_was_first_is_told_from_a_lost_answer(rig: Rig, operation: str, size: int) -> None:
    other, lose = data_of(SMALL, "other"), on(operation, Fault.LOST)

    def choose(request: Request) -> Harm | None:
        """Another client puts its object just before ours arrives, and then our answer is lost."""
        fault = lose(request)
        if fault:
            direct(rig, request.key, other)
        return fault

    rig.proxy.choose = choose
    assert not rig.store().put("x", data_of(size, "mine"))
    assert rig.proxy.done["LOST"] == 1
    assert rig.stored() == {"x": other}


# ------------------------------------------------------------------------------------------------------- R6: the mix


@pytest.mark.parametrize("rate", scaled([0.01, 0.1], [0.01, 0.1, 0.3]))
def test_a_share_of_faults_is_survived(rig: Rig, rate: float) -> None:
    """Puts, reads, streams, listings and multipart uploads, one after another, under all kinds of faults."""
    count = scaled(300, 2000)
    draw = random.Random(f"{SEED} mix {rate}")
    store, expected = rig.store(), {}
    rig.proxy.random = random.Random(f"{SEED} bits {rate}")
    rig.proxy.choose = at_rate(rate, draw)
    choice = random.Random(f"{SEED} operations {rate}")
    tried: dict[str, int] = {}
    for number in range(count):
        operation = choice.choice(["put", "put", "read", "read", "stream", "list", "size"] * 2 + ["large"])
        tried[operation] = tried.get(operation, 0) + 1
        if operation in ("put", "large") or not expected:
            name = f"{number:05d}"
            expected[name] = data_of(LARGE if operation == "large" else SMALL, number)
            store.put_same(name, expected[name])
            continue
        name = choice.choice(sorted(expected))
        data = expected[name]
        if operation == "read":
            assert store.read(name) == data
        elif operation == "size":
            assert store.size(name) == len(data)
            assert store.size(f"{name}-absent") is None
        elif operation == "list":
            assert store.names("") == sorted(expected)
        else:
            start = choice.randrange(len(data))
            with store.open(name) as stream:
                stream.seek(start)
                streamed = stream.read(len(data))  # a size, as all readers give; without one Python asks for 8 KiB each
            # A stream has no digest of its own: who reads it checks what it holds, as with samples of a tar.
            if streamed != data[start:]:
                assert len(streamed) == len(data) - start
                assert rig.proxy.done["WRONG"]
    rig.proxy.choose = lambda request: None
    faults = dict(rig.proxy.done)
    assert rig.stored() == expected
    requests = sum(rig.proxy.seen.values())
    report("R6 mix", rate=rate, operations=tried, requests=requests, faults=faults, corrupt_reads=0, failed=0)
    assert sum(faults.values()) > rate * count / 3
    assert rate < 0.1 or faults.keys() == {fault.name for fault in Fault}


UNANSWERED = [Fault.ERROR, Fault.SLOW_DOWN, Fault.DROPPED, Fault.SILENCE]
TOTAL = [
    *((name, fault) for name in READS for fault in UNANSWERED),
    *((name, fault) for name in WRITES for fault in [*UNANSWERED, Fault.LOST, Fault.LOST_RESET]),
]


@pytest.mark.parametrize(("name", "fault"), TOTAL, ids=lambda value: getattr(value, "name", value))
def test_when_all_fails_the_error_is_typed_in_time_and_says_what(rig: Rig, name: str, fault: Fault) -> None:
    rig.store().put("there", data_of(SMALL, "there"))
    before = rig.stored()
    store = hasty(rig, HASTE_S)
    rig.proxy.choose = lambda request: fault
    error = failure(rig, name, store, fault.name)
    assert isinstance(error, CommitUnknown) == (name == "put")  # an upload that was never begun is known
    if fault in UNANSWERED:
        assert rig.stored() == before


@pytest.mark.parametrize("name", READS | WRITES)
def test_when_no_connection_is_accepted_nothing_was_written_and_that_is_known(rig: Rig, name: str) -> None:
    with rig.proxy.deaf():
        error = failure(rig, name, hasty(rig, HASTE_S), "no connection")
    assert not isinstance(error, CommitUnknown)
    assert rig.stored() == {}


def test_how_many_requests_an_undisturbed_operation_makes(rig: Rig) -> None:
    store, counts = rig.store(), {}
    large = data_of(LARGE, "large")

    def counted(name: str, call: Callable[[], object]) -> None:
        rig.proxy.reset()
        call()
        counts[name] = dict(rig.proxy.seen)

    counted("put", lambda: store.put("x", b"data"))
    counted("put of what is there", lambda: store.put("x", b"data"))
    counted("read", lambda: store.read("x"))
    counted("size", lambda: store.size("x"))
    counted("list", lambda: store.names(""))
    counted("put in 2 parts", lambda: store.put("large", large))
    counted("stream of 5 MiB", lambda: read_stream(store, "large", 10_000))
    counted("delete", lambda: store.delete("x"))
    report("requests", **counts)
    assert counts == {
        "put": {"PUT": 1},
        "put of what is there": {"PUT": 1, "HEAD": 1},
        "read": {"GET": 1},
        "size": {"HEAD": 1},
        "list": {"LIST": 1},
        "put in 2 parts": {"CREATE": 1, "PART": 2, "COMPLETE": 1, "UPLOADS": 1},
        "stream of 5 MiB": {"GET": 1},
        "delete": {"DELETE": 1},
    }


def read_stream(store: Store, name: str, size: int) -> bytes:
    with store.open(name) as stream:
        return b"".join(iter(lambda: stream.read(size), b""))
