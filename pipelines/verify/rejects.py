"""`hhnet rejects`: the samples that codes lack and the files that an ingest skipped, each with its reason."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pipelines.artifacts.commit import read_claim
from pipelines.artifacts.facts import Receipt
from pipelines.artifacts.manifest import Artifact, Part, read_identity
from pipelines.artifacts.nearby import is_root
from pipelines.artifacts.result import ROWS_SHOWN, Result
from pipelines.artifacts.runs import Record, closed_records
from pipelines.artifacts.tables import REJECTS, read_table
from pipelines.artifacts.versions import open_current
from pipelines.errors import InputError
from pipelines.storage import Store

_KINDS = ("codes", "shards")


@dataclass(frozen=True, kw_only=True)
class RejectsResult(Result):
    """Rejects of codes, or files that the ingest of shards skipped: their number, their reasons, and a row for each.

    Shards keep rows of the first 1,000 files; `found` counts rejects and the samples that are there. Of codes that were
    begun and not published, it shows what was encoded so far.
    """

    TABLES = ("rows",)

    verb: str = "rejects"
    status: str = "done"
    kind: str
    found: int
    rejects: int
    reasons: dict[str, int]
    rows: list[dict[str, Any]]

    def as_text(self) -> str:
        """Return the figures and the first rows, and how many rows are left out."""
        more = len(self.rows) - ROWS_SHOWN
        return super().as_text() + (f"\n  ... and {more:,} more, all of them with --json" if more > 0 else "")


def list_rejects(uri: str) -> RejectsResult:
    """List the rejects of the codes at `uri`, or the files that were skipped when the shards there were made.

    Raises InputError where there are neither codes nor shards.
    """
    store = Store(uri)
    if store.size("manifest.json") is None and is_root(store) and read_identity(store)[0] == "codes":
        status = "unpublished"
        return RejectsResult(status=status, uri=store.uri, digest=None, kind="codes", **_rejects_of_receipts(store))
    artifact = open_current(store)
    kind = artifact.manifest.kind
    if kind not in _KINDS:
        raise InputError(f"{artifact.uri} is {kind}, which has no rejects: name codes or shards")
    found = _rejects_of_codes(artifact) if kind == "codes" else _skips_of_shards(artifact)
    return RejectsResult(uri=artifact.uri, digest=artifact.digest, kind=kind, **found)


def list_rejects_below(uri: str, names: Iterable[str]) -> RejectsResult:
    """List the rejects and skips of the codes and shards `names` below `uri`, each row with the artifact's name.

    Shards that were begun and not published have no skips yet, and are passed over.
    """
    kinds = {name: read_identity(Store(f"{uri}/{name}"))[0] for name in names}
    shards = [name for name, kind in kinds.items() if kind == "shards" and _is_published(uri, name)]
    having = [name for name, kind in kinds.items() if kind == "codes" or name in shards]
    found = [(name, list_rejects(f"{uri}/{name}")) for name in having]
    reasons: Counter[str] = Counter()
    for _, one in found:
        reasons.update(one.reasons)
    return RejectsResult(
        uri=Store(uri).uri,
        digest=None,
        kind="folder",
        found=sum(one.found for _, one in found),
        rejects=sum(one.rejects for _, one in found),
        reasons=dict(reasons.most_common()),
        rows=[{"artifact": name, **row} for name, one in found for row in one.rows],
    )


def _is_published(uri: str, name: str) -> bool:
    return Store(f"{uri}/{name}").size("manifest.json") is not None


def parts_of_codes(store: Store) -> list[Part]:
    """Return the parts of the current version of codes, or those of their receipts if nothing is published yet."""
    try:
        return list(open_current(store, "codes").manifest.parts)
    except InputError:
        return [part for receipt in _all_receipts(store) for part in receipt.parts]


def _all_receipts(store: Store) -> list[Receipt]:
    return [read_claim(store, path, Receipt) for path in store.names("receipts")]


def _rejects_of_codes(codes: Artifact) -> Mapping[str, Any]:
    return {"found": codes.manifest.totals["samples"], **_count_rejects(codes.store)}


def _rejects_of_receipts(store: Store) -> Mapping[str, Any]:
    return {"found": sum(receipt.samples for receipt in _all_receipts(store)), **_count_rejects(store)}


def _count_rejects(store: Store) -> Mapping[str, Any]:
    parts = [part for part in parts_of_codes(store) if part.path.startswith("rejects/")]
    rows = [row for part in parts for row in read_table(store, part, REJECTS).to_pylist()]
    reasons = Counter(row["reason"] for row in rows)
    return {"rejects": len(rows), "reasons": dict(reasons.most_common()), "rows": rows}


def _skips_of_shards(shards: Artifact) -> Mapping[str, Any]:
    """Return the skips as the last ingest recorded them beside the shards; the count is that of the manifest."""
    records = [record for record in closed_records(shards.store) if "skipped_files" in record]
    last: Record = records[-1] if records else {}
    totals = shards.manifest.totals
    return {
        "found": totals.get("found", totals["samples"]),
        "rejects": totals.get("skipped", 0),
        "reasons": last.get("skipped_reasons", {}),
        "rows": last.get("skipped_files", []),
    }
