"""A run works on when its lease cannot be renewed, as after a restart of the server."""

import time
import uuid

from prefect import flow_engine
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from flows.lease import RENEWALS_PER_LEASE, kept_lease
from flows.pipeline import pipeline


def test_a_lease_that_nobody_renews_does_not_end_the_work() -> None:
    assert pipeline.name == "hhnet"
    assert vars(flow_engine)["maintain_concurrency_lease"] is kept_lease
    nobody = {PREFECT_API_URL: "http://127.0.0.1:9/api", PREFECT_CLIENT_MAX_RETRIES: 0}
    with (
        temporary_settings(nobody),
        kept_lease(uuid.uuid4(), 0.1 * RENEWALS_PER_LEASE, raise_on_lease_renewal_failure=True),
    ):
        time.sleep(1)  # some renewals fail meanwhile
