"""Batches of a GPU that holds the decoded training set: it gets each square once and cuts all later views from it.

The process that feeds it decodes, and draws what becomes of each sample with the generators that a CPU's batches use.
So the batches are the same to the bit. Random windows of an image and TrivialAugment need the CPU.

Shape suffixes: N squares that are held, n new ones, B images of a batch with all views, S side.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from hhnet.augment import cut_squares
from pipelines.config.settings import Config
from pipelines.train.batches import (
    DecodedCache,
    DecodedSample,
    Leg,
    TrainData,
    augments_of,
    blend_labels,
    blend_squares,
    decoded_steps,
    draw_shares,
    labels_and_keys,
)
from pipelines.train.learner import Batch


@dataclass(frozen=True)
class DrawnBatch:
    """One worker's part of a step, to be cut from the squares on a GPU.

    Attributes:
        new: squares that the GPU does not hold yet, uint8 (n, S, S, 3); it numbers them as they come.
        cuts: for each image the number of its square and what `Augment.draw_cut` drew, int64 (B, 4).
        shares: the share that each image keeps of itself in mixup, float32 (B,); None without mixup.
        labels, keys: as in `Batch`.
    """

    new: npt.NDArray[np.uint8]
    cuts: npt.NDArray[np.int64]
    shares: npt.NDArray[np.float32] | None
    labels: npt.NDArray[np.bool_ | np.float32]
    keys: Sequence[str]


class SentSquares(DecodedCache):
    """The samples whose squares a GPU holds or gets next. No pixels stay here once they are sent."""

    def __init__(self) -> None:
        super().__init__(0)
        self._numbered = 0
        self._unsent: list[npt.NDArray[np.uint8]] = []

    def keep(self, sample: DecodedSample) -> None:
        """Number the square of a sample, and remember it to be sent."""
        if (sample.shard, sample.row) in self._held:
            return
        if sample.pixels is not None:
            self._unsent.append(sample.pixels)
            sample = replace(sample, pixels=None, number=self._numbered)
            self._numbered += 1
        self._held[sample.shard, sample.row] = sample

    def number_of(self, sample: DecodedSample) -> int:
        """Return the number of a kept sample's square."""
        number = self._held[sample.shard, sample.row].number
        assert number is not None, "what did not decode has no square"
        return number

    def take_unsent(self, side: int) -> npt.NDArray[np.uint8]:
        """Return the squares that are to be sent, uint8 (n, S, S, 3), and forget them."""
        taken, self._unsent = self._unsent, []
        return np.stack(taken) if taken else np.zeros((0, side, side, 3), np.uint8)


def drawn_batches(leg: Leg, first: int, rank: int, views: int, sent: SentSquares) -> Iterator[tuple[DrawnBatch, int]]:
    """Yield the batches of `epoch_batches` for a GPU that holds what was `sent`. It raises what that raises."""
    config, augments = leg.config, augments_of(leg.config, views)

    def drawn(_: DecodedSample, rng: np.random.Generator) -> list[tuple[int, int, bool]]:
        return [augment.draw_cut(rng) for augment in augments]

    for good, bad in decoded_steps(leg, first, rank, sent, drawn):
        new = sent.take_unsent(config.data.image_size)
        cuts = [(sent.number_of(sample), *draw) for sample, draws in good for draw in draws]
        labels, keys = labels_and_keys(leg, [sample for sample, _ in good], views)
        shares = draw_shares(keys, config, leg.epoch)
        softened = blend_labels(labels, shares, config, views)
        yield DrawnBatch(new, np.array(cuts, np.int64), shares, softened, keys), bad


def fits_device(data: TrainData, config: Config, device: torch.device) -> bool:
    """Tell whether a GPU is to hold the decoded training set: it fits `data.cache` and half of the free memory.

    A GPU makes no random windows of images and no TrivialAugment.
    """
    if augments_of(config, 1)[0].kind == "resized_crop" or config.data.policy != "none":
        return False
    size = data.samples * 3 * config.data.image_size**2
    return size <= min(config.data.cache, free_bytes(device) // 2)


def free_bytes(device: torch.device) -> int:
    """Return the free memory of a GPU; 0 for a CPU."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0


class DeviceSquares:
    """Room on a device for the squares of up to `samples` samples."""

    def __init__(self, samples: int, side: int, views: int, device: torch.device) -> None:
        self._held_NSSC = torch.empty((samples, side, side, 3), dtype=torch.uint8, device=device)
        self._count, self._views, self._device = 0, views, device

    def batches(self, drawn: Iterable[tuple[DrawnBatch, int]]) -> Iterator[tuple[Batch, int]]:
        """Yield each batch with its squares on the device, and the number of samples that did not decode."""
        for batch, bad in drawn:
            yield self._cut(batch), bad

    def _cut(self, drawn: DrawnBatch) -> Batch:
        count = self._count + len(drawn.new)
        self._held_NSSC[self._count : count] = torch.from_numpy(drawn.new)
        self._count = count
        squares = cut_squares(self._held_NSSC, torch.from_numpy(drawn.cuts).to(self._device))
        if drawn.shares is not None:
            squares = blend_squares(squares, torch.from_numpy(drawn.shares).to(self._device), self._views)
        return Batch(squares, drawn.labels, drawn.keys)
