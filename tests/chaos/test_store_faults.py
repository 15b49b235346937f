"""The S3 store while answers are lost, connections cut, bytes falsified, and the server says no.

A proxy in front of a real server does the harm. What a call returns must be right or an error, and an error must come
in time and say what was asked for; what lies in the store afterwards is read from the server itself.
"""

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address
from pathlib import Path

import pytest
import s3fs
from botocore.exceptions import BotoCoreError
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from fsspec.asyn import sync

from pipelines.artifacts.commit import ArtifactWriter
from pipelines.artifacts.facts import QuantizerReceipt
from pipelines.artifacts.manifest import open_artifact
from pipelines.errors import CommitConflict, CommitUnknown, DamagedArtifact, HHNetError, InputError, StoreUnavailable
from pipelines.storage import Store, bucket, sha256_of, writes
from pipelines.storage.bucket import Answer, Bucket
from pipelines.storage.clock import DEADLINE_VARIABLE
from tests.support.checker import PENDING, client_of, stored_on_s3, violations
from tests.support.faults import Fault, FaultProxy, Harm, Refusal, Request
from tests.support.report import SEED, report, scaled
from tests.support.seaweed import BUCKET, Seaweed, seaweed

pytestmark = pytest.mark.timeout(scaled(300, 3600))

MARK = "f" * 64
SMALL = 5_000
PART = 5 << 20  # the smallest that S3 takes; the store itself sends parts of 16 MiB
LARGE = PART + SMALL  # goes in two parts
DEADLINE_S = 30.0
SILENCE_S = 0.3  # a client waits no longer for a connection or an answer, and has time left to try again
HASTE_S = scaled(1.0, 5.0)
NAP_S = 0.01


@dataclass
class Rig:
    """A server, the proxy before it, and stores that go through the proxy."""

    server: Seaweed
    proxy: FaultProxy
    prefix: str

    def store(self, name: str = "") -> Store:
        return Store(self.server.uri(self.prefix + (f"/{name}" if name else "")))

    def client(self) -> s3fs.S3FileSystem:
        """A client of the server itself."""
        return client_of(self.server)

    def stored(self) -> dict[str, bytes]:
        """What lies in the store, past the proxy."""
        return stored_on_s3(self.server, self.prefix)


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Seaweed, FaultProxy]]:
    with seaweed(tmp_path_factory.mktemp("weed")) as server, FaultProxy(server.endpoint) as proxy:
        yield server, proxy


@pytest.fixture
def rig(
    platform: tuple[Seaweed, FaultProxy], request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Rig]:
    server, proxy = platform
    proxy.reset()
    monkeypatch.setattr(writes, "MAX_SINGLE_PUT_BYTES", PART)
    monkeypatch.setattr(writes, "MIN_PART_BYTES", PART)
    monkeypatch.setattr(bucket, "CONNECT_TIMEOUT_S", SILENCE_S)
    monkeypatch.setattr(bucket, "SILENCE_TIMEOUT_S", SILENCE_S)
    name = "".join(c if c.isalnum() else "-" for c in request.node.name)
    with deadline(server, proxy, DEADLINE_S):
        yield Rig(server, proxy, name)
    proxy.reset()


@contextmanager
def deadline(server: Seaweed, proxy: FaultProxy, seconds: float) -> Iterator[None]:
    """Stores that are made inside give up after so long."""
    with server.environment(AWS_ENDPOINT_URL_S3=proxy.endpoint, **{DEADLINE_VARIABLE: str(seconds)}):
        yield


def hasty(rig: Rig, seconds: float) -> Store:
    """A store that gives up after so long and is warm.

    The first request of a process builds its TLS context, even for http, which can take a busy machine longer than a
    short deadline. So that request is made by another bucket of the same settings, to which s3fs gives the same client,
    and without a clock; it need not succeed.
    """
    with deadline(rig.server, rig.proxy, seconds):
        store, twin = rig.store(), Bucket(BUCKET, seconds)
        with suppress(BotoCoreError):
            sync(twin.fs.loop, twin.request, "head_bucket")
    rig.proxy.reset()
    return store


@contextmanager
def lateness() -> Iterator[Callable[[], float]]:
    """Seconds for which a thread that only naps has been kept waiting: what the machine withheld, whatever was asked.

    On a busy machine anything may end late, and no bound on the time that passed can hold. What a call took less this
    is bounded: a call that itself waits too long lets the thread nap in time.
    """
    late, over = 0.0, threading.Event()

    def nap() -> None:
        nonlocal late
        while not over.is_set():
            begun = time.monotonic()
            time.sleep(NAP_S)
            late += time.monotonic() - begun - NAP_S

    thread = threading.Thread(target=nap)
    thread.start()
    try:
        yield lambda: late
    finally:
        over.set()
        thread.join()


def data_of(size: int, seed: object) -> bytes:
    return random.Random(f"{SEED} {seed}").randbytes(size)


def on(operation: str, fault: Harm, times: int = 1) -> Callable[[Request], Harm | None]:
    """This fault at the first `times` requests of an operation from now on."""
    left = [times]

    def choose(request: Request) -> Harm | None:
        if request.operation != operation or not left[0]:
            return None
        left[0] -= 1
        return fault

    return choose


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


def direct(rig: Rig, key: str, data: bytes) -> None:
    """Put an object past the proxy, whatever is there."""
    rig.client().pipe_file(f"{BUCKET}/{key}", data)


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


READS: dict[str, tuple[str, Callable[[Store], object]]] = {
    "read": ("read", lambda store: store.read("there")),
    "size": ("stat", lambda store: store.size("there")),
    "list": ("list", lambda store: store.names("")),
    "delete": ("delete", lambda store: store.delete("there")),
}
WRITES: dict[str, tuple[str, Callable[[Store], object]]] = {
    "put": ("write", lambda store: store.put("new", bytes(SMALL))),
    "multipart": ("write", lambda store: store.put("large", bytes(LARGE))),
}
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


def failure(rig: Rig, name: str, store: Store, fault: str) -> StoreUnavailable:
    """The error of an operation of which no request succeeds: typed, in time, and saying what was asked for."""
    verb, call = (READS | WRITES)[name]
    with lateness() as late:
        begun = time.monotonic()
        with pytest.raises(StoreUnavailable) as caught:
            call(store)
        took, withheld = time.monotonic() - begun, late()
    asked = {"list": f"{rig.prefix}/", "put": "new", "multipart": "large"}.get(name, "there")
    assert f"cannot {verb} s3://{BUCKET}/{rig.prefix}/" in str(caught.value)
    assert asked in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 3
    times = {"deadline_s": HASTE_S, "took_s": round(took, 2), "withheld_s": round(withheld, 2)}
    report("R6 100 %", operation=name, fault=fault, requests=sum(rig.proxy.seen.values()), **times)
    assert HASTE_S <= took <= HASTE_S * 1.1 + withheld
    return caught.value


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
        "stream of 5 MiB": {"HEAD": 1, "GET": 1},
        "delete": {"DELETE": 1},
    }


def read_stream(store: Store, name: str, size: int) -> bytes:
    with store.open(name) as stream:
        return b"".join(iter(lambda: stream.read(size), b""))


def test_what_cannot_get_better_is_not_tried_again(rig: Rig) -> None:
    store = rig.store()
    with pytest.raises(FileNotFoundError):
        store.read("absent")
    assert rig.proxy.seen == {"GET": 1}
    assert store.size("absent") is None
    assert rig.proxy.seen == {"GET": 1, "HEAD": 1}
    with pytest.raises(InputError):
        open_artifact(store)
    rig.proxy.reset()
    with rig.server.environment(AWS_ENDPOINT_URL_S3=rig.proxy.endpoint, AWS_SECRET_ACCESS_KEY="notthesecret"):
        refused = rig.store()
        for call in (lambda: refused.put("a", b"x"), lambda: refused.read("a"), lambda: refused.names("")):
            with pytest.raises(StoreUnavailable, match="check the keys") as caught:
                call()
            assert "notthesecret" not in str(caught.value)
    assert sum(rig.proxy.seen.values()) == 3


PASSING = [
    *(Refusal(408, "RequestTimeout"), Refusal(429, "TooManyRequests"), Refusal(503, "SlowDown")),
    *(Refusal(400, code) for code in ("RequestTimeout", "BadDigest", "IncompleteBody", "XAmzContentSHA256Mismatch")),
]
LASTING = [Refusal(501, "NotImplemented"), Refusal(403, "AccessDenied"), Refusal(400, "InvalidRequest")]


@pytest.mark.parametrize("refusal", PASSING, ids=lambda refusal: refusal.name)
def test_what_may_pass_is_tried_again(rig: Rig, refusal: Refusal) -> None:
    store, data = rig.store(), data_of(SMALL, refusal.name)
    for operation, call, expected in (
        ("PUT", lambda: store.put("x", data), True),
        ("GET", lambda: store.read("x"), data),
        ("LIST", lambda: store.names(""), ["x"]),
        ("DELETE", lambda: store.delete("x"), None),
    ):
        rig.proxy.reset()
        rig.proxy.choose = on(operation, refusal)
        assert call() == expected
        assert rig.proxy.done == {refusal.name: 1}
        assert rig.proxy.seen[operation] == 2


@pytest.mark.parametrize("refusal", LASTING, ids=lambda refusal: refusal.name)
def test_what_will_be_refused_again_is_an_error_at_once(rig: Rig, refusal: Refusal) -> None:
    store = rig.store()
    hint = {501: "use one that does", 403: "check the keys"}.get(refusal.status, "injected")
    for name, (verb, call) in (READS | WRITES).items():
        rig.proxy.reset()
        rig.proxy.choose = lambda request: refusal
        with pytest.raises(
            StoreUnavailable, match=f"cannot {verb} s3://{BUCKET}/{rig.prefix}/.*: {refusal.status}"
        ) as it:
            call(store)
        assert not isinstance(it.value, CommitUnknown)
        assert hint in str(it.value) or name == "size"  # the answer to a HEAD has no body
        # After a HEAD answered 400, botocore asks for the bucket's region; an upload that was begun would be aborted.
        assert set(rig.proxy.seen.values()) == {1}


@pytest.mark.parametrize(("status", "known"), [(408, True), (429, True), (503, False)])
def test_a_put_that_was_not_let_in_is_known_not_to_have_landed(rig: Rig, status: int, known: bool) -> None:
    store = hasty(rig, HASTE_S)
    refusal = next(refusal for refusal in PASSING if refusal.status == status)
    rig.proxy.choose = lambda request: refusal
    assert isinstance(failure(rig, "put", store, refusal.name), CommitUnknown) != known


def test_a_certificate_that_is_not_trusted_is_an_error_at_once(rig: Rig, tmp_path: Path) -> None:
    certificate = self_signed(tmp_path)
    with FaultProxy(rig.server.endpoint, certificate) as proxy, deadline(rig.server, proxy, DEADLINE_S):
        store = rig.store()
        for call in (lambda: store.put("x", b"data"), lambda: store.read("x"), lambda: store.names("")):
            with pytest.raises(StoreUnavailable, match=r"certificate verify failed.* AWS_CA_BUNDLE") as caught:
                call()
            assert not isinstance(caught.value, CommitUnknown)
            assert "tries" not in str(caught.value)
        assert not proxy.seen
        with rig.server.environment(AWS_ENDPOINT_URL_S3=proxy.endpoint, AWS_CA_BUNDLE=str(certificate)):
            assert rig.store().put("x", b"data")
            assert rig.store().read("x") == b"data"


def self_signed(folder: Path) -> Path:
    """A file with a certificate for 127.0.0.1 that nobody vouches for, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a store")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(IPv4Address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain)
    (folder / "store.pem").write_bytes(private + certificate.public_bytes(pem))
    return folder / "store.pem"


def test_a_read_goes_on_where_it_was_cut(rig: Rig) -> None:
    store, data = rig.store(), data_of(20 << 20, "long")
    direct(rig, f"{rig.prefix}/x", data)
    rig.proxy.choose = on("GET", Fault.CUT, times=3)
    assert sha256_of(store.read("x")) == sha256_of(data)
    assert rig.proxy.seen["GET"] == 4
    rig.proxy.reset()
    rig.proxy.choose = on("GET", Fault.CUT, times=3)
    with store.open("x") as stream:
        assert stream.read(10) == data[:10]
        stream.seek(9 << 20)
        assert stream.read(4 << 20) == data[9 << 20 : 13 << 20]
    report("R6 stream", requests=dict(rig.proxy.seen), faults=dict(rig.proxy.done))
    assert rig.proxy.done["CUT"] == 3


def test_bytes_that_lie_wrong_in_the_store_are_damage_not_a_fault_of_the_way(rig: Rig) -> None:
    store, data = rig.store(), data_of(SMALL, "x")
    store.put("x", data)
    rig.proxy.choose = on("GET", Fault.WRONG, times=2)
    assert store.read("x") == data
    rot(rig, "x", data[:-1] + bytes([data[-1] ^ 1]))
    rig.proxy.reset()
    with pytest.raises(DamagedArtifact, match="/x is not what was put"):
        store.read("x")
    assert rig.proxy.seen["GET"] == 2


def rot(rig: Rig, name: str, data: bytes) -> None:
    """Change an object's bytes but not what it was put with."""
    client, key = rig.client(), f"{rig.prefix}/{name}"
    facts = client.call_s3("head_object", Bucket=BUCKET, Key=key)
    client.call_s3("put_object", Bucket=BUCKET, Key=key, Body=data, Metadata=facts["Metadata"])


def test_an_upload_that_fails_or_was_killed_leaves_nothing_pending(rig: Rig) -> None:
    data = data_of(LARGE, "x")
    rig.proxy.choose = on("PART", Refusal(403, "AccessDenied"))
    with pytest.raises(StoreUnavailable) as caught:
        rig.store().put("x", data)
    assert not isinstance(caught.value, CommitUnknown)
    assert rig.stored() == {}
    begun = direct_upload(rig, "x")  # as a killed process leaves it
    assert list(rig.stored()) == [f"{PENDING}{rig.prefix}/x"], begun
    assert rig.store().put("x", data)
    assert rig.stored() == {"x": data}


def direct_upload(rig: Rig, name: str) -> str:
    """Begin a multipart upload and send a part of it."""
    client, key = rig.client(), f"{rig.prefix}/{name}"
    upload = str(client.call_s3("create_multipart_upload", Bucket=BUCKET, Key=key)["UploadId"])
    client.call_s3("upload_part", Bucket=BUCKET, Key=key, UploadId=upload, PartNumber=1, Body=b"x" * 1000)
    return upload


def test_a_conflict_has_the_upload_begun_anew(rig: Rig) -> None:
    store, data = rig.store(), data_of(LARGE, "x")
    rig.proxy.choose = on("COMPLETE", Fault.CONFLICT)
    assert store.put("x", data)
    assert rig.proxy.seen["CREATE"] == 2
    assert rig.stored() == {"x": data}
    assert not store.put("x", data)
    assert rig.stored() == {"x": data}


def test_a_plain_put_is_found_out(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test of the test: without If-None-Match the same checks must fail."""
    request = Bucket.request

    async def plain(self: Bucket, method: str, **fields: object) -> Answer:
        fields.pop("IfNoneMatch", None)
        return await request(self, method, **fields)

    monkeypatch.setattr(Bucket, "request", plain)
    rig.prefix += "/x"
    store = rig.store()
    found_out = 0
    for number in range(3):
        data = data_of(SMALL, number)
        try:
            store.put_same(f"o{number}", data)
            with pytest.raises(CommitConflict):
                store.put_same(f"o{number}", data + b"x")
        except (HHNetError, pytest.fail.Exception):
            found_out += 1
    assert found_out == 3
    assert rig.stored() != {f"o{number}": data_of(SMALL, number) for number in range(3)}
    report("R7 plain PUT on S3", found=found_out)
