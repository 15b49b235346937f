"""Proves a shards artifact: its index as a whole, and each tar in one pass against its digest and its rows."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import suppress

import pyarrow as pa

from pipelines.artifacts.facts import ProtocolCard, ShardsMeta
from pipelines.artifacts.manifest import Artifact
from pipelines.artifacts.parquet import table_digest
from pipelines.artifacts.splits import part_proof, split_digest
from pipelines.errors import DamagedArtifact, format_count
from pipelines.shards.shards import Member, Record, Shard, ShardSet, open_shards
from pipelines.shards.tar import Hashed, TarDamaged, TarEntry, read_tar
from pipelines.verify.findings import Findings, check_distinct_keys


def prove_tar(artifact: Artifact, shard: Shard, classes: int) -> list[str]:
    """Stream one tar against its digest and its index rows: members, their order and bytes, and the labels inside.

    An adopted tar may hold members that the index does not list, and may end in damage after the listed ones. Its
    labels are not checked, since the adoption decided their meaning.
    """
    where = f"{artifact.uri}/{shard.part.path}"
    pairs = [(member, record) for record in shard.records() for member in record.members]
    pairs.sort(key=lambda pair: pair[0].offset)
    try:
        with artifact.store.open(shard.part.path) as stream:
            source = Hashed(stream)
            compare = _compare_adopted if artifact.facts(ShardsMeta).adopted else _compare
            problems = [f"{where}{problem}" for problem in compare(source, pairs)]
            found = source.finish()
    except FileNotFoundError:
        return [f"{where} is missing"]
    except TarDamaged as error:
        return [f"{where}: {error}"]
    if found != (shard.part.bytes, shard.part.sha256):
        problems.append(f"{where} does not match the digest in its manifest")
    highest = max((label for _, record in pairs for label in record.labels), default=-1)
    if highest >= classes:
        problems.append(f"{where}: the index has class id {highest}, outside the {classes} classes of the manifest")
    return problems


def _compare(source: Hashed, pairs: list[tuple[Member, Record]]) -> Iterator[str]:
    """Yield the differences between a tar and its index; the first different member ends the comparison."""
    place = -1
    for place, (entry, content) in enumerate(read_tar(source)):
        if place >= len(pairs):
            yield f" holds {entry.name}, which the index does not list"
            return
        member, record = pairs[place]
        if content is None or not _is_member(member, entry, content):
            yield f": {entry.name} at byte {entry.offset} is not the {member.name} of the index"
            return
        labels = _labels_in(member.name, content)
        if labels is not None and labels != list(record.labels):
            yield f": {member.name} says labels {labels}, the index {list(record.labels)}"
    if place + 1 < len(pairs):
        yield f" ends before {pairs[place + 1][0].name}, which the index lists"


def _compare_adopted(source: Hashed, pairs: list[tuple[Member, Record]]) -> Iterator[str]:
    """Yield a problem if an adopted tar lacks listed members; it may hold others."""
    listed = {member.offset: member for member, _ in pairs}
    with suppress(TarDamaged):  # the members behind the damage stay in `listed`, and are reported below
        for entry, content in read_tar(source, lambda entry: entry.offset in listed):
            member = listed.get(entry.offset)
            if member is not None and content is not None and _is_member(member, entry, content):
                del listed[entry.offset]
    if listed:
        first = listed[min(listed)]
        more = f", nor {len(listed) - 1} more that it lists" if len(listed) > 1 else ""
        yield f" does not hold {first.name} at byte {first.offset} as the index has it{more}"


def _is_member(member: Member, entry: TarEntry, content: bytes) -> bool:
    return Member(entry.name, entry.offset, entry.size, hashlib.sha256(content).digest()) == member


def _labels_in(name: str, content: bytes) -> list[int] | None:
    """Return the labels in a member: None for an image, [-1] where they are not readable."""
    try:
        if name.endswith(".cls"):
            return [int(content)]
        if name.endswith(".json"):
            return [int(label) for label in json.loads(content)["labels"]]
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return [-1]
    return None


def prove_shards(findings: Findings) -> list[tuple[Shard, str]]:
    """Check the index and the totals; return the shards, each with the digest of its rows of the index.

    `prove_tar` has yet to stream their tars.
    """
    artifact = findings.artifact
    with findings.guard():
        opened = open_shards(artifact)
        totals = artifact.manifest.totals
        keys, found = list[pa.Array](), list[tuple[Shard, str]]()
        for shard in opened.shards:
            rows = shard.table()
            keys += rows["key"].chunks
            found.append((shard, table_digest(rows)))
        check_distinct_keys(findings, pa.chunked_array(keys, pa.string()))
        findings.require(
            totals.get("samples") == opened.samples,
            f"{artifact.uri}: the totals say {totals.get('samples')} samples, the index has {opened.samples}",
        )
        meta = artifact.facts(ShardsMeta)
        if meta.split is None and "found" in totals:
            findings.require(
                totals["found"] == totals["samples"] + totals["skipped"],
                f"{artifact.uri}: {totals['found']} files found are not samples plus skipped",
            )
        findings.checks.append(
            f"{format_count(opened.samples, 'sample')} in {format_count(len(opened.shards), 'tar')}, keys distinct, "
            f"each member where the index says, with its sha256{'' if meta.adopted else ' and labels'}"
        )
        if meta.protocol is not None:
            _prove_protocol(findings, opened, meta.protocol, meta.split.part if meta.split else "")
        return found
    return []


def _prove_protocol(findings: Findings, opened: ShardSet, card: ProtocolCard, part: str) -> None:
    """Check that the samples are one part of a protocol's split, and that the card has the digest of all parts."""
    uri, name = findings.artifact.uri, card.name
    if part not in card.parts:
        raise DamagedArtifact(f"{uri}: the manifest does not say which part of which protocol this is")
    digest = split_digest(card.parts, card.database, card.files)
    whole, expected = digest == card.digest, card.parts[part]
    found = part_proof((record.key, record.members[0].sha256) for shard in opened.shards for record in shard.records())
    findings.require(whole, f"{uri}: the parts of protocol {name} do not have the digest of its split")
    findings.require(found == expected, f"{uri}: the samples are not those of {part} in protocol {name}")
    findings.checks.append(f"keys and images are those of {part} in protocol {name}, split {digest[:12]}")
