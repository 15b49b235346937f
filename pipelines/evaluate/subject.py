"""Says in words what a report measured: the data, the model and its training, as far as their artifacts tell."""

import json
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

from pipelines.artifacts.facts import DIGEST_CHARS_SHOWN, ModelCard, ShardsMeta
from pipelines.artifacts.manifest import Artifact
from pipelines.artifacts.splits import split_part
from pipelines.artifacts.versions import open_input_version
from pipelines.artifacts.words import list_first
from pipelines.encode.codes import CodesSet
from pipelines.errors import HHNetError

CLASSES_NAMED = 6
SETTINGS_NAMED = 6


def find_card(codes: Artifact) -> ModelCard | None:
    """Return the card of the model of `codes`, or None where the model is out of reach."""
    with suppress(HHNetError):
        return ModelCard.of(open_input_version(codes, "model"))
    return None


def describe_model(entry: CodesSet, card: ModelCard | None) -> str:
    """Return network, bits and training in a line, or bits and the model's digest where it is out of reach."""
    if card is None:
        return f"{entry.bits} bits, model {entry.model[:DIGEST_CHARS_SHOWN]}"
    return f"{card.backbone}, {entry.bits} bits, {card.loss}, {card.config.train.epochs:,} epochs"


def describe_change(old: CodesSet, new: CodesSet) -> dict[str, str]:
    """Return the head of an agreement: both models, and the settings in which their trainings differ, as far as known.

    The models are told apart by their settings, since two trainings often have everything else in common.
    """
    cards = {role: find_card(entry.artifact) for role, entry in (("Old", old), ("New", new))}
    facts = {role: describe_model(entry, card) for (role, card), entry in zip(cards.items(), (old, new), strict=True)}
    before, after = (card.settings if card else {} for card in cards.values())
    changed = [
        f"{name} {json.dumps(before[name])} → {json.dumps(after[name])}"
        for name in sorted(before.keys() & after.keys())
        if before[name] != after[name]
    ]
    if changed:
        facts["Changed"] = list_first(changed, SETTINGS_NAMED)
    return facts


def describe_subject(query_set: CodesSet, sets: Sequence[CodesSet], card: ModelCard | None) -> dict[str, str]:
    """Return the head of a report: names and values, without those that are unknown.

    No artifact holds a date, and a date of the run records would give the same codes other reports.
    """
    queries, database = query_set.rows, sum(entry.rows for entry in sets)
    facts = {"Data": f"{queries:,} queries in {database:,} database images, {_classes(query_set, sets)}"}
    split = _split(query_set)
    if split:
        facts["Split"] = split
    if card is None:
        facts["Model"] = describe_model(query_set, None)
    else:
        facts["Model"] = f"{card.backbone}, {query_set.bits} bits"
        facts["Loss"] = card.loss
        if isinstance(card.preprocess.get("size"), int):
            facts["Input"] = f"{card.preprocess['size']} × {card.preprocess['size']} pixels"
        facts["Epochs"] = f"{card.config.train.epochs:,}, the weights are those of epoch {card.metrics.epoch:,}"
    with suppress(PackageNotFoundError):
        facts["Version"] = f"hhnet {version('hhnet')}"
    return facts


def _classes(query_set: CodesSet, sets: Sequence[CodesSet]) -> str:
    names = sorted({name for entry in (query_set, *sets) for name in entry.classes})
    return f"{len(names):,} class{'es' if len(names) != 1 else ''}: {list_first(names, CLASSES_NAMED)}"


def _split(query_set: CodesSet) -> str | None:
    """Return the protocol of the queries, or else the rule that chose them, or None where neither is known."""
    protocol = split_part(query_set.artifact)
    if protocol is not None:
        return f"{protocol.name}, part {protocol.part}"
    with suppress(HHNetError):
        spec = open_input_version(query_set.artifact, "shards").facts(ShardsMeta).split
        if spec is not None:
            rule = {"folder": "by its folders", "column": f"by the column {spec.spec}"}.get(spec.by, f"of {spec.spec}")
            return f"{spec.part}, {rule}"
    return None
