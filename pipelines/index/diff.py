"""`hhnet plan`: compares shards, their codes and an index, and names the commands that bring them up to date.

Tars are identified by their sha256. Manifests and receipts are read, and of a tar that was encoded anew since it was
indexed also its codes. Nothing is written.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from pipelines.artifacts.result import Result
from pipelines.artifacts.versions import open_current
from pipelines.encode.codes import open_codes, renumbering, unite_classes
from pipelines.errors import InputError
from pipelines.index.base import require_left_out, same_rows
from pipelines.index.commands import commands
from pipelines.index.corpus import State, look

CHANGES = ("encode", "publish", "add", "replace", "remove")


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
    note: str | None = None
    """Why a change has no command."""

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
    `replace`: a tar whose codes were published anew and are not those that were indexed.

    `status` is `unchanged` where there are no changes, else `pending`. Raises FingerprintMismatch where codes and index
    come from several models, or where an index would have real codes of some of its codes only; InputError where a tar
    comes twice, or new codes of a tar would bring back samples that were removed from the index.
    """
    if not shards and not codes:
        raise InputError("nothing to compare: name shards with --shards, or codes with --codes")
    with ExitStack() as opened:
        state = look(shards, codes, index, opened)
        changes = [*_to_encode(state), *_to_add(state), *_to_replace(state), *_to_remove(state, bool(shards))]
        steps, note = commands(
            state, {name: [entry for entry in changes if entry["change"] == name] for name in CHANGES}, index
        )
        root = state.index or next((entry.artifact for entry in state.sets), None)
    counted = {name: sum(entry["change"] == name for entry in changes) for name in CHANGES}
    return PlanResult.of(
        root or (open_current(shards[0], "shards") if shards else open_codes(codes[0]).artifact),
        "pending" if changes else "unchanged",
        tars=len(state.tars),
        encoded=len(state.codes),
        indexed=len(state.held),
        removed_samples=state.base.reader.removed_samples if state.base else 0,
        **counted,
        changes=changes,
        commands=steps,
        note=note,
    )


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
    """Yield the tars of the index whose codes were published anew and are others now, as after a retry of rejects."""
    base = state.base
    if base is None:
        return
    published_anew = [
        (held, *state.codes[sha256])
        for sha256, held in state.held.items()
        if sha256 in state.codes and state.codes[sha256][0].artifact.digest != held.codes_digest
    ]
    for held, entry, shard in published_anew:
        class_ids = renumbering(unite_classes(base.reader.classes, entry.classes), entry.classes)
        comparable = entry.real_codes == base.reader.real_codes
        known = held.rows + held.compacted
        if shard.rows != known or (comparable and not same_rows(base, held, entry, shard, class_ids)):
            require_left_out(base, held, entry)
            yield _change("replace", shard.name, shard.sha256, shard.rows, entry.artifact.uri)


def _to_remove(state: State, among_tars: bool) -> Iterator[dict[str, Any]]:
    for sha256, held in state.held.items():
        if sha256 not in (state.tars if among_tars else state.codes):
            assert state.index is not None, "what is held is held by an index"
            yield _change("remove", held.shard, sha256, held.rows, state.index.uri)
