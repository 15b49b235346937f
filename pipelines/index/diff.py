"""`hhnet plan`: compares shards, their codes and an index, and names the commands that bring them up to date.

Tars are identified by their sha256. Only manifests and receipts are read, and nothing is written.
"""

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from pipelines.artifacts.commit import list_versions
from pipelines.artifacts.facts import IndexMeta, ShardsMeta
from pipelines.artifacts.manifest import Artifact
from pipelines.artifacts.result import Result
from pipelines.artifacts.versions import open_current, read_all_manifests
from pipelines.encode.codes import CodesSet, CodesShard, open_codes, require_distinct_tars, require_pair
from pipelines.encode.receipts import read_whole_receipts
from pipelines.errors import InputError
from pipelines.index.alias import index_root
from pipelines.index.reader import REMOVED_NAME, IndexedShard, part_receipt, read_ordinals
from pipelines.shards.shards import INDEX_NAME, tar_name
from pipelines.storage import Store, map_in_order

CHANGES = ("encode", "publish", "add", "replace", "remove")
SHA_CHARS_SHOWN = 12


@dataclass(frozen=True)
class Tar:
    """A tar of a shards artifact."""

    name: str
    sha256: str
    samples: int
    shards: Artifact


@dataclass
class State:
    """The tars, their codes, and the parts of the index as they are now, each by the tar's sha256."""

    tars: dict[str, Tar] = field(default_factory=dict)
    codes: dict[str, tuple[CodesSet, CodesShard]] = field(default_factory=dict)
    held: dict[str, IndexedShard] = field(default_factory=dict)
    sets: list[CodesSet] = field(default_factory=list)
    index: Artifact | None = None
    waiting: dict[str, str] = field(default_factory=dict)
    """URI of the complete but unpublished codes of a tar, by the tar's sha256."""
    planned: dict[str, str] = field(default_factory=dict)
    """URI for the codes of shards, by the URI of the shards.

    It is the place of their older codes if the shards have grown since, or the place named with them if there are none.
    """


@dataclass(frozen=True, kw_only=True)
class PlanResult(Result):
    """The number of encoded and indexed tars, the changes to make, and the commands that make them."""

    TABLES = ("changes",)
    HIDDEN = ("commands",)

    verb: str = "plan"
    tars: int
    encoded: int
    indexed: int
    removed_samples: int
    encode: int
    publish: int
    add: int
    replace: int
    remove: int
    changes: list[dict[str, Any]]
    commands: list[str]

    def as_text(self) -> str:
        """Return the facts and changes, and below them the commands."""
        commands = ["", "next:", *(f"  {command}" for command in self.commands)] if self.commands else []
        return "\n".join([super().as_text(), *commands])


def plan_changes(shards: Sequence[str], codes: Sequence[str] = (), index: str | None = None) -> PlanResult:
    """Compare tars with their codes and with an index; codes and an index that do not exist yet count as empty.

    Each of `changes` has a `change`:
    `encode`: a tar without codes; `changed` is the sha256 of the older tar with the same name, if there was one.
    `publish`: a tar that an unpublished encode has finished; the same `hhnet encode` goes on from there.
    `add`: codes that the index lacks.
    `remove`: a tar that the index holds and no shards have; without named shards, one that no codes have.
    `replace`: a tar whose codes were published anew with more or fewer rows than were indexed; an equal number counts
    as unchanged here, and `index add` compares the codes.

    `status` is `unchanged` where there are no changes, else `pending`. Raises FingerprintMismatch where codes and index
    come from several models, InputError where a tar comes twice.
    """
    if not shards and not codes:
        raise InputError("nothing to compare: name shards with --shards, or codes with --codes")
    state = _look(shards, codes, index)
    changes = [*_to_encode(state), *_to_add(state), *_to_replace(state), *_to_remove(state, bool(shards))]
    root = state.index or next((entry.artifact for entry in state.sets), None) or open_current(shards[0], "shards")
    parts = state.index.manifest.parts if state.index else ()
    counted = {name: sum(entry["change"] == name for entry in changes) for name in CHANGES}
    return PlanResult.of(
        root,
        "pending" if changes else "unchanged",
        tars=len(state.tars),
        encoded=len(state.codes),
        indexed=len(state.held),
        removed_samples=sum(part.rows for part in parts if part.name == REMOVED_NAME),
        **counted,
        changes=changes,
        commands=list(_commands(state, changes, index)),
    )


# ----------------------------------------------------------------------------------------------------------- look


def _look(shards: Sequence[str], codes: Sequence[str], index: str | None) -> State:
    state = State()
    for artifact in (open_current(uri, "shards") for uri in shards):
        for part in artifact.manifest.parts:
            if part.name != INDEX_NAME:
                tar = Tar(tar_name(part), part.sha256, part.rows, artifact)
                first = state.tars.setdefault(tar.sha256, tar)
                if first is not tar:
                    raise InputError(
                        f"{first.shards.uri} ({first.name}) and {artifact.uri} ({tar.name}) hold the same tar: name it "
                        "once"
                    )
    there = [uri for uri in codes if Store(uri).size("manifest.json") is not None]
    if len(shards) == len(codes):
        state.planned = {Store(uri).uri: out for uri, out in zip(shards, codes, strict=True) if out not in there}
    state.sets = [open_codes(uri) for uri in there]
    for uri in codes:
        if uri not in there:
            state.waiting |= dict.fromkeys(_encoded_tars(Store(uri)), uri)
    state.planned |= dict(_outgrown(state))
    require_distinct_tars(state.sets)
    state.codes = {shard.sha256: (entry, shard) for entry in state.sets for shard in entry.shards}
    if index is not None and list_versions(root := index_root(index)):
        state.index = open_current(root, "index")
        state.held = {shard.shard_sha256: shard for shard in read_ordinals(state.index).values() if shard.rows}
    sets = state.sets
    if state.index is not None:
        meta = state.index.facts(IndexMeta)
        sets = [CodesSet(state.index, meta.bits, (), meta.has_real_codes), *sets]
    for one, other in pairwise(sets):
        require_pair(one, other)
    return state


def _outgrown(state: State) -> Iterator[tuple[str, str]]:
    """Yield shards that have grown since they were encoded, with their codes, each by its URI."""
    for shards in {tar.shards.uri: tar.shards for tar in state.tars.values()}.values():
        if shards.facts(ShardsMeta).grown_from:
            known = {version.digest for version in read_all_manifests(shards.store).values()}
            for entry in state.sets:
                if entry.artifact.manifest.input("shards").digest in known:
                    yield shards.uri, entry.artifact.uri


def _encoded_tars(store: Store) -> list[str]:
    """Return the sha256 of the tars that an unpublished encode has finished."""
    names = [name.removeprefix("receipts/").removesuffix(".json") for name in store.names("receipts")]
    return [receipt.shard_sha256 for receipt in read_whole_receipts(store, names).values()]


# -------------------------------------------------------------------------------------------------------- compare


def _change(change: str, shard: str, sha256: str, samples: int, where: str, **more: Any) -> dict[str, Any]:
    return {"change": change, "shard": shard, "sha256": sha256, "samples": samples, "where": where, **more}


def _to_encode(state: State) -> Iterator[dict[str, Any]]:
    gone = {shard.name: sha256 for sha256, (_, shard) in state.codes.items() if sha256 not in state.tars}
    for sha256, tar in state.tars.items():
        if sha256 not in state.codes:
            before = {"changed": gone[tar.name]} if tar.name in gone else {}
            change = "publish" if sha256 in state.waiting else "encode"
            yield _change(change, tar.name, sha256, tar.samples, tar.shards.uri, **before)


def _to_add(state: State) -> Iterator[dict[str, Any]]:
    for sha256, (entry, shard) in state.codes.items():
        wanted = not state.tars or sha256 in state.tars
        if wanted and shard.rows and sha256 not in state.held:
            yield _change("add", shard.name, sha256, shard.rows, entry.artifact.uri)


def _to_replace(state: State) -> Iterator[dict[str, Any]]:
    """Yield the tars of the index whose codes were published anew with another number of rows.

    A retry of rejects publishes more codes of a tar. A compaction leaves some out, and its receipt says how many.
    """
    index, known = state.index, state.codes.keys() & state.held.keys()
    if index is None:
        return
    published_anew = [
        (sha256, held)
        for sha256, held in state.held.items()
        if sha256 in known and state.codes[sha256][0].artifact.digest != held.codes_digest
    ]
    receipts = map_in_order(lambda one: part_receipt(index, one[1].ordinal), published_anew)
    for (sha256, held), receipt in zip(published_anew, receipts, strict=True):
        entry, shard = state.codes[sha256]
        if shard.rows != held.rows + receipt.compacted:
            yield _change("replace", shard.name, sha256, shard.rows, entry.artifact.uri)


def _to_remove(state: State, among_tars: bool) -> Iterator[dict[str, Any]]:
    for sha256, held in state.held.items():
        if sha256 not in (state.tars if among_tars else state.codes):
            assert state.index is not None, "what is held is held by an index"
            yield _change("remove", held.shard, sha256, held.rows, state.index.uri)


# ------------------------------------------------------------------------------------------------------- commands


def _commands(state: State, changes: Sequence[dict[str, Any]], index: str | None) -> Iterator[str]:
    """Yield the commands to run, in order; a word in capitals stands for a value that is not known here."""
    of = {name: [entry for entry in changes if entry["change"] == name] for name in CHANGES}
    waiting = list(dict.fromkeys(entry["where"] for entry in (*of["encode"], *of["publish"])))
    model = next((uri for entry in state.sets if (uri := entry.artifact.origin("model"))), "MODEL")
    new = []
    for uri in waiting:
        new.append(out := state.planned.get(uri, "CODES"))
        yield shlex.join(["hhnet", "encode", "--shards", uri, "--model", model, "--out", out])
    if index is None:
        return
    sources = list(dict.fromkeys([*(entry["where"] for entry in (*of["add"], *of["replace"])), *new]))
    named = [word for uri in sources for word in ("--codes", uri)]
    if state.index is None:
        yield shlex.join(["hhnet", "index", "build", *named, "--out", index])
        return
    if named:
        how = ["--replace"] if of["replace"] else []
        yield shlex.join(["hhnet", "index", "add", "--index", index, *named, *how])
    if of["remove"]:  # after `add`, since an index must never be empty in between
        gone = [word for entry in of["remove"] for word in ("--shard", entry["sha256"][:SHA_CHARS_SHOWN])]
        yield shlex.join(["hhnet", "index", "remove", "--index", index, *gone])
