"""Which failures of a remote store are worth waiting for, and which are refusals for good."""

import asyncio

import pytest
from botocore import exceptions as boto

from pipelines.errors import StoreRefused, may_heal
from pipelines.storage.clock import Clock, Transient


def answered(status: int, code: str) -> boto.ClientError:
    facts = {"Error": {"Code": code, "Message": "said"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return boto.ClientError(facts, "PutObject")


def attempt(error: Exception) -> None:
    async def fail() -> None:
        raise error

    async def once() -> None:
        await Clock("write s3://bucket/x", 5.0).attempt(fail)

    asyncio.run(once())


@pytest.mark.parametrize(
    "error",
    [
        answered(403, "AccessDenied"),
        answered(401, "Unauthorized"),
        answered(400, "InvalidRequest"),
        answered(501, "NotImplemented"),
        boto.NoCredentialsError(),
        boto.ProfileNotFound(profile="none"),
    ],
    ids=str,
)
def test_a_refusal_for_good_is_not_worth_another_try(error: Exception) -> None:
    with pytest.raises(StoreRefused, match="cannot write s3://bucket/x") as caught:
        attempt(error)
    assert caught.value.exit_code == 3 and not may_heal(caught.value)


@pytest.mark.parametrize("error", [answered(503, "SlowDown"), answered(429, "TooMany"), TimeoutError()], ids=str)
def test_a_busy_store_is_asked_again(error: Exception) -> None:
    with pytest.raises(Transient):
        attempt(error)
