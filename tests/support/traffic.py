"""What passes between this process and an S3 store: requests by verb, bytes in and out, and bytes of metadata."""

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from botocore.exceptions import ClientError

from pipelines.artifacts.runs import RunLog
from pipelines.storage.bucket import Bucket
from pipelines.verify import proofs

REQUESTS = {
    **{"get_object": "get", "head_object": "head", "put_object": "put", "list_objects_v2": "list"},
    **{"create_multipart_upload": "put", "upload_part": "put", "complete_multipart_upload": "put"},
    "list_multipart_uploads": "list",
}
"""The kind of each request that a store charges for."""
METADATA = re.compile(
    r".*/(manifest\.json|identity\.json|origin[^/]*\.json|manifests/.*|receipts/[^/]*\.json|versions/.*"
    r"|parts/(index-\d{6,9}|tars|ordinals)-[0-9a-f]{16}\.parquet)"
)
"""Objects that say what there is; run records and proofs lie outside of every digest and do not count."""

Traffic = Counter[str]
"""Number of requests by verb, `bytes_read`, `bytes_written`, and `metadata_bytes` that were put."""


def _count(traffic: Traffic, method: str, fields: dict[str, Any], answer: dict[str, Any]) -> None:
    if method in REQUESTS:
        traffic[REQUESTS[method]] += 1
    if method == "get_object":
        traffic["bytes_read"] += answer.get("ContentLength", 0)
    if method == "put_object":
        size = len(fields["Body"])
        traffic["bytes_written"] += size
        traffic["metadata_bytes"] += size if METADATA.fullmatch(fields["Key"]) else 0


@contextmanager
def counted() -> Iterator[Traffic]:
    """Count what this process asks a store; run records are put at the begin and the end alone, to be the same always.

    A busy server's refusals are tried again, and do not count.
    """
    traffic, send = Traffic(), Bucket.request

    async def request(self: Bucket, method: str, **fields: Any) -> Any:
        try:
            answer = await send(self, method, **fields)
        except ClientError as error:
            if error.response["ResponseMetadata"]["HTTPStatusCode"] < 500:
                _count(traffic, method, fields, {})
            raise
        _count(traffic, method, fields, answer)
        return answer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Bucket, "request", request)
        patch.setattr(RunLog, "progress_every_s", 1e6)
        patch.setattr(proofs, "SETTLED_S", -60.0)  # else what was just put is read again
        yield traffic
