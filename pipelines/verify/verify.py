"""Proves an artifact from its stored bytes alone: digests, counts, schemas, conservation, and its chain of inputs.

`verify` is that proof. It skips what an earlier one proved, and spreads much work over Ray. `verify_tars` checks the
shards at the start of a run. It lists damage instead of failing, since `encode` turns damaged samples into rejects.
"""

import json
import logging
import math
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from pipelines.artifacts.commit import list_versions
from pipelines.artifacts.facts import ShardsMeta
from pipelines.artifacts.manifest import Artifact, Entry, Part, ReceiptRef, open_artifact
from pipelines.artifacts.result import Result
from pipelines.artifacts.versions import (
    NAMED_FOLDERS,
    each_referenced,
    manifest_path,
    open_current,
    open_known,
    read_version,
)
from pipelines.artifacts.words import format_bytes, last_part, list_first
from pipelines.cluster.progress import stage
from pipelines.cluster.ray_pool import Pool, ray_pool
from pipelines.cluster.submit import job_address, on_cluster
from pipelines.config.settings import Config
from pipelines.errors import DamagedArtifact, InputError, format_count
from pipelines.shards.shards import Shard, open_shards
from pipelines.shards.tar import Hashed
from pipelines.storage import Store, canonical_json
from pipelines.verify.codes import prove_codes
from pipelines.verify.duplicates import prove_duplicates
from pipelines.verify.findings import MAX_PROBLEMS, Findings
from pipelines.verify.index import prove_index
from pipelines.verify.model import prove_checkpoint, prove_model
from pipelines.verify.proofs import Proofs
from pipelines.verify.report import prove_alias, prove_report
from pipelines.verify.shards import prove_shards, prove_tar
from pipelines.verify.spread import Spread
from pipelines.verify.study import prove_study

_log = logging.getLogger(__name__)

DEFAULTS = Config()
ARTIFACTS_NAMED = 5
PROVEN = "proven"
"""Folder below a run's `--out`, outside every artifact, of the tars that were proven: `<id>.json`, each put once."""

PROOFS: Mapping[str, Callable[[Findings], None]] = {
    "codes": prove_codes,
    "index": prove_index,
    "model": prove_model,
    "checkpoint": prove_checkpoint,
    "report": prove_report,
    "duplicates": prove_duplicates,
    "alias": prove_alias,
    "study": prove_study,
}
"""The proof of each kind: its contents beyond their digests, and its relation to its inputs.

A proof adds problems to `Findings`, so that one run names all of them. `shards` is not here: its tars are digested and
read in one pass.
"""


@dataclass(frozen=True, kw_only=True)
class VerifyResult(Result):
    """The passed checks, the number of files `read` now and `known` to be right before, and files of no version."""

    verb: str = "verify"
    kind: str
    read: int
    known: int
    checks: list[str]
    orphans: list[str]

    def outcome(self) -> str:
        """Return that the artifact is valid: all else is an error."""
        return "valid"


@dataclass(frozen=True, kw_only=True)
class FolderResult(Result):
    """The artifacts below a folder, each with its kind and the number of checks that it passed."""

    TABLES = ("artifacts",)

    verb: str = "verify"
    artifacts: list[dict[str, Any]]

    def outcome(self) -> str:
        """Return that every artifact is valid: all else is an error."""
        return "valid"


@dataclass(frozen=True, kw_only=True)
class TarsResult(Result):
    """Tars `proven` now, `known` to be right before and `left` for another run; `damaged` lists the problems."""

    verb: str = "verify"
    kind: str = "shards"
    tars: int
    proven: int
    known: int
    left: int
    damaged: list[str]

    def outcome(self) -> str:
        """Return what the tars read now are."""
        return "damaged" if self.damaged else "valid" if self.proven else self.status


@on_cluster("verify {uri}", here=lambda given: Store(given["uri"]).is_local)
def verify(
    uri: str,
    config: Config = DEFAULTS,
    shards: str | None = None,
    model: str | None = None,
    full: bool = False,
    sample: float = 0.0,
    pool: Pool | None = ray_pool,
) -> VerifyResult:
    """Check everything that the artifact at `uri` claims.

    What earlier verifications proved is skipped where size and time of its files are as they were. `sample` is the
    share of it that is proven again, what was proven longest ago first; with `full` all of it is. Much is read on Ray,
    unless `pool` is None; for a store that nodes see, in a Ray job if `ray.address` asks for one.

    Inputs are looked for at `shards` and `model` where given, else at their remembered places; one that is out of reach
    is noted, and is no failure. The same holds for orphans, files that no version names. Raises DamagedArtifact naming
    the first problem and the number of others; InputError where nothing was committed.
    """
    if job_address(config) is not None:
        pool = None  # its nodes see nothing of this disk
    first = open_artifact(uri)
    given = {role: where for role, where in (("shards", shards), ("model", model)) if where is not None}
    proofs = Proofs(first.store, first.store.entries(), 1.0 if full else sample)
    ended = False
    try:
        result = _prove(Findings(first, given, proofs, Spread(first.store, config, pool)))
        ended = True
    except DamagedArtifact:
        ended = True
        raise
    finally:
        proofs.save(ended)
    return result


def _prove(findings: Findings) -> VerifyResult:
    """Prove all versions of the artifact that `findings` begins with, its first one."""
    first, published = findings.artifact, _published(findings)
    kind = first.manifest.kind
    newest = findings.of(open_current(first.store)) if kind == "shards" and len(published) > 1 else findings
    tars = prove_shards(newest) if kind == "shards" else []
    counts = _check_bytes(newest, list(published.values()), tars)
    if newest is not findings:
        findings.absorb(newest)
    current, known = open_current(first.store), 0
    for path, artifact in published.items():
        claim = "version", path, artifact.digest
        held = findings.proofs.holds(*claim)
        if held and kind != "alias" and artifact.digest != current.digest and not findings.given:
            known += 1  # its parts were looked at with all others
            continue
        found = findings if artifact is first else findings.of(artifact)
        _check_envelope(found, path)
        if kind in PROOFS:
            PROOFS[kind](found)
        if not (held or found.problems or findings.given or findings.out_of_reach):
            findings.proofs.add([path], *claim)
        if found is not findings:
            findings.absorb(found, f"{path}: ")
    if known:
        findings.checks.append(f"{format_count(known, 'older version')} proven before, with manifests as they were")
    if kind not in PROOFS and kind != "shards":
        findings.checks.append(f"kind {kind!r} is not known here: digests only")
    if findings.problems:
        raise DamagedArtifact(_summary(findings))
    orphans = _orphans(published)
    return VerifyResult.of(current, "done", kind=kind, **counts, checks=findings.checks, orphans=orphans)


def verify_folder(
    uri: str, names: Sequence[str], config: Config, full: bool = False, sample: float = 0.0
) -> FolderResult:
    """Verify the artifacts `names` below `uri`; warn of each damaged one, and raise DamagedArtifact at the end."""
    damaged, rows = [], []
    for name in names:
        try:
            found = verify(f"{uri}/{name}", config, full=full, sample=sample)
        except (DamagedArtifact, InputError) as error:  # InputError: it was begun and not finished
            _log.warning("%s", error)
            damaged.append(name)
        else:
            rows.append(
                {
                    "artifact": name,
                    "kind": found.kind,
                    "checks": len(found.checks),
                    "read": found.read,
                    "known": found.known,
                    "digest": found.digest,
                }
            )
    if damaged:
        named = list_first(damaged, ARTIFACTS_NAMED)
        raise DamagedArtifact(f"{len(damaged)} of {len(names)} artifacts below {uri} are not whole: {named}")
    return FolderResult(status="done", uri=Store(uri).uri, digest=None, artifacts=rows)


@on_cluster("verify {uri}", out="--for-run")
def verify_tars(uri: str, out: str, config: Config, pool: Pool = ray_pool) -> TarsResult:
    """Prove the tars of a shards artifact that runs with this `out` have not proven yet, on a pool of Ray workers.

    At most `run.verify` of all tars are read; the status is `unchanged` where none was. Raises DamagedArtifact where
    manifest or index differ from the published ones.
    """
    artifact = open_current(uri, "shards")
    findings = Findings(artifact, {}, Proofs(artifact.store, {}), Spread(artifact.store, config, pool=None))
    _check_envelope(findings, manifest_path(artifact))
    shards = [shard for shard, _ in prove_shards(findings)]
    if findings.problems:
        raise DamagedArtifact(_summary(findings))
    known = _remembered_tars(Store(out))
    new = sorted((shard for shard in shards if shard.part.sha256 not in known), key=lambda shard: shard.part.sha256)
    chosen = new[: math.ceil(config.run.verify * len(shards))]
    proven, damaged = _read_tars(artifact, chosen, Store(out), config, pool)
    return TarsResult.of(
        artifact,
        "done" if chosen else "unchanged",
        tars=len(shards),
        proven=proven,
        known=len(shards) - len(new),
        left=len(new) - proven - len(damaged),
        damaged=damaged,
    )


def _read_tars(
    artifact: Artifact, shards: list[Shard], out: Store, config: Config, pool: Pool
) -> tuple[int, list[str]]:
    """Return the number of right tars, which are remembered, and the problems of the others."""
    if not shards:
        return 0, []
    digests = {shard.name: shard.part.sha256 for shard in shards}
    proven: list[str] = []
    damaged: list[str] = []
    name = f"verify: {last_part(artifact.uri)}"
    with stage(name, len(shards), "tars") as advance, pool(artifact.store, config) as map_items:
        outcomes = map_items(TarProver, (artifact.uri,), list(digests), verb="verify", workers=None)
        try:
            for outcome in outcomes:
                if outcome.error is None:  # else its workers died: the tar may still be right
                    if outcome.result:
                        damaged.append(outcome.result[0])
                    else:
                        proven.append(digests[outcome.item])
                advance(1, f"{len(damaged)} damaged" if damaged else "")
        finally:
            if proven:
                out.put(f"{PROVEN}/{uuid.uuid4().hex}.json", canonical_json({"tars": sorted(proven)}))
    return len(proven), sorted(damaged)


def _remembered_tars(store: Store) -> set[str]:
    """Return the sha256 of all tars that runs with this `--out` proved; raise DamagedArtifact for a broken record."""
    known: set[str] = set()
    for name in store.names(PROVEN):
        try:
            known.update(json.loads(store.read(name))["tars"])
        except (ValueError, KeyError, TypeError):
            raise DamagedArtifact(
                f"{store.uri}/{name} is no list of proven tars: delete it, and they are read again"
            ) from None
    return known


class TarProver:
    """A Ray worker of `verify_tars`: takes the name of a tar and returns its problems."""

    def __init__(self, uri: str) -> None:
        self.shards = open_shards(uri)

    def run(self, name: str) -> list[str]:
        """Stream one tar against its digest and the index."""
        return prove_tar(self.shards.artifact, self.shards.shard(name), len(self.shards.classes))


def _published(findings: Findings) -> dict[str, Artifact]:
    """Return every published manifest of the root by its path, oldest first; note versions that name none."""
    store = findings.artifact.store
    numbers = list_versions(store)
    collected = bool(numbers) and numbers[0] > 1
    found = {} if collected else {"manifest.json": findings.artifact}
    for number in numbers:
        with findings.guard():
            found |= {path: artifact for path, artifact in [read_version(store, number)] if path not in found}
    if numbers:
        findings.checks.append(f"versions {numbers[0]} to {numbers[-1]} name manifests that are there")
        whole = numbers == list(range(numbers[0], numbers[-1] + 1))
        findings.require(whole, f"{store.uri}: version numbers leave a gap")
    return found


def _summary(findings: Findings) -> str:
    first, *others = findings.problems
    if not others:
        return first
    more = f"; and {findings.found - 1} more"
    listed = "; ".join(others)
    cut = f" (the first {MAX_PROBLEMS} are named)" if findings.found > MAX_PROBLEMS else ""
    return f"{first}{more}{cut}: {listed}"


def _check_envelope(findings: Findings, path: str) -> None:
    """Check that manifest and identity have their canonical bytes and agree; opening checked the manifest's digest."""
    artifact = findings.artifact
    manifest = artifact.manifest
    identity = {"format": manifest.format, "kind": manifest.kind, "fingerprint": manifest.fingerprint}
    expected = {path: manifest.to_bytes(), "identity.json": canonical_json(identity)}
    for name, data in expected.items():
        where = f"{artifact.uri}/{name}"
        try:
            same = artifact.store.read(name) == data
        except FileNotFoundError:
            findings.note_problem(f"{where} is missing")
        else:
            findings.require(same, f"{where} is not what was published with fingerprint {manifest.fingerprint[:12]}")
    findings.checks.append("the manifest matches its own digest, and identity.json agrees with it")


class BytesProver:
    """Proves the bytes of single objects; of a tar in the same pass also its members, against the shard index."""

    def __init__(self, artifact: Artifact, tars: Iterable[Shard]) -> None:
        self._artifact, self._tars = artifact, {shard.part.path: shard for shard in tars}
        self._classes = len(artifact.facts(ShardsMeta).classes) if self._tars else 0

    @classmethod
    def open(cls, uri: str, kind: str, digest: str, tars: bool) -> Self:
        """Open the version of this digest; with `tars` they are held against the shard index."""
        artifact = open_known(uri, kind, digest)
        return cls(artifact, open_shards(artifact).shards if tars else ())

    def prove(self, entry: Entry) -> list[str]:
        """Return the problems of an object."""
        shard = self._tars.get(entry.path)
        return _damage(self._artifact, entry) if shard is None else prove_tar(self._artifact, shard, self._classes)

    def run(self, items: Sequence[Entry]) -> list[list[str]]:
        """Return the problems of several objects."""
        return [self.prove(entry) for entry in items]


def _check_bytes(
    findings: Findings, published: Sequence[Artifact], tars: Sequence[tuple[Shard, str]]
) -> dict[str, int]:
    """Check size and sha256 of all parts and receipts of all versions, and a tar's members in the same pass.

    Returns the number of objects that were read, and of those that were known.
    """
    artifact, proofs = findings.artifact, findings.proofs
    rows = {shard.part.path: digest for shard, digest in tars}
    named = {(entry.path, entry.sha256): entry for one in published for entry in each_referenced(one)}
    meta = artifact.facts(ShardsMeta) if tars else None
    of_tars = [len(meta.classes), meta.adopted] if meta else []

    def claim(entry: Entry) -> tuple[object, ...]:
        bytes_of = entry.path, entry.bytes, entry.sha256
        return ("tar", *bytes_of, rows[entry.path], *of_tars) if entry.path in rows else ("bytes", *bytes_of)

    new = [entry for entry in named.values() if not proofs.holds(*claim(entry))]
    prover = BytesProver(artifact, [shard for shard, _ in tars])
    args = artifact.uri, artifact.manifest.kind, artifact.digest, bool(tars)
    for entry, problems in findings.spread.run(prover, args, new, [entry.bytes for entry in new], "files"):
        for problem in problems:
            findings.note_problem(problem)
        if not problems:
            proofs.add([entry.path], *claim(entry))
    _note_bytes(findings, list(named.values()), known := len(named) - len(new))
    return {"read": len(new), "known": known}


def _note_bytes(findings: Findings, entries: Sequence[Entry], known: int) -> None:
    """Note the check of all parts and receipts, and how many of them an earlier verification had read."""
    parts = [entry for entry in entries if isinstance(entry, Part)]
    size, rejects = sum(part.bytes for part in parts), sum(part.path.startswith("rejects/") for part in parts)
    of_them = f", {rejects} of them rejects" if rejects else ""
    receipts = format_count(sum(isinstance(entry, ReceiptRef) for entry in entries), "receipt")
    before = f"; {known:,} of these are unchanged since an earlier verify" if known else ""
    findings.checks.append(
        f"{format_count(len(parts), 'part')} ({format_bytes(size)}{of_them}) and {receipts} match their sha256{before}"
    )


def _damage(artifact: Artifact, entry: Entry) -> list[str]:
    where = f"{artifact.uri}/{entry.path}"
    try:
        with artifact.store.open(entry.path) as stream:
            found = Hashed(stream).finish()
    except FileNotFoundError:
        return [f"{where} is missing"]
    same = found == (entry.bytes, entry.sha256)
    return [] if same else [f"{where} does not match the digest in its manifest"]


def _orphans(published: Mapping[str, Artifact]) -> list[str]:
    """Return the files that no version names.

    A lost race or a killed run leaves them behind, and `hhnet gc` deletes them. Files in the folder of versions that
    are no versions are named as well, and left to their owner.
    """
    named = {*published, *(entry.path for artifact in published.values() for entry in each_referenced(artifact))}
    store = next(iter(published.values())).store
    named |= {f"versions/{number}.json" for number in list_versions(store)}
    return [name for folder in (*NAMED_FOLDERS, "versions") for name in store.names(folder) if name not in named]
