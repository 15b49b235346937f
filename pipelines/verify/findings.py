"""Collects the checks and problems of one verification."""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.artifacts.facts import SplitPart
from pipelines.artifacts.manifest import Artifact
from pipelines.artifacts.versions import VersionsRead, open_input_version
from pipelines.errors import DamagedArtifact, FingerprintMismatch, InputError, StoreUnavailable, format_count
from pipelines.verify.proofs import Proofs
from pipelines.verify.spread import Spread

MAX_PROBLEMS = 20


@dataclass
class Findings:
    """The passed checks and the problems of one verification; all problems are counted, `MAX_PROBLEMS` are kept."""

    artifact: Artifact
    given: Mapping[str, str]
    proofs: Proofs
    """What was proven before, in another version or by another verification."""
    spread: Spread
    checks: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    opened: dict[str, Artifact] = field(default_factory=dict)
    """Inputs that were found at their remembered places, by digest: all versions share them."""
    versions_read: VersionsRead = field(default_factory=VersionsRead)
    followed: set[str] = field(default_factory=set)
    """Digests of the inputs' inputs that were already followed."""
    out_of_reach: set[str] = field(default_factory=set)
    """Digests of the inputs of any version that could not be opened."""
    _texts: set[str] = field(default_factory=set)

    def of(self, artifact: Artifact) -> "Findings":
        """Return the findings on another version, by the same means; what is proven counts for both."""
        return replace(self, artifact=artifact, checks=[], problems=[], _texts=set())

    @property
    def found(self) -> int:
        """Number of problems."""
        return len(self._texts)

    def note_problem(self, text: str) -> None:
        """Note a problem; the same text twice is one problem."""
        if text not in self._texts:
            self._texts.add(text)
            if len(self.problems) < MAX_PROBLEMS:
                self.problems.append(text)

    def absorb(self, other: "Findings", path: str = "") -> None:
        """Take over checks and problems of a part of the verification."""
        self.checks += [f"{path}{check}" for check in other.checks]
        for text in [*other.problems, *other._texts]:
            self.note_problem(text)

    def require(self, holds: bool, text: str) -> None:
        """Note a problem unless it holds."""
        if not holds:
            self.note_problem(text)

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Turn the first damage inside the context into a problem, and go on after it."""
        try:
            yield
        except (DamagedArtifact, FingerprintMismatch) as error:
            self.note_problem(str(error))

    def input(self, role: str) -> Artifact | None:
        """Open the input of this role with the right digest; where it is out of reach, note that and return None."""
        return self._open(self.artifact, role, role, self.given.get(role))

    def inputs(self) -> list[Artifact]:
        """Open all inputs that are within reach, as `input` does."""
        found = [self.input(entry.role) for entry in self.artifact.manifest.inputs]
        return [entry for entry in found if entry is not None]

    def _open(self, artifact: Artifact, role: str, name: str, uri: str | None = None) -> Artifact | None:
        try:
            digest = artifact.manifest.input(role).digest
            found = self.opened.get(digest) if uri is None else None
            if found is None:
                found = open_input_version(artifact, role, uri, self.versions_read)
            if uri is None:
                self.opened[digest] = found
        except (DamagedArtifact, FingerprintMismatch) as error:
            self.note_problem(str(error))
        except (InputError, StoreUnavailable) as error:
            if uri is not None:
                raise
            self.checks.append(f"input {name}: not checked ({error})")
            self.out_of_reach.add(digest)
        else:
            self.checks.append(f"input {name}: {found.uri} has the digest that was used")
            self._follow(found, name)
            return found
        return None

    def require_split(self, key: str, mine: SplitPart | None, said: SplitPart | None) -> None:
        """Require that the split in the manifest, if it names one, is the split of its input."""
        same = mine is None or mine == said
        self.require(same, f"{self.artifact.uri} names another split ({key}) than its input")

    def _follow(self, artifact: Artifact, path: str) -> None:
        """Open the inputs of an input, and theirs in turn, at their remembered places, each by its digest."""
        for entry in artifact.manifest.inputs:
            if entry.digest not in self.followed:
                self.followed.add(entry.digest)
                self._open(artifact, entry.role, f"{path} > {entry.role}")

    def require_one_model(self, inputs: Iterable[Artifact]) -> None:
        """Require that one model made all codes among the inputs: the one that the artifact names, if it names any."""
        own = [entry.digest for entry in self.artifact.manifest.inputs if entry.kind == "model"]
        named = {entry.uri: entry.manifest.input("model").digest for entry in inputs if entry.manifest.kind == "codes"}
        for uri, digest in named.items():
            first = own[0] if own else next(iter(named.values()))
            self.require(
                digest == first,
                f"{self.artifact.uri} is of model {first[:12]}, but its input {uri} was made by {digest[:12]}",
            )


def check_distinct_keys(findings: Findings, keys: pa.ChunkedArray) -> bool:
    """Return True if each key names only one sample of an artifact; else note a problem."""
    if len(keys) == pc.count_distinct(keys).as_py():
        return True
    counts = pc.value_counts(keys)
    twice = counts.filter(pc.greater(counts.field("counts"), 1))
    findings.note_problem(
        f"{findings.artifact.uri}: {format_count(len(twice), 'key')} stand for several samples, such as "
        f"{twice[0]['values'].as_py()!r}"
    )
    return False


def json_object(findings: Findings, name: str) -> dict[str, Any]:
    """Read a part that must be a JSON object; where it is none, note a problem and return {}."""
    artifact = findings.artifact
    with findings.guard():
        try:
            value = json.loads(artifact.read(artifact.manifest.part(name)))
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise DamagedArtifact(f"{artifact.uri}: {name} is not a JSON object")
        findings.checks.append(f"{name} is a JSON object")
        return value
    return {}
