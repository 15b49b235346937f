"""The loop of each training worker, from its latest checkpoint to the last step."""

import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import Any

import torch.distributed as dist

from pipelines.artifacts.facts import BestEpoch, EpochFigures, Progress
from pipelines.cluster.metrics import Meter
from pipelines.config.settings import Config
from pipelines.errors import format_count
from pipelines.storage import Store
from pipelines.train.batches import TrainData, preprocess_of
from pipelines.train.checkpoints import Checkpoints
from pipelines.train.device_squares import DeviceSquares, fits_device
from pipelines.train.job import TrainJob
from pipelines.train.learner import Batch, Learner, StepLoss
from pipelines.train.pace import format_speed
from pipelines.train.prefetch import Position, iterate_batches, iterate_drawn, prefetch_batches
from pipelines.train.validation import validate, validation_chance

Post = Callable[[int, str], object]
Tell = Callable[[str, dict[str, Any]], object]


def train_worker(job: TrainJob, post: Post, tell: Tell = lambda text, fields: None) -> None:
    """Train from the latest good checkpoint to the last step.

    `post(step, note)` reports progress, `tell(text, fields)` a line for the user and its fields in a log of JSON.
    """
    config = job.config
    train_set, val_set = job.open_sets()
    data = TrainData.make(train_set, val_set, config)
    learner = Learner(config, len(train_set.classes), data.total_steps(config), preprocess_of(config))
    checkpoints = Checkpoints(Store(job.out), job.fingerprint)
    progress = Progress.new()
    last = checkpoints.latest()
    if last is not None:
        learner.load_state(last.tensors(""), last.step)
        progress = last.progress
    steps = data.epoch_steps(config)
    legs = progress.legs
    if not legs or legs[-1][0] != learner.world:
        legs.append([learner.world, 0])
    stream = _stream(job, data, learner, learner.step_count // steps, legs)
    validated = partial(validate, learner, data, [])
    begun = time.monotonic()
    seen, meter = 0, Meter("train")
    if learner.rank == 0:
        post(learner.step_count, "first batch")  # from here on the pace is that of the training
    while learner.step_count < learner.total_steps:
        epoch, legs = learner.step_count // steps, progress.legs or [[learner.world, 0]]
        progress.legs = legs
        loss: StepLoss | None = None
        for batch, bad in _counted(islice(stream, steps - learner.step_count % steps), meter):
            before, loss = loss, learner.step(batch)
            if before is not None:  # a step late, so that the GPU has work while this waits
                progress.loss_sum += before.value()
            legs[-1][1] += 1
            progress.skipped += bad
            seen += len(batch.keys) * learner.world  # images: each view of a sample counts as one
            rate = seen / (time.monotonic() - begun)
            summed = (learner.step_count - 1) % steps  # steps of this epoch whose loss is in the sum
            mean = progress.loss_sum / summed if summed else loss.value()
            if learner.rank == 0:
                post(learner.step_count, _note(config, epoch, progress, mean, rate))
            at_end = learner.step_count % steps == 0
            if not at_end and learner.step_count % config.train.checkpoint_steps == 0:
                # Raises if the loss is not finite, so that the state after a bad step is never saved.
                progress.loss_sum, loss = progress.loss_sum + loss.value(), None
                _save(checkpoints, learner, progress)
        assert loss is not None, "an epoch has at least one step left"
        mean = (progress.loss_sum + loss.value()) / steps
        progress.legs, progress.loss_sum = [], 0.0
        with meter.busy():
            ended = time.perf_counter()
            if learner.rank == 0 and _is_validated(config, epoch):
                post(learner.step_count, f"epoch {epoch + 1}/{config.train.epochs}  validating")
            _end_epoch(checkpoints, learner, validated, progress, epoch, mean)
            if learner.rank == 0:
                post(learner.step_count, _note(config, epoch, progress, mean, rate))
                tell(*_epoch_line(progress.history[-1], data, config))
            meter.count_seconds({"validate": time.perf_counter() - ended})


def _note(config: Config, epoch: int, progress: Progress, loss: float, rate: float) -> str:
    """Return what stands beside the bar: epoch, mAP of the last validation, mean loss of the epoch, images a second."""
    last = next((entry.map for entry in reversed(progress.history) if entry.map is not None), None)
    reached = f"epoch {epoch + 1}/{config.train.epochs}{'' if last is None else f'  mAP {last:.4f}'}"
    return f"{reached}  loss {loss:.4f}  {format_speed(rate)}"


def _is_validated(config: Config, epoch: int) -> bool:
    """Tell whether a validation follows this epoch, counted from 0."""
    return epoch + 1 == config.train.epochs or (epoch + 1) % config.train.val_every == 0


def _epoch_line(figures: EpochFigures, data: TrainData, config: Config) -> tuple[str, dict[str, Any]]:
    """Return an epoch's mean loss and, if it was validated, its mAP with the number of images and the mAP of chance."""
    text = f"epoch {figures.epoch}/{config.train.epochs}: loss {figures.loss:.4f}"
    fields: dict[str, Any] = {"epoch": figures.epoch, "step": figures.step, "loss": figures.loss}
    if figures.map is None:
        return text, fields
    images, chance = len(data.val_rows), validation_chance(data)
    text += f", validation mAP {figures.map:.4f} ({format_count(images, 'image')}, chance {chance:.4f})"
    return text, fields | {"map": figures.map, "val_images": images, "chance": round(chance, 6)}


def _counted(batches: Iterator[tuple[Batch, int]], meter: Meter) -> Iterator[tuple[Batch, int]]:
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
            meter.count_images(len(batch.keys))
            meter.count_rejects({"skipped": skipped})
            meter.count_seconds({"feed": arrived - begun, "step": time.perf_counter() - arrived})


def _stream(
    job: TrainJob, data: TrainData, learner: Learner, epoch: int, legs: list[list[int]]
) -> Iterator[tuple[Batch, int]]:
    """Return the batches from here on, made in a process of their own if a GPU waits for them."""
    config, device = job.config, learner.device
    done = [(workers, steps) for workers, steps in legs]
    position = Position(learner.rank, learner.world, learner.loss.views, epoch, done)
    if fits_device(data, config, device):
        held = DeviceSquares(data.samples, config.data.image_size, position.views, device)
        return held.batches(prefetch_batches(job, position, iterate_drawn))
    if device.type == "cuda":
        return prefetch_batches(job, position, iterate_batches)
    return iterate_batches(data, config, position)


def _end_epoch(
    checkpoints: Checkpoints,
    learner: Learner,
    validated: Callable[[], float],
    progress: Progress,
    epoch: int,
    loss: float,
) -> None:
    """Validate if it is due, remember the best epoch, and save after a validation or if a checkpoint is due."""
    name = checkpoints.new_name(learner.step_count)
    validates = _is_validated(learner.config, epoch)
    found = validated() if validates else None
    if found is not None and (progress.best is None or found >= progress.best.map):  # of equal ones, the later epoch
        progress.best = BestEpoch(map=found, epoch=epoch + 1, checkpoint=name)
    progress.history.append(EpochFigures(epoch=epoch + 1, step=learner.step_count, loss=loss, map=found))
    if validates or learner.step_count % learner.config.train.checkpoint_steps == 0:
        _save(checkpoints, learner, progress, name)


def _save(checkpoints: Checkpoints, learner: Learner, progress: Progress, name: str | None = None) -> None:
    if learner.rank == 0:
        step = learner.step_count
        checkpoints.save(name or checkpoints.new_name(step), step, learner.state(), progress)
    if learner.world > 1:
        dist.barrier()
