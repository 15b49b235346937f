"""Whatever a zip holds, ingest ends with shards or with one line, in bounded memory and disk, without a picture
lost unnamed."""

from collections import Counter
from pathlib import Path

import pytest

from pipelines.config.settings import Config
from pipelines.errors import HHNetError
from pipelines.ingest import sources
from pipelines.ingest.ingest import ingest
from pipelines.ingest.skips import SkipReason
from pipelines.shards.shards import open_shards
from tests.fuzz.guards import HANG_S, files_below, peak_growth, within
from tests.fuzz.hostile_zips import HARMS, Hostile, hostile_zip, stock_members
from tests.support.report import SEED, report, scaled

pytestmark = pytest.mark.timeout(scaled(300, 3600))

ZIPS = scaled(4, 300) * len(HARMS)
MEMORY_MIB = 256
DISK_BYTES = 70 << 20
LONGEST_LINE = 4_000
UNLISTED = {"bomb", "overlapping entries"}
"""Harms whose entries the second opinion does not unpack."""


def outcome_of(hostile: Hostile, folder: Path) -> Counter[str]:
    """Ingest a zip, check what came of it, and count the skips, `taken` or the name of the error."""
    folder.mkdir()
    (folder / "x.zip").write_bytes(hostile.data)
    try:
        result = ingest(str(folder / "x.zip"), str(folder / "out"), Config(), allow_degraded=True).as_json()
    except HHNetError as error:
        assert "\n" not in str(error) and len(str(error)) < LONGEST_LINE, str(error)[:300]
        begun = {name.split("/")[1] for name in files_below(folder) - {"x.zip"}}
        assert begun <= {"identity.json", "receipts", "runs"}  # if all pictures turn out to be unreadable
        return Counter([type(error).__name__])
    assert not hostile.refused
    assert result["found"] == result["samples"] + result["skipped"]
    assert result["skipped"] == sum(result["skipped_reasons"].values())
    assert set(result["skipped_reasons"]) <= set(SkipReason)
    assert hostile.reason is None or hostile.reason in result["skipped_reasons"], result
    assert {name.split("/")[0] for name in files_below(folder)} == {"x.zip", "out"}
    assert sum(path.stat().st_size for path in (folder / "out").rglob("*")) < DISK_BYTES
    if hostile.harm not in UNLISTED:
        check_samples(hostile, result["uri"])
    return Counter(["taken", *result["skipped_reasons"]])


def check_samples(hostile: Hostile, uri: str) -> None:
    """Each sample has the bytes that Python's own reader unpacks, of the entry of that name where it is a plain one."""
    stock = stock_members(hostile.data)
    everything = set().union(*stock.values())
    shards = open_shards(uri)
    for shard in shards.shards:
        for sample in shards.read(shard, metadata=False):
            path = sample.record.path
            assert ".." not in path.split("/") and not path.startswith("/") and "\0" not in path
            named = [content for name, content in stock.items() if f"/{plain(name)}".endswith(f"/{path}")]
            assert sample.image in (set().union(*named) if named else everything), path


def plain(name: bytes) -> str:
    return "/".join(part for part in name.decode("utf-8", "replace").split("/") if part not in ("", "."))


def test_no_zip_crashes_hangs_fills_the_disk_or_loses_a_picture_unnamed(tmp_path: Path) -> None:
    outcomes, harms = Counter[str](), Counter[str]()
    outcome_of(hostile_zip(SEED, 0), tmp_path / "first")  # what is imported is not measured
    with peak_growth() as memory:
        for number in range(ZIPS):
            hostile = hostile_zip(SEED, number)
            where = f"seed {SEED}, zip {number}, {hostile.harm}"
            try:
                with within(2 * HANG_S, where):
                    outcomes += outcome_of(hostile, tmp_path / str(number))
            except Exception as error:
                raise AssertionError(f"{where}: {type(error).__name__}: {error}") from error
            harms[hostile.harm] += 1
    report("hostile zips", zips=ZIPS, outcomes=outcomes, harms=harms, growth_mib=round(memory.mib))
    assert not (tmp_path / "escaped.jpg").exists() and not Path("/tmp/escaped.jpg").exists()
    assert memory.mib < MEMORY_MIB
    assert len(harms) == len(HARMS) and outcomes["taken"] > ZIPS / 3
    never = {SkipReason.MISSING, SkipReason.NO_LABEL, SkipReason.STRAY, SkipReason.HIDDEN, SkipReason.WRONG_SUFFIX}
    never |= {SkipReason.UNREACHABLE, SkipReason.REFUSED, SkipReason.REDIRECTED, SkipReason.PRIVATE}
    never |= {SkipReason.NOT_AN_IMAGE}
    assert set(SkipReason) - never - {SkipReason.EMPTY} <= set(outcomes)


def test_the_check_above_notices_a_zip_without_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test of the test: without the bound a bomb is unfolded to the disk."""
    monkeypatch.setattr(sources, "require_bounded", lambda *_: None)
    number = next(number for number, harm in enumerate(HARMS) if harm.__name__ == "bomb")
    with pytest.raises(AssertionError):
        outcome_of(hostile_zip(SEED, number), tmp_path / "bomb")
