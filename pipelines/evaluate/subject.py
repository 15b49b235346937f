"""Says in words what a report measured: the data, the model and its training, as far as their artifacts tell."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version

from pipelines.artifacts.facts import DIGEST_CHARS_SHOWN, ModelCard, ShardsMeta
from pipelines.artifacts.manifest import Artifact
from pipelines.artifacts.runs import closed_records
from pipelines.artifacts.splits import split_part
from pipelines.artifacts.versions import open_input_version
from pipelines.encode.codes import CodesSet
from pipelines.errors import HHNetError

CLASSES_NAMED = 6


@dataclass(frozen=True)
class Training:
    """The card of a model, and the day on which its training ended (None where no record of it is left)."""

    card: ModelCard
    day: str | None


def find_training(codes: Artifact) -> Training | None:
    """Return what the model of `codes` says of its training, or None where the model is out of reach."""
    with suppress(HHNetError):
        model = open_input_version(codes, "model")
        ends = [
            float(record["ended"])
            for record in closed_records(model.store)
            if record.get("end") == "done" and record.get("fingerprint") == model.manifest.fingerprint
        ]
        day = f"{datetime.fromtimestamp(min(ends), UTC):%Y-%m-%d}" if ends else None
        return Training(ModelCard.of(model), day)
    return None


def describe_model(entry: CodesSet, training: Training | None) -> str:
    """Return network, bits and training in a line, or bits and the model's digest where it is out of reach."""
    if training is None:
        return f"{entry.bits} bits, model {entry.model[:DIGEST_CHARS_SHOWN]}"
    card = training.card
    facts = [card.backbone, f"{entry.bits} bits", card.loss, f"{card.config.train.epochs:,} epochs"]
    return ", ".join([*facts, *([training.day] if training.day else [])])


def describe_subject(query_set: CodesSet, sets: Sequence[CodesSet], training: Training | None) -> dict[str, str]:
    """Return the head of a report: names and values, without those that are unknown."""
    queries, database = query_set.rows, sum(entry.rows for entry in sets)
    facts = {"Data": f"{queries:,} queries in {database:,} database images, {_classes(query_set, sets)}"}
    split = _split(query_set)
    if split:
        facts["Split"] = split
    if training is None:
        facts["Model"] = describe_model(query_set, None)
    else:
        card = training.card
        facts["Model"] = f"{card.backbone}, {query_set.bits} bits"
        facts["Loss"] = card.loss
        if isinstance(card.preprocess.get("size"), int):
            facts["Input"] = f"{card.preprocess['size']} × {card.preprocess['size']} pixels"
        facts["Epochs"] = f"{card.config.train.epochs:,}, the weights are those of epoch {card.metrics.epoch:,}"
        if training.day:
            facts["Trained"] = training.day
    with suppress(PackageNotFoundError):
        facts["Version"] = f"hhnet {version('hhnet')}"
    return facts


def _classes(query_set: CodesSet, sets: Sequence[CodesSet]) -> str:
    names = sorted({name for entry in (query_set, *sets) for name in entry.classes})
    shown = ", ".join(names[:CLASSES_NAMED])
    more = f" and {len(names) - CLASSES_NAMED:,} more" if len(names) > CLASSES_NAMED else ""
    return f"{len(names):,} class{'es' if len(names) != 1 else ''}: {shown}{more}"


def _split(query_set: CodesSet) -> str | None:
    """Return the protocol of the queries, or else the rule that chose them, or None where neither is known."""
    protocol = split_part(query_set.artifact)
    if protocol is not None:
        return f"{protocol.name}, part {protocol.part}"
    with suppress(HHNetError):
        spec = open_input_version(query_set.artifact, "shards").facts(ShardsMeta).split
        if spec is not None:
            return f"{spec.part} of {spec.spec} by {spec.by}"
    return None
