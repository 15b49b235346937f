"""The CPUs that this process may use on its host, as affinity and control groups allow."""

import os
from collections.abc import Iterator
from pathlib import Path

GROUPS = Path("/sys/fs/cgroup")
"""Folder of the control groups (Linux)."""
MEMBERSHIPS = Path("/proc/self/cgroup")
"""File that names the control groups of this process, one `number:controllers:/path` for each hierarchy."""


def allowed_cpus(groups: Path = GROUPS, memberships: Path = MEMBERSHIPS) -> int:
    """Return how many CPUs this process may use, at least 1: the least of its affinity and of its groups' quotas."""
    # macOS has no affinity.
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min([usable, *_quotas(groups, memberships)])))


def _quotas(groups: Path, memberships: Path) -> Iterator[float]:
    """Yield the CPUs that each quota on the way to this process's group allows; both versions of control groups."""
    for line in memberships.read_text().splitlines() if memberships.is_file() else []:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = groups / "cpu" if controllers else groups
        # Inside a container the path may be the host's and not exist; the root is then the container's own group.
        own = base / path.lstrip("/")
        for folder in (own, *own.parents[: len(own.parts) - len(base.parts)]):
            yield from _quota(folder)


def _quota(folder: Path) -> Iterator[float]:
    """Yield the CPUs that a group's own quota allows, if it has one: `cpu.max` in version 2, two files in version 1."""
    try:
        if (both := folder / "cpu.max").is_file():
            quota, period = both.read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        if quota != "max" and int(quota) > 0:
            yield int(quota) / int(period)
    except (OSError, ValueError):
        return
