"""`hhnet dedupe`: near-duplicates among codes, as pairs within a radius and as the components that these join."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.artifacts.commit import ArtifactWriter
from pipelines.artifacts.facts import DuplicatesMeta
from pipelines.artifacts.manifest import Artifact, Facts, fingerprint
from pipelines.artifacts.result import Result
from pipelines.artifacts.tables import parquet_bytes, table_of_rows
from pipelines.artifacts.versions import find_finished, open_current
from pipelines.config.fingerprint import result_settings
from pipelines.config.settings import Config, DedupeSettings
from pipelines.dedupe.source_tars import SourceTar, list_source_tars
from pipelines.dedupe.tables import SHARDS_NAME, SHARDS_SCHEMA, SIZES, Sizes
from pipelines.encode.codes import CodesSet, open_codes, require_distinct_tars
from pipelines.errors import InputError
from pipelines.index.alias import index_root
from pipelines.index.reader import IndexReader
from pipelines.storage import Store, scratch_folder

AGAINST_ROLE = "against"


@dataclass(frozen=True, kw_only=True)
class DedupeResult(Result):
    """Samples compared, those of the index, pairs found, components they form, and samples that can be dropped."""

    verb: str = "dedupe"
    radius: int
    samples: int
    indexed: int
    pairs: int
    groups: int
    components: int
    droppable: int


def dedupe(
    codes: Sequence[str], out: str, config: Config, against: str | None = None, sizes: Sizes = SIZES
) -> DedupeResult:
    """Find the near-duplicates among the codes artifacts `codes`, or also between them and the index `against`.

    Tars that the index holds are passed over. Raises FingerprintMismatch if the codes, or the index, are of other
    models or lengths; InputError if a tar comes twice; ConfigError if the samples do not fit `dedupe.memory`;
    WorkFailed above `dedupe.max_pairs`.
    """
    if not codes:
        raise InputError("no codes to compare: name at least one codes artifact with --codes")
    sets = [open_codes(uri) for uri in codes]
    index = open_current(index_root(against), "index") if against is not None else None
    digests: dict[str, Any] = {"codes": [entry.artifact.digest for entry in sets]}
    digests |= {AGAINST_ROLE: index.digest} if index else {}
    name = fingerprint("duplicates", digests, result_settings(config, "duplicates"))
    artifact = find_finished(Store(out), "duplicates", name)
    if artifact is not None:
        return _dedupe_result(artifact, "unchanged")
    require_distinct_tars(sets)
    named = {f"codes-{number}": entry.artifact for number, entry in enumerate(sets)}
    named |= {AGAINST_ROLE: index} if index else {}
    with scratch_folder() as folder:
        sources = list_source_tars(sets, IndexReader(index, folder) if index else None)
        writer = ArtifactWriter.of(Store(out), "duplicates", name, named, result_settings(config, "duplicates"))
        return _dedupe_result(_find_duplicates(writer, sets, sources, config.dedupe, sizes), "done")


def _find_duplicates(
    writer: ArtifactWriter,
    sets: Sequence[CodesSet],
    sources: Sequence[SourceTar],
    settings: DedupeSettings,
    sizes: Sizes,
) -> Artifact:
    # Imported here, since these load numba, and an unchanged result does not need it.
    from pipelines.dedupe.components import write_components
    from pipelines.dedupe.corpus import read_corpus
    from pipelines.dedupe.pairs import PairSearch, find_leaders, require_memory

    bits = sets[0].bits
    require_memory(sum(source.place.rows for source in sources), settings)
    with scratch_folder() as folder:
        corpus = read_corpus(sources, (bits + 7) // 8, folder)
        leaders = find_leaders(corpus, settings.memory, folder, sizes.unit)
        receipts = PairSearch(writer, corpus, leaders, settings, folder, sizes).run()
        pairs = [part for name in sorted(receipts) for part in receipts[name].parts]
        draft = writer.draft(pairs, {}, Facts())
        found = write_components(writer, draft, pairs, corpus, settings.memory, folder, sizes)
    totals = {
        "samples": corpus.count - corpus.known,
        "indexed": corpus.known,
        "pairs": sum(part.rows for part in pairs),
        "groups": leaders.groups,
        "components": found.components,
        "droppable": found.droppable,
    }
    places = [source.place for source in sources]
    shards = writer.put_part(SHARDS_NAME, parquet_bytes(table_of_rows(SHARDS_SCHEMA, places)), len(places))
    meta = DuplicatesMeta(radius=settings.radius, bits=bits)
    return writer.commit([*pairs, *found.parts, shards], totals, meta, receipts)


def _dedupe_result(artifact: Artifact, status: str) -> DedupeResult:
    manifest = artifact.manifest
    return DedupeResult.of(artifact, status, radius=artifact.facts(DuplicatesMeta).radius, **manifest.totals)
