"""Which settings change a result: they belong to its fingerprint."""

from collections.abc import Iterable, Mapping
from functools import reduce
from typing import Any

from pipelines.config.loading import assign, validated
from pipelines.config.settings import Config

# The settings that change the bytes of each kind of artifact. Never workers, threads, URIs: a result must not
# depend on where or how wide it was computed.
RESULT_SETTINGS: Mapping[str, tuple[str, ...]] = {
    "shards": ("ingest.samples_per_shard", "ingest.seed", "ingest.name"),
    "model": (
        *("data.image_size", "data.resize", "data.batch_size", "data.augment"),
        *("data.shuffle_buffer", "data.interleave"),
        *(
            "model.backbone",
            "model.weights",
            "model.bits",
            "model.head",
            "model.stem_stride",
            "model.branches",
            "model.precision",
        ),
        *("train.epochs", "train.loss", "train.loss_options", "train.lr", "train.backbone_lr_scale"),
        *("train.weight_decay", "train.warmup", "train.ema_decay", "train.grad_clip", "train.seed"),
        *("train.val_share", "train.val_limit", "train.val_every"),
        *("data.policy", "train.mixup", "train.label_smoothing", "train.optimizer", "train.schedule"),
        *("train.layer_decay", "train.accumulate", "train.teacher", "train.teacher_weights", "train.distillation"),
    ),
    "rotation": ("train.rotate", "train.rotate_samples", "train.seed"),
    "codes": ("encode.batch_size", "encode.carry", "encode.logits"),
    "index": (
        *("index.kind", "index.nlist", "index.nprobe", "index.m", "index.ef_search", "index.seed"),
        *("index.gate.probes", "index.gate.k", "index.gate.radius"),
    ),
    "duplicates": ("dedupe.radius",),
    "report": (
        *("evaluate.at", "evaluate.ties", "evaluate.denominator", "evaluate.empty", "evaluate.gallery"),
        *("evaluate.rerank", "evaluate.unlabelled"),
    ),
    "agreement": ("agreement.queries", "agreement.k", "agreement.seed"),
}


# Settings that came later. At their default they are no part of a fingerprint, so that what was made before them keeps
# its name, and with it its bytes.
LATER_SETTINGS = frozenset(
    {
        *("encode.logits", "evaluate.rerank", "evaluate.unlabelled", "index.m", "index.ef_search", "model.branches"),
        *("data.policy", "train.mixup", "train.label_smoothing", "train.optimizer", "train.schedule"),
        *("train.layer_decay", "train.accumulate", "train.teacher", "train.teacher_weights", "train.distillation"),
    }
)


def result_settings(config: Config, kind: str) -> dict[str, Any]:
    """The settings of `config` that change an artifact of `kind`, by dotted name, as plain JSON values."""
    values, defaults = (_by_name(each.model_dump(mode="json"), RESULT_SETTINGS[kind]) for each in (config, Config()))
    return {name: v for name, v in values.items() if name not in LATER_SETTINGS or v != defaults[name]}


def _by_name(tree: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: reduce(lambda node, key: node[key], name.split("."), tree) for name in names}


def config_of(settings: Mapping[str, Any]) -> Config:
    """The tree in which the settings of these dotted names are as given and all others at their defaults."""
    tree: dict[str, Any] = {}
    for name, value in settings.items():
        assign(tree, name, value)
    return validated(tree)
