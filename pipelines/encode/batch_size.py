"""Turns `encode.batch_size = auto` into a number, before the codes get their fingerprint.

A root that was begun keeps its number. Otherwise it is that of a CPU where the encode gets no GPU. On a GPU one worker
tries batches of black squares, each twice as large as the one before, and the largest that fits is taken.
"""

import logging
from collections.abc import Callable

from pipelines.artifacts.manifest import Artifact, read_identity
from pipelines.cluster.placement import await_need
from pipelines.cluster.ray_pool import Pool, ray_pool
from pipelines.cluster.session import ray_session
from pipelines.config.settings import CPU_BATCH_SIZE, Config
from pipelines.encode.job import plan_encode
from pipelines.errors import WorkFailed
from pipelines.shards.index import is_tar
from pipelines.storage import Store

_log = logging.getLogger(__name__)

MAX_AUTO = 4096
"""Largest batch that is tried: larger ones make no GPU faster, and their squares take gigabytes."""


def resolve_batch_size(shards: Artifact, model: Artifact, out: str, config: Config, pool: Pool = ray_pool) -> Config:
    """Return the settings with a number as `encode.batch_size`."""
    if config.encode.batch_size != "auto":
        return config
    begun = _begun_with(shards, model, out, config)
    if begun is not None:
        return begun
    return config.with_batch_size(_largest_batch(shards, model, out, config, pool) or CPU_BATCH_SIZE)


def _begun_with(shards: Artifact, model: Artifact, out: str, config: Config) -> Config | None:
    """Return the settings that the root at `out` was begun with, as far as its fingerprint tells, or None."""
    try:
        _, fingerprint = read_identity(Store(out))
    except FileNotFoundError:
        return None
    sizes = (config.with_batch_size(1 << power) for power in range(MAX_AUTO.bit_length()))
    return next((one for one in sizes if plan_encode(shards, model, out, one).fingerprint == fingerprint), None)


def _largest_batch(shards: Artifact, model: Artifact, out: str, config: Config, pool: Pool) -> int | None:
    """Return the largest power of two that fits on a GPU, or None where the encode gets none.

    A batch larger than all shards is not tried: it would never be full.
    """
    if config.encode.gpus == 0:
        return None
    with ray_session(config):
        if not await_need(config.encode, config).gpus:
            return None
        rows = max((part.rows for part in shards.manifest.parts if is_tar(part)), default=1)
        most = min(MAX_AUTO, 1 << max(0, rows - 1).bit_length())
        with pool(Store(out), config, config.encode) as map_items:
            (outcome,) = map_items(
                BatchTrial, (model.uri,), [most], verb="batch size", workers=1, stuck_s=config.encode.stuck_s
            )
    if outcome.error is not None:
        raise WorkFailed(f"encode.batch_size=auto: the trial failed ({outcome.error}): write a number")
    size = int(outcome.result)
    _log.info("encode.batch_size=auto is %d: the largest power of two that fits", size, extra={"batch_size": size})
    return size


class BatchTrial:
    """A worker that tries batch sizes on its GPU."""

    def __init__(self, model: str) -> None:
        from pipelines.encode.encoder import Encoder

        self._encoder = Encoder.open(model)

    def run(self, most: int) -> int:
        """Return the largest power of two, up to `most`, that fits."""
        return largest_power(self._encoder.fits, most)


def largest_power(fits: Callable[[int], bool], most: int) -> int:
    """Return the largest power of two, up to `most`, that fits. Raises WorkFailed if 1 does not."""
    if not fits(1):
        raise WorkFailed("not even one image fits the memory of the GPU: encode with a smaller model, or encode.gpus=0")
    size = 1
    while size * 2 <= most and fits(size * 2):
        size *= 2
    return size
