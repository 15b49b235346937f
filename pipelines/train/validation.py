"""Validation inside training: mAP of the averaged weights on samples that are neither trained on nor test queries."""

from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy

import numpy as np
import numpy.typing as npt
import torch

from hhnet import chance_map, mean_average_precision
from pipelines.config.settings import Config
from pipelines.encode.encoder import Encoder, Encoding
from pipelines.encode.feed import Fed, Shaping, thread_batches
from pipelines.shards.shards import Sample
from pipelines.train.batches import TrainData
from pipelines.train.learner import Learner, gather_rows


def validate(learner: Learner, data: TrainData, kept: list[Fed] | None = None) -> float:
    """Return the mAP of the averaged weights on the validation samples, over the whole ranking (ties by expectation).

    A fixed part of the samples are the queries; they are searched in the others only. The first validation puts its
    decoded batches into `kept` if `data.cache` has room for them; later ones with the same list decode nothing.
    """
    learner.share_average()
    config = learner.config
    # A copy, since the encoder moves its model's weights in memory, and the EMA update keeps references to them.
    average, threads = deepcopy(learner.average), torch.get_num_threads()
    encoder = Encoder(average, learner.preprocess, config.model.precision, "", threads)
    mine = range(learner.rank, len(data.val_rows), learner.world)
    if kept is not None and not kept and data.val_bytes(config, learner.world):
        kept += _val_batches(encoder, data, mine, config)
    rows = _codes(encoder, data, mine, config, kept)
    counts = [len(range(rank, len(data.val_rows), learner.world)) for rank in range(learner.world)]
    parts = [rows]
    if learner.world > 1:
        gathered = gather_rows(torch.from_numpy(rows).to(learner.device), counts)
        parts = [part.cpu().numpy() for part in gathered]
    codes = np.zeros((len(data.val_rows), rows.shape[1]), np.uint8)
    for rank, part in enumerate(parts):
        codes[rank :: learner.world] = part
    return _val_map(codes, _val_labels(data), data.queries)


def validation_map(encoder: Encoder, data: TrainData, config: Config) -> float:
    """Return the same mAP for a model that is not in training, computed in this process."""
    return _val_map(_codes(encoder, data, range(len(data.val_rows)), config), _val_labels(data), data.queries)


def validation_chance(data: TrainData) -> float:
    """Return the mAP on the validation samples of codes without information."""
    labels = _val_labels(data)
    return chance_map(labels[: data.queries], labels[data.queries :])


def _codes(
    encoder: Encoder, data: TrainData, mine: Sequence[int], config: Config, kept: Iterable[Fed] | None = None
) -> npt.NDArray[np.uint8]:
    """Encode some validation samples, uint8 (samples, 1 + bytes of a code); the first byte is 1 if there is a code."""
    batches = iter(kept or _val_batches(encoder, data, mine, config))
    encoded = Encoding(encoder, batches, config.encode.images_per_pass).finish()
    coded = zip(encoded.kept, encoded.codes, strict=True)
    where = {(sample.record.shard, sample.record.row): code for sample, code in coded}
    rows = np.zeros((len(mine), 1 + encoded.codes.shape[1]), np.uint8)
    for slot, i in enumerate(mine):
        shard, row = data.val_rows[i]
        code = where.get((data.val.shards[shard].name, row))
        if code is not None:
            rows[slot, 0] = 1
            rows[slot, 1:] = code
    return rows


def _val_batches(encoder: Encoder, data: TrainData, mine: Iterable[int], config: Config) -> Iterator[Fed]:
    """Yield the decoded batches of some validation samples."""
    places = sorted(mine, key=lambda i: data.val_rows[i])
    shaping = Shaping(encoder.preprocess, config.encode.images_per_pass, config.data.workers)
    return thread_batches(_val_samples(data, places), shaping)


def _val_samples(data: TrainData, places: Sequence[int]) -> Iterator[Sample]:
    for shard, chosen in _by_shard(data, places).items():
        yield from data.val.read(data.val.shards[shard], [data.val_rows[i][1] for i in chosen])


def _by_shard(data: TrainData, places: Iterable[int]) -> dict[int, list[int]]:
    """Group validation samples, by their place in `val_rows`, by shard."""
    found: dict[int, list[int]] = {}
    for i in places:
        found.setdefault(data.val_rows[i][0], []).append(i)
    return found


def _val_labels(data: TrainData) -> npt.NDArray[np.bool_]:
    """Return multi-hot labels, bool (V, C), of the validation samples, by the training set's class ids."""
    places = {name: number for number, name in enumerate(data.train.classes)}
    ids = [places.get(name, -1) for name in data.val.classes]  # -1: no sample has it
    labels = np.zeros((len(data.val_rows), len(data.train.classes)), np.bool_)
    for shard, chosen in _by_shard(data, range(len(labels))).items():
        column = data.val.shards[shard].table()["labels"].take([data.val_rows[i][1] for i in chosen])
        for i, own in zip(chosen, column.to_pylist(), strict=True):
            labels[i, [ids[label] for label in own]] = True
    return labels


def _val_map(codes: npt.NDArray[np.uint8], labels: npt.NDArray[np.bool_], queries: int) -> float:
    kept = codes[:, 0] == 1
    query, database = kept.copy(), kept.copy()
    query[queries:], database[:queries] = False, False
    if not query.any() or not database.any():
        return 0.0
    sides = codes[query, 1:], labels[query], codes[database, 1:], labels[database]
    return float(mean_average_precision(*sides, ties="expected"))
