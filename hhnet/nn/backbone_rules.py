"""Rules on backbones that need no network: their names, their weight tags, and the image sides that they take.

They are apart from `backbones` so that a mistake is found before torch is imported.
"""

import difflib
import importlib.util
import re
from collections.abc import Collection
from functools import cache
from pathlib import Path

_REGISTERED = re.compile(r"^@register_model\n(?:@.*\n)*def (\w+)\(", re.MULTILINE)
_TAG = re.compile(r"""["'](\w+\.\w+)["']:""")


@cache
def timm_names() -> frozenset[str]:
    """Return the names of timm's models, read from its source; none if timm is not found.

    Plain names are complete. Of those with a tag some may lack: those that timm makes by code.

    timm itself has these names only once it is imported, and torch with it.
    """
    found = importlib.util.find_spec("timm")
    folders = found.submodule_search_locations or () if found else ()
    names: set[str] = set()
    for file in (file for folder in folders for file in Path(folder, "models").glob("*.py")):
        text = file.read_text(encoding="utf-8")
        own = set(_REGISTERED.findall(text))
        names |= own | {name for name in _TAG.findall(text) if name.partition(".")[0] in own}
    return frozenset(names)


def require_backbone(name: str, known: Collection[str]) -> None:
    """Raise ValueError, naming what is near, unless `name` is "alexnet" or in `known`, whose names may have tags."""
    if name == "alexnet" or name in known:
        return
    plain, _, tag = name.partition(".")
    if not tag or plain not in known:
        near = difflib.get_close_matches(plain, [*sorted(one for one in known if "." not in one), "alexnet"], n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "see timm.list_models()"
        raise ValueError(f"unknown backbone {name!r}: {hint}")
    raise ValueError(f"unknown weight tag {name!r}: known are {', '.join(tags_of(plain, known)) or 'none'}")


def require_pinned(name: str, weights: str | None, known: Collection[str]) -> None:
    """Raise ValueError, naming the tags in `known`, where timm's weights are wanted for a name without a tag."""
    if weights == "timm" and "." not in name:
        tags = tags_of(name, known)
        hint = f"name one of {', '.join(tags)}" if tags else "give a safetensors file"
        raise ValueError(f"weights='timm' needs a pinned tag, {name!r} may change its meaning: {hint}")


def tags_of(plain: str, known: Collection[str]) -> list[str]:
    """Return the names in `known` that are `plain` with a tag, sorted."""
    return sorted(name for name in known if name.partition(".")[0] == plain and name != plain)


def is_hrnet(name: str) -> bool:
    """Tell whether timm builds an HRNet under this name."""
    return name.startswith("hrnet_")


def require_sides(name: str, stem_stride: int, height: int, width: int, hrnet: bool) -> None:
    """Raise ValueError where the sides of an image, in pixels, are none that the network takes.

    HRNet upsamples its coarsest branch by exactly 8 and adds it to the finest, so both must line up.
    """
    multiple = 8 * stem_stride if hrnet else 1
    # torchvision's least sides for these two families: below them pooling leaves no cell.
    family = name.split(".")[0].rstrip("_bn0123456789")
    minimum = multiple if hrnet else {"alexnet": 63, "vgg": 32}.get(family, 1)
    if height % multiple or width % multiple:
        raise ValueError(
            f"{name} with stem_stride={stem_stride} needs image sides that are multiples of {multiple} pixels: got "
            f"{height}x{width}; change data.image_size"
        )
    if min(height, width) < minimum:
        raise ValueError(
            f"{name} needs images of at least {minimum} pixels: got {height}x{width}; raise data.image_size"
        )
