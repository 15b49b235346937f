"""Recipes: presets of the settings of a training, by name, as `--recipe NAME` or `train.recipe` takes them.

A recipe is a function that returns settings by dotted name. They stand above the defaults and below everything that the
user says. Its docstring has the command, the time and the mAP, the latter two only as far as they were measured.
"""

from collections.abc import Callable, Mapping

from pipelines.errors import ConfigError

Settings = Mapping[str, str | int | float]

_NO_CLIPPING = 1e6
"""A norm that no gradient reaches."""


def plain() -> Settings:
    """What the deep-hashing code bases do: RMSprop at one small rate, no augmentation, no schedule, no averaging.

        hhnet train --recipe plain --shards shards/train --out model --backbone resnet18

    Time: not measured. mAP: not measured.

    The network and the size of the images are yours; theirs are a pretrained AlexNet at 224 pixels. Still ours: weights
    of norms and biases do not decay, and the model is that of the best epoch on validation samples, not on the queries.
    Source: swuxyj/DeepHash-pytorch `DPSH.py`.
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
    """From random weights at 32 pixels, as CIFAR-10 has them: a small HRNet whose stem halves once.

        hhnet train --recipe scratch32 --shards shards/train --out model

    Time: not measured. mAP: not measured.
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


def scratch64() -> Settings:
    """From random weights at 64 pixels.

        hhnet train --recipe scratch64 --shards shards/train --out model

    Time: not measured. mAP: not measured.
    """
    return {**scratch32(), "data.image_size": 64}


def scratch128() -> Settings:
    """From random weights at 128 pixels, in crops of random size, with the published stem.

        hhnet train --recipe scratch128 --shards shards/train --out model

    Time: not measured. mAP: not measured.
    """
    return {**scratch32(), "data.image_size": 128, "data.augment": "resized_crop", "model.stem_stride": 4}


def finetune224() -> Settings:
    """From timm's ImageNet weights at 224 pixels, with the settings of the paper's code base.

        hhnet train --recipe finetune224 --shards shards/train --out model

    Time: not measured. mAP: not measured.

    Adam at 1e-5 for the backbone, 1e-4 for the hash layer and 1e-3 for the proxies; no augmentation, no schedule. There
    training ends after 20 epochs without a better validation mAP; here the best of all epochs is kept. Source:
    BioDeepHashing `src/models`, h2q `run_QS.sh`, for HyP2.
    """
    return {
        "data.image_size": 224,
        "data.augment": "none",
        "data.batch_size": 100,
        "model.backbone": "hrnet_w18.ms_in1k",
        "model.weights": "timm",
        "train.epochs": 100,
        "train.loss": "hyp2",
        "train.optimizer": "adam",
        "train.lr": 1e-4,
        "train.backbone_lr_scale": 0.1,
        "train.weight_decay": 5e-4,
        "train.schedule": "constant",
        "train.warmup": 0.0,
        "train.ema_decay": 0.0,
        "train.grad_clip": _NO_CLIPPING,
    }


def layerwise224() -> Settings:
    """From timm's ImageNet weights at 224 pixels, with crops, averaged weights and rates that fall towards the image.

        hhnet train --recipe layerwise224 --shards shards/train --out model

    Time: not measured. mAP: not measured.
    """
    return {
        "data.image_size": 224,
        "data.augment": "resized_crop",
        "data.batch_size": 64,
        "model.backbone": "hrnet_w18.ms_in1k",
        "model.weights": "timm",
        "train.epochs": 30,
        "train.loss": "orthohash",
        "train.lr": 1e-3,
        "train.backbone_lr_scale": 0.1,
        "train.layer_decay": 0.75,
    }


def strong() -> Settings:
    """As scratch32, three times as long, with TrivialAugment, mixup, label smoothing and a slower average.

        hhnet train --recipe strong --shards shards/train --out model

    Time: not measured. mAP: not measured.

    For losses of soft labels; with another one set train.mixup=0 and train.label_smoothing=0.
    """
    return {
        **scratch32(),
        "data.policy": "trivial",
        "train.mixup": 0.2,
        "train.label_smoothing": 0.1,
        "train.epochs": 300,
        "train.val_every": 10,
        "train.ema_decay": 0.9995,
    }


def distill128() -> Settings:
    """As scratch128, with neighbours after those of a wide HRNet with ImageNet weights.

        hhnet train --recipe distill128 --shards shards/train --out model

    Time: not measured. mAP: not measured.

    Another teacher is a timm name with its tag, or any timm name with a safetensors file as train.teacher_weights.
    """
    return {**scratch128(), "train.teacher": "hrnet_w48.ms_in1k"}


_RECIPES: dict[str, Callable[[], Settings]] = {
    recipe.__name__: recipe
    for recipe in (plain, scratch32, scratch64, scratch128, finetune224, layerwise224, strong, distill128)
}


def recipe_names() -> tuple[str, ...]:
    """Names that `recipe_settings` knows."""
    return tuple(_RECIPES)


def recipe_settings(name: str) -> Settings:
    """The settings of a recipe, by dotted name. ConfigError for an unknown one, naming those that exist."""
    if name not in _RECIPES:
        raise ConfigError(f"train.recipe = {name!r}: there is no such recipe; take one of {', '.join(_RECIPES)}")
    return _RECIPES[name]()
