"""Checks of a training's settings that need neither torch nor Ray, so that a mistake is found at once."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from hhnet.nn.backbone_rules import is_hrnet, require_backbone, require_pinned, require_sides, timm_names
from hhnet.nn.losses import require_loss
from pipelines.cluster.submit import job_address
from pipelines.config.settings import Config
from pipelines.errors import ConfigError


def check_training(config: Config) -> None:
    """Raise ConfigError for a loss, network, weight tag or image size that cannot be trained with.

    The rest, such as the options of a loss, is found by building the network and the loss.
    """
    model, train, known = config.model, config.train, timm_names()
    with _refused_as("train.loss"):
        require_loss(train.loss)
    _check_network("model.backbone", model.backbone, model.weights, model.stem_stride, config, known)
    if train.teacher is not None:
        _check_network("train.teacher", train.teacher, train.teacher_weights, 4, config, known)


def require_weights(config: Config) -> None:
    """Raise ConfigError where a file of weights does not exist on this machine, if it is this one that trains."""
    if job_address(config) is None:
        _require_file("model.weights", config.model.weights)
        _require_file("train.teacher_weights", config.train.teacher_weights if config.train.teacher else None)


def _check_network(
    setting: str, name: str, weights: str | None, stem_stride: int, config: Config, known: Collection[str]
) -> None:
    if known:  # else timm lies where its source cannot be read, and only the network itself can tell
        with _refused_as(setting):
            if name not in known and name.partition(".")[0] in known:  # its source may make tags by code: ask timm
                from hhnet.nn.backbones import check_backbone_name

                check_backbone_name(name)
            else:
                require_backbone(name, known)
            require_pinned(name, weights, known)
    with _refused_as("data.image_size"):
        require_sides(name, stem_stride, config.data.image_size, config.data.image_size, is_hrnet(name))


def _require_file(setting: str, path: str | None) -> None:
    if path not in (None, "timm") and not Path(str(path)).is_file():
        raise ConfigError(f"{setting}: weights file {path} does not exist: give a .safetensors file or 'timm'")


@contextmanager
def _refused_as(setting: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ConfigError(f"{setting}: {error}") from None
