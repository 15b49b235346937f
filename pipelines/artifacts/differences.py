"""Says how the run that a root was begun with differs from the one that would write there now, by name and value."""

import json
from collections.abc import Iterable, Iterator, Mapping
from functools import reduce
from typing import Any

from pipelines.artifacts.manifest import ArtifactInput, open_artifact
from pipelines.artifacts.runs import Record, read_first_begins
from pipelines.errors import HHNetError
from pipelines.storage import Store

SHOWN = 3
"""Number of differences that a message names."""

_UNKNOWN = object()


def describe_differences(
    store: Store,
    fingerprint: str,
    settings: Mapping[str, Any],
    inputs: Iterable[ArtifactInput],
    origin: Mapping[str, str],
) -> str:
    """Return the differences between a root that was begun with `fingerprint` and what a run would make there.

    `settings` are the run's by dotted name, `origin` are the places of its `inputs` by role. Those of the root come
    from its run records and origin.json, which no digest covers; what they lack is not compared.
    """
    found = [*_inputs(store, inputs, origin), *_settings(store, fingerprint, settings)]
    if not found:
        return f"fingerprint {fingerprint[:12]} there: its inputs had other contents, or another hhnet made it"
    more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return "; ".join(found[:SHOWN]) + more


def _settings(store: Store, fingerprint: str, settings: Mapping[str, Any]) -> Iterator[str]:
    begins = read_first_begins(store)
    record = next((one for one in begins if one.get("fingerprint") == fingerprint), begins[0] if begins else {})
    for name, value in settings.items():
        before = _value_in(record, name)
        if before is not _UNKNOWN and before != value:
            yield f"{name} = {_shown(before)} there, {_shown(value)} here"


def _value_in(record: Record, name: str) -> Any:
    """Return a setting of a run record by its dotted name, or another fact of it."""
    if "." not in name:
        return record.get(name, _UNKNOWN)
    tree: Any = record.get("settings", _UNKNOWN)
    return reduce(lambda node, key: node.get(key, _UNKNOWN) if isinstance(node, dict) else node, name.split("."), tree)


def _inputs(store: Store, inputs: Iterable[ArtifactInput], origin: Mapping[str, str]) -> Iterator[str]:
    try:
        places = json.loads(store.read("origin.json"))
    except (FileNotFoundError, ValueError):
        places = {}
    try:
        digests = {entry.role: entry.digest for entry in open_artifact(store).manifest.inputs}
    except HHNetError:  # nothing is committed yet
        digests = {}
    for role in dict.fromkeys([*places, *origin]) if places else ():
        before, now = places.get(role), origin.get(role)
        if before != now:
            yield f"{role} = {_shown(before)} there, {_shown(now)} here"
    for entry in inputs:
        moved = places.get(entry.role) != origin.get(entry.role)
        if not moved and digests.get(entry.role, entry.digest) != entry.digest:
            yield f"{entry.role} = {digests[entry.role][:12]} there, {entry.digest[:12]} here (by digest)"


def _shown(value: Any) -> str:
    return "unset" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
