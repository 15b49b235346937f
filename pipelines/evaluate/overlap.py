"""Nearest neighbours under ties: who is among the k nearest, how far two rankings name the same, and AP."""

import numpy as np
import numpy.typing as npt

Distances = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float64]


def nearest_probabilities(distances: Distances, k: int) -> Floats:
    """Return each item's probability to be among the k nearest if ties at the k-th distance are ordered at random.

    int32 (Q, N), 1 <= k <= N -> float64 (Q, N); each row sums to k.
    """
    last = np.partition(distances, k - 1, axis=1)[:, k - 1 : k]
    nearer, tied = distances < last, distances == last
    left = k - nearer.sum(1, keepdims=True)
    return np.where(nearer, 1.0, np.where(tied, left / tied.sum(1, keepdims=True), 0.0))


def expected_overlaps(old: Floats, new: Floats, k: int) -> Floats:
    """Return the expected share of the k nearest that both codes name: (Q,).

    Their ties have independent random orders. With p_old(i) and p_new(i) from `nearest_probabilities` it is sum_i
    p_old(i) p_new(i) / k.
    """
    return np.asarray((old * new).sum(1) / k)


def expected_average_precisions(found: Floats, relevant: Floats) -> Floats:
    """Return the AP of each query over the whole ranking, as its expectation over all orders inside ties: (Q,).

    `found` and `relevant` count all items and the relevant ones at each distance, (Q, distances). A query to which
    nothing is relevant has NaN.
    """
    longest = int(found.sum(1).max(initial=0))
    harmonic = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, longest + 1))])
    before = np.cumsum(found, 1) - found
    relevant_before = np.cumsum(relevant, 1) - relevant
    # Sum of 1 / rank over the ranks of each tie; a relevant item is at each of them with equal probability.
    ranks = harmonic[(before + found).astype(np.int64)] - harmonic[before.astype(np.int64)]
    ahead = np.maximum(relevant - 1, 0) / np.maximum(found - 1, 1)
    gained = (relevant_before + 1) * ranks + ahead * (found - (before + 1) * ranks)
    total = relevant.sum(1)
    share = relevant / np.maximum(found, 1)
    return np.asarray(np.where(total > 0, (share * gained).sum(1) / np.maximum(total, 1), np.nan))
