"""The command `study`: its options, and the grid that they and a TOML file describe."""

import json
import re
from dataclasses import dataclass
from typing import Annotated

import typer

from pipelines.artifacts.result import Result
from pipelines.cli.help import Flag
from pipelines.cli.verb import ConfigOption, Flags, SetsOption
from pipelines.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class StudyFlags(Flags):
    """Flags of `hhnet study`; the settings are the base of its grid."""

    source: Annotated[
        str, typer.Argument(help="Grid: small, baselines, losses, resolution, paper, or a .toml file.", metavar="STUDY")
    ]
    out: Annotated[str, Flag("Folder or s3://bucket/prefix for all results.", "URI")]
    train: Annotated[str | None, Flag("Shards to train on.", "URI")] = None
    query: Annotated[str | None, Flag("Shards of the queries.", "URI")] = None
    database: Annotated[list[str] | None, Flag("Shards to search in; repeatable.", "URI")] = None
    val: Annotated[str | None, Flag("Shards to validate on; default: a share of --train.", "URI")] = None
    protocol: Annotated[str | None, Flag("Known data set and its split; default: the study's own.", "NAME")] = None
    root: Annotated[str | None, Flag("Folder with the files of the protocol's data set.", "DIR")] = None
    share: Annotated[str, Flag("Do only the I-th of N shares, to spread a study over machines.", "I/N")] = "1/1"
    dry_run: Annotated[bool, Flag("Do nothing; list the trainings and their state.")] = False
    config: ConfigOption = None
    sets: SetsOption = None


def study_command(flags: StudyFlags) -> Result:
    """Train, encode and evaluate a grid of settings and seeds into one table and page; a rerun does what is missing.

    Example: hhnet study small --root cifar-10-batches-bin --out study --dry-run

    Example: hhnet study grid.toml --train shards/train --query shards/query --database shards/database --out study
    """
    from pipelines.study.grid import Grid, read_description

    match = re.fullmatch(r"([1-9]\d{0,3})/([1-9]\d{0,3})", flags.share)
    if match is None or int(match[1]) > int(match[2]):
        raise UsageError(f"--share {flags.share!r}: write I/N, such as 2/4 for the second of four shares")
    named = {"train": flags.train, "query": flags.query, "database": flags.database, "val": flags.val}
    sources = [f"run.{name}={json.dumps(value)}" for name, value in named.items() if value]
    description = read_description(flags.source, flags.protocol)
    grid = Grid.make(description, flags.config, [*(flags.sets or ()), *sources])
    from pipelines.train.preconditions import check_training

    for group in grid.groups:
        for tried in [candidate.settings for candidate in grid.candidates] or [{}]:
            check_training(grid.config(group, grid.seeds[0], tried))
    from pipelines.study.study import study

    share = (int(match[1]), int(match[2]))
    return study(grid, flags.out, root=flags.root, share=share, dry_run=flags.dry_run)
