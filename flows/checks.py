"""Checks of a run's settings and places, made before Prefect, Ray or torch is imported: a mistake is found at once."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

from pipelines.artifacts.versions import open_current
from pipelines.cluster.access import refuse_credentials, require_ray_token
from pipelines.cluster.session import ray_address
from pipelines.config.settings import Config, RunSettings
from pipelines.errors import ConfigError, InputError, StoreRefused
from pipelines.index.kinds import require_index_kind
from pipelines.ingest.split import parse_split
from pipelines.storage import Store
from pipelines.train.preconditions import check_training, require_weights


def check_names(settings: Config) -> None:
    """Raise ConfigError for an index kind, loss, network, weight tag or image size that does not exist."""
    require_index_kind(settings.index.kind, "auto")
    check_training(settings)


def check_access(settings: Config) -> None:
    """Raise UsageError for credentials in the settings, which Prefect would keep, or for a Ray without a token.

    Raises ModuleNotFoundError without Prefect, before any work.
    """
    if find_spec("prefect") is None:
        raise ModuleNotFoundError("No module named 'prefect'", name="prefect")
    refuse_credentials("the configuration (or --out)", settings.model_dump_json())
    require_ray_token(ray_address(settings))


def check_places(settings: Config, out: str) -> None:
    """Raise UsageError for weights, a source, split or shards that a run cannot use, or for a bucket that is not there.

    A deployment does not ask this: what its runs need may come before the first of them.
    """
    require_weights(settings)
    run = settings.run
    splits: Mapping[str, Any] | None = {}
    if run.source is not None:
        shares = parse_split(require_split(run)).shares
        splits = {name: {"uri": f"{out}/shards/{name}"} for name, _ in shares} or None  # None: known by the ingest
        if "://" not in run.source and not Path(run.source).expanduser().exists():
            raise InputError(f"run.source {run.source} does not exist: name a folder, zip, tar or table of images")
    if splits is not None:
        own = {split["uri"] for split in splits.values()}
        for uri in assign_roles(run, splits).all():
            if uri not in own:
                open_current(uri, "shards")
    store = Store(out)
    if not store.is_local and store.size("model/manifest.json") is None:
        with suppress(StoreRefused):  # not every key may list a whole bucket
            store.require_bucket()


def require_split(run: RunSettings) -> str:
    """Return how the source of a run is split. Raises ConfigError where it is not set."""
    if run.split is None:
        raise ConfigError("run.source needs run.split, such as train=.8,query=.1,database=.1 or folder")
    return run.split


@dataclass(frozen=True)
class Roles:
    """The URIs of the shards artifacts by role."""

    train: str
    val: str | None
    query: str
    database: tuple[str, ...]

    def all(self) -> list[str]:
        """Return every artifact once, in the order of use."""
        uris = [self.train, *([self.val] if self.val else []), self.query, *self.database]
        return list(dict.fromkeys(uris))


def assign_roles(run: RunSettings, splits: Mapping[str, Any]) -> Roles:
    """Resolve run.train, run.val, run.query and run.database, each a URI or the name of a split just ingested.

    A role that is not set is the split of its own name.
    """

    def resolve(role: str, value: str | None) -> str:
        name = value or role
        if name in splits:
            return cast(str, splits[name]["uri"])
        if value is None:
            known = f"; the splits are {', '.join(sorted(splits))}" if splits else ""
            raise ConfigError(f"run.{role} is not set: name the shards for it{known}")
        return value

    train, val = resolve("train", run.train), resolve("val", run.val) if run.val else None
    query, databases = resolve("query", run.query), run.database or (None,)
    return Roles(train, val, query, tuple(resolve("database", value) for value in databases))
