"""`hhnet train --rotate`: gives a trained model another hash layer, fitted to its training images without labels.

`h2q` and `itq` rotate the outputs so that taking their signs loses less; `lsh`, `pca` and `pca-itq` project the
features; `classes` encodes the index of the class that the loss's own classifier predicts. The last four are baselines
that a learned hash layer has to beat. No weight of the backbone changes, and validation measures the new model.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Required, TypedDict

import numpy as np
import numpy.typing as npt

from pipelines.artifacts.facts import ModelCard, ModelMeta, Rotation
from pipelines.artifacts.manifest import Artifact, fingerprint, inputs_of, open_artifact
from pipelines.artifacts.result import Result
from pipelines.artifacts.runs import write_run_record
from pipelines.artifacts.versions import find_finished, open_input_version
from pipelines.cluster.placement import await_need
from pipelines.cluster.pool import map_items
from pipelines.cluster.progress import BoardView, start_board
from pipelines.cluster.session import ray_session, require_shared_store
from pipelines.cluster.submit import on_cluster
from pipelines.config.fingerprint import result_settings
from pipelines.config.settings import Config
from pipelines.errors import DamagedArtifact, InputError, UsageError, WorkFailed
from pipelines.shards.containers.limits import ImageReject
from pipelines.shards.images import decode_ahead, decode_square
from pipelines.shards.shards import Sample, open_shards
from pipelines.storage import Store, canonical_json
from pipelines.train.job import TrainJob

if TYPE_CHECKING:  # they import torch, which only the worker needs
    from torch import nn

    from hhnet.nn.model import HHNet, Preprocess

FEATURE_METHODS = ("lsh", "pca", "pca-itq")
"""Methods that are fitted to the features and not to the outputs."""
IMAGES_AT_ONCE = 64
"""Number of images that go through the network at once."""
H2Q_EPOCHS = 150
"""Number of epochs of the H2Q fit."""

Reals = npt.NDArray[np.float64]


@dataclass(frozen=True)
class RotateJob(TrainJob):
    """The input of the worker; `model` is the trained model."""

    model: str

    @property
    def settings(self) -> dict[str, Any]:
        """Settings that change the hash layer, by dotted name."""
        return result_settings(self.config, "rotation")


class Fit(TypedDict, total=False):
    """Figures of a fit: the images that it saw, and the quantisation error after and before it."""

    images: Required[int]
    error: float
    error_before: float


@dataclass(frozen=True)
class Fitted:
    """The new model's weights as bytes, its model card, its number of parameters, and its figures."""

    weights: bytes
    card: ModelCard
    parameters: int
    meta: ModelMeta


# ---------------------------------------------------------------------------------------------------------- verb


@dataclass(frozen=True, kw_only=True)
class RotateResult(Result):
    """The model with its new hash layer.

    `map` is that on validation; `error` is the mean squared difference of outputs and signs, see `hhnet.nn.rotation`.
    """

    verb: str = "train"
    rotated: str
    map: float | None
    map_before: float | None
    bits: int
    images: int
    error: float | None = None
    error_before: float | None = None
    seconds: float | None = None


@on_cluster("train --rotate {config.train.rotate}")
def rotate(
    model: str, out: str, config: Config, shards: str | None = None, fit: Callable[[RotateJob], Fitted] | None = None
) -> RotateResult:
    """Give the model at the URI `model` the hash layer of `train.rotate`, and publish it as another model at `out`.

    The training shards are read at `shards`, or by default where the model's manifest says. `fit` fits the layer, by
    default `fit_on_ray`. Raises InputError if the method cannot be applied.
    """
    begun = time.monotonic()
    job = plan_rehead(open_artifact(model, "model"), out, config, shards)
    artifact = find_finished(Store(out), "model", job.fingerprint)
    status = "unchanged" if artifact else "done"
    if artifact is None:
        job.require_root()
        artifact = _publish_model(job, (fit or fit_on_ray)(job))
    rotation = artifact.facts(ModelMeta).rotation
    if rotation is None:
        raise DamagedArtifact(f"{artifact.uri}: the model manifest does not say its rotation: rotate to another --out")
    result = RotateResult.of(artifact, status, **rotation.as_json())
    if status == "done":
        seconds = time.monotonic() - begun
        figures = {**result.as_json(), "fingerprint": job.fingerprint, "seconds": round(seconds, 3)}
        write_run_record(artifact.store, "train", figures, config)  # last, so that a refused run leaves nothing behind
        return replace(result, seconds=round(seconds, 1))
    return result


def plan_rehead(model: Artifact, out: str, config: Config, shards: str | None = None) -> RotateJob:
    """Return the job with its inputs and the fingerprint of its result. Raises UsageError if no method is set."""
    if config.train.rotate == "none":
        raise UsageError("nothing to do to the model: give --rotate h2q, or another method of docs/rotation.md")
    learnt = open_input_version(model, "shards", shards)
    val = open_input_version(model, "val") if any(entry.role == "val" for entry in model.manifest.inputs) else None
    opened = {"model": model, "shards": learnt, **({"val": val} if val else {})}
    digests = {role: found.digest for role, found in opened.items()}
    mark = fingerprint("model", digests, result_settings(config, "rotation"))
    return RotateJob(learnt.uri, val.uri if val else None, Store(out).uri, mark, inputs_of(opened), config, model.uri)


def fit_on_ray(job: RotateJob) -> Fitted:
    """Fit in one worker on Ray, on a GPU if there is one."""
    with ray_session(job.config):
        require_shared_store(Store(job.out), job.config)
        need = await_need(job.config.train, job.config)
        board = start_board()
        steps = min(job.config.train.rotate_samples, open_shards(job.shards).samples)
        steps += H2Q_EPOCHS if job.config.train.rotate == "h2q" else 0
        with BoardView(board, "rotate", 0, steps, "steps"):
            (outcome,) = map_items(
                *(Fitter, (job, lambda done, note: board.post.remote(done, note)), [job.model]),
                verb="rotate",
                need=need,
                workers=1,
                wait_s=job.config.ray.wait_s,
                max_attempts=1 + job.config.train.max_failures,
            )
    if outcome.error is not None:
        raise WorkFailed(outcome.error)
    fitted: Fitted = outcome.result
    return fitted


def _publish_model(job: RotateJob, fitted: Fitted) -> Artifact:
    writer = job.writer()
    parts = [
        writer.put_part("model.safetensors", fitted.weights, rows=1),
        writer.put_part("model.json", canonical_json(fitted.card), rows=1),
    ]
    return writer.commit(parts, {"parameters": fitted.parameters}, fitted.meta)


# -------------------------------------------------------------------------------------------------------- fitting


class Fitter:
    """Fits the hash layer of a job; runs in a worker. `post(steps, note)` reports progress: images, then epochs."""

    def __init__(self, job: RotateJob, post: Callable[[int, str], object]) -> None:
        from pipelines.encode.encoder import Encoder
        from pipelines.train.batches import TrainData

        self.job, self.post, self.train = job, post, job.config.train
        self.base = open_artifact(job.model, "model")
        self.card = ModelCard.of(self.base)
        self.encoder = Encoder.open(self.base)
        # The settings of the training, so that the same samples are held out for validation.
        self.trained = self.card.config
        val = open_shards(job.val) if job.val else None
        self.data = TrainData.make(open_shards(job.shards), val, self.trained)

    def run(self, _model: str) -> Fitted:
        """Fit the configured method, and return the new model with its validation mAP."""
        from hhnet.nn.model import model_to_bytes
        from pipelines.encode.encoder import Encoder
        from pipelines.train.validation import validation_map

        made, figures = self._made()
        encoder = Encoder(made, self.encoder.preprocess, self.encoder.precision, "")
        found = validation_map(encoder, self.data, self.trained)
        before = self.base.facts(ModelMeta)
        maps = {"map": found, "map_before": before.metrics.map}
        rotation = Rotation(rotated=self.train.rotate, bits=made.bits, **maps, **figures)
        meta = ModelMeta(
            bits=made.bits,
            classes=before.classes,
            metrics=before.metrics.model_copy(update={"map": found}),
            protocol=before.protocol,
            rotation=rotation,
        )
        settings = {**self.card.settings, **result_settings(self.job.config, "rotation")}
        network = {"bits": made.bits, "head": made.head_name, "class_count": made.classes}
        described = self.card.model_copy(update={**network, "metrics": meta.metrics, "settings": settings})
        parameters = sum(tensor.numel() for tensor in made.parameters())
        return Fitted(model_to_bytes(made), described, parameters, meta)

    def _made(self) -> tuple["HHNet", Fit]:
        from hhnet.nn import rehead, rotation

        method, seed = self.train.rotate, self.train.seed
        if method == "classes":
            return self._class_index(), {"images": 0}
        network = self.encoder.model.backbone if method in FEATURE_METHODS else self.encoder.model
        x_ND = self._outputs(network)
        self.encoder.model.cpu()
        try:
            if method in FEATURE_METHODS:
                return self._projected(x_ND)
            if method == "itq":
                rotation_KK = rotation.itq_rotation(x_ND, seed=seed)
            else:
                done = partial(self._fitted, len(x_ND))
                rotation_KK = rotation.householder_rotation(x_ND, epochs=H2Q_EPOCHS, seed=seed, advance=done)
            made = rehead.rotated(self.encoder.model, rotation_KK)
        except ValueError as error:
            raise InputError(f"{self.base.uri}: {method}: {error}") from None
        before, after = (rotation.quantisation_error(z) for z in (x_ND, x_ND @ rotation_KK))
        return made, {"images": len(x_ND), "error": after, "error_before": before}

    def _fitted(self, images: int, epochs: int) -> None:
        self.post(images + epochs, f"epoch {epochs}/{H2Q_EPOCHS}")

    def _projected(self, x_ND: Reals) -> tuple["HHNet", Fit]:
        from hhnet.nn import rehead, rotation

        bits, seed = self.encoder.bits, self.train.seed
        if self.train.rotate == "lsh":
            directions_DK, mean_D = rotation.random_hyperplanes(x_ND, bits, seed=seed)
        else:
            directions_DK, mean_D = rotation.principal_directions(x_ND, bits)
        if self.train.rotate == "pca-itq":
            directions_DK = directions_DK @ rotation.itq_rotation((x_ND - mean_D) @ directions_DK, seed=seed)
        made = rehead.projected(self.encoder.model, directions_DK, mean_D)
        return made, {"images": len(x_ND), "error": rotation.quantisation_error((x_ND - mean_D) @ directions_DK)}

    def _class_index(self) -> "HHNet":
        """Return the model with the loss's own classifier as its hash layer; only checkpoints hold that classifier."""
        from hhnet.nn import rehead
        from pipelines.train.checkpoints import Checkpoints

        if self.card.loss != "ce":
            problem = f"{self.base.uri} was trained with loss {self.card.loss}, which has no classifier of outputs"
            raise InputError(f"{problem}: train with --loss ce")
        checkpoints = Checkpoints(self.base.store, self.base.manifest.fingerprint)
        last = checkpoints.latest()
        if last is None:
            problem = f"the checkpoints of {self.base.uri}, which have its classifier, are gone"
            raise InputError(f"{problem}: train it to another --out")
        learned = checkpoints.open_named(last.best).tensors("loss.classifier.")
        try:
            return rehead.as_class_index(self.encoder.model.cpu(), learned["weight"], learned["bias"])
        except ValueError as error:
            raise InputError(f"{self.base.uri}: {error}") from None

    def _outputs(self, network: "nn.Module") -> Reals:
        """Return the outputs of `network` for a seeded sample of the training images, float64 (N, width of outputs)."""
        batches, squares, done = [], [], 0
        decode = partial(_decode, self.encoder.preprocess)
        for square in decode_ahead(self._sample(), decode, self.job.config.data.workers, 2 * IMAGES_AT_ONCE):
            done += 1
            if square is not None:
                squares.append(square)
            if len(squares) == IMAGES_AT_ONCE:
                batches.append(self.encoder.outputs(squares, network))
                squares = []
                self.post(done, "")
        if squares:
            batches.append(self.encoder.outputs(squares, network))
        if not batches:
            raise InputError(f"{self.job.shards}: none of {done} training images decodes: check them with hhnet verify")
        return np.concatenate(batches).astype(np.float64)

    def _sample(self) -> Iterator[Sample]:
        """Yield `train.rotate_samples` training images, or all if there are fewer, shard by shard."""
        order = np.random.default_rng(self.train.seed).permutation(self.data.samples)
        # argsort inverts the permutation: it gives each sample its rank, and the samples stay in reading order.
        taken = order.argsort() < self.train.rotate_samples
        ends = np.cumsum([len(rows) for rows in self.data.rows])[:-1]
        for shard, rows, mine in zip(self.data.train.shards, self.data.rows, np.split(taken, ends), strict=True):
            yield from self.data.train.read(shard, rows[mine].tolist())


def _decode(preprocess: "Preprocess", sample: Sample) -> npt.NDArray[np.uint8] | None:
    if sample.damage is None:
        with suppress(ImageReject):
            return decode_square(sample.image, preprocess)[0]
    return None
