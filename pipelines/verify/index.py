"""Proves an index: its parts, keys and ordinals, and the codes that it was made from."""

from collections.abc import Sequence
from pathlib import PurePosixPath

import numpy as np
import pyarrow as pa

from pipelines.artifacts.versions import made_as
from pipelines.encode.codes import CodesSet, CodesShard, open_codes, renumber_labels, renumbering, require_signs
from pipelines.errors import DamagedArtifact, format_count
from pipelines.index.keys import keys_of_codes
from pipelines.index.layout import IndexedPart, IndexedShard, keys_name, part_stem
from pipelines.index.reader import IndexReader
from pipelines.storage import scratch_folder
from pipelines.verify.findings import Findings


def prove_index(findings: Findings) -> None:
    """Check that ordinals, key tables, parts and codes agree, and that each part opens without the removed rows."""
    artifact = findings.artifact
    with findings.guard(), scratch_folder() as folder:
        reader = IndexReader(artifact, folder)
        digests = {entry.digest for entry in artifact.manifest.inputs}
        for shard in reader.held() if made_as(artifact) > 1 else reader.shards.values():
            findings.require(
                shard.codes_digest in digests, f"{artifact.uri}: {shard.shard} comes from codes that are not its input"
            )
        paths: dict[str, list[str]] = {}
        for part in artifact.manifest.parts:
            paths.setdefault(PurePosixPath(part.name).stem, []).append(part.path)
        stems = set[str]()
        for entry in reader.parts.values():
            own = PurePosixPath(keys_name(entry.number)).stem, part_stem(entry.number)
            stems |= {*own}
            with findings.guard():
                _prove_part(findings, reader, entry, [path for stem in own for path in paths.get(stem, ())])
        for part in artifact.manifest.parts:
            stem = PurePosixPath(part.name).stem
            owned = stem in stems or not stem.startswith(("part-", "keys-"))
            findings.require(owned, f"{artifact.uri} lists {part.path}, but the ordinal table gives it no rows")
        total = artifact.manifest.totals.get("codes")
        findings.require(total == reader.count, f"{artifact.uri}: the totals say {total} codes, not {reader.count}")
        gone = sum(len(rows) for rows in reader.removed.values())
        findings.checks.append(
            f"{format_count(reader.count, 'code')} in {format_count(len(reader.parts), 'part')} that open"
            + (f", {gone} of their rows removed" if gone else "")
        )
        inputs = findings.inputs()
        findings.require_one_model(inputs)
        for codes in inputs:
            if codes.manifest.kind == "codes":
                with findings.guard():
                    _prove_shards(findings, reader, open_codes(codes))


def _prove_part(findings: Findings, reader: IndexReader, part: IndexedPart, paths: Sequence[str]) -> None:
    """Check that ids ascend and are those of the part's shards, the removed ones among them, and that the part opens.

    Its files are `paths`.
    """
    shards = [(shard.ordinal, shard.rows) for shard in part.shards]
    claim = ("index part", sorted(paths), shards, reader.removed_in(part).tolist())
    if findings.proofs.holds(*claim):
        return
    where = f"{reader.artifact.uri}/{keys_name(part.number)}"
    keys = reader.read_keys(part, ["id", "code", "real_codes"] if reader.real_codes else ["id"])
    ids = keys["id"].to_numpy()
    if (np.diff(ids) <= 0).any() or ids[0] < 0:
        raise DamagedArtifact(f"{where} is not sorted by id")
    ordinals, counts = np.unique(ids >> 32, return_counts=True)
    if list(zip(ordinals.tolist(), counts.tolist(), strict=True)) != shards:
        raise DamagedArtifact(f"{where} does not hold the shards that the ordinal table puts there")
    if reader.real_codes:
        require_signs(keys, reader.bits, where)
    reader.live_keys(part, ["id"])
    reader.open_part(part)  # raises unless the part holds as many codes
    findings.proofs.add(paths, *claim)


def _prove_shards(findings: Findings, reader: IndexReader, codes: CodesSet) -> None:
    """Check that the index holds the tars of these codes with keys and codes, less the compacted rows."""
    uri, later = findings.artifact.uri, made_as(findings.artifact) > 1
    if codes.real_codes != reader.real_codes:
        findings.note_problem(
            f"{uri}: one of the index and its input {codes.artifact.uri} has real codes, the other has none"
        )
        return
    if lacking := sorted(set(codes.classes).difference(reader.classes)):
        findings.note_problem(f"{uri} has no class {lacking[0]!r}, which its input {codes.artifact.uri} has")
        return
    encoded = {shard.sha256: shard for shard in codes.shards}
    indexed = [shard for shard in reader.shards.values() if shard.codes_digest == codes.artifact.digest]
    if later:  # a later version may have removed whole tars
        indexed = [shard for shard in indexed if shard.held]
    found = {shard.shard_sha256 for shard in indexed}
    same = found <= encoded.keys() if later else found == encoded.keys()
    for shard in indexed if same else ():
        source = encoded[shard.shard_sha256]
        same = same and source.rows - shard.rows == (shard.compacted if later else 0)
        if same and shard.rows:
            _prove_rows(findings, reader, shard, codes, source)
    findings.require(same, f"{uri}: the ordinal table does not list the tars of {codes.artifact.uri} with their codes")


def _prove_rows(
    findings: Findings, reader: IndexReader, shard: IndexedShard, codes: CodesSet, source: CodesShard
) -> None:
    """Check that key, code, labels by name and any real codes of every row equal those in the codes."""
    part, class_ids = reader.part(keys_name(shard.part)), renumbering(reader.classes, codes.classes)
    claim = ("index rows", part.path, shard.ordinal, [held.sha256 for held in source.parts], class_ids)
    if findings.proofs.holds(*claim):
        return
    keys = reader.read_shard_keys(shard)
    table = renumber_labels(codes.read(source), class_ids, codes.artifact.uri)
    table = keys_of_codes(table, shard.ordinal, codes.bits, codes.real_codes)
    table = table.filter(pa.array(np.isin(table["id"].to_numpy(), keys["id"].to_numpy())))
    if len(table) == len(keys) and table.cast(keys.schema).equals(keys):
        findings.proofs.add([part.path], *claim)
    else:
        findings.note_problem(
            f"{reader.artifact.uri}/{part.path} has other rows than {codes.artifact.uri}/{source.parts[0].path}"
        )
