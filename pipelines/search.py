"""`hhnet search`: nearest neighbours of images, keys or codes in a published index, as JSON and as a page."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.artifacts import Artifact
from pipelines.codes import code_array, open_codes
from pipelines.config import Config
from pipelines.errors import FingerprintMismatch, HHNetError, InputError
from pipelines.gallery.page import Row, Tile, document, gallery, note
from pipelines.gallery.pictures import Pictures, Place, find_pictures, thumbnail
from pipelines.images import MAX_BYTES, ImageReject, decode_image
from pipelines.kinds import NO_ID, Codes, Ids, Neighbours
from pipelines.kinds.artifact import IndexReader, Item, code_bytes, open_index
from pipelines.storage import write_output
from pipelines.versions import open_input

BATCH = 4096
PAGE_QUERIES = 200

Nearest = Callable[[Codes, int], Neighbours]


@dataclass(frozen=True)
class Query:
    """What to look for: how it was named, its packed code, and its picture or where that lies."""

    name: str
    by: str
    code: bytes
    image: bytes | None = None
    place: Place | None = None
    labels: tuple[str, ...] = ()


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
) -> dict[str, Any]:
    """Search the published `index` by image files, by keys in it, by codes artifacts, and by codes in hexadecimal.

    `model` and `shards` say where these lie if not where the artifacts remember; `html` is a file for a page with
    pictures. Neighbours come by (distance, id). Raises InputError for a query that cannot be used, and
    FingerprintMismatch for a model or codes that are not the index's own.
    """
    if not (images or keys or codes or hex_codes):
        raise InputError("nothing to search for: name a query with --image, --key, --codes or --code")
    k = config.search.k if k is None else k
    if k < 1:
        raise InputError(f"k = {k}: ask for at least one neighbour")
    with open_index(index, version) as reader, _nearest(reader, config) as nearest:
        results: list[dict[str, Any]] = []
        shown: list[tuple[Query, list[tuple[int, Item]]]] = []
        queries = _queries(reader, images, keys, codes, hex_codes, model)
        for batch in _batches(queries):
            distances, ids = nearest(code_bytes([query.code for query in batch], reader.width), k)
            for query, neighbours in _named(reader, batch, distances, ids):
                results.append(_result(query, neighbours))
                if html is not None and len(shown) < PAGE_QUERIES:
                    shown.append((query, neighbours))
        answer = {
            "verb": "search",
            "status": "done",
            "uri": reader.artifact.uri,
            "digest": reader.artifact.digest,
            "version": reader.version,
            "results": results,
        }
        if html is not None:
            pictures = find_pictures_of(reader, shards)
            write_output(html, search_page(shown, len(results), pictures).encode())
            answer["html"] = html
    return answer


@contextmanager
def _nearest(reader: IndexReader, config: Config) -> Iterator[Nearest]:
    """What searches the parts: this process, or `search.workers` Ray actors."""
    if config.search.workers is None:
        yield reader.search
        return
    from pipelines.fanout import spread  # a search in this process needs no Ray

    with spread(reader, config.search.workers, config) as nearest:
        yield nearest


def _named(
    reader: IndexReader, batch: Sequence[Query], distances: npt.NDArray[np.int32], ids: Ids
) -> list[tuple[Query, list[tuple[int, Item]]]]:
    """The neighbours of each query with what the index knows of them."""
    items = reader.items(ids.ravel().tolist())
    pairs = zip(batch, distances.tolist(), ids.tolist(), strict=True)
    return [
        (query, [(d, items[number]) for d, number in zip(ds, numbers, strict=True) if number != NO_ID])
        for query, ds, numbers in pairs
    ]


def _result(query: Query, neighbours: Sequence[tuple[int, Item]]) -> dict[str, Any]:
    return {
        "query": query.name,
        "by": query.by,
        "neighbours": [
            {
                "id": item.id,
                "key": item.key,
                "shard": item.shard,
                "row": item.row,
                "distance": distance,
                "labels": list(item.labels),
            }
            for distance, item in neighbours
        ],
    }


# -------------------------------------------------------------------------------------------------------- queries


def _queries(
    reader: IndexReader,
    images: Sequence[str],
    keys: Sequence[str],
    codes: Sequence[str],
    hex_codes: Sequence[str],
    model: str | None,
) -> Iterator[Query]:
    if images:
        yield from _by_image(reader, images, model)
    if keys:
        yield from _by_key(reader, keys)
    for text in hex_codes:
        yield Query(text, "code", _parse_hex(text, reader))
    for uri in codes:
        yield from _by_codes(reader, uri)


def _by_image(reader: IndexReader, images: Sequence[str], model: str | None) -> Iterator[Query]:
    data = [_read_image(name) for name in images]
    artifact = open_input(reader.artifact, "model", model)
    from pipelines.encoder import Encoder  # imports torch, which the other queries can do without

    encoded = Encoder.open(artifact.uri).encode_images(data)
    if encoded.shape[1] != reader.width:
        raise FingerprintMismatch(
            f"{artifact.uri} makes codes of {8 * encoded.shape[1]} bits, {reader.artifact.uri} holds {reader.bits} bits"
        )
    for name, image, code in zip(images, data, encoded, strict=True):
        yield Query(name, "image", code.tobytes(), image=image)


def _read_image(name: str) -> bytes:
    path = Path(name).expanduser()
    try:
        if path.stat().st_size > MAX_BYTES:
            raise InputError(f"{name} has {path.stat().st_size} bytes, the limit for an image is {MAX_BYTES}")
        data = path.read_bytes()
        decode_image(data)
    except FileNotFoundError:
        raise InputError(f"{name} does not exist: name an image file") from None
    except OSError as error:
        raise InputError(f"{name} cannot be read: {error.strerror or error}") from None
    except ImageReject as reject:
        raise InputError(f"{name} cannot be decoded: {reject.reason}, {reject.detail}") from None
    return data


def _by_key(reader: IndexReader, keys: Sequence[str]) -> Iterator[Query]:
    """A key that several of the index's shards hold is searched once for each."""
    found, lacking = reader.find(keys)
    if gone := sorted(reader.removed_keys(lacking)):
        raise InputError(f"key {gone[0]!r} was removed from {reader.artifact.uri}")
    if lacking:
        near = reader.near_keys(lacking[0])
        hint = f"; near it are {', '.join(near)}" if near else ""
        raise InputError(f"key {lacking[0]!r} is not in {reader.artifact.uri}{hint}")
    for item, code in found:
        yield Query(item.key, "key", code, place=Place(item.shard_sha256, item.row), labels=item.labels)


def _parse_hex(text: str, reader: IndexReader) -> bytes:
    try:
        code = bytes.fromhex(text)
    except ValueError:
        raise InputError(f"--code {text!r} is not hexadecimal") from None
    if len(code) != reader.width:
        raise FingerprintMismatch(
            f"--code {text} has {8 * len(code)} bits, {reader.artifact.uri} holds codes of {reader.bits} bits"
        )
    return code


def _by_codes(reader: IndexReader, uri: str) -> Iterator[Query]:
    """Every row of a codes artifact, one shard in memory at a time."""
    entry = open_codes(uri)
    if entry.bits != reader.bits:
        raise FingerprintMismatch(
            f"{entry.artifact.uri} holds codes of {entry.bits} bits, {reader.artifact.uri} of {reader.bits} bits"
        )
    model = reader.artifact.manifest.input("model").digest
    if entry.model != model:
        raise FingerprintMismatch(
            f"{entry.artifact.uri} was made by model {entry.model[:12]}, {reader.artifact.uri} by {model[:12]}"
        )
    for shard in entry.shards:
        table = entry.read(shard)
        codes = code_array(table["code"])
        for key, row, code in zip(table["key"].to_pylist(), table["row"].to_pylist(), codes, strict=True):
            yield Query(key, "codes", code.tobytes(), place=Place(shard.sha256, row))


def _batches(queries: Iterator[Query]) -> Iterator[list[Query]]:
    batch: list[Query] = []
    for query in queries:
        batch.append(query)
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


# ----------------------------------------------------------------------------------------------------------- page


def find_pictures_of(reader: IndexReader, shards: Sequence[str]) -> Pictures:
    """Pictures of the index's samples: from `shards` where named, else through the codes it was built from."""
    if shards:
        pictures = find_pictures((), shards)
        if not any(shard.shard_sha256 in pictures for shard in reader.filled()):
            raise FingerprintMismatch(f"{', '.join(shards)}: none of these shards is in {reader.artifact.uri}")
        return pictures
    codes: list[Artifact] = []
    problems = []
    for entry in reader.artifact.manifest.inputs:
        if entry.kind == "codes":
            try:
                codes.append(open_input(reader.artifact, entry.role))
            except HHNetError as error:
                problems.append(str(error))
    pictures = find_pictures(codes, ())
    pictures.problems += problems
    return pictures


def search_page(shown: Sequence[tuple[Query, Sequence[tuple[int, Item]]]], total: int, pictures: Pictures) -> str:
    """The results as a self-contained page; neighbours are framed by whether they share a class with the query."""
    places = {Place(item.shard_sha256, item.row) for _, near in shown for _, item in near}
    found = pictures.get(places | {query.place for query, _ in shown if query.place})
    rows = [
        Row(
            Tile(query.name, query.labels, _picture(query, found), remark=f"query by {query.by}: {query.name}"),
            [_tile(query, distance, item, found) for distance, item in near],
        )
        for query, near in shown
    ]
    body = [note(f"No pictures of some samples: {problem}") for problem in pictures.problems]
    if places and not found and not pictures.problems:
        body.append(note("No pictures: the samples' images cannot be read from the shards."))
    if total > len(shown):
        body.append(note(f"The first {len(shown)} of {total:,} queries are shown."))
    body.append(gallery(rows))
    lead = f"{total:,} {'query' if total == 1 else 'queries'}, neighbours by Hamming distance, nearest first"
    return document("Search results", "HHNet", body, lead)


def _picture(query: Query, found: dict[Place, str]) -> str | None:
    if query.image is not None:
        return thumbnail(query.image)
    return found.get(query.place) if query.place else None


def _tile(query: Query, distance: int, item: Item, found: dict[Place, str]) -> Tile:
    right = bool(set(query.labels) & set(item.labels)) if query.labels else None
    picture = found.get(Place(item.shard_sha256, item.row))
    return Tile(item.key, item.labels or (item.key,), picture, distance, right, remark=item.key)
