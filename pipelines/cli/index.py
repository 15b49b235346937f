"""The verbs `hhnet index ...`; like the other verbs they import nothing heavy before their own work begins."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from pipelines.artifacts.result import Result
from pipelines.cli.help import Flag, VerbGroup
from pipelines.cli.verb import CodesOption, Flags, Main, OutOption, verb
from pipelines.config.settings import Config
from pipelines.errors import InputError, UsageError
from pipelines.index.kinds import require_index_kind

index_app = typer.Typer(
    cls=VerbGroup, help="Build Hamming indexes, change and publish their versions.", no_args_is_help=True
)

IndexOption = Annotated[str, Flag("Root of the index, or of an alias.", "URI"), Main("INDEX")]
OwnIndexOption = Annotated[str, Flag("Root of the index, not of an alias.", "URI"), Main("INDEX")]
PublishOption = Annotated[
    bool, Flag("Publish it as the next version if it passes the gate.", names=("--publish/--no-publish",))
]
WorkersOption = Annotated[
    int | None, Flag("Parts built at the same time; default: one per CPU.", setting="index.workers", min=1)
]


@dataclass(frozen=True, kw_only=True)
class BuildFlags(Flags):
    """Flags of `hhnet index build`."""

    codes: Annotated[CodesOption, Main("CODES")]
    out: OutOption
    kind: Annotated[
        str | None,
        Flag("flat or multihash, both exact; ivf or hnsw; auto = the planner chooses.", "KIND", setting="index.kind"),
    ] = None
    memory: Annotated[
        str | None,
        Flag(
            "For auto: largest size of all parts, such as 4GiB; unset = any, but never hnsw.",
            "SIZE",
            setting="index.memory",
        ),
    ] = None
    latency: Annotated[
        str | None, Flag("For auto: longest time per query, such as 5ms; unset = any.", "TIME", setting="index.latency")
    ] = None
    recall: Annotated[
        float | None, Flag("For auto: smallest recall of an approximate kind.", setting="index.recall", min=0, max=1)
    ] = None
    dry_run: Annotated[bool, Flag("For auto: show what each kind would cost; build nothing.")] = False
    workers: WorkersOption = None
    publish: Annotated[
        bool, Flag("Publish it as version 1 if it passes the gate.", names=("--publish/--no-publish",))
    ] = True

    @property
    def planned(self) -> bool:
        """Whether a flag of the planner was given."""
        return self.dry_run or any(value is not None for value in (self.memory, self.latency, self.recall))


@verb(index_app, "build")
def index_build_command(flags: BuildFlags, settings: Config) -> Result:
    """Build a sharded index over codes and publish it as version 1.

    With --kind auto a planner tries every kind on some of the codes for a few seconds and shows the bytes, build time,
    query time and recall that it predicts. It takes the smallest exact kind within --memory and --latency; if there is
    none, the smallest approximate kind that also reaches --recall. A rerun keeps the kind of the first run.

    Example: hhnet index build codes/train codes/database --out index

    Example: hhnet index build codes/database --out index --kind auto --memory 4GiB --latency 5ms --dry-run
    """
    require_index_kind(settings.index.kind, "auto")
    if settings.index.kind != "auto" and flags.planned:
        raise UsageError("--memory, --latency, --recall and --dry-run are for the planner: add --kind auto")
    from pipelines.index.build import build_index

    return build_index(flags.codes, flags.out, settings, publish=flags.publish, dry_run=flags.dry_run)


@dataclass(frozen=True, kw_only=True)
class AddFlags(Flags):
    """Flags of `hhnet index add`."""

    index: IndexOption
    codes: CodesOption
    prune: Annotated[bool, Flag("Also remove the tars that are not among these codes, in the same version.")] = False
    replace: Annotated[
        bool, Flag("Replace the codes of tars that the index holds already; removed samples stay removed.")
    ] = False
    workers: WorkersOption = None
    publish: PublishOption = True


@verb(index_app, "add")
def index_add_command(flags: AddFlags, settings: Config) -> Result:
    """Add those tars of the codes that the index does not hold yet, and publish the next version.

    Example: hhnet index add index --codes codes/tonight
    """
    from pipelines.index.update import add_codes

    return add_codes(
        *(flags.index, flags.codes, settings), publish=flags.publish, prune=flags.prune, replace_changed=flags.replace
    )


@verb(index_app, "remove")
def index_remove_command(
    index: IndexOption,
    key: Annotated[list[str] | None, Flag("Sample, by key or path; repeatable.", "K")] = None,
    keys: Annotated[Path | None, Flag("Text file of samples, one key or path per line.", "FILE")] = None,
    shard: Annotated[list[str] | None, Flag("Whole tar, by name or sha256; repeatable.", "NAME")] = None,
    ignore_missing: Annotated[bool, Flag("Skip keys and shards that the index does not hold.")] = False,
    publish: PublishOption = True,
    *,
    settings: Config,
) -> Result:
    """Remove samples from search: the next version lists them as removed and keeps all other ids.

    Example: hhnet index remove index --key cat/0001 --keys gone.txt --shard photos-000007.tar
    """
    wanted = [*(key or ()), *(_read_keys(keys) if keys else ())]
    if not (wanted or shard or keys):
        raise UsageError("nothing to remove: give --key, --keys or --shard")
    from pipelines.index.update import remove_rows

    return remove_rows(index, settings, wanted, shard or (), ignore_missing=ignore_missing, publish=publish)


def _read_keys(file: Path) -> list[str]:
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--keys {file} cannot be read: {error}: give a UTF-8 text file, one key per line") from None
    # Not splitlines: it also cuts at characters that a key may hold.
    return [key for line in text.split("\n") if (key := line.removesuffix("\r"))]


@dataclass(frozen=True, kw_only=True)
class CompactFlags(Flags):
    """Flags of `hhnet index compact`."""

    index: IndexOption
    workers: WorkersOption = None
    publish: PublishOption = True


@verb(index_app, "compact")
def index_compact_command(flags: CompactFlags, settings: Config) -> Result:
    """Rebuild parts without their removed samples, and merge small parts; ids and answers stay the same.

    Example: hhnet index compact index
    """
    from pipelines.index.update import compact_index

    return compact_index(flags.index, settings, publish=flags.publish)


@verb(index_app, "publish")
def index_publish_command(
    index: OwnIndexOption,
    digest: Annotated[str | None, Flag("Digest of the one to publish, if several wait.", "HEX")] = None,
    *,
    settings: Config,
) -> Result:
    """Publish an index that was made with --no-publish, if it passes the gate.

    Example: hhnet index publish index
    """
    from pipelines.index.publish import publish_index

    return publish_index(index, settings, digest=digest)


@verb(index_app, "rollback")
def index_rollback_command(
    index: OwnIndexOption,
    to: Annotated[int | None, Flag("Version to return to; default: the previous one.", "N", min=1)] = None,
) -> Result:
    """Publish an older version again as the newest; nothing is deleted.

    Example: hhnet index rollback index --to 3
    """
    from pipelines.index.publish import rollback_index

    return rollback_index(index, to=to)


@verb(index_app, "info")
def index_info_command(index: IndexOption) -> Result:
    """Show the versions of an index, newest first, and the card of the current one.

    Example: hhnet index info index
    """
    from pipelines.index.publish import describe_index

    return describe_index(index)
