"""Feeds the network: samples are read and decoded in threads beside the forward pass."""

import time
from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt

from hhnet.nn.model import Preprocess
from pipelines.artifacts.tables import Reason
from pipelines.shards.containers.limits import ImageReject
from pipelines.shards.images import decode_picture
from pipelines.shards.shards import Sample


def time_reads(samples: Iterable[Sample], clock: dict[str, float]) -> Iterator[Sample]:
    """Pass the samples on, and add the seconds spent on reading them to `clock["read"]`."""
    iterator = iter(samples)
    while True:
        begun = time.perf_counter()
        sample = next(iterator, None)
        clock["read"] += time.perf_counter() - begun
        if sample is None:
            return
        yield sample


def decode_square(
    preprocess: Preprocess, sample: Sample
) -> tuple[Sample, npt.NDArray[np.uint8] | ImageReject, bool, float]:
    """Return the sample without its bytes, its square or the reject, whether it is animated, and the seconds taken."""
    begun = time.perf_counter()
    square: npt.NDArray[np.uint8] | ImageReject
    animated = False
    if sample.damage is not None:
        square = ImageReject(Reason.DAMAGED, sample.damage)
    else:
        try:
            decoded = decode_picture(sample.image)
            square, animated = preprocess.resize_crop(decoded.pixels), decoded.animated
        except ImageReject as reject:
            square = reject
    # The bytes are not needed after decoding; keeping them until the shard ends would hold the whole shard in memory.
    return Sample(sample.record, b"", sample.metadata), square, animated, time.perf_counter() - begun
