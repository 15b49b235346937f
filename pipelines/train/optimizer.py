"""The optimiser, its groups of parameters, and the schedule of the learning rate."""

import math

import torch

from hhnet.nn.losses.base import HashLoss
from hhnet.nn.model import HHNet
from pipelines.config.settings import TrainSettings
from pipelines.errors import ConfigError

_MOMENTUM = 0.9


def make_optimizer(model: HHNet, loss: HashLoss, train: TrainSettings) -> torch.optim.Optimizer:
    """Make the configured optimiser for the parameters of network and loss. Each group has its peak rate as `peak`.

    Raises ConfigError if `train.layer_decay` is set and the order of the network's blocks is not known.
    """
    try:
        groups = model.param_groups(train.lr, train.weight_decay, train.backbone_lr_scale, train.layer_decay)
    except ValueError as error:
        raise ConfigError(f"train.layer_decay: {error}") from None
    own = list(loss.parameters())
    if own:
        groups.append({"name": "loss", "params": own, "lr": train.lr * loss.lr_scale, "weight_decay": 0.0})
    for group in groups:
        group["peak"] = group["lr"]
    match train.optimizer:
        case "adamw":
            return torch.optim.AdamW(groups, fused=True)
        case "adam":
            return torch.optim.Adam(groups, fused=True)
        case "rmsprop":
            return torch.optim.RMSprop(groups)
        case "sgd":
            return torch.optim.SGD(groups, momentum=_MOMENTUM, fused=True)


def rate_factor(step: int, total: int, train: TrainSettings) -> float:
    """Return the factor of the peak learning rate: a linear rise over `train.warmup` of the steps, then the schedule.

    The schedule is `constant`, or half a cosine down to 0 at step `total`.
    """
    rise = max(1, math.floor(train.warmup * total))
    if step < rise:
        return (step + 1) / rise
    if train.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, total - rise)))
