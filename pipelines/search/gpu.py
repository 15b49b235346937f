"""Searches one index on a GPU: its memory holds the codes of all parts and answers many queries at once."""

from collections.abc import Callable

import numpy as np
import torch

from hhnet.search.device import WORD_BYTES, DeviceCodes
from pipelines.errors import ConfigError
from pipelines.index.kinds import Codes, Neighbours
from pipelines.index.kinds.flat import FlatSearcher
from pipelines.index.reader import IndexReader


def on_gpu(reader: IndexReader, device: str = "cuda") -> Callable[[Codes, int], Neighbours]:
    """Copy the codes of a flat index to the GPU; return a function that searches them like `reader.search`.

    Raises ConfigError for another kind of index, and where there is no GPU with room for the codes.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("search.device = cuda, but torch sees no GPU here: leave it at cpu")
    parts = list(map(reader.open_part, reader.searched()))
    flat = [part for part in parts if isinstance(part, FlatSearcher)]
    if len(flat) < len(parts):
        problem = f"{reader.artifact.uri} is of kind {reader.meta.kind}"
        raise ConfigError(f"{problem}: a GPU searches kind flat, leave search.device at cpu")
    found = [part.live() for part in flat]
    try:
        codes = DeviceCodes([codes for codes, _ in found] or [np.empty((0, reader.width), np.uint8)], device)
    except torch.OutOfMemoryError:
        needed = reader.count * -(-reader.width // WORD_BYTES) * WORD_BYTES
        problem = f"{reader.artifact.uri}: its codes take {needed / 2**30:.1f} GiB, more than the GPU has free"
        raise ConfigError(f"{problem}: leave search.device at cpu") from None
    ids = np.concatenate([np.empty(0, np.int64), *(ids for _, ids in found)])

    def search(queries: Codes, k: int) -> Neighbours:
        distances, rows = codes.knn(queries, k)
        return distances, ids[rows]

    return search
