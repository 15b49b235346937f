"""The connected components of the pairs, read back from the parts that were written, and what confirms them."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from hhnet.search.pairs import UnionFind
from pipelines.artifacts.commit import ArtifactWriter
from pipelines.artifacts.manifest import Artifact, Part
from pipelines.artifacts.parquet import parquet_bytes, table_of
from pipelines.artifacts.tables import read_table
from pipelines.cluster.progress import stage
from pipelines.config.settings import DedupeSettings
from pipelines.dedupe.confirm import ComponentMatcher, SeenSamples
from pipelines.dedupe.corpus import Corpus
from pipelines.dedupe.external_sort import ExternalSort, cut_blocks
from pipelines.dedupe.pairs import SAMPLE_NUMBER_BITS, map_numbers
from pipelines.dedupe.tables import (
    COMPONENTS_SCHEMA,
    MATCH_NAMES,
    PAIRS_SCHEMA,
    UNCONFIRMED,
    Match,
    Sizes,
    components_name,
    count_matches,
)

ReadLooks = Callable[[npt.NDArray[np.int64]], SeenSamples]
"""Function that reads the looks of samples, given their ids, ascending."""


@dataclass(frozen=True)
class Components:
    """The written parts, and the totals of components and of samples by what they have in common with their twin."""

    parts: Sequence[Part]
    totals: Counter[str]


def join_pairs(draft: Artifact, pairs: Sequence[Part], corpus: Corpus) -> UnionFind:
    """Join the samples of all pairs."""
    forest = UnionFind(corpus.count)
    with stage("dedupe: grouping", len(pairs), unit="parts") as advance:
        for part in pairs:
            table = read_table(draft.store, part, PAIRS_SCHEMA, ("id_a", "id_b"))
            forest.unite(*(corpus.numbers(table[name].to_numpy()) for name in ("id_a", "id_b")))
            advance(1)
    return forest


def write_components(
    writer: ArtifactWriter,
    forest: UnionFind,
    corpus: Corpus,
    read_looks: ReadLooks,
    settings: DedupeSettings,
    folder: Path,
    sizes: Sizes,
) -> Components:
    """Confirm the joined samples by their pictures, and write them, ordered by (component, id)."""
    spool = ExternalSort(folder / "components", sizes.sorted_at_once or settings.memory // 4 // 8)
    with (folder / "joined").open("wb") as stream:
        for start in range(0, corpus.count, sizes.unit):
            numbers = np.arange(start, min(start + sizes.unit, corpus.count))
            roots = forest.roots(start, start + len(numbers))
            joined = forest.sizes(roots) > 1
            spool.add((roots[joined] << SAMPLE_NUMBER_BITS | numbers[joined]).astype(np.uint64))
            stream.write(corpus.ids[numbers[joined]].tobytes())
    matcher = ComponentMatcher(read_looks(map_numbers(folder / "joined", np.int64)))
    parts, totals = [], count_matches(np.empty(0, np.uint8), settings.same_code)
    totals["components"] = 0
    for number, keys in enumerate(cut_blocks(spool.in_order(), sizes.part_rows)):
        # A key is one integer: the number of the component's root, and below it the sample's own.
        members = (keys & np.uint64((1 << SAMPLE_NUMBER_BITS) - 1)).astype(np.int64)
        roots = (keys >> np.uint64(SAMPLE_NUMBER_BITS)).astype(np.int64)
        component = corpus.ids[roots]
        matches, twins = matcher.match(component, corpus.ids[members], (members == roots) | (members < corpus.known))
        columns = {
            "component": component,
            **corpus.columns(members),
            "size": forest.sizes(roots),
            "match": pc.take(MATCH_NAMES, matches),
            "twin": twins,
            "keep": (matches == Match.NONE) | (np.isin(matches, UNCONFIRMED) & (not settings.same_code)),
        }
        data = parquet_bytes(table_of(COMPONENTS_SCHEMA, columns))
        parts.append(writer.put_part(components_name(number), data, len(keys)))
        totals.update(count_matches(matches, settings.same_code))
        totals["components"] += int((members == roots).sum())
    return Components(parts, totals)
