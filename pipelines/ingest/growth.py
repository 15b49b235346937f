"""The next version of adopted shards: adopting again adds the tars that are new beside the earlier ones.

A tar keeps its rows and a class its id. So codes and an index of the version before hold for the next one too, and only
new tars are encoded.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import pyarrow as pa

from pipelines.artifacts.commit import list_versions
from pipelines.artifacts.facts import ShardsMeta
from pipelines.artifacts.manifest import Artifact, Part, fingerprint, open_artifact
from pipelines.artifacts.versions import missing_paths, open_current, publish_next
from pipelines.errors import DamagedArtifact, InputError
from pipelines.shards.index import ShardIndex, is_tar
from pipelines.shards.shards import Shard, open_shards
from pipelines.storage import Store


@dataclass(frozen=True)
class Grown:
    """The current version of adopted shards, to which the next one adds."""

    artifact: Artifact
    number: int
    shards: Mapping[str, Shard]
    index: ShardIndex
    classes: tuple[str, ...]

    @cached_property
    def keys(self) -> dict[str, set[str]]:
        """Keys of each tar in this version, by the tar's name."""
        return {name: set(shard.table()["key"].to_pylist()) for name, shard in self.shards.items()}

    @property
    def parts(self) -> list[Part]:
        """Parts of this version that are tars."""
        return list(filter(is_tar, self.artifact.manifest.parts))

    def names(self, found: Sequence[str], origin: Store) -> list[str]:
        """Return the tars to look at, in order: those `found` and those of the version. InputError if one vanished."""
        there = origin.entries()
        for name in self.shards:
            if name not in there:
                raise InputError(
                    f"{origin.uri}/{name} vanished since it was adopted at {self.artifact.uri}: bring it back, or give "
                    "another --out"
                )
        return sorted({*found, *self.shards})

    def require_same_bytes(self, name: str, sha256: str, origin: Store) -> None:
        """Raise InputError if a tar of the version has other bytes now."""
        if name in self.shards and self.shards[name].part.sha256 != sha256:
            raise InputError(
                f"{origin.uri}/{name} changed since it was adopted at {self.artifact.uri}: bring its bytes back, or "
                "give another --out"
            )

    def require_same_rows(self, name: str, rows: pa.Table) -> None:
        """Raise InputError if a tar of the version would have other samples or class ids in the next one."""
        if name not in self.shards:
            return
        before, after = (table.select(["key", "labels"]).to_pylist() for table in (self.shards[name].table(), rows))
        if before != after:
            raise InputError(
                f"{self.artifact.uri}: the samples of {name} would be of other classes than before: give the --classes "
                "with which it was adopted, new names at the end"
            )

    def publish(
        self, new: Sequence[Part], index: Sequence[Part], totals: dict[str, int], classes: tuple[str, ...], source: str
    ) -> Artifact:
        """Publish the next version: the tars of this one, the new ones and the index of all."""
        before, number = self.artifact.facts(ShardsMeta), self.number + 1
        changed = {"classes": classes, "source": source, "version": number}
        meta = before.model_copy(update={**changed, "grown_from": before.grown_from or self.artifact.digest})
        return publish_next(self.artifact, number, [*self.parts, *new, *index], (), totals, meta=meta)


def find_adopted_shards(root: Store, settings: Mapping[str, object]) -> Grown | None:
    """Return the shards that were adopted at `root` with these settings, or None.

    None means nothing, something else, or a first version whose index is gone. The caller then goes on as for a new
    artifact, and its fingerprint tells whether that fits what lies there.
    """
    if root.size("manifest.json") is None:
        return None
    first = open_artifact(root)
    if first.manifest.kind != "shards":
        return None
    if first.manifest.fingerprint != fingerprint("shards", {"source": first.facts(ShardsMeta).source}, settings):
        return None
    known = list_versions(root)
    try:
        opened = open_shards(open_current(root, "shards"))
        index, number = ShardIndex(opened.artifact), known[-1] if known else 1
        for path in missing_paths(root.entries("parts"), index.pieces.values()):
            raise DamagedArtifact(f"{root.uri}/{path} is missing: adopt the tars to another --out")
        return Grown(opened.artifact, number, {shard.name: shard for shard in opened.shards}, index, opened.classes)
    except DamagedArtifact:
        if known:
            raise
        return None  # missing parts of a first version are made again


def extend_classes(
    found: set[str], before: tuple[str, ...], numbers: Mapping[str, int]
) -> tuple[tuple[str, ...], dict[str, int]]:
    """Return the classes `before` with the new ones behind them, so that old ids stay, and the id of each class.

    `numbers` are the labels that are numbers; if all are, each number is its own id.
    """
    if len(numbers) == len(found) and before == tuple(map(str, range(len(before)))):
        count = max([len(before), *(number + 1 for number in numbers.values())])
        return tuple(map(str, range(count))), dict(numbers)
    classes = (*before, *sorted(found - set(before)))
    return classes, {name: number for number, name in enumerate(classes)}
