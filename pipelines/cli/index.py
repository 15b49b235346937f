"""The verbs `hhnet index ...`; like the other verbs they import nothing heavy before their own work begins."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from pipelines.artifacts.result import Result
from pipelines.cli.verb import Codes, Flags, Out, verb
from pipelines.config.settings import Config
from pipelines.errors import InputError, UsageError
from pipelines.index.kinds import require_index_kind

index_app = typer.Typer(help="Build Hamming indexes, change and publish their versions.", no_args_is_help=True)

Index = Annotated[str, typer.Option("--index", help="The index, or an alias of it.", metavar="URI")]
IndexItself = Annotated[str, typer.Option("--index", help="The index itself, not an alias.", metavar="URI")]
Publish = Annotated[bool, typer.Option("--publish/--no-publish", help="Make it the next version, through the gate.")]
Workers = Annotated[int | None, typer.Option(help="Parts built side by side.", min=1)]


@dataclass(frozen=True, kw_only=True)
class BuildFlags(Flags):
    """Flags of `hhnet index build`."""

    codes: Codes
    out: Out
    kind: Annotated[
        str | None, typer.Option(help="flat or multihash (both exact), ivf or hnsw; auto = what the planner chooses.")
    ] = None
    memory: Annotated[
        str | None,
        typer.Option(help="For auto: most bytes of all parts, such as 4GiB; unset = any, and no hnsw.", metavar="SIZE"),
    ] = None
    latency: Annotated[
        str | None, typer.Option(help="For auto: longest time of a query, such as 5ms; unset = any.", metavar="TIME")
    ] = None
    recall: Annotated[
        float | None, typer.Option(help="For auto: least recall of an approximate kind; default 0.95.", min=0, max=1)
    ] = None
    dry_run: Annotated[bool, typer.Option("--dry-run", help="For auto: show what each kind would cost, and stop.")] = (
        False
    )
    workers: Workers = None
    publish: Annotated[bool, typer.Option("--publish/--no-publish", help="Make it version 1, through the gate.")] = True

    def budget(self) -> dict[str, Any]:
        """Return the planner's limits."""
        return {"index.memory": self.memory, "index.latency": self.latency, "index.recall": self.recall}

    def settings(self) -> dict[str, Any]:
        """Return the settings that flags stand for."""
        return {"index.kind": self.kind, "index.workers": self.workers, **self.budget()}


@verb(index_app, "build")
def index_build(flags: BuildFlags, settings: Config) -> Result:
    """Build a sharded index over codes and publish it as version 1.

    With --kind auto a planner predicts the bytes, the build time, the time of a query and the recall of every kind from
    the codes and a few seconds of trials, shows them, and takes the smallest exact kind that keeps within --memory and
    --latency; where none does, the smallest approximate one that also reaches --recall. A rerun stays with the kind
    that --out was begun with.

    Example: hhnet index build --codes codes/train --codes codes/database --out index

    Example: hhnet index build --codes codes/database --out index --kind auto --memory 4GiB --latency 5ms --dry-run
    """
    require_index_kind(settings.index.kind, "auto")
    planned = flags.dry_run or any(value is not None for value in flags.budget().values())
    if settings.index.kind != "auto" and planned:
        raise UsageError("--memory, --latency, --recall and --dry-run are for the planner: give --kind auto with them")
    from pipelines.index.build import build_index as work

    return work(flags.codes, flags.out, settings, publish=flags.publish, dry_run=flags.dry_run)


@dataclass(frozen=True, kw_only=True)
class AddFlags(Flags):
    """Flags of `hhnet index add`."""

    index: Index
    codes: Codes
    prune: Annotated[
        bool, typer.Option("--prune", help="Remove the tars that none of these codes has, in the same version.")
    ] = False
    replace: Annotated[
        bool,
        typer.Option(
            "--replace", help="Of tars that it holds with other codes, take these; what was removed stays so."
        ),
    ] = False
    workers: Workers = None
    publish: Publish = True

    def settings(self) -> dict[str, Any]:
        """Return the settings that flags stand for."""
        return {"index.workers": self.workers}


@verb(index_app, "add")
def index_add(flags: AddFlags, settings: Config) -> Result:
    """Add the tars of codes that the index does not hold yet, and publish the next version.

    Example: hhnet index add --index index --codes codes/tonight
    """
    from pipelines.index.update import add_codes as work

    return work(
        *(flags.index, flags.codes, settings),
        publish=flags.publish,
        prune=flags.prune,
        replace_changed=flags.replace,
    )


@verb(index_app, "remove")
def index_remove(
    index: Index,
    key: Annotated[list[str] | None, typer.Option("--key", help="A sample, by key or path.", metavar="K")] = None,
    keys: Annotated[Path | None, typer.Option("--keys", help="A file, a key or path a line.", metavar="FILE")] = None,
    shard: Annotated[
        list[str] | None, typer.Option("--shard", help="A whole tar, by name or sha256.", metavar="NAME")
    ] = None,
    ignore_missing: Annotated[
        bool, typer.Option("--ignore-missing", help="Pass over keys and shards that are not there.")
    ] = False,
    publish: Publish = True,
    *,
    settings: Config,
) -> Result:
    """Have samples no longer found: the next version names them as removed, and keeps all other ids.

    Example: hhnet index remove --index index --key cat/0001 --keys gone.txt --shard photos-000007.tar
    """
    wanted = [*(key or ()), *(_read_keys(keys) if keys else ())]
    if not (wanted or shard or keys):
        raise UsageError("nothing to remove: give --key, --keys or --shard")
    from pipelines.index.update import remove_rows as work

    return work(index, settings, wanted, shard or (), ignore_missing=ignore_missing, publish=publish)


def _read_keys(file: Path) -> list[str]:
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--keys {file} cannot be read: {error}") from None
    # Not splitlines: it also cuts at characters that a key may hold.
    return [key for line in text.split("\n") if (key := line.removesuffix("\r"))]


@dataclass(frozen=True, kw_only=True)
class CompactFlags(Flags):
    """Flags of `hhnet index compact`."""

    index: Index
    workers: Workers = None
    publish: Publish = True

    def settings(self) -> dict[str, Any]:
        """Return the settings that flags stand for."""
        return {"index.workers": self.workers}


@verb(index_app, "compact")
def index_compact(flags: CompactFlags, settings: Config) -> Result:
    """Build the parts that hold removed samples anew without them; ids and answers stay.

    Example: hhnet index compact --index index
    """
    from pipelines.index.update import compact_index as work

    return work(flags.index, settings, publish=flags.publish)


@verb(index_app, "publish")
def index_publish(
    index: IndexItself,
    digest: Annotated[
        str | None, typer.Option(help="Which, if several were made as the next version.", metavar="HEX")
    ] = None,
    *,
    settings: Config,
) -> Result:
    """Let what was made with --no-publish through the gate and make it current.

    Example: hhnet index publish --index index
    """
    from pipelines.index.publish import publish_index as work

    return work(index, settings, digest=digest)


@verb(index_app, "rollback")
def index_rollback(
    index: IndexItself,
    to: Annotated[int | None, typer.Option(help="A version; default the one before.", min=1, metavar="N")] = None,
) -> Result:
    """Make an older version current again, as a new version; nothing is deleted.

    Example: hhnet index rollback --index index --to 3
    """
    from pipelines.index.publish import rollback_index as work

    return work(index, to=to)


@verb(index_app, "info")
def index_info(index: Index) -> Result:
    """Show the versions of an index, newest first, and the card of the current one.

    Example: hhnet index info --index index
    """
    from pipelines.index.publish import index_info as work

    return work(index)
