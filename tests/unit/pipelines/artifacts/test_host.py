"""The CPUs that count are those which affinity and the quotas of control groups leave to this process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.artifacts.host import allowed_cpus

AFFINITY = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity here")
def test_cpus_that_a_process_may_not_use_do_not_count() -> None:
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); "
    code += "from pipelines.artifacts.host import allowed_cpus; print(allowed_cpus())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"


def test_where_there_is_no_affinity_all_cpus_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert allowed_cpus(tmp_path, tmp_path / "none") == os.cpu_count()


@pytest.mark.parametrize(
    ("memberships", "files", "cpus"),
    [
        ("0::/a/b\n", {"a/b/cpu.max": "100000 100000\n"}, 1),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "150000 100000\n"}, 1),
        ("0::/a/b\n", {"a/b/cpu.max": "20000 100000\n"}, 1),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n"}, AFFINITY),
        ("0::/a/b\n", {"c/cpu.max": "100000 100000\n"}, AFFINITY),
        ("0::/a\n", {"a/cpu.max": "nonsense"}, AFFINITY),
        # A container that sees its own group as the root, named by the host's path or by none.
        ("0::/\n", {"cpu.max": "100000 100000\n"}, 1),
        (
            "4:cpu,cpuacct:/docker/1f\n2:cpuset:/x\n",
            {"cpu/cpu.cfs_quota_us": "100000\n", "cpu/cpu.cfs_period_us": "100000\n"},
            1,
        ),
        ("1:cpu:/a\n", {"cpu/a/cpu.cfs_quota_us": "50000\n", "cpu/a/cpu.cfs_period_us": "50000\n"}, 1),
        ("1:cpu:/a\n", {"cpu/a/cpu.cfs_quota_us": "-1\n", "cpu/a/cpu.cfs_period_us": "100000\n"}, AFFINITY),
    ],
)
def test_the_quota_of_a_control_group_bounds_the_cpus(
    memberships: str, files: dict[str, str], cpus: int, tmp_path: Path
) -> None:
    (tmp_path / "memberships").write_text(memberships)
    for name, text in files.items():
        (file := tmp_path / "groups" / name).parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    assert allowed_cpus(tmp_path / "groups", tmp_path / "memberships") == cpus
