"""Everything that needs a GPU, in one command: measures each part in a process of its own and writes one file.

    make gpu [OUT=FILE] [DATA=FOLDER] [REHEARSE=1]
    python -m tests.bench.gpu [--out FILE] [--data FOLDER] [--minutes 35] [--parts encode ...] [--rehearse]

A part that fails or takes longer than its limit is written down with its last lines, and the next one runs. The file is
written anew after each part; by default it is docs/benchmarks/gpu-<date>.md. `recipe` needs DATA, a folder with
CIFAR-10 (docs/protocols.md). With --rehearse every part runs on the CPU, so small that its figures mean nothing.

Exit code 0: all parts are done or left out; 1: one failed or found no time; 2: nothing was begun.
"""

import argparse
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from pathlib import Path
from typing import Any

import psutil

from pipelines.artifacts.host import allowed_cpus
from pipelines.artifacts.runs import PACKAGES
from pipelines.cluster.session import adopt_orphans

ROOT = Path(__file__).resolve().parents[2]
REHEARSAL_FILE = Path("gpu-rehearsal.md")
LEAST_S = 20.0
"""A part is not begun with less time left."""
GRACE_S = 20.0
"""Seconds in which a part that was told to end may stop its own processes."""
LAST_LINES = 15
"""Lines of a part without rows, or of one that failed, that are written down."""
FEW_ROWS = 3
REHEARSAL = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
"""Variables of a rehearsal: the kernels of the GPU run in Triton's interpreter."""


@dataclass(frozen=True)
class Part:
    """One measurement: its command behind `python -m`, the command of its rehearsal, and its limit in seconds."""

    name: str
    title: str
    command: str
    rehearsal: str
    limit_s: float
    needs_data: bool = False


PARTS = (
    Part(
        "encode",
        "Encode",
        "tests.bench.gpu_encode",
        "tests.bench.gpu_encode --backbones test_resnet --side 32 --batch 8 --images 64 --rounds 1",
        limit_s=480,
    ),
    Part(
        "training",
        "Training steps",
        "tests.bench.training --cases hrnet_w18_small:32:500 hrnet_w18:224:128 hrnet_w32:224:128",
        "tests.bench.training --cases test_resnet:72:4 --steps 1",
        limit_s=300,
    ),
    Part(
        "search",
        "Search",
        "tests.bench.gpu_search --rounds 3",
        "tests.bench.gpu_search --codes 1000 --bits 64 --queries 1 -k 5 --rounds 1",
        limit_s=420,
    ),
    Part(
        "tests",
        "Tests on the card",
        "pytest -q -p no:cacheprovider tests/device",
        "pytest -q -p no:cacheprovider tests/device -k no_queries",
        limit_s=300,
    ),
    Part(
        "recipe",
        "CIFAR-10 from scratch",
        "tests.bench.gpu_recipe",
        "tests.bench.gpu_recipe --rehearse --epochs 1",
        limit_s=600,
        needs_data=True,
    ),
)

# Asked in a process of its own, so that no context of this one takes memory of the card.
CARD = """
import json, torch
cards = [torch.cuda.get_device_properties(n) for n in range(torch.cuda.device_count())]
names = [f"{card.name}, {card.total_memory / 2**30:.0f} GiB, capability {card.major}.{card.minor}" for card in cards]
print(json.dumps({"cards": names, "built for CUDA": torch.version.cuda or "none"}))
"""


@dataclass(frozen=True)
class Outcome:
    """What became of a part: in words, whether that is as it should be, its rows and its last lines."""

    said: str
    good: bool
    rows: Sequence[Mapping[str, Any]] = ()
    lines: Sequence[str] = ()


def asked(*words: str) -> str:
    """Return what a command says, "" if it is missing or fails."""
    try:
        found = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=120)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return found.stdout.strip() if found.returncode == 0 else ""


def card_facts() -> dict[str, Any]:
    """Return the cards that torch sees, and the CUDA that it was built for."""
    said = asked(sys.executable, "-c", CARD)
    return json.loads(said.splitlines()[-1]) if said else {"cards": [], "built for CUDA": "unknown"}


def header(card: Mapping[str, Any], begun: datetime) -> dict[str, str]:
    """Return what the head of the file says of the machine and the versions."""
    commit = asked("git", "rev-parse", "HEAD") or "unknown"
    changed = " with changes" if asked("git", "status", "--porcelain", "--untracked-files=no") else ""
    drivers = asked("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()
    versions = []
    for name in (*PACKAGES, "triton"):
        try:
            versions.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return {
        "date": f"{begun:%Y-%m-%d %H:%M} UTC",
        "commit": commit + changed,
        "card": "; ".join(card["cards"]) or "none",
        "driver": drivers[0] if drivers else "unknown",
        "CUDA of torch": card["built for CUDA"],
        "CPUs": f"{allowed_cpus()}, {psutil.virtual_memory().total / 2**30:.0f} GiB",
        "Python": platform.python_version(),
        "versions": ", ".join(versions),
    }


# ----------------------------------------------------------------------------------------------------------- the parts


def words_of(part: Part, data: Path | None, rehearse: bool) -> list[str]:
    """Return the command of a part behind `python -m`."""
    words = shlex.split(part.rehearsal if rehearse else part.command)
    return [*words, str(data)] if part.needs_data and data and not rehearse else words


def run_part(words: Sequence[str], limit_s: float, rehearse: bool) -> Outcome:
    """Run the command of a part; whatever it left running is ended."""
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gpu-") as folder:
        log = Path(folder, "output")
        with log.open("w") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", *words],
                cwd=ROOT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **(REHEARSAL if rehearse else {})},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            code = process.wait(limit_s)
            said = "done" if code == 0 else f"failed with exit code {code}"
        except subprocess.TimeoutExpired:
            code, said = -1, "failed: stopped at its limit"
        finally:
            text = log.read_text(errors="replace")  # before it is ended: the tracebacks of that say nothing
            end(process)
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    return Outcome(
        f"{said} after {time.monotonic() - begun:.0f} s", code == 0, list(rows_in(lines)), lines[-LAST_LINES:]
    )


def end(process: subprocess.Popen[bytes]) -> None:
    """End what is left of a part: first as Ctrl-C does, so that a Ray that it started ends with it."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
    left = psutil.Process().children(recursive=True)  # orphans too, which this process adopts
    for one in left:
        with suppress(psutil.NoSuchProcess):
            one.kill()
    psutil.wait_procs(left, timeout=GRACE_S)
    process.wait()


def rows_in(lines: Iterable[str]) -> Iterable[Mapping[str, Any]]:
    """Yield the lines that are rows of a benchmark."""
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and "bench" in row:
            yield row


# ------------------------------------------------------------------------------------------------------------ the file


def flat(row: Mapping[str, Any], before: str = "") -> dict[str, str]:
    """Return the fields of a row as text; those inside a field bear its name too."""
    found: dict[str, str] = {}
    for name, value in row.items():
        if isinstance(value, dict):
            found |= flat(value, f"{before}{name}: ")
        elif isinstance(value, bool) or not isinstance(value, int | float):
            found[before + name] = "" if value is None else str(value)
        else:
            found[before + name] = f"{value:,}" if abs(value) < 1e7 else f"{value:.4g}"
    return found


def tables(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the rows as Markdown, one table for each benchmark; up to FEW_ROWS of them stand side by side."""
    lines: list[str] = []
    for bench, group in groupby(rows, key=lambda row: row["bench"]):
        texts = [flat({name: value for name, value in row.items() if name != "bench"}) for row in group]
        names = list(dict.fromkeys(name for text in texts for name in text))
        grid = [names, *([text.get(name, "") for name in names] for text in texts)]
        head, *body = zip(*grid, strict=True) if len(texts) <= FEW_ROWS else grid
        lines += [f"{bench}:", ""]
        lines += [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *body)]
        lines.append("")
    return lines


def page(facts: Mapping[str, str], found: Sequence[tuple[Part, str, Outcome]], rehearse: bool, day: str) -> str:
    """Return the file: the machine, then a section for each part, with its command."""
    lines = [f"# GPU, {day}", ""]
    if rehearse:
        lines += ["A rehearsal on the CPU: it shows that each part runs, and its figures mean nothing.", ""]
    lines += ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts.items()), ""]
    for part, command, outcome in found:
        lines += [f"## {part.title}", "", f"`{command}`: {outcome.said}.", "", *tables(outcome.rows)]
        if outcome.lines and not (outcome.good and outcome.rows):
            lines += ["```", *outcome.lines, "```", ""]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--minutes", type=float, default=35.0)
    parser.add_argument("--parts", nargs="+", choices=[part.name for part in PARTS])
    parser.add_argument("--rehearse", action="store_true")
    args = parser.parse_args()
    begun, until = datetime.now(UTC), time.monotonic() + 60 * args.minutes
    out = args.out or (REHEARSAL_FILE if args.rehearse else ROOT / f"docs/benchmarks/gpu-{begun:%Y-%m-%d}.md")
    data = args.data.absolute() if args.data else None
    card = card_facts()
    if not card["cards"] and not args.rehearse:
        built = f"torch, built for CUDA {card['built for CUDA']}, sees none here"
        sys.stderr.write(f"make gpu needs a machine with an Nvidia GPU: {built}; REHEARSE=1 tries it out without one\n")
        return 2
    if out.exists() and not args.rehearse:
        sys.stderr.write(f"{out} exists, and measurements are not overwritten: give another OUT=FILE\n")
        return 2
    if data is not None and not data.is_dir():
        sys.stderr.write(f"{data} is no folder: DATA is the folder of CIFAR-10, see docs/protocols.md\n")
        return 2
    adopt_orphans()
    out.parent.mkdir(parents=True, exist_ok=True)
    facts, found = header(card, begun), list[tuple[Part, str, Outcome]]()
    for part in PARTS:
        if args.parts and part.name not in args.parts:
            continue
        words, left = words_of(part, data, args.rehearse), until - time.monotonic()
        if part.needs_data and data is None and not args.rehearse:
            outcome = Outcome("left out: it needs DATA=FOLDER with CIFAR-10, see docs/protocols.md", True)
        elif left < LEAST_S:
            outcome = Outcome(f"not begun: the {args.minutes:g} minutes were over", False)
        else:
            sys.stderr.write(f"{part.name}: at most {min(part.limit_s, left):.0f} s\n")
            outcome = run_part(words, min(part.limit_s, left), args.rehearse)
        sys.stderr.write(f"{part.name}: {outcome.said}\n")
        found.append((part, f"python -m {shlex.join(words)}", outcome))
        out.write_text(page(facts, found, args.rehearse, f"{begun:%Y-%m-%d}"))
    sys.stderr.write(f"written: {out}\n")
    return 0 if all(outcome.good for _, _, outcome in found) else 1


if __name__ == "__main__":
    sys.exit(main())
