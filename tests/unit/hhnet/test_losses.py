"""Each loss against its formula, written out in plain Python from the module's docstring."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from hhnet.centres import margin
from hhnet.losses import HashLoss, loss_names, make_loss

BITS, CLASSES = 16, 5
Array = npt.NDArray[Any]


def batch(kind: str, size: int = 12, seed: int = 0) -> tuple[Tensor, Tensor, list[str]]:
    rng = np.random.default_rng(seed)
    z = torch.from_numpy(rng.normal(size=(size, BITS)))
    if kind == "single":
        labels = np.eye(CLASSES, dtype=bool)[rng.integers(0, CLASSES, size)]
    else:
        labels = rng.random((size, CLASSES)) < 0.35
        labels[:2] = False  # two unlabelled samples
        labels[2], labels[3] = [1, 1, 0, 0, 0], [0, 0, 1, 1, 0]  # two multi-label samples with nothing in common
        z[3] = 0.8 * z[2] + 0.2 * z[3]  # ... and yet near
    return z, torch.from_numpy(labels), [f"k{i}" for i in range(size)]


def softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0


def cosine(a: Array, b: Array) -> float:
    return float(a @ b / math.sqrt(a @ a) / math.sqrt(b @ b))


def pairs(y: Array) -> list[tuple[int, int, bool]]:
    """Labelled pairs i < j and whether they share a label."""
    out = []
    for i in range(len(y)):
        for j in range(i + 1, len(y)):
            if y[i].any() and y[j].any():
                out.append((i, j, bool((y[i] & y[j]).any())))
    return out


def hyp2(loss: Any, z: Array, y: Array) -> float:
    proxies, zeta = loss.proxies.detach().double().numpy(), margin(BITS, CLASSES)
    attract, repel = [], []
    for i in range(len(z)):
        for k in range(CLASSES):
            if y[i, k]:
                attract.append(1 - cosine(z[i], proxies[k]))
            elif y[i].any():
                repel.append(max(0.0, cosine(z[i], proxies[k]) - zeta))
    apart = [
        max(0.0, cosine(z[i], z[j]) - zeta) for i, j, same in pairs(y) if not same and y[i].sum() > 1 and y[j].sum() > 1
    ]
    return mean(attract) + mean(repel) + 0.5 * mean(apart)


def csq(loss: Any, z: Array, y: Array) -> float:
    centres, tie = loss.centres.double().numpy(), loss.tie.numpy()
    entropy, quantisation = [], []
    for i in range(len(z)):
        votes = sum((centres[k] for k in range(CLASSES) if y[i, k]), np.zeros(BITS))
        for j in range(BITS):
            u = math.tanh(z[i, j])
            quantisation.append((abs(u) - 1) ** 2)
            if y[i].any():
                target = ((votes[j] > 0) * 2 - 1 if votes[j] else tie[j]) / 2 + 0.5
                p = (u + 1) / 2
                entropy.append(-target * math.log(p) - (1 - target) * math.log(1 - p))
    return mean(entropy) + 0.05 * mean(quantisation)


def orthohash(loss: Any, z: Array, y: Array) -> float:
    centres, values = loss.unit_centres.double().numpy(), []
    for i in range(len(z)):
        if not y[i].any():
            continue
        logits = [math.sqrt(BITS) * (cosine(z[i], centres[k]) - 0.2 * y[i, k]) for k in range(CLASSES)]
        norm = math.log(math.fsum(math.exp(value) for value in logits))
        values.append(-math.fsum((logits[k] - norm) * y[i, k] / y[i].sum() for k in range(CLASSES)))
    return mean(values)


def dpsh(loss: Any, z: Array, y: Array) -> float:
    likelihood = [softplus(z[i] @ z[j] / 2) - same * (z[i] @ z[j] / 2) for i, j, same in pairs(y)]
    return mean(likelihood) + 0.1 * mean([(v - (1 if v > 0 else -1)) ** 2 for v in z.ravel()])


def hashnet(loss: Any, z: Array, y: Array) -> float:
    u = np.tanh(math.sqrt(1 + 0.005 * (int(loss.iteration) // 200 * 200)) * z)
    values = {True: [], False: []}  # type: ignore[var-annotated]
    for i, j, same in pairs(y):
        logit = 10 / BITS * (u[i] @ u[j])
        values[same].append(softplus(logit) - same * logit)
    total = len(values[True]) + len(values[False])
    # w = N / N+ and N / N-, mean over all N pairs
    weighted = [total / len(kind) * value for kind in values.values() for value in kind]
    return mean(weighted)


FORMULAS = {"hyp2": hyp2, "csq": csq, "orthohash": orthohash, "dpsh": dpsh, "hashnet": hashnet}


def test_every_loss_has_a_formula_here() -> None:
    assert loss_names() == tuple(sorted(FORMULAS))


@pytest.mark.parametrize("kind", ["single", "multi"])
@pytest.mark.parametrize("name", loss_names())
def test_value(name: str, kind: str) -> None:
    torch.manual_seed(0)
    loss = make_loss(name, BITS, CLASSES).eval()
    z, labels, keys = batch(kind)
    expected = FORMULAS[name](loss, z.numpy(), labels.numpy())
    for form in (labels, labels.float(), labels.long()):
        assert loss(z, form, keys).item() == pytest.approx(expected, rel=1e-6)
    single = loss(z.float(), labels, keys)
    assert single.dtype == torch.float32 and single.shape == ()
    assert single.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", loss_names())
def test_gradients_agree_with_differences(name: str) -> None:
    torch.manual_seed(0)
    loss = make_loss(name, BITS, CLASSES).double().eval()
    z, labels, keys = batch("multi", size=5)
    z = z[:, :BITS].requires_grad_()
    assert torch.autograd.gradcheck(lambda codes: loss(codes, labels, keys), (z,))


@pytest.mark.parametrize("name", loss_names())
@pytest.mark.parametrize("factor", [0.0, 1e4])
def test_extreme_codes_stay_finite(name: str, factor: float) -> None:
    loss = make_loss(name, BITS, CLASSES)
    z, labels, keys = batch("multi")
    z = (z.float() * factor).requires_grad_()
    value = loss(z, labels, keys)
    value.backward()
    assert value.isfinite() and z.grad is not None and z.grad.isfinite().all()


@pytest.mark.parametrize("name", loss_names())
def test_nothing_to_compare(name: str) -> None:
    """No labels, and a batch of one: finite, with gradients."""
    loss = make_loss(name, BITS, CLASSES)
    for size in (1, 3):
        z = torch.randn(size, BITS, requires_grad=True)
        value = loss(z, torch.zeros(size, CLASSES), ["k"] * size)
        value.backward()
        assert value.isfinite() and z.grad is not None and z.grad.isfinite().all()


@pytest.mark.parametrize("kind", ["single", "multi"])
@pytest.mark.parametrize("name", loss_names())
def test_free_codes_can_be_fitted(name: str, kind: str) -> None:
    """Optimising the codes themselves separates what shares a label from what does not."""
    torch.manual_seed(0)
    loss = make_loss(name, BITS, CLASSES)
    z, labels, keys = batch(kind, size=24)
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


def test_hashnet_slope_follows_the_steps_and_survives_a_checkpoint() -> None:
    loss: Any = make_loss("hashnet", BITS, CLASSES)
    z, labels, keys = batch("single", size=4)
    slopes = []
    for _ in range(401):
        slopes.append(float(loss.beta()))
        loss(z, labels, keys)
    assert slopes[0] == slopes[199] == 1
    assert slopes[200] == slopes[399] == pytest.approx(math.sqrt(2))
    assert slopes[400] == pytest.approx(math.sqrt(3))
    loss.eval()(z, labels, keys)
    assert int(loss.iteration) == 401
    resumed: Any = make_loss("hashnet", BITS, CLASSES)
    resumed.load_state_dict(loss.state_dict())
    assert int(resumed.iteration) == 401 and float(resumed.beta()) == float(loss.beta())


@pytest.mark.parametrize("name", loss_names())
def test_state_moves_to_an_equal_loss(name: str) -> None:
    torch.manual_seed(0)
    first = make_loss(name, BITS, CLASSES)
    second = make_loss(name, BITS, CLASSES)
    second.load_state_dict(first.state_dict())
    z, labels, keys = batch("multi")
    assert torch.equal(first(z, labels, keys), second(z, labels, keys))


def test_autocast_does_not_lower_the_precision() -> None:
    z, labels, keys = batch("multi")
    for name in loss_names():
        loss = make_loss(name, BITS, CLASSES).eval()
        plain = loss(z.float(), labels, keys)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(loss(z.float(), labels, keys), plain)


def test_declared_heads_and_rates() -> None:
    declared = {name: make_loss(name, BITS, CLASSES).default_head for name in loss_names()}
    assert declared == {n: "bn" if n == "orthohash" else "linear" for n in loss_names()}
    assert make_loss("hyp2", BITS, CLASSES).lr_scale == 10


def test_options() -> None:
    z, labels, keys = batch("multi")
    for name, options in (
        ("hyp2", {"beta": 3.0}),
        ("hyp2", {"zeta": -0.9}),
        ("csq", {"lam": 1.0}),
        ("csq", {"seed": 4}),
        ("orthohash", {"scale": 1.0}),
        ("orthohash", {"margin": 0.5}),
        ("dpsh", {"eta": 1.0}),
        ("hashnet", {"scale": 1.0}),
        ("hashnet", {"positive": 3.0}),
    ):
        values = []
        for given in ({}, options):
            torch.manual_seed(0)
            values.append(make_loss(name, BITS, CLASSES, **given)(z, labels, keys).item())
        assert values[0] != values[1], (name, options)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="unknown loss 'HyP': did you mean hyp2"):
        make_loss("HyP", BITS, CLASSES)
    with pytest.raises(ValueError, match="unknown loss 'xyzzy': known are csq"):
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
