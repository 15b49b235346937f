"""The only package that writes bytes which outlive a process, and the only way to read them back.

store       a store: objects below one root, put once and never changed
local       a folder as a store, and the local files that verbs write beside it
s3          a prefix of a bucket as a store
bucket      requests to a bucket, each repeated until it is answered
clouds      a prefix of a bucket of Google, Azure or Hugging Face as a store
blocks      a distant object as a stream
writes      put-if-absent on S3, whole or in parts
objects     the operations that a folder and a bucket have in common
unsigned    the buckets that are asked without keys
web         files of web servers
limiter     how many requests to a bucket are in flight
clock       the deadline of an operation, and which failures are worth another try
digests     canonical JSON and sha256
failpoints  places where a test can kill the process or fill the disk
scratch     temporary folders that are removed with their owner
many        many reads at a time, their results in order, and items in batches
"""

from pipelines.storage.digests import canonical_json, sha256_of
from pipelines.storage.local import scratch_folder, write_output
from pipelines.storage.many import batched, map_in_order
from pipelines.storage.objects import ObjectInfo
from pipelines.storage.store import ObjectStream, Store
from pipelines.storage.unsigned import use_unsigned

__all__ = [
    "ObjectInfo",
    "ObjectStream",
    "Store",
    "batched",
    "canonical_json",
    "map_in_order",
    "scratch_folder",
    "sha256_of",
    "use_unsigned",
    "write_output",
]
