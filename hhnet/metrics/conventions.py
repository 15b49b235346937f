"""How code bases of the field compute mAP from codes, by name.

All of them sum precision over the relevant ranks. They differ in the denominator of AP, in the treatment of a query
that finds nothing, and in the order inside ties. Seven of the code bases were run once on codes whose ties do not
matter: `tests/unit/hhnet/metrics/test_conventions.py` has the figures.
"""

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["CONVENTIONS", "Convention"]


@dataclass(frozen=True)
class Convention:
    """The choices that, beside K, decide the mAP of given codes and labels."""

    source: str
    """Repository and file of the code that computes it."""
    denominator: str = "retrieved"
    empty: str = "zero"
    """Denominator and empty queries, with the values that `hhnet.mean_average_precision` takes."""
    unlabelled: str = "zero"
    """Whether a query without labels counts 0 ("zero") or is left out ("skip")."""
    ties: str = "undefined"
    """Order inside ties: "undefined" = by a sort that promises no order, computed as the expectation over all orders;
    "stable" = by row; "scores" = by the distance of the real outputs."""


CONVENTIONS: Mapping[str, Convention] = {
    "hashnet": Convention("thuml/HashNet pytorch/src/test.py", empty="skip"),
    "thulab": Convention("thulab/DeepHash DeepHash/evaluation/__init__.py, get_mAPs_after_sign", empty="skip"),
    "deephash-pytorch": Convention("swuxyj/DeepHash-pytorch utils/tools.py"),
    "greedyhash": Convention("ssppp/GreedyHash cal_map.py"),
    "hyp2": Convention("JerryXu0129/HyP2-Loss retrieval.py"),
    "dhd": Convention("youngkyunJang/Deep-Hash-Distillation Retrieval.py"),
    "orthohash": Convention("kamwoh/orthohash utils/hashing.py"),
    "csq": Convention("yuanli2333/Hadamard-Matrix-for-hashing test.py", unlabelled="skip"),
    "modfire": Convention("VL-Group/modfire, in the order of Faiss", ties="stable"),
    "dsh-analysis": Convention("DSH_Analysis", denominator="min"),
    "fire-landmarks": Convention("CISiPLab/cisip-FIRe, landmark sets", denominator="all"),
    "h2q": Convention("HHNet's and H2Q's own code base", ties="scores"),
}
"""The conventions by the usual names of their code bases."""
