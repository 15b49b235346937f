"""One typed configuration tree: defaults < recipe < `--config FILE.toml` < `--set section.key=value` < named flags.

Every setting of every verb is declared here once, with its default, its bounds and one line of meaning. `ChangesResult`
names the kinds of artifact whose bytes it changes.
"""

import os
import re
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
)

_UNITS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def parse_duration(value: Any) -> Any:
    """Return the seconds of a text such as 5ms or 24h, or another value as it is; ValueError for other text."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d)", value.strip())
    if match is None:
        raise ValueError("write a number and ms, s, m, h or d, as in 24h")
    return float(match[1]) * _UNITS[match[2]]


Seconds = Annotated[float, BeforeValidator(parse_duration)]
"""A duration: a number of seconds, or a text such as 5ms."""


WeightsPath = Annotated[str, AfterValidator(os.path.expanduser)]
"""`timm`, or the path of a safetensors file."""


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


class PlacedSettings(Section):
    """Placement of a verb's workers: docs/placement.md."""

    cpus: float | None = Field(None, gt=0, le=4096)
    """CPUs of a worker; unset = 1, or in training an equal share of what the nodes have."""
    worker_memory: ByteSize | None = Field(None, gt=0)
    """Memory that a worker reserves on its node, such as 8GiB; unset = none."""
    resources: dict[str, float] = Field(default_factory=dict)
    """Custom resources of the cluster that a worker reserves, by name."""
    labels: dict[str, str] = Field(default_factory=dict)
    """Labels that a worker's node must have, as in {"ray.io/market-type" = "!spot"}; also in(a, b) and !in(a, b)."""
    strategy: Literal["pack", "spread"] = "pack"
    """Whether workers fill a node before the next, as far as Ray does, or lie on as many nodes as there are."""


class GpuPlacedSettings(PlacedSettings):
    """Placement of a verb's workers that can use a GPU: docs/placement.md."""

    gpus: float | None = Field(None, ge=0, le=64)
    """GPUs of a worker, waited for; 0.5 = two share one, 0 = none; unset = 1 where a node has one."""
    accelerator: str | None = None
    """Type of the GPU by Ray's name, such as A100; unset = any."""


class IngestSettings(Section):
    """Settings of writing shards."""

    samples_per_shard: Annotated[int, ChangesResult("shards")] = Field(1000, ge=1, le=1_000_000)
    """Samples in one WebDataset tar."""
    seed: Annotated[int, ChangesResult("shards")] = Field(0, ge=0)
    """Seed of the permutation that mixes the classes and of the split."""
    name: Annotated[str, ChangesResult("shards")] = Field("shard", pattern=r"^[A-Za-z0-9_]+$")
    """First part of the tars' names; a split uses its own name instead."""
    skip_budget: float = Field(0.01, ge=0, le=1)
    """Largest share of pictures that may be unreadable, missing or otherwise lost without ending the run."""


class DataSettings(Section):
    """Settings of the way from stored images to the network."""

    image_size: Annotated[int, ChangesResult("model")] = Field(224, ge=8, le=4096)
    """Side of the square that the network sees, in pixels."""
    resize: Annotated[int | None, ChangesResult("model")] = Field(None, ge=8, le=8192)
    """Shorter side before the centre crop; unset = image_size up to 64 pixels, else image_size * 256 / 224."""
    batch_size: Annotated[int, ChangesResult("model")] = Field(64, ge=2, le=65_536)
    """Images in one optimiser step over all workers (the global batch)."""
    workers: int = Field(2, ge=1, le=256)
    """Threads that read and decode images beside one training or encoding process."""
    cache: ByteSize = Field(ByteSize(1 << 29), ge=0)
    """Most bytes of decoded images that a training process keeps, so that later epochs neither read nor decode them."""
    augment: Annotated[Literal["auto", "flip", "crop_flip", "resized_crop", "none"], ChangesResult("model")] = "auto"
    """Training augmentation; auto = crop_flip up to 64 pixels, else resized_crop. A loss with two views takes it for
    the strong one."""
    policy: Annotated[Literal["none", "trivial"], ChangesResult("model")] = "none"
    """What happens to the picture after that; trivial = one random operation of TrivialAugment."""
    shuffle_buffer: Annotated[int, ChangesResult("model")] = Field(1024, ge=1, le=1_000_000)
    """Undecoded samples one worker holds to shuffle across shards."""
    interleave: Annotated[int, ChangesResult("model")] = Field(4, ge=1, le=256)
    """Shards one worker reads side by side."""


class ModelSettings(Section):
    """Settings of the hashing network."""

    backbone: Annotated[str, ChangesResult("model")] = "hrnet_w18"
    """A timm name, with its tag where weights are pinned (hrnet_w18.ms_in1k), or alexnet."""
    weights: Annotated[WeightsPath | None, ChangesResult("model")] = None
    """Unset = from scratch; `timm` = the pinned tag in `backbone`; else a safetensors file."""
    bits: Annotated[int, ChangesResult("model")] = 64
    """Length of the code, a multiple of 8 from 8 to 4096."""
    head: Annotated[Literal["auto", "linear", "bn", "ln"], ChangesResult("model")] = "auto"
    """Hash layer; auto = what the loss declares."""
    stem_stride: Annotated[Literal[1, 2, 4], ChangesResult("model")] = 4
    """How far the stem reduces each side: 4 as published, 2 or 1 for small images."""
    branches: Annotated[tuple[int, ...] | None, ChangesResult("model")] = None
    """HRNet only: branches whose last maps the features are made of, 1 the finest; unset = all."""
    precision: Annotated[Literal["fp32", "bf16"], ChangesResult("model")] = "fp32"
    """Arithmetic of the forward pass, in training and in encoding."""

    @field_validator("bits")
    @classmethod
    def _bits(cls, bits: int) -> int:
        if bits % 8 or not 8 <= bits <= 4096:
            raise ValueError("must be a multiple of 8 from 8 to 4096")
        return bits


class TrainSettings(GpuPlacedSettings):
    """Settings of a training."""

    recipe: str | None = None
    """A preset of pipelines/config/recipes.py from which all other settings start: docs/recipes.md."""
    epochs: Annotated[int, ChangesResult("model")] = Field(20, ge=1, le=100_000)
    """Passes over the training samples."""
    loss: Annotated[str, ChangesResult("model")] = "orthohash"
    """ce, cel, csq, dch, dhd, dhn, dpn, dpsh, dsh, greedyhash, hashnet, hhf, hyp2, mdsh, orthohash or wglhh:
    docs/losses.md."""
    loss_options: Annotated[dict[str, float], ChangesResult("model")] = Field(default_factory=dict)
    """Keyword arguments of the loss, such as margin = 0.3."""
    mixup: Annotated[float, ChangesResult("model")] = Field(0.0, ge=0, le=10)
    """alpha of the Beta distribution by which two samples are blended; 0 = off. For losses of soft labels."""
    label_smoothing: Annotated[float, ChangesResult("model")] = Field(0.0, ge=0, lt=1)
    """Share of a label that goes to all classes alike. For losses of soft labels."""
    teacher: Annotated[str | None, ChangesResult("model")] = None
    """A timm network with its tag, or alexnet, by whose features codes are to have their neighbours; unset = none."""
    teacher_weights: Annotated[WeightsPath, ChangesResult("model")] = "timm"
    """`timm` = the pinned tag in `teacher`; else a safetensors file of it."""
    distillation: Annotated[float, ChangesResult("model")] = Field(1.0, gt=0, le=1e6)
    """Weight of what the teacher says beside the loss."""
    optimizer: Annotated[Literal["adamw", "adam", "rmsprop", "sgd"], ChangesResult("model")] = "adamw"
    """adamw decays weights by themselves, the others through the gradient; sgd has a momentum of 0.9."""
    lr: Annotated[float, ChangesResult("model")] = Field(1e-3, gt=0)
    """Peak learning rate of the hash layer."""
    backbone_lr_scale: Annotated[float, ChangesResult("model")] = Field(1.0, gt=0)
    """The backbone's learning rate as a share of `lr`; 0.1 suits pretrained weights."""
    layer_decay: Annotated[float, ChangesResult("model")] = Field(1.0, gt=0, le=1)
    """Learning rate of a block of the backbone as a share of the next block's."""
    schedule: Annotated[Literal["cosine", "constant"], ChangesResult("model")] = "cosine"
    """What the learning rate does after the warm-up: falls to 0 along half a cosine, or stays."""
    weight_decay: Annotated[float, ChangesResult("model")] = Field(0.05, ge=0)
    """Weight decay; biases and norms have none."""
    warmup: Annotated[float, ChangesResult("model")] = Field(0.05, ge=0, le=0.1)
    """Share of all steps over which the learning rate rises from 0."""
    ema_decay: Annotated[float, ChangesResult("model")] = Field(0.999, ge=0, lt=1)
    """Decay of the averaged weights, ramped as min(decay, (1+t)/(10+t)); 0 = off."""
    grad_clip: Annotated[float, ChangesResult("model")] = Field(5.0, gt=0)
    """Largest norm of the gradient."""
    rotate: Annotated[Literal["none", "h2q", "itq", "lsh", "pca", "pca-itq", "classes"], ChangesResult("rotation")] = (
        "none"
    )
    """What `train --rotate` does to the hash layer of a trained model: docs/rotation.md."""
    rotate_samples: Annotated[int, ChangesResult("rotation")] = Field(10_000, ge=1)
    """Training images that it looks at, at most."""
    accumulate: Annotated[int, ChangesResult("model")] = Field(1, ge=1, le=4096)
    """Parts in which a worker takes its images of a step through the network, one after another, to save memory."""
    seed: Annotated[int, ChangesResult("model", "rotation")] = Field(0, ge=0)
    """Seed of the initial weights, the epoch plans and the augmentation."""
    workers: int = Field(1, ge=1, le=4096)
    """Training processes (one GPU each where there are GPUs)."""
    val_share: Annotated[float, ChangesResult("model")] = Field(0.1, gt=0, lt=1)
    """Share of the training samples held out for validation when no --val is given."""
    val_limit: Annotated[int, ChangesResult("model")] = Field(5000, ge=2)
    """Validation samples used for the mAP at most."""
    val_every: Annotated[int, ChangesResult("model")] = Field(1, ge=1)
    """Epochs between validations; the last epoch always validates."""
    checkpoint_steps: int = Field(200, ge=1)
    """Optimiser steps between checkpoints; each validation saves one too."""
    max_failures: int = Field(3, ge=0)
    """Worker failures survived before the verb gives up."""


class EncodeSettings(GpuPlacedSettings):
    """Settings of encoding a corpus."""

    workers: int | None = Field(None, ge=1, le=4096)
    """Encoding processes; unset = one per GPU, or one per CPU where there is none."""
    batch_size: Annotated[int, ChangesResult("codes")] = Field(64, ge=1, le=65_536)
    """Images in one forward pass; batches never cross shards."""
    reject_budget: float = Field(0.01, ge=0, le=1)
    """Share of rejected samples above which the run ends degraded (exit 4)."""
    max_attempts: int = Field(3, ge=1)
    """Workers that may die or get stuck on one shard before its samples become rejects."""
    stuck_s: float = Field(600.0, gt=0)
    """Seconds without a decoded image or a finished batch after which a shard is taken from its worker."""
    carry: Annotated[tuple[str, ...], ChangesResult("codes")] = ()
    """Metadata columns of the samples' JSON to carry into the codes."""
    logits: Annotated[bool, ChangesResult("codes")] = False
    """Keep the network's outputs beside the codes, an int8 for each bit, so that `search --rerank` can use them."""

    @field_validator("logits")
    @classmethod
    def _own_column(cls, logits: bool, info: ValidationInfo) -> bool:
        if logits and "logits" in info.data.get("carry", ()):
            raise ValueError("makes a column `logits`, which encode.carry names too")
        return logits


class GateSettings(Section):
    """Minimum figures that a version of an index needs before it is published."""

    probes: Annotated[int, ChangesResult("index")] = Field(100, ge=1, le=100_000)
    """Indexed codes that are searched for, a seeded sample."""
    k: Annotated[int, ChangesResult("index")] = Field(10, ge=1, le=10_000)
    """Neighbours of the recall@k."""
    radius: Annotated[int, ChangesResult("index")] = Field(2, ge=0, le=4096)
    """Bits of the recall within a radius."""
    min_self_recall: float = Field(1.0, ge=0, le=1)
    """Least share of the probes that find themselves at distance 0."""
    min_recall: float = Field(0.5, ge=0, le=1)
    """Least recall@k of an approximate kind, equal distances counted as equal; an exact kind must reach 1."""
    min_recall_within: float = Field(0.5, ge=0, le=1)
    """Least recall within the radius of an approximate kind; an exact kind must reach 1."""
    max_p50_ms: float | None = Field(None, gt=0)
    """Longest median of a query's time in opened parts, in milliseconds; unset = any."""
    max_p99_ms: float | None = Field(None, gt=0)
    """Longest 99th percentile of it; unset = any."""


class IndexSettings(PlacedSettings):
    """Settings of building an index over codes."""

    kind: Annotated[str, ChangesResult("index")] = "flat"
    """flat = exact scan; multihash = exact, by tables of substrings; ivf = inverted lists under one quantizer; hnsw = a
    graph in memory, 288 bytes for a code of 64 bits; auto = what the planner chooses within the next three."""
    memory: ByteSize | None = Field(None, gt=0)
    """Most bytes that `auto` lets the parts have, such as 4GiB; unset = any, and no hnsw."""
    latency: Seconds | None = Field(None, gt=0)
    """Longest time that `auto` lets a query take, in seconds or such as 5ms; unset = any, so it takes an exact kind."""
    recall: float = Field(0.95, ge=0, le=1)
    """Least recall at `search.k` of an approximate kind that `auto` may choose."""
    nlist: Annotated[int | None, ChangesResult("index")] = Field(None, ge=1, le=1_000_000)
    """Inverted lists; unset = about the square root of the number of codes."""
    nprobe: Annotated[int, ChangesResult("index")] = Field(16, ge=1)
    """Inverted lists searched per query."""
    m: Annotated[int, ChangesResult("index")] = Field(32, ge=4, le=256)
    """Links of a code in the graph of hnsw: 8 bytes for each."""
    ef_search: Annotated[int, ChangesResult("index")] = Field(64, ge=1, le=100_000)
    """Candidates that a search in the graph of hnsw keeps."""
    workers: int | None = Field(None, ge=1)
    """Parts built side by side; unset = one per CPU."""
    seed: Annotated[int, ChangesResult("index")] = Field(0, ge=0)
    """Seed of the samples that train the quantizer and probe the gate."""
    gate: GateSettings = GateSettings()
    """What is measured and asked for before a version is published."""


class SearchSettings(PlacedSettings):
    """Settings of searching an index."""

    k: int = Field(10, ge=1, le=100_000)
    """Neighbours per query."""
    workers: int | None = Field(None, ge=1)
    """Ray actors that the parts are dealt to; unset = the parts are searched in this process."""
    device: Literal["cpu", "cuda"] = "cpu"
    """cuda = the codes of an index of kind flat are copied to the GPU of this machine and searched there."""
    rerank: int | None = Field(None, ge=1, le=100_000)
    """Nearest codes of which the best k by logits are shown; unset = the k nearest codes."""


class DedupeSettings(Section):
    """Settings of finding near-duplicates."""

    radius: Annotated[int, ChangesResult("duplicates")] = Field(0, ge=0, le=4096)
    """Bits in which the codes of a pair may differ; 0 = equal codes only."""
    memory: ByteSize = Field(ByteSize(1 << 30), ge=1 << 25)
    """What the arrays of the search may take together, such as 4GiB."""
    max_pairs: int = Field(100_000_000, ge=1)
    """Pairs above which the search gives up."""
    threads: int | None = Field(None, ge=1)
    """Threads that search side by side; unset = one per CPU."""


class EvaluateSettings(Section):
    """Settings of the metrics' convention and the report."""

    at: Annotated[int | None, ChangesResult("report")] = Field(None, ge=1)
    """mAP@K; unset = over the whole ranking."""
    ties: Annotated[Literal["expected", "stable"], ChangesResult("report")] = "expected"
    """Order inside equal distances: the exact expectation, or database order."""
    denominator: Annotated[Literal["retrieved", "min", "all"], ChangesResult("report")] = "retrieved"
    """What AP is divided by: relevant items inside the top K, min(relevant, K), or all relevant."""
    empty: Annotated[Literal["zero", "skip"], ChangesResult("report")] = "zero"
    """A query without a relevant item counts 0, or is left out."""
    unlabelled: Annotated[Literal["zero", "skip"], ChangesResult("report")] = "zero"
    """The same for a query without labels, whatever `empty` says."""
    rerank: Annotated[int | None, ChangesResult("report")] = Field(None, ge=1)
    """Also measure the mAP with the nearest so many of each query ordered by logits; unset = not."""
    gallery: Annotated[int, ChangesResult("report")] = Field(12, ge=0, le=200)
    """Queries shown with their neighbours in the report."""


class AgreementSettings(Section):
    """Settings of comparing two codes of the same samples."""

    queries: Annotated[int, ChangesResult("agreement")] = Field(1000, ge=1, le=1_000_000)
    """Samples whose neighbours are compared, seeded, at most."""
    k: Annotated[int, ChangesResult("agreement")] = Field(10, ge=1, le=100_000)
    """Neighbours of each; cut to the other samples."""
    seed: Annotated[int, ChangesResult("agreement")] = Field(0, ge=0)
    """Seed of the queries."""


class RaySettings(Section):
    """Settings of Ray: the cluster, the driver and waiting times."""

    address: str | None = None
    """Unset = RAY_ADDRESS, else a local Ray; `auto` or host:port joins; http(s)://... submits a job."""
    cpus: int | None = Field(None, ge=1, le=4096)
    """CPUs that a local Ray uses; unset = those that this process may use. Several verbs side by side need their own
    share."""
    wait_s: float = Field(60.0, gt=0)
    """Seconds to wait for a head that does not answer, and for room for a worker; more where an autoscaler needs
    minutes to start a node."""
    cpu_fallback: bool = False
    """Go on without a GPU where the one that was asked for, or that a node has, is not free in time."""
    driver_labels: dict[str, str] = Field(default_factory=dict)
    """Labels of the nodes that may run the driver of a submitted job, such as {"ray.io/market-type" = "on-demand"};
    unset = the head node."""
    metrics_port: int | None = Field(None, ge=1024, le=65_535)
    """Port on 127.0.0.1 at which a local Ray serves its metrics to Prometheus; unset = any free one."""


class StoreSettings(Section):
    """Settings of the object stores."""

    shared: bool = False
    """A local --out is a network file system that every node sees."""
    unsigned: bool | tuple[str, ...] = False
    """Public S3 buckets that are asked without keys, by name; true = all. On a cluster set HHNET_STORE_UNSIGNED on its
    nodes: the names, or *."""


class RunSettings(Section):
    """Inputs, outputs and retries of `hhnet run`."""

    out: str | None = None
    """Folder or s3:// prefix that receives shards, model, codes, index and report."""
    source: str | None = None
    """Images to ingest first; unset = the three shard artifacts below exist already."""
    split: str | None = None
    """How ingest splits the source: `train=.8,query=.1,database=.1`, `folder`, or `column:NAME`."""
    train: str | None = None
    """Shards to train on: a URI, or the name of a split that the run ingests."""
    query: str | None = None
    """Shards of the queries, likewise."""
    database: tuple[str, ...] = ()
    """Shards of the database, likewise; several are searched as one."""
    val: str | None = None
    """Shards to validate on, likewise; unset = a seeded share of the training samples."""
    verify: float = Field(1.0, ge=0, le=1)
    """Share of the tars that a run reads and proves before it uses them, those not proven before first; 1 = all that
    were not proven before."""
    retries: int = Field(3, ge=0, le=100)
    """Times that a run of a deployment is tried again where store or cluster are out of reach (exit code 3)."""
    retry_after: Seconds = Field(300.0, gt=0)
    """Wait before the first of them, in seconds or such as 5m; each next wait is four times as long."""


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


def with_weights(config: Config, change: Callable[[str, str], str]) -> Config:
    """Return the settings with `change(name, path)` in place of each path of a file of weights."""

    def changed(name: str, path: str | None) -> str | None:
        return path if path in (None, "timm") else change(name, str(path))

    model = {"weights": changed("model.weights", config.model.weights)}
    train = {"teacher_weights": changed("train.teacher_weights", config.train.teacher_weights)}
    settings = {"model": config.model.model_copy(update=model), "train": config.train.model_copy(update=train)}
    return config.model_copy(update=settings)
