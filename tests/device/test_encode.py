"""An encoder on a GPU gives the same codes for a sample, whatever stands beside it and whoever decoded it."""

from pathlib import Path

import numpy as np
import pytest
import torch

from hhnet.nn.folding import fold_norms
from hhnet.nn.model import HHNet
from hhnet.preprocess import Preprocess
from pipelines.config.loading import load_config
from pipelines.encode.encode import encode
from pipelines.encode.encoder import Encoder
from pipelines.encode.feed import ThreadFeed
from pipelines.encode.job import EncodeJob
from pipelines.encode.process_feed import ProcessFeed
from pipelines.encode.workers import ShardEncoder
from pipelines.ingest.ingest import ingest
from tests.support.inline import InlinePool
from tests.support.models import write_model
from tests.support.pictures import write_folder

SIDE, BITS = 32, 16


def encoder_of(precision: str = "fp32") -> Encoder:
    torch.manual_seed(0)
    return Encoder(HHNet("test_resnet", BITS), Preprocess(size=SIDE, resize=SIDE), precision, "")


def squares_of(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, SIDE, SIDE, 3), np.uint8)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_short_batches_have_the_codes_of_full_ones(precision: str) -> None:
    encoder, squares = encoder_of(precision), squares_of(8)
    codes, reals = encoder.begin(squares, 8, real_codes=True)()
    assert codes.shape == (8, BITS // 8) and reals is not None and reals.shape == (8, BITS)
    waits = [encoder.begin(squares[start : start + 3], 8, real_codes=True) for start in (0, 3)]  # two at a time
    for start, wait in zip((0, 3), waits, strict=True):
        few, few_reals = wait()
        np.testing.assert_array_equal(few, codes[start : start + 3])
        assert few_reals is not None
        np.testing.assert_allclose(few_reals, reals[start : start + 3], atol=1)


@pytest.mark.parametrize("head", ["linear", "bn"])
def test_weights_of_half_precision_give_the_outputs_of_autocast(head: str) -> None:
    """Converted once, not for each batch."""
    torch.manual_seed(0)
    model, squares = HHNet("hrnet_w18_small", BITS, head=head), squares_of(8)
    for tensor in (*model.head.parameters(), *model.head.buffers()):  # none that half precision holds exactly
        if tensor.is_floating_point():
            torch.nn.init.uniform_(tensor, 0.1, 0.9)
    encoder = Encoder(model, Preprocess(size=SIDE, resize=SIDE), "bf16", "")
    plain = fold_norms(encoder.model).to(memory_format=torch.channels_last)
    np.testing.assert_array_equal(encoder.outputs(squares), encoder.outputs(squares, plain))
    assert encoder.model.head is model.head and {weight.dtype for weight in model.parameters()} == {torch.float32}


def test_codes_are_the_signs_of_the_outputs_and_not_a_number_is_refused() -> None:
    encoder, squares = encoder_of(), squares_of(8)
    codes, _ = encoder.begin(squares, 8, real_codes=False)()
    outputs = encoder.outputs(squares)
    clear = np.abs(outputs) > 1e-4 * np.abs(outputs).max()
    bits = np.unpackbits(codes, axis=1, bitorder="little").astype(bool)
    np.testing.assert_array_equal(bits[clear], (outputs > 0)[clear])
    with torch.no_grad():
        encoder.model.head.bias[3] = float("nan")
    encoder = Encoder(encoder.model, encoder.preprocess, "fp32", "")
    with pytest.raises(ValueError, match="real codes must be numbers"):
        encoder.begin(squares, 8, real_codes=False)()


def test_decode_processes_and_threads_give_the_same_codes(tmp_path: Path) -> None:
    """The memory of the squares is pinned where there is a GPU."""
    write_folder(tmp_path / "photos", classes=3, per_class=11)
    config = load_config(sets=["ingest.samples_per_shard=12"])
    shards = ingest(str(tmp_path / "photos"), str(tmp_path / "shards"), config).uri
    model = write_model(tmp_path / "model", shards, bits=BITS, backbone="test_resnet").uri
    workers: list[ShardEncoder] = []

    def made(job: EncodeJob) -> ShardEncoder:
        workers.append(ShardEncoder(job))
        return workers[-1]

    digests = []
    for processes in (0, 2):
        config = load_config(sets=[f"encode.decode_processes={processes}", "encode.batch_size=5"])
        out = str(tmp_path / f"codes{processes}")
        digests.append(encode(shards, model, out, config, pool=InlinePool(made)).digest)
    first, second = (worker.feed for worker in workers)
    assert isinstance(first, ThreadFeed) and isinstance(second, ProcessFeed)
    second.close()
    assert digests[0] == digests[1]
