"""The feed of an encode: the same batches from threads and from processes, and what the death of a process costs."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from hhnet.codes import pack_bits, sign_bits
from hhnet.preprocess import Preprocess
from pipelines.artifacts.manifest import open_artifact
from pipelines.cluster.attempts import AttemptFailed
from pipelines.config.loading import load_config
from pipelines.encode.decoder import ChunkDecoder, DecodedChunk, Squares, parse_answer
from pipelines.encode.encoder import Coded, pack_on_device
from pipelines.encode.feed import Fed, Feed, Shaping, ThreadFeed, count_processes
from pipelines.encode.job import ShardTask, plan_encode
from pipelines.encode.process_feed import ProcessFeed
from pipelines.encode.workers import ShardEncoder
from pipelines.errors import WorkFailed
from pipelines.ingest.ingest import ingest
from pipelines.shards.shards import ShardSet, open_shards
from tests.support.corpus import Corpus
from tests.support.models import write_model
from tests.support.pictures import animated_gif, truncated_jpeg, write_folder
from tests.support.poison import HOLDS, KILLS, write_hook

PER_SHARD = 40
SIDE = 16


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    write_folder(folder, classes=3, per_class=34)
    (klass, *_) = sorted(path for path in folder.iterdir() if path.is_dir())
    for number in range(6):
        (klass / f"short{number}.jpg").write_bytes(truncated_jpeg())
        (klass / f"text{number}.jpg").write_text("this is no picture")
        (klass / f"moving{number}.gif").write_bytes(animated_gif())
    return folder


def ingested(photos: Path, out: Path) -> str:
    config = load_config(sets=[f"ingest.samples_per_shard={PER_SHARD}"])
    return ingest(str(photos), str(out), config).uri


@pytest.fixture
def corpus(photos: Path, tmp_path: Path) -> Corpus:
    return Corpus(Path(ingested(photos, tmp_path / "shards")), tmp_path / "corpus")


@contextmanager
def fed_by_processes(
    shards: ShardSet, shaping: Shaping, processes: int = 2, remote: "Elsewhere | None" = None
) -> Iterator[ProcessFeed]:
    feed = ProcessFeed(shards, shaping, processes, remote=remote)
    try:
        yield feed
    finally:
        feed.close()


def taken(batches: Iterator[Fed]) -> dict[str, object]:
    """What a network would see of a shard: each batch's squares, and what is told of the samples."""
    squares, rows, rejects, animated = [], [], [], 0
    for fed in batches:
        if len(fed.squares):
            squares.append(fed.squares.copy())
        rows += [(sample.record.row, sample.metadata) for sample in fed.kept]
        rejects += [(record.row, reject.reason, reject.detail) for record, reject in fed.rejects]
        animated += fed.animated
        fed.squares[:] = 0  # the network is done with them: whoever gets the place next writes over this
        fed.free()
    return {"squares": squares, "rows": rows, "rejects": sorted(rejects), "animated": animated}


def require_same(first: dict[str, object], other: dict[str, object]) -> None:
    for mine, theirs in zip(first.pop("squares"), other.pop("squares"), strict=True):  # type: ignore[call-overload]
        np.testing.assert_array_equal(mine, theirs)
    assert first == other


@pytest.mark.parametrize(("batch_size", "threads"), [(1, 1), (7, 2)])
def test_processes_feed_the_same_batches_as_threads(corpus: Corpus, batch_size: int, threads: int) -> None:
    """Damaged samples, rejects and animations among them; each shard is expected while the one before runs."""
    corpus.damage(0, [0, 1, 8])
    corpus.damage(1, list(range(PER_SHARD)))
    shards = open_shards(corpus.uri)
    shaping = Shaping(Preprocess(size=SIDE, resize=SIDE), batch_size, threads, metadata=True)
    plain: Feed = ThreadFeed(shards, shaping)
    expected = [taken(plain.batches(shard)) for shard in shards.shards]
    kept = [len(told["rows"]) for told in expected]  # type: ignore[arg-type]
    assert kept[1] == 0 and sum(kept) + sum(len(t["rejects"]) for t in expected) == shards.samples  # type: ignore[arg-type]
    with fed_by_processes(shards, shaping) as feed:
        for number, shard in enumerate(shards.shards):
            batches = feed.batches(shard)
            for following in shards.shards[number + 1 : number + 2]:
                feed.expect(following)
            require_same(taken(batches), expected[number])


def test_an_expected_shard_that_another_worker_takes_is_let_go(corpus: Corpus) -> None:
    shards = open_shards(corpus.uri)
    shaping = Shaping(Preprocess(size=SIDE, resize=SIDE), 8, 1)
    first, second, third = shards.shards[:3]
    for feed in (ThreadFeed(shards, shaping), ProcessFeed(shards, shaping, 1)):
        expected = [taken(ThreadFeed(shards, shaping).batches(shard)) for shard in (first, third, second)]
        for shard, told in zip((first, third, second), expected, strict=True):
            batches = feed.batches(shard)
            feed.expect(second if shard is first else first)
            require_same(taken(batches), told)
        if isinstance(feed, ProcessFeed):
            feed.close()


def test_the_next_shard_is_decoded_while_this_one_is_held_up(corpus: Corpus) -> None:
    shards = open_shards(corpus.uri)
    first, second = shards.shards[:2]
    with fed_by_processes(shards, Shaping(Preprocess(size=SIDE, resize=SIDE), PER_SHARD, 1)) as feed:
        batches = feed.batches(first)
        feed.expect(second)
        next(batches)
        wait_until(lambda: feed.is_ready(second))
        assert not feed.is_ready(first)


def test_the_next_shard_begins_before_the_last_codes_of_this_one_are_taken(tmp_path: Path) -> None:
    """So a GPU has work while the codes of a shard are taken and put."""
    write_folder(tmp_path / "photos", classes=2, per_class=PER_SHARD)
    shards = ingested(tmp_path / "photos", tmp_path / "shards")
    model = write_model(tmp_path / "model", shards, side=32)
    config = load_config(sets=["encode.decode_processes=1", f"encode.batch_size={PER_SHARD}"])
    job = plan_encode(open_artifact(shards), model, str(tmp_path / "codes"), config)
    worker = ShardEncoder(job)
    first, second = (ShardTask(shard.name, shard.stem) for shard in worker.shards.shards[:2])
    seen: list[str] = []
    begin = worker.encoder.begin

    def begin_noted(squares: Squares, batch_size: int, real_codes: bool) -> Callable[[], Coded]:
        seen.append("begun")
        wait = begin(squares, batch_size, real_codes)
        if len(seen) == 1:
            wait_until(lambda: worker.feed.is_ready(worker.shards.shards[1]))

        def wait_noted() -> Coded:
            seen.append("taken")
            return wait()

        return wait_noted

    worker.encoder.begin = begin_noted  # type: ignore[method-assign]
    try:
        worker.expect(second)
        worker.run(first)
        assert seen == ["begun", "begun", "taken"]
        worker.run(second)
        assert seen == ["begun", "begun", "taken", "taken"]
    finally:
        worker.feed.close()  # type: ignore[attr-defined]


# ------------------------------------------------------------------------------------------------------------ deaths


@pytest.fixture
def poisoned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], ShardSet]:
    """Shards of one sample each, with a picture that harms its decode process in the second of four."""
    monkeypatch.syspath_prepend(write_hook(tmp_path / "hook"))

    def made(what: bytes) -> ShardSet:
        write_folder(tmp_path / "photos", classes=1, per_class=3)
        (klass,) = (tmp_path / "photos").iterdir()
        (klass / "poison.jpg").write_bytes(what)
        config = load_config(sets=["ingest.samples_per_shard=1"])
        shards = open_shards(ingest(str(tmp_path / "photos"), str(tmp_path / "shards"), config).uri)
        bad = next(shard for shard in shards.shards if shard.records()[0].path.endswith("poison.jpg"))
        rest = [shard for shard in shards.shards if shard is not bad]
        return ShardSet(shards.artifact, shards.classes, (rest[0], bad, *rest[1:]))

    return made


def test_a_picture_that_kills_its_process_fails_its_own_shard_each_time(
    poisoned: Callable[[bytes], ShardSet],
) -> None:
    shards = poisoned(KILLS)
    before, bad, *after = shards.shards
    with fed_by_processes(shards, Shaping(Preprocess(size=SIDE, resize=SIDE), 8, 2)) as feed:
        wait_until(lambda: len(decoders()) == 2)
        known = decoders()
        batches = feed.batches(before)
        feed.expect(bad)
        wait_until(lambda: decoders() != known)
        assert taken(batches)["rows"] == [(0, None)]
        for _ in range(2):
            with pytest.raises(AttemptFailed, match=rf"{bad.name}: process \d+, which decoded it, was killed by sig"):
                taken(feed.batches(bad))
        for shard in after:
            assert taken(feed.batches(shard))["rows"] == [(0, None)]


def test_a_process_that_dies_idle_costs_nothing(corpus: Corpus) -> None:
    shards = open_shards(corpus.uri)
    with fed_by_processes(shards, Shaping(Preprocess(size=SIDE, resize=SIDE), 8, 1), processes=1) as feed:
        expected = taken(feed.batches(shards.shards[0]))
        (child,) = decoders()
        child.kill()
        wait_until(lambda: child.status() == psutil.STATUS_ZOMBIE)
        require_same(taken(feed.batches(shards.shards[0])), expected)


def test_processes_that_cannot_start_end_the_work(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(
        "import os, sys\nif 'pipelines.encode.decoder' in sys.orig_argv: os._exit(3)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path / "hook"))
    shards = open_shards(corpus.uri)
    with (
        fed_by_processes(shards, Shaping(Preprocess(size=SIDE, resize=SIDE), 8, 1), processes=1) as feed,
        pytest.raises(WorkFailed, match=r"3 decode processes in a row ended .* set encode\.decode_processes=0"),
    ):
        taken(feed.batches(shards.shards[0]))


def test_closing_ends_a_process_that_hangs(poisoned: Callable[[bytes], ShardSet]) -> None:
    shards = poisoned(HOLDS)
    with fed_by_processes(shards, Shaping(Preprocess(size=SIDE, resize=SIDE), 8, 1), processes=1) as feed:
        assert taken(feed.batches(shards.shards[0]))["rows"] == [(0, None)]
        feed.expect(shards.shards[1])
        children = decoders()
        assert children and not feed.is_ready(shards.shards[1])
    _, alive = psutil.wait_procs(children, timeout=20)
    assert alive == []


def decoders() -> list[psutil.Process]:
    """The decode processes of this process that live."""
    found = []
    for child in psutil.Process().children():
        with suppress(psutil.Error):
            if "pipelines.encode.decoder" in child.cmdline():
                found.append(child)
    return found


def wait_until(condition: Callable[[], bool]) -> None:
    ended = threading.Event()
    while not condition():
        ended.wait(0.01)


# ------------------------------------------------------------------------------------------------ decoders elsewhere


class Elsewhere:
    """Decoders on other nodes, here in this process: `asked` counts the chunks that they got."""

    def __init__(self, shaping: Shaping, most: int, fate: str = "works") -> None:
        self.shaping, self.most, self.fate, self.asked = shaping, most, fate, 0

    def start(self) -> "Standin":
        return Standin(self)


class Standin:
    """One of them. It meets its fate at its second chunk: works = goes on; dies; fails = answers with errors;
    misses = finds none of the tars."""

    own = begun = False
    name = "the decoder on another node"

    def __init__(self, among: Elsewhere) -> None:
        self._among, shaping = among, among.shaping
        self._decoder = ChunkDecoder(shaping.preprocess.to_dict(), shaping.threads, shaping.metadata)
        self._chunks: list[tuple[str, Squares]] = []
        self._answered = 0

    def await_ready(self) -> bool:
        return True

    def ask(self, line: str, squares: Squares) -> None:
        self._among.asked += 1
        self._chunks.append((line, squares))

    def answer(self) -> DecodedChunk | tuple[str, str] | None:
        line, squares = self._chunks.pop(0)
        fate = self._among.fate if self._answered else "works"
        self._answered += 1
        if fate == "dies":
            return None
        if fate == "fails":
            return "StoreUnavailable", "the store does not answer"
        if fate == "misses":
            line = json.dumps({**json.loads(line), "store": "/nowhere"})
        return parse_answer(self._decoder.decode(self._decoder.read(line), squares))

    def kill(self) -> None:
        """Nothing to end: it answers at once."""

    def end(self) -> str:
        return "ended"


@pytest.mark.parametrize("fate", ["works", "dies", "fails", "misses"])
def test_decoders_elsewhere_feed_the_same_batches_and_what_they_fail_to_do_is_done_again(
    fate: str, corpus: Corpus
) -> None:
    """Damaged samples, rejects and animations among them."""
    corpus.damage(0, [0, 1, 8])
    shards = open_shards(corpus.uri)
    shaping = Shaping(Preprocess(size=SIDE, resize=SIDE), 7, 1, metadata=True)
    expected = [taken(ThreadFeed(shards, shaping).batches(shard)) for shard in shards.shards]
    remote = Elsewhere(shaping, 2, fate)
    with fed_by_processes(shards, shaping, 1, remote) as feed:
        for number, shard in enumerate(shards.shards):
            batches = feed.batches(shard)
            for following in shards.shards[number + 1 : number + 2]:
                feed.expect(following)
            require_same(taken(batches), expected[number])
    assert remote.asked >= 4, "they are ready before the process is, and each got two chunks at once"


def test_decoders_elsewhere_get_no_more_than_the_ring_holds(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker's own process is never ready, and nobody takes a batch."""
    hook = tmp_path / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(
        "import signal, sys\nif 'pipelines.encode.decoder' in sys.orig_argv: signal.pause()\n"
    )
    monkeypatch.syspath_prepend(str(hook))
    shards = open_shards(corpus.uri)
    shaping = Shaping(Preprocess(size=SIDE, resize=SIDE), 2, 1)
    remote = Elsewhere(shaping, 1)
    with fed_by_processes(shards, shaping, 1, remote) as feed:
        batches = feed.batches(shards.shards[0])
        feed.expect(shards.shards[1])
        held = len(feed.ring) // shaping.batch_size
        wait_until(lambda: remote.asked >= held)
        threading.Event().wait(0.2)  # whoever had more chunks to give would give them now
        assert remote.asked == held < PER_SHARD // shaping.batch_size
        for fed in batches:
            fed.free()
        wait_until(lambda: feed.is_ready(shards.shards[1]))


# ------------------------------------------------------------------------------------------------------------- rules


@pytest.mark.parametrize(
    ("sets", "share", "processes"),
    [
        ([], None, 0),
        ([], 16.0, 7),
        ([], 1.5, 1),
        (["data.workers=4"], 16.0, 3),
        (["encode.decode_processes=5"], None, 5),
        (["encode.decode_processes=0"], 16.0, 0),
    ],
)
def test_a_gpu_has_the_decode_processes_that_its_cpus_hold(
    sets: list[str], share: float | None, processes: int
) -> None:
    assert count_processes(load_config(sets=sets), share) == processes


@pytest.mark.parametrize("bits", [3, 8, 20, 64])
def test_bits_are_packed_on_a_device_as_they_are_here(bits: int) -> None:
    z_BK = torch.randn(50, bits, generator=torch.Generator().manual_seed(bits))
    z_BK[3] = 0
    z_BK[7, bits - 1] = float("nan")
    packed = pack_on_device(z_BK).numpy()
    np.testing.assert_array_equal(np.flatnonzero(packed[:, -1]), [7])
    rest = np.arange(50) != 7
    np.testing.assert_array_equal(packed[rest, :-1], pack_bits(sign_bits(z_BK.numpy()[rest])))
