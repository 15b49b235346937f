"""What holds for every loss. Its formula is in the test of its own name."""

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hhnet.nn.losses import loss_names, make_loss
from hhnet.nn.losses.base import HashLoss
from tests.support.losses import BITS, CLASSES, KINDS, batch, pairs


def of_own_test(name: str) -> dict[str, Any]:
    """Read what the test of a loss declares of it: SENSELESS values of its options; HEAD, where that is not `linear`;
    and SOFT, where it takes soft labels, with options under which it is linear in them."""
    return runpy.run_path(str(Path(__file__).with_name(f"test_{name}.py")))


OWN = {name: of_own_test(name) for name in loss_names()}
SOFT = {name: own["SOFT"] for name, own in OWN.items() if "SOFT" in own}


def test_every_loss_has_a_test_of_its_name() -> None:
    here = {path.stem.removeprefix("test_") for path in Path(__file__).parent.glob("test_*.py")}
    assert set(loss_names()) == here - {"contract", "fit"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", loss_names())
def test_single_precision(name: str, kind: str) -> None:
    torch.manual_seed(0)
    loss = make_loss(name, BITS, CLASSES).eval()
    z, labels, keys = batch(kind, views=loss.views)
    single = loss(z.float(), labels, keys)
    assert single.dtype == torch.float32 and single.shape == ()
    assert single.item() == pytest.approx(loss(z, labels, keys).item(), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", loss_names())
def test_extreme_codes_stay_finite(name: str, kind: str) -> None:
    loss = make_loss(name, BITS, CLASSES)
    z, labels, keys = batch(kind, views=loss.views)
    forms = z.float(), z.sign().float(), torch.ones_like(z, dtype=torch.float32)
    for codes in [form * factor for form in forms for factor in (0.0, 100.0, 1e4)]:
        codes.requires_grad_()
        value = loss(codes, labels, keys)
        value.backward()
        assert value.isfinite() and codes.grad is not None and codes.grad.isfinite().all()


@pytest.mark.parametrize("name", loss_names())
def test_nothing_to_compare(name: str) -> None:
    """No labels, and a batch of one: finite, with gradients, which only the codes' own terms give."""
    loss = make_loss(name, BITS, CLASSES)
    for size in (1, 3):
        z = torch.randn(size * loss.views, BITS, requires_grad=True)
        value = loss(z, torch.zeros(len(z), CLASSES), ["k"] * len(z))
        value.backward()
        assert value.isfinite() and z.grad is not None and z.grad.isfinite().all()
        assert all(not parameter.grad.any() for parameter in loss.parameters() if parameter.grad is not None)


@pytest.mark.parametrize("kind", ["single", "multi"])
@pytest.mark.parametrize("name", loss_names())
def test_free_codes_can_be_fitted(name: str, kind: str) -> None:
    """Optimising the codes themselves separates what shares a label from what does not."""
    torch.manual_seed(0)
    loss = make_loss(name, BITS, CLASSES)
    z, labels, keys = batch(kind, size=24, views=loss.views)
    z = z.float().requires_grad_()
    optimiser = torch.optim.Adam([z, *loss.parameters()], lr=0.1)
    first = loss(z, labels, keys).item()
    for _ in range(150):
        optimiser.zero_grad()
        value = loss(z, labels, keys)
        value.backward()
        optimiser.step()
    assert value.item() < 0.8 * first
    b, y = np.where(z.detach().numpy() > 0, 1, -1), labels.numpy()
    inner = {same: [int(b[i] @ b[j]) for i, j, s in pairs(y) if s == same] for same in (True, False)}
    assert np.mean(inner[True]) > np.mean(inner[False]) + BITS / 4


@pytest.mark.parametrize("name", loss_names())
def test_state_moves_to_an_equal_loss(name: str) -> None:
    torch.manual_seed(0)
    first = make_loss(name, BITS, CLASSES)
    second = make_loss(name, BITS, CLASSES)
    second.load_state_dict(first.state_dict())
    z, labels, keys = batch("multi", views=first.views)
    assert torch.equal(first(z, labels, keys), second(z, labels, keys))


def test_autocast_does_not_lower_the_precision() -> None:
    for name in loss_names():
        loss = make_loss(name, BITS, CLASSES).eval()
        z, labels, keys = batch("multi", views=loss.views)
        plain = loss(z.float(), labels, keys)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(loss(z.float(), labels, keys), plain)


def test_declared_heads() -> None:
    declared = {name: make_loss(name, BITS, CLASSES).default_head for name in loss_names()}
    assert declared == {name: own.get("HEAD", "linear") for name, own in OWN.items()}


def test_declared_soft_labels() -> None:
    assert {name for name in loss_names() if make_loss(name, BITS, CLASSES).soft_labels} == SOFT.keys()


@pytest.mark.parametrize("name", SOFT)
def test_a_mixed_label_weighs_the_losses_of_both(name: str) -> None:
    loss = make_loss(name, BITS, CLASSES, **SOFT[name])
    z, ones, keys = batch("single", views=loss.views)
    _, others, _ = batch("single", seed=1, views=loss.views)
    mixed = 0.3 * ones.double() + 0.7 * others.double()
    expected = 0.3 * loss(z, ones, keys) + 0.7 * loss(z, others, keys)
    assert loss(z, mixed, keys).item() == pytest.approx(expected.item(), rel=1e-9)
    assert loss(z, mixed, keys).item() != pytest.approx(loss(z, others, keys).item(), rel=1e-3)


@pytest.mark.parametrize("name", loss_names())
def test_senseless_options_are_refused_by_name(name: str) -> None:
    for option, values in OWN[name]["SENSELESS"].items():
        for value in (*values, float("nan"), float("inf")):
            with pytest.raises(ValueError, match=rf"^{option} must be .*: got {value}"):
                make_loss(name, BITS, CLASSES, **{option: value})


def test_options_that_count_may_come_as_floats() -> None:
    """As they do from a configuration file."""
    first, second = (make_loss("mdsh", BITS, 40, seed=seed, start=2.0).state_dict() for seed in (3, 3.0))
    assert torch.equal(first["unit_centres"], second["unit_centres"])


@pytest.mark.parametrize("name", loss_names())
def test_more_classes_than_codes_are_warned_of(name: str) -> None:
    with pytest.warns(UserWarning, match="3 bits tell at most 8 classes apart: some of 20 must share a code") as caught:
        loss = make_loss(name, 3, 20)
    assert [Path(warning.filename).name for warning in caught] == ["test_contract.py"]
    z = torch.randn(4 * loss.views, 3, requires_grad=True)
    value = loss(z, torch.eye(20)[: len(z)], [key for key in "abcd" for _ in range(loss.views)])
    value.backward()
    assert value.isfinite() and z.grad is not None and z.grad.isfinite().all()


def test_refusals() -> None:
    with pytest.raises(ValueError, match="unknown loss 'HyP': did you mean hyp2"):
        make_loss("HyP", BITS, CLASSES)
    with pytest.raises(ValueError, match="unknown loss 'xyzzy': known are ce, cel"):
        make_loss("xyzzy", BITS, CLASSES)
    with pytest.raises(ValueError, match="loss dpsh has no option lam: known are eta"):
        make_loss("dpsh", BITS, CLASSES, lam=1)
    with pytest.raises(ValueError, match="at least 1 bit and 1 class"):
        make_loss("dpsh", BITS, 0)
    loss = make_loss("dpsh", BITS, CLASSES)
    z, labels, keys = batch("single")
    with pytest.raises(ValueError, match=r"codes must have shape \(B, 16\): got \(12, 8\)"):
        loss(z[:, :8], labels, keys)
    with pytest.raises(ValueError, match=r"labels must be multi-hot \(12, 5\): got \(12, 4\)"):
        loss(z, labels[:, :4], keys)
    with pytest.raises(ValueError, match="one key per sample: got 11 for 12"):
        loss(z, labels, keys[:11])
    with pytest.raises(NotImplementedError):
        HashLoss(BITS, CLASSES)(z, labels, keys)
