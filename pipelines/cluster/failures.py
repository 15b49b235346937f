"""Turns the errors of Ray Train into errors of one line that say why a training failed."""

import re

from pipelines.errors import ClusterUnavailable, HHNetError, WorkFailed

_NO_MESH = re.compile(r"Gloo connectFullMesh failed|Unable to find address for|ncclSystemError|ncclRemoteError")
_NO_MEMORY = re.compile(
    r"DefaultCPUAllocator: (?:can't allocate|not enough) memory|OutOfMemoryError|MemoryError|bad_alloc"
)
_KILLED = re.compile(r"its worker process has died")
_RANK = re.compile(r"^\[Rank [\d,]+ Error Snippet\]:$", re.M)


REASON_CHARS = 100
"""Characters of the original reason that an out-of-memory error shows."""


def training_failure(said: str) -> HHNetError:
    """Return the error for Ray Train's text `said`: a known cause, else the last line of the first worker's traceback.

    Raise it from Ray's own error, so that --debug can show the whole traceback.
    """
    first = _RANK.split(said)[1:2] or [said]
    lines = [line.strip() for line in first[0].splitlines() if line.strip() and not line.startswith(" ")]
    reason = lines[-1] if lines else "Ray does not say why"
    if (found := _NO_MESH.search(said)) is not None:
        told = re.search(r"remote=\[?([0-9a-f.:]+)\]?", said[found.start() :])
        where = f" at {told[1]}" if told else ""
        return ClusterUnavailable(
            f"the training workers cannot reach each other{where}, perhaps since a node's name resolves to loopback: "
            "set GLOO_SOCKET_IFNAME, and NCCL_SOCKET_IFNAME for GPUs, to the network's interface (eth0) on "
            f"every node; {found[0]}"
        )
    if _NO_MEMORY.search(said) is not None:
        return WorkFailed(
            "a training worker ran out of memory: lower data.batch_size, or set train.accumulate=2 or more, to take "
            f"the same batch in parts ({reason[:REASON_CHARS]})"
        )
    if _KILLED.search(said) is not None:
        return WorkFailed(
            "a training worker was killed, most often by the kernel for want of memory: lower data.batch_size, or set "
            f"train.accumulate=2 or more, or ask dmesg on its node for another cause ({reason[:REASON_CHARS]})"
        )
    return WorkFailed(f"training failed: {reason}")
