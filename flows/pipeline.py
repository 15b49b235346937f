"""The flow, in the order in which data moves: images -> shards -> model -> codes -> index -> report.

One Prefect task per stage; thousands of shards are Ray's business inside it. What is done already is found by the
jobs themselves, so a second run says `unchanged` stage by stage.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from prefect import flow
from prefect.artifacts import create_markdown_artifact

from flows.stages import (
    NAME_CHARS,
    Ref,
    Result,
    encode,
    evaluate,
    index,
    ingest,
    parse,
    publish,
    ref_of,
    rotate,
    train,
    verify,
)
from flows.summary import StageLog, run_report
from pipelines.config import Config
from pipelines.errors import ConfigError


@flow(name="hhnet", persist_result=False, result_serializer="json")
def pipeline(config: dict[str, Any], out: str) -> Result:
    """Build everything below `out` from the settings in `config`, the tree of `--config` as plain JSON.

    Returns every stage's status, uri, digest and seconds, and the run's map, chance, report and images_per_second.
    """
    settings = parse(config)
    run = settings.run
    log = StageLog()

    # images -> shards
    splits: Mapping[str, Any] = {}
    if run.source is not None:
        if run.split is None:
            raise ConfigError("run.source needs run.split, such as train=.8,query=.1,database=.1 or folder")
        source = run.source if "://" in run.source else str(Path(run.source).expanduser())
        splits = log.add(ingest, source, f"{out}/shards", run.split, config)["splits"]
    roles = assign(settings, splits)
    shards = {uri: ref_of(log.add(verify, uri)) for uri in roles.all()}

    # shards -> model
    val = shards[roles.val] if roles.val else None
    model = ref_of(log.add(train, shards[roles.train], val, f"{out}/model", config))
    if (method := settings.train.rotate) != "none":
        model = ref_of(log.add(rotate, model, f"{out}/model-{method}", config))

    # shards, model -> codes
    queries = ref_of(log.add(encode, "query", shards[roles.query], model, f"{out}/codes/query", config))
    database = []
    for uri in roles.database:
        name = codes_name(shards[uri], splits)
        database.append(ref_of(log.add(encode, name, shards[uri], model, f"{out}/codes/{name}", config)))

    # codes -> index -> report; published only when the gate let it pass
    made = ref_of(log.add(index, database, f"{out}/index", config))
    report = log.add(evaluate, queries, database, f"{out}/reports", config)
    log.add(publish, made, config)
    summary = log.summary(report, out)
    create_markdown_artifact(run_report(summary), key="hhnet-report", description="What the run made")
    return summary


class Roles:
    """Which shards artifact (by URI) plays which part."""

    def __init__(self, train: str, val: str | None, query: str, database: tuple[str, ...]) -> None:
        self.train, self.val, self.query, self.database = train, val, query, database

    def all(self) -> list[str]:
        """Every artifact once, in the order of use."""
        uris = [self.train, *([self.val] if self.val else []), self.query, *self.database]
        return list(dict.fromkeys(uris))


def assign(settings: Config, splits: Mapping[str, Any]) -> Roles:
    """Resolve run.train, run.val, run.query and run.database, each a URI or the name of a split just ingested.

    A role that is not set is the split of its own name.
    """
    run = settings.run

    def resolve(role: str, value: str | None) -> str:
        name = value or role
        if name in splits:
            return cast(str, splits[name]["uri"])
        if value is None:
            known = f"; the splits are {', '.join(sorted(splits))}" if splits else ""
            raise ConfigError(f"run.{role} is not set: name the shards for it{known}")
        return value

    database = run.database or (None,)
    return Roles(
        resolve("train", run.train),
        resolve("val", run.val) if run.val else None,
        resolve("query", run.query),
        tuple(resolve("database", value) for value in database),
    )


def codes_name(shards: Ref, splits: Mapping[str, Any]) -> str:
    """Where the codes of a database lie below OUT/codes: its place among the others, which changes, does not count."""
    split = next((name for name, found in splits.items() if found["uri"] == shards["uri"]), None)
    return "database" if split == "database" else f"database-{split or shards['digest'][:NAME_CHARS]}"
