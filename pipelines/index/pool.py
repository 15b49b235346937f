"""Steps that build and update share: parts built side by side on Ray, their tables, and the gate."""

import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from pipelines.artifacts.commit import ArtifactWriter
from pipelines.artifacts.facts import IndexCard, IndexMeta, PartReceipt, QuantizerReceipt
from pipelines.artifacts.host import allowed_cpus
from pipelines.artifacts.manifest import Artifact, ArtifactInput, Part
from pipelines.artifacts.parquet import parquet_bytes, table_of_rows
from pipelines.artifacts.result import Result
from pipelines.artifacts.runs import RunLog
from pipelines.artifacts.versions import missing_paths
from pipelines.cluster.metrics import Meter
from pipelines.cluster.progress import say_resumed, stage
from pipelines.cluster.ray_pool import Pool, ray_pool
from pipelines.config.settings import Config
from pipelines.encode.codes import CodesSet, CodesShard
from pipelines.errors import DamagedArtifact, FingerprintMismatch, WorkFailed
from pipelines.index import gate
from pipelines.index.gate import GateFigures
from pipelines.index.kinds import index_kind
from pipelines.index.layout import ORDINALS, IndexedShard
from pipelines.index.parts import PartTask, ShardSource, build_part
from pipelines.index.reader import IndexReader
from pipelines.storage import ObjectInfo, Store, scratch_folder, sha256_of

# ---------------------------------------------------------------------------------------------------------- parts


def source_of(ordinal: int, entry: CodesSet, shard: CodesShard, class_ids: tuple[int, ...] | None) -> ShardSource:
    """Return a shard of a codes artifact as one to index; `class_ids` are the index's ids of its classes."""
    place = entry.artifact.uri, entry.artifact.digest, shard.parts
    return ShardSource(ordinal, shard.name, shard.sha256, *place, entry.bits, entry.real_codes, class_ids)


def build_parts(
    writer: ArtifactWriter,
    kind: str,
    parameters: Mapping[str, int],
    tasks: Sequence[PartTask],
    shared: bytes | None,
    config: Config,
    log: RunLog,
    pool: Pool = ray_pool,
) -> dict[str, PartReceipt]:
    """Return the receipts of the parts of these tasks, by name; missing parts are built side by side."""
    quantizer = sha256_of(shared) if shared else None
    named = {task.receipt(quantizer): task for task in tasks}
    there = writer.store.entries("parts")
    found = writer.receipts(PartReceipt, named)
    receipts = {name: receipt for name, receipt in found.items() if not missing_paths(there, receipt.parts)}
    missing = [task for name, task in named.items() if name not in receipts]
    log.reach(len(receipts))
    say_resumed("index", len(receipts), len(named), "parts")
    if missing:
        arguments = (writer.store.uri, writer.fingerprint, writer.inputs, kind, shared, parameters)
        with (
            stage("index: building", len(missing), unit="parts") as advance,
            pool(writer.store, config, config.index) as map_items,
        ):
            outcomes = map_items(
                PartBuilder,
                arguments,
                missing,
                verb="index",
                workers=config.index.workers,
                label=lambda task: task.stem,
                failed=lambda task, attempt: log.record_attempts(task.stem, (attempt,), {}),
            )
            for outcome in outcomes:
                if outcome.error is not None:
                    raise WorkFailed(
                        f"{writer.store.uri}: {outcome.error}; what was built is kept, run again to resume"
                    )
                receipts[outcome.item.receipt(quantizer)] = outcome.result
                log.record_attempts(outcome.item.stem, outcome.tries[-1:], {"rows": outcome.item.rows})
                log.advance()
                advance(1)
    return receipts


class PartBuilder:
    """A Ray worker that builds one part after another, and counts codes, bytes and seconds."""

    def __init__(
        self,
        out: str,
        name: str,
        inputs: tuple[ArtifactInput, ...],
        kind: str,
        shared: bytes | None,
        parameters: Mapping[str, int],
    ) -> None:
        self._writer = ArtifactWriter(Store(out), "index", name, inputs, {})
        self._how = index_kind(kind), shared, parameters

    def run(self, task: PartTask) -> PartReceipt:
        """Build and claim one part; return the receipt that won."""
        meter, begun = Meter("index"), time.perf_counter()
        receipt = build_part(task, self._writer, *self._how)
        meter.count_seconds({"build": time.perf_counter() - begun})
        meter.count_images(task.rows)
        written = sum(part.bytes for part in receipt.parts)
        meter.count_bytes(read=task.bytes, written=written)
        return receipt


def require_parts_of(
    writer: ArtifactWriter,
    receipt: PartReceipt | QuantizerReceipt,
    shared: bytes | None,
    there: Mapping[str, ObjectInfo],
) -> tuple[Part, ...]:
    """Return a receipt's parts; they must be `there`, in a listing, and be built with the quantizer `shared`."""
    for path in missing_paths(there, receipt.parts):
        raise DamagedArtifact(f"{writer.store.uri}/{path} is missing or cut, but its receipt says it was built")
    own = sha256_of(shared) if shared else None
    if isinstance(receipt, PartReceipt) and receipt.quantizer_sha256 != own:
        raise DamagedArtifact(
            f"{writer.store.uri}/{receipt.part.path} was built with quantizer {str(receipt.quantizer_sha256)[:12]}, "
            f"the index's own is {str(own)[:12]}"
        )
    return receipt.parts


# --------------------------------------------------------------------------------------------------------- tables


def ordinal_table(shards: Iterable[IndexedShard]) -> bytes:
    """Return the ordinal table of these shards as Parquet, by ordinal."""
    rows = sorted(shards, key=lambda shard: shard.ordinal)
    return parquet_bytes(table_of_rows(ORDINALS, rows))


def totals_of(shards: Iterable[IndexedShard], count: int) -> dict[str, int]:
    """Return the totals of an index with `count` codes that can be found; `held` counts the shards that it holds."""
    known = list(shards)
    return {"codes": count, "shards": len(known), "held": sum(shard.held for shard in known)}


def card_of(parts: Iterable[Part], count: int) -> IndexCard:
    """Return the card of an index: codes that can be found, and bytes of the kind's parts for each.

    The measurements of the gate are added to it later.
    """
    size = sum(part.bytes for part in parts if part.path.startswith("parts/part-"))
    return IndexCard(count=count, bytes_per_code=round(size / count, 3))


# ----------------------------------------------------------------------------------------------------------- gate


def measure_index(artifact: Artifact, config: Config) -> GateFigures:
    """Run the gate's measurements on an index at its root."""
    with scratch_folder() as folder:
        return gate.probe_index(IndexReader(artifact, folder), config.index.gate, config.index.seed)


def pass_gate(artifact: Artifact, figures: GateFigures, config: Config, log: RunLog) -> None:
    """Keep the figures in the run's record; raise WorkFailed, with the figures, where they are below `index.gate`."""
    asked = config.index.gate.model_dump(mode="json")
    log.record_figures(digest=artifact.digest, gate=figures.record(), asked=asked, machine=machine_facts())
    gate.require_limits(figures, config.index.gate, artifact.uri)


def machine_facts() -> dict[str, Any]:
    """Return the facts about this machine that a run record keeps beside its times."""
    return {"cpus": allowed_cpus(), "architecture": platform.machine()}


def gated_meta(meta: IndexMeta, figures: GateFigures) -> IndexMeta:
    """Return `meta` with the measured recalls in its card."""
    return meta.model_copy(update={"card": meta.card.model_copy(update=figures.card())})


def require_settings(artifact: Artifact, config: Config) -> None:
    """Raise FingerprintMismatch, naming both, unless an index has the kind and parameters of the settings.

    For the kind `auto` any index will do.
    """
    meta = artifact.facts(IndexMeta)
    kind = meta.kind if config.index.kind == "auto" else config.index.kind
    wanted = index_kind(kind).parameters(config.index, meta.card.trained_on or meta.card.count)
    sizes = {"part_codes": meta.part_codes}, {"part_codes": config.index.part_codes}
    mine, asked = (meta.kind, meta.parameters | sizes[0]), (kind, wanted | sizes[1])
    if mine != asked:
        raise FingerprintMismatch(
            f"{artifact.uri} is of kind {mine[0]} with {mine[1]}, the settings ask for {asked[0]} with {asked[1]}: "
            "keep those of the index, or build another one at another root"
        )


@dataclass(frozen=True, kw_only=True)
class IndexResult(Result):
    """Facts about an index; its version is None until it is published."""

    version: int | None
    kind: str
    card: dict[str, Any]

    @classmethod
    def of(cls, artifact: Artifact, status: str, **figures: Any) -> Self:
        """Return the result of a verb that made, published or looked at an index."""
        meta = artifact.facts(IndexMeta)
        return super().of(artifact, status, kind=meta.kind, card=meta.card.as_json(), **figures)

    def fact(self, name: str, value: Any) -> list[str]:
        """Return the lines that show a field; the card in words."""
        return _card_lines(IndexCard(**value)) if name == "card" and value else super().fact(name, value)


def _card_lines(card: IndexCard) -> list[str]:
    lines = [f"{card.count:,} codes, {card.bytes_per_code:g} bytes each on disk"]
    if card.recall is not None:
        found = f"{card.recall:.2%} of the {card.recall_at} nearest, {card.recall_within:.2%} of those within"
        lines.append(f"finds {found} {card.radius} bits, {card.self_recall:.2%} of the codes themselves")
    if card.trained_on is not None:
        lines.append(f"its quantizer was trained on {card.trained_on:,} codes")
    return [*lines, *([card.note] if card.note else [])]
