"""Uploads in parts to an S3 store that fail, are killed or meet a conflict."""

import pytest

from pipelines.errors import CommitUnknown, StoreUnavailable
from tests.support.checker import PENDING
from tests.support.faults import Fault, Refusal
from tests.support.report import scaled
from tests.support.rig import LARGE, Rig, data_of, on
from tests.support.seaweed import BUCKET

pytestmark = pytest.mark.timeout(scaled(300, 3600))


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
