"""The S3 store while a server refuses, cuts an answer, holds wrong bytes or is not to be trusted."""

from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from pipelines.artifacts.manifest import open_artifact
from pipelines.errors import CommitConflict, CommitUnknown, DamagedArtifact, HHNetError, InputError, StoreUnavailable
from pipelines.storage import sha256_of
from pipelines.storage.bucket import Answer, Bucket
from tests.support.faults import Fault, FaultProxy, Refusal
from tests.support.report import report, scaled
from tests.support.rig import (
    DEADLINE_S,
    HASTE_S,
    READS,
    SMALL,
    WRITES,
    Rig,
    data_of,
    deadline,
    direct,
    failure,
    hasty,
    on,
)
from tests.support.seaweed import BUCKET

pytestmark = pytest.mark.timeout(scaled(300, 3600))


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


class PlainBucket(Bucket):
    """A bucket whose puts replace what was there."""

    async def request(self, method: str, **fields: object) -> Answer:
        fields.pop("IfNoneMatch", None)
        return await super().request(method, **fields)


def test_a_plain_put_is_found_out(rig: Rig) -> None:
    """A test of the test: without If-None-Match the same checks must fail."""
    rig.prefix, rig.bucket = f"{rig.prefix}/x", PlainBucket
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
