"""The verb train: turns shards into an HHNet model on one to many workers of Ray Train, and resumes after any kill.

It computes the fingerprint of the result, looks for a finished one, and publishes. An epoch is a pure function of
(seed, epoch, shard index, number of workers), so a checkpoint only has to hold the position in it.
"""

import logging
import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.artifacts.commit import ArtifactWriter
from pipelines.artifacts.facts import EpochFigures, Metrics, ModelCard, ModelMeta, ShardsMeta
from pipelines.artifacts.manifest import Artifact, fingerprint, inputs_of, read_identity
from pipelines.artifacts.result import Result
from pipelines.artifacts.runs import RunLog
from pipelines.artifacts.versions import find_finished, open_current, read_all_manifests
from pipelines.cluster.failures import training_failure
from pipelines.cluster.placement import (
    Need,
    await_training_needs,
    explain_shortage,
    hide_unreserved_gpus,
    list_live_nodes,
    widen_need,
)
from pipelines.cluster.progress import BOARD_TIMEOUT_S, BoardView, say_resumed, start_board
from pipelines.cluster.ray_private import START_TIMEOUT_VARIABLE
from pipelines.cluster.session import ray_address, ray_session, require_shared_store
from pipelines.cluster.submit import on_cluster
from pipelines.config.fingerprint import result_settings
from pipelines.config.recipes import AUTO
from pipelines.config.settings import Config, with_weights
from pipelines.console import NOTICE
from pipelines.errors import ClusterUnavailable, ConfigError, HHNetError, InputError, WorkFailed, format_count
from pipelines.shards.shards import ShardSet
from pipelines.storage import Store, canonical_json, scratch_folder, sha256_of
from pipelines.train.curve import put_curve
from pipelines.train.fit import fit_to_images, name_defaults
from pipelines.train.job import TrainJob
from pipelines.train.pace import watch_pace
from pipelines.train.sinks import open_sink, require_sink

_log = logging.getLogger(__name__)

if TYPE_CHECKING:  # they import torch, which a run that finds everything done can do without
    from pipelines.train.batches import TrainData
    from pipelines.train.checkpoints import Checkpoint, Checkpoints


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

    def fact(self, name: str, value: Any) -> list[str]:
        """Return the lines that show a field; of the mAP and the epoch what they are."""
        if name in ("map", "epoch") and value is not None:
            return [f"{value:.4f} on validation images" if name == "map" else f"{value}, whose weights are kept"]
        return super().fact(name, value)


@on_cluster("train")
def train(
    shards: str, out: str, config: Config, val: str | None = None, run: Callable[..., None] | None = None
) -> TrainResult:
    """Train on a shards artifact and publish the weights of the best validation epoch.

    A rerun of the same command goes on from the last good checkpoint. `run(job, data, log)` runs the training loop to
    its last step; by default that is `run_on_ray`.
    """
    begun = time.monotonic()
    config = with_weights(config, lambda _, path: str(Path(path).absolute()))  # workers run in other folders
    require_sink(config.train.log)
    if config.train.recipe == AUTO:
        if val is not None:
            open_current(val, "shards")  # a wrong place is refused before the recipe says what it took
        config = fit_to_images(shards, out, config)
    job = _plan_or_resume(shards, val, out, config)
    artifact = find_finished(Store(out), "model", job.fingerprint)
    status = "unchanged" if artifact else "done"
    if artifact is None:
        artifact = _train_to_end(job, run or run_on_ray)
    metrics = artifact.facts(ModelMeta).metrics.as_json()
    seconds = round(time.monotonic() - begun, 1) if status == "done" else None
    return TrainResult.of(artifact, status, **metrics, seconds=seconds)


def _plan_or_resume(shards: str, val: str | None, out: str, config: Config) -> TrainJob:
    """Return the job on the current shards, or on those earlier versions that `out` was begun with."""
    job = plan_training(open_current(shards, "shards"), open_current(val, "shards") if val else None, out, config)
    try:
        begun = read_identity(Store(out))
    except FileNotFoundError:
        return job
    if begun == ("model", job.fingerprint):
        return job
    held_out = read_all_manifests(Store(val)).values() if val else [None]
    for version, other in product(read_all_manifests(Store(shards)).values(), held_out):
        older = plan_training(version, other, out, config)
        if begun == ("model", older.fingerprint):
            line = "the model is of an earlier version of its shards: train to another --out to learn from what is new"
            _log.warning("%s: %s", older.out, line)
            return older
    job.require_root()
    return job


def _train_to_end(job: TrainJob, run: Callable[..., None]) -> Artifact:
    """Train from the last good checkpoint to the end, and publish the model."""
    (train_set, val_set), config = job.open_sets(), job.config
    name_defaults(config)
    ray = "starting Ray" if ray_address(config) == "local" else "joining Ray"
    _log.log(NOTICE, "%s, reading %s", ray, format_count(train_set.samples, "image"))
    from pipelines.train.batches import TrainData  # imports torch, which takes seconds
    from pipelines.train.checkpoints import Checkpoints

    data = TrainData.make(train_set, val_set, config)
    check_network(config, len(train_set.classes))
    writer = job.writer()
    checkpoints = Checkpoints(writer.store, job.fingerprint)
    last, total = checkpoints.latest(), data.total_steps(config)
    settings = config.train
    facts = {"fingerprint": job.fingerprint, "workers": settings.workers, "recipe": settings.recipe}
    epochs = {"epochs": settings.epochs, "epoch_steps": data.epoch_steps(config)}
    done = last.step if last else 0
    say_resumed("train", done, total, "steps")
    with RunLog(writer.store, "train", config, done=done, total=total, unit="steps", **facts, **epochs) as log:
        if last is None or last.step < total:
            run(job, data, log)
            last = checkpoints.latest()
        if last is None or last.step < total:
            raise WorkFailed(f"{job.out}: training ended without its last checkpoint; run the same command again")
        artifact = _publish_best(writer, checkpoints, last, train_set, config)
        _warn_of_equal_maps(last.progress.history)
        log.record_figures(**artifact.facts(ModelMeta).metrics.as_json())
    return artifact


def _warn_of_equal_maps(history: Sequence[EpochFigures]) -> None:
    """Warn on stderr if all validations gave the same mAP, so that they could not choose an epoch."""
    maps = [entry.map for entry in history if entry.map is not None]
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

    from hhnet.nn.losses.base import code_shortage_warning
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
    if (warning := code_shortage_warning(config.model.bits, classes)) is not None:
        _log.warning("warning: %s", warning)
    if backbone.stripped:
        _log.warning("%s: taken without the prefix %s of its names", config.model.weights, backbone.stripped)


def plan_training(shards: Artifact, val: Artifact | None, out: str, config: Config) -> TrainJob:
    """Return the job with its inputs and the fingerprint of its result."""
    opened = {"shards": shards, **({"val": val} if val else {})}
    mark = fingerprint("model", {role: found.digest for role, found in opened.items()}, _model_settings(config))
    return TrainJob(shards.uri, val.uri if val else None, Store(out).uri, mark, inputs_of(opened), config)


def _model_settings(config: Config) -> dict[str, Any]:
    """Return the settings that change the model, with the digests of weights files in place of their paths."""
    settings = result_settings(config, "model")
    if config.model.weights not in (None, "timm"):
        settings["model.weights"] = _file_digest("model.weights", str(config.model.weights))
    if config.train.teacher and config.train.teacher_weights != "timm":
        settings["train.teacher_weights"] = _file_digest("train.teacher_weights", config.train.teacher_weights)
    return settings


def _file_digest(setting: str, path: str) -> str:
    try:
        return sha256_of(Path(path))
    except OSError as error:
        problem = f"{setting}={path} cannot be read on {socket.gethostname()}: {error.strerror}"
        raise InputError(f"{problem}; every machine that trains must see the file") from None


def run_on_ray(job: TrainJob, data: "TrainData", log: RunLog) -> None:
    """Run the training loop on Ray Train until its last step; restart workers that die."""
    config = job.config
    with open_sink(job) as hear, ray_session(config), scratch_folder(kept=True) as scratch:
        require_shared_store(Store(job.out), config)
        # Seconds that Ray Train waits for the room of its workers; a lost node may have taken it away.
        os.environ[START_TIMEOUT_VARIABLE] = str(config.ray.wait_s)
        need = await_training_needs(config)
        board = start_board()
        follow = watch_pace(log, config, on_cpu=need.gpus == 0)
        with BoardView(board, "train", log.done, log.total, log.unit, follow, hear):
            for restarts in range(config.train.max_failures + 1):
                try:
                    _fit_on_ray(job, need, board, scratch)
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
        nodes = list_live_nodes()
        fitting = need if config.train.cpus is not None else widen_need(nodes, config.train.workers, need)
        if fitting is None or fitting == need:
            shortage = explain_shortage(config.train.workers, need, nodes, config.ray.wait_s)
            raise ClusterUnavailable(shortage) from unstarted
        return fitting
    if restarts == config.train.max_failures:
        problem = f"training could not start its workers: {unstarted}"
        raise WorkFailed(f"{problem}: look at the logs of their nodes") from unstarted
    return await_training_needs(config)


def _fit_on_ray(job: TrainJob, need: Need, board: Any, scratch: Path) -> None:
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
    failure = ray.get(board.failure.remote(), timeout=BOARD_TIMEOUT_S)
    if error is not None:
        raise failure or training_failure(str(error)) from error
    if failure is not None:
        raise failure


def _trainer_class(config: Config) -> Any:
    """Return Ray's TorchTrainer without its own answer to Ctrl-C, which ends the process as SIGTERM does.

    For a local Ray it also lacks the actor that frees reservations at the end. That actor asks the dashboard. A local
    Ray has none, so every training would wait 12 s until the actor gives up. A local Ray ends with this process,
    reservations included.
    """
    from ray.train.torch import TorchTrainer

    class Trainer(TorchTrainer):  # type: ignore[misc]  # Ray has no types
        # Private, since Ray offers no way to keep the handler of the command line. The interrupt ends the connection
        # to Ray, and with it the training.
        def _register_sigint_handler(self, _controller: object) -> None:
            return None

    if ray_address(config) != "local":
        return Trainer

    class LocalTrainer(Trainer):
        def _create_default_callbacks(self) -> list[Any]:
            callbacks = super()._create_default_callbacks()
            # By name: if a later Ray renames or drops the class, training still works and only ends later.
            return [entry for entry in callbacks if type(entry).__name__ != "PlacementGroupCleanerCallback"]

    return LocalTrainer


def _ray_loop(settings: dict[str, Any]) -> None:
    """Train in a worker of Ray Train; an error of ours goes to the board, so that a restart does not repeat it."""
    import ray
    import torch

    from pipelines.train.worker import train_worker

    board = settings["board"]
    if ray.get(board.failure.remote(), timeout=BOARD_TIMEOUT_S) is not None:
        return
    hide_unreserved_gpus()
    torch.set_num_threads(settings["cpus"])
    try:
        train_worker(
            settings["job"],
            lambda step, note: board.post.remote(step, note),
            lambda text, fields: board.tell.remote(text, fields),
        )
    except HHNetError as error:
        ray.get(board.fail.remote(error), timeout=BOARD_TIMEOUT_S)
        raise


def _publish_best(
    writer: ArtifactWriter, checkpoints: "Checkpoints", last: "Checkpoint", train_set: ShardSet, config: Config
) -> Artifact:
    """Publish the averaged weights of the best validation epoch as the model, with the learning curve."""
    from hhnet.nn.model import card, model_to_bytes
    from pipelines.train.batches import preprocess_of
    from pipelines.train.learner import make_network, make_training_loss

    validated = last.progress.best
    assert validated is not None, "the last epoch is always validated"
    best = checkpoints.open_named(validated.checkpoint)
    loss = make_training_loss(config, len(train_set.classes))
    network = make_network(config, loss.default_head)
    network.load_state_dict(best.tensors("average."))
    metrics = Metrics(map=validated.map, epoch=validated.epoch, steps=last.step, skipped=last.progress.skipped)
    described = card(
        network,
        preprocess_of(config),
        classes=list(train_set.classes),
        precision=config.model.precision,
        loss=config.train.loss,
        metrics=metrics,
        history=last.progress.history,
        settings=_model_settings(config),
    )
    parts = [
        writer.put_part("model.safetensors", model_to_bytes(network), rows=1),
        writer.put_part("model.json", canonical_json(ModelCard.from_json(described)), rows=1),
        *put_curve(writer, last.progress.history),
    ]
    protocol = train_set.artifact.facts(ShardsMeta).split_part
    meta = ModelMeta(bits=config.model.bits, classes=train_set.classes, metrics=metrics, protocol=protocol)
    return writer.commit(parts, {"parameters": sum(p.numel() for p in network.parameters())}, meta)
