"""S1: whatever a tar holds, reading and adopting it ends, in bounded memory, without a file written or a sample lost
unnamed."""

import hashlib
import io
import random
import re
from collections import Counter
from pathlib import Path

import pytest

from pipelines.config.settings import Config
from pipelines.errors import DamagedArtifact, HHNetError
from pipelines.ingest.adopt import Adoption, adopt
from pipelines.ingest.foreign import ForeignTar, scan_foreign_tar
from pipelines.ingest.ingest import ingest
from pipelines.ingest.skips import SkipReason
from pipelines.shards.containers import SUFFIXES
from pipelines.shards.shards import open_shards
from pipelines.shards.tar import TarDamaged, TarReason, read_tar
from pipelines.verify.verify import verify
from tests.fuzz.guards import HANG_S, files_below, peak_growth, watched, within
from tests.fuzz.hostile_tars import Hostile, hostile_tar, packed, samples, stock_members
from tests.support.report import SEED, report, scaled

pytestmark = pytest.mark.timeout(scaled(300, 3600))

TARS = scaled(2_000, 50_000)
BATCH = 50
MEMORY_MIB = 512
WALKABLE = {"cut", "cut at a member", "joined"}
"""Harms that break a tar off and leave every header that stands before whole, so that Python's own reader ends too."""
BREAKS = {TarReason.TRUNCATED, TarReason.BAD_HEADER, TarReason.TRAILING_DATA, TarReason.TOO_LARGE}

_KEY = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)


def names_of(name: str) -> set[str]:
    """What a member may be accounted for under: its key as the stock webdataset reader forms it, or its own name."""
    found = _KEY.fullmatch(name)
    stem = found.group(1) if found else name
    return {name, stem, "/".join(part for part in stem.split("/") if part not in ("", "."))}


def check_scan(hostile: Hostile, scan: ForeignTar) -> None:
    """What is taken is really there under names that harm nobody; what is not is named, with a reason."""
    data = hostile.data
    keys = [sample.key for sample in scan.samples]
    assert len(set(keys)) == len(keys)
    for sample in scan.samples:
        assert not sample.key.startswith("/") and ".." not in sample.key.split("/") and sample.key.isprintable()
        for member in sample.members:
            content = data[member.offset : member.offset + member.size]
            assert len(content) == member.size and hashlib.sha256(content).digest() == member.sha256
    assert (scan.bytes, scan.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    reasons = {loss.reason for loss in scan.losses}
    assert all(isinstance(reason, TarReason) for reason in reasons)
    assert hostile.reason is None or hostile.reason in reasons
    if hostile.harm in WALKABLE or not any(loss.name == "" for loss in scan.losses):
        named = {*keys, *(loss.name for loss in scan.losses)}
        unnamed = [name for name, _ in stock_members(data) if not names_of(name) & named]
        assert not unnamed, unnamed


def test_no_tar_crashes_hangs_or_loses_a_sample_unnamed() -> None:
    taken, losses, harms = 0, Counter[str](), Counter[str]()
    with peak_growth() as memory:
        for number in range(TARS):
            hostile = hostile_tar(SEED, number)
            where = f"seed {SEED}, tar {number}, {hostile.harm}"
            try:
                with within(what=where), watched() as events:
                    scan = scan_foreign_tar(io.BytesIO(hostile.data), SUFFIXES, None)
                check_scan(hostile, scan)
                assert not events
            except Exception as error:
                raise AssertionError(f"{where}: {type(error).__name__}: {error}") from error
            taken += len(scan.samples)
            losses.update(str(loss.reason) for loss in scan.losses)
            harms[hostile.harm] += 1
    report("S1 scan", tars=TARS, samples=taken, losses=losses, harms=harms, growth_mib=round(memory.mib))
    assert memory.mib < MEMORY_MIB
    assert taken > TARS
    possible = set(TarReason) - {TarReason.TOO_MANY, TarReason.TOO_SLOW}  # which take an archive beyond this scale
    assert {TarReason(reason) for reason in losses} == possible


def test_adopted_folders_keep_the_law_and_nothing_is_written_beside_them(tmp_path: Path) -> None:
    totals, damaged = Counter[str](), 0
    draw = random.Random(f"{SEED} adopted")
    with peak_growth() as memory:
        for batch in range(TARS // BATCH):
            folder = tmp_path / f"batch-{batch}" / "tars"
            folder.mkdir(parents=True)
            for number in range(batch * BATCH, batch * BATCH + BATCH):
                (folder / f"t-{number:06d}.tar").write_bytes(hostile_tar(SEED, number).data)
            before = files_below(tmp_path)
            how = Adoption(keys_by_tar=batch % 2 == 0)  # without, most samples are taken for doubles
            with within(BATCH * HANG_S, f"seed {SEED}, batch {batch}"):
                result = adopt(str(folder), str(folder), how, allow_degraded=True).as_json()
            assert (
                result["found"]
                == result["samples"] + result["skipped"]
                == sum([result["samples"], *result["skipped_reasons"].values()])
            )
            assert set(result["skipped_reasons"]) <= set(TarReason)
            made = {name.removeprefix(f"batch-{batch}/tars/") for name in files_below(tmp_path) - before}
            assert {name.split("/")[0] for name in made} == {"identity.json", "manifest.json", "parts", "runs"}
            assert len(made) == 6  # with one piece of the index, the list of tars, and a run's begin and end
            verify(str(folder))
            totals.update(found=result["found"], samples=result["samples"], skipped=result["skipped"])
            damaged += damage_and_read(folder, draw)
            for path in sorted(folder.rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()
    report("S1 adopt", **totals, damaged_later=damaged, growth_mib=round(memory.mib))
    assert memory.mib < MEMORY_MIB
    assert totals["samples"] > 0 and totals["skipped"] > 0 and damaged > 0


def damage_and_read(folder: Path, draw: random.Random) -> int:
    """Harm the tars of an indexed folder: each listed sample comes once, whole or named as damaged; verify sees it."""
    shards = open_shards(str(folder))
    originals = {shard.name: (folder / shard.name).read_bytes() for shard in shards.shards}
    for shard in shards.shards:
        data = bytearray(originals[shard.name])
        if draw.random() < 0.5:
            del data[draw.randrange(len(data)) :]
        else:
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        (folder / shard.name).write_bytes(data)
    damaged = 0
    for shard in shards.shards:
        records = shard.records()
        read = list(shards.read(shard, metadata=True))
        assert [sample.record for sample in read] == records
        for sample in read:
            image = sample.record.members[0]
            whole = originals[shard.name][image.offset : image.offset + image.size]
            assert sample.damage is not None or sample.image == whole
            damaged += sample.damage is not None
    with pytest.raises(DamagedArtifact):
        verify(str(folder))
    return damaged


def test_a_hostile_tar_as_a_source_of_ingest_is_taken_or_refused_with_one_line(tmp_path: Path) -> None:
    outcomes = Counter[str]()
    for number in range(0, TARS, 10):
        hostile = hostile_tar(SEED, number)
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "x.tar").write_bytes(hostile.data)
        try:
            result = ingest(str(folder / "x.tar"), str(folder / "out"), Config(), allow_degraded=True).as_json()
            assert result["found"] == result["samples"] + result["skipped"]
            assert result["skipped"] == sum(result["skipped_reasons"].values())
            assert set(result["skipped_reasons"]) <= set(SkipReason)
            outcomes["taken"] += 1
        except HHNetError as error:
            assert "\n" not in str(error)
            outcomes[type(error).__name__] += 1
        assert {name.split("/")[0] for name in files_below(folder)} <= {"x.tar", "out"}
    assert not (tmp_path / "escaped.jpg").exists() and not Path("/tmp/escaped.jpg").exists()
    report("S1 ingest", outcomes=outcomes)
    assert outcomes["taken"] > TARS / 200


@pytest.mark.parametrize("cut", [False, True])
def test_the_checks_above_notice_a_reader_that_stops_quietly(cut: bool) -> None:
    """A test of the test: a reader that takes a damaged header for the end, as `tarfile` does, does not pass."""
    members = samples(random.Random(1), count=4)
    data = packed(members, end=False)[:-512] if cut else packed(members)
    whole = scan_foreign_tar(io.BytesIO(data), SUFFIXES, None)
    quiet = ForeignTar(whole.samples[:-1], [], whole.bytes, whole.sha256)
    with pytest.raises(AssertionError):
        check_scan(Hostile("quiet", data), quiet)


def test_the_reader_raises_nothing_but_its_own_error() -> None:
    for number in range(TARS):
        hostile = hostile_tar(SEED + 1, number)
        try:
            for _ in read_tar(io.BytesIO(hostile.data)):
                pass
        except TarDamaged as damage:
            assert damage.reason in BREAKS
