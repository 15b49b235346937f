"""Recipes: presets of the settings of a training, by name, as `--recipe NAME` or `train.recipe` takes them.

A recipe is a function that returns settings by dotted name. They override the defaults and are overridden by all
settings of the user. Its docstring has the command and a mAP from docs/results.md: a preset without a figure is not
kept.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from pipelines.errors import ConfigError

if TYPE_CHECKING:
    from pipelines.config.settings import Config

Settings = Mapping[str, str | int | float]

AUTO = "auto"
"""Name of the recipe that leaves settings open: `pipelines.train.fit` chooses them by the images and the CPUs."""

FITTED = ("data.image_size", "data.batch_size", "train.epochs")
"""Those settings."""

_NO_CLIPPING = 1e6
"""Largest norm of the gradient, so high that no gradient reaches it."""


def auto() -> Settings:
    """Return settings for minutes on a CPU; `train` chooses the image size, the batch and the epochs for the images.

        hhnet train --recipe auto --shards shards/train --out model

    mAP of Fashion-MNIST on two CPUs, where it gives the settings of `hhnet demo`: 0.7899 (docs/results.md).
    """
    return {
        "data.augment": "flip",
        "model.backbone": "hrnet_w18_small",
        "train.loss": "orthohash",
        "train.lr": 5e-3,
        "train.warmup": 0.1,
        "train.val_share": 0.4,
        "train.val_limit": 2400,
    }


def plain() -> Settings:
    """Return the settings of most deep-hashing code: one small RMSprop rate, no augmentation, schedule or averaging.

        hhnet train --recipe plain --shards shards/train --out model --backbone resnet18

    mAP of CIFAR-10 at 8 epochs: 0.2223 with ResNet-18, 0.1445 with HHNet-W18-small (docs/results.md).

    The network and the image size are yours; that code uses a pretrained AlexNet at 224 pixels. Two differences stay:
    weights of norms and biases do not decay, and the model comes from the best epoch on validation samples instead of
    on the queries. Source: swuxyj/DeepHash-pytorch `DPSH.py`.
    """
    return {
        "data.augment": "none",
        "data.batch_size": 64,
        "train.epochs": 150,
        "train.val_every": 15,
        "train.loss": "dpsh",
        "train.optimizer": "rmsprop",
        "train.lr": 1e-5,
        "train.weight_decay": 1e-5,
        "train.schedule": "constant",
        "train.warmup": 0.0,
        "train.ema_decay": 0.0,
        "train.grad_clip": _NO_CLIPPING,
    }


def scratch32() -> Settings:
    """Return settings for random weights at 32 pixels, as in CIFAR-10: a small HRNet whose stem halves once.

        hhnet train --recipe scratch32 --shards shards/train --out model

    mAP of CIFAR-10 at 8 epochs, with a stem of stride 4: 0.2700, with ResNet-18 0.3135 (docs/results.md).
    """
    return {
        "data.image_size": 32,
        "data.augment": "crop_flip",
        "data.batch_size": 128,
        "model.backbone": "hrnet_w18_small",
        "model.stem_stride": 2,
        "train.epochs": 100,
        "train.val_every": 5,
        "train.loss": "orthohash",
        "train.lr": 1e-3,
    }


_RECIPES: dict[str, Callable[[], Settings]] = {recipe.__name__: recipe for recipe in (auto, plain, scratch32)}


def recipe_names() -> tuple[str, ...]:
    """Return the names that `recipe_settings` knows."""
    return tuple(_RECIPES)


def recipe_settings(name: str) -> Settings:
    """Return the settings of a recipe, by dotted name; raise ConfigError with the known names for an unknown one."""
    if name not in _RECIPES:
        raise ConfigError(f"train.recipe = {name!r}: there is no such recipe; take one of {', '.join(_RECIPES)}")
    return _RECIPES[name]()


def left_open(config: "Config") -> list[str]:
    """Return the settings that the recipe `auto` of a configuration still has to choose, by dotted name."""
    if config.train.recipe != AUTO:
        return []
    pairs = (name.split(".") for name in FITTED)
    return [f"{section}.{key}" for section, key in pairs if key not in getattr(config, section).model_fields_set]
