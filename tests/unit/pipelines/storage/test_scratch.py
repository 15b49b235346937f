"""A private folder goes with its owner, and with it what still writes there; nothing else does."""

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.cluster.session import MAX_SOCKET_PATH_BYTES, RAY_SOCKET_SUFFIX_BYTES, short_base
from pipelines.storage import scratch_folder
from pipelines.storage.scratch import PrivateFolder

OWNER = """
import subprocess, sys, time
from pathlib import Path
from pipelines.storage.scratch import PrivateFolder
folder = PrivateFolder(Path(sys.argv[1]), "hhray-", kept=True)
log = (folder.path / "log").open("w")
writer = subprocess.Popen(["sleep", "600"], stdout=log, start_new_session=True)
print(folder.path, writer.pid, folder._keeper.pid, flush=True)
time.sleep(600)
"""


@pytest.fixture
def base(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="t-", dir="/tmp") as folder:
        monkeypatch.setenv("TMPDIR", folder)
        monkeypatch.delenv("RAY_TMPDIR", raising=False)
        yield Path(folder)


def begun(base: Path) -> "tuple[subprocess.Popen[str], Path, int, int]":
    """An owner, its folder, a process that writes a file there, and the keeper."""
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(base)], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    folder, writer, keeper = owner.stdout.readline().split()
    return owner, Path(folder), int(writer), int(keeper)


def ended(pid: int) -> bool:
    state = Path(f"/proc/{pid}/stat")
    return not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"


def await_true(condition: object) -> None:
    deadline = time.monotonic() + 30
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_folder_is_gone_when_it_is_closed_and_its_owner_lives_on(base: Path) -> None:
    folder = PrivateFolder(base, "hhray-", kept=True)
    assert folder.path.parent == base and folder.path.stat().st_mode & 0o777 == 0o700
    with (folder.path / "log").open("w") as log:
        log.write("still open")
        folder.close()
    assert list(base.iterdir()) == []


def test_a_killed_owner_takes_its_folder_and_its_writers_along_but_no_reader(base: Path) -> None:
    owner, folder, writer, keeper = begun(base)
    reader = subprocess.Popen(["tail", "-f", str(folder / "log")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    await_true(lambda: Path(f"/proc/{reader.pid}/comm").read_text() == "tail\n")
    owner.kill()
    owner.communicate()
    await_true(lambda: not folder.exists() and ended(writer) and ended(keeper))
    assert reader.poll() is None
    reader.kill()
    reader.wait()


def test_the_next_owner_clears_up_after_one_whose_keeper_was_killed_too(base: Path) -> None:
    live, kept, live_writer, _ = begun(base)
    dead, left, dead_writer, keeper = begun(base)
    subprocess.run(["kill", "-9", str(keeper), str(dead.pid)], check=True)
    dead.communicate()
    assert left.exists() and not ended(dead_writer)
    folder = PrivateFolder(base, "hhray-", kept=True)
    assert not left.exists() and ended(dead_writer)
    assert kept.exists() and not ended(live_writer)
    folder.close()
    live.kill()
    live.communicate()
    await_true(lambda: list(base.iterdir()) == [])


@pytest.mark.parametrize("length", [10, 27, 28, 60])
def test_sockets_of_ray_fit_below_it(length: int, tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = Path(f"{base}/{'x' * length}"[: max(length, len(str(base)) + 2)])
    wanted.mkdir()
    monkeypatch.setenv("TMPDIR", str(wanted))
    folder = PrivateFolder(short_base(), "hhray-")
    try:
        assert len(str(folder.path)) + RAY_SOCKET_SUFFIX_BYTES <= MAX_SOCKET_PATH_BYTES
        assert (folder.path.parent == wanted) == (len(str(wanted)) <= 28)
    finally:
        folder.close()


SCRATCH = """
import time
from pipelines.storage import scratch_folder
with scratch_folder(kept={kept}) as folder:
    (folder / "index").write_text("much")
    print(folder, flush=True)
    time.sleep(600)
"""


def killed_at_work(kept: bool) -> Path:
    """The scratch folder of a process that was killed."""
    owner = subprocess.Popen([sys.executable, "-c", SCRATCH.format(kept=kept)], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    folder = Path(owner.stdout.readline().strip())
    owner.kill()
    owner.communicate()
    return folder


def test_scratch_of_a_killed_process_goes_with_the_next_one_and_nobody_elses(base: Path, scratch_in_base: None) -> None:
    ours, similar = base / "hhnet-demo", base / "hhscratch-of-mine"
    ours.mkdir()
    similar.mkdir()
    with scratch_folder() as live:
        left = killed_at_work(kept=False)
        assert (left / "index").exists() and left.parent == base
        with scratch_folder():
            assert live.exists() and not left.exists()
    assert sorted(base.iterdir()) == [ours, similar]


def test_kept_scratch_goes_when_its_process_is_killed(base: Path, scratch_in_base: None) -> None:
    left = killed_at_work(kept=True)
    await_true(lambda: not left.exists())
    assert list(base.iterdir()) == []


@pytest.fixture
def scratch_in_base(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(base))
