"""The verbs that commit something, each as a command that is cut off at its steps, given again, and judged.

jobs = Jobs(folder)
job = jobs["index add"]                  made and run undisturbed when it is first asked for
out = job.begin(tmp_path / "out")        where it is to write, with what is there before it
job.run(out, failpoints="part.put.during=kill@2")
assert_nothing_half(job, stored(out))
rerun(job, out)                          the same command again ends as undisturbed
"""

import hashlib
import itertools
import json
import random
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pipelines.verify.verify import verify
from tests.support.checker import PENDING, Stored, stored, violations
from tests.support.codes import simple_rows, write_codes
from tests.support.corpus import Corpus
from tests.support.drivers import Done, run, train_checkpoints, verb
from tests.support.models import write_model
from tests.support.pictures import write_folder
from tests.support.report import SEED, scaled

OUT = "OUT"
MOMENTS = ("before", "during", "after")
STEPS = {
    "ingest": ("identity", "part", "receipt", "manifest", "put"),
    "adopt": ("identity", "part", "manifest", "put"),
    "train": ("identity", "part", "manifest", "put"),
    "encode": ("identity", "part", "receipt", "manifest", "put"),
    "retry-rejects": ("identity", "part", "receipt", "manifest", "version", "put"),
    "index": ("identity", "part", "receipt", "manifest", "version", "put"),
    "index add": ("identity", "part", "receipt", "manifest", "version", "put"),
    "index remove": ("identity", "part", "manifest", "version", "put"),
    "index compact": ("identity", "part", "receipt", "manifest", "version", "put"),
    "index publish": ("version", "put"),
    "index rollback": ("version",),
    "alias": ("identity", "manifest", "version"),
    "evaluate": ("identity", "part", "manifest", "put"),
    "dedupe": ("identity", "part", "receipt", "manifest", "put"),
}
"""The puts that each verb passes: `<step>.put.<moment>` are its failpoints. `put` is of what no digest covers."""
EVERY_MOMENT = ("ingest", "index")
"""Of these verbs every change tries each moment of each step, of the others one that the seed draws."""

ALONE = ("--workers", "1")
PARTS_OF_40 = ("--set", "index.part_codes=40")
SMALL = ("--set", "ingest.samples_per_shard=10")
TRAINING = (
    *("data.image_size=32", "data.batch_size=8", "model.backbone=test_convnext", "model.bits=16", "model.head=ln"),
    *("train.epochs=1", "train.val_share=0.25"),
)


def failpoint_of(step: str, moment: str) -> str:
    """The name of a failpoint."""
    return f"{'' if step == 'put' else f'{step}.'}put.{moment}"


def cases(names: Iterable[str] = STEPS, every_moment: Iterable[str] = EVERY_MOMENT) -> list[tuple[str, str]]:
    """(verb, failpoint): each step of these verbs."""
    found = []
    for name in names:
        for step in STEPS[name]:
            drawn = (random.Random(f"{SEED} {name} {step}").choice(MOMENTS),)
            moments = MOMENTS if name in every_moment else scaled(drawn, MOMENTS)
            found += [(name, failpoint_of(step, moment)) for moment in moments]
    return found


@dataclass(frozen=True)
class Job:
    """A verb under test: its words, what is there before and after an undisturbed run, and how often it passes what.

    `expected` holds every byte that is there afterwards, except the records under runs/.
    """

    words: tuple[str, ...]
    seed: Path | None
    expected: Stored
    seconds: float
    hits: Mapping[str, int]

    def begin(self, out: Path) -> Path:
        """Put there what the verb is to find."""
        if self.seed is not None:
            shutil.copytree(self.seed, out)
        return out

    def words_to(self, out: str | Path) -> list[str]:
        """The words of the command that writes at `out`."""
        return [str(out) if word == OUT else word for word in self.words]

    def run(self, out: str | Path, work: Callable[..., None] = verb, **options: Any) -> Done:
        """Give the command, to the command line as it is or as `work` makes it."""
        return run(work, *self.words_to(out), **options)

    @property
    def published_by(self) -> str:
        """The object that readers look for: when it is there, all is."""
        numbers = [int(match[1]) for name in self.expected if (match := re.fullmatch(r"versions/(\d+)\.json", name))]
        return f"versions/{max(numbers)}.json" if numbers else "manifest.json"


def lasting(objects: Stored) -> dict[str, bytes]:
    """All but the records of runs and of proofs, which tell of clocks and have names of their own."""
    return {name: data for name, data in objects.items() if not name.startswith(("runs/", "proofs/"))}


def assert_nothing_half(job: Job, objects: Stored) -> None:
    """What has a name has the bytes that it is to have, nothing is lost, and readers find all of it or none."""
    found = {name: data for name, data in lasting(objects).items() if not name.startswith(PENDING)}
    if not any(name.startswith("receipts/") for name in job.expected):  # then they serve until the manifest is put
        found = {name: data for name, data in found.items() if not _is_whole_receipt(name, data)}
    before = lasting(stored(job.seed)) if job.seed else {}
    whole = job.published_by in found
    _assert_like(job, found, needed=job.expected if whole else before)


def _is_whole_receipt(name: str, data: bytes) -> bool:
    """Whether it is a receipt, or an object beside the receipts that is named by its digest."""
    if not name.startswith("receipts/"):
        return False
    return bool(json.loads(data)) if name.endswith(".json") else hashlib.sha256(data).hexdigest()[:16] in name


def assert_whole(job: Job, objects: Stored) -> None:
    """What an undisturbed run leaves, byte for byte, and nothing beside it."""
    _assert_like(job, lasting(objects), needed=job.expected)


def _assert_like(job: Job, found: Stored, needed: Stored) -> None:
    strange = sorted(name for name, data in found.items() if job.expected.get(name) != data)
    assert not strange, f"an undisturbed run does not leave them, or with other bytes: {strange}"
    lost = sorted(needed.keys() - found.keys())
    assert not lost, f"gone: {lost}"


def rerun(job: Job, out: Path) -> None:
    """The same command again ends as undisturbed."""
    done = job.run(out)
    assert done.code == 0, done.err
    assert_whole(job, stored(out))


class Jobs:
    """The job of each verb, made below one folder when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._made: dict[str, Job] = {}
        self._numbers = itertools.count()

    def __getitem__(self, name: str) -> Job:
        if name not in self._made:
            words, seed = getattr(self, f"_{name.replace(' ', '_').replace('-', '_')}")()
            self._made[name] = self._undisturbed(name, words, seed)
        return self._made[name]

    def place(self) -> Path:
        """Where a job may write: beside the others, since an alias says from there where its index lies."""
        return self.folder / f"out-{next(self._numbers)}"

    def result(self, name: str) -> Path:
        """What the undisturbed run of a verb left."""
        assert self[name]
        return self.folder / name

    def _undisturbed(self, name: str, words: tuple[str, ...], seed: Path | None) -> Job:
        """Run it twice: the first one waits for the disk, and a kill at a random time is to hit a run."""
        draft, done = Job(words, seed, {}, 0.0, {}), None
        for out in (self.place(), self.folder / name):
            done = draft.run(draft.begin(out), failpoints="none=kill")
            assert done.code == 0, done.err
        assert done is not None
        objects = stored(self.folder / name)
        if "versions/2.json" not in objects:
            assert violations(objects) == []
        verify(str(self.folder / name))
        assert done.hits.keys() == {failpoint_of(step, moment) for step in STEPS[name] for moment in MOMENTS}
        return Job(words, seed, lasting(objects), done.seconds, done.hits)

    # ------------------------------------------------------------------------------------ words, and what is there

    @cached_property
    def _images(self) -> str:
        write_folder(self.folder / "images")
        return str(self.folder / "images")

    @cached_property
    def _codes(self) -> str:
        return self._write_codes("codes", 3)

    @cached_property
    def _model(self) -> str:
        return write_model(self.folder / "model", str(self.result("ingest")), backbone="test_resnet").uri

    def _write_codes(self, name: str, shards: int) -> str:
        contents = {f"{name}-{n}.tar": simple_rows(f"{name}-{n}", 20, seed=n) for n in range(shards)}
        return write_codes(self.folder / name, contents).uri

    def _ingest(self) -> tuple[tuple[str, ...], Path | None]:
        return ("ingest", self._images, *SMALL, "--out", OUT), None

    def _adopt(self) -> tuple[tuple[str, ...], Path | None]:
        tars = self.folder / "tars"
        shutil.copytree(self.result("ingest") / "parts", tars, ignore=shutil.ignore_patterns("*.parquet"))
        return ("ingest", "--adopt", str(tars), "--out", OUT), None

    def _train(self) -> tuple[tuple[str, ...], Path | None]:
        """A training that is over, as far as its checkpoints: what is left is to publish the model."""
        trained, shards = self.folder / "trained", str(self.result("ingest"))
        done = run(train_checkpoints, shards, str(trained), TRAINING)
        assert done.code == 0, done.err
        return ("train", "--shards", shards, "--out", OUT, *(w for s in TRAINING for w in ("--set", s))), trained

    def _encode(self) -> tuple[tuple[str, ...], Path | None]:
        return ("encode", "--shards", str(self.result("ingest")), "--model", self._model, "--out", OUT), None

    def _retry_rejects(self) -> tuple[tuple[str, ...], Path | None]:
        """Codes with rejects in two of their three shards, whose images are whole again."""
        corpus = Corpus(self.result("ingest"), self.folder / "damaged")
        corpus.damage(0, [1, 4])
        corpus.damage(2, [0])
        done = run(
            verb, "encode", "--shards", corpus.uri, "--model", self._model, "--out", corpus.out, "--allow-degraded"
        )
        assert done.code == 4, done.err
        corpus.mend()
        return ("retry-rejects", "--codes", OUT), Path(corpus.out)

    def _index(self) -> tuple[tuple[str, ...], Path | None]:
        return ("index", "build", "--codes", self._codes, *ALONE, *PARTS_OF_40, "--out", OUT), None

    def _index_add(self) -> tuple[tuple[str, ...], Path | None]:
        return ("index", "add", "--index", OUT, "--codes", self._write_codes("more", 2), *ALONE), self.result("index")

    def _index_remove(self) -> tuple[tuple[str, ...], Path | None]:
        keys = ("codes-0/00003", "codes-1/00004")
        return ("index", "remove", "--index", OUT, *(w for k in keys for w in ("--key", k))), self.result("index")

    def _index_compact(self) -> tuple[tuple[str, ...], Path | None]:
        return ("index", "compact", "--index", OUT, *ALONE), self.result("index remove")

    def _index_publish(self) -> tuple[tuple[str, ...], Path | None]:
        """An index that was built and is not published."""
        built = self.folder / "built"
        done = run(
            verb, "index", "build", "--codes", self._codes, *ALONE, *PARTS_OF_40, "--no-publish", "--out", str(built)
        )
        assert done.code == 0, done.err
        return ("index", "publish", "--index", OUT), built

    def _index_rollback(self) -> tuple[tuple[str, ...], Path | None]:
        return ("index", "rollback", "--index", OUT, "--to", "1"), self.result("index remove")

    def _alias(self) -> tuple[tuple[str, ...], Path | None]:
        return ("alias", "--alias", OUT, "--to", str(self.result("index"))), None

    def _evaluate(self) -> tuple[tuple[str, ...], Path | None]:
        queries = self._write_codes("queries", 1)
        return ("evaluate", "--queries", queries, "--database", self._codes, "--out", OUT), None

    def _dedupe(self) -> tuple[tuple[str, ...], Path | None]:
        return ("dedupe", "--codes", self._codes, "--radius", "12", "--out", OUT), None
