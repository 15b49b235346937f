"""Feature extractors: any timm model, or torchvision's AlexNet, without its classifier.

HRNet gives its classification-head features: the four resolutions are widened (`incre_modules`), added from
fine to coarse (`downsamp_modules`), mapped to 2048 channels (`final_layer`) and averaged
(HRNet-Image-Classification, `lib/models/cls_hrnet.py`; timm `timm/models/hrnet.py`).

Shape suffixes: B images, C channels, H height, W width, D feature dimension.
"""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import safetensors
import safetensors.torch
import timm
import torch
from timm.models import group_parameters
from timm.models.hrnet import HighResolutionNet
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn
from torchvision.models import alexnet

from hhnet.nn.backbone_rules import require_backbone, require_pinned, require_sides

WRAPPERS = ("module.", "model.", "_orig_mod.")
"""Prefixes of weight names, from DistributedDataParallel, from a module that holds the network, and from
torch.compile."""
STEM_STRIDES = (1, 2, 4)
"""Pixels per cell of the finest feature map that a stem can have."""
_ALEXNET_BLOCKS = {"features": r"^features\.(\d+)", "classifier": r"^classifier\.(\d+)"}
"""AlexNet's blocks as patterns of parameter names, in the form of timm's `group_matcher`."""


class Backbone(nn.Module):
    """A network from images to pooled features.

    Attributes:
        name: the name as given, with its timm tag if it has one.
        stem_stride: pixels per cell of the finest feature map.
        feature_dim: D.
    """

    def __init__(
        self, name: str, stem_stride: int = 4, weights: str | Path | None = None, branches: Sequence[int] | None = None
    ) -> None:
        """Build the network; `HHNet` explains the arguments and the errors."""
        super().__init__()
        self.name, self.stem_stride = name, stem_stride
        self.stripped = ""
        """The prefix that every name in the weights file had, removed when they were loaded."""
        net = _create(name, pretrained=weights == "timm")
        _set_stem(net, name, stem_stride, pretrained=weights is not None)
        if weights is None:
            _start_residuals_at_identity(net)
        elif weights != "timm":
            self.stripped = _load(net, name, Path(cast(str, weights)))
        if branches is not None:
            _read_only(net, name, branches)
        _speed_up_small_maps(net)
        self.net = net
        self.feature_dim = 4096 if name == "alexnet" else int(cast(Any, net).head_hidden_size)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Map normalised images (B, 3, H, W) to features (B, D).

        Raises:
            ValueError: if H or W is too small or not a multiple of what the network needs.
        """
        height, width = x_BCHW.shape[-2:]
        require_sides(self.name, self.stem_stride, height, width, isinstance(self.net, HighResolutionNet))
        if self.name == "alexnet":
            return cast(Tensor, self.net(x_BCHW))
        net = cast(Any, self.net)
        return cast(Tensor, net.forward_head(net.forward_features(x_BCHW), pre_logits=True))

    def blocks(self) -> list[list[nn.Parameter]]:
        """Return the parameters by block, from the image on: the stem, each stage, and the layers after them.

        Raises:
            ValueError: for a network whose layers have no stated blocks.
        """
        net = cast(Any, self.net)
        if self.name != "alexnet" and not hasattr(net, "group_matcher"):
            raise ValueError(f"{self.name} does not say which of its layers make a block: set it to 1")
        matcher = _ALEXNET_BLOCKS if self.name == "alexnet" else net.group_matcher(coarse=True)
        places = group_parameters(net, matcher, reverse=True)
        blocks: list[list[nn.Parameter]] = [[] for _ in range(1 + max(places.values()))]
        for name, parameter in net.named_parameters():
            blocks[places[name]].append(parameter)
        return [block for block in blocks if block]


class ZeroBranch(nn.Module):
    """Stands in for removed HRNet layers; returns zero, so the sum of the branches is unchanged."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return a scalar zero, which broadcasts in any sum."""
        return x_BCHW.new_zeros(())


def _read_only(net: nn.Module, name: str, branches: Sequence[int]) -> None:
    """Remove the layers that only lead from the other branches' last maps to the features.

    The other branches themselves stay: up to the last exchange each of them still feeds all others.
    """
    if not isinstance(net, HighResolutionNet):
        raise ValueError(f"{name} has no branches: they are HRNet's")
    count = len(net.incre_modules)
    if not branches or list(branches) != sorted(set(branches)) or not set(branches) <= set(range(1, count + 1)):
        raise ValueError(f"branches must be some of 1 to {count} in this order: got {list(branches)}")
    exchange = cast(Any, net.stage4)[-1].fuse_layers
    for place in set(range(count)) - {branch - 1 for branch in branches}:
        net.incre_modules[place] = ZeroBranch()
        exchange[place] = nn.ModuleList([ZeroBranch()])
    for place in range(min(branches) - 1):  # no finer branch is left whose map these would bring down
        net.downsamp_modules[place] = ZeroBranch()


class SmallMapConv2d(nn.Conv2d):
    """A convolution that is one matrix product where its output is a single cell.

    Small images leave the coarse branches with maps of 1x1 or 2x2 cells, where most of each kernel lies on the padding.
    An ordinary convolution multiplies by that padding all the same, and its gradient is slow for one cell: at 32 pixels
    a single layer of HRNet-W18-small took a third of a training step.
    """

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Convolve as Conv2d does, up to the order of sums.

        The padding is zeros and less than the kernel; there are no groups and no dilation.
        """
        (height, width), (rows, columns) = x_BCHW.shape[-2:], self.kernel_size
        (down, right), (top, left) = self.stride, cast(tuple[int, int], self.padding)
        if height + 2 * top - rows >= down or width + 2 * left - columns >= right:
            return super().forward(x_BCHW)
        seen = x_BCHW[:, :, : rows - top, : columns - left]
        taps = self.weight[:, :, top : top + seen.shape[2], left : left + seen.shape[3]]
        return nn.functional.linear(seen.flatten(1), taps.flatten(1), self.bias)[:, :, None, None]


def _speed_up_small_maps(net: nn.Module) -> None:
    """Turn every convolution that can be one into a SmallMapConv2d; weights and their names stay."""
    for module in net.modules():
        if type(module) is nn.Conv2d and _is_plain(module):
            module.__class__ = SmallMapConv2d  # it adds no state, so nothing has to be built or copied


def _is_plain(conv: nn.Conv2d) -> bool:
    if conv.groups != 1 or conv.dilation != (1, 1) or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return False
    return all(padding < size for padding, size in zip(conv.padding, conv.kernel_size, strict=True))


def check_backbone_name(name: str) -> None:
    """Raise ValueError, naming near matches, unless `name` is "alexnet" or a timm model, with or without tag."""
    plain = name.partition(".")[0]
    require_backbone(name, [*timm.list_models(include_tags=False), *_tags(plain)])


def _tags(plain: str) -> list[str]:
    return [name for name in timm.list_pretrained(f"{plain}.*") if name.partition(".")[0] == plain]


def _create(name: str, pretrained: bool) -> nn.Module:
    check_backbone_name(name)
    require_pinned(name, "timm" if pretrained else None, [] if name == "alexnet" else _tags(name))
    if name == "alexnet":
        net: nn.Module = alexnet(weights=None)
        cast(Any, net).classifier[6] = nn.Identity()
        return net
    try:
        with _quiet_hub():
            return cast(nn.Module, timm.create_model(name, pretrained=pretrained, num_classes=0))
    except OSError as error:
        cache = os.environ.get("HF_HUB_CACHE") or os.environ.get("HF_HOME") or "~/.cache/huggingface"
        raise ValueError(
            f"weights of {name} are neither in the hub's cache ({cache}) nor could they be fetched "
            f"({str(error).splitlines()[0][:120]}): give a safetensors file instead"
        ) from error


@contextmanager
def _quiet_hub() -> Iterator[None]:
    """Silence the hub client's log line for each attempt: the caller reports the outcome once."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _start_residuals_at_identity(net: nn.Module) -> None:
    """Zero the scale of the last norm of every residual block (Goyal et al., arXiv 1706.02677, section 5.1).

    timm does this for ResNet but not for HRNet. HRNet sums many branches and needs it more: without it, training from
    random weights is far slower, and the two families could not be compared.
    """
    for module in net.modules():
        if isinstance(module, BasicBlock | Bottleneck):
            module.zero_init_last()


def _set_stem(net: nn.Module, name: str, stride: int, pretrained: bool) -> None:
    """Change the stride of the stem.

    HRNet: 4 = both 3x3 convolutions stride 2 (the original), 2 = only the first, 1 = none.
    ResNet: 4 = 7x7 stride 2 and max pooling (the original), 2 = without the pooling, 1 = one 3x3 convolution
    stride 1 without pooling, as for CIFAR in He et al. 2015, section 4.2.
    """
    if stride not in STEM_STRIDES:
        raise ValueError(f"stem_stride must be 1, 2 or 4: got {stride}")
    if stride == 4:
        return
    if isinstance(net, HighResolutionNet):
        net.conv2.stride = (1, 1)
        net.conv1.stride = (stride, stride)
    elif isinstance(net, ResNet) and isinstance(net.conv1, nn.Conv2d) and net.conv1.kernel_size == (7, 7):
        net.maxpool = nn.Identity()
        if stride == 1:
            if pretrained:
                raise ValueError(
                    f"{name} with stem_stride=1 has a 3x3 stem that trained weights do not fit: use 2 or 4"
                )
            net.conv1 = nn.Conv2d(3, net.conv1.out_channels, 3, stride=1, padding=1, bias=False)
            nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
    else:
        raise ValueError(f"{name} has no adjustable stem: stem_stride must be 4, got {stride}")


def _classifier_prefix(net: nn.Module, name: str) -> str:
    if name == "alexnet":
        return "classifier.6."
    config = cast(Mapping[str, Any], cast(Any, net).pretrained_cfg)
    return f"{config.get('classifier') or 'classifier'}."


def check_state(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], what: str) -> None:
    """Raise ValueError naming up to three keys that are missing, unknown or of another shape or kind of dtype."""
    problems = [f"missing {key}" for key in expected if key not in found]
    problems += [f"unknown {key}" for key in found if key not in expected]
    for key in expected.keys() & found.keys():
        want, got = expected[key], found[key]
        if want.shape != got.shape or want.is_floating_point() != got.is_floating_point():
            problems.append(f"{key} is {got.dtype}{list(got.shape)}, not {want.dtype}{list(want.shape)}")
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(f"{what} do not fit: {'; '.join(sorted(problems)[:3])}{more}")


def _load(net: nn.Module, name: str, path: Path) -> str:
    """Load every tensor but the classifier's from a safetensors file, strictly.

    Returns the prefix that was removed from all names, such as `module.` of DistributedDataParallel.
    """
    if not path.is_file():
        raise FileNotFoundError(f"weights file {path} does not exist: give a .safetensors file or 'timm'")
    try:
        state: dict[str, Tensor] = safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error
    expected = net.state_dict()
    stripped = ""
    while wrapper := next((one for one in WRAPPERS if all(key.startswith(one) for key in state)), None):
        if not state or any(key.startswith(wrapper) for key in expected):
            break
        state = {key.removeprefix(wrapper): value for key, value in state.items()}
        stripped += wrapper
    prefix = _classifier_prefix(net, name)
    state = {key: value for key, value in state.items() if not key.startswith(prefix)}
    for key, value in expected.items():  # older converters drop this counter, which inference never reads
        if key.endswith("num_batches_tracked"):
            state.setdefault(key, torch.zeros_like(value))
    check_state(expected, state, f"weights in {path} and backbone {name}")
    net.load_state_dict(state)
    return stripped
