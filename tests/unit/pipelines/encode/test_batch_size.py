"""`encode.batch_size`: auto becomes a number before the fingerprint, and a batch that does not fit is one line."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.artifacts.facts import CodesMeta
from pipelines.artifacts.manifest import Artifact, open_artifact
from pipelines.config.loading import load_config
from pipelines.encode import batch_size
from pipelines.encode.batch_size import largest_power, resolve_batch_size
from pipelines.encode.encode import encode
from pipelines.encode.encoder import Encoder
from pipelines.encode.job import plan_encode
from pipelines.errors import ConfigError, UsageError, WorkFailed
from pipelines.ingest.ingest import ingest
from tests.support.inline import InlinePool
from tests.support.models import write_model
from tests.support.pictures import write_folder

SETTINGS = ("ingest.samples_per_shard=10", "data.image_size=32")
CPU = (*SETTINGS, "encode.gpus=0")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("shards")
    write_folder(folder / "photos", classes=3, per_class=6)
    return ingest(str(folder / "photos"), str(folder / "train"), load_config(sets=SETTINGS)).uri


@pytest.fixture(scope="module")
def model(shards: str, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return write_model(tmp_path_factory.mktemp("model") / "model", shards, backbone="test_resnet")


def test_on_a_cpu_auto_is_the_default_in_the_fingerprint_too(shards: str, model: Artifact, tmp_path: Path) -> None:
    auto = load_config(sets=[*CPU, "encode.batch_size=auto"])
    made = encode(shards, model.uri, str(tmp_path / "auto"), auto, pool=InlinePool())
    usual = encode(shards, model.uri, str(tmp_path / "usual"), load_config(sets=CPU), pool=InlinePool())
    assert made.digest == usual.digest
    assert open_artifact(made.uri).facts(CodesMeta).settings["encode.batch_size"] == 64
    assert encode(shards, model.uri, made.uri, auto, pool=InlinePool()).status == "unchanged"


def test_codes_that_were_begun_keep_their_batch_size(shards: str, model: Artifact, tmp_path: Path) -> None:
    out = str(tmp_path / "codes")
    begun = encode(shards, model.uri, out, load_config(sets=[*CPU, "encode.batch_size=8"]), pool=InlinePool())
    again = encode(shards, model.uri, out, load_config(sets=[*CPU, "encode.batch_size=auto"]), pool=InlinePool())
    assert (again.status, again.digest) == ("unchanged", begun.digest)


def test_a_trial_is_part_of_the_fingerprint(
    shards: str, model: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_size, "_largest_batch", lambda *arguments: 4)
    config = load_config(sets=[*SETTINGS, "encode.batch_size=auto"])
    inputs = open_artifact(shards), model, str(tmp_path / "codes")
    resolved = resolve_batch_size(*inputs, config)
    plain = load_config(sets=[*SETTINGS, "encode.batch_size=4"])
    assert plan_encode(*inputs, resolved).fingerprint == plan_encode(*inputs, plain).fingerprint


@pytest.mark.parametrize(("room", "most", "found"), [(100, 1024, 64), (1, 1024, 1), (10_000, 512, 512), (5, 4, 4)])
def test_the_largest_power_of_two_that_fits_is_found(room: int, most: int, found: int) -> None:
    tried = []

    def fits(size: int) -> bool:
        tried.append(size)
        return size <= room

    assert largest_power(fits, most) == found
    assert max(tried) <= most


def test_without_room_for_one_image_the_error_says_so() -> None:
    with pytest.raises(WorkFailed, match=r"not even one image fits .* or encode\.gpus=0"):
        largest_power(lambda size: False, 64)


def test_what_names_codes_before_it_encodes_needs_a_number(shards: str, model: Artifact, tmp_path: Path) -> None:
    config = load_config(sets=["encode.batch_size=auto"])
    with pytest.raises(UsageError, match=r"encode\.batch_size=auto .*: write a number"):
        plan_encode(open_artifact(shards), model, str(tmp_path), config)


@pytest.mark.parametrize("value", ["0", "65537", "many", "1.5", "true"])
def test_other_values_are_refused(value: str) -> None:
    with pytest.raises(ConfigError, match=r"^encode\.batch_size = .*: write a number from 1 to 65536, or auto$"):
        load_config(sets=[f"encode.batch_size={value}"])


class Small(torch.nn.Module):
    """A network on a device with room for four images."""

    bits = 8

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if len(images) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ...")
        return images.flatten(1)[:, : self.bits]


def test_a_batch_that_does_not_fit_is_one_line_that_names_the_setting(
    shards: str, model: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = Encoder.open(model)
    small: Any = Small()
    encoder = Encoder(small, usual.preprocess, "fp32", "")
    assert [encoder.fits(size) for size in (4, 8)] == [True, False]
    monkeypatch.setattr(Encoder, "open", classmethod(lambda kind, source: encoder))
    config = load_config(sets=[*CPU, "encode.batch_size=8"])
    with pytest.raises(WorkFailed) as caught:
        encode(shards, model.uri, str(tmp_path / "codes"), config, pool=InlinePool())
    assert str(caught.value) == (
        "a batch of 8 images of 32 x 32 pixels does not fit the memory of the GPU: lower encode.batch_size, or set it "
        "to auto"
    )
    assert caught.value.exit_code == 1
