"""HHNet: deep hashing with high-resolution networks.

Names load on first use, so codes, search and metrics work without importing torch.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hhnet.codes import pack_bits, unpack_bits
    from hhnet.health import code_drift, code_health
    from hhnet.metrics.retrieval import (
        average_precisions,
        chance_map,
        mean_average_precision,
        precision_at,
        precision_recall_at,
        precision_recall_curve,
        precision_within_radius,
        tie_bounds,
    )
    from hhnet.nn.centres import hash_centres
    from hhnet.nn.losses import loss_names, make_loss
    from hhnet.nn.model import HHNet, load_model
    from hhnet.preprocess import Preprocess
    from hhnet.real_codes import asymmetric_distances, quantise_real_codes, saturate
    from hhnet.search.kernels import hamming_distances, hamming_knn, hamming_range

    __version__: str

__all__ = [
    "HHNet",
    "Preprocess",
    "asymmetric_distances",
    "average_precisions",
    "chance_map",
    "code_drift",
    "code_health",
    "hamming_distances",
    "hamming_knn",
    "hamming_range",
    "hash_centres",
    "load_model",
    "loss_names",
    "make_loss",
    "mean_average_precision",
    "pack_bits",
    "precision_at",
    "precision_recall_at",
    "precision_recall_curve",
    "precision_within_radius",
    "quantise_real_codes",
    "saturate",
    "tie_bounds",
    "unpack_bits",
]

_NAMES = {
    "codes": ("pack_bits", "unpack_bits"),
    "health": ("code_drift", "code_health"),
    "metrics.retrieval": (
        *("average_precisions", "chance_map", "mean_average_precision", "precision_at", "precision_recall_at"),
        *("precision_recall_curve", "precision_within_radius", "tie_bounds"),
    ),
    "nn.centres": ("hash_centres",),
    "nn.losses": ("loss_names", "make_loss"),
    "nn.model": ("HHNet", "load_model"),
    "preprocess": ("Preprocess",),
    "real_codes": ("asymmetric_distances", "quantise_real_codes", "saturate"),
    "search.kernels": ("hamming_distances", "hamming_knn", "hamming_range"),
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("hhnet")
    if name not in _MODULES:
        raise AttributeError(f"module 'hhnet' has no attribute {name!r}")
    value = getattr(import_module(f"hhnet.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
