"""S1, guided by coverage: atheris changes tars wherever a change reaches new branches of the reader.

    python -m tests.fuzz.guided [--seconds 3600] [--corpus FOLDER]

What is checked is what `test_hostile_tars` checks. A tar that fails it, hangs or takes too much memory ends the run
with its traceback and exit code 77, and lies in the working directory as `crash-...`, `timeout-...` or `oom-...`.
The corpus grows in FOLDER, from which a later run goes on.
"""

import argparse
import io
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["pipelines.shards.tar", "pipelines.ingest.foreign"]):
    from pipelines.ingest.foreign import scan_foreign_tar
    from pipelines.shards.containers import SUFFIXES
    from pipelines.shards.tar import TarDamaged, read_tar

from tests.fuzz.guards import HANG_S, watched
from tests.fuzz.hostile_tars import Hostile, hostile_tar
from tests.fuzz.test_hostile_tars import BREAKS, MEMORY_MIB, check_scan
from tests.support.report import SEED

SEEDS = 300
LONGEST = 64 << 10


def check(data: bytes) -> None:
    """One tar: it is read to its end or to a named damage, and nothing in it is taken that is not there."""
    with watched() as events:
        scan = scan_foreign_tar(io.BytesIO(data), SUFFIXES, None)
        try:
            for _ in read_tar(io.BytesIO(data)):
                pass
        except TarDamaged as damage:
            assert damage.reason in BREAKS, damage.reason
    assert not events, events
    check_scan(Hostile("guided", data), scan)


def change(data: bytes, longest: int, seed: int) -> bytes:
    """libFuzzer's change, after which most headers get a right checksum: else none would reach what lies behind it."""
    tar = bytearray(atheris.Mutate(data, longest))
    if seed % 4:
        for start in range(0, len(tar) - 511, 512):
            header = memoryview(tar)[start : start + 512]
            if header[257:262] == b"ustar":
                header[148:156] = b" " * 8
                header[148:156] = b"%06o\0 " % sum(header)
    return bytes(tar)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=3600)
    parser.add_argument("--corpus", type=Path, default=Path(tempfile.gettempdir(), "hhnet-guided-corpus"))
    options = parser.parse_args()
    options.corpus.mkdir(parents=True, exist_ok=True)
    for number in range(SEEDS):
        data = hostile_tar(SEED, number).data
        if len(data) <= LONGEST:
            (options.corpus / f"seed-{number:04d}").write_bytes(data)
    limits = {"max_total_time": options.seconds, "max_len": LONGEST, "timeout": int(HANG_S), "seed": SEED}
    # The limit is of the whole process, in which Python and libFuzzer's own tables stand as well.
    limits |= {"rss_limit_mb": 2 * MEMORY_MIB, "print_final_stats": 1}
    words = [sys.argv[0], *(f"-{name}={value}" for name, value in limits.items()), str(options.corpus)]
    atheris.Setup(words, check, custom_mutator=change)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
