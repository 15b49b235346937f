"""`hhnet dedupe`: near-duplicates among codes, as pairs within a radius and as the components that these join.

Only those that the pictures confirm can be dropped, unless `dedupe.same_code` asks for all.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, ClassVar

import pyarrow.compute as pc

from pipelines.artifacts.commit import ArtifactWriter
from pipelines.artifacts.facts import DuplicatesMeta, ModelCard
from pipelines.artifacts.manifest import Artifact, Facts, fingerprint
from pipelines.artifacts.parquet import parquet_bytes, table_of_rows
from pipelines.artifacts.result import Result
from pipelines.artifacts.tables import read_table
from pipelines.artifacts.versions import find_finished, open_current, open_input_version
from pipelines.config.fingerprint import result_settings
from pipelines.config.settings import Config, DedupeSettings
from pipelines.dedupe.confirm import find_shards, read_looks
from pipelines.dedupe.source_tars import SourceTar, list_source_tars
from pipelines.dedupe.tables import (
    COMPONENTS_PREFIX,
    COMPONENTS_SCHEMA,
    SHARDS_NAME,
    SHARDS_SCHEMA,
    SIZES,
    Sizes,
    list_parts,
)
from pipelines.encode.codes import CodesSet, open_codes, require_distinct_tars
from pipelines.errors import HHNetError, InputError
from pipelines.index.alias import index_root
from pipelines.index.reader import IndexReader
from pipelines.storage import Store, scratch_folder

_log = logging.getLogger(__name__)

AGAINST_ROLE = "against"
EXAMPLES = 10
"""Droppable samples that the result names."""
MANY_DROPPABLE = 0.05
"""Share of droppable samples above which a warning asks to look at them first."""


@dataclass(frozen=True, kw_only=True)
class DedupeResult(Result):
    """Samples compared, pairs found, the components they form, and the samples of these that have a twin, by evidence.

    `same_code_only` includes `unread`, the samples whose picture cannot be read.
    """

    HIDDEN: ClassVar[tuple[str, ...]] = ("warnings",)  # they are on stderr already
    TABLES: ClassVar[tuple[str, ...]] = ("examples",)

    verb: str = "dedupe"
    radius: int
    samples: int
    indexed: int
    pairs: int
    groups: int
    components: int
    droppable: int
    same_bytes: int
    look_alike: int
    same_code_only: int
    unread: int
    examples: list[dict[str, str]]
    """The first droppable samples: the key to drop, that of the sample it is like, and what they have in common."""
    warnings: list[str] | None = None


def dedupe(
    codes: Sequence[str],
    out: str,
    config: Config,
    against: str | None = None,
    shards: Sequence[str] = (),
    sizes: Sizes = SIZES,
) -> DedupeResult:
    """Find the near-duplicates among the codes artifacts `codes`, or also between them and the index `against`.

    Tars that the index holds are passed over. `shards` are further places of the pictures. Raises FingerprintMismatch
    if the codes, the index or the shards are of other models, lengths or samples; InputError if a tar comes twice;
    ConfigError if the samples do not fit `dedupe.memory`; WorkFailed above `dedupe.max_pairs`.
    """
    if not codes:
        raise InputError("no codes to compare: name at least one codes artifact with --codes")
    sets = [open_codes(uri) for uri in codes]
    index = open_current(index_root(against), "index") if against is not None else None
    pictures, problems = find_shards(sets, index, shards)
    settings = result_settings(config, "duplicates")
    digests: dict[str, Any] = {"codes": [entry.artifact.digest for entry in sets]}
    digests |= {AGAINST_ROLE: index.digest} if index else {}
    # Without the pictures the result is another one, so it has another name.
    digests |= {"shards": [artifact.digest for artifact in pictures]} if pictures else {}
    name = fingerprint("duplicates", digests, settings)
    artifact, status = find_finished(Store(out), "duplicates", name), "unchanged"
    if artifact is None:
        require_distinct_tars(sets)
        named = {f"codes-{number}": entry.artifact for number, entry in enumerate(sets)}
        named |= {AGAINST_ROLE: index} if index else {}
        named |= {f"shards-{number}": artifact for number, artifact in enumerate(pictures)}
        with scratch_folder() as folder:
            sources = list_source_tars(sets, IndexReader(index, folder) if index else None)
            writer = ArtifactWriter.of(Store(out), "duplicates", name, named, settings)
            artifact = _find_duplicates(writer, sets, sources, pictures, config.dedupe, sizes)
        status = "done"
    warnings = _warnings(artifact, sets[0], problems)
    for text in warnings:
        _log.warning("warning: %s", text)
    radius = artifact.facts(DuplicatesMeta).radius
    examples = list(islice(_list_droppable(artifact), EXAMPLES))
    totals = artifact.manifest.totals
    return DedupeResult.of(artifact, status, radius=radius, **totals, examples=examples, warnings=warnings or None)


def _list_droppable(artifact: Artifact) -> Iterator[dict[str, str]]:
    for part in list_parts(artifact, COMPONENTS_PREFIX):
        table = read_table(artifact.store, part, COMPONENTS_SCHEMA)
        keys = dict(zip(table["id"].to_pylist(), table["key"].to_pylist(), strict=True))
        for row in table.filter(pc.invert(table["keep"])).to_pylist():
            yield {"drop": row["key"], "like": keys.get(row["twin"], "-"), "match": row["match"]}


def _find_duplicates(
    writer: ArtifactWriter,
    sets: Sequence[CodesSet],
    sources: Sequence[SourceTar],
    pictures: Sequence[Artifact],
    settings: DedupeSettings,
    sizes: Sizes,
) -> Artifact:
    # Imported here, since these load numba, and an unchanged result does not need it.
    from pipelines.dedupe.components import join_pairs, write_components
    from pipelines.dedupe.corpus import read_corpus
    from pipelines.dedupe.pairs import PairSearch, find_leaders, require_memory

    bits, places = sets[0].bits, [source.place for source in sources]
    require_memory(sum(place.rows for place in places), settings)
    with scratch_folder() as folder:
        corpus = read_corpus(sources, (bits + 7) // 8, folder)
        leaders = find_leaders(corpus, settings.memory, folder, sizes.unit)
        receipts = PairSearch(writer, corpus, leaders, settings, folder, sizes).run()
        pairs = [part for name in sorted(receipts) for part in receipts[name].parts]
        forest = join_pairs(writer.draft(pairs, {}, Facts()), pairs, corpus)
        looks = partial(read_looks, places, pictures, folder, settings.threads)
        found = write_components(writer, forest, corpus, looks, settings, folder, sizes)
    totals = {
        "samples": corpus.count - corpus.known,
        "indexed": corpus.known,
        "pairs": sum(part.rows for part in pairs),
        "groups": leaders.groups,
        **found.totals,
    }
    shards = writer.put_part(SHARDS_NAME, parquet_bytes(table_of_rows(SHARDS_SCHEMA, places)), len(places))
    meta = DuplicatesMeta(radius=settings.radius, bits=bits, same_code=settings.same_code)
    return writer.commit([*pairs, *found.parts, shards], totals, meta, receipts)


def _warnings(artifact: Artifact, codes: CodesSet, problems: Sequence[str]) -> list[str]:
    """Return what to know before samples are dropped: unread pictures, that they are many, and what codes prove.

    `problems` say why some shards cannot be opened.
    """
    totals, asked = artifact.manifest.totals, artifact.facts(DuplicatesMeta).same_code
    droppable, samples, code = totals["droppable"], totals["samples"], totals["same_code_only"]
    found = []
    if totals["unread"] and problems:
        found.append(f"{totals['unread']:,} pictures cannot be read, so they confirm no duplicate: {problems[0]}")
    if droppable > MANY_DROPPABLE * samples:
        many = f"{droppable:,} of {samples:,} samples are droppable ({droppable / samples:.0%})"
        found.append(f"{many}: look at some of them before you remove any")
    if code and (learned := _learned_classes(codes)):
        went = f"these {code:,} are droppable because of dedupe.same_code" if asked else f"the {code:,} are kept"
        reason = f"{learned}, so different pictures of a class may have the same code"
        found.append(f"{reason}: {went}; look at the column match before you remove any")
    return found


def _learned_classes(codes: CodesSet) -> str:
    """Return what the model of the codes learned classes with, or "" if it did not, or is out of reach."""
    try:
        card = ModelCard.of(open_input_version(codes.artifact, "model"))
    except HHNetError:
        return ""
    if not card.classes or card.config.train.teacher:
        return ""
    unit = "class" if len(card.classes) == 1 else "classes"
    return f"the model learned {len(card.classes):,} {unit} with the loss {card.loss}"
