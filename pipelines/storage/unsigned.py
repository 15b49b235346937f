"""The buckets that are asked without keys: public ones, which refuse or ignore other accounts' keys.

They are set in the environment of each process, like the endpoint and the keys, so that workers know them too.
"""

import os
from collections.abc import Sequence

UNSIGNED_VARIABLE = "HHNET_STORE_UNSIGNED"
"""Environment variable with the names of unsigned buckets, separated by commas, or `*` for all."""
ALL_BUCKETS = "*"


def is_unsigned(bucket: str) -> bool:
    """Test whether requests to a bucket go without a signature."""
    return not {bucket, ALL_BUCKETS}.isdisjoint(os.environ.get(UNSIGNED_VARIABLE, "").replace(" ", "").split(","))


def use_unsigned(buckets: bool | Sequence[str]) -> None:
    """Send unsigned requests to these buckets, or all, from now on, in this process and in those that it starts."""
    if buckets:
        os.environ[UNSIGNED_VARIABLE] = ALL_BUCKETS if buckets is True else ",".join(buckets)
