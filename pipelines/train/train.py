"""The verb train: turns shards into an HHNet model on one to many workers of Ray Train, and resumes after any kill.

`train` computes the fingerprint of the result, looks for a finished one, and publishes; `train_worker` is the loop of
each worker. An epoch is a pure function of (seed, epoch, shard index, number of workers), so a checkpoint only has to
hold the position in it.
"""

import hashlib
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.artifacts.commit import ArtifactWriter
from pipelines.artifacts.facts import Metrics, ModelMeta, ShardsMeta
from pipelines.artifacts.manifest import Artifact, ArtifactInput, fingerprint, read_identity
from pipelines.artifacts.result import Result
from pipelines.artifacts.runs import RunLog
from pipelines.artifacts.versions import all_versions, finished, open_current
from pipelines.cluster.failures import training_failure
from pipelines.cluster.metrics import Meter
from pipelines.cluster.placement import Need, code_shortage, look, training_need, widest
from pipelines.cluster.progress import BOARD_S, BoardView, start_board
from pipelines.cluster.ray_private import START_TIMEOUT
from pipelines.cluster.session import ray_address, ray_session, require_shared_store
from pipelines.cluster.submit import on_cluster
from pipelines.config.fingerprint import result_settings
from pipelines.config.settings import Config
from pipelines.errors import ClusterUnavailable, ConfigError, HHNetError, InputError, WorkFailed
from pipelines.shards.shards import ShardSet, open_shards
from pipelines.storage import Store, canonical_json, scratch_folder

_log = logging.getLogger(__name__)

if TYPE_CHECKING:  # they import torch, which a run that finds everything done can do without
    from pipelines.train.batches import TrainData
    from pipelines.train.checkpoints import Checkpoint, Checkpoints
    from pipelines.train.learner import Batch, Learner


@dataclass(frozen=True)
class TrainJob:
    """The input of every worker: plain values that can be sent to other processes."""

    shards: str
    val: str | None
    out: str
    fingerprint: str
    inputs: tuple[ArtifactInput, ...]
    config: Config

    @property
    def digests(self) -> dict[str, str]:
        """Return the digests of the input shards by role (`shards`, `val`); each selects one version."""
        return {entry.role: entry.digest for entry in self.inputs}

    def opened(self) -> tuple[ShardSet, ShardSet | None]:
        """Open the shards to learn from and those to validate on, in the versions of the job's start."""
        val = open_shards(self.val, self.digests["val"]) if self.val else None
        return open_shards(self.shards, self.digests["shards"]), val

    def writer(self) -> ArtifactWriter:
        """Return the writer at the model's root."""
        origin = {"shards": self.shards, **({"val": self.val} if self.val else {})}
        return ArtifactWriter(Store(self.out), "model", self.fingerprint, self.inputs, origin)


# ---------------------------------------------------------------------------------------------------------- verb


@dataclass(frozen=True, kw_only=True)
class TrainResult(Result):
    """The model: mAP on validation and epoch of its weights, all steps, samples skipped; seconds unless unchanged."""

    verb: str = "train"
    map: float | None
    epoch: int
    steps: int
    skipped: int
    seconds: float | None = None


@on_cluster("train")
def train(
    shards: str, out: str, config: Config, val: str | None = None, run: Callable[..., None] | None = None
) -> TrainResult:
    """Train on a shards artifact and publish the weights of the best validation epoch.

    A rerun of the same command goes on from the last good checkpoint. `run(job, data, log)` runs the training loop to
    its last step; by default that is `run_on_ray`.
    """
    begun, config = time.monotonic(), _absolute(config)
    job = _job_of(shards, val, out, config)
    artifact = finished(Store(out), "model", job.fingerprint)
    status = "unchanged" if artifact else "done"
    if artifact is None:
        artifact = _work(job, run or run_on_ray)
    metrics = artifact.facts(ModelMeta).metrics.as_json()
    seconds = round(time.monotonic() - begun, 1) if status == "done" else None
    return TrainResult.of(artifact, status, **metrics, seconds=seconds)


def _job_of(shards: str, val: str | None, out: str, config: Config) -> TrainJob:
    """Return the job on the current shards, or on the earlier versions of them with which `out` was begun."""
    job = plan_job(open_current(shards, "shards"), open_current(val, "shards") if val else None, out, config)
    try:
        begun = read_identity(Store(out))
    except FileNotFoundError:
        return job
    if begun == ("model", job.fingerprint):
        return job
    held_out = all_versions(Store(val)).values() if val else [None]
    for version, other in product(all_versions(Store(shards)).values(), held_out):
        older = plan_job(version, other, out, config)
        if begun == ("model", older.fingerprint):
            line = "the model is of an earlier version of its shards: train to another --out to learn from what is new"
            _log.warning("%s: %s", older.out, line)
            return older
    return job


def _work(job: TrainJob, run: Callable[..., None]) -> Artifact:
    """Train from the last good checkpoint to the end, and publish the model."""
    from pipelines.train.batches import TrainData
    from pipelines.train.checkpoints import Checkpoints

    (train_set, val_set), config = job.opened(), job.config
    data = TrainData.make(train_set, val_set, config)
    check_network(config, len(train_set.classes))
    writer = job.writer()
    checkpoints = Checkpoints(writer.store, job.fingerprint)
    last, total = checkpoints.latest(), data.total_steps(config)
    settings = config.train
    facts = {"fingerprint": job.fingerprint, "workers": settings.workers, "recipe": settings.recipe}
    epochs = {"epochs": settings.epochs, "epoch_steps": data.epoch_steps(config)}
    done = last.step if last else 0
    with RunLog(writer.store, "train", config, done=done, total=total, unit="steps", **facts, **epochs) as log:
        if last is None or last.step < total:
            run(job, data, log)
            last = checkpoints.latest()
        if last is None or last.step < total:
            raise WorkFailed(f"{job.out}: training ended without its last checkpoint; run the same command again")
        artifact = _publish(writer, checkpoints, last, train_set, config)
        _warn_of_equal_maps(last.progress["history"])
        log.result(**artifact.facts(ModelMeta).metrics.as_json())
    return artifact


def _warn_of_equal_maps(history: Sequence[Mapping[str, Any]]) -> None:
    """Warn on stderr if all validations gave the same mAP, so that they could not choose an epoch."""
    maps = [entry["map"] for entry in history if "map" in entry]
    if len(maps) > 1 and len(set(maps)) == 1:
        _log.warning(
            "warning: the validation mAP was %.4f in all %d validations, so it chose no epoch and the last one was "
            "taken: give --val with more or harder images, or raise train.val_share",
            *(maps[0], len(maps)),
        )


def check_network(config: Config, classes: int) -> None:
    """Build the network and the loss once and try one image, so that a bad setting is found before any work.

    Warns on stderr if there are too few bits for the classes. Raises ConfigError for a bad setting.
    """
    import torch

    from hhnet.nn.losses.base import code_shortage
    from pipelines.train.batches import preprocess_of
    from pipelines.train.learner import make_network, make_training_loss
    from pipelines.train.optimizer import make_optimizer
    from pipelines.train.teacher import Teacher

    loss = make_training_loss(config, classes)
    network = make_network(config, loss.default_head).eval()
    make_optimizer(network, loss, config.train)
    if config.train.teacher:
        Teacher(config, preprocess_of(config), torch.device("cpu"))
    side = config.data.image_size
    try:
        with torch.inference_mode():
            network(torch.zeros(1, 3, side, side))
    except ValueError as error:
        raise ConfigError(f"data.image_size: {error}") from None
    backbone = network.backbone
    if (warning := code_shortage(config.model.bits, classes)) is not None:
        _log.warning("warning: %s", warning)
    if backbone.stripped:
        _log.warning("%s: taken without the prefix %s of its names", config.model.weights, backbone.stripped)


def plan_job(shards: Artifact, val: Artifact | None, out: str, config: Config) -> TrainJob:
    """Return the job with its inputs and the fingerprint of its result."""
    opened = {"shards": shards, **({"val": val} if val else {})}
    inputs = tuple(ArtifactInput(role=role, kind="shards", digest=found.digest) for role, found in opened.items())
    settings = _settings(config)
    mark = fingerprint("model", {entry.role: entry.digest for entry in inputs}, settings)
    return TrainJob(shards.uri, val.uri if val else None, Store(out).uri, mark, inputs, config)


def _absolute(config: Config) -> Config:
    """Return the settings with absolute paths of weights, since workers run in other folders."""

    def absolute(weights: str | None) -> str | None:
        return weights if weights in (None, "timm") else str(Path(str(weights)).absolute())

    model = config.model.model_copy(update={"weights": absolute(config.model.weights)})
    train = config.train.model_copy(update={"teacher_weights": absolute(config.train.teacher_weights)})
    return config.model_copy(update={"model": model, "train": train})


def _settings(config: Config) -> dict[str, Any]:
    """Return the settings that change the model, with the digests of weights files in place of their paths."""
    settings = result_settings(config, "model")
    if config.model.weights not in (None, "timm"):
        settings["model.weights"] = _file_digest("model.weights", str(config.model.weights))
    if config.train.teacher and config.train.teacher_weights != "timm":
        settings["train.teacher_weights"] = _file_digest("train.teacher_weights", config.train.teacher_weights)
    return settings


def _file_digest(setting: str, path: str) -> str:
    try:
        with Path(path).open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise InputError(
            f"{setting}={path} cannot be read on {socket.gethostname()}: {error.strerror}; every machine that trains "
            "must see the file"
        ) from None


def run_on_ray(job: TrainJob, data: "TrainData", log: RunLog) -> None:
    """Run the training loop on Ray Train until its last step; restart workers that die."""
    config = job.config
    with ray_session(config), scratch_folder(kept=True) as scratch:
        require_shared_store(Store(job.out), config)
        # Seconds that Ray Train waits for the room of its workers; a lost node may have taken it away.
        os.environ[START_TIMEOUT] = str(config.ray.wait_s)
        need = training_need(config)
        board = start_board()
        with BoardView(board, "train", log.done, log.total, log.unit, log.reach):
            for restarts in range(config.train.max_failures + 1):
                try:
                    _fit(job, need, board, scratch)
                    break
                except _Unstarted as unstarted:
                    need = _next_try(unstarted, need, config, restarts)
                    _log.info("workers did not start: %s; trying again", unstarted, extra={"restarts": restarts + 1})


class _Unstarted(Exception):
    """Ray Train could not start its workers. `waited`: they found no room in time; otherwise they died at the start."""

    def __init__(self, waited: bool, reason: str) -> None:
        super().__init__(reason)
        self.waited = waited


def _next_try(unstarted: _Unstarted, need: Need, config: Config, restarts: int) -> Need:
    """Return the reservation for another try, or raise the error that ends the training."""
    if unstarted.waited:
        nodes = look()
        fitting = need if config.train.cpus is not None else widest(nodes, config.train.workers, need)
        if fitting is None or fitting == need:
            raise ClusterUnavailable(code_shortage(config.train.workers, need, nodes, config.ray.wait_s)) from unstarted
        return fitting
    if restarts == config.train.max_failures:
        raise WorkFailed(f"training could not start its workers: {unstarted}") from unstarted
    return training_need(config)


def _fit(job: TrainJob, need: Need, board: Any, scratch: Path) -> None:
    """Train on Ray Train with workers that each reserve `need`. Raises WorkFailed, or the workers' own error."""
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.v2.api.exceptions import ControllerError

    settings = job.config.train
    trainer = _trainer_class(job.config)(
        _ray_loop,
        train_loop_config={"job": job, "board": board, "cpus": max(1, int(need.cpus))},
        scaling_config=ScalingConfig(
            num_workers=settings.workers,
            use_gpu=need.gpus > 0,
            resources_per_worker=need.bundle(),
            placement_strategy=need.strategy.upper(),
            label_selector=dict(need.labels) or None,
        ),
        run_config=RunConfig(
            storage_path=str(scratch),
            # By default Ray Train would try for ever to start workers that find no room.
            failure_config=FailureConfig(max_failures=settings.max_failures, controller_failure_limit=0),
        ),
    )
    error: Exception | None = None
    try:
        trainer.fit()
    except ControllerError as failed:
        reason = failed.controller_failure
        if type(reason).__name__.startswith("WorkerGroupStartup"):  # by name, since Ray's classes for it are private
            raise _Unstarted("Timeout" in type(reason).__name__, str(reason).splitlines()[0]) from failed
        error = failed
    except TrainingFailedError as failed:
        error = failed
    failure = ray.get(board.failure.remote(), timeout=BOARD_S)
    if error is not None:
        raise failure or training_failure(str(error)) from error
    if failure is not None:
        raise failure


def _trainer_class(config: Config) -> Any:
    """Return Ray's TorchTrainer; for a local Ray, a subclass without the actor that frees reservations at the end.

    That actor asks the dashboard. A local Ray has none, so every training would wait 12 s until the actor gives up. A
    local Ray ends with this process, reservations included.
    """
    from ray.train.torch import TorchTrainer

    if ray_address(config) != "local":
        return TorchTrainer

    class LocalTrainer(TorchTrainer):  # type: ignore[misc]  # Ray has no types
        def _create_default_callbacks(self) -> list[Any]:
            callbacks = super()._create_default_callbacks()
            # By name: if a later Ray renames or drops the class, training still works and only ends later.
            return [entry for entry in callbacks if type(entry).__name__ != "PlacementGroupCleanerCallback"]

    return LocalTrainer


def _ray_loop(settings: dict[str, Any]) -> None:
    """Train in a worker of Ray Train; an error of ours goes to the board, so that a restart does not repeat it."""
    import ray
    import torch

    board = settings["board"]
    if ray.get(board.failure.remote(), timeout=BOARD_S) is not None:
        return
    torch.set_num_threads(settings["cpus"])
    try:
        train_worker(settings["job"], lambda step, note: board.post.remote(step, note))
    except HHNetError as error:
        ray.get(board.fail.remote(error), timeout=BOARD_S)
        raise


def _publish(
    writer: ArtifactWriter, checkpoints: "Checkpoints", last: "Checkpoint", train_set: ShardSet, config: Config
) -> Artifact:
    """Publish the averaged weights of the best validation epoch as the model."""
    from hhnet.nn.model import card, model_to_bytes
    from pipelines.train.batches import preprocess_of
    from pipelines.train.learner import make_network, make_training_loss

    best = checkpoints.named(last.progress["best"]["checkpoint"])
    loss = make_training_loss(config, len(train_set.classes))
    network = make_network(config, loss.default_head)
    network.load_state_dict(best.tensors("average."))
    metrics = Metrics(
        map=last.progress["best"]["map"],
        epoch=last.progress["best"]["epoch"],
        steps=last.step,
        skipped=last.progress["skipped"],
    )
    description = card(
        network,
        preprocess_of(config),
        classes=list(train_set.classes),
        precision=config.model.precision,
        loss=config.train.loss,
        metrics=metrics.as_json(),
        history=last.progress["history"],
        settings=_settings(config),
    )
    parts = [
        writer.put_part("model.safetensors", model_to_bytes(network), rows=1),
        writer.put_part("model.json", canonical_json(description), rows=1),
    ]
    protocol = train_set.artifact.facts(ShardsMeta).split_part
    meta = ModelMeta(bits=config.model.bits, classes=train_set.classes, metrics=metrics, protocol=protocol)
    return writer.commit(parts, {"parameters": sum(p.numel() for p in network.parameters())}, meta)


# ---------------------------------------------------------------------------------------------------------- loop


def train_worker(job: TrainJob, post: Any) -> None:
    """Train from the latest good checkpoint to the last step; `post(step, note)` reports progress."""
    from pipelines.train.batches import TrainData, preprocess_of
    from pipelines.train.checkpoints import Checkpoints
    from pipelines.train.learner import Learner, StepLoss

    config = job.config
    train_set, val_set = job.opened()
    data = TrainData.make(train_set, val_set, config)
    learner = Learner(config, len(train_set.classes), data.total_steps(config), preprocess_of(config))
    checkpoints = Checkpoints(Store(job.out), job.fingerprint)
    progress: dict[str, Any] = {"best": None, "history": [], "skipped": 0, "legs": []}
    last = checkpoints.latest()
    if last is not None:
        learner.load_state(last.tensors(""), last.step)
        progress = last.progress
    steps = data.epoch_steps(config)
    legs = progress["legs"]
    if not legs or legs[-1][0] != learner.world:
        legs.append([learner.world, 0])
    stream = _stream(job, data, learner, learner.step_count // steps, legs)
    begun = time.monotonic()
    seen, meter = 0, Meter("train")
    while learner.step_count < learner.total_steps:
        epoch, legs = learner.step_count // steps, progress["legs"] or [[learner.world, 0]]
        progress["legs"] = legs
        loss: StepLoss | None = None
        for batch, bad in _counted(islice(stream, steps - learner.step_count % steps), meter):
            before, loss = loss, learner.step(batch)
            legs[-1][1] += 1
            progress["skipped"] += bad
            seen += len(batch.keys) * learner.world  # images: each view of a sample counts as one
            known = (before or loss).value()  # of the step before, so that the GPU has work while this waits
            if learner.rank == 0:
                rate = seen / (time.monotonic() - begun)
                note = f"epoch {epoch + 1}/{config.train.epochs}  loss {known:.4f}  {rate:.0f} images/s"
                post(learner.step_count, note)
            at_end = learner.step_count % steps == 0
            if not at_end and learner.step_count % config.train.checkpoint_steps == 0:
                loss.value()  # raises if the loss is not finite, so that the state after a bad step is never saved
                _save(checkpoints, learner, progress)
        progress["legs"] = []
        assert loss is not None, "an epoch has at least one step left"
        with meter.busy():
            ended = time.perf_counter()
            _end_epoch(checkpoints, learner, data, progress, epoch, loss.value())
            meter.seconds({"validate": time.perf_counter() - ended})


def _counted(batches: "Iterator[tuple[Batch, int]]", meter: Meter) -> "Iterator[tuple[Batch, int]]":
    """Yield the same batches; after each, count its images, the seconds of waiting for it, and those of its step."""
    while True:
        with meter.busy():
            begun = time.perf_counter()
            item = next(batches, None)
            if item is None:
                return
            arrived = time.perf_counter()
            yield item
            batch, skipped = item
            meter.images(len(batch.keys))
            meter.rejects({"skipped": skipped})
            meter.seconds({"feed": arrived - begun, "step": time.perf_counter() - arrived})


def _stream(
    job: TrainJob, data: "TrainData", learner: "Learner", epoch: int, legs: list[list[int]]
) -> "Iterator[tuple[Batch, int]]":
    """Return the batches from here on, made in a process of their own if a GPU waits for them."""
    from pipelines.train.prefetch import Position, batches, batches_apart

    done = [(workers, steps) for workers, steps in legs]
    position = Position(learner.rank, learner.world, learner.loss.views, epoch, done)
    if learner.device.type == "cuda":
        return batches_apart(job.shards, job.val, job.config, position, job.digests)
    return batches(data, job.config, position)


def _end_epoch(
    checkpoints: "Checkpoints",
    learner: "Learner",
    data: "TrainData",
    progress: dict[str, Any],
    epoch: int,
    loss: float,
) -> None:
    """Validate if it is due, remember the best epoch, and save after a validation or if a checkpoint is due."""
    from pipelines.train.validation import validate

    train_config = learner.config.train
    entry: dict[str, Any] = {"epoch": epoch + 1, "step": learner.step_count, "loss": loss}
    last = epoch + 1 == train_config.epochs
    name = checkpoints.new_name(learner.step_count)
    validates = last or (epoch + 1) % train_config.val_every == 0
    if validates:
        entry["map"] = validate(learner, data)
        if progress["best"] is None or entry["map"] >= progress["best"]["map"]:  # of equal ones, the later epoch
            progress["best"] = {"map": entry["map"], "epoch": epoch + 1, "checkpoint": name}
    progress["history"].append(entry)
    if validates or learner.step_count % train_config.checkpoint_steps == 0:
        _save(checkpoints, learner, progress, name)


def _save(checkpoints: "Checkpoints", learner: "Learner", progress: dict[str, Any], name: str | None = None) -> None:
    import torch.distributed as dist

    if learner.rank == 0:
        checkpoints.save(
            name or checkpoints.new_name(learner.step_count), learner.step_count, learner.state(), progress
        )
    if learner.world > 1:
        dist.barrier()
