"""Training losses by name.

To add one, write it in a file of its own and enter it in `_LOSSES`.
"""

import difflib
import inspect
from typing import Any

from hhnet.nn.losses.base import HashLoss
from hhnet.nn.losses.ce import CE
from hhnet.nn.losses.cel import CEL
from hhnet.nn.losses.csq import CSQ
from hhnet.nn.losses.dch import DCH
from hhnet.nn.losses.dhd import DHD
from hhnet.nn.losses.dhn import DHN
from hhnet.nn.losses.dpn import DPN
from hhnet.nn.losses.dpsh import DPSH
from hhnet.nn.losses.dsh import DSH
from hhnet.nn.losses.greedyhash import GreedyHash
from hhnet.nn.losses.hashnet import HashNet
from hhnet.nn.losses.hhf import HHF
from hhnet.nn.losses.hyp2 import HyP2
from hhnet.nn.losses.mdsh import MDSH
from hhnet.nn.losses.orthohash import OrthoHash
from hhnet.nn.losses.wglhh import WGLHH

__all__ = ["HashLoss", "loss_names", "make_loss"]

_LOSSES: dict[str, type[HashLoss]] = {
    "ce": CE,
    "cel": CEL,
    "csq": CSQ,
    "dch": DCH,
    "dhd": DHD,
    "dhn": DHN,
    "dpn": DPN,
    "dpsh": DPSH,
    "dsh": DSH,
    "greedyhash": GreedyHash,
    "hashnet": HashNet,
    "hhf": HHF,
    "hyp2": HyP2,
    "mdsh": MDSH,
    "orthohash": OrthoHash,
    "wglhh": WGLHH,
}
_WHOLE = {"seed", "start"}
"""Options that are whole numbers; a configuration file gives them as floats."""


def loss_names() -> tuple[str, ...]:
    """Return the names that `make_loss` knows, sorted."""
    return tuple(sorted(_LOSSES))


def make_loss(name: str, bits: int, classes: int, **options: Any) -> HashLoss:
    """Build a loss.

    Args:
        name: one of `loss_names()`.
        bits: K, the length of the codes.
        classes: C, the width of the multi-hot labels.
        options: settings of that loss, see its class; the defaults are its authors'.

    Raises:
        ValueError: for an unknown name or option, naming those that exist, and for values that make no sense.

    Warns where `bits` cannot tell `classes` apart: some then share a code.
    """
    if name not in _LOSSES:
        near = difflib.get_close_matches(name.lower(), _LOSSES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(loss_names())}"
        raise ValueError(f"unknown loss {name!r}: {hint}")
    known = [key for key in inspect.signature(_LOSSES[name]).parameters if key not in ("bits", "classes")]
    if unknown := sorted(options.keys() - set(known)):
        raise ValueError(f"loss {name} has no option {', '.join(unknown)}: known are {', '.join(known)}")
    for key in options.keys() & _WHOLE:
        if options[key] < 0 or not float(options[key]).is_integer():
            raise ValueError(f"{key} must be a whole number of at least 0: got {options[key]}")
        options[key] = int(options[key])
    return _LOSSES[name](bits, classes, **options)
