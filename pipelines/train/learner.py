"""The optimiser step of HHNet, and the state that a checkpoint must hold to repeat it bit for bit.

The loss sees the gathered batch of all workers. Each worker back-propagates through its own images only;
DistributedDataParallel averages the gradients, so they are scaled by the number of workers first. The loss's own
parameters get their whole gradient on every worker.

Shape suffixes: B images of the global batch, b images of this worker, S side, K bits, C classes.
"""

import hashlib
import math
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hhnet.nn.distillation import neighbour_divergence
from hhnet.nn.losses import make_loss
from hhnet.nn.model import HHNet, Preprocess
from pipelines.config.settings import Config
from pipelines.encode.encoder import autocast
from pipelines.errors import ConfigError, DamagedArtifact, WorkFailed
from pipelines.train.optimizer import make_optimizer, rate_factor
from pipelines.train.teacher import Teacher

KEY_BYTES = 16
"""Length of the digests that stand for sample keys between workers, in bytes."""
KEYS_SHOWN = 3
"""Number of sample keys that the error of a bad loss shows."""


@dataclass(frozen=True)
class Batch:
    """One worker's part of a step: uint8 squares (b, S, S, 3), multi-hot or soft labels (b, C), keys.

    If the loss compares several views of a sample, each view is an image of its own, and they stand side by side.
    """

    squares: npt.NDArray[np.uint8] | Tensor
    labels: npt.NDArray[np.bool_ | np.float32]
    keys: Sequence[str]


class StepLoss:
    """The loss of the global batch of a step, which a GPU may still be computing."""

    def __init__(self, loss: Tensor, step: int, rate: float, keys: Sequence[str]) -> None:
        self._step, self._rate, self._keys = step, rate, keys
        self._value, self._copied = loss.detach(), None
        if loss.is_cuda:  # an own copy with an event: reading the tensor itself would wait for all work queued since
            self._value = torch.empty((), pin_memory=True).copy_(self._value, non_blocking=True)
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()

    def value(self) -> float:
        """Wait for the loss and return it. Raises WorkFailed if it is not finite."""
        if self._copied is not None:
            self._copied.synchronize()
        value = float(self._value)
        if not math.isfinite(value):
            shown = ", ".join(self._keys[:KEYS_SHOWN])
            problem = f"the loss became {value} at step {self._step}, where the learning rate was {self._rate:.3g}"
            remedy = f"lower train.lr, or look at the {len(self._keys)} images of the batch ({shown}, ...)"
            raise WorkFailed(f"{problem}: {remedy}; what was saved before is good")
        return value


class Learner:
    """Network, loss, optimiser and averaged weights of one training worker."""

    def __init__(self, config: Config, classes: int, total_steps: int, preprocess: Preprocess) -> None:
        self.config, self.total_steps, self.preprocess = config, total_steps, preprocess
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        gpu = torch.cuda.is_available()
        self.device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
        # Every worker draws the same first weights, of the loss too.
        torch.manual_seed(config.train.seed)
        self.loss = make_training_loss(config, classes).to(self.device)
        self.model = make_network(config, self.loss.default_head).to(self.device).to(memory_format=torch.channels_last)
        self.average = deepcopy(self.model).eval().requires_grad_(False)
        self._real, self._counts = _pairs(self.average, self.model)
        self.optimizer = make_optimizer(self.model, self.loss, config.train)
        self.teacher = Teacher(config, preprocess, self.device) if config.train.teacher else None
        self.step_count = 0
        self._network = self._distribute()

    def _distribute(self) -> nn.Module:
        if self.world == 1:
            return self.model
        network = DistributedDataParallel(self.model, device_ids=[self.device] if self.device.type == "cuda" else None)
        # DDP sorts its buckets anew after the first backward pass, which changes the order of its sums. With that pass
        # done before any real step, a resumed run adds in the same order as an unbroken one. The state is put back,
        # since these passes change the running statistics.
        state = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        side = self.config.data.image_size
        for _ in range(2):
            network(torch.zeros(2, 3, side, side, device=self.device)).sum().backward()
        self.model.load_state_dict(state)
        self.model.zero_grad(set_to_none=True)
        return network

    def step(self, batch: Batch) -> StepLoss:
        """Take one optimiser step with this batch, and return its loss."""
        self._set_rates()
        self._network.train()
        self.loss.train()
        squares_b = torch.as_tensor(batch.squares).to(self.device, non_blocking=True)
        # No part has a single image: batch normalisation needs two.
        parts = squares_b.tensor_split(max(1, min(self.config.train.accumulate, len(squares_b) // 2)))
        z_bK = self._forward(self._network, parts[0], 0) if len(parts) == 1 else self._codes_of(parts)
        z_BK, labels_BC, keys = self._gather(z_bK, batch)
        loss = self.loss(z_BK, labels_BC, keys)
        if self.teacher is not None:
            f_bD = torch.cat([self.teacher.features(part) for part in parts])
            f_BD = f_bD if self.world == 1 else torch.cat(gather_rows(f_bD, self._sizes(len(f_bD))))
            loss = loss + self.config.train.distillation * neighbour_divergence(z_BK, f_BD)
        result = StepLoss(loss, self.step_count, self.optimizer.param_groups[0]["lr"], batch.keys)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if len(parts) > 1:
            self._pass_on(parts, cast(Tensor, z_bK.grad))
        if self.world > 1:
            for parameter in self.loss.parameters():
                # None on all workers or on none, since each computes the loss of the whole batch. Worker 0's gradient
                # is sent to all, so that rounding cannot let the parameters drift apart.
                if parameter.grad is not None:
                    dist.broadcast(parameter.grad, 0)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.train.grad_clip)
        self.optimizer.step()
        self.step_count += 1
        self._update_average()
        return result

    def _forward(self, network: nn.Module, squares: Tensor, part: int) -> Tensor:
        """Return the real codes of a part of this worker's images, in training mode."""
        # Dropout is the only user of this generator. Seeded by step and part, its state follows from the position in
        # the training: a checkpoint need not hold it, and both passes of a part drop the same.
        place = (self.config.train.seed, self.step_count, self.rank, part)
        torch.manual_seed(int(np.random.SeedSequence(place).generate_state(1)[0]))
        with autocast(self.device, self.config.model.precision):
            z: Tensor = network(self.preprocess.normalise(squares).contiguous(memory_format=torch.channels_last))
        return z.float()

    def _codes_of(self, parts: Sequence[Tensor]) -> Tensor:
        """Return the real codes of all parts as a leaf tensor, which collects the loss's gradient.

        A loss compares all samples of a batch, so it needs the codes of all parts before the first can be learned
        from. Once the gradient at the codes is known, each part goes through the network again (Gao et al. 2021,
        GradCache).
        """
        buffers = list(self.model.buffers())
        kept = [buffer.clone() for buffer in buffers]
        with torch.no_grad():
            z_bK = torch.cat([self._forward(self.model, part, place) for place, part in enumerate(parts)])
            # Undo the update of running statistics: the second pass makes it, and must not make it twice.
            for buffer, before in zip(buffers, kept, strict=True):
                buffer.copy_(before)
        return z_bK.requires_grad_()

    def _pass_on(self, parts: Sequence[Tensor], gradient_bK: Tensor) -> None:
        """Back-propagate the gradient at the codes part by part; the last part averages gradients over the workers."""
        network = self._network
        waiting = network.no_sync if isinstance(network, DistributedDataParallel) else nullcontext
        for place, (part, gradient) in enumerate(zip(parts, gradient_bK.tensor_split(len(parts)), strict=True)):
            with waiting() if place < len(parts) - 1 else nullcontext():
                torch.autograd.backward(self._forward(network, part, place), gradient)

    def _set_rates(self) -> None:
        factor = rate_factor(self.step_count, self.total_steps, self.config.train)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor

    def _gather(self, z_bK: Tensor, batch: Batch) -> tuple[Tensor, Tensor, list[str]]:
        """Return real codes, labels and keys of all workers, in rank order; only this worker's codes carry gradient."""
        labels_bC = torch.from_numpy(batch.labels).to(self.device, torch.float32, non_blocking=True)
        # Digests, since gathered tensors need keys of one length; with one worker too, so that the loss's keys agree.
        digests = [hashlib.blake2b(key.encode(), digest_size=KEY_BYTES).digest() for key in batch.keys]
        if self.world == 1:
            return z_bK, labels_bC, [digest.hex() for digest in digests]
        if z_bK.requires_grad:  # times the workers, since DDP divides by them when it averages
            z_bK.register_hook(lambda gradient: gradient * self.world)  # type: ignore[no-untyped-call]
        counts = self._sizes(len(z_bK))
        # A copy, since torch warns of memory that it must not write.
        key_b = torch.from_numpy(np.frombuffer(b"".join(digests), np.uint8).reshape(-1, KEY_BYTES).copy())
        z_parts = gather_rows(z_bK.detach(), counts)
        # What arrives from others has no graph; this worker's own codes are put back with theirs.
        z_parts[self.rank] = z_bK
        labels = torch.cat(gather_rows(labels_bC, counts))
        keys = torch.cat(gather_rows(key_b.to(self.device), counts)).cpu().numpy()
        return torch.cat(z_parts), labels, [row.tobytes().hex() for row in keys]

    def _sizes(self, mine: int) -> list[int]:
        """Gather the number of images of each worker in this step; `mine` is this worker's."""
        sizes = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.world)]
        dist.all_gather(sizes, torch.tensor([mine], device=self.device))
        return [int(size) for size in sizes]

    def _update_average(self) -> None:
        """Update the EMA with decay min(d, (1+t)/(10+t)), buffers included. Only worker 0 keeps one."""
        if self.rank != 0:
            return
        decay = min(self.config.train.ema_decay, (1 + self.step_count) / (10 + self.step_count))
        torch._foreach_lerp_(*self._real, 1 - decay)
        if self._counts[0]:
            torch._foreach_copy_(*self._counts)

    def share_average(self) -> None:
        """Give every worker the averaged weights of worker 0."""
        if self.world > 1:
            for tensor in self.average.state_dict().values():
                dist.broadcast(tensor, 0)

    def state(self) -> dict[str, Tensor]:
        """Return all tensors that a checkpoint must hold, by name, on the CPU."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        tensors |= {f"average.{name}": tensor for name, tensor in self.average.state_dict().items()}
        tensors |= {f"loss.{name}": tensor for name, tensor in self.loss.state_dict().items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in moments.items()}
        return {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}

    def load_state(self, tensors: dict[str, Tensor], step_count: int) -> None:
        """Restore the tensors that `state` returned at `step_count`. Raises DamagedArtifact if they do not fit."""
        try:
            self.model.load_state_dict(_below("model.", tensors))
            self.average.load_state_dict(_below("average.", tensors))
            self.loss.load_state_dict(_below("loss.", tensors))
            self._load_moments(_below("optimizer.", tensors))
        except (RuntimeError, KeyError, ValueError, IndexError) as error:
            raise DamagedArtifact(f"the checkpoint does not fit this network: {error}") from error
        self.step_count = step_count

    def _load_moments(self, tensors: dict[str, Tensor]) -> None:
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            index, key = name.split(".", 1)
            if tensor.ndim:
                # The fused kernel walks parameter and moments in memory order: both must be laid out alike.
                tensor = torch.empty_like(parameters[int(index)]).copy_(tensor)
            moments.setdefault(int(index), {})[key] = tensor
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})


def _pairs(average: nn.Module, model: nn.Module) -> tuple[tuple[list[Tensor], list[Tensor]], ...]:
    """Pair the tensors of both networks: first the floating-point ones, then the integer ones (counts)."""
    pairs = list(zip(average.state_dict().values(), model.state_dict().values(), strict=True))
    kinds = ([pair for pair in pairs if pair[0].is_floating_point() is real] for real in (True, False))
    return tuple(([mine for mine, _ in kind], [theirs for _, theirs in kind]) for kind in kinds)


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def make_training_loss(config: Config, classes: int) -> Any:
    """Make the configured loss, without warnings, since each process makes one. Raises ConfigError for bad settings."""
    try:
        with warnings.catch_warnings(action="ignore"):
            loss = make_loss(config.train.loss, config.model.bits, classes, **config.train.loss_options)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"train.loss: {error}") from None
    for name in ("mixup", "label_smoothing"):
        if getattr(config.train, name) and not loss.soft_labels:
            remedy = f"set train.{name}=0, or a loss that does (docs/losses.md)"
            raise ConfigError(f"train.{name}: loss {config.train.loss} takes no soft labels: {remedy}")
    return loss


def make_network(config: Config, default_head: str) -> HHNet:
    """Make the configured network. Raises ConfigError for a name, head or weights that do not exist."""
    model = config.model
    try:
        head = default_head if model.head == "auto" else model.head
        shape = model.model_dump(include={"stem_stride", "weights", "branches"})
        return HHNet(model.backbone, model.bits, head=head, **shape)
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError(f"model: {error}") from None


def gather_rows(rows: Tensor, counts: Sequence[int]) -> list[Tensor]:
    """Return the rows (counts[r], ...) of each worker r, in rank order, on every worker."""
    # Padded to one length: all_gather takes tensors of one shape only.
    padded = rows.new_zeros((max(counts), *rows.shape[1:]))
    padded[: len(rows)] = rows
    gathered = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(gathered, padded)
    return [part[:count] for part, count in zip(gathered, counts, strict=True)]
