"""`hhnet index add | remove | compact`: change an index by publishing its next version.

A published version is never edited. The next version names unchanged parts again. New shards fill up the last part,
which is rebuilt from its own key table and the new codes, and then further parts, so that several additions give the
parts of one build. A table lists the rows that were removed; compacting rebuilds parts without them, and merges small
parts. The next version is measured like a first one and becomes current in one step. Readers stay on the version that
they opened.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from pipelines.artifacts.commit import ArtifactWriter
from pipelines.artifacts.facts import IndexCard
from pipelines.artifacts.manifest import ArtifactInput, Part, ReceiptRef, remember_origin
from pipelines.artifacts.parquet import parquet_bytes, table_of
from pipelines.artifacts.runs import RunLog
from pipelines.artifacts.versions import next_artifact, publish_manifest, put_manifest, require_parts
from pipelines.cluster.ray_pool import Pool, ray_pool
from pipelines.cluster.submit import on_cluster
from pipelines.config.settings import Config
from pipelines.encode.codes import (
    CodesSet,
    CodesShard,
    open_codes,
    renumbering,
    require_distinct_tars,
    require_pair,
    unite_classes,
)
from pipelines.errors import FingerprintMismatch, InputError
from pipelines.index.base import Base, Rows, open_base, require_left_out, same_rows
from pipelines.index.kinds import NOTHING_REMOVED, Ids
from pipelines.index.layout import (
    NO_PART,
    ORDINALS_NAME,
    QUANTIZER_NAME,
    REMOVED,
    REMOVED_NAME,
    ROW_MASK,
    IndexedPart,
    IndexedShard,
    keys_name,
    part_stem,
)
from pipelines.index.parts import KeptRows, PartTask, ShardSource, pack
from pipelines.index.pool import (
    IndexResult,
    build_parts,
    card_of,
    gated_meta,
    measure_index,
    ordinal_table,
    pass_gate,
    require_parts_of,
    source_of,
    totals_of,
)

OUTGROWN_FACTOR = 4
"""Factor over the codes of the quantizer's training above which the card says that the index has outgrown it."""


@dataclass(frozen=True)
class Change:
    """The differences of the next version: parts to build, and its shards and removed rows."""

    shards: Mapping[int, IndexedShard]
    removed: Mapping[int, Rows]
    tasks: Sequence[PartTask] = ()
    codes: Sequence[CodesSet] = ()
    """Codes artifacts that the new parts come from."""
    facts: dict[str, int] = field(default_factory=dict)
    """Figures about the change for the result."""


# ----------------------------------------------------------------------------------------------------------- verbs


@dataclass(frozen=True, kw_only=True)
class ChangeResult(IndexResult):
    """The next version and its differences: codes and shards added, samples removed, parts that were rebuilt."""

    added: int | None = None
    shards_added: int | None = None
    shards_replaced: int | None = None
    removed: int | None = None
    shards_removed: int | None = None
    compacted: int | None = None
    dropped: int | None = None


@on_cluster("index add", replace_changed="--replace")
def add_codes(
    index: str,
    codes: Sequence[str],
    config: Config,
    publish: bool = True,
    prune: bool = False,
    replace_changed: bool = False,
    pool: Pool = ray_pool,
) -> ChangeResult:
    """Add the tars of `codes` that the index does not hold, and publish the next version.

    A tar that it held before gets its old ordinal again; `unchanged` where there is no new tar. With `prune` the same
    version drops the tars that none of `codes` has. With `replace_changed` a held tar whose codes differ gets the new
    codes in the same version, less the samples that were removed. Raises FingerprintMismatch where the codes are of
    another model or length, or, without `replace_changed`, where the codes of a held tar differ; InputError
    where there are no codes at all.
    """
    if not codes:
        raise InputError("no codes to add: name at least one codes artifact with --codes")
    with open_base(index) as base:
        sets = [open_codes(uri) for uri in codes]
        for entry in sets:
            advice = "add codes that were made like those of the index"
            require_pair(base.reader.as_codes, entry, one_index=True, advice=advice)
        if not any(entry.rows for entry in sets):
            raise InputError(f"{', '.join(entry.artifact.uri for entry in sets)}: there are no codes to add")
        require_distinct_tars(sets)
        change = _adding(base, sets, replace_changed)
        if prune:
            change = _pruned(base, change, {shard.sha256 for entry in sets for shard in entry.shards})
        if not any(change.facts.values()):
            require_parts(base.artifact, base.artifact.manifest.parts, base.number)
        return _apply("index add", base, change, config, publish, pool)


def remove_rows(
    index: str,
    config: Config,
    keys: Sequence[str] | None = None,
    shards: Sequence[str] = (),
    ignore_missing: bool = False,
    publish: bool = True,
) -> ChangeResult:
    """Remove the samples with these keys, and the shards with these names or sha256, in the next version.

    A key in several shards is removed from each; the status is `unchanged` if everything was removed already. Raises
    InputError for a key or a shard that the index does not hold, unless `ignore_missing`, and where nothing would be
    left.
    """
    if keys is None and not shards:
        raise InputError("nothing to remove: name keys with --key or --keys, shards with --shard")
    with open_base(index) as base:
        whole = _named_shards(base, shards, ignore_missing)
        rows = _rows_of(base, keys or (), ignore_missing)
        return _apply("index remove", base, _removing(base, whole, rows), config, publish)


@on_cluster("index compact")
def compact_index(index: str, config: Config, publish: bool = True, pool: Pool = ray_pool) -> ChangeResult:
    """Rebuild the parts with removed rows without these rows, and merge neighbouring parts that fit into one.

    Ids, ordinals and answers stay the same. The rows come from the index's own key tables. A trained quantizer stays.
    `unchanged` where nothing was removed and no parts fit together.
    """
    with open_base(index) as base:
        return _apply("index compact", base, _compacting(base), config, publish, pool)


# ------------------------------------------------------------------------------------------------------------- add


def _adding(base: Base, sets: Sequence[CodesSet], replace_changed: bool) -> Change:
    known = {shard.shard_sha256: shard for shard in base.shards.values()}
    removed, replaced, sources = dict(base.reader.removed), set[int](), list[ShardSource]()
    classes, used, unused = base.reader.classes, list[CodesSet](), max(base.shards) + 1
    for entry in sets:
        new, united = list[ShardSource](), unite_classes(classes, entry.classes)
        class_ids = renumbering(united, entry.classes)
        for shard in entry.shards:
            held = known.get(shard.sha256)
            if held is not None and held.held:
                if same_rows(base, held, entry, shard, class_ids):
                    continue
                if not replace_changed:
                    raise FingerprintMismatch(
                        f"{base.artifact.uri} holds {held.shard} with {held.rows} codes of {held.codes_digest[:12]}, "
                        f"{entry.artifact.uri} is {entry.artifact.digest[:12]} and has others: add --replace to take "
                        "the new ones"
                    )
                removed[held.ordinal] = _still_removed(base, held, entry, shard)
                replaced.add(held.ordinal)
            elif held is not None and not shard.rows:
                continue
            elif held is not None:
                removed.pop(held.ordinal, None)
            new.append(source_of(held.ordinal if held else unused, entry, shard, class_ids))
            unused += held is None
        sources += new
        if new:
            used.append(entry)
            classes = united
    added = sum(source.rows for source in sources if source.ordinal not in replaced)
    filled = sum(source.rows > 0 and source.ordinal not in replaced for source in sources)
    facts = {"added": added, "shards_added": filled}
    if replace_changed:
        facts["shards_replaced"] = len(replaced)
    tasks, placed = _fill_parts(base, sources)
    # Tars without codes get an ordinal when others are added; on their own they do not justify a new version.
    change = Change({**base.shards, **placed}, removed, tasks if added or replaced else (), used, facts)
    return _without(base, change, set())


def _fill_parts(base: Base, sources: Sequence[ShardSource]) -> tuple[list[PartTask], dict[int, IndexedShard]]:
    """Return the parts to build for these shards, and the shards in their parts, by ordinal.

    A shard whose earlier codes are in a part takes their place there. All others go on from the last part.
    """
    reader, inside = base.reader, dict[int, list[ShardSource]]()
    before = {n: base.shards[n] for n in (source.ordinal for source in sources) if n in base.shards}
    new = list[ShardSource]()
    for source in sorted(sources, key=lambda source: source.ordinal):
        if (old := before.get(source.ordinal)) is not None and old.rows:
            inside.setdefault(old.part, []).append(source)
        elif source.rows:
            new.append(source)
    last = max(reader.parts)
    begun = reader.parts[last].rows
    begun += sum(source.rows - before[source.ordinal].rows for source in inside.get(last, ()))
    for source, number in zip(new, pack((one.rows for one in new), reader.meta.part_codes, begun), strict=True):
        inside.setdefault(last + number, []).append(source)
    tasks = []
    for number, members in sorted(inside.items()):
        replaced = [before[one.ordinal] for one in members if one.ordinal in before]
        kept = [_kept(base, part, _ids_of(base, replaced))] if (part := reader.parts.get(number)) else []
        members = [one for one in members if one.rows]
        task = PartTask(number, tuple(members), tuple(one for one in kept if one.rows), later=True)
        tasks += [task] if task.rows else []
    numbers = {one.ordinal: number for number, members in inside.items() for one in members}
    return tasks, {one.ordinal: one.placed(numbers.get(one.ordinal, NO_PART)) for one in sources}


def _kept(base: Base, part: IndexedPart, left_out: Ids) -> KeptRows:
    """Return the rows of a part but for the ids `left_out`."""
    reader = base.reader
    return KeptRows(base.artifact.uri, reader.part(keys_name(part.number)), left_out, reader.bits, reader.real_codes)


def _ids_of(base: Base, shards: Sequence[IndexedShard]) -> Ids:
    """Return the ids of all rows that these shards have in their parts, ascending."""
    tables = [base.reader.read_shard_keys(shard, ["id"]) for shard in sorted(shards, key=lambda one: one.ordinal)]
    return np.concatenate([NOTHING_REMOVED, *(table["id"].to_numpy() for table in tables)])


def _pruned(base: Base, change: Change, wanted: set[str]) -> Change:
    """Return the change without the tars whose sha256 is not `wanted`."""
    gone = {n for n, shard in change.shards.items() if shard.held and shard.shard_sha256 not in wanted}
    return replace(_without(base, change, gone), facts={**change.facts, "shards_removed": len(gone)})


def _still_removed(base: Base, held: IndexedShard, entry: CodesSet, shard: CodesShard) -> Rows:
    """Return the rows of a tar's new codes that the index had removed, by its table or by a compaction."""
    left_out = require_left_out(base, held, entry)
    gone = np.union1d(base.reader.removed.get(held.ordinal, np.empty(0, np.int64)), left_out)
    return np.intersect1d(gone, entry.read(shard)["row"].to_numpy()).astype(np.int64)


# ---------------------------------------------------------------------------------------------------------- remove


def _named_shards(base: Base, names: Sequence[str], ignore_missing: bool) -> set[int]:
    """Return the ordinals of shards by name, or by sha256 (8 digits or more) where several tars have one name."""
    found = set()
    for name in names:
        alike = [
            shard
            for shard in base.shards.values()
            if shard.shard == name or (len(name) >= 8 and shard.shard_sha256.startswith(name))
        ]
        held = [shard for shard in alike if shard.held]
        if len(held) > 1:
            listed = ", ".join(f"{shard.shard_sha256[:12]} (ordinal {shard.ordinal})" for shard in held)
            raise InputError(f"--shard {name} names {len(held)} tars: name one by its sha256, {listed}")
        found |= {shard.ordinal for shard in held or alike}
        if not (alike or ignore_missing):
            near = difflib.get_close_matches(name, [shard.shard for shard in base.shards.values()], 3)
            raise _not_held(base, f"shard {name!r}", near)
    return found


def _not_held(base: Base, what: str, near: Sequence[str]) -> InputError:
    hint = f"; near it are {', '.join(near)}" if near else ""
    return InputError(f"{what} is not in {base.artifact.uri}{hint}: add --ignore-missing to skip it")


def _rows_of(base: Base, keys: Sequence[str], ignore_missing: bool) -> dict[int, Rows]:
    """Return the rows with these keys, ascending, by ordinal."""
    ids, lacking = base.reader.find_ids(keys)
    if not ignore_missing:
        gone = base.reader.removed_keys(lacking)
        for key in lacking:
            if key not in gone:
                raise _not_held(base, f"key {key!r}", base.reader.near_keys(key))
    return {int(ordinal): ids[ids >> 32 == ordinal] & ROW_MASK for ordinal in np.unique(ids >> 32)}


def _removing(base: Base, whole: set[int], rows: Mapping[int, Rows]) -> Change:
    removed = dict(base.reader.removed)
    for ordinal, gone in rows.items():
        removed[ordinal] = np.union1d(removed.get(ordinal, np.empty(0, np.int64)), gone)
    change = _without(base, Change(base.shards, removed), whole)
    left = _count(change.shards, change.removed)
    dropped = sum(base.shards[ordinal].held for ordinal in whole)
    return replace(change, facts={"removed": base.reader.count - left, "shards_removed": dropped})


def _without(base: Base, change: Change, whole: set[int]) -> Change:
    """Return the change without the shards `whole`; raises InputError where no code would be left.

    All their rows are removed; they stay in their part until it is compacted.
    """
    shards, removed = dict(change.shards), dict(change.removed)
    for ordinal in sorted(whole):
        shards[ordinal] = replace(shards[ordinal], compacted=0, held=False)
        removed[ordinal] = _ids_of(base, [shards[ordinal]]) & ROW_MASK
    removed = {ordinal: rows for ordinal, rows in removed.items() if len(rows)}
    if not _count(shards, removed):
        raise InputError(f"{base.artifact.uri}: no code would be left: keep at least one, or delete the whole index")
    return replace(change, shards=shards, removed=removed)


def _count(shards: Mapping[int, IndexedShard], removed: Mapping[int, Rows]) -> int:
    return sum(shard.rows for shard in shards.values()) - sum(len(rows) for rows in removed.values())


# --------------------------------------------------------------------------------------------------------- compact


def _compacting(base: Base) -> Change:
    """Return the change that rebuilds parts without their removed rows, and merges those that fit into one.

    A held shard with no row left stays as a record.
    """
    reader, tasks, numbers = base.reader, list[PartTask](), dict[int, int]()
    left = reader.searched()
    groups: dict[int, list[IndexedPart]] = {}
    for part, number in zip(left, pack(map(reader.live_in, left), reader.meta.part_codes), strict=True):
        groups.setdefault(number, []).append(part)
    for group in groups.values():
        numbers |= dict.fromkeys((part.number for part in group), group[0].number)
        kept = tuple(_kept(base, part, reader.removed_in(part)) for part in group)
        if len(group) > 1 or len(kept[0].left_out):
            tasks.append(PartTask(group[0].number, (), kept, later=True))
    shards = {}
    for ordinal, shard in base.shards.items():
        live = reader.live(shard)
        compacted = shard.compacted + (shard.rows - live if shard.held else 0)
        place = numbers[shard.part] if live else NO_PART
        shards[ordinal] = replace(shard, part=place, rows=live, compacted=compacted)
    compacted = sum(len(task.kept) for task in tasks) + len(reader.parts) - len(left)
    facts = {"compacted": compacted, "dropped": sum(map(len, reader.removed.values()))}
    return Change(shards, {}, tasks, facts=facts)


# ----------------------------------------------------------------------------------------------------- next version


def _apply(verb: str, base: Base, change: Change, config: Config, publish: bool, pool: Pool = ray_pool) -> ChangeResult:
    """Build the missing parts, measure the next version, and publish it; `unchanged` where the figures are all 0."""
    if not any(change.facts.values()):
        return ChangeResult.of(base.artifact, "unchanged", verb=verb, version=base.number, **change.facts)
    number, count = base.number + 1, _count(change.shards, change.removed)
    inputs = _inputs(base, change)
    for entry in change.codes:
        remember_origin(base.artifact.store, entry.artifact.digest, entry.artifact.uri)
    with RunLog(base.artifact.store, verb, config, total=len(change.tasks), unit="parts", **change.facts) as log:
        parts, receipts = _parts(base, change, inputs, config, log, pool)
        classes = unite_classes(base.reader.classes, *(entry.classes for entry in change.codes))
        made = {"classes": classes, "version": number, "card": _card(base, parts, count)}
        meta = base.reader.meta.model_copy(update=made)
        totals = totals_of(change.shards.values(), count)
        changed = {"inputs": [entry.model_dump() for entry in inputs], "meta": meta}
        require_parts(base.artifact, parts, number)
        figures = measure_index(next_artifact(base.artifact, parts, receipts, totals, **changed), config)
        changed["meta"] = gated_meta(meta, figures)
        artifact = next_artifact(base.artifact, parts, receipts, totals, **changed)
        if publish:
            pass_gate(artifact, figures, config, log)
        path = put_manifest(artifact)
        if publish:
            publish_manifest(artifact, path, number)
    return ChangeResult.of(artifact, "done", verb=verb, version=number if publish else None, **change.facts)


def _inputs(base: Base, change: Change) -> list[ArtifactInput]:
    """Return the model and the codes behind the next version's parts; known codes keep their role."""
    held = {shard.codes_digest for shard in change.shards.values() if shard.held}
    inputs = [entry for entry in base.artifact.manifest.inputs if entry.kind != "codes" or entry.digest in held]
    named = {entry.digest for entry in inputs}
    numbers = [int(entry.role.removeprefix("codes-")) for entry in inputs if entry.kind == "codes"]
    new = [entry.artifact.digest for entry in change.codes if entry.artifact.digest in held - named]
    first = max(numbers, default=-1) + 1
    return [
        *(entry for entry in inputs if entry.kind == "codes"),
        *(ArtifactInput(role=f"codes-{n}", kind="codes", digest=digest) for n, digest in enumerate(new, first)),
        *(entry for entry in inputs if entry.kind != "codes"),
    ]


def _parts(
    base: Base, change: Change, inputs: Sequence[ArtifactInput], config: Config, log: RunLog, pool: Pool
) -> tuple[list[Part], list[ReceiptRef]]:
    """Return the parts and receipts of the next version: new ones, unchanged ones, and its tables."""
    manifest, reader = base.artifact.manifest, base.reader
    writer = ArtifactWriter(base.artifact.store, "index", manifest.fingerprint, tuple(inputs), {})
    made = build_parts(writer, reader.meta.kind, reader.parameters, change.tasks, reader.shared, config, log, pool)
    there = writer.store.entries("parts") if made else {}
    receipts: list[ReceiptRef] = []
    parts: list[Part] = []
    for name, receipt in made.items():
        parts += require_parts_of(writer, receipt, reader.shared, there)
        receipts.append(ReceiptRef.of(part_stem(receipt.number), receipt, name))
    kept = {shard.part for shard in change.shards.values() if shard.rows} - {task.number for task in change.tasks}
    names = {QUANTIZER_NAME, *(keys_name(n) for n in kept), *(part_stem(n) + reader.kind.suffix for n in kept)}
    parts += [part for part in manifest.parts if part.name in names]
    stems = {"quantizer", *map(part_stem, kept)}
    receipts += [reference for reference in manifest.receipts if reference.shard in stems]
    parts.append(writer.put_part(ORDINALS_NAME, ordinal_table(change.shards.values()), len(change.shards)))
    if change.removed:
        gone = sorted(change.removed.items())
        columns = {
            "ordinal": np.repeat([ordinal for ordinal, _ in gone], [len(rows) for _, rows in gone]),
            "row": np.concatenate([rows for _, rows in gone]),
        }
        parts.append(writer.put_part(REMOVED_NAME, parquet_bytes(table_of(REMOVED, columns)), len(columns["row"])))
    return parts, receipts


def _card(base: Base, parts: Sequence[Part], count: int) -> IndexCard:
    """Return the card before the gate; it says if the index has outgrown its quantizer's training codes."""
    card, before = card_of(parts, count), base.reader.meta.card
    if base.reader.shared is None:
        return card
    trained, note = before.trained_on or before.count, None
    if count > OUTGROWN_FACTOR * trained:
        note = f"{count / trained:.1f} times the codes that the quantizer was trained on: build anew for more lists"
    return card.model_copy(update={"trained_on": trained, "note": note})
