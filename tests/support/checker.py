"""What must hold of a store after anything that happened to it, judged from its bytes alone.

    violations(stored(root))                  of a folder
    violations(stored_on_s3(server, prefix))  of a prefix, pending uploads included
    violations(store.memory.held)             of a store in memory

Nothing here uses the code that wrote the bytes. Of the five properties of a commit protocol, Complete and Exclusive
are read off the store; Concurrent, Abortable and Continuity compare it with `expected`, the manifest that an
undisturbed run wrote or that was there before.
"""

import functools
import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow.parquet as pq
import s3fs

from tests.support.seaweed import ACCESS_KEY, BUCKET, SECRET_KEY, Seaweed

Stored = Mapping[str, bytes]
PENDING = "pending-uploads/"


def stored(root: str | Path) -> dict[str, bytes]:
    """All files below a folder, by their relative names."""
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(Path(root).rglob("*")) if path.is_file()}


@functools.cache
def client_of(server: Seaweed) -> s3fs.S3FileSystem:
    """A client of the server itself, whatever the environment says."""
    return s3fs.S3FileSystem(
        key=ACCESS_KEY,
        secret=SECRET_KEY,
        endpoint_url=server.endpoint,
        skip_instance_cache=True,
        use_listings_cache=False,
    )


def stored_on_s3(server: Seaweed, prefix: str) -> dict[str, bytes]:
    """All objects below a prefix of the test bucket, and each pending upload as an object of its own."""
    client, root = client_of(server), f"{BUCKET}/{prefix}"
    found = {name[len(root) + 1 :]: client.cat_file(name) for name in client.find(root)}
    for upload in client.list_multipart_uploads(BUCKET):
        if upload["Key"].startswith(f"{prefix}/"):
            found[PENDING + upload["Key"]] = b""
    return found


def violations(objects: Stored, expected: bytes | None = None) -> list[str]:
    """Everything that is wrong; none is what a test wants."""
    return list(_violations(objects, expected))


def _violations(objects: Stored, expected: bytes | None) -> Iterator[str]:
    for name in objects:
        if PurePosixPath(name).name.startswith(".tmp-"):
            yield f"{name}: a temporary name was left behind"
        if name.startswith(PENDING):
            yield f"{name}: an upload was left pending"
    data = objects.get("manifest.json")
    if data is None:
        yield "manifest.json: nothing was committed"
        return
    if expected is not None and data != expected:
        yield "manifest.json: not the bytes of the undisturbed run"
    try:
        manifest = json.loads(data)
        if _canonical(manifest) != data:
            yield "manifest.json: not canonical"
        unsigned = {key: value for key, value in manifest.items() if key != "digest"}
        if hashlib.sha256(_canonical(unsigned)).hexdigest() != manifest["digest"]:
            yield "manifest.json: does not match its digest"
    except (ValueError, KeyError, TypeError) as error:
        yield f"manifest.json: not readable ({error})"
        return
    yield from _identity(objects, manifest)
    damaged = list(_digests(objects, manifest))
    yield from damaged
    if not damaged:
        yield from _receipts(objects, manifest)
        yield from {"shards": _shards, "codes": _codes}.get(manifest["kind"], _nothing)(objects, manifest)


def _canonical(value: Any) -> bytes:
    return (json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False) + "\n").encode()


def _nothing(objects: Stored, manifest: Any) -> Iterable[str]:
    return ()


def _identity(objects: Stored, manifest: Any) -> Iterator[str]:
    identity = {name: manifest[name] for name in ("format", "kind", "fingerprint")}
    if objects.get("identity.json") != _canonical(identity):
        yield "identity.json: does not agree with the manifest"


def _digests(objects: Stored, manifest: Any) -> Iterator[str]:
    """Complete: everything the manifest names is there, with its bytes; each thing once, and in order."""
    for kind in ("parts", "receipts"):
        entries = manifest[kind]
        for entry in entries:
            data = objects.get(entry["path"])
            if data is None:
                yield f"{entry['path']}: is missing"
            elif kind == "receipts":
                if data != _canonical(entry["receipt"]):
                    yield f"{entry['path']}: is not the receipt in the manifest"
            elif (len(data), hashlib.sha256(data).hexdigest()) != (entry["bytes"], entry["sha256"]):
                yield f"{entry['path']}: does not match its digest"
        paths = [entry["path"] for entry in entries]
        if paths != sorted(paths):
            yield f"manifest.json: {kind} are not in order"
        yield from _twice("manifest.json: logical name", (_logical(path) for path in paths))
    for entry in manifest["parts"]:
        if entry["sha256"][:16] not in PurePosixPath(entry["path"]).name:
            yield f"{entry['path']}: is not named by its digest"


def _logical(path: str) -> str:
    name = PurePosixPath(path)
    return f"{name.parent}/{name.stem[:-17]}{name.suffix}" if name.parent.name in ("parts", "rejects") else path


def _twice(what: str, values: Iterable[Any]) -> Iterator[str]:
    for value, count in Counter(values).items():
        if count > 1:
            yield f"{what} {value!r} stands {count} times"


def _receipts(objects: Stored, manifest: Any) -> Iterator[str]:
    """Exclusive: each shard was claimed once, and what its receipt claims is what the manifest holds."""
    named = {entry["path"] for entry in manifest["receipts"]}
    there = {name for name in objects if name.startswith("receipts/")}
    for name in sorted(there ^ named):
        yield f"{name}: is in the store or in the manifest, not in both"
    parts = {entry["path"]: entry for entry in manifest["parts"]}
    claimed = []
    for name in sorted(named & there):
        receipt = json.loads(objects[name])
        for role in ("part", "rejects", "keys"):
            if receipt.get(role):
                claimed.append(receipt[role]["path"])
                if parts.get(receipt[role]["path"]) != receipt[role]:
                    yield f"{name}: claims {receipt[role]['path']}, which the manifest does not hold"
    yield from _twice("receipts: the part", claimed)


def _rows(objects: Stored, path: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(io.BytesIO(objects[path])).to_pylist()
    return rows


def _numbers(directory: Mapping[str, Any]) -> list[int]:
    return sorted({place["piece"] for place in directory.values()})


def _shards(objects: Stored, manifest: Any) -> Iterator[str]:
    """Every sample of the index lies in its tar as the index says; no tar holds more."""
    tars = {_logical(entry["path"])[6:]: entry for entry in manifest["parts"]}
    directory = {row["shard"]: row for row in _rows(objects, tars.pop("tars.parquet")["path"])}
    pieces = {number: _rows(objects, tars.pop(f"index-{number:06d}.parquet")["path"]) for number in _numbers(directory)}
    rows = [row for number in sorted(pieces) for row in pieces[number]]
    for name, place in directory.items():
        own = pieces[place["piece"]][place["start"] : place["start"] + place["rows"]]
        if len(own) != place["rows"] or {row["shard"] for row in own} != {name}:
            yield f"index: the directory does not say where the rows of {name} are"
    yield from _twice("index: the key", (row["key"] for row in rows))
    if len(rows) != manifest["totals"]["samples"]:
        yield f"index: {len(rows)} rows, the totals say {manifest['totals']['samples']} samples"
    counts = Counter(row["shard"] for row in rows)
    for name, entry in tars.items():
        if counts[name] != entry["rows"]:
            yield f"{entry['path']}: {entry['rows']} rows, the index has {counts[name]}"
    for row in rows:
        data = objects[tars[row["shard"]]["path"]]
        for member in row["members"]:
            content = data[member["offset"] : member["offset"] + member["size"]]
            if hashlib.sha256(content).digest() != member["sha256"]:
                yield f"{row['shard']}: {member['name']} is not what the index says"


def _codes(objects: Stored, manifest: Any) -> Iterator[str]:
    """Conservation: samples = codes + rejects, for each shard and in all; no sample twice, and all in order."""
    found: list[tuple[str, int]] = []
    for entry in manifest["receipts"]:
        receipt = json.loads(objects[entry["path"]])
        held = {
            role: _rows(objects, receipt[role]["path"]) if receipt.get(role) else [] for role in ("part", "rejects")
        }
        if sum(len(rows) for rows in held.values()) != receipt["samples"]:
            yield f"{entry['path']}: samples are not codes + rejects"
        for role, rows in held.items():
            if receipt.get(role) and len(rows) != receipt[role]["rows"]:
                yield f"{receipt[role]['path']}: {len(rows)} rows, its receipt says {receipt[role]['rows']}"
            numbers = [row["row"] for row in rows]
            if numbers != sorted(numbers):
                yield f"{receipt[role]['path']}: rows are not in order"
            found += [(row["shard"], row["row"]) for row in rows]
    yield from _twice("codes: the sample", found)
    if len(found) != manifest["totals"]["samples"]:
        yield f"codes: {len(found)} codes and rejects, the totals say {manifest['totals']['samples']} samples"
