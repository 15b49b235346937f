"""Keeps a run alive when Prefect's server restarts and forgets the run's lease on its concurrency slot.

Prefect's engine ends a run if the lease on its slot cannot be renewed, and a server forgets its leases when it restarts
(unless PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE names a module that keeps them). A restart of seconds would end hours
of training. Here renewal is tried again as long as the run works. The server counts the slot as taken until the run
ends, with or without the lease.
"""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import copy_context
from typing import Any
from uuid import UUID

from prefect import flow_engine
from prefect.client.orchestration import get_client

from flows.reporting import OUT_OF_REACH

_log = logging.getLogger(__name__)

RENEWALS_PER_LEASE = 5
"""Number of renewals within the life of a lease; all but one may fail."""


def keep_leases() -> None:
    """Make Prefect's engine use `kept_lease` in this process."""
    # Prefect has no setting for it, so its module's own name is replaced.
    vars(flow_engine)["maintain_concurrency_lease"] = kept_lease


@contextmanager
def kept_lease(lease_id: UUID, lease_duration: float, **_: Any) -> Iterator[None]:
    """Renew a lease while the block lasts. If that fails, only the lease is lost; the work goes on."""
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(lease_duration / RENEWALS_PER_LEASE):
            try:
                with get_client(sync_client=True) as client:
                    client.renew_concurrency_lease(lease_id=lease_id, lease_duration=lease_duration)
            except OUT_OF_REACH as error:
                problem = str(error) or type(error).__name__
                _log.info("the lease of the run is not renewed (%s); trying again", problem, extra={"error": problem})

    context = copy_context()
    threading.Thread(target=lambda: context.run(renew), daemon=True).start()
    try:
        yield
    finally:
        ended.set()
