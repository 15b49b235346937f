"""HHNet: a backbone and a hash layer, and the two files a model is kept in.

The hash layer replaces the classifier: Linear(D, K), weights drawn from N(0, 0.01), zero bias, no hidden
layer (HHNet, arXiv 2403.13747; BioDeepHashing `src/utils/architectures/hrnet.py`), or another one of
`hhnet.nn.heads`. The sign of output j is bit j.

Shape suffixes: B images, C channels, H height, W width, D feature dimension, K bits.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, cast

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from hhnet.nn.backbones import Backbone, check_state
from hhnet.nn.heads import DERIVED_HEADS, HEADS, class_bits, make_head
from hhnet.preprocess import Preprocess

__all__ = ["HHNet", "Preprocess", "card", "load_model", "model_from_bytes", "model_to_bytes"]

CARD_FORMAT = 1
MAX_CLASSES = 1 << 24
"""Largest C that a model card may state, so that a hostile card cannot demand all memory."""
_CARD_TYPES = {"backbone": str, "bits": int, "head": str, "stem_stride": int}


class HHNet(nn.Module):
    """A network from images to real codes: a backbone and a hash layer.

    Args:
        backbone: "alexnet" (torchvision's architecture), or any timm name, best with its weight tag:
            "hrnet_w18.ms_in1k", "resnet18", "vgg16".
        bits: K, a multiple of 8; with the head "class_index" the bits of a class index.
        head: "linear", "bn" (Linear without bias, then BatchNorm1d; OrthoHash) or "ln" (Linear, then
            LayerNorm); or one that `hhnet.nn.rehead` made from these, see `hhnet.nn.heads.make_head`.
        stem_stride: 4 (as trained), or 2 or 1 for small images; HRNet and plain ResNets only.
        weights: None for random weights; "timm" for those of the tag in `backbone`; or a .safetensors file
            with the backbone's weights. A classifier in it is ignored; everything else must fit.
        branches: HRNet only: the branches whose last maps make the features, such as (1,) for the finest alone or
            (2, 3, 4) for all but the finest; None for all. The exchange between the branches stays.
        classes: C, with the head "class_index" only.

    Attributes:
        backbone_name, bits, head_name, stem_stride, branches, classes: as given. feature_dim: D.

    Raises:
        ValueError: for an unknown backbone, head or stem, for bits, and for weights that do not fit.
        FileNotFoundError: if the weights file does not exist.
    """

    def __init__(
        self,
        backbone: str,
        bits: int,
        *,
        head: str = "linear",
        stem_stride: int = 4,
        weights: str | Path | None = None,
        branches: Sequence[int] | None = None,
        classes: int = 0,
    ) -> None:
        super().__init__()
        if head == "class_index":
            if classes < 2 or bits != class_bits(classes):
                raise ValueError(f"a class index needs 2 or more classes and bits for them: got {classes} and {bits}")
        elif isinstance(bits, bool) or not isinstance(bits, int) or bits % 8 or not 8 <= bits <= 4096:
            raise ValueError(f"bits must be a multiple of 8 from 8 to 4096: got {bits}")
        if head not in HEADS + DERIVED_HEADS:
            raise ValueError(f"head must be one of {', '.join(HEADS + DERIVED_HEADS)}: got {head!r}")
        self.backbone_name, self.bits, self.head_name, self.stem_stride = backbone, bits, head, stem_stride
        self.branches, self.classes = branches, classes
        self.backbone = Backbone(backbone, stem_stride, weights, branches)
        self.feature_dim = self.backbone.feature_dim
        self.head = make_head(head, self.feature_dim, bits, classes)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Map normalised images, float (B, 3, H, W), to real codes (B, K).

        Raises:
            ValueError: if the backbone cannot take images of this size.
        """
        return cast(Tensor, self.head(self.backbone(x_BCHW)))

    def param_groups(
        self, lr: float, weight_decay: float = 0.0, backbone_scale: float = 1.0, layer_decay: float = 1.0
    ) -> list[dict[str, Any]]:
        """Return the parameter groups for a torch optimiser, with `name`, `params`, `lr` and `weight_decay`.

        The head learns at `lr`, the backbone at `lr * backbone_scale`. With a `layer_decay` below 1 each block of the
        backbone learns at `layer_decay` times the rate of the next (BEiT, Bao et al. 2022). Biases and the scales of
        normalisation layers have one dimension and are not decayed.
        """
        parts = [("backbone", list(self.backbone.parameters()), lr * backbone_scale)]
        if layer_decay < 1:
            blocks = self.backbone.blocks()
            parts = [
                (f"backbone.{place}", block, lr * backbone_scale * layer_decay ** (len(blocks) - 1 - place))
                for place, block in enumerate(blocks)
            ]
        groups: list[dict[str, Any]] = []
        for name, parameters, rate in (*parts, ("head", list(self.head.parameters()), lr)):
            params = [param for param in parameters if param.requires_grad]
            for suffix, decay, chosen in (
                ("", weight_decay, [param for param in params if param.ndim > 1]),
                (".no_decay", 0.0, [param for param in params if param.ndim <= 1]),
            ):
                if chosen:
                    groups.append({"name": name + suffix, "params": chosen, "lr": rate, "weight_decay": decay})
        return groups


def model_to_bytes(model: HHNet) -> bytes:
    """Serialise the weights as safetensors; the same weights always give the same bytes."""
    state = model.state_dict()
    return safetensors.torch.save({key: state[key].detach().cpu().contiguous() for key in sorted(state)})


def card(model: HHNet, preprocess: Preprocess, **extra: Any) -> dict[str, Any]:
    """Describe a model in JSON values: all that `model_from_bytes` needs, and the keys of `extra`.

    Raises:
        ValueError: if `extra` repeats a key of the card.
    """
    base = {
        "format": CARD_FORMAT,
        "backbone": model.backbone_name,
        "bits": model.bits,
        "head": model.head_name,
        "stem_stride": model.stem_stride,
        **({"branches": list(model.branches)} if model.branches is not None else {}),
        **({"class_count": model.classes} if model.classes else {}),
        "preprocess": preprocess.to_dict(),
    }
    if clash := sorted(base.keys() & extra.keys()):
        raise ValueError(f"the card has its own {', '.join(clash)}: give them other names")
    return {**base, **extra}


def model_from_bytes(weights: bytes, card: Mapping[str, Any]) -> tuple[HHNet, Preprocess]:
    """Rebuild a model, in eval mode on the CPU, from its safetensors bytes and its card.

    Keys of the card that are not needed here are ignored. The global random state is left as it was.

    Raises:
        ValueError: for a newer format, missing or mistyped keys, or weights that do not fit the card.
    """
    if card.get("format") != CARD_FORMAT:
        raise ValueError(f"model card has format {card.get('format')!r}, this version reads {CARD_FORMAT}")
    for key, kind in _CARD_TYPES.items():
        if type(card.get(key)) is not kind:
            raise ValueError(f"model card needs {key} as {kind.__name__}: got {card.get(key)!r}")
    branches = card.get("branches")
    if branches is not None and not (isinstance(branches, list) and all(type(place) is int for place in branches)):
        raise ValueError(f"model card needs branches as a list of int: got {branches!r}")
    if type(classes := card.get("class_count", 0)) is not int or not 0 <= classes <= MAX_CLASSES:
        raise ValueError(f"model card needs class_count as an int up to {MAX_CLASSES}: got {classes!r}")
    preprocess = Preprocess.from_dict(card.get("preprocess", {}))
    try:
        state: dict[str, Tensor] = safetensors.torch.load(weights)
    except safetensors.SafetensorError as error:
        raise ValueError(f"model weights are not safetensors: {error}") from error
    # The random weights drawn here are overwritten below; the caller's random numbers must not depend on them.
    with torch.random.fork_rng(devices=[]):
        model = HHNet(
            *(card["backbone"], card["bits"]),
            head=card["head"],
            stem_stride=card["stem_stride"],
            branches=branches,
            classes=classes,
        )
    check_state(model.state_dict(), state, "model weights and card")
    model.load_state_dict(state)
    return model.eval(), preprocess


def _read_part(root: Path, part: Mapping[str, Any]) -> bytes:
    """Read one part, after checking its name, size and sha256."""
    name = part.get("path")
    if not isinstance(name, str) or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise ValueError(f"manifest of {root} names a part outside of it: {name!r}")
    path = root / name
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: copy the model again")
    if path.stat().st_size != part.get("bytes"):
        raise ValueError(f"{path} has {path.stat().st_size} bytes, not {part.get('bytes')}: copy the model again")
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != part.get("sha256"):
        raise ValueError(f"{path} does not match its sha256 in the manifest: copy the model again")
    return data


def _read_json(data: bytes, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object: got {type(value).__name__}")
    return value


def load_model(path: str | Path) -> tuple[HHNet, Preprocess]:
    """Load a model artifact from a local folder.

    Args:
        path: the artifact's root: `manifest.json` and `parts/model-<sha256[:16]>.{safetensors,json}`.

    Returns:
        The model, in eval mode on the CPU, and its preprocessing.

    Raises:
        FileNotFoundError: if the manifest or a part is missing.
        ValueError: if the folder is not a model artifact, or a part has another size or sha256 than in the manifest.
    """
    root = Path(path)
    manifest_path = root / "manifest.json"
    if not manifest_path.is_file():
        raise FileNotFoundError(f"{manifest_path} does not exist: give the root of a finished model artifact")
    manifest = _read_json(manifest_path.read_bytes(), manifest_path)
    if manifest.get("kind", "model") != "model":
        raise ValueError(f"{root} is an artifact of kind {manifest['kind']!r}, not a model")
    parts = manifest.get("parts")
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        raise ValueError(f"{manifest_path} has no list of parts")
    found: dict[str, dict[str, Any]] = {}
    for part in parts:
        name = PurePosixPath(str(part.get("path", "")))
        if name.name.startswith("model-"):
            found[name.suffix] = part
    if not {".safetensors", ".json"} <= found.keys():
        raise ValueError(f"{manifest_path} does not name model-*.safetensors and model-*.json: not a model")
    weights = _read_part(root, found[".safetensors"])
    description = _read_json(_read_part(root, found[".json"]), root / str(found[".json"]["path"]))
    return model_from_bytes(weights, description)
