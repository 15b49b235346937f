"""Whatever a table holds, ingest ends with shards or with one line, in bounded memory and disk, in a process that
lives, and takes no file from elsewhere."""

from collections import Counter
from functools import partial
from pathlib import Path

import pyarrow as pa
import pytest

from pipelines.config.settings import Config
from pipelines.errors import HHNetError
from pipelines.ingest import tables
from pipelines.ingest.ingest import ingest
from pipelines.ingest.skips import SkipReason
from pipelines.shards.shards import open_shards
from tests.fuzz.apart import do_apart
from tests.fuzz.guards import HANG_S, files_below, within
from tests.fuzz.hostile_tables import FILES, Hostile, hostile_table, parquet, picture, shared
from tests.support.report import SEED, report, scaled

pytestmark = pytest.mark.timeout(scaled(300, 3600))

TABLES = scaled(300, 20_000)
MEMORY_MIB = 2048
"""The GiB that reading rows may take, the imports, and what the allocator keeps; without the limit it is 5 GiB."""
DISK_BYTES = 70 << 20
LONGEST_LINE = 10_000
SECRET = b"\xff\xd8\xff what lies beside the folder"


def outcome_of(hostile: Hostile, folder: Path) -> Counter[str]:
    """Ingest a table, check what came of it, and count the skips, `taken` or the name of the error."""
    source = folder / "t"
    (source / "im").mkdir(parents=True)
    for number in range(FILES):
        (source / "im" / f"{number}.jpg").write_bytes(picture(number))
    (folder / "secret.jpg").write_bytes(SECRET)
    table = source / f"x{hostile.suffix}"
    table.write_bytes(hostile.data)
    options = dict(hostile.options or {})
    if "table_root" in options:
        options["table_root"] = str(source / options["table_root"])
    before = files_below(folder)
    try:
        result = ingest(str(table), str(folder / "out"), Config(), allow_degraded=True, **options).as_json()
    except HHNetError as error:
        assert "\n" not in str(error) and len(str(error)) < LONGEST_LINE, str(error)[:300]
        assert files_below(folder) == before
        return Counter([type(error).__name__])
    assert not hostile.refused
    assert result["found"] == result["samples"] + result["skipped"]
    assert result["skipped"] == sum(result["skipped_reasons"].values())
    assert set(result["skipped_reasons"]) <= set(SkipReason)
    assert {name.split("/")[0] for name in files_below(folder) - before} == {"out"}
    assert sum(path.stat().st_size for path in (folder / "out").rglob("*")) < DISK_BYTES
    for uri in [split["uri"] for split in result["splits"].values()] if "splits" in result else [result["uri"]]:
        check_samples(hostile, uri)
    return Counter(["taken", *result["skipped_reasons"]])


def check_samples(hostile: Hostile, uri: str) -> None:
    """Each sample is a file below the folder, or bytes of the table."""
    shards = open_shards(uri)
    for shard in shards.shards:
        for sample in shards.read(shard, metadata=True):
            path = sample.record.path
            assert ".." not in path.split("/") and not path.startswith("/") and "\0" not in path
            assert sample.image != SECRET
            if not hostile.harm.startswith("damaged"):
                assert sample.image in [picture(number) for number in range(FILES)], path


def numbered_outcome(seed: int, folder: Path, number: int) -> str:
    """Ingest one table of the seed; in a process of its own, since Parquet is parsed by C++."""
    hostile = hostile_table(seed, number)
    with within(2 * HANG_S, f"seed {seed}, table {number}, {hostile.harm}"):
        try:
            return " ".join(sorted(outcome_of(hostile, folder / str(number))))
        except Exception as error:
            return f"broken {hostile.harm}: {type(error).__name__}: {error}".replace("\n", " ")[:300]


def test_no_table_kills_hangs_fills_memory_or_disk_or_takes_a_file_from_elsewhere(tmp_path: Path) -> None:
    apart = do_apart(partial(numbered_outcome, SEED, tmp_path), range(TABLES), tmp_path)
    faults = {
        number: outcome
        for number, outcome in enumerate(apart.outcomes)
        if outcome.startswith(("broken", "died", "hung"))
    }
    outcomes = Counter(word for outcome in apart.outcomes for word in outcome.split())
    report("hostile tables", tables=TABLES, outcomes=outcomes, faults=len(faults), growth_mib=round(apart.growth_mib))
    assert not faults, f"seed {SEED}: {faults}"
    assert not Path("/tmp/escaped.jpg").exists()
    assert apart.growth_mib < MEMORY_MIB
    assert outcomes["taken"] > TABLES / 8 and outcomes["InputError"] > TABLES / 8
    assert {SkipReason.MISSING, SkipReason.UNSAFE_NAME} <= set(outcomes)


def test_the_check_above_notices_a_table_without_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test of the test: without the bound a bomb is taken."""
    monkeypatch.setattr(tables, "require_bounded", lambda *_: None)
    table = pa.table({"image": shared(picture(0) + bytes(2 << 20), 40), "label": ["a"] * 40})
    with pytest.raises(AssertionError):
        outcome_of(Hostile("bomb", parquet(table, store_schema=False), refused=True), tmp_path)
