"""Turns a model and images into packed codes: the forward pass of every verb, with decoding beside it.

Shape suffixes: B images, S side of the network's input, K bits.
"""

import logging
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from hhnet.codes import pack_bits, sign_bits
from hhnet.nn.folding import fold_norms
from hhnet.nn.model import HHNet, Preprocess, model_from_bytes
from hhnet.real_codes import quantise_real_codes
from pipelines.artifacts.facts import ModelCard
from pipelines.artifacts.manifest import Artifact, open_artifact
from pipelines.encode.decoder import Squares
from pipelines.encode.feed import Fed
from pipelines.errors import DamagedArtifact, WorkFailed
from pipelines.shards.containers.limits import ImageReject
from pipelines.shards.images import decode_square
from pipelines.shards.shards import Record, Sample

_log = logging.getLogger(__name__)

Coded = tuple[npt.NDArray[np.uint8], npt.NDArray[np.int8] | None]
"""The codes of a batch, uint8 (B, ceil(K/8)), and its real codes, int8 (B, K), if they were asked for."""


@dataclass
class Encoded:
    """The encoding of one shard: codes (N, ceil(K/8)) and rejects; real codes (N, K) if asked for.

    Kept samples are in row order. `animated` counts the kept samples with several frames; only the first is encoded.
    """

    codes: npt.NDArray[np.uint8]
    real_codes: npt.NDArray[np.int8]
    kept: list[Sample] = field(default_factory=list)
    rejects: list[tuple[Record, ImageReject]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    animated: int = 0


class Encoder:
    """A model ready to encode, on the GPU if there is one.

    On a CPU it uses one thread unless told otherwise: more workers use more cores, and codes do not depend on their
    number.
    """

    def __init__(self, model: HHNet, preprocess: Preprocess, precision: str, digest: str, threads: int = 1) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        # Weights in the memory order of the images that `normalise` returns: convolutions need no conversion.
        self.model = model.eval().to(self.device).to(memory_format=torch.channels_last)
        self._folded = fold_norms(self.model).to(memory_format=torch.channels_last)
        if precision == "bf16":
            for module in self._folded.modules():
                if isinstance(module, nn.Conv2d | nn.Linear):
                    module.to(torch.bfloat16)  # autocast would convert the weights again for each batch
        self.preprocess, self.precision, self.digest, self.threads = preprocess, precision, digest, threads
        self._copies: torch.cuda.Stream | None = None
        """The stream of a GPU on which squares are copied beside the forward pass."""

    @classmethod
    def open(cls, source: str | Artifact) -> "Encoder":
        """Load a model artifact; every byte is checked against its digest before it is parsed."""
        artifact = open_artifact(source, "model") if isinstance(source, str) else source
        card = ModelCard.of(artifact)
        weights = artifact.read(artifact.manifest.part("model.safetensors"))
        try:
            model, preprocess = model_from_bytes(weights, card.as_json())
        except ValueError as error:
            raise DamagedArtifact(f"{artifact.uri} is not a usable model: {error}") from error
        return cls(model, preprocess, card.precision, artifact.digest)

    @property
    def bits(self) -> int:
        """Length of a code in bits, K."""
        return self.model.bits

    def real_codes(self, images: Sequence[bytes]) -> npt.NDArray[np.float32]:
        """Return the real codes of images, float32 (N, K); raise ImageReject for the first that does not decode."""
        return self.outputs([decode_square(data, self.preprocess)[0] for data in images])

    def begin(self, squares: Squares, batch_size: int, real_codes: bool) -> Callable[[], Coded]:
        """Begin the forward pass of a batch; the function that is returned waits for it and returns its codes.

        On a GPU the pass goes on meanwhile. A batch with fewer than `batch_size` squares is filled up there, so that
        all passes have the same shape. Raises WorkFailed if the batch does not fit the GPU's memory.
        """
        try:
            if self.device.type == "cuda":
                return self._begin_on_gpu(squares, batch_size, real_codes)
            z_BK = self.outputs(squares)
        except torch.OutOfMemoryError:
            side = self.preprocess.size
            raise WorkFailed(
                f"a batch of {batch_size} images of {side} x {side} pixels does not fit the memory of the GPU: "
                "lower encode.batch_size, or set it to auto"
            ) from None
        coded = pack_bits(sign_bits(z_BK)), quantise_real_codes(z_BK) if real_codes else None
        return lambda: coded

    def fits(self, batch_size: int) -> bool:
        """Tell whether batches of this size fit the memory, two at a time as an encode has them."""
        side = self.preprocess.size
        squares = np.zeros((batch_size, side, side, 3), np.uint8)
        fitted = True
        try:
            for wait in [self.begin(squares, batch_size, real_codes=True) for _ in range(2)]:
                wait()
        except WorkFailed:
            fitted = False
        # Only now: while the error was handled, it kept the tensors that did fit.
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return fitted

    def _begin_on_gpu(self, squares: Squares, batch_size: int, real_codes: bool) -> Callable[[], Coded]:
        rows, compute = len(squares), torch.cuda.current_stream()
        if self._copies is None:
            self._copies = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._copies):
            batch = torch.zeros((batch_size, *squares.shape[1:]), dtype=torch.uint8, device=self.device)
            batch[:rows].copy_(torch.from_numpy(squares), non_blocking=True)
        compute.wait_stream(self._copies)
        batch.record_stream(compute)  # its memory is not used again before the pass has read it
        with torch.inference_mode(), autocast(self.device, self.precision):
            z_BK = self._folded(self.preprocess.normalise(batch))[:rows].float()
            packed = _fetch(pack_on_device(z_BK))
            reals = _fetch(z_BK) if real_codes else None
        done = compute.record_event()

        def wait() -> Coded:
            done.synchronize()
            codes_and_nan = packed.numpy()
            if codes_and_nan[:, -1].any():
                sign_bits([[np.nan]])  # raises, as on a CPU
            codes = np.ascontiguousarray(codes_and_nan[:, :-1])
            return codes, None if reals is None else quantise_real_codes(reals.numpy())

        return wait

    def outputs(
        self, squares: Squares | Sequence[Squares], network: nn.Module | None = None
    ) -> npt.NDArray[np.float32]:
        """Run the model, or its part `network`, on squares, each uint8 (S, S, 3); return its outputs as float32."""
        batch = torch.from_numpy(np.asarray(squares)).to(self.device)
        threads = nullcontext() if self.device.type == "cuda" else _threads(self.threads)
        with torch.inference_mode(), autocast(self.device, self.precision), threads:
            z_BK = (network or self._folded)(self.preprocess.normalise(batch))
        reals: npt.NDArray[np.float32] = z_BK.float().cpu().numpy()
        return reals


class Encoding:
    """The encoding of one shard, from its batches: step by step, or to its end."""

    def __init__(self, encoder: Encoder, batches: Iterator[Fed], batch_size: int, real_codes: bool = False) -> None:
        self._encoder, self._batches = encoder, batches
        self._batch_size, self._real_codes = batch_size, real_codes
        self._codes = [np.zeros((0, (encoder.bits + 7) // 8), np.uint8)]
        self._quantised = [np.zeros((0, encoder.bits), np.int8)]
        self._clock = dict.fromkeys(("read", "decode", "forward"), 0.0)
        self._encoded = Encoded(self._codes[0], self._quantised[0], seconds=self._clock)
        self._begun: tuple[Callable[[], Coded], Fed] | None = None

    def step(self) -> bool:
        """Begin the next batch, then take the codes of the one before; return False where no batch is left to begin.

        So a GPU has the next batch to work on while this process takes the codes.
        """
        try:
            fed = next(self._batches, None)
            if fed is None:
                return False
            self._note(fed)
            if len(fed.squares):
                started = time.perf_counter()
                begun = self._encoder.begin(fed.squares, self._batch_size, self._real_codes), fed
                before, self._begun = self._begun, begun
                self._take(before)
                self._clock["forward"] += time.perf_counter() - started
        except BaseException:
            self.close()
            raise
        return True

    def finish(
        self, advance: Callable[[], None] = lambda: None, meanwhile: Callable[[], None] = lambda: None
    ) -> Encoded:
        """Encode to the end of the shard; call `advance` after each batch, and `meanwhile` while the last one runs."""
        while self.step():
            advance()
        try:
            meanwhile()
            started = time.perf_counter()
            last, self._begun = self._begun, None
            self._take(last)
            self._clock["forward"] += time.perf_counter() - started
        except BaseException:
            self.close()
            raise
        encoded = self._encoded
        encoded.codes, encoded.real_codes = np.concatenate(self._codes), np.concatenate(self._quantised)
        return encoded

    def close(self) -> None:
        """Let go of the shard before its end."""
        if self._begun is not None:
            with suppress(ValueError):  # not a number: nobody wants the codes any more
                self._begun[0]()
            self._begun[1].free()
            self._begun = None
        if isinstance(self._batches, Generator):
            self._batches.close()

    def _note(self, fed: Fed) -> None:
        encoded = self._encoded
        encoded.kept += fed.kept
        encoded.rejects += fed.rejects
        encoded.animated += fed.animated
        for name, seconds in fed.seconds.items():
            self._clock[name] += seconds

    def _take(self, begun: tuple[Callable[[], Coded], Fed] | None) -> None:
        """Wait for the codes of a batch that was begun, if there is one."""
        if begun is None:
            return
        wait, fed = begun
        try:
            codes, quantised = wait()
        finally:
            fed.free()
        self._codes.append(codes)
        if quantised is not None:
            self._quantised.append(quantised)


def pack_on_device(z_BK: Tensor) -> Tensor:
    """Pack the signs of outputs on their device, as `pack_bits` does: uint8 (B, ceil(K/8) + 1).

    The last byte of a row is 1 if one of its outputs is not a number.
    """
    signs_BK = torch.nn.functional.pad(z_BK > 0, (0, -z_BK.shape[1] % 8))
    weights = 2 ** torch.arange(8, device=z_BK.device)
    codes = (signs_BK.reshape(len(z_BK), -1, 8) * weights).sum(2).to(torch.uint8)
    return torch.cat([codes, z_BK.isnan().any(1, keepdim=True).to(torch.uint8)], 1)


def _fetch(values: Tensor) -> Tensor:
    """Begin to copy a GPU's values to this process's memory."""
    held = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    return held.copy_(values, non_blocking=True)


def pin(array: Squares) -> None:
    """Pin the memory of an array, so that a GPU copies from it without waiting; where that fails, copies just wait."""
    status = torch.cuda.cudart().cudaHostRegister(array.ctypes.data, array.nbytes, 0)  # type: ignore[no-untyped-call]
    if int(status):
        _log.info("the memory of %d bytes of decoded images is not pinned: CUDA error %d", array.nbytes, int(status))


@contextmanager
def _threads(number: int) -> Iterator[None]:
    """Let torch use `number` threads of this process inside the context."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """Return the context that runs a network at `precision` (`fp32` or `bf16`)."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()
