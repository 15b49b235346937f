"""Proves an index: its parts, keys and ordinals, and the codes that it was made from."""

from collections.abc import Sequence
from pathlib import PurePosixPath

import numpy as np
import pyarrow as pa

from pipelines.artifacts.versions import made_as
from pipelines.encode.codes import CodesSet, CodesShard, open_codes, renumber_labels, renumbering, require_signs
from pipelines.errors import DamagedArtifact
from pipelines.index.kinds import NOTHING_REMOVED
from pipelines.index.reader import IndexedShard, IndexReader, keys_name, part_receipt
from pipelines.storage import scratch_folder
from pipelines.verify.findings import Findings, count


def prove_index(findings: Findings) -> None:
    """Check that ordinals, key tables, parts and codes agree, and that each part opens without the removed rows."""
    artifact = findings.artifact
    with findings.guard(), scratch_folder() as folder:
        reader = IndexReader(artifact, folder)
        digests = {entry.digest for entry in artifact.manifest.inputs}
        filled = reader.filled()
        for shard in filled if made_as(artifact) > 1 else reader.shards.values():
            findings.require(
                shard.codes_digest in digests, f"{artifact.uri}: {shard.shard} comes from codes that are not its input"
            )
        paths: dict[str, list[str]] = {}
        for part in artifact.manifest.parts:
            paths.setdefault(PurePosixPath(part.name).stem, []).append(part.path)
        for shard in filled:
            with findings.guard():
                own = [path for name in ("keys", "part") for path in paths.get(f"{name}-{shard.ordinal:06d}", ())]
                _prove_part(findings, reader, shard, own)
        stems = {f"{name}-{shard.ordinal:06d}" for shard in filled for name in ("part", "keys")}
        for part in artifact.manifest.parts:
            stem = PurePosixPath(part.name).stem
            owned = stem in stems or not stem.startswith(("part-", "keys-"))
            findings.require(owned, f"{artifact.uri} lists {part.path}, but the ordinal table gives it no rows")
        total = artifact.manifest.totals.get("codes")
        findings.require(total == reader.count, f"{artifact.uri}: the totals say {total} codes, not {reader.count}")
        gone = sum(len(rows) for rows in reader.removed.values())
        findings.checks.append(
            f"{count(reader.count, 'code')} in {count(len(filled), 'part')} that open"
            + (f", {gone} of their rows removed" if gone else "")
        )
        inputs = findings.inputs()
        findings.require_one_model(inputs)
        for codes in inputs:
            if codes.manifest.kind == "codes":
                with findings.guard():
                    _prove_shards(findings, reader, open_codes(codes))


def _prove_part(findings: Findings, reader: IndexReader, shard: IndexedShard, paths: Sequence[str]) -> None:
    """Check that rows ascend, the removed ones are among them, and the part opens; its files are `paths`."""
    removed = reader.removed.get(shard.ordinal, NOTHING_REMOVED).tolist()
    claim = ("index part", sorted(paths), shard.rows, removed)
    if findings.proofs.holds(*claim):
        return
    keys = reader.read_keys(shard.ordinal)
    rows = keys["row"].to_numpy()
    if (np.diff(rows) <= 0).any() or rows[0] < 0:
        raise DamagedArtifact(f"{reader.artifact.uri}: the key table of {shard.shard} is not sorted by row")
    if reader.real_codes:
        require_signs(keys, reader.bits, f"{reader.artifact.uri}/{keys_name(shard.ordinal)}")
    reader.live_keys(shard.ordinal)
    reader.open_part(shard)  # raises unless the part holds as many codes
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
        indexed = [shard for shard in indexed if shard.rows]
    found = {shard.shard_sha256 for shard in indexed}
    same = found <= encoded.keys() if later else found == encoded.keys()
    for shard in indexed if same else ():
        source = encoded[shard.shard_sha256]
        gone = source.rows - shard.rows
        explained = part_receipt(findings.artifact, shard.ordinal).compacted if gone and later else 0
        same = same and gone == explained
        if same and shard.rows:
            _prove_rows(findings, reader, shard, codes, source)
    findings.require(same, f"{uri}: the ordinal table does not list the tars of {codes.artifact.uri} with their codes")


def _prove_rows(
    findings: Findings, reader: IndexReader, shard: IndexedShard, codes: CodesSet, source: CodesShard
) -> None:
    """Check that key, code, labels by name and any real codes of every row equal those in the codes."""
    part, class_ids = reader.part(keys_name(shard.ordinal)), renumbering(reader.classes, codes.classes)
    claim = ("index rows", part.path, [held.sha256 for held in source.parts], class_ids)
    if findings.proofs.holds(*claim):
        return
    keys = reader.read_keys(shard.ordinal)
    table = renumber_labels(codes.read(source), class_ids, codes.artifact.uri).select(keys.column_names)
    table = table.filter(pa.array(np.isin(table["row"].to_numpy(), keys["row"].to_numpy())))
    if len(table) == len(keys) and table.cast(keys.schema).equals(keys):
        findings.proofs.add([part.path], *claim)
    else:
        findings.note_problem(
            f"{reader.artifact.uri}/{part.path} has other rows than {codes.artifact.uri}/{source.parts[0].path}"
        )
