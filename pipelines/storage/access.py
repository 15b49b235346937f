"""Which buckets are asked without keys: public ones, which refuse or ignore the keys of others.

Like the endpoint and the keys it is known from the environment of each process, so that workers know it too.
"""

import os
from collections.abc import Sequence

VARIABLE = "HHNET_STORE_UNSIGNED"
ALL = "*"


def is_unsigned(bucket: str) -> bool:
    """Whether requests to a bucket are not signed."""
    return not {bucket, ALL}.isdisjoint(os.environ.get(VARIABLE, "").replace(" ", "").split(","))


def use_unsigned(buckets: bool | Sequence[str]) -> None:
    """Ask these buckets, or all, without keys from now on, in this process and in those that it starts."""
    if buckets:
        os.environ[VARIABLE] = ALL if buckets is True else ",".join(buckets)
