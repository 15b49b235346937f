"""The ONNX file beside the network that it was made from, on real images; what differs is noticed."""

import json
import re
import sys
from pathlib import Path
from shutil import copy, copytree
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
from PIL import Image

import hhnet
from hhnet.codes import sign_bits
from pipelines.artifacts.manifest import Artifact, open_artifact
from pipelines.config.settings import Config
from pipelines.encode.encoder import Encoder
from pipelines.errors import InputError, UsageError, WorkFailed
from pipelines.export import onnx as module
from pipelines.export.onnx import compare_with_torch, export_onnx, find_check_images
from pipelines.ingest.ingest import ingest
from tests.support.models import SIDE, write_model
from tests.support.pictures import jpeg, picture, write_folder, write_specimens

ROOT = Path(__file__).parents[4]
PICTURES = np.stack([picture(number % 3, 100 + number, SIDE) for number in range(13)])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    root = tmp_path_factory.mktemp("export")
    write_folder(root / "photos", classes=3, per_class=8)
    ingest(str(root / "photos"), str(root / "shards"), Config())
    return write_model(root / "model", str(root / "shards"), bits=24, backbone="test_resnet", resize=36)


@pytest.fixture(scope="module")
def encoder(model: Artifact) -> Encoder:
    return Encoder.open(model)


@pytest.fixture(scope="module")
def file(model: Artifact) -> Path:
    return Path(model.uri).parent / "model.onnx"


@pytest.fixture(scope="module")
def exported(model: Artifact, file: Path) -> dict[str, Any]:
    return export_onnx(model.uri, str(file)).as_json()


def run(file: Path, images: npt.NDArray[np.uint8]) -> list[npt.NDArray[Any]]:
    return list(onnxruntime.InferenceSession(file).run(["codes", "real_codes"], {"images": images}))


def test_the_result_says_what_was_compared(exported: dict[str, Any], model: Artifact, file: Path) -> None:
    assert exported.items() >= {"verb": "export", "status": "done", "uri": str(file), "images": 24}.items()
    assert exported["checked_on"] == str(Path(model.uri).parent / "shards")
    assert 0.9 * 24 * 24 < exported["bits_compared"] <= 24 * 24
    assert 0 <= exported["largest_difference"] < 1e-5


@pytest.mark.parametrize("count", [1, 2, 13])
def test_codes_and_real_codes_are_those_of_the_encoder(
    exported: dict[str, Any], file: Path, encoder: Encoder, count: int
) -> None:
    codes, real_codes = run(file, PICTURES[:count])
    expected = encoder.outputs(list(PICTURES[:count]))
    assert (codes.dtype, codes.shape, real_codes.dtype) == (np.uint8, (count, 3), np.float32)
    np.testing.assert_allclose(real_codes, expected, atol=1e-5)
    np.testing.assert_array_equal(codes, hhnet.pack_bits(sign_bits(real_codes)))
    assert len(np.unique(codes)) > 1


def test_the_file_says_what_it_is_and_not_where_it_was_made(
    exported: dict[str, Any], file: Path, model: Artifact, encoder: Encoder
) -> None:
    said = onnxruntime.InferenceSession(file).get_modelmeta().custom_metadata_map
    assert said.items() >= {"hhnet.model": model.digest, "hhnet.bits": "24", "hhnet.bit_order": "little"}.items()
    assert json.loads(said["hhnet.classes"]) == ["class_00", "class_01", "class_02"]
    assert hhnet.Preprocess.from_dict(json.loads(said["hhnet.preprocess"])) == encoder.preprocess
    data = file.read_bytes()
    assert str(ROOT).encode() not in data
    assert b"site-packages" not in data


def test_a_rerun_gives_the_same_bytes_and_says_so(
    exported: dict[str, Any], file: Path, model: Artifact, capsys: pytest.CaptureFixture[str]
) -> None:
    again = export_onnx(model.uri, str(file)).as_json()
    assert again == {**exported, "status": "unchanged"}
    assert capsys.readouterr().out == "", "stdout is for the result alone"


def test_a_fixed_batch_is_in_the_file(model: Artifact, tmp_path: Path) -> None:
    result = export_onnx(model.uri, str(tmp_path / "five.onnx"), batch=5).as_json()
    assert (result["batch"], result["images"]) == (5, 24)
    (images,) = onnxruntime.InferenceSession(tmp_path / "five.onnx").get_inputs()
    assert images.shape == [5, SIDE, SIDE, 3]


# ------------------------------------------------------------------------------------------------------- refusals


def test_another_bit_order_is_noticed_and_not_written(
    exported: dict[str, Any], file: Path, model: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = onnx.load(file)
    (places,) = (entry for entry in graph.graph.initializer if list(entry.dims) == [8] and entry.data_type == 6)
    swapped = onnx.numpy_helper.to_array(places)[::-1].copy()
    places.CopyFrom(onnx.numpy_helper.from_array(swapped, places.name))
    monkeypatch.setattr(module, "to_onnx", lambda *_: graph.SerializeToString())
    with pytest.raises(WorkFailed, match="bits of the ONNX graph differ from torch's: nothing was written"):
        export_onnx(model.uri, str(tmp_path / "model.onnx"))
    assert list(tmp_path.iterdir()) == []


def test_another_normalisation_is_noticed(exported: dict[str, Any], file: Path, model: Artifact) -> None:
    plain = hhnet.Preprocess(size=SIDE, resize=36, mean=(0, 0, 0), std=(1, 1, 1))
    other = Encoder(Encoder.open(model).model, plain, "fp32", model.digest)
    with pytest.raises(WorkFailed, match="real codes of the ONNX graph differ"):
        compare_with_torch(file.read_bytes(), other, PICTURES, None)


def test_without_the_extra_it_says_what_to_install(
    model: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UsageError, match=r"needs onnxruntime: pip install 'hhnet\[export\]'"):
        export_onnx(model.uri, str(tmp_path / "model.onnx"))


@pytest.mark.parametrize("out", ["s3://bucket/model.onnx", "nowhere/model.onnx"])
def test_a_place_that_can_hold_no_file_is_refused_before_any_work(model: Artifact, out: str) -> None:
    with pytest.raises(UsageError, match=f"--out {out} must be a local file"):
        export_onnx(model.uri, out)


# --------------------------------------------------------------------------------------------------------- images


def test_images_of_a_folder_are_those_that_decode(model: Artifact, encoder: Encoder, tmp_path: Path) -> None:
    write_specimens(tmp_path / "readable", unreadable=False)
    readable, where = find_check_images(model, encoder.preprocess, tmp_path / "readable")
    write_specimens(tmp_path / "all")
    found, _ = find_check_images(model, encoder.preprocess, tmp_path / "all")
    assert (len(found), where) == (len(readable), str(tmp_path / "readable"))
    assert found.shape[1:] == (SIDE, SIDE, 3)
    (tmp_path / "none").mkdir()
    write_specimens(tmp_path / "bad", readable=False)
    for folder in ("none", "bad", "nowhere"):
        with pytest.raises(InputError, match="name another folder"):
            find_check_images(model, encoder.preprocess, tmp_path / folder)


def test_where_the_training_images_are_gone_they_are_generated_and_called_so(
    model: Artifact, encoder: Encoder, tmp_path: Path
) -> None:
    alone = carried(model, tmp_path)
    squares, what = find_check_images(alone, encoder.preprocess, None)
    assert re.match("generated images, for .* does not remember where its shards lies", what)
    assert squares.shape == (64, SIDE, SIDE, 3)
    assert len(np.unique(squares.reshape(64, -1), axis=0)) == 64


def carried(model: Artifact, folder: Path) -> Artifact:
    """A copy of the model as a user would carry it about: the manifest and the parts."""
    copytree(f"{model.uri}/parts", folder / "model" / "parts")
    copy(f"{model.uri}/manifest.json", folder / "model")
    return open_artifact(folder / "model", "model")


# ----------------------------------------------------------------------------------------------------------- docs


def test_the_snippets_of_the_docs_run_and_agree(
    exported: dict[str, Any], file: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "export.md").read_text(), re.DOTALL)
    monkeypatch.chdir(file.parent)
    files = {"cat.jpg": jpeg(picture(0, 50, 60)[:40]), "dog.jpg": jpeg(picture(1, 51, 60)[:, :45])}
    for name, data in files.items():
        Path(name).write_bytes(data)
        assert Image.open(name).width != Image.open(name).height
    expected = hhnet.pack_bits(sign_bits(encoder.real_codes(list(files.values()))))
    assert len(blocks) == 2
    for block in blocks:
        names: dict[str, Any] = {}
        exec(block, names)
        np.testing.assert_array_equal(names["codes"], expected)
        assert names["distance"] == hhnet.hamming_distances(expected[:1], expected[1:])[0, 0] > 0
