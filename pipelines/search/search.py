"""`hhnet search`: nearest neighbours of images, keys or codes in a published index, as JSON and as a page.

Codes find neighbours, real codes put them in order. `search.rerank` says how many of the nearest codes by Hamming
distance are ordered by the asymmetric distance of their real codes to the query's outputs; the first k are shown.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hhnet import asymmetric_distances, pack_bits
from hhnet.codes import sign_bits
from pipelines.artifacts.result import Result
from pipelines.artifacts.versions import open_input_version, open_inputs_of_kind
from pipelines.artifacts.words import format_table, more_rows, short_place
from pipelines.config.settings import Config
from pipelines.console import NOTICE, prints_on_terminal
from pipelines.encode.codes import (
    CodesSet,
    code_array,
    names_of_class_ids,
    open_codes,
    real_codes_array,
    require_real_codes,
)
from pipelines.errors import ConfigError, FingerprintMismatch, InputError
from pipelines.index.kinds import NO_ID, Codes, Ids, Neighbours
from pipelines.index.reader import IndexReader, Item, open_index
from pipelines.report.page import GalleryRow, Tile, render
from pipelines.report.pictures import LARGE_SIDE, Pictures, SampleLocation, find_pictures
from pipelines.search.images import QueryImage, SkippedImage, find_images, read_images
from pipelines.shards.shards import open_shards
from pipelines.storage import batched, write_output

if TYPE_CHECKING:
    from pipelines.encode.encoder import Encoder

_log = logging.getLogger(__name__)

MAX_PAGE_QUERIES = 200
IMAGES_ENCODED = 32
"""Images that the model encodes at a time; their files are in memory."""
QUERIES_SHOWN = 10
"""Queries whose neighbours a terminal shows."""

TIED = "all equally near, so in the order of ids; others may be as near"
"""Words beside neighbours that all have one distance."""

Nearest = Callable[[Codes, int], Neighbours]


@dataclass(frozen=True)
class SearchLimits:
    """Limits on what is held at a time."""

    batch: int = 4096
    """Largest number of queries in one batch."""
    pairs: int = 1 << 20
    """Largest number of queries times neighbours in one batch."""
    answer: int = 4_000_000
    """Largest number of neighbours, of all queries together, in one answer; each takes about 700 bytes."""


LIMITS = SearchLimits()


@dataclass(frozen=True)
class Query:
    """A query: the user's name for it, its packed code, and its picture as a data URI or the picture's place.

    `outputs` are needed for re-ranking: the outputs of the network, or the real codes stored from them.
    """

    name: str
    by: str
    code: bytes
    picture: str | None = None
    place: SampleLocation | None = None
    labels: tuple[str, ...] = ()
    outputs: npt.NDArray[np.generic] | None = None


@dataclass(frozen=True)
class Neighbour:
    """A found neighbour: its Hamming distance and, if the neighbours are re-ranked, its asymmetric distance."""

    item: Item
    distance: int
    score: float | None = None


@dataclass(frozen=True, kw_only=True)
class SearchResult(Result):
    """The neighbours of each query, nearest first."""

    verb: str = "search"
    version: int | None
    results: list[dict[str, Any]]
    skipped: list[dict[str, str]] | None = None
    """Images of a folder or pattern that could not be used, each with path, reason and detail."""
    html: str | None = None

    def as_text(self) -> str:
        """Return a table of neighbours for each query; on a terminal only for the first."""
        if not self.results:
            return super().as_text()
        shown = self.results[:QUERIES_SHOWN] if prints_on_terminal() else self.results
        page = [] if self.html is None else [f"page  {short_place(self.html)}"]
        skipped = [f"skipped  {one['path']}: {one['reason']}, {one['detail']}" for one in self.skipped or ()]
        notes = ["\n".join(skipped)] if skipped else []
        return "\n\n".join([*map(_in_words, shown), *more_rows(len(self.results) - len(shown)), *notes, *page])


def _in_words(entry: Mapping[str, Any]) -> str:
    rows: list[dict[str, object]] = []
    for rank, found in enumerate(entry["neighbours"], start=1):
        score = {"score": f"{found['score']:.4f}"} if "score" in found else {}
        rows.append({"rank": rank, **score, **{name: found[name] for name in ("distance", "labels", "key")}})
    tied = _all_tied([found["distance"] for found in entry["neighbours"] if "score" not in found])
    tie = [f"  {TIED}"] if tied else []
    return "\n".join([f"query {entry['query']}", *(format_table(rows) or ["  no neighbours"]), *tie])


def _all_tied(distances: Sequence[int]) -> bool:
    return len(distances) > len(set(distances)) == 1


def search(
    index: str,
    config: Config,
    images: Sequence[str] = (),
    keys: Sequence[str] = (),
    codes: Sequence[str] = (),
    hex_codes: Sequence[str] = (),
    k: int | None = None,
    version: int | None = None,
    model: str | None = None,
    shards: Sequence[str] = (),
    html: str | None = None,
    limits: SearchLimits = LIMITS,
) -> SearchResult:
    """Search the published `index` by images, by keys or paths in it, by codes artifacts, and by hex codes.

    `images` are files, folders, patterns and URLs (`pipelines.search.images`); the result is degraded if one that a
    folder or pattern holds cannot be used. `model` names its place where the remembered one is wrong, `shards` further
    places of pictures; `html` is a file for a page with pictures. Neighbours come by (distance, id); with
    `search.rerank` by (asymmetric distance, distance, id). Raises InputError for a query that cannot be used or
    re-ranked, and FingerprintMismatch for a model or codes that are not the index's own.
    """
    if not (images or keys or codes or hex_codes):
        raise InputError("nothing to search for: name a query with --image, --key, --codes or --code")
    k = config.search.k if k is None else k
    if k < 1:
        raise InputError(f"k = {k}: ask for at least one neighbour")
    sources, skipped = find_images(images), list[SkippedImage]()
    with open_index(index, version) as reader, _nearest(reader, config) as nearest:
        results: list[dict[str, Any]] = []
        shown: list[tuple[Query, list[Neighbour]]] = []
        rerank = config.search.rerank and max(config.search.rerank, k)
        if rerank:
            require_real_codes(reader.artifact.uri, reader.real_codes)
        sets = [open_codes(uri) for uri in codes]
        images_read = read_images(sources, 0 if html is None else MAX_PAGE_QUERIES, skipped)
        queries = _queries(reader, images_read, keys, sets, hex_codes, model, rerank is not None)
        each = min(k, reader.count)
        asked = len(sources) + len(keys) + len(hex_codes) + sum(entry.rows for entry in sets)
        if asked * each > limits.answer:
            asked_for = f"{asked:,} queries with {each:,} neighbours each"
            remedy = "ask for fewer at a time, or search in batches from Python with pipelines.index.reader.open_index"
            raise InputError(f"{asked_for} are too many for one answer, which holds {limits.answer:,}: {remedy}")
        for batch in batched(queries, max(1, min(limits.batch, limits.pairs // max(each, rerank or 1)))):
            packed = np.frombuffer(b"".join(query.code for query in batch), np.uint8).reshape(-1, reader.width)
            found = nearest(packed, rerank or k)
            for query, neighbours in _describe_neighbours(reader, batch, found, k, rerank is not None):
                results.append(_result(query, neighbours))
                if html is not None and len(shown) < MAX_PAGE_QUERIES:
                    shown.append((query, neighbours))
        if html is not None:
            pictures = find_pictures_of(reader, sets, shards, shown)
            page = search_page(reader, k, shown, len(results), pictures, rerank, skipped)
            write_output(html, page.encode(errors="backslashreplace"))  # a file's name may be no text
    status, unused = "degraded" if skipped else "done", [one._asdict() for one in skipped] or None
    answer = {"version": reader.version, "results": results, "skipped": unused, "html": html}
    return SearchResult.of(reader.artifact, status, **answer)


@contextmanager
def _nearest(reader: IndexReader, config: Config) -> Iterator[Nearest]:
    """Yield the function that searches the parts: in this process, on a GPU, or on `search.workers` Ray actors."""
    if config.search.device == "cuda":
        if config.search.workers is not None:
            raise ConfigError("search.workers and search.device = cuda exclude each other: the GPU is in one process")
        from pipelines.search.gpu import on_gpu  # imports torch; only the GPU needs it

        yield on_gpu(reader)
        return
    if config.search.workers is None:
        yield reader.search
        return
    from pipelines.search.actors import spread_over_actors  # imports Ray; a search in this process needs none

    with spread_over_actors(reader, config.search.workers, config) as nearest:
        yield nearest


def _describe_neighbours(
    reader: IndexReader, batch: Sequence[Query], found: Neighbours, k: int, rerank: bool
) -> list[tuple[Query, list[Neighbour]]]:
    """Return the first k neighbours of each query with the index's facts about them, re-ranked if asked for."""
    distances, ids = found
    scores: list[list[float]] | list[list[None]] = [[None] * k] * len(batch)
    if rerank:
        distances, ids, asymmetric = _reranked(reader, batch, distances, ids)
        scores = asymmetric.tolist()
    items = reader.items(ids[:, :k].ravel().tolist())
    rows = zip(batch, ids[:, :k].tolist(), distances.tolist(), scores, strict=True)
    return [
        (query, [Neighbour(items[n], d, score) for n, d, score in zip(*near, strict=False) if n != NO_ID])
        for query, *near in rows
    ]


def _reranked(
    reader: IndexReader, batch: Sequence[Query], distances: npt.NDArray[np.int32], ids: Ids
) -> tuple[npt.NDArray[np.int32], Ids, npt.NDArray[np.float32]]:
    """Return distances, ids and asymmetric distances by (asymmetric, distance, id); empty places stay last."""
    asymmetric = np.full(ids.shape, np.inf, np.float32)
    known = np.unique(ids[ids != NO_ID])
    real_codes = reader.real_codes_of(known)
    for q, query in enumerate(batch):
        assert query.outputs is not None, "queries to be re-ranked have outputs"
        found = ids[q] != NO_ID
        asymmetric[q, found] = asymmetric_distances(query.outputs, real_codes[np.searchsorted(known, ids[q, found])])
    order = np.lexsort((ids, distances, asymmetric), axis=1)
    distances, ids = np.take_along_axis(distances, order, 1), np.take_along_axis(ids, order, 1)
    return distances, ids, np.take_along_axis(asymmetric, order, 1)


def _result(query: Query, neighbours: Sequence[Neighbour]) -> dict[str, Any]:
    return {"query": query.name, "by": query.by, "neighbours": [_plain(neighbour) for neighbour in neighbours]}


def _plain(neighbour: Neighbour) -> dict[str, Any]:
    item, score = neighbour.item, neighbour.score
    facts = {"id": item.id, "key": item.key, "path": item.path, "shard": item.shard, "row": item.row}
    scored = {} if score is None else {"score": round(score, 6)}
    return {**facts, "distance": neighbour.distance, **scored, "labels": list(item.labels)}


# -------------------------------------------------------------------------------------------------------- queries


def _queries(
    reader: IndexReader,
    images: Iterator[QueryImage],
    keys: Sequence[str],
    codes: Sequence[CodesSet],
    hex_codes: Sequence[str],
    model: str | None,
    outputs: bool,
) -> Iterator[Query]:
    """Yield the queries in turn, with their outputs if asked for."""
    if outputs and hex_codes:
        remedy = "search by --image, --key or --codes, or set no rerank"
        raise InputError(f"--code {hex_codes[0]} has no real codes to re-rank by: {remedy}")
    yield from _by_image(reader, images, model)
    if keys:
        yield from _by_key(reader, keys, outputs)
    for text in hex_codes:
        yield Query(text, "code", _parse_hex(text, reader))
    for entry in codes:
        yield from _by_codes(reader, entry, outputs)


def _by_image(reader: IndexReader, images: Iterator[QueryImage], model: str | None) -> Iterator[Query]:
    encoder = None
    for batch in batched(images, IMAGES_ENCODED):
        # After the first images were read: a mistake among them is told before torch is imported.
        encoder = encoder or _open_encoder(reader, model)
        z_NK = encoder.real_codes([image.data for image in batch])
        if z_NK.shape[1] != reader.bits:
            differ = f"the model makes codes of {z_NK.shape[1]} bits, {reader.artifact.uri} holds {reader.bits} bits"
            raise FingerprintMismatch(f"{differ}: search with the model that made the index")
        for image, code, z_K in zip(batch, pack_bits(sign_bits(z_NK)), z_NK, strict=True):
            yield Query(image.name, "image", code.tobytes(), picture=image.picture, outputs=z_K)


def _open_encoder(reader: IndexReader, model: str | None) -> "Encoder":
    artifact = open_input_version(reader.artifact, "model", model)
    _log.log(NOTICE, "search: loading the model %s", artifact.uri, extra={"model": artifact.uri})
    from pipelines.encode.encoder import Encoder  # imports torch; only images need it

    return Encoder.open(artifact)  # not the root, which may have changed


def _by_key(reader: IndexReader, keys: Sequence[str], outputs: bool) -> Iterator[Query]:
    """Yield the queries for these keys; a key in several of the index's shards is searched once for each."""
    found, lacking = reader.find(keys)
    if gone := sorted(reader.removed_keys(lacking)):
        raise InputError(f"key {gone[0]!r} was removed from {reader.artifact.uri}: name another sample, or an --image")
    if lacking:
        near = reader.near_keys(lacking[0])
        hint = f"; near it are {', '.join(near)}" if near else ""
        raise InputError(f"key {lacking[0]!r} is not in {reader.artifact.uri}{hint}")
    for item, code in found:
        query = Query(item.key, "key", code, place=SampleLocation(item.shard_sha256, item.row), labels=item.labels)
        yield replace(query, outputs=reader.real_codes_of(np.array([item.id]))[0]) if outputs else query


def _parse_hex(text: str, reader: IndexReader) -> bytes:
    try:
        code = bytes.fromhex(text)
    except ValueError:
        raise InputError(f"--code {text!r} is not hexadecimal: write the packed code, two digits per byte") from None
    if len(code) != reader.width:
        differ = f"--code {text} has {8 * len(code)} bits, {reader.artifact.uri} holds codes of {reader.bits} bits"
        raise FingerprintMismatch(f"{differ}: give one of that length")
    return code


def _by_codes(reader: IndexReader, entry: CodesSet, outputs: bool) -> Iterator[Query]:
    """Yield a query for every row of a codes artifact, with one shard in memory at a time."""
    if entry.bits != reader.bits:
        differ = f"{entry.artifact.uri} holds codes of {entry.bits} bits, {reader.artifact.uri} of {reader.bits} bits"
        raise FingerprintMismatch(f"{differ}: encode the queries with the model that made the index")
    model = reader.artifact.manifest.input("model").digest
    if entry.model != model:
        raise FingerprintMismatch(
            f"{entry.artifact.uri} was made by model {entry.model[:12]}, {reader.artifact.uri} by {model[:12]}"
        )
    if outputs:
        require_real_codes(entry.artifact.uri, entry.real_codes)
    for shard in entry.shards:
        table = entry.read(shard)
        codes = code_array(table["code"])
        real_codes = real_codes_array(table["real_codes"]) if outputs else [None] * len(table)
        columns = (table[name].to_pylist() for name in ("key", "row", "labels"))
        for key, row, ids, code, z_K in zip(*columns, codes, real_codes, strict=True):
            labels = tuple(names_of_class_ids(ids, entry.classes, entry.artifact.uri))
            yield Query(key, "codes", code.tobytes(), None, SampleLocation(shard.sha256, row), labels, z_K)


# ----------------------------------------------------------------------------------------------------------- page


def find_pictures_of(
    reader: IndexReader,
    codes: Sequence[CodesSet],
    shards: Sequence[str],
    shown: Sequence[tuple[Query, Sequence[Neighbour]]],
) -> Pictures:
    """Find the pictures of what is shown: in `shards`, then through the queries' codes and those of the index.

    Raises FingerprintMismatch where the `shards` have no tar in common with any of these codes.
    """
    given = [open_shards(uri) for uri in shards]
    if given:
        known = {shard.shard_sha256 for shard in reader.held()}
        known |= {shard.sha256 for entry in codes for shard in entry.shards}
        if known.isdisjoint(shard.part.sha256 for entry in given for shard in entry.shards):
            problem = f"{', '.join(shards)}: none of these shards is in {reader.artifact.uri}"
            raise FingerprintMismatch(f"{problem}: name those that it was made of")
    problems: list[str] = []
    needed = {place.shard_sha256 for place in _places(shown)}
    indexed = open_inputs_of_kind(reader.artifact, "codes", problems)
    pictures = find_pictures(chain((entry.artifact for entry in codes), indexed), given, needed)
    pictures.problems = [] if pictures.has_all(needed) else [*pictures.problems, *problems]
    return pictures


def _places(shown: Sequence[tuple[Query, Sequence[Neighbour]]]) -> set[SampleLocation]:
    places = {SampleLocation(found.item.shard_sha256, found.item.row) for _, near in shown for found in near}
    return places | {query.place for query, _ in shown if query.place}


def search_page(
    reader: IndexReader,
    k: int,
    shown: Sequence[tuple[Query, Sequence[Neighbour]]],
    total: int,
    pictures: Pictures,
    rerank: int | None,
    skipped: Sequence[SkippedImage] = (),
) -> str:
    """Return the results as a self-contained page; frames mark the neighbours that share a class with the query."""
    places = _places(shown)
    found = pictures.get(places, LARGE_SIDE)
    rows = [GalleryRow(_head(query, near, found), [_tile(query, one, found) for one in near]) for query, near in shown]
    unreadable = bool(places and not found and not pictures.problems)
    facts = {"rows": rows, "total": total, "problems": pictures.problems, "unreadable": unreadable, "rerank": rerank}
    return render("search", subject=_subject(reader, k), skipped=skipped, **facts)


def _subject(reader: IndexReader, k: int) -> dict[str, str]:
    """Return the head of the page: what was searched."""
    version = {} if reader.version is None else {"Version": f"{reader.version:,}"}
    index = f"{reader.artifact.uri} ({reader.meta.kind}, {reader.count:,} codes)"
    return {"Index": index, **version, "Bits": f"{reader.bits:,}", "k": f"{k:,}"}


def _head(query: Query, near: Sequence[Neighbour], found: dict[SampleLocation, str]) -> Tile:
    picture = query.picture or (found.get(query.place) if query.place else None)
    tied = _all_tied([one.distance for one in near if one.score is None])
    return Tile(query.name, query.labels, picture, remark=f"query by {query.by}{f'; {TIED}' if tied else ''}")


def _tile(query: Query, neighbour: Neighbour, found: dict[SampleLocation, str]) -> Tile:
    item = neighbour.item
    right = bool(set(query.labels) & set(item.labels)) if query.labels else None
    picture = found.get(SampleLocation(item.shard_sha256, item.row))
    return Tile(item.path or item.key, item.labels, picture, neighbour.distance, right)
