"""Names the commands that bring codes and an index up to date: each is accepted once those before it have run."""

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from pipelines.artifacts.facts import CodesMeta
from pipelines.artifacts.manifest import Artifact, open_artifact, read_identity
from pipelines.config.fingerprint import config_of, result_settings
from pipelines.config.settings import Config
from pipelines.encode.codes import CodesSet, require_pair
from pipelines.encode.job import plan_encode
from pipelines.errors import FingerprintMismatch, InputError
from pipelines.index.alias import index_root
from pipelines.index.build import kind_begun_with
from pipelines.index.corpus import State
from pipelines.storage import Store

SHA_CHARS_SHOWN = 12

Changes = Mapping[str, Sequence[Mapping[str, Any]]]
"""The entries of `plan`'s list of changes, by their `change`."""


@dataclass(frozen=True)
class _Source:
    """Codes that a command of the index names; `held` is None where they are made by an `encode` before it."""

    uri: str
    tars: frozenset[str]
    """The sha256 of their tars."""
    held: CodesSet | None


def commands(state: State, changes: Changes, index: str | None) -> tuple[list[str], str | None]:
    """Return the commands to run, in order, and why a change has none, if so.

    A word in capitals stands for a value that is not known here. Raises FingerprintMismatch, naming both, where an
    index would have real codes of some of its codes only.
    """
    steps, sources = [], dict[str, _Source]()
    sets = {entry.artifact.uri: entry for entry in state.sets}
    for change in (*changes["add"], *changes["replace"]) if index is not None else ():
        entry = sets[change["where"]]
        sources[entry.artifact.uri] = _Source(entry.artifact.uri, _tars(entry), entry)
    to_encode = list(dict.fromkeys(change["where"] for change in (*changes["encode"], *changes["publish"])))
    for number, uri in enumerate(to_encode, start=1):
        shards = next(tar.shards for tar in state.tars.values() if tar.shards.uri == uri)
        out, command = _encode(state, shards, f"CODES-{number}" if "CODES" in sources else "CODES")
        steps.append(command)
        before = _tars(sets[out]) if out in sets else frozenset()
        tars = frozenset(sha256 for sha256, tar in state.tars.items() if tar.shards.uri == uri)
        sources[out] = _Source(out, tars | before, None)
    if index is None:
        return steps, None
    joined = [sets[uri] for uri in sources if uri in sets]
    base = state.made[:1] if state.base else []
    for other in joined:
        require_pair((base or joined)[0], other, one_index=True)
    updates, note = _index_commands(state, changes, index, list(sources.values()))
    return [*steps, *updates], note


def _tars(entry: CodesSet) -> frozenset[str]:
    return frozenset(shard.sha256 for shard in entry.shards)


# --------------------------------------------------------------------------------------------------------- encode


def _encode(state: State, shards: Artifact, otherwise: str) -> tuple[str, str]:
    """Return the place for the codes of these shards, and the command that makes them there.

    `otherwise` stands for the place if none is known, or if something else was begun at the known one.
    """
    model = next((found for entry in state.made if (found := _model_of(entry))), None)
    out, named = state.planned.get(shards.uri), model.uri if model else "MODEL"
    settings: Mapping[str, Any] = _usual_settings(state)
    if out is not None:
        with suppress(FileNotFoundError):  # nothing was begun there
            begun = _begun_with(state, shards, Store(out), model)
            out, named, settings = (out, *begun) if begun else (None, named, settings)
    out = out or otherwise
    usual = result_settings(Config(), "codes")
    chosen = [f"{name}={json.dumps(value)}" for name, value in settings.items() if value != usual.get(name)]
    sets = [word for text in chosen for word in ("--set", text)]
    return out, shlex.join(["hhnet", "encode", "--shards", shards.uri, "--model", named, "--out", out, *sets])


def _model_of(entry: CodesSet) -> Artifact | None:
    """Return the model of these codes, or None if it is not at the place that they remember."""
    with suppress(InputError):
        if (uri := entry.artifact.origin("model")) and (model := open_artifact(uri, "model")).digest == entry.model:
            return model
    return None


def _usual_settings(state: State) -> dict[str, Any]:
    """Return the settings of an encode whose codes can be in one index with those that are there."""
    return {"encode.real_codes": bool(state.made and state.made[0].real_codes)}


def _begun_with(
    state: State, shards: Artifact, out: Store, model: Artifact | None
) -> tuple[str, Mapping[str, Any]] | None:
    """Return the model and settings with which an encode goes on at `out`, or None if no known ones would.

    Raises FileNotFoundError where nothing was begun.
    """
    kind, mark = read_identity(out)
    own = next((entry for entry in state.sets if entry.artifact.uri == out.uri), None)
    tried = [_usual_settings(state)]
    tried += [] if state.made else [{"encode.real_codes": True}]
    tried += [entry.artifact.facts(CodesMeta).settings for entry in ([own] if own else state.sets)]
    models = [model] if model else list(_remembered_model(out))
    for one in models if kind == "codes" else ():
        for settings in tried:
            if plan_encode(shards, one, out.uri, config_of(settings)).fingerprint == mark:
                return one.uri, settings
    return None if models or kind != "codes" else ("MODEL", tried[-1] if own else tried[0])


def _remembered_model(out: Store) -> Iterator[Artifact]:
    """Yield the model that an unpublished encode at `out` was begun with, if it is still there."""
    with suppress(FileNotFoundError, ValueError, KeyError, TypeError, InputError):
        yield open_artifact(str(json.loads(out.read("origin.json"))["model"]), "model")


# ---------------------------------------------------------------------------------------------------------- index


def _index_commands(
    state: State, changes: Changes, index: str, sources: Sequence[_Source]
) -> tuple[list[str], str | None]:
    """Return the commands that build or change the index, and why a change has none, if so."""
    steps, place = [], index
    to_encode = {change["sha256"] for name in ("encode", "publish") for change in changes[name]}
    known = to_encode & set(state.held)
    replaced = {change["where"] for change in changes["replace"]}
    for number, group in enumerate(_without_shared_tars(sources)):
        named = [word for source in group for word in ("--codes", source.uri)]
        if state.base is None and number == 0:
            place, kind = _place_to_build(index, group)
            steps.append(shlex.join(["hhnet", "index", "build", *named, "--out", place, *kind]))
        else:
            # A tar that is encoded again may get other codes than it had, for example on another machine.
            again = any(source.held is None and source.tars & known for source in group)
            how = ["--replace"] if again or any(source.uri in replaced for source in group) else []
            steps.append(shlex.join(["hhnet", "index", "add", "--index", place, *named, *how]))
        known |= {sha256 for source in group for sha256 in source.tars}
    if not changes["remove"]:
        return steps, None
    away = {change["sha256"] for name in ("replace", "remove") for change in changes[name]}
    live = [state.base.reader.live(held) for sha256, held in state.held.items() if sha256 not in away and state.base]
    coming = [change["samples"] for name in ("add", "replace", "encode", "publish") for change in changes[name]]
    if not sum(live) + sum(coming):  # an index is never empty
        return steps, f"no code would be left in {index}: name what it shall hold, or delete the whole index"
    gone = [word for change in changes["remove"] for word in ("--shard", change["sha256"][:SHA_CHARS_SHOWN])]
    # After `add`, since an index must not be empty in between either.
    return [*steps, shlex.join(["hhnet", "index", "remove", "--index", index, *gone])], None


def _without_shared_tars(sources: Sequence[_Source]) -> list[list[_Source]]:
    """Group the codes in their order; those of one command have no tar in common, and together at least one code."""
    groups: list[list[_Source]] = []
    for source in sources:
        if not groups or any(source.tars & other.tars for other in groups[-1]):
            groups.append([])
        groups[-1].append(source)
    return [group for group in groups if any(source.held is None or source.held.rows for source in group)]


def _place_to_build(index: str, group: Sequence[_Source]) -> tuple[str, list[str]]:
    """Return the root to build at, and the flag of the kind that an unpublished index of these codes has there."""
    sets = [source.held for source in group if source.held is not None]
    try:
        kind = kind_begun_with(sets, index_root(index), Config())
    except (FingerprintMismatch, InputError):  # something else was begun there
        return "INDEX", []
    if kind is not None and len(sets) < len(group):  # it was begun without the codes to come
        return "INDEX", []
    return index, ["--kind", kind] if kind not in (None, Config().index.kind) else []
