"""Small models as artifacts: untrained, for tests that are about encoding, or trained in this process."""

from pathlib import Path

import torch

from hhnet.nn.model import HHNet, card, model_to_bytes
from hhnet.preprocess import Preprocess
from pipelines.artifacts.commit import ArtifactWriter
from pipelines.artifacts.facts import Metrics, ModelCard, ModelMeta, ShardsMeta
from pipelines.artifacts.manifest import Artifact, ArtifactInput, open_artifact
from pipelines.config.settings import Config
from pipelines.shards.shards import open_shards
from pipelines.storage import Store, canonical_json
from pipelines.train.checkpoints import Checkpoints
from pipelines.train.train import _publish_best, plan_training
from pipelines.train.worker import train_worker

SIDE = 32


def write_model(
    out: str | Path,
    shards_uri: str,
    bits: int = 16,
    seed: int = 0,
    backbone: str = "resnet18",
    side: int = SIDE,
    resize: int | None = None,
    epochs: int = 1,
    precision: str = "fp32",
) -> Artifact:
    """A network of seeded weights, committed as if it had learnt from these shards."""
    shards = open_artifact(shards_uri, "shards")
    torch.manual_seed(seed)
    network = HHNet(backbone, bits, stem_stride=4).eval()
    classes = shards.manifest.meta["classes"]
    metrics = Metrics(map=0.5, epoch=1, steps=1, skipped=0)
    described = ModelCard.from_json(
        card(
            network,
            Preprocess(size=side, resize=resize or side),
            **{"classes": classes, "precision": precision, "loss": "csq", "metrics": metrics},
            history=[{"epoch": n, "step": n, "loss": 1 / n, "map": 0.5} for n in range(1, epochs + 1)],
            settings={"model.bits": bits},
        )
    )
    inputs = (ArtifactInput(role="shards", kind="shards", digest=shards.digest),)
    writer = ArtifactWriter(Store(out), "model", f"{seed:064x}", inputs, {"shards": shards.uri})
    parts = [
        writer.put_part("model.safetensors", model_to_bytes(network), rows=1),
        writer.put_part("model.json", canonical_json(described), rows=1),
    ]
    totals = {"parameters": sum(parameter.numel() for parameter in network.parameters())}
    source = shards.facts(ShardsMeta)
    meta = ModelMeta(bits=bits, classes=source.classes, metrics=metrics, protocol=source.split_part)
    return writer.commit(parts, totals, meta)


def train_model(shards_uri: str, out: str | Path, config: Config) -> Artifact:
    """A model trained and published in this process: what `train` does, without Ray."""
    job = plan_training(open_artifact(shards_uri, "shards"), None, str(out), config)
    writer = job.writer()
    train_worker(job, lambda step, note: None)
    checkpoints = Checkpoints(writer.store, job.fingerprint)
    last = checkpoints.latest()
    assert last is not None
    return _publish_best(writer, checkpoints, last, open_shards(job.shards), job.config)
