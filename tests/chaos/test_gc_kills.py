"""gc is killed, or its disk fails, before and after each deletion: nothing in use goes, and the rest goes later."""

import random
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipelines.verify.verify import verify
from tests.support.checker import Stored, stored
from tests.support.drivers import Done, run, verb
from tests.support.jobs import Jobs, lasting
from tests.support.report import SEED, report, scaled

pytestmark = pytest.mark.timeout(scaled(300, 3600))


@dataclass(frozen=True)
class Litter:
    """An index of three versions with orphans beside them, and what a gc that keeps one version leaves of it."""

    root: Path
    before: Stored
    kept: Stored
    deletions: int

    def copy(self, out: Path) -> Path:
        """The same index elsewhere."""
        return Path(shutil.copytree(self.root, out))


def gc(out: Path, failpoints: str = "") -> Done:
    return run(verb, "gc", str(out), "--older-than", "0s", "--keep", "1", failpoints=failpoints)


@pytest.fixture(scope="module")
def litter(tmp_path_factory: pytest.TempPathFactory) -> Litter:
    folder = tmp_path_factory.mktemp("gc")
    root = Path(shutil.copytree(Jobs(folder).result("index compact"), folder / "root"))
    for number in range(5):
        (root / f"parts/part-{number:06d}-0123456789abcdef.safetensors").write_bytes(b"litter")
    out = Path(shutil.copytree(root, folder / "undisturbed"))
    done = gc(out, failpoints="none=kill")
    assert done.code == 0, done.err
    verify(str(out))
    return Litter(root, lasting(stored(root)), lasting(stored(out)), done.hits["gc.delete.before"])


@pytest.mark.parametrize("action", ["kill", "enospc"])
@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_gc_that_is_cut_off_has_only_less_left_to_do(
    litter: Litter, tmp_path: Path, moment: str, action: str
) -> None:
    draw = random.Random(f"{SEED} gc {moment} {action}")
    rounds = scaled(3, 10)
    for round_ in range(rounds):
        out, hit = litter.copy(tmp_path / str(round_)), draw.randint(1, litter.deletions)
        done = gc(out, f"gc.delete.{moment}={action}@{hit}")
        if action == "kill":
            assert done.code == -signal.SIGKILL
        else:
            assert (done.code, len(done.errors)) == (3, 1), done.err
            assert f"cannot delete {out}/" in done.errors[0]
        left = lasting(stored(out))
        gone = len(litter.before) - len(left)
        assert hit - 3 <= gone <= hit  # the records of the two versions that go are passed twice
        assert litter.kept.items() <= left.items() <= litter.before.items()
        verify(str(out))
        assert gc(out).code == 0
        assert lasting(stored(out)) == litter.kept
    report("R2 failpoints", verb="gc", point=f"gc.delete.{moment}", action=action, kills=rounds, lost=0)
