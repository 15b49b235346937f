"""Receipts of encoded shards: each is claimed once, and read again by later runs."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pyarrow as pa

from pipelines.artifacts.commit import ArtifactWriter, read_claim
from pipelines.artifacts.facts import Receipt
from pipelines.artifacts.manifest import Artifact, Part, ReceiptRef, read_part
from pipelines.artifacts.parquet import as_written, parquet_bytes, read_parquet
from pipelines.encode.shard import ShardCodes
from pipelines.errors import DamagedArtifact
from pipelines.shards.shards import Shard
from pipelines.storage import ObjectInfo, Store, map_in_order


def publish_shard(
    writer: ArtifactWriter, shard: Shard, receipt: str, done: ShardCodes, kept: Sequence[Part] = ()
) -> Receipt:
    """Put a shard's part and rejects, then claim it with the receipt named `receipt`; return the winning receipt.

    The first receipt wins. Rows that the `kept` parts already hold are left out. Raises DamagedArtifact where another
    attempt won and an object that its receipt names is gone.
    """
    codes, rows = _without_rows(writer.store, kept, done) if kept else (done.codes, done.rows)
    new = [writer.put_part(f"{shard.stem}.parquet", codes, rows)] if rows or not kept else []
    part, *more = sorted([*kept, *new], key=lambda part: part.path)
    rejects = None
    if done.rejects:
        rejects = writer.put_part(f"{shard.stem}.parquet", done.rejects, done.rejected, folder="rejects")
    claim = Receipt(
        shard=shard.name,
        shard_sha256=shard.part.sha256,
        samples=shard.rows,
        part=part,
        more=tuple(more),
        rejects=rejects,
        animated=done.animated,
    )
    winner = writer.put_receipt(receipt, claim)
    if winner != claim:
        for lost in winner.parts:
            if writer.store.size(lost.path) != lost.bytes:
                raise DamagedArtifact(
                    f"{writer.store.uri}/{lost.path} is gone and encoding {shard.name} again gave other bytes: "
                    f"delete receipts/{receipt}.json, or encode to another --out"
                )
    return winner


def _without_rows(store: Store, kept: Sequence[Part], done: ShardCodes) -> tuple[bytes, int]:
    """Return a shard's codes as Parquet without the rows of the `kept` parts, and the number of rows that are left."""
    table = read_parquet(done.codes, "what was encoded")
    held = [read_parquet(read_part(store, part), f"{store.uri}/{part.path}", ["row"])["row"] for part in kept]
    rows = np.concatenate([column.to_numpy() for column in held])
    left = table.filter(pa.array(~np.isin(table["row"].to_numpy(), rows)))
    return parquet_bytes(left.cast(as_written(left.schema))), left.num_rows


def read_receipt(artifact: Artifact, reference: ReceiptRef) -> Receipt:
    """Read the receipt of one shard of published codes, checked against its digest."""
    advice = "it was published so, encode to another --out"
    return reference.parse(Receipt, artifact.uri, advice)


def read_whole_receipt(store: Store, name: str, there: Mapping[str, ObjectInfo] | None = None) -> Receipt | None:
    """Return the receipt of this name, or None if it or an object that it names is missing.

    Existence is taken from `there`, a listing, if given.
    """

    def size(path: str) -> int | None:
        return store.size(path) if there is None else there[path].size if path in there else None

    path = f"receipts/{name}.json"
    if size(path) is None:
        return None
    receipt = read_claim(store, path, Receipt)
    return receipt if all(size(part.path) == part.bytes for part in receipt.parts) else None


def read_whole_receipts(store: Store, names: Sequence[str]) -> dict[str, Receipt]:
    """Return the receipts, by name, of the shards that need not be encoded again."""
    there = store.entries()
    found = map_in_order(lambda name: read_whole_receipt(store, name, there), names)
    return {name: receipt for name, receipt in zip(names, found, strict=True) if receipt is not None}


def count_animated(receipts: Iterable[Receipt]) -> int:
    """Count the pictures of several frames in the shards of these receipts."""
    return sum(receipt.animated for receipt in receipts)
