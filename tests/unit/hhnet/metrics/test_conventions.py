"""mAP as seven public code bases give it on the same codes.

The figures are what their own functions returned for the codes below: thuml/HashNet `pytorch/src/test.py` at 48652bf,
thulab/DeepHash `DeepHash/evaluation/__init__.py` at 5d17857 (inner product of signs), swuxyj/DeepHash-pytorch
`utils/tools.py` at 15429eb, ssppp/GreedyHash `cal_map.py` at edb9570, JerryXu0129/HyP2-Loss `retrieval.py` at 59356e1,
youngkyunJang/Deep-Hash-Distillation `Retrieval.py` at c497d6f (which computes in float32) and
yuanli2333/Hadamard-Matrix-for-hashing `test.py` at 6292910.
"""

from typing import Any

import numpy as np
import pytest

import hhnet
from hhnet.metrics.conventions import CONVENTIONS

FIGURES = {
    # (several labels, K): the mAP of each code base
    (False, 90): {
        **dict.fromkeys(("hashnet", "thulab"), 0.27431803272928307),
        **dict.fromkeys(("deephash-pytorch", "greedyhash", "hyp2", "dhd", "csq"), 0.2351297423393855),
    },
    (False, 5): {
        **dict.fromkeys(("hashnet", "thulab"), 0.8624999999999999),
        **dict.fromkeys(("deephash-pytorch", "greedyhash", "hyp2", "dhd", "csq"), 0.3696428571428571),
    },
    (True, 90): {
        **dict.fromkeys(("hashnet", "thulab"), 0.4911624526627735),
        **dict.fromkeys(("deephash-pytorch", "greedyhash", "hyp2", "dhd"), 0.3508303233305525),
        "csq": 0.40930204388564456,
    },
    (True, 5): {
        **dict.fromkeys(("hashnet", "thulab"), 0.5375),
        **dict.fromkeys(("deephash-pytorch", "greedyhash", "hyp2", "dhd"), 0.3071428571428571),
        "csq": 0.35833333333333334,
    },
}
WITHIN = {False: (0.19047619047619047, 0.22272727272727272), True: (0.2857142857142857, 0.23760504201680674)}
"""P@H<=2 and P@H<=20 by thulab/DeepHash `get_precision_recall_by_Hamming_Radius`."""


def tie_free(seed: int, multi: bool, bits: int = 64, size: int = 90) -> tuple[Any, Any, Any, Any]:
    """Bits and multi-hot labels of queries and database in which tied items are of one relevance to every query.

    So the undefined order that those code bases leave them in decides nothing. One query has no label where there are
    several, and one is of a class that the database does not have.
    """
    random = np.random.Generator(np.random.Philox(seed))
    queries = random.random((7, bits)) < 0.5
    if multi:
        query_labels = random.random((7, 6)) < 0.35
        query_labels[:, 0] |= ~query_labels.any(1)
        query_labels[5] = False
        query_labels[6] = [False] * 5 + [True]
    else:
        query_labels = np.eye(6, dtype=bool)[[0, 1, 2, 3, 4, 0, 5]]
    codes: list[Any] = []
    labels: list[Any] = []
    seen: list[dict[int, bool]] = [{} for _ in queries]
    while len(codes) < size:
        code = queries[random.integers(7)] ^ (random.random(bits) < random.random() / 2)
        label = random.random(6) < 0.3 if multi else np.eye(6, dtype=bool)[random.integers(5)]
        label[5] = False
        relevant = (query_labels & label).any(1)
        distances = (queries ^ code).sum(1)
        if all(known.get(d, r) == r for known, d, r in zip(seen, distances, relevant, strict=True)):
            for known, d, r in zip(seen, distances, relevant, strict=True):
                known[d] = r
            codes.append(code)
            labels.append(label)
    return hhnet.pack_bits(queries), query_labels, hhnet.pack_bits(np.array(codes)), np.array(labels)


@pytest.mark.parametrize(("multi", "at"), FIGURES)
def test_map_is_that_of_the_code_base(multi: bool, at: int) -> None:
    case = tie_free(7, multi)
    for name, value in FIGURES[multi, at].items():
        convention = CONVENTIONS[name]
        ap_Q = hhnet.average_precisions(*case, at=at, denominator=convention.denominator, empty=convention.empty)
        if convention.unlabelled == "skip":
            ap_Q[~case[1].any(1)] = np.nan
        assert np.nanmean(ap_Q) == pytest.approx(value, abs=1e-12), name


@pytest.mark.parametrize("multi", [False, True])
def test_precision_within_a_radius_is_that_of_the_code_base(multi: bool) -> None:
    for radius, value in zip((2, 20), WITHIN[multi], strict=True):
        assert hhnet.precision_within_radius(*tie_free(7, multi), radius) == pytest.approx(value, abs=1e-12)
