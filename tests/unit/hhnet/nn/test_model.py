"""The network, its two files, and loading an artifact."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from timm.models.resnet import BasicBlock, Bottleneck
from torch import nn

from hhnet.nn.backbones import SmallMapConv2d, check_backbone_name
from hhnet.nn.heads import HEADS
from hhnet.nn.model import HHNet, Preprocess, card, load_model, model_from_bytes, model_to_bytes

SMALL = "hrnet_w18_small"
PREPROCESS = Preprocess(size=32, resize=36)
HRNETS = [
    "hrnet_w18_small",
    "hrnet_w18_small_v2",
    *(f"hrnet_w{width}" for width in (18, 30, 32, 40, 44, 48, 64)),
]


def meta(name: str, bits: int = 16, **kwargs: Any) -> HHNet:
    with torch.device("meta"):
        return HHNet(name, bits, **kwargs)


@pytest.fixture(scope="module")
def model() -> HHNet:
    torch.manual_seed(0)
    return HHNet(SMALL, 16).eval()


@pytest.mark.parametrize("name", HRNETS)
def test_every_hrnet_gives_2048_features(name: str) -> None:
    with torch.device("meta"):
        net = HHNet(name, 64)
        assert net.feature_dim == 2048
        if name.startswith(SMALL):  # the others only differ in depth and width
            assert net.backbone(torch.empty(1, 3, 64, 64)).shape == (1, 2048)
        assert net.backbone.net.final_layer[0].out_channels == 2048


@pytest.mark.parametrize(
    ("name", "dim", "size"), [("alexnet", 4096, 64), ("vgg16", 4096, 32), ("resnet18", 512, 32), ("resnet50", 2048, 32)]
)
def test_other_backbones(name: str, dim: int, size: int) -> None:
    with torch.device("meta"):
        net = HHNet(name, 24)
        assert net.feature_dim == dim
        assert net(torch.empty(2, 3, size, size)).shape == (2, 24)


def test_features_are_the_classification_head_of_timm(model: HHNet) -> None:
    """The pooled input of timm's own classifier, from the same weights."""
    full = timm.create_model(SMALL, num_classes=7).eval()
    state = {key: value for key, value in full.state_dict().items() if not key.startswith("classifier.")}
    net = HHNet(SMALL, 16).eval()
    net.backbone.net.load_state_dict(state)
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(full.classifier(net.backbone(x)), full(x))


@pytest.mark.parametrize("name", [SMALL, "test_resnet"])
def test_small_images_give_the_features_and_gradients_of_timm(name: str) -> None:
    """At 32 pixels the coarsest maps are one cell, which the backbone computes in its own way."""
    torch.manual_seed(1)
    mine = HHNet(name, 16).double().eval().backbone
    theirs = timm.create_model(name, num_classes=0).double().eval()
    theirs.load_state_dict(mine.net.state_dict())
    x_BCHW = torch.rand(3, 3, 32, 32, dtype=torch.float64)
    mine(x_BCHW).square().sum().backward()
    theirs(x_BCHW).square().sum().backward()
    torch.testing.assert_close(mine(x_BCHW), theirs(x_BCHW), rtol=1e-9, atol=1e-12)
    expected = dict(theirs.named_parameters())
    for key, parameter in mine.net.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[key].grad, rtol=1e-7, atol=1e-12, msg=key)


def test_no_convolution_is_left_for_a_map_of_one_cell(model: HHNet, monkeypatch: pytest.MonkeyPatch) -> None:
    sides = []
    convolve = nn.Conv2d.forward

    def noted(self: nn.Conv2d, x_BCHW: torch.Tensor) -> torch.Tensor:
        made = convolve(self, x_BCHW)
        sides.append(max(made.shape[-2:]))
        return made

    monkeypatch.setattr(nn.Conv2d, "forward", noted)
    with torch.no_grad():
        model(torch.zeros(1, 3, 32, 32))
    assert min(sides) > 1


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("size", "stride", "padding", "side"),
    [
        (size, stride, padding, side)
        for size, stride, padding in [(1, 1, 0), (3, 1, 1), (3, 2, 1), (3, 2, 0), (4, 4, 0), (7, 2, 3), (5, 8, 2)]
        for side in [(1, 1), (1, 2), (2, 1), (2, 2), (1, 4), (3, 3), (4, 4), (5, 5)]
        if min(side) + 2 * padding >= size
    ],
)
def test_a_convolution_of_a_small_map_is_the_convolution(
    size: int, stride: int, padding: int, side: tuple[int, int], bias: bool
) -> None:
    plain = nn.Conv2d(5, 7, size, stride, padding, bias=bias, dtype=torch.float64)
    quick = SmallMapConv2d(5, 7, size, stride, padding, bias=bias, dtype=torch.float64)
    quick.load_state_dict(plain.state_dict())
    for layout in (torch.contiguous_format, torch.channels_last):
        x_BCHW = torch.rand(2, 5, *side, dtype=torch.float64).contiguous(memory_format=layout)
        torch.testing.assert_close(quick(x_BCHW), plain(x_BCHW), rtol=1e-10, atol=1e-12)


def test_hash_layer_starts_as_published(model: HHNet) -> None:
    assert isinstance(model.head, nn.Linear)
    assert model.head.weight.shape == (16, 2048)
    assert model.head.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert abs(model.head.weight.mean().item()) < 3e-4
    assert not model.head.bias.any()


def test_heads() -> None:
    x = torch.randn(4, 3, 32, 32)
    kinds = {"linear": None, "bn": nn.BatchNorm1d, "ln": nn.LayerNorm}
    assert set(HEADS) == set(kinds)
    for head, kind in kinds.items():
        net = HHNet("resnet18", 16, head=head)
        assert net(x).shape == (4, 16)
        if kind is not None:
            assert isinstance(net.head, nn.Sequential) and isinstance(net.head[1], kind)
            assert (net.head[0].bias is None) == (head == "bn")
            assert net.head[0].weight.std().item() == pytest.approx(0.01, rel=0.05)


@pytest.mark.parametrize("name", [SMALL, "resnet18", "resnet50"])
@pytest.mark.parametrize("stride", [1, 2, 4])
def test_stem_stride(name: str, stride: int) -> None:
    net = meta(name, stem_stride=stride)
    maps: dict[str, Any] = {}
    layer = net.backbone.net.layer1
    layer.register_forward_hook(lambda module, inputs, output: maps.setdefault("out", output))  # type: ignore[union-attr, operator]
    net(torch.empty(2, 3, 64, 64, device="meta"))
    assert maps["out"].shape[-2:] == (64 // stride, 64 // stride)


def test_a_stem_without_a_choice_is_refused() -> None:
    for name in ("vgg16", "alexnet", "resnet50d"):
        with pytest.raises(ValueError, match=f"{name} has no adjustable stem: stem_stride must be 4, got 2"):
            meta(name, stem_stride=2)
    with pytest.raises(ValueError, match="stem_stride must be 1, 2 or 4: got 3"):
        meta(SMALL, stem_stride=3)


@pytest.mark.parametrize("branches", [(1,), (2, 4), (1, 2, 3)])
def test_features_are_made_of_the_branches_that_are_read(branches: tuple[int, ...], tmp_path: Path) -> None:
    """Beside timm's network of the same weights, whose last maps are added up here; every weight that stays learns."""
    torch.manual_seed(2)
    theirs = timm.create_model(SMALL, num_classes=0).double().eval()
    safetensors.torch.save_file(theirs.state_dict(), tmp_path / "all.safetensors")
    mine = HHNet(SMALL, 16, branches=branches, weights=tmp_path / "all.safetensors").double().eval()
    x_BCHW = torch.rand(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        maps = theirs.stages(theirs.act2(theirs.bn2(theirs.conv2(theirs.act1(theirs.bn1(theirs.conv1(x_BCHW)))))))
        y_BCHW = None
        for place in range(4):
            down = None if y_BCHW is None else theirs.downsamp_modules[place - 1](y_BCHW)
            own = theirs.incre_modules[place](maps[place]) if place + 1 in branches else None
            y_BCHW = own if down is None else down if own is None else own + down
        expected_BD = theirs.final_layer(y_BCHW).mean((2, 3))
    features_BD = mine.backbone(x_BCHW)
    torch.testing.assert_close(features_BD, expected_BD, rtol=1e-6, atol=1e-8)
    features_BD.square().sum().backward()
    assert all(weight.grad is not None for weight in mine.backbone.parameters())
    again, _ = model_from_bytes(model_to_bytes(mine.float()), card(mine, PREPROCESS))
    assert again.branches == list(branches)
    assert torch.equal(again.backbone(x_BCHW.float()), mine.backbone(x_BCHW.float()))


def test_branches_that_are_not_there_are_refused(model: HHNet) -> None:
    for wrong in ((), (0,), (2, 1), (1, 1), (5,)):
        with pytest.raises(ValueError, match="branches must be some of 1 to 4 in this order: got"):
            meta(SMALL, branches=wrong)
    with pytest.raises(ValueError, match="resnet18 has no branches: they are HRNet's"):
        meta("resnet18", branches=(1,))
    with pytest.raises(ValueError, match="model card needs branches as a list of int: got '1'"):
        model_from_bytes(model_to_bytes(model), {**card(model, PREPROCESS), "branches": "1"})


def test_image_size(model: HHNet) -> None:
    with pytest.raises(ValueError, match=r"multiples of 32 pixels: got 40x32; change data.image_size"):
        model(torch.zeros(1, 3, 40, 32))
    assert meta(SMALL, stem_stride=1)(torch.empty(2, 3, 40, 32, device="meta")).shape == (2, 16)
    with pytest.raises(ValueError, match="at least 63 pixels: got 62x62"):
        meta("alexnet")(torch.empty(1, 3, 62, 62, device="meta"))
    assert meta("alexnet")(torch.empty(1, 3, 63, 63, device="meta")).shape == (1, 16)
    with pytest.raises(ValueError, match="at least 32 pixels"):
        meta("vgg16_bn")(torch.empty(1, 3, 31, 40, device="meta"))


@pytest.mark.parametrize("bits", [0, -8, 4, 12, 4104, 16.0, True])
def test_bits(bits: Any) -> None:
    with pytest.raises(ValueError, match=rf"bits must be a multiple of 8 from 8 to 4096: got {bits}$"):
        HHNet("resnet18", bits)


def test_names() -> None:
    with pytest.raises(ValueError, match=r"unknown backbone 'hrnet_w19': did you mean .*hrnet_w18"):
        HHNet("hrnet_w19", 16)
    with pytest.raises(ValueError, match="unknown backbone 'qqq': see timm"):
        HHNet("qqq", 16)
    with pytest.raises(ValueError, match=r"unknown weight tag 'hrnet_w18.foo': known are .*hrnet_w18.ms_in1k"):
        HHNet("hrnet_w18.foo", 16)
    with pytest.raises(ValueError, match="head must be one of linear, bn, ln, ln_rotated, class_index: got 'mlp'"):
        HHNet("resnet18", 16, head="mlp")
    for name in ("alexnet", "hrnet_w18.ms_in1k", "hrnet_w48", "vgg16.tv_in1k"):
        check_backbone_name(name)


def test_timm_weights_need_a_pinned_tag() -> None:
    with pytest.raises(ValueError, match=r"pinned tag.*name one of hrnet_w18.ms_aug_in1k, hrnet_w18.ms_in1k"):
        HHNet("hrnet_w18", 16, weights="timm")
    with pytest.raises(ValueError, match="give a safetensors file"):
        HHNet("alexnet", 16, weights="timm")


def test_timm_weights_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    def create_model(name: str, pretrained: bool, num_classes: int) -> nn.Module:
        assert (name, pretrained, num_classes) == ("resnet18.tv_in1k", True, 0)
        raise OSError("no route\nto host")

    monkeypatch.setattr(timm, "create_model", create_model)
    with pytest.raises(ValueError, match=r"nor could they be fetched \(no route\): give a safetensors file instead$"):
        HHNet("resnet18.tv_in1k", 16, weights="timm")


def test_weights_from_a_file(tmp_path: Path) -> None:
    full = timm.create_model("resnet18", num_classes=10)
    state = full.state_dict()
    path = tmp_path / "resnet.safetensors"
    safetensors.torch.save_file(state, path)
    net = HHNet("resnet18", 16, weights=path)
    for key, value in net.backbone.net.state_dict().items():
        assert torch.equal(value, state[key])
    bare = {key: value for key, value in state.items() if not key.startswith("fc.") and "num_batches" not in key}
    safetensors.torch.save_file(bare, path)
    HHNet("resnet18", 16, weights=str(path), stem_stride=2)
    with pytest.raises(ValueError, match="3x3 stem that trained weights do not fit: use 2 or 4"):
        HHNet("resnet18", 16, weights=path, stem_stride=1)
    with pytest.raises(ValueError, match=r"and backbone resnet34 do not fit: missing layer1.2.* and \d+ more"):
        HHNet("resnet34", 16, weights=path)
    safetensors.torch.save_file({**bare, "extra": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"do not fit: unknown extra$"):
        HHNet("resnet18", 16, weights=path)
    safetensors.torch.save_file({**bare, "conv1.weight": torch.zeros(64, 3, 3, 3)}, path)
    with pytest.raises(ValueError, match=r"conv1.weight is torch.float32\[64, 3, 3, 3\], not .*\[64, 3, 7, 7\]$"):
        HHNet("resnet18", 16, weights=path)
    path.write_bytes(b"not weights")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        HHNet("resnet18", 16, weights=path)
    with pytest.raises(FileNotFoundError, match=r"none.safetensors does not exist"):
        HHNet("resnet18", 16, weights=tmp_path / "none.safetensors")


@pytest.mark.parametrize("wrapper", ["module.", "model.", "module._orig_mod."])
def test_names_in_a_weights_file_may_have_what_a_wrapper_put_before_them(wrapper: str, tmp_path: Path) -> None:
    state = {f"{wrapper}{key}": value for key, value in timm.create_model("test_resnet").state_dict().items()}
    safetensors.torch.save_file(state, tmp_path / "wrapped.safetensors")
    net = HHNet("test_resnet", 16, weights=tmp_path / "wrapped.safetensors")
    assert net.backbone.stripped == wrapper
    for key, value in net.backbone.net.state_dict().items():
        assert torch.equal(value, state[f"{wrapper}{key}"])


def test_alexnet_weights_leave_out_the_classifier(tmp_path: Path) -> None:
    state = {k: torch.full(v.shape, 0.5) for k, v in meta("alexnet").backbone.net.state_dict().items()}
    path = tmp_path / "alexnet.safetensors"
    safetensors.torch.save_file({**state, "classifier.6.weight": torch.zeros(10, 4096)}, path)
    loaded = HHNet("alexnet", 16, weights=path)
    assert not any(key.startswith("backbone.net.classifier.6") for key in loaded.state_dict())
    assert torch.equal(loaded.backbone.net.state_dict()["features.0.weight"], state["features.0.weight"])


def test_param_groups(model: HHNet) -> None:
    groups = {g["name"]: g for g in model.param_groups(1e-3, weight_decay=5e-4, backbone_scale=0.1)}
    assert set(groups) == {"backbone", "backbone.no_decay", "head", "head.no_decay"}
    assert {g["lr"] for n, g in groups.items() if n.startswith("head")} == {1e-3}
    assert {g["lr"] for n, g in groups.items() if n.startswith("backbone")} == {1e-3 * 0.1}
    for name, group in groups.items():
        decayed = not name.endswith("no_decay")
        assert group["weight_decay"] == (5e-4 if decayed else 0)
        assert all((param.ndim > 1) == decayed for param in group["params"])
    params = [id(param) for group in groups.values() for param in group["params"]]
    assert sorted(params) == sorted(id(param) for param in model.parameters())
    torch.optim.SGD(list(groups.values()))


@pytest.mark.parametrize("backbone", ["hrnet_w18_small", "resnet18", "vgg16", "test_convnext", "alexnet"])
def test_rates_fall_block_by_block_towards_the_image(backbone: str) -> None:
    net = meta(backbone)
    groups = net.param_groups(1.0, weight_decay=5e-4, backbone_scale=0.1, layer_decay=0.5)
    rate = {id(param): group["lr"] for group in groups for param in group["params"]}
    assert len(rate) == sum(len(group["params"]) for group in groups) == len(list(net.parameters()))
    assert {rate[id(param)] for param in net.head.parameters()} == {1.0}
    along = list(dict.fromkeys(rate[id(param)] for param in net.backbone.parameters()))
    assert len(along) >= 5 and sorted(along) == pytest.approx([0.1 * 0.5**n for n in reversed(range(len(along)))])
    first, *_, last = [rate[id(param)] for param in net.backbone.parameters()]
    assert (first, last) == (min(along), max(along))
    assert all((param.ndim > 1) == (group["weight_decay"] > 0) for group in groups for param in group["params"])


def test_round_trip_is_bit_equal(model: HHNet) -> None:
    weights = model_to_bytes(model)
    assert weights == model_to_bytes(model)
    description = json.loads(json.dumps(card(model, PREPROCESS, classes=["a"], precision="fp32")))
    state = torch.get_rng_state()
    loaded, preprocess = model_from_bytes(weights, description)
    assert torch.equal(torch.get_rng_state(), state)
    assert preprocess == PREPROCESS and not loaded.training
    assert (loaded.backbone_name, loaded.bits, loaded.head_name, loaded.stem_stride) == (SMALL, 16, "linear", 4)
    assert model_to_bytes(loaded) == weights
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(x), loaded(x))


def test_round_trip_of_other_heads_and_stems() -> None:
    net = HHNet("resnet18", 8, head="bn", stem_stride=1)
    loaded, _ = model_from_bytes(model_to_bytes(net), card(net, PREPROCESS))
    assert model_to_bytes(loaded) == model_to_bytes(net)


def test_card_keeps_its_own_keys(model: HHNet) -> None:
    with pytest.raises(ValueError, match="the card has its own bits"):
        card(model, PREPROCESS, bits=8)


def test_bad_cards_and_weights() -> None:
    net = HHNet("resnet18", 8)
    weights, good = model_to_bytes(net), card(net, PREPROCESS)
    for change, message in (
        ({"format": 2}, "format 2, this version reads 1"),
        ({"format": None}, "format None"),
        ({"bits": "8"}, "needs bits as int: got '8'"),
        ({"bits": True}, "needs bits as int: got True"),
        ({"head": None}, "needs head as str"),
        ({"preprocess": {}}, "preprocess must have just the keys"),
        ({"bits": 16}, r"model weights and card do not fit: .*head"),
        ({"backbone": "resnet19"}, "unknown backbone"),
        ({"head": "ln"}, "do not fit: missing head.0.bias"),
    ):
        with pytest.raises(ValueError, match=message):
            model_from_bytes(weights, {**good, **change})
    with pytest.raises(ValueError, match="not safetensors"):
        model_from_bytes(weights[:-1], good)
    with pytest.raises(ValueError, match="not safetensors"):
        model_from_bytes(b"", good)


def write_artifact(root: Path, weights: bytes, description: bytes) -> dict[str, Any]:
    (root / "parts").mkdir(parents=True)
    parts = []
    for suffix, data in ((".safetensors", weights), (".json", description)):
        sha256 = hashlib.sha256(data).hexdigest()
        name = f"parts/model-{sha256[:16]}{suffix}"
        (root / name).write_bytes(data)
        parts.append({"path": name, "bytes": len(data), "sha256": sha256, "rows": 0})
    manifest = {"format": 1, "kind": "model", "parts": parts}
    (root / "manifest.json").write_text(json.dumps(manifest))
    return manifest


@pytest.fixture
def artifact(tmp_path: Path) -> tuple[Path, dict[str, Any], HHNet]:
    net = HHNet("resnet18", 8)
    root = tmp_path / "model"
    return root, write_artifact(root, model_to_bytes(net), json.dumps(card(net, PREPROCESS)).encode()), net


def test_load_model(artifact: tuple[Path, dict[str, Any], HHNet]) -> None:
    root, _, net = artifact
    for path in (root, str(root)):
        loaded, preprocess = load_model(path)
        assert preprocess == PREPROCESS and not loaded.training
        assert model_to_bytes(loaded) == model_to_bytes(net)


@pytest.mark.parametrize("which", [0, 1])
def test_tampered_parts_are_refused(artifact: tuple[Path, dict[str, Any], HHNet], which: int) -> None:
    root, manifest, _ = artifact
    path = root / manifest["parts"][which]["path"]
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="does not match its sha256"):
        load_model(root)
    path.write_bytes(data[:-1])
    with pytest.raises(ValueError, match=f"has {len(data) - 1} bytes, not {len(data)}"):
        load_model(root)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="is missing"):
        load_model(root)


def test_folders_that_are_no_model(artifact: tuple[Path, dict[str, Any], HHNet]) -> None:
    root, manifest, _ = artifact
    with pytest.raises(FileNotFoundError, match="give the root of a finished model artifact"):
        load_model(root / "parts")
    outside = [{**part, "path": f"../model/{part['path']}"} for part in manifest["parts"]]
    absolute = [{**part, "path": str(root / part["path"])} for part in manifest["parts"]]
    for text, message in (
        ("{", "is not JSON"),
        ("[]", "must hold a JSON object: got list"),
        (json.dumps({**manifest, "kind": "codes"}), "kind 'codes', not a model"),
        (json.dumps({**manifest, "parts": 3}), "no list of parts"),
        (json.dumps({**manifest, "parts": manifest["parts"][:1]}), "does not name"),
        (json.dumps({**manifest, "parts": outside}), "names a part outside"),
        (json.dumps({**manifest, "parts": absolute}), "names a part outside"),
    ):
        (root / "manifest.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            load_model(root)


def test_training_moves_every_weight() -> None:
    torch.manual_seed(0)
    net = HHNet(SMALL, 8, stem_stride=1)
    before = {name: param.detach().clone() for name, param in net.named_parameters()}
    optimiser = torch.optim.SGD(net.param_groups(0.1))
    x = torch.randn(4, 3, 32, 32).to(memory_format=torch.channels_last)
    for _ in range(3):  # residual branches start at zero: what lies inside them moves from the second step on
        optimiser.zero_grad()
        net(x).square().mean().backward()
        optimiser.step()
    still = [name for name, param in net.named_parameters() if torch.equal(param, before[name])]
    assert not still


def test_residual_blocks_of_hrnet_start_as_the_identity() -> None:
    blocks = [m for m in HHNet("hrnet_w18_small", 16).backbone.modules() if isinstance(m, BasicBlock | Bottleneck)]
    last = [block.bn3 if isinstance(block, Bottleneck) else block.bn2 for block in blocks]
    assert len(last) == 23
    assert not any(norm.weight.any() for norm in last)
