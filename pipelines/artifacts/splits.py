"""Identifies the part of a published split that an artifact holds: kept by shards, models and codes, and compared.

Figures of two splits cannot be compared. A split's name does not tell them apart, but its digest does, since it covers
every image of every part.
"""

from collections.abc import Iterable, Mapping, Sequence

from pipelines.artifacts.facts import CodesMeta, PartProof, SplitPart
from pipelines.artifacts.manifest import Artifact
from pipelines.errors import FingerprintMismatch
from pipelines.storage import canonical_json, sha256_of

LEARNED_NOTE = "The queries are images that the model was trained on: the figures say nothing of others."


def split_part(codes: Artifact) -> SplitPart | None:
    """Return the part of a split that codes hold, or None where they name none."""
    return codes.facts(CodesMeta).protocol


def require_one_split(queries: Artifact, database: Sequence[Artifact]) -> None:
    """Raise FingerprintMismatch, naming both, where queries and database are of different splits."""
    mine = split_part(queries)
    for other in database:
        theirs = split_part(other)
        if mine is not None and theirs is not None and mine.digest != theirs.digest:
            raise FingerprintMismatch(
                f"{queries.uri} is of split {mine}, {other.uri} of {theirs}: figures over different splits compare "
                "with nothing; name codes of one `hhnet ingest --protocol`"
            )


def split_facts(queries: Artifact, database: Sequence[Artifact]) -> Mapping[str, str]:
    """Return the facts of a report about its split; {} where the queries are of none."""
    mine = split_part(queries)
    if mine is None:
        return {}
    parts = [part.part if (part := split_part(entry)) else "of no split" for entry in database]
    return {"protocol": mine.name, "split": mine.digest, "queries are": mine.part, "searched are": ", ".join(parts)}


def split_notes(queries: Artifact, database: Sequence[Artifact]) -> list[str]:
    """List, a sentence each, the reasons why a figure is not the figure of its protocol."""
    mine, trained = split_part(queries), queries.facts(CodesMeta).trained_on
    notes = []
    if mine is not None:
        searched = sorted(part.part if (part := split_part(entry)) else "others" for entry in database)
        if mine.part != "query" or searched != sorted(mine.database):
            notes.append(
                f"Not the figure of protocol {mine.name}, which searches its queries in {_listed(mine.database)}: "
                f"here {mine.part} is searched in {_listed(searched)}."
            )
    if trained is not None and mine is not None:
        if trained.digest != mine.digest:
            notes.append(
                f"The model was trained on split {trained}, the queries are of {mine}: if both are of one data set, "
                "some queries may have been trained on."
            )
        elif trained.part == mine.part:
            notes.append(LEARNED_NOTE)
    return notes


def _listed(parts: Sequence[str]) -> str:
    return " and ".join(parts) or "nothing"


def part_proof(samples: Iterable[tuple[str, bytes]]) -> PartProof:
    """Return the digests that identify a part of a split, from key and image sha256 of each sample, in any order.

    `keys` is the sha256 of the sorted keys, one a line; `images` is the sha256 of lines `<sha256>  <key>`.
    """
    ordered = sorted(samples)
    images = "".join(f"{digest.hex()}  {key}\n" for key, digest in ordered)
    keys = keys_digest(key for key, _ in ordered)
    return PartProof(samples=len(ordered), keys=keys, images=sha256_of(images.encode()))


def keys_digest(keys: Iterable[str]) -> str:
    """Return the sha256 of the sorted keys, one a line."""
    return sha256_of("".join(f"{key}\n" for key in sorted(keys)).encode())


def split_digest(parts: Mapping[str, PartProof], database: Sequence[str], files: Mapping[str, str]) -> str:
    """Return the digest of a whole split: the proofs of its parts, the names of the searched ones, and any files."""
    whole = {"parts": parts, "database": list(database)}
    return sha256_of(canonical_json({**whole, "files": files} if files else whole))
