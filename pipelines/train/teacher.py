"""The teacher of a distillation: a frozen network whose features tell which images are close to each other."""

from dataclasses import replace

import torch
from torch import Tensor

from hhnet.nn.backbones import Backbone
from hhnet.nn.model import Preprocess
from pipelines.config.settings import Config
from pipelines.encode.encoder import autocast
from pipelines.errors import ConfigError


class Teacher:
    """The network of `train.teacher`. It gets the learner's images, normalised as in its own training."""

    def __init__(self, config: Config, preprocess: Preprocess, device: torch.device) -> None:
        """Load the network. Raises ConfigError for an unknown name or weights, or an image size that it cannot take."""
        train = config.train
        assert train.teacher is not None
        try:
            network = Backbone(train.teacher, weights=train.teacher_weights)
        except (ValueError, FileNotFoundError) as error:
            raise ConfigError(f"train.teacher: {error}") from None
        self._network = network.eval().requires_grad_(False).to(device).to(memory_format=torch.channels_last)
        self._device, self._precision = device, config.model.precision
        trained = getattr(network.net, "pretrained_cfg", {})
        mean, std = trained.get("mean", preprocess.mean), trained.get("std", preprocess.std)
        self._preprocess = replace(preprocess, mean=mean, std=std)
        try:  # once at the start, so that a bad image size is found before any work
            self.features(torch.zeros(1, preprocess.size, preprocess.size, 3, dtype=torch.uint8, device=device))
        except ValueError as error:
            raise ConfigError(f"train.teacher: {error}") from None

    def features(self, squares: Tensor) -> Tensor:
        """Return the features, float32 (b, D), of uint8 squares (b, S, S, 3)."""
        with torch.no_grad(), autocast(self._device, self._precision):
            features: Tensor = self._network(self._preprocess.normalise(squares))
        return features.float()
