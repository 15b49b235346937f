"""Hash layers made of trained ones, and what becomes of them in the two files of a model."""

import json

import numpy as np
import pytest
import torch
from torch import Tensor

from hhnet.codes import pack_bits, sign_bits, unpack_bits
from hhnet.nn.heads import ClassIndex, class_bits
from hhnet.nn.model import HHNet, Preprocess, card, model_from_bytes, model_to_bytes
from hhnet.nn.rehead import as_class_index, projected, rotated
from hhnet.nn.rotation import random_hyperplanes

IMAGES = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def trained(head: str, bits: int = 16) -> HHNet:
    """A network whose statistics and affine parameters are no longer those of the start."""
    torch.manual_seed(0)
    model = HHNet("resnet18", bits, head=head)
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        model.train()
        for _ in range(3):
            model(IMAGES)
    return model.eval()


def outputs(model: HHNet) -> Tensor:
    with torch.inference_mode():
        return model(IMAGES)


def reread(model: HHNet) -> HHNet:
    """Through the bytes of both files."""
    described = json.loads(json.dumps(card(model, Preprocess(size=32, resize=32))))
    return model_from_bytes(model_to_bytes(model), described)[0]


@pytest.mark.parametrize("head", ["linear", "bn", "ln"])
def test_a_rotated_model_gives_rotated_outputs(head: str) -> None:
    model = trained(head)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    turn, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(16, 16)))
    once = rotated(model, turn)
    twice = rotated(once, turn)
    expected = outputs(model) @ torch.from_numpy(turn).float()
    torch.testing.assert_close(outputs(once), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(outputs(twice), expected @ torch.from_numpy(turn).float(), rtol=1e-4, atol=1e-4)
    assert once.head_name == twice.head_name == ("ln_rotated" if head == "ln" else "linear")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    torch.testing.assert_close(outputs(reread(twice)), outputs(twice))


@pytest.mark.parametrize("head", ["linear", "bn", "ln"])
def test_a_projected_model_gives_projected_features(head: str) -> None:
    model = trained(head)
    with torch.inference_mode():
        features = model.backbone(IMAGES).double().numpy()
    directions, mean = random_hyperplanes(features, 24)
    made = projected(model, directions, mean)
    assert (made.bits, made.head_name) == (24, "linear")
    np.testing.assert_allclose(outputs(reread(made)).numpy(), (features - mean) @ directions, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("classes", [2, 3, 10, 16, 17, 1000])
def test_the_signs_are_the_bits_of_the_largest_class(classes: int) -> None:
    logits = torch.randn(500, classes, generator=torch.Generator().manual_seed(0))
    codes = ClassIndex(classes)(logits)
    assert codes.shape == (500, class_bits(classes)) == (500, int(np.ceil(np.log2(classes))))
    packed = pack_bits(sign_bits(codes.numpy()))
    index = unpack_bits(packed, codes.shape[1]) @ (1 << np.arange(codes.shape[1]))
    np.testing.assert_array_equal(index, logits.argmax(1).numpy())
    assert torch.isfinite(codes).all()


@pytest.mark.parametrize("head", ["linear", "bn"])
def test_a_class_index_is_that_of_the_classifier(head: str) -> None:
    model = trained(head)
    weight, bias = torch.randn(10, 16), torch.randn(10)
    made = reread(as_class_index(model, weight, bias))
    assert (made.bits, made.head_name, made.classes) == (4, "class_index", 10)
    found = (outputs(made) > 0).int() @ (1 << torch.arange(4, dtype=torch.int32))
    assert torch.equal(found.long(), (outputs(model) @ weight.T + bias).argmax(1))


def test_refusals() -> None:
    model = trained("ln")
    with pytest.raises(ValueError, match=r"not linear: train with model\.head = linear or bn"):
        as_class_index(model, torch.randn(10, 16), torch.randn(10))
    with pytest.raises(ValueError, match="one class needs no code"):
        as_class_index(trained("linear"), torch.randn(1, 16), torch.randn(1))
    index = as_class_index(trained("linear"), torch.randn(10, 16), torch.randn(10))
    with pytest.raises(ValueError, match="not linear"):
        rotated(index, np.eye(4))
    described = card(index, Preprocess(size=32, resize=32))
    for change, said in (
        ({"class_count": 9_999_999_999}, "class_count as an int up to"),
        ({"class_count": "10"}, "class_count as an int"),
        ({"class_count": 20}, "a class index needs 2 or more classes and bits for them: got 20 and 4"),
        ({"bits": 5}, "a class index needs"),
        ({"head": "linear"}, "bits must be a multiple of 8"),
    ):
        with pytest.raises(ValueError, match=said):
            model_from_bytes(model_to_bytes(index), {**described, **change})
