"""`hhnet export`: writes a model as one ONNX file, and checks it against torch before it is kept.

The graph normalises, runs the network in fp32, and packs. Only resizing stays outside, by the rule in the file's
metadata. The file is a function of the model, the batch and the versions of the exporter.

Shape suffixes: N images, S side of the network's input, K bits.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hhnet.codes import pack_bits, sign_bits, unpack_bits
from pipelines.artifacts.facts import ModelMeta
from pipelines.artifacts.manifest import Artifact, open_artifact
from pipelines.artifacts.result import Result
from pipelines.artifacts.tables import BIT_ORDER
from pipelines.artifacts.versions import open_input_version
from pipelines.cluster.progress import stage
from pipelines.errors import HHNetError, InputError, UsageError, WorkFailed
from pipelines.shards.containers.limits import ImageReject
from pipelines.shards.images import MAX_IMAGE_BYTES, decode_square
from pipelines.shards.shards import open_shards
from pipelines.storage import canonical_json, sha256_of, write_output

if TYPE_CHECKING:  # imports torch, which must not be loaded before packages and model are checked
    from hhnet.preprocess import Preprocess
    from pipelines.encode.encoder import Encoder

EXPORT_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
OPSET = 18
"""ONNX operator set that torch's exporter writes without a conversion."""
MAX_WEIGHT_BYTES = 2**31 - 2**24
"""Largest size of the weights in bytes; it leaves room for the graph in a protobuf message, which ends at 2 GiB."""
IMAGES_CHECKED = 64
"""Number of images that are run through both torch and onnxruntime."""
CHECK_BATCH_IMAGES = 8
LOGIT_TOLERANCE = 1e-4
"""Largest difference of real codes, as a share of the largest real code where that is above 1.

Bits whose real code is nearer to zero than this are not compared.
"""
PROGRESS_STEPS = 4

Squares = npt.NDArray[np.uint8]
Codes = npt.NDArray[np.uint8]
RealCodes = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class ExportResult(Result):
    """The ONNX file, and the figures of its check."""

    verb: str = "export"
    images: int
    checked_on: str
    bits_compared: int
    largest_difference: float
    batch: int | str
    precision: str = "fp32"
    trained_precision: str


def export_onnx(model: str, out: str, batch: int | None = None, images: Path | None = None) -> ExportResult:
    """Write the model at the URI `model` to the local file `out`, for `batch` images at a time or for any number.

    It is checked on the files in the folder `images`, else on the model's own training images. The status is `done`, or
    `unchanged` where `out` has these bytes already; the digest is the sha256 of the file. Raises UsageError where the
    extra is not installed or `out` is no place for a file, InputError for images that cannot be used or a model of 2
    GiB and more, and WorkFailed, with nothing written, where the network cannot be exported or the graph's answers
    differ from torch's.
    """
    if missing := [name for name in EXPORT_PACKAGES if find_spec(name) is None]:
        raise UsageError(f"export needs {', '.join(missing)}: pip install 'hhnet[export]'")
    target = Path(out).expanduser()
    if "://" in out or not target.parent.is_dir():
        raise UsageError(f"--out {out} must be a local file in a folder that exists")
    artifact = open_artifact(model, "model")
    with stage("export", PROGRESS_STEPS, unit="steps") as advance:
        from pipelines.encode.encoder import Encoder

        encoder = Encoder.open(artifact)
        squares_NSS3, checked_on = find_check_images(artifact, encoder.preprocess, images)
        advance(1, note="model and images read")
        data = to_onnx(encoder, artifact, batch)
        advance(1, note="exported")
        bits, largest = compare_with_torch(data, encoder, squares_NSS3, batch)
        advance(1, note="checked")
        digest = sha256_of(data)
        same = target.is_file() and sha256_of(target) == digest
        if not same:
            write_output(target, data)
        advance(1)
    return ExportResult(
        status="unchanged" if same else "done",
        uri=str(target),
        digest=digest,
        images=len(squares_NSS3),
        checked_on=checked_on,
        bits_compared=bits,
        largest_difference=largest,
        batch=batch or "any",
        trained_precision=encoder.precision,
    )


# ---------------------------------------------------------------------------------------------------------- graph


def to_onnx(encoder: "Encoder", artifact: Artifact, batch: int | None) -> bytes:
    """Export the network as a checked ONNX file.

    Input: `images` uint8 (N, S, S, 3). Outputs: `codes` uint8 (N, K / 8) and `real_codes` (N, K).
    """
    import onnx
    import torch

    network, side = _packed(encoder), encoder.preprocess.size
    size = sum(value.nbytes for value in network.state_dict().values())
    if size > MAX_WEIGHT_BYTES:
        problem = f"{artifact.uri} has {size:,} bytes of weights, more than the 2 GiB of an ONNX file"
        raise InputError(f"{problem}: export a smaller model")
    example = torch.zeros(batch or 2, side, side, 3, dtype=torch.uint8)  # with 1 the exporter would write a constant
    try:
        program = torch.onnx.export(
            network,
            (example,),
            dynamo=True,
            input_names=["images"],
            output_names=["codes", "real_codes"],
            dynamic_shapes=None if batch else {"images": {0: torch.export.Dim("N")}},
            opset_version=OPSET,
            verbose=False,
        )
    except torch.onnx.OnnxExporterError as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise WorkFailed(f"{artifact.uri} ({encoder.model.backbone_name}) cannot be exported: {reason}") from error
    assert program is not None, "a program is returned where no file was named"
    graph = program.model_proto
    _forget_sources(graph)
    onnx.helper.set_model_props(graph, onnx_metadata(encoder, artifact))
    onnx.checker.check_model(graph, full_check=True)
    data: bytes = graph.SerializeToString(deterministic=True)
    return data


def _packed(encoder: "Encoder") -> Any:
    """Wrap the encoder's network, on the CPU, in a torch module that normalises before it and packs after it."""
    import torch
    from torch import Tensor, nn

    class Packed(nn.Module):
        places: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.model = encoder.model.cpu()
            # The values of a byte's bits from the least significant on: ONNX has no operator that packs bits.
            self.register_buffer("places", 2 ** torch.arange(8, dtype=torch.int32))

        def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
            z_NK = self.model(encoder.preprocess.normalise(images))
            bits = (z_NK > 0).unflatten(1, (-1, 8)).to(torch.int32)
            return (bits * self.places).sum(2, dtype=torch.int32).to(torch.uint8), z_NK

    return Packed().eval()


def _forget_sources(graph: Any) -> None:
    """Remove the exporter's notes on the program: stack traces with this machine's paths, and its own names."""
    main = graph.graph
    for entry in (main, *main.node, *main.input, *main.output, *main.value_info, *main.initializer):
        entry.ClearField("metadata_props")


def onnx_metadata(encoder: "Encoder", artifact: Artifact) -> dict[str, str]:
    """Return the file's metadata; values that are no plain text are JSON."""
    return {
        "hhnet.version": version("hhnet"),
        "hhnet.model": artifact.digest,
        "hhnet.backbone": encoder.model.backbone_name,
        "hhnet.bits": str(encoder.bits),
        "hhnet.bit_order": BIT_ORDER,
        "hhnet.classes": json.dumps(artifact.facts(ModelMeta).classes, ensure_ascii=False),
        "hhnet.preprocess": canonical_json(encoder.preprocess.to_dict()).decode().strip(),
        "hhnet.precision": "fp32",
        "hhnet.trained_precision": encoder.precision,
    }


# ------------------------------------------------------------------------------------------------------- checking


def find_check_images(artifact: Artifact, preprocess: "Preprocess", folder: Path | None) -> tuple[Squares, str]:
    """Return up to IMAGES_CHECKED images as uint8 (N, S, S, 3), and their source.

    They are the files in `folder`, else training images of the model, else generated ones.
    """
    if folder is not None:
        squares = list(islice(_decoded(_files(folder), preprocess), IMAGES_CHECKED))
        if not squares:
            raise InputError(f"{folder} holds no image that can be decoded: name another folder with --check-images")
        return np.stack(squares), str(folder)
    try:
        shards = open_shards(open_input_version(artifact, "shards"))
        samples = (sample for shard in shards.shards for sample in shards.read(shard))
        whole = (sample.image for sample in samples if sample.damage is None)
        squares = list(islice(_decoded(whole, preprocess), IMAGES_CHECKED))
        reason = f"no sample of {shards.artifact.uri} can be decoded"
    except HHNetError as error:
        squares, reason = [], str(error)
    if squares:
        return np.stack(squares), shards.artifact.uri
    return _generated(preprocess), f"generated images, for {reason}"


def _files(folder: Path) -> Iterator[bytes]:
    try:
        for path in sorted(folder.expanduser().rglob("*")):
            if path.is_file() and path.stat().st_size <= MAX_IMAGE_BYTES:
                yield path.read_bytes()
    except OSError as error:
        raise InputError(f"{error.filename or folder} cannot be read: {error.strerror or error}") from None


def _decoded(images: Iterable[bytes], preprocess: "Preprocess") -> Iterator[Squares]:
    for data in images:
        try:
            yield decode_square(data, preprocess)[0]
        except ImageReject:
            continue


def _generated(preprocess: "Preprocess") -> Squares:
    """Generate seeded clouds of colour, coarse to fine."""
    random = np.random.default_rng(0)
    sides = [2 + n % 31 for n in range(IMAGES_CHECKED)]
    return np.stack([preprocess.resize_crop(random.integers(0, 256, (s, s, 3), np.uint8)) for s in sides])


def compare_with_torch(data: bytes, encoder: "Encoder", squares_NSS3: Squares, batch: int | None) -> tuple[int, float]:
    """Run the file beside torch on the same images; raise WorkFailed where codes or real codes differ.

    Returns the number of compared bits, and the largest difference of real codes.
    """
    import onnxruntime
    import torch

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    network = encoder.model.cpu()
    codes, real_codes, expected = [], [], []
    for rows in _batches(len(squares_NSS3), batch):
        images = squares_NSS3[rows]
        outputs = session.run(["codes", "real_codes"], {"images": images})
        codes.append(outputs[0])
        real_codes.append(outputs[1])
        with torch.inference_mode():
            expected.append(network(encoder.preprocess.normalise(torch.from_numpy(images))).numpy())
    return require_agreement(np.concatenate(codes), np.concatenate(real_codes), np.concatenate(expected))


def _batches(count: int, batch: int | None) -> Iterator[npt.NDArray[np.int64]]:
    """Yield rows in batches of the fixed size, the last filled up from the front.

    Without a fixed size: a batch of one, then batches of CHECK_BATCH_IMAGES, so that both sizes are tried.
    """
    if batch is not None:
        for start in range(0, count, batch):
            yield np.arange(start, start + batch) % count
        return
    yield np.arange(1)
    for start in range(1, count, CHECK_BATCH_IMAGES):
        yield np.arange(start, min(start + CHECK_BATCH_IMAGES, count))


def require_agreement(codes: Codes, z_NK: RealCodes, expected_NK: RealCodes) -> tuple[int, float]:
    """Compare codes and real codes of the graph with torch's real codes; raise WorkFailed where they differ."""
    if not (np.isfinite(z_NK).all() and np.isfinite(expected_NK).all()):
        raise WorkFailed("the network's outputs are not finite: check the model with hhnet verify; nothing was written")
    tolerance = LOGIT_TOLERANCE * max(1.0, float(np.abs(expected_NK).max()))
    largest = float(np.abs(z_NK - expected_NK).max())
    if largest > tolerance:
        problem = f"real codes of the ONNX graph differ from torch's by {largest:.3g}, more than {tolerance:.3g}"
        raise WorkFailed(f"{problem}: nothing was written")
    away_NK = np.abs(expected_NK) > tolerance
    bits = z_NK.shape[1]
    wrong = (unpack_bits(codes, bits) != unpack_bits(pack_bits(sign_bits(expected_NK)), bits)) & away_NK
    if wrong.any():
        count = f"{int(wrong.sum()):,} of {int(away_NK.sum()):,} bits"
        raise WorkFailed(f"{count} of the ONNX graph differ from torch's: nothing was written")
    return int(away_NK.sum()), largest
