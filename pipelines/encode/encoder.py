"""Turns a model and images into packed codes: the forward pass of every verb, with decoding beside it.

Shape suffixes: B images, S side of the network's input, K bits.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from hhnet.codes import pack_bits, sign_bits
from hhnet.nn.model import HHNet, Preprocess, model_from_bytes
from hhnet.real_codes import quantise_real_codes
from pipelines.artifacts.facts import ModelCard
from pipelines.artifacts.manifest import Artifact, open_artifact
from pipelines.artifacts.tables import Reason
from pipelines.errors import DamagedArtifact
from pipelines.shards.containers.limits import ImageReject
from pipelines.shards.images import decode_ahead, decode_square
from pipelines.shards.shards import Record, Sample


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
        self.preprocess, self.precision, self.digest, self.threads = preprocess, precision, digest, threads

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
        squares = [decode_square(data, self.preprocess)[0] for data in images]
        return self.outputs(squares)

    def encode_samples(
        self,
        samples: Iterable[Sample],
        batch_size: int,
        threads: int,
        advance: Callable[[], None] = lambda: None,
        real_codes: bool = False,
    ) -> Encoded:
        """Encode one shard's samples in batches, decoding in `threads` threads beside the forward pass.

        Damaged or undecodable samples become rejects. The following samples move up in the batch, so the codes are a
        function of the shard alone. `advance` is called after each sample and each batch.
        """
        clock = dict.fromkeys(("read", "decode", "forward"), 0.0)
        codes = [np.zeros((0, (self.bits + 7) // 8), np.uint8)]
        quantised = [np.zeros((0, self.bits), np.int8)]
        result = Encoded(codes[0], quantised[0], seconds=clock)
        squares: list[npt.NDArray[np.uint8]] = []

        def flush() -> None:
            begun = time.perf_counter()
            z_BK = self.outputs(squares)
            codes.append(pack_bits(sign_bits(z_BK)))
            if real_codes:
                quantised.append(quantise_real_codes(z_BK))
            squares.clear()
            advance()
            clock["forward"] += time.perf_counter() - begun

        # Two batches ahead: one is decoded while the model takes the other.
        decode = partial(_decode_square, self.preprocess)
        ahead = decode_ahead(_timed(samples, clock), decode, threads, 2 * batch_size)
        for sample, square, animated, seconds in ahead:
            clock["decode"] += seconds
            advance()
            if isinstance(square, ImageReject):
                result.rejects.append((sample.record, square))
                continue
            result.kept.append(sample)
            result.animated += animated
            squares.append(square)
            if len(squares) == batch_size:
                flush()
        if squares:
            flush()
        result.codes, result.real_codes = np.concatenate(codes), np.concatenate(quantised)
        return result

    def outputs(
        self, squares: Sequence[npt.NDArray[np.uint8]], network: nn.Module | None = None
    ) -> npt.NDArray[np.float32]:
        """Run the model, or its part `network`, on squares, each uint8 (S, S, 3); return its outputs as float32."""
        batch = torch.from_numpy(np.stack(squares)).to(self.device)
        threads = nullcontext() if self.device.type == "cuda" else _threads(self.threads)
        with torch.inference_mode(), autocast(self.device, self.precision), threads:
            z_BK = (network or self.model)(self.preprocess.normalise(batch))
        reals: npt.NDArray[np.float32] = z_BK.float().cpu().numpy()
        return reals


def _timed(samples: Iterable[Sample], clock: dict[str, float]) -> Iterator[Sample]:
    """Pass the samples on, and add the seconds spent on reading them to `clock["read"]`."""
    iterator = iter(samples)
    while True:
        begun = time.perf_counter()
        sample = next(iterator, None)
        clock["read"] += time.perf_counter() - begun
        if sample is None:
            return
        yield sample


def _decode_square(
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
            square, animated = decode_square(sample.image, preprocess)
        except ImageReject as reject:
            square = reject
    # The bytes are not needed after decoding; keeping them until the shard ends would hold the whole shard in memory.
    return Sample(sample.record, b"", sample.metadata), square, animated, time.perf_counter() - begun


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
