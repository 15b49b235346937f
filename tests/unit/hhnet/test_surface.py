"""The public surface is frozen, and metrics need no torch."""

import subprocess
import sys

import pytest

import hhnet


def test_all_is_frozen() -> None:
    assert hhnet.__all__ == [
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


@pytest.mark.parametrize("name", hhnet.__all__)
def test_every_name_resolves(name: str) -> None:
    assert getattr(hhnet, name).__name__ == name


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = hhnet.nothing


def test_metrics_do_not_import_torch() -> None:
    code = (
        "import sys, hhnet; hhnet.mean_average_precision, hhnet.hash_centres, hhnet.pack_bits, hhnet.code_health;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
