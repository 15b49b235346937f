"""The connected components of the pairs, read back from the parts that were written."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hhnet.search.pairs import UnionFind
from pipelines.artifacts.commit import ArtifactWriter
from pipelines.artifacts.manifest import Artifact, Part
from pipelines.artifacts.tables import parquet_bytes, read_table, table_of
from pipelines.cluster.progress import stage
from pipelines.dedupe.corpus import Corpus
from pipelines.dedupe.external_sort import ExternalSort, cut_blocks
from pipelines.dedupe.tables import COMPONENTS_SCHEMA, PAIRS_SCHEMA, Sizes, components_name

SAMPLE_NUMBER_BITS = 31
"""Bits of a sample's number in a sort key; the number of its component's root stands above them."""


@dataclass(frozen=True)
class Components:
    """The written parts, and their numbers of components and of droppable samples."""

    parts: Sequence[Part]
    components: int
    droppable: int


def write_components(
    writer: ArtifactWriter,
    draft: Artifact,
    pairs: Sequence[Part],
    corpus: Corpus,
    memory: int,
    folder: Path,
    sizes: Sizes,
) -> Components:
    """Join the samples of all pairs, and write those in a component, ordered by (component, id)."""
    forest = UnionFind(corpus.count)
    with stage("dedupe: grouping", len(pairs), unit="parts") as advance:
        for part in pairs:
            table = read_table(draft.store, part, PAIRS_SCHEMA, ("id_a", "id_b"))
            forest.unite(*(corpus.numbers(table[name].to_numpy()) for name in ("id_a", "id_b")))
            advance(1)
    spool = ExternalSort(folder / "components", sizes.sorted_at_once or memory // 4 // 8)
    for start in range(0, corpus.count, sizes.unit):
        numbers = np.arange(start, min(start + sizes.unit, corpus.count))
        roots = forest.roots(start, start + len(numbers))
        joined = forest.sizes(roots) > 1
        spool.add((roots[joined] << SAMPLE_NUMBER_BITS | numbers[joined]).astype(np.uint64))
    parts, components, droppable = [], 0, 0
    for number, keys in enumerate(cut_blocks(spool.in_order(), sizes.part_rows)):
        members = (keys & np.uint64((1 << SAMPLE_NUMBER_BITS) - 1)).astype(np.int64)
        roots = (keys >> np.uint64(SAMPLE_NUMBER_BITS)).astype(np.int64)
        keep = (members == roots) | (members < corpus.known)
        columns = {"component": corpus.ids[roots], **corpus.columns(members), "size": forest.sizes(roots), "keep": keep}
        parts.append(
            writer.put_part(components_name(number), parquet_bytes(table_of(COMPONENTS_SCHEMA, columns)), len(keys))
        )
        components += int((members == roots).sum())
        droppable += int((~keep).sum())
    return Components(parts, components, droppable)
