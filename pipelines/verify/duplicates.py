"""Proves a duplicates artifact: pairs, components and totals agree, and codes and pictures have what it says.

All pairs of equal codes, and the distance of every pair, are proven from the codes. The absence of further near pairs
is proven for a seeded sample, which is compared with all codes. Of the samples that the pictures confirm, a seeded
sample is compared with their twins.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

import hhnet
from pipelines.artifacts.facts import DuplicatesMeta, PairsReceipt
from pipelines.artifacts.manifest import Artifact
from pipelines.artifacts.tables import read_table
from pipelines.dedupe import tables
from pipelines.dedupe.confirm import read_looks
from pipelines.dedupe.looks import FILE_KNOWN, SEEN, mark_alike
from pipelines.dedupe.source_tars import SourceTar, list_source_tars
from pipelines.dedupe.tables import COMPONENTS_SCHEMA, PAIRS_SCHEMA, Match, PlacedShard, count_matches, read_places
from pipelines.encode.codes import open_codes
from pipelines.errors import DamagedArtifact, format_count
from pipelines.index.kinds import Codes
from pipelines.index.reader import IndexReader
from pipelines.storage import scratch_folder
from pipelines.verify.findings import Findings

CONFIRMED = (Match.BYTES, Match.PICTURE)
MAX_PROBES = 64
SLICE_ROWS = 1 << 18

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Joined:
    """The samples in the table of components, by id."""

    ids: Ids
    keys: pa.Array
    indexed: npt.NDArray[np.bool_]

    def find(self, ids: Ids, where: str) -> Ids:
        """Return the positions of ids among the samples; raise DamagedArtifact where one is missing."""
        places = np.searchsorted(self.ids, ids)
        if (np.append(self.ids, -1)[places] != ids).any():
            raise DamagedArtifact(f"{where} has samples that are in no component")
        return places


@dataclass(frozen=True)
class _Pairs:
    """All pairs, in order, as positions among the joined samples."""

    a: Ids
    b: Ids
    distances: npt.NDArray[np.int32]
    joined: _Joined

    @cached_property
    def marks(self) -> Ids:
        """One number for each pair, ascending."""
        return self.mark(self.a, self.b)

    def mark(self, a: Ids, b: Ids) -> Ids:
        """Return the numbers of pairs from the positions of both sides."""
        return a * len(self.joined.ids) + b


def prove_duplicates(findings: Findings) -> None:
    """Check order, places and totals, and that each component is what its pairs join.

    If the codes are within reach, also check that they have these pairs.
    """
    artifact = findings.artifact
    with findings.guard():
        places = read_places(artifact)
        listed = _read_components(findings, places)
        joined = _joined(findings, listed, places)
        pairs = _read_pairs(findings, joined, places)
        _prove_receipts(findings)
        groups = _prove_groups(findings, pairs)
        components = _prove_components(findings, pairs, listed)
        matches = _prove_matches(findings, listed)
        counts = {
            "samples": sum(place.rows for place in places if not place.indexed),
            "indexed": sum(place.rows for place in places if place.indexed),
            "pairs": len(pairs.a),
            "groups": groups,
            "components": components,
            **count_matches(matches, findings.artifact.facts(DuplicatesMeta).same_code),
        }
        findings.require(
            counts == artifact.manifest.totals,
            f"{artifact.uri}: the totals are {artifact.manifest.totals}, the parts add up to {counts}",
        )
        findings.checks.append(
            f"{format_count(counts['pairs'], 'pair')} in order, once each, and the "
            f"{format_count(components, 'component')} that they join"
        )
        _prove_inputs(
            findings, places, pairs, listed.filter(pa.array((matches == Match.BYTES) | (matches == Match.PICTURE)))
        )


# ------------------------------------------------------------------------------------------------------------ parts


def _read_components(findings: Findings, places: list[PlacedShard]) -> pa.Table:
    parts = tables.list_parts(findings.artifact, tables.COMPONENTS_PREFIX)
    found = [read_table(findings.artifact.store, part, COMPONENTS_SCHEMA) for part in parts]
    whole = pa.concat_tables([COMPONENTS_SCHEMA.empty_table(), *found]).unify_dictionaries()
    _require_places(whole, "", places, f"{findings.artifact.uri}: a part of the components")
    return whole


def _require_places(table: pa.Table, suffix: str, places: list[PlacedShard], where: str) -> None:
    """Check that shard and row belong to the id."""
    ids = table[f"id{suffix}"].to_numpy()
    ordinals = np.array([place.ordinal for place in places], np.int64)
    found = np.searchsorted(ordinals, ids >> 32)
    if len(ids) and (found.max() >= len(places) or (ordinals[found] != ids >> 32).any()):
        raise DamagedArtifact(f"{where} has ids of tars that did not take part")
    names = pc.take(pa.array([place.shard for place in places], pa.string()), pa.array(found))
    same = pc.equal(table[f"shard{suffix}"].cast(pa.string()), names)
    if (not pc.all(same).as_py() and len(ids)) or (table[f"row{suffix}"].to_numpy() != ids & 0xFFFFFFFF).any():
        raise DamagedArtifact(f"{where} has another shard or row than its id")


def _joined(findings: Findings, listed: pa.Table, places: list[PlacedShard]) -> _Joined:
    ids = listed["id"].to_numpy()
    order = np.argsort(ids, kind="stable")
    ids = ids[order]
    if (np.diff(ids) <= 0).any():
        raise DamagedArtifact(f"{findings.artifact.uri}: a sample is in two components")
    indexed = np.array([place.ordinal for place in places if place.indexed], np.int64)
    return _Joined(ids, pc.take(listed["key"], pa.array(order)).combine_chunks(), np.isin(ids >> 32, indexed))


def _read_pairs(findings: Findings, joined: _Joined, places: list[PlacedShard]) -> _Pairs:
    """Read the pairs part by part; check places and keys of both sides, distances within the radius, and order."""
    artifact, radius = findings.artifact, findings.artifact.facts(DuplicatesMeta).radius
    sides: dict[str, list[Ids]] = {"_a": [], "_b": []}
    distances = [np.empty(0, np.int32)]
    for part in tables.list_parts(artifact, tables.PAIRS_PREFIX):
        where = f"{artifact.uri}/{part.path}"
        table = read_table(artifact.store, part, PAIRS_SCHEMA)
        for suffix, found in sides.items():
            _require_places(table, suffix, places, where)
            found.append(joined.find(table[f"id{suffix}"].to_numpy(), where))
            keys = pc.take(joined.keys, pa.array(found[-1]))
            if not keys.equals(table[f"key{suffix}"].combine_chunks()):
                raise DamagedArtifact(f"{where} has other keys than the components")
        distances.append(table["distance"].to_numpy())
        if (distances[-1] < 0).any() or (distances[-1] > radius).any():
            raise DamagedArtifact(f"{where} has distances outside the radius of {radius}")
    a, b = (np.concatenate([np.empty(0, np.int64), *found]) for found in sides.values())
    pairs = _Pairs(a, b, np.concatenate(distances), joined)
    if (a >= b).any() or (np.diff(pairs.marks) <= 0).any():
        raise DamagedArtifact(f"{artifact.uri}: the pairs are not in order, or one comes twice")
    if (joined.indexed[a] & joined.indexed[b]).any():
        raise DamagedArtifact(f"{artifact.uri}: two samples of the index are a pair")
    return pairs


def _prove_receipts(findings: Findings) -> None:
    """Check that each part of the pairs belongs to the receipt of its unit, and that every unit has a receipt."""
    artifact = findings.artifact
    claimed = []
    for number, reference in enumerate(artifact.manifest.receipts):
        where = f"{artifact.uri}/{reference.path}"
        with findings.guard():
            receipt = reference.parse(PairsReceipt, artifact.uri, "find the duplicates again")
            claimed += [part.path for part in receipt.parts]
            same = (reference.shard, receipt.unit) == (tables.unit_name(number), number)
            findings.require(same, f"{where} is not the receipt of unit {number}")
    listed = [part.path for part in tables.list_parts(artifact, tables.PAIRS_PREFIX)]
    findings.require(sorted(claimed) == sorted(listed), f"{artifact.uri}: the receipts do not name the parts of pairs")


# ----------------------------------------------------------------------------------------------------------- groups


def _prove_groups(findings: Findings, pairs: _Pairs) -> int:
    """Check the pairs of equal codes, and return the number of groups of equal codes.

    In a group one sample leads. Each other sample has a single pair, with the leader.
    """
    equal = pairs.distances == 0
    a, b = pairs.a[equal], pairs.b[equal]
    follows = np.where(pairs.joined.indexed[a], a, b)
    times = np.bincount(np.concatenate([pairs.a, pairs.b]), minlength=len(pairs.joined.ids))
    findings.require(
        bool((times[follows] == 1).all()),
        f"{findings.artifact.uri}: a sample with the code of another has more pairs than that one",
    )
    return len(np.unique(np.where(pairs.joined.indexed[a], b, a)))


def _prove_components(findings: Findings, pairs: _Pairs, listed: pa.Table) -> int:
    """Check that the components follow from the pairs, and return their number."""
    from hhnet.search.pairs import UnionFind  # imports numba; only this kind needs it

    joined = pairs.joined
    forest = UnionFind(len(joined.ids))
    forest.unite(pairs.a, pairs.b)
    roots = forest.roots(0, len(joined.ids))
    order = np.argsort(roots, kind="stable")
    alone = (roots == np.arange(len(roots))) | joined.indexed
    expected = {
        "component": joined.ids[roots[order]],
        "id": joined.ids[order],
        "size": forest.sizes(roots[order]),
        "match": alone[order],
    }
    for name, values in expected.items():
        found = listed[name].to_numpy()
        if not np.array_equal(found == Match.NONE.name.lower() if name == "match" else found, values):
            raise DamagedArtifact(f"{findings.artifact.uri}: the components are not those of the pairs, see {name}")
    if (expected["size"] < 2).any():
        raise DamagedArtifact(f"{findings.artifact.uri}: a component has a single sample")
    return int((roots == np.arange(len(roots))).sum())


def _prove_matches(findings: Findings, listed: pa.Table) -> npt.NDArray[np.uint8]:
    """Check that each twin stays in its component, and that `keep` follows from `match`; return the matches."""
    uri, ids, twins = findings.artifact.uri, listed["id"].to_numpy(), listed["twin"].to_numpy()
    places = pc.index_in(listed["match"], value_set=tables.MATCH_NAMES)
    if places.null_count:
        raise DamagedArtifact(f"{uri}: the components have a match that is not known to this hhnet")
    matches: npt.NDArray[np.uint8] = places.to_numpy().astype(np.uint8)
    alone, code = matches == Match.NONE, np.isin(matches, tables.UNCONFIRMED)
    if not np.array_equal(twins[alone], ids[alone]):
        raise DamagedArtifact(f"{uri}: a sample without a twin names one")
    if not np.array_equal(twins[code], listed["component"].to_numpy()[code]):
        raise DamagedArtifact(f"{uri}: the twin of a sample that shares only the code is not the first one")
    order, sure = np.argsort(ids, kind="stable"), ~(alone | code)
    found = order[np.searchsorted(ids[order], twins[sure]).clip(max=max(len(ids) - 1, 0))]
    component = listed["component"].to_numpy()
    same = (ids[found] == twins[sure]) & (component[found] == component[sure]) & (twins[sure] < ids[sure])
    if not (same & ~sure[found]).all():
        raise DamagedArtifact(f"{uri}: the twin of a sample does not stay in its component")
    asked = findings.artifact.facts(DuplicatesMeta).same_code
    if not np.array_equal(listed["keep"].to_numpy(), alone | (code & (not asked))):
        raise DamagedArtifact(f"{uri}: keep does not follow from match")
    return matches


# ------------------------------------------------------------------------------------------------------------ codes


def _prove_inputs(findings: Findings, places: list[PlacedShard], pairs: _Pairs, confirmed: pa.Table) -> None:
    """Check that the samples come from the codes and the index, and have these pairs and twins.

    What cannot be checked because an input is out of reach is noted.
    """
    inputs, named = findings.inputs(), findings.artifact.manifest.inputs
    shards = [entry for entry in inputs if entry.manifest.kind == "shards"]
    if len(shards) < sum(entry.kind == "shards" for entry in named):
        findings.checks.append("pictures: not checked, since not all shards are within reach")
    elif len(confirmed) and not shards:
        raise DamagedArtifact(f"{findings.artifact.uri}: samples have a twin by their pictures, but it names no shards")
    elif len(confirmed):
        _prove_pictures(findings, places, shards, confirmed)
    others = [entry for entry in inputs if entry.manifest.kind != "shards"]
    if len(others) < sum(entry.kind != "shards" for entry in named):
        findings.checks.append("distances: not checked, since not all codes are within reach")
        return
    with scratch_folder() as folder:
        sets = [open_codes(entry) for entry in others if entry.manifest.kind == "codes"]
        index = next((IndexReader(entry, folder) for entry in others if entry.manifest.kind == "index"), None)
        sources = list_source_tars(sets, index)
        if [source.place for source in sources] != places:
            raise DamagedArtifact(f"{findings.artifact.uri}: {tables.SHARDS_NAME} does not list the tars of its inputs")
        _prove_pairs(findings, sources, pairs, (sets[0].bits + 7) // 8)


def _prove_pictures(findings: Findings, places: list[PlacedShard], shards: list[Artifact], confirmed: pa.Table) -> None:
    """Check that a seeded sample of the confirmed samples and their twins have the same bytes, or look alike."""
    number = min(MAX_PROBES, len(confirmed))
    rows = np.sort(np.random.Generator(np.random.Philox(0)).choice(len(confirmed), number, replace=False))
    probes = confirmed.take(pa.array(rows))
    ids = np.unique(np.concatenate([probes["id"].to_numpy(), probes["twin"].to_numpy()]))
    with scratch_folder() as folder:
        seen = read_looks(places, shards, folder, None, ids)
        looks = seen.of(probes["id"].to_numpy()), seen.of(probes["twin"].to_numpy())
    for place, row in enumerate(probes.select(["key", "match"]).to_pylist()):
        look, twin = (side[place] for side in looks)
        if row["match"] == Match.BYTES.name.lower():
            same = look["known"] >= FILE_KNOWN and np.array_equal(look["sha256"], twin["sha256"])
        else:
            same = look["known"] == twin["known"] == SEEN and bool(mark_alike(looks[1][place : place + 1], look)[0])
        if not same:
            where = f"{findings.artifact.uri}: {row['key']!r} and its twin"
            raise DamagedArtifact(f"{where} do not have the same {row['match']}, as the components say")
    findings.checks.append(f"the pictures of {format_count(number, 'sample')} match those of their twins")


def _prove_pairs(findings: Findings, sources: list[SourceTar], pairs: _Pairs, width: int) -> None:
    from hhnet.search.pairs import equal_groups
    from pipelines.dedupe.corpus import read_corpus

    uri, joined = findings.artifact.uri, pairs.joined
    with scratch_folder() as folder:
        corpus = read_corpus(sources, width, folder)
        numbers = corpus.numbers(joined.ids)
        if not np.array_equal(np.append(corpus.ids, -1)[numbers], joined.ids):
            raise DamagedArtifact(f"{uri} has samples that are not among the codes")
        if not pc.take(corpus.keys, pa.array(numbers)).cast(pa.string()).equals(joined.keys):
            raise DamagedArtifact(f"{uri} has other keys than the codes")
        for start in range(0, len(pairs.a), SLICE_ROWS):
            part = slice(start, start + SLICE_ROWS)
            differ = corpus.codes[numbers[pairs.a[part]]] ^ corpus.codes[numbers[pairs.b[part]]]
            if not np.array_equal(np.bitwise_count(differ).sum(1, dtype=np.int32), pairs.distances[part]):
                raise DamagedArtifact(f"{uri} has pairs whose codes differ in another number of bits")
        leaders, _, _ = equal_groups(corpus.codes, corpus.known, 8 * corpus.count)
        follow = np.flatnonzero((leaders >= 0) & (leaders != np.arange(corpus.count)))
        _require_pairs(pairs, corpus.ids[follow], corpus.ids[leaders[follow]], uri)
        leading = np.flatnonzero(leaders == np.arange(corpus.count))
        new = leading[leading >= corpus.known]
        # All pairs of a sample only: to look for every missing pair would be the whole search once more.
        probes = np.random.Generator(np.random.Philox(0)).choice(new, min(MAX_PROBES, len(new)), replace=False)
        for start in range(0, len(leading), SLICE_ROWS):
            among = leading[start : start + SLICE_ROWS]
            a, b = _near(corpus.codes, probes, among, findings.artifact.facts(DuplicatesMeta).radius)
            _require_pairs(pairs, corpus.ids[a], corpus.ids[b], uri)
    findings.checks.append(
        "the codes have these distances, and no other pairs of equal codes, or of "
        f"{format_count(len(probes), 'sample')} compared with all"
    )


def _near(codes: Codes, probes: Ids, among: Ids, radius: int) -> tuple[Ids, Ids]:
    """Return each probe with each other sample within the radius, as numbers of the corpus."""
    offsets, rows, _ = hhnet.hamming_range(codes[probes], codes[among], radius)
    a, b = np.repeat(probes, np.diff(offsets)), among[rows]
    return a[a != b], b[a != b]


def _require_pairs(pairs: _Pairs, a: Ids, b: Ids, uri: str) -> None:
    """Raise DamagedArtifact unless all these ids are pairs."""
    ids = pairs.joined.ids
    low, high = (np.searchsorted(ids, side) for side in (np.minimum(a, b), np.maximum(a, b)))
    marks = pairs.mark(low, high)
    ends = np.append(ids, -1), np.append(pairs.marks, -1)
    lacking = (ends[0][low] != np.minimum(a, b)) | (ends[0][high] != np.maximum(a, b))
    lacking |= ends[1][np.searchsorted(pairs.marks, marks)] != marks
    if lacking.any():
        first = int(np.flatnonzero(lacking)[0])
        raise DamagedArtifact(f"{uri} lacks the pair of the ids {a[first]} and {b[first]}")
