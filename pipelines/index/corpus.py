"""What `hhnet plan` compares: the tars of shards, their codes, and what an index holds of them."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise

from pipelines.artifacts.commit import list_versions
from pipelines.artifacts.facts import ShardsMeta
from pipelines.artifacts.manifest import Artifact
from pipelines.artifacts.versions import open_current, read_all_manifests
from pipelines.encode.codes import CodesSet, CodesShard, open_codes, require_distinct_tars, require_pair
from pipelines.encode.receipts import read_whole_receipts
from pipelines.errors import InputError
from pipelines.index.alias import index_root
from pipelines.index.base import Base, open_base
from pipelines.index.layout import IndexedShard
from pipelines.shards.index import is_tar
from pipelines.shards.shards import tar_name
from pipelines.storage import Store


@dataclass(frozen=True)
class Tar:
    """A tar of a shards artifact."""

    name: str
    sha256: str
    samples: int
    shards: Artifact


@dataclass
class State:
    """The tars, their codes, and what the index holds of them now, each by the tar's sha256."""

    tars: dict[str, Tar] = field(default_factory=dict)
    codes: dict[str, tuple[CodesSet, CodesShard]] = field(default_factory=dict)
    held: dict[str, IndexedShard] = field(default_factory=dict)
    sets: list[CodesSet] = field(default_factory=list)
    base: Base | None = None
    waiting: dict[str, str] = field(default_factory=dict)
    """URI of the complete but unpublished codes of a tar, by the tar's sha256."""
    planned: dict[str, str] = field(default_factory=dict)
    """URI for the codes of shards, by the URI of the shards.

    It is the place of their older codes if the shards have grown since, or the place named with them if there are none.
    """

    @property
    def index(self) -> Artifact | None:
        """The index's current version, or None where nothing is published."""
        return self.base.artifact if self.base else None

    @property
    def made(self) -> list[CodesSet]:
        """The index, as codes of its model, if it is there, and the codes."""
        return [*([self.base.reader.as_codes] if self.base else []), *self.sets]


def look(shards: Sequence[str], codes: Sequence[str], index: str | None, opened: ExitStack) -> State:
    """Open shards, codes and index; the index stays open as long as `opened`.

    Raises FingerprintMismatch where codes and index come from several models, InputError where a tar comes twice.
    """
    state = State()
    for artifact in (open_current(uri, "shards") for uri in shards):
        for part in artifact.manifest.parts:
            if is_tar(part):
                tar = Tar(tar_name(part), part.sha256, part.rows, artifact)
                first = state.tars.setdefault(tar.sha256, tar)
                if first is not tar:
                    raise InputError(
                        f"{first.shards.uri} ({first.name}) and {artifact.uri} ({tar.name}) hold the same tar: name it "
                        "once"
                    )
    there = [uri for uri in codes if Store(uri).size("manifest.json") is not None]
    if len(shards) == len(codes):
        state.planned = {Store(uri).uri: out for uri, out in zip(shards, codes, strict=True) if out not in there}
    state.sets = [open_codes(uri) for uri in there]
    for uri in codes:
        if uri not in there:
            state.waiting |= dict.fromkeys(_encoded_tars(Store(uri)), uri)
    state.planned |= dict(_outgrown(state))
    require_distinct_tars(state.sets)
    state.codes = {shard.sha256: (entry, shard) for entry in state.sets for shard in entry.shards}
    if index is not None and list_versions(root := index_root(index)):
        state.base = opened.enter_context(open_base(root.uri))
        state.held = {shard.shard_sha256: shard for shard in state.base.reader.held()}
    for one, other in pairwise(state.made):
        require_pair(one, other)
    return state


def _outgrown(state: State) -> Iterator[tuple[str, str]]:
    """Yield shards that have grown since they were encoded, with their codes, each by its URI."""
    for shards in {tar.shards.uri: tar.shards for tar in state.tars.values()}.values():
        if shards.facts(ShardsMeta).grown_from:
            known = {version.digest for version in read_all_manifests(shards.store).values()}
            for entry in state.sets:
                if entry.artifact.manifest.input("shards").digest in known:
                    yield shards.uri, entry.artifact.uri


def _encoded_tars(store: Store) -> list[str]:
    """Return the sha256 of the tars that an unpublished encode has finished."""
    names = [name.removeprefix("receipts/").removesuffix(".json") for name in store.names("receipts")]
    return [receipt.shard_sha256 for receipt in read_whole_receipts(store, names).values()]
