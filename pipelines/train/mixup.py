"""Mixup and label smoothing: batches whose labels lie between 0 and 1."""

import numpy as np

from hhnet.augment import sample_rng
from pipelines.config.settings import Config
from pipelines.train.learner import Batch


def soften_labels(batch: Batch, config: Config, epoch: int, views: int) -> Batch:
    """Return the batch after `train.mixup` and `train.label_smoothing`, with float32 labels.

    Mixup (Zhang et al. 2018) blends each sample with the next one of the batch, and the last with the first. The share
    of the sample itself is drawn from Beta(alpha, alpha) by a generator seeded with its key, like its augmentation. All
    views of a sample are blended with the same share, each with the same view of the other sample.

    Label smoothing spreads a share of a sample's labels evenly over all classes (Szegedy et al. 2016).
    """
    alpha, smoothing = config.train.mixup, config.train.label_smoothing
    squares, labels = batch.squares, batch.labels.astype(np.float32)
    if alpha:
        rngs = [sample_rng(config.train.seed, epoch, f"{key}\0mixup") for key in batch.keys]
        kept = np.array([rng.beta(alpha, alpha) for rng in rngs], np.float32)[:, None]
        labels = kept * labels + (1 - kept) * np.roll(labels, -views, 0)
        share = kept[:, :, None, None]
        squares = np.rint(share * squares + (1 - share) * np.roll(squares, -views, 0)).astype(np.uint8)
    labels = (1 - smoothing) * labels + smoothing * labels.sum(1, keepdims=True) / labels.shape[1]
    return Batch(squares, labels, batch.keys)
