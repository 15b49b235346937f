"""Every loss teaches a linear hash layer to retrieve the classes of unseen samples."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hhnet import mean_average_precision, pack_bits
from hhnet.nn.heads import make_head
from hhnet.nn.losses import loss_names, make_loss

BITS, CLASSES, FEATURES = 32, 10, 48
STEPS, BATCH = 60, 64


def samples(count: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Features around a mean of their class, which differ more within a class than between classes; labels (N, C)."""
    means = np.random.default_rng(7).normal(size=(CLASSES, 12))
    ids = rng.integers(0, CLASSES, count)
    noise = rng.normal(size=(count, FEATURES)) * np.r_[np.full(12, 0.5), np.full(FEATURES - 12, 2.0)]
    features = noise + np.pad(means, ((0, 0), (0, FEATURES - 12)))[ids]
    return torch.from_numpy(features).float(), torch.eye(CLASSES)[torch.from_numpy(ids)]


def retrieval(head: torch.nn.Module) -> float:
    """mAP of the codes of unseen queries among unseen others."""
    features, labels = samples(600, np.random.default_rng(99))
    with torch.inference_mode():
        codes = pack_bits(head.eval()(features).numpy() > 0)
    multi_hot: Any = labels.numpy() > 0
    return float(mean_average_precision(codes[:200], multi_hot[:200], codes[200:], multi_hot[200:]))


@pytest.mark.parametrize("name", loss_names())
def test_a_hash_layer_learns(name: str) -> None:
    torch.manual_seed(0)
    loss = make_loss(name, BITS, CLASSES)
    head = make_head(loss.default_head, FEATURES, BITS)
    before = retrieval(head)
    groups = [{"params": head.parameters()}, {"params": loss.parameters(), "lr": 0.01 * loss.lr_scale}]
    optimiser, rng = torch.optim.AdamW(groups, lr=0.01), np.random.default_rng(1)
    head.train()
    for step in range(STEPS):
        features, labels = samples(BATCH, rng)
        views = [features + 0.3 * view * torch.randn_like(features) for view in range(loss.views)]
        rows = torch.stack(views, dim=1).flatten(0, 1)
        keys = [f"{step}/{place}" for place in range(BATCH) for _ in range(loss.views)]
        optimiser.zero_grad()
        loss(head(rows), labels.repeat_interleave(loss.views, 0), keys).backward()
        optimiser.step()
    assert before < 0.2 and retrieval(head) > 0.4  # chance is 0.1
