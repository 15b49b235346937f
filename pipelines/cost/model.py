"""The cost model: what ingest, encode, index and a night take, as sums over constants. Nothing here asks a store.

docs/scale.md has the formulas, and says where each constant comes from.
"""

from dataclasses import dataclass, fields

from pipelines.artifacts.words import format_bytes, format_float, format_span
from pipelines.config.settings import CostSettings
from pipelines.cost.requests import (
    Requests,
    add_requests,
    blocks_of,
    build_requests,
    encode_requests,
    ingest_requests,
    lists_of,
    pieces_of,
    plan_requests,
    puts_of,
    shard_entries,
    tars_of_piece,
    upload_lists_of,
    verify_shards_requests,
    worker_requests,
)
from pipelines.shards.index import ROW_GROUP_ROWS

HOUR_S = 3600.0
GB = 1e9
TAR_BLOCK = 512
TAR_RECORD = 10_240
"""A tar's size is a multiple of so many bytes."""


@dataclass(frozen=True, kw_only=True)
class Constants:
    """Seconds of one core or GPU, and bytes, that one image, tar or part takes."""

    image_bytes: float = 100_000
    """Mean size of an image file."""
    model_bytes: float = 54_000_000
    ingest_cpu_s: float = 5e-4
    """For each image: read, written to its tar, read back, put."""
    decode_cpu_s: float = 6e-4
    """For each image: read from its tar, decoded, resized."""
    forward_gpu_s: float = 5e-4
    """For each image, on a GPU."""
    forward_cpu_s: float = 3e-2
    """For each image, where there is no GPU."""
    verify_cpu_s: float = 4e-4
    """For each image of shards that are verified."""
    index_cpu_s: float = 1e-5
    """For each code that is put into a part."""
    driver_cpu_s: float = 2e-3
    """For each tar of an encode, in the process that hands the tars out."""
    plan_tar_s: float = 8e-5
    """For each tar, to find out what is to be encoded."""
    plan_index_s: float = 3e-5
    """For each tar, to plan the parts of an index."""
    sample_overhead_bytes: float = 1_792
    """For each image in a tar: headers, padding, and the member with its label."""
    row_bytes: float = 59
    """For each image in the shard index."""
    row_group_bytes: float = 1_950
    """For each 1,024 images of a tar, or its rest, in the shard index."""
    rows_bytes: float = 4_000
    """For each tar: its receipt and the file with its rows, which serve until an ingest is published."""
    code_bytes: float = 30
    """For each image in the codes."""
    codes_bytes: float = 2_570
    """For each file of codes, beside its rows."""
    part_code_bytes: float = 16
    """For each code in a part of an index."""
    key_bytes: float = 40
    """For each code in a key table."""
    part_bytes: float = 1_850
    """For each part of an index and its key table, beside their codes."""
    receipt_bytes: float = 335
    """For each receipt of codes."""
    attempt_bytes: float = 300
    """For each tar in the run record of an encode."""


ENTRY_BYTES = 175
"""Bytes of a part in a manifest, and what a receipt has there beside its own bytes."""
LIST_BYTES = 2_100
"""Bytes of a list beside its entries, and of its name in the manifest."""
LIST_ENTRY_BYTES = 65
"""Bytes of a part or receipt in a list."""
TABLE_BYTES = 2_800
"""Bytes of a small Parquet table beside its rows: an ordinal table, a directory or a piece of the shard index."""
ROOT_BYTES = 1_200
"""Bytes of a manifest without its entries, with identity, origin and version."""
PART_RECEIPT_BYTES = 425
"""Bytes of the receipt of a part of an index."""
PROOF_BYTES = 225
"""Bytes that a verify remembers of each object."""
RUN_BYTES = 4_900
"""Bytes of a run record without its attempts."""


@dataclass(frozen=True, kw_only=True)
class Planned:
    """The images to come, and the machines that would work on them."""

    images: int
    per_shard: int
    part_codes: int
    night: int
    """Images that come in a night."""
    nodes: int = 1
    gpus: int = 0
    """GPUs of each node."""
    cpus: int = 16
    """CPUs of each node."""

    def tars(self, images: int) -> int:
        """Return the number of tars of so many images."""
        return -(-images // self.per_shard)

    def parts(self, images: int) -> int:
        """Return the number of index parts of so many images: whole tars fill each, and a larger tar has its own."""
        return -(-self.tars(images) // self.tars_of_part)

    @property
    def tars_of_part(self) -> int:
        """Number of tars that fill a part of an index."""
        return max(1, self.part_codes // self.per_shard)

    def fills(self, images: int) -> list[tuple[int, int]]:
        """Return numbers of tars with the images in each: the tars that are full, and the last one if it is not."""
        full, rest = divmod(images, self.per_shard)
        return [(number, held) for number, held in ((full, self.per_shard), (1, rest)) if number and held]

    def encoders(self) -> int:
        """Return the number of encode workers: one for each GPU, or else for each CPU."""
        return self.nodes * (self.gpus or self.cpus)

    def workers(self, tars: int) -> int:
        """Return the number of encode workers that get some of these tars."""
        return min(tars, self.encoders())

    def share(self, images: int, held: int, workers: int) -> float:
        """Return the busiest worker's share of the work, if workers take items with `held` images in turn."""
        if not images:
            return 0.0
        rounds = -(-images // (held * workers))
        # Where the last round is one item that is not full, no worker has so much as `rounds` full ones.
        return min(rounds * held, images - (rounds - 1) * (workers - 1) * held) / images

    def cpu_share(self, images: int, held: int) -> float:
        """Return the busiest CPU's share of the work, if all CPUs take items with `held` images in turn."""
        return self.share(images, held, self.nodes * self.cpus)


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a verb does: requests, seconds of all cores and GPUs together, and bytes."""

    requests: Requests
    cpu_s: float = 0.0
    gpu_s: float = 0.0
    busy_s: float = 0.0
    """Seconds until the last of the workers is done."""
    planning_s: float = 0.0
    """Seconds in which one process plans and no worker works."""
    read: float = 0.0
    written: float = 0.0
    metadata: float = 0.0
    """Bytes of manifests, lists, receipts, shard index and tables that stay; `written` has them too."""

    def __add__(self, other: "Work") -> "Work":
        names = [field.name for field in fields(self)]
        return Work(**{name: getattr(self, name) + getattr(other, name) for name in names})


@dataclass(frozen=True)
class Model:
    """The sums. Sizes are those of the whole corpus or of a night, as `images` says."""

    constants: Constants
    planned: Planned

    # ------------------------------------------------------------------------------------------------------- sizes

    def tar_size(self, images: int) -> float:
        """Return the bytes of a tar with so many images."""
        known = self.constants
        size = images * (known.image_bytes + known.sample_overhead_bytes) + 2 * TAR_BLOCK
        return size + TAR_RECORD / 2 if size > 4 * TAR_RECORD else -(-size // TAR_RECORD) * TAR_RECORD

    def tars_size(self, images: int) -> float:
        """Return the bytes of all tars."""
        return sum(number * self.tar_size(held) for number, held in self.planned.fills(images))

    def index_size(self, images: int) -> float:
        """Return the bytes of a shard index with its directory."""
        known, planned, tars = self.constants, self.planned, self.planned.tars(images)
        groups = sum(number * -(-held // ROW_GROUP_ROWS) for number, held in planned.fills(images))
        tables = (pieces_of(tars, planned.per_shard) + 1) * TABLE_BYTES
        return images * known.row_bytes + groups * known.row_group_bytes + tars * 8 + tables

    def codes_size(self, images: int) -> float:
        """Return the bytes of codes."""
        return images * self.constants.code_bytes + self.planned.tars(images) * self.constants.codes_bytes

    def parts_size(self, codes: int, parts: int) -> float:
        """Return the bytes of so many index parts and their key tables."""
        return codes * (self.constants.part_code_bytes + self.constants.key_bytes) + parts * self.constants.part_bytes

    def manifest_size(self, parts: int, receipts: int = 0, receipt_bytes: float = 0) -> float:
        """Return the bytes of a manifest with its lists, and of the small objects beside it."""
        if number := lists_of(parts, receipts):
            return ROOT_BYTES + number * LIST_BYTES + (parts + receipts) * LIST_ENTRY_BYTES
        return ROOT_BYTES + parts * ENTRY_BYTES + receipts * (ENTRY_BYTES + receipt_bytes)

    def shards_manifest(self, images: int) -> float:
        """Return the bytes of the manifest of shards."""
        return self.manifest_size(shard_entries(self.planned.tars(images), self.planned.per_shard))

    def codes_manifest(self, images: int) -> float:
        """Return the bytes of the manifest of codes."""
        tars = self.planned.tars(images)
        return self.manifest_size(tars, tars, self.constants.receipt_bytes)

    def index_manifest(self, images: int) -> float:
        """Return the bytes of the manifest of an index with its ordinal table."""
        parts = self.planned.parts(images)
        return (
            self.manifest_size(2 * parts + 1, parts, PART_RECEIPT_BYTES) + TABLE_BYTES + 45 * self.planned.tars(images)
        )

    # ------------------------------------------------------------------------------------------------------- verbs

    def ingest(self, images: int) -> Work:
        """Return the work of an ingest."""
        known, planned, tars = self.constants, self.planned, self.planned.tars(images)
        pieces = pieces_of(tars, planned.per_shard)
        sizes = [(number, self.tar_size(held)) for number, held in planned.fills(images)]
        more = sum(number * (puts_of(size) - 1) for number, size in sizes)
        more += pieces - 1 + lists_of(shard_entries(tars, planned.per_shard))
        lists = sum(number * upload_lists_of(size) for number, size in sizes)
        rows, cpu_s = images * known.row_bytes + tars * known.rows_bytes, images * known.ingest_cpu_s
        metadata = self.index_size(images) + self.shards_manifest(images)
        return Work(
            requests=ingest_requests(tars) + Requests(put=more, list=lists),
            cpu_s=cpu_s,
            busy_s=cpu_s * planned.cpu_share(images, planned.per_shard),
            read=rows,
            written=self.tars_size(images) + rows + metadata + RUN_BYTES,
            metadata=metadata,
        )

    def verify(self, images: int) -> Work:
        """Return the work of the first verify of shards."""
        planned, tars = self.planned, self.planned.tars(images)
        more = self._more_blocks(images) + 2 * (pieces_of(tars, planned.per_shard) - 1)
        entries, cpu_s = shard_entries(tars, planned.per_shard), images * self.constants.verify_cpu_s
        more += 2 * lists_of(entries)
        return Work(
            requests=verify_shards_requests(tars) + Requests(get=more),
            cpu_s=cpu_s,
            busy_s=cpu_s * planned.cpu_share(images, planned.per_shard),
            read=self.tars_size(images) + 2 * self.index_size(images) + 2 * self.shards_manifest(images),
            written=PROOF_BYTES * (entries + lists_of(entries)),
        )

    def encode(self, images: int) -> Work:
        """Return the work of an encode."""
        known, planned, tars = self.constants, self.planned, self.planned.tars(images)
        workers, pieces = planned.workers(tars), pieces_of(tars, planned.per_shard)
        reads = pieces * min(workers, tars_of_piece(planned.per_shard))
        gets = self._more_blocks(images) + reads - 1
        gets += (workers + 1) * lists_of(shard_entries(tars, planned.per_shard))
        lists = Requests(get=lists_of(tars, tars), put=lists_of(tars, tars))
        opened = workers * known.model_bytes + (workers + 1) * self.shards_manifest(images)
        index = self.index_size(images) * reads / pieces
        forward_cpu_s = 0.0 if planned.gpus else known.forward_cpu_s
        cpu_s = images * (known.decode_cpu_s + forward_cpu_s) + tars * known.driver_cpu_s
        gpu_s = images * known.forward_gpu_s if planned.gpus else 0.0
        share = planned.share(images, planned.per_shard, planned.encoders())
        cpus = planned.cpus / (planned.gpus or planned.cpus)  # those of a worker
        metadata = self.codes_manifest(images) + tars * known.receipt_bytes
        return Work(
            requests=encode_requests(tars) + worker_requests(workers) + Requests(get=gets) + lists,
            cpu_s=cpu_s,
            gpu_s=gpu_s,
            busy_s=share * max(gpu_s, cpu_s / cpus),
            planning_s=tars * known.plan_tar_s,
            read=self.tars_size(images) + index + opened + self.codes_manifest(images),
            written=self.codes_size(images) + metadata + tars * known.attempt_bytes + RUN_BYTES,
            metadata=metadata,
        )

    def _more_blocks(self, images: int) -> int:
        """Return the GETs that stream all tars, beside one for each."""
        fills = self.planned.fills(images)
        return sum(number * (blocks_of(self.tar_size(held)) - 1) for number, held in fills)

    def build(self, images: int) -> Work:
        """Return the work of building an index."""
        tars, parts = self.planned.tars(images), self.planned.parts(images)
        gets = lists_of(tars, tars) + self._part_blocks(images)
        requests = build_requests(tars, parts) + Requests(get=gets, put=lists_of(2 * parts + 1, parts))
        return self._indexed(requests, images, images, parts, self.index_manifest(images))

    def add(self, images: int, new: int) -> Work:
        """Return the work of adding `new` images to an index of so many."""
        planned, tars = self.planned, self.planned.tars(new)
        before, fill = planned.parts(images), planned.tars_of_part
        parts = -(-(planned.tars(images) + tars) // fill)
        merged = 1 if planned.tars(images) % fill else 0
        again = images - (before - 1) * fill * planned.per_shard if merged else 0
        built = parts - before + merged
        names = lists_of(2 * before + 1, before)
        reads = lists_of(tars, tars) + (3 * names + 2 if names else 0)
        reads += self._part_blocks(images + new)
        requests = add_requests(tars, parts, built, merged) + Requests(get=reads, put=lists_of(2 * parts + 1, parts))
        manifest = self.index_manifest(images + new)
        work = self._indexed(requests, new, new + again, built, manifest)
        return work + Work(requests=Requests(), read=self.parts_size(images, before) + (3 if names else 2) * manifest)

    def _part_blocks(self, images: int) -> int:
        """Return the GETs by which the gate copies the parts and key tables of an index, beside two for each part."""
        known, parts = self.constants, self.planned.parts(images)
        each = images / parts
        return parts * (blocks_of(each * known.part_code_bytes) + blocks_of(each * known.key_bytes) - 2)

    def _indexed(self, requests: Requests, new: int, codes: int, built: int, manifest: float) -> Work:
        """Return the work of an index change that reads `new` codes and puts so many codes into `built` parts."""
        known, planned, size = self.constants, self.planned, self.parts_size(codes, built)
        each, cpu_s = codes / max(1, built), codes * known.index_cpu_s
        sizes = each * known.part_code_bytes, each * known.key_bytes
        more = Requests(put=built * (sum(map(puts_of, sizes)) - 2), list=built * sum(map(upload_lists_of, sizes)))
        metadata = manifest + built * PART_RECEIPT_BYTES
        return Work(
            requests=requests + more,
            cpu_s=cpu_s,
            busy_s=cpu_s * planned.cpu_share(codes, planned.tars_of_part * planned.per_shard),
            planning_s=planned.tars(new) * known.plan_index_s,
            read=self.codes_size(new) + self.codes_manifest(new) + size,
            written=size + metadata + RUN_BYTES,
            metadata=metadata,
        )

    def plan(self, images: int, new: int) -> Work:
        """Return the work of comparing shards, codes and index of so many images and the shards and codes of new."""
        planned, known, parts = self.planned, self.constants, self.planned.parts(images)
        names = lists_of(2 * parts + 1, parts)
        gets, read = names + bool(names), 2 * self.index_manifest(images) - TABLE_BYTES
        for number in (images, new):
            tars = planned.tars(number)
            gets += lists_of(shard_entries(tars, planned.per_shard)) + lists_of(tars, tars)
            read += self.shards_manifest(number) + self.codes_manifest(number)
        seconds = planned.tars(images + new) * (known.plan_tar_s + known.plan_index_s)
        return Work(requests=plan_requests() + Requests(get=gets), planning_s=seconds, read=read)

    def night(self) -> Work:
        """Return the work of a night: new images are ingested, verified, encoded, compared by `plan`, and added."""
        new, images = self.planned.night, self.planned.images
        if not new:
            return Work(requests=Requests())
        return self.ingest(new) + self.verify(new) + self.encode(new) + self.plan(images, new) + self.add(images, new)

    def stored(self) -> float:
        """Return the bytes that stay in the store: shards, codes and index."""
        images, planned = self.planned.images, self.planned
        made = self.tars_size(images) + self.codes_size(images) + self.parts_size(images, planned.parts(images))
        return made + sum(work.metadata for work in (self.ingest(images), self.encode(images), self.build(images)))


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """The cost of a step, in the figures that `plan --cost` shows."""

    step: str
    gpu_hours: float
    cpu_hours: float
    hours: float
    """Time until it is done, if the store keeps pace."""
    planning_seconds: float
    get: int
    head: int
    put: int
    list: int
    bytes_read: int
    bytes_written: int
    metadata_bytes: int
    usd: float

    def words(self) -> dict[str, str]:
        """Return each figure in words, by its name."""
        whole = {name: f"{getattr(self, name):,}" for name in ("get", "head", "put", "list")}
        sizes = ("bytes_read", "bytes_written", "metadata_bytes")
        return {
            "GPU-hours": format_float(self.gpu_hours),
            "CPU-hours": format_float(self.cpu_hours),
            "time": format_span(self.hours * HOUR_S),
            "planning": format_span(self.planning_seconds),
            **{name.upper(): text for name, text in whole.items()},
            **{name.replace("_", " "): format_bytes(getattr(self, name)) for name in sizes},
            "USD": f"{self.usd:,.2f}",
        }


def cost_of(step: str, work: Work, prices: CostSettings) -> StepCost:
    """Return the cost of some work at these prices."""
    asked = work.requests
    gpu_hours, cpu_hours = work.gpu_s / HOUR_S, (work.cpu_s + work.planning_s) / HOUR_S
    paid = (asked.get + asked.head) * prices.get_1000 / 1000 + (asked.put + asked.list) * prices.put_1000 / 1000
    return StepCost(
        step=step,
        gpu_hours=round(gpu_hours, 4),
        cpu_hours=round(cpu_hours, 4),
        hours=round((work.busy_s + work.planning_s) / HOUR_S, 4),
        planning_seconds=round(work.planning_s, 2),
        get=asked.get,
        head=asked.head,
        put=asked.put,
        list=asked.list,
        bytes_read=round(work.read),
        bytes_written=round(work.written),
        metadata_bytes=round(work.metadata),
        usd=round(paid + gpu_hours * prices.gpu_hour + cpu_hours * prices.cpu_hour, 4),
    )
