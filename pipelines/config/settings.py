"""One typed configuration tree: defaults < recipe < `--config FILE.toml` < `--set section.key=value` < named flags.

Every setting of every verb is declared here once, with its default, its bounds and its meaning. `ChangesResult` names
the kinds of artifact whose bytes a setting changes.
"""

from collections.abc import Callable, Iterator
from typing import Annotated, Literal, Self

from pydantic import (
    BaseModel,
    ByteSize,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
)

from pipelines.config.values import Seconds, WeightsPath, number_or_auto

BatchSize = Annotated[int | Literal["auto"], number_or_auto(1, 65_536)]
"""Images per forward pass, or `auto`."""
CPU_BATCH_SIZE = 64
"""Images per forward pass by default, and on a CPU also if `encode.batch_size` is auto."""


class Section(BaseModel):
    """A frozen group of settings that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class ChangesResult:
    """Marks a setting that changes the bytes of artifacts of these kinds, and so belongs to their fingerprints.

    Never mark workers, threads or URIs: a result must not depend on where or how wide it was computed.
    """

    def __init__(self, *kinds: str) -> None:
        self.kinds = kinds


def declared_settings(section: type[Section], prefix: str = "") -> Iterator[tuple[str, tuple[str, ...]]]:
    """Name every section and setting below `section`, with the kinds of artifact that it changes."""
    for name, field in section.model_fields.items():
        marks = [mark for mark in field.metadata if isinstance(mark, ChangesResult)]
        yield f"{prefix}{name}", tuple(kind for mark in marks for kind in mark.kinds)
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from declared_settings(field.annotation, f"{prefix}{name}.")


def setting_meanings(section: type[Section], prefix: str = "") -> dict[str, str]:
    """Return what each setting below `section` means, by dotted name: the text that stands under its declaration."""
    meanings: dict[str, str] = {}
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            meanings |= setting_meanings(field.annotation, f"{prefix}{name}.")
        else:
            meanings[f"{prefix}{name}"] = " ".join((field.description or "").split())
    return meanings


class PlacedSettings(Section):
    """Settings of where Ray places a verb's workers: docs/placement.md."""

    cpus: float | None = Field(None, gt=0, le=4096)
    """CPUs per worker; unset = 1, or in training an equal share of the nodes' CPUs."""
    worker_memory: ByteSize | None = Field(None, gt=0)
    """Memory that each worker reserves on its node, such as 8GiB; unset = none."""
    resources: dict[str, float] = Field(default_factory=dict)
    """Amounts of custom Ray resources that each worker reserves, by name."""
    labels: dict[str, str] = Field(default_factory=dict)
    """Labels that a node needs to get workers, as in {"ray.io/market-type" = "!spot"}; also in(a, b) and !in(a, b)."""
    strategy: Literal["pack", "spread"] = "pack"
    """pack = fill one node before the next, as far as Ray does; spread = use as many nodes as there are."""


class GpuPlacedSettings(PlacedSettings):
    """Settings of where Ray places workers that can use a GPU: docs/placement.md."""

    gpus: float | None = Field(None, ge=0, le=64)
    """GPUs per worker, waited for; 0.5 = two workers share one, 0 = none; unset = 1 where a node has one."""
    accelerator: str | None = None
    """GPU model by Ray's name, such as A100; unset = any."""


class IngestSettings(PlacedSettings):
    """Settings of writing shards."""

    samples_per_shard: Annotated[int, ChangesResult("shards")] = Field(1000, ge=1, le=1_000_000)
    """Samples per WebDataset tar."""
    seed: Annotated[int, ChangesResult("shards")] = Field(0, ge=0)
    """Seed of the sample order and of the split."""
    name: Annotated[str, ChangesResult("shards")] = Field("shard", pattern=r"^[A-Za-z0-9_]+$")
    """Prefix of the tars' file names; with a split, each part uses its own name instead."""
    skip_budget: float = Field(0.01, ge=0, le=1)
    """Largest share of images that may be unreadable or missing before the run ends degraded (exit 4)."""
    workers: int | None = Field(None, ge=0, le=4096)
    """Processes on Ray that write shards; 0 = this process alone; unset = one per CPU, or this process alone for a
    source of fewer than 100,000 images."""
    per_host: int = Field(8, ge=1, le=1024)
    """Images that all workers together fetch at once from one host of a list of URLs; also the most workers then."""
    url_timeout_s: float = Field(30.0, gt=0, le=3600)
    """Seconds that one image of a list of URLs may take, with its redirects."""
    url_attempts: int = Field(3, ge=1, le=100)
    """Attempts at an image whose server is busy, slow or out of reach."""
    private_hosts: bool = False
    """Fetch from private and loopback addresses too; otherwise a list of URLs could reach into this network."""


class DataSettings(Section):
    """Settings of reading images and shaping them for the network."""

    image_size: Annotated[int, ChangesResult("model")] = Field(224, ge=8, le=4096)
    """Side of the network's square input, in pixels."""
    resize: Annotated[int | None, ChangesResult("model")] = Field(None, ge=8, le=8192)
    """Shorter side in pixels before the centre crop; unset = image_size up to 64, else image_size * 256 / 224."""
    decode: Annotated[Literal["scaled", "exact"], ChangesResult("model")] = "scaled"
    """Decoding of large JPEGs in training, and of whatever the model encodes: scaled = at the smallest scale that keeps
    both sides twice what the crop needs; exact = at full size."""
    batch_size: Annotated[int, ChangesResult("model")] = Field(64, ge=2, le=65_536)
    """Images per optimiser step, over all workers (the global batch)."""
    workers: int = Field(2, ge=1, le=256)
    """Threads per training, encoding or decode process that read and decode images."""
    cache: ByteSize = Field(ByteSize(1 << 29), ge=0)
    """Memory per training process for decoded images; later epochs do not decode those again. A GPU holds the images
    itself where all of them fit: docs/recipes.md."""
    augment: Annotated[Literal["auto", "flip", "crop_flip", "resized_crop", "none"], ChangesResult("model")] = "auto"
    """Training augmentation; auto = crop_flip up to 64 pixels, else resized_crop. A loss with two views uses it for the
    strong view."""
    policy: Annotated[Literal["none", "trivial"], ChangesResult("model")] = "none"
    """Augmentation policy applied after the crop: none, or trivial (one random TrivialAugment operation)."""
    shuffle_buffer: Annotated[int, ChangesResult("model")] = Field(1024, ge=1, le=1_000_000)
    """Undecoded samples that each worker holds to shuffle across shards."""
    interleave: Annotated[int, ChangesResult("model")] = Field(4, ge=1, le=256)
    """Shards that each worker reads at the same time."""


class ModelSettings(Section):
    """Settings of the hashing network."""

    backbone: Annotated[str, ChangesResult("model")] = "hrnet_w18"
    """A timm name, with its tag where weights are pinned (hrnet_w18.ms_in1k), or alexnet."""
    weights: Annotated[WeightsPath | None, ChangesResult("model")] = None
    """Initial weights: unset = random; `timm` = those of the tag in `backbone`; else the path of a safetensors file."""
    bits: Annotated[int, ChangesResult("model")] = 64
    """Code length in bits, a multiple of 8 from 8 to 4096."""
    head: Annotated[Literal["auto", "linear", "bn", "ln"], ChangesResult("model")] = "auto"
    """Kind of hash layer: linear, or with batch norm (bn) or layer norm (ln); auto = the loss's default."""
    stem_stride: Annotated[Literal[1, 2, 4], ChangesResult("model")] = 4
    """Factor by which the stem reduces each side: 4 as published, 2 or 1 for small images."""
    branches: Annotated[tuple[int, ...] | None, ChangesResult("model")] = None
    """HRNet only: branches whose last maps make the features, 1 is the finest; unset = all."""
    precision: Annotated[Literal["fp32", "bf16"], ChangesResult("model")] = "fp32"
    """Arithmetic of the forward pass in training and encoding."""

    @field_validator("bits")
    @classmethod
    def _bits(cls, bits: int) -> int:
        if bits % 8 or not 8 <= bits <= 4096:
            raise ValueError("must be a multiple of 8 from 8 to 4096")
        return bits


class TrainSettings(GpuPlacedSettings):
    """Settings of a training."""

    recipe: str | None = None
    """Named preset that the other settings start from: docs/recipes.md; unset = none, but `hhnet train` takes auto on a
    machine without a GPU if you set no more of the model than image size, batch size and epochs."""
    epochs: Annotated[int, ChangesResult("model")] = Field(20, ge=1, le=100_000)
    """Passes over the training samples."""
    loss: Annotated[str, ChangesResult("model")] = "orthohash"
    """Training loss, see docs/losses.md: ce, cel, csq, dch, dhd, dhn, dpn, dpsh, dsh, greedyhash, hashnet, hhf, hyp2,
    mdsh, orthohash or wglhh."""
    loss_options: Annotated[dict[str, float], ChangesResult("model")] = Field(default_factory=dict)
    """Options of the loss, such as margin = 0.3."""
    mixup: Annotated[float, ChangesResult("model")] = Field(0.0, ge=0, le=10)
    """Mixup's alpha: two samples are blended by a share drawn from Beta(alpha, alpha); 0 = off. Only for losses that
    take soft labels."""
    label_smoothing: Annotated[float, ChangesResult("model")] = Field(0.0, ge=0, lt=1)
    """Share of each label that is spread evenly over all classes. Only for losses that take soft labels."""
    teacher: Annotated[str | None, ChangesResult("model")] = None
    """Network to distil from, a timm name with its tag or alexnet: codes learn the neighbours of its features; unset =
    none."""
    teacher_weights: Annotated[WeightsPath, ChangesResult("model")] = "timm"
    """Weights of the teacher: `timm` = those of the tag in `teacher`; else the path of a safetensors file."""
    distillation: Annotated[float, ChangesResult("model")] = Field(1.0, gt=0, le=1e6)
    """Weight of the distillation loss, which is added to the training loss."""
    optimizer: Annotated[Literal["adamw", "adam", "rmsprop", "sgd"], ChangesResult("model")] = "adamw"
    """Optimiser; adamw decouples weight decay from the gradient, the others do not; sgd has a momentum of 0.9."""
    lr: Annotated[float, ChangesResult("model")] = Field(1e-3, gt=0)
    """Peak learning rate of the hash layer."""
    backbone_lr_scale: Annotated[float, ChangesResult("model")] = Field(1.0, gt=0)
    """Learning rate of the backbone as a share of `lr`; 0.1 suits pretrained weights."""
    layer_decay: Annotated[float, ChangesResult("model")] = Field(1.0, gt=0, le=1)
    """Learning rate of each block of the backbone as a share of the next block's; 1 = all alike."""
    schedule: Annotated[Literal["cosine", "constant"], ChangesResult("model")] = "cosine"
    """Learning rate after the warm-up: cosine = falls to 0 along half a cosine; constant = stays."""
    weight_decay: Annotated[float, ChangesResult("model")] = Field(0.05, ge=0)
    """Weight decay; biases and norm layers have none."""
    warmup: Annotated[float, ChangesResult("model")] = Field(0.05, ge=0, le=0.1)
    """Share of all steps during which the learning rate rises from 0."""
    ema_decay: Annotated[float, ChangesResult("model")] = Field(0.999, ge=0, lt=1)
    """Decay of the weights' moving average, ramped as min(decay, (1+t)/(10+t)) at step t; 0 = off."""
    grad_clip: Annotated[float, ChangesResult("model")] = Field(5.0, gt=0)
    """Largest norm of the gradient; a longer one is scaled down to it."""
    rotate: Annotated[Literal["none", "h2q", "itq", "lsh", "pca", "pca-itq", "classes"], ChangesResult("rotation")] = (
        "none"
    )
    """How `train --rotate` replaces the hash layer of a trained model: docs/rotation.md."""
    rotate_samples: Annotated[int, ChangesResult("rotation")] = Field(10_000, ge=1)
    """Most training images that `train --rotate` uses."""
    accumulate: Annotated[int, ChangesResult("model")] = Field(1, ge=1, le=4096)
    """Pieces into which a worker cuts its images of a step for the forward and backward pass, to save memory."""
    seed: Annotated[int, ChangesResult("model", "rotation")] = Field(0, ge=0)
    """Seed of the initial weights, the epoch plans and the augmentation."""
    workers: int = Field(1, ge=1, le=4096)
    """Training processes, each with one GPU where there are GPUs."""
    val_share: Annotated[float, ChangesResult("model")] = Field(0.1, gt=0, lt=1)
    """Share of the training samples held out for validation when no --val is given."""
    val_limit: Annotated[int, ChangesResult("model")] = Field(5000, ge=2)
    """Most validation samples used for the mAP."""
    val_every: Annotated[int, ChangesResult("model")] = Field(1, ge=1)
    """Epochs from one validation to the next; the last epoch always validates."""
    checkpoint_steps: int = Field(200, ge=1)
    """Optimiser steps from one checkpoint to the next; each validation saves one too."""
    log: Literal["tensorboard", "mlflow", "wandb"] | None = None
    """Program that shows the loss and mAP of each epoch too: tensorboard, mlflow or wandb, each an extra package; unset
    = none."""
    max_failures: int = Field(3, ge=0)
    """Worker failures after which training still restarts; one more ends the verb."""


class EncodeSettings(GpuPlacedSettings):
    """Settings of encoding a corpus."""

    workers: int | None = Field(None, ge=1, le=4096)
    """Encoding processes; unset = one per GPU, or one per CPU where there is no GPU."""
    batch_size: Annotated[BatchSize, ChangesResult("codes")] = CPU_BATCH_SIZE
    """Images per forward pass, or auto = the largest power of two that fits the GPU, and 64 on a CPU; begun codes keep
    their number. A batch never crosses shards."""
    reject_budget: float = Field(0.01, ge=0, le=1)
    """Largest share of rejected samples before the run ends degraded (exit 4)."""
    max_attempts: int = Field(3, ge=1)
    """Attempts at a shard: once so many workers died or hung on it, its samples become rejects."""
    stuck_s: float = Field(600.0, gt=0)
    """Seconds without a decoded image or a finished batch after which a worker counts as hung."""
    decode_processes: int | None = Field(None, ge=0, le=256)
    """Processes per encoding worker that read and decode images, with data.workers threads each; 0 = threads of the
    worker itself; unset = 0 on a CPU, and on a GPU as many as fit into its share of the node's CPUs."""
    decoders: Annotated[int | Literal["auto"], number_or_auto(0, 256)] = "auto"
    """Decoders per encoding worker that Ray places on any nodes with data.workers free CPUs for each; auto = beside a
    GPU a share of the CPUs of the nodes without GPUs, else 0. With decoders, decode_processes is at least 1."""
    carry: Annotated[tuple[str, ...], ChangesResult("codes")] = ()
    """Metadata columns of the samples' JSON to carry into the codes."""
    real_codes: Annotated[bool, ChangesResult("codes")] = False
    """Store the network's outputs beside the codes, one int8 per bit, for `search --rerank`."""

    @property
    def images_per_pass(self) -> int:
        """`batch_size` as a number; while it is auto, that of a CPU."""
        return CPU_BATCH_SIZE if self.batch_size == "auto" else self.batch_size

    @field_validator("real_codes")
    @classmethod
    def _own_column(cls, real_codes: bool, info: ValidationInfo) -> bool:
        if real_codes and "real_codes" in info.data.get("carry", ()):
            raise ValueError("stores a column `real_codes`: take that name out of encode.carry")
        return real_codes


class GateSettings(Section):
    """Settings of the gate: the figures that an index must reach before it is published."""

    probes: Annotated[int, ChangesResult("index")] = Field(100, ge=1, le=100_000)
    """Indexed codes that the gate searches for, a seeded sample."""
    k: Annotated[int, ChangesResult("index")] = Field(10, ge=1, le=10_000)
    """Neighbours per probe, the k of recall@k."""
    radius: Annotated[int, ChangesResult("index")] = Field(2, ge=0, le=4096)
    """Radius in bits of the recall within a radius."""
    min_self_recall: float = Field(1.0, ge=0, le=1)
    """Smallest share of probes that find themselves at distance 0."""
    min_recall: float = Field(0.5, ge=0, le=1)
    """Smallest recall@k of an approximate kind, any order of equal distances counting as right; an exact kind must
    reach 1."""
    min_recall_within: float = Field(0.5, ge=0, le=1)
    """Smallest recall within the radius of an approximate kind; an exact kind must reach 1."""
    max_p50_ms: float | None = Field(None, gt=0)
    """Largest median time of a query in opened parts, in milliseconds; unset = any."""
    max_p99_ms: float | None = Field(None, gt=0)
    """Largest 99th percentile of a query's time, in milliseconds; unset = any."""


class IndexSettings(PlacedSettings):
    """Settings of building an index over codes."""

    kind: Annotated[str, ChangesResult("index")] = "flat"
    """flat = exact scan; multihash = exact, by tables of substrings; ivf = inverted lists under one quantizer; hnsw = a
    graph in memory, 288 bytes per 64-bit code; auto = the planner chooses within `memory`, `latency` and `recall`."""
    memory: ByteSize | None = Field(None, gt=0)
    """Largest size of all parts that `auto` may choose, such as 4GiB; unset = any, but never hnsw."""
    latency: Seconds | None = Field(None, gt=0)
    """Longest time of a query that `auto` may choose, in seconds or such as 5ms; unset = any, so an exact kind is
    chosen."""
    recall: float = Field(0.95, ge=0, le=1)
    """Smallest recall@k of an approximate kind that `auto` may choose, at k = search.k."""
    part_codes: Annotated[int, ChangesResult("index")] = Field(1_000_000, ge=1, le=1 << 30)
    """Codes of a part: tars are put into one part until the next would exceed it; a larger tar has a part of its own.
    A worker holds the codes, keys and labels of a part in memory while it builds it."""
    nlist: Annotated[int | None, ChangesResult("index")] = Field(None, ge=1, le=1_000_000)
    """Number of inverted lists (ivf); unset = about the square root of the number of codes."""
    nprobe: Annotated[int, ChangesResult("index")] = Field(16, ge=1)
    """Inverted lists searched per query (ivf)."""
    m: Annotated[int, ChangesResult("index")] = Field(32, ge=4, le=256)
    """Links of each code in the graph (hnsw); each takes 8 bytes."""
    ef_search: Annotated[int, ChangesResult("index")] = Field(64, ge=1, le=100_000)
    """Candidates that a search in the graph keeps (hnsw)."""
    workers: int | None = Field(None, ge=1)
    """Parts built at the same time; unset = one per CPU."""
    seed: Annotated[int, ChangesResult("index")] = Field(0, ge=0)
    """Seed of the samples that train the quantizer and probe the gate."""
    gate: GateSettings = GateSettings()
    """The checks before a version is published."""


class SearchSettings(PlacedSettings):
    """Settings of searching an index."""

    k: int = Field(10, ge=1, le=100_000)
    """Neighbours per query."""
    workers: int | None = Field(None, ge=1)
    """Ray actors that share the parts; unset = this process searches all parts."""
    device: Literal["cpu", "cuda"] = "cpu"
    """cpu, or cuda = copy the codes of a flat index to this machine's GPU and search there."""
    rerank: int | None = Field(None, ge=1, le=100_000)
    """Nearest codes that are re-ranked by real codes before the best k are shown; unset = no re-ranking."""


class DedupeSettings(Section):
    """Settings of finding near-duplicates."""

    radius: Annotated[int, ChangesResult("duplicates")] = Field(0, ge=0, le=4096)
    """Largest number of bits in which the codes of a pair differ; 0 = equal codes only."""
    same_code: Annotated[bool, ChangesResult("duplicates")] = False
    """Drop also samples whose pictures do not confirm that they are duplicates."""
    memory: ByteSize = Field(ByteSize(1 << 30), ge=1 << 25)
    """Largest memory of the search's arrays together, such as 4GiB."""
    max_pairs: int = Field(100_000_000, ge=1)
    """Largest number of pairs; the search ends with an error once it finds more."""
    threads: int | None = Field(None, ge=1)
    """Threads of the search; unset = one per CPU."""


class EvaluateSettings(Section):
    """Settings of the metrics' convention and the report."""

    at: Annotated[int | None, ChangesResult("report")] = Field(None, ge=1)
    """K of mAP@K; unset = the whole ranking."""
    ties: Annotated[Literal["expected", "stable"], ChangesResult("report")] = "expected"
    """How equal distances count: expected = the exact mean over their orders; stable = in database order."""
    denominator: Annotated[Literal["retrieved", "min", "all"], ChangesResult("report")] = "retrieved"
    """Divisor of AP: retrieved = relevant items among the first K; min = min(relevant, K); all = all relevant items."""
    empty: Annotated[Literal["zero", "skip"], ChangesResult("report")] = "zero"
    """How a query without a relevant item counts: zero = as AP 0; skip = not at all."""
    unlabelled: Annotated[Literal["zero", "skip"], ChangesResult("report")] = "zero"
    """How a query without labels counts, whatever `empty` says: zero = as AP 0; skip = not at all."""
    rerank: Annotated[int | None, ChangesResult("report")] = Field(None, ge=1)
    """Also measure the mAP after re-ranking this many nearest codes of each query by real codes; unset = not."""
    gallery: Annotated[int, ChangesResult("report")] = Field(12, ge=0, le=200)
    """Number of queries that the report shows with their neighbours."""


class AgreementSettings(Section):
    """Settings of comparing two codes of the same samples."""

    queries: Annotated[int, ChangesResult("agreement")] = Field(1000, ge=1, le=1_000_000)
    """Most samples whose neighbours are compared, a seeded sample."""
    k: Annotated[int, ChangesResult("agreement")] = Field(10, ge=1, le=100_000)
    """Neighbours per sample, at most all other samples."""
    seed: Annotated[int, ChangesResult("agreement")] = Field(0, ge=0)
    """Seed of the choice of those samples."""


class RaySettings(Section):
    """Settings of Ray: the cluster, the driver and waiting times."""

    address: str | None = None
    """Where Ray runs: unset = RAY_ADDRESS, else a local Ray; `auto` or host:port joins a cluster; http(s)://... submits
    a job to one."""
    cpus: int | None = Field(None, ge=1, le=4096)
    """CPUs of a local Ray; unset = all that this process may use. Set it where several verbs run at the same time."""
    wait_s: float = Field(60.0, gt=0)
    """Seconds to wait for a head that does not answer, and for room for a worker. Raise it where an autoscaler needs
    minutes to start a node."""
    cpu_fallback: bool = False
    """Continue without a GPU if none is free within `wait_s`; otherwise the verb ends with an error."""
    driver_labels: dict[str, str] = Field(default_factory=dict)
    """Labels that a node needs to run the driver of a submitted job, such as {"ray.io/market-type" = "on-demand"};
    unset = the head node."""
    metrics_port: int | None = Field(None, ge=1024, le=65_535)
    """Port on 127.0.0.1 where a local Ray serves metrics to Prometheus; unset = any free one."""


class StoreSettings(Section):
    """Settings of the object stores."""

    shared: bool = False
    """Declare that a local --out lies on a network file system that every node sees."""
    unsigned: bool | tuple[str, ...] = False
    """Public S3 buckets to read without keys, by name; true = all. On a cluster, set HHNET_STORE_UNSIGNED on its nodes
    instead, to the names or to *."""


class CostSettings(Section):
    """Prices for `hhnet plan --cost`, in USD: docs/scale.md. The defaults are round list prices of large clouds."""

    gpu_hour: float = Field(3.0, ge=0)
    """An hour of one GPU."""
    cpu_hour: float = Field(0.04, ge=0)
    """An hour of one CPU; 0 where the price of a GPU includes its CPUs."""
    get_1000: float = Field(0.0004, ge=0)
    """A thousand GET or HEAD requests."""
    put_1000: float = Field(0.005, ge=0)
    """A thousand PUT or LIST requests."""
    gb_month: float = Field(0.023, ge=0)
    """A month of 10^9 stored bytes."""


class RunSettings(Section):
    """Inputs, outputs and retries of `hhnet run`."""

    out: str | None = None
    """Folder or s3:// prefix that receives shards, model, codes, index and report."""
    source: str | None = None
    """Images to ingest first; unset = `train`, `query` and `database` name existing shards."""
    split: str | None = None
    """How ingest splits the source: `train=.8,query=.1,database=.1`, `folder`, or `column:NAME`."""
    train: str | None = None
    """Shards to train on: a URI, or the name of a split that the run ingests."""
    query: str | None = None
    """Shards of the queries: a URI, or the name of a split that the run ingests."""
    database: tuple[str, ...] = ()
    """Shards of the database: URIs, or names of splits; several are searched as one."""
    val: str | None = None
    """Shards to validate on: a URI, or the name of a split; unset = a seeded share of the training samples."""
    verify: float = Field(1.0, ge=0, le=1)
    """Largest share of all tars that one run verifies before it uses them; tars that an earlier run verified are
    skipped."""
    retries: int = Field(3, ge=0, le=100)
    """Retries of a deployment's run when store or cluster are out of reach (exit code 3)."""
    retry_after: Seconds = Field(300.0, gt=0)
    """Wait before the first retry, in seconds or such as 5m; each further wait is four times as long."""


class Config(Section):
    """The whole tree of settings."""

    ingest: IngestSettings = IngestSettings()
    data: DataSettings = DataSettings()
    model: ModelSettings = ModelSettings()
    train: TrainSettings = TrainSettings()
    encode: EncodeSettings = EncodeSettings()
    index: IndexSettings = IndexSettings()
    search: SearchSettings = SearchSettings()
    dedupe: DedupeSettings = DedupeSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    agreement: AgreementSettings = AgreementSettings()
    ray: RaySettings = RaySettings()
    store: StoreSettings = StoreSettings()
    run: RunSettings = RunSettings()
    cost: CostSettings = CostSettings()

    def with_batch_size(self, size: int) -> Self:
        """Return the settings with this number as `encode.batch_size`."""
        return self.model_copy(update={"encode": self.encode.model_copy(update={"batch_size": size})})


def with_weights(config: Config, change: Callable[[str, str], str]) -> Config:
    """Return the settings with `change(name, path)` in place of each path of a file of weights."""

    def changed(name: str, path: str | None) -> str | None:
        return path if path in (None, "timm") else change(name, str(path))

    model = {"weights": changed("model.weights", config.model.weights)}
    train = {"teacher_weights": changed("train.teacher_weights", config.train.teacher_weights)}
    settings = {"model": config.model.model_copy(update=model), "train": config.train.model_copy(update=train)}
    return config.model_copy(update=settings)
