"""Training losses by name: each other module of this package than `base` is a loss, and its name is the module's.

The names are known without importing torch; a loss imports it.
"""

import difflib
import importlib
import inspect
import pkgutil
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hhnet.nn.losses.base import HashLoss

__all__ = ["loss_names", "make_loss", "require_loss"]

_INTEGER_OPTIONS = {"seed", "start"}
"""Options that are whole numbers; a configuration file gives them as floats."""


def loss_names() -> tuple[str, ...]:
    """Return the names that `make_loss` knows, sorted."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name != "base"))


def require_loss(name: str) -> None:
    """Raise ValueError, naming the nearest loss, unless `name` is one of `loss_names()`."""
    if name not in (names := loss_names()):
        near = difflib.get_close_matches(name.lower(), names, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(names)}"
        raise ValueError(f"unknown loss {name!r}: {hint}")


def make_loss(name: str, bits: int, classes: int, **options: Any) -> "HashLoss":
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
    require_loss(name)
    loss = _loss_class(name)
    known = [key for key in inspect.signature(loss).parameters if key not in ("bits", "classes")]
    if unknown := sorted(options.keys() - set(known)):
        raise ValueError(f"loss {name} has no option {', '.join(unknown)}: known are {', '.join(known)}")
    for key in options.keys() & _INTEGER_OPTIONS:
        if options[key] < 0 or not float(options[key]).is_integer():
            raise ValueError(f"{key} must be a whole number of at least 0: got {options[key]}")
        options[key] = int(options[key])
    return loss(bits, classes, **options)


def _loss_class(name: str) -> "type[HashLoss]":
    """Import the module of a loss and return the one subclass of `HashLoss` that it defines."""
    from hhnet.nn.losses.base import HashLoss

    module = importlib.import_module(f"{__name__}.{name}")
    classes = (value for value in vars(module).values() if isinstance(value, type) and issubclass(value, HashLoss))
    (loss,) = (value for value in classes if value.__module__ == module.__name__)
    return loss
