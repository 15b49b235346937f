"""Codes and labels in the form that the ranking kernels read, and counts per Hamming distance.

Shape suffixes: Q queries, N database samples, C classes, W and L 64-bit words per code and label, D distances.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hhnet.codes import pad_bytes
from hhnet.search import _ranking
from hhnet.search._compiled import Words
from hhnet.search.kernels import code_pair, run_blocks

_QUERIES_PER_BLOCK = 4096  # queries whose counts are held at once

Codes = npt.NDArray[np.uint8]
Labels = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Task:
    """The checked input of a metric: codes as words, labels as 64-bit words."""

    queries: Words
    database: Words
    query_labels: npt.NDArray[np.uint64]
    labels: npt.NDArray[np.uint64]
    single: bool  # one class id per sample, else packed multi-hot
    bits: int

    @property
    def cost(self) -> int:
        """Number of word comparisons of a full pass."""
        return int(len(self.queries) * len(self.database) * (self.queries.shape[1] + self.query_labels.shape[1]))

    def histograms(self) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
        """Yield the counts of samples and of relevant samples at each distance, two int64 (q, D), by blocks of
        queries."""
        for start in range(0, len(self.queries), _QUERIES_PER_BLOCK):
            yield self._histograms(slice(start, start + _QUERIES_PER_BLOCK))

    def _histograms(self, block: slice) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        queries_QW, labels_QL = self.queries[block], self.query_labels[block]
        total_QD = np.zeros((len(queries_QW), self.bits + 1), np.int64)
        hits_QD = np.zeros_like(total_QD)

        def count(part: slice) -> None:
            sides = queries_QW[part], self.database, labels_QL[part], self.labels
            _ranking.histograms(*sides, self.single, total_QD[part], hits_QD[part])

        run_blocks(count, len(queries_QW), self.cost)
        return total_QD, hits_QD


def _label_words(labels: Labels, num: int, name: str) -> npt.NDArray[np.uint64]:
    labels = np.asarray(labels)
    if labels.shape[:1] != (num,) or labels.ndim not in (1, 2):
        raise ValueError(f"{name} must have shape ({num},) or ({num}, C): got {labels.shape}")
    if labels.ndim == 1:
        if labels.dtype == np.bool_ or not np.issubdtype(labels.dtype, np.integer):
            raise TypeError(f"{name} of shape (N,) must be integer class ids: got {labels.dtype}")
        if num and int(labels.min()) < 0:
            raise ValueError(
                f"{name} must be class ids from 0: got {labels.min()}; give unlabelled samples as zeros in "
                "multi-hot labels"
            )
        words = labels.astype(np.uint64)[:, None]
    else:
        if labels.dtype != np.bool_ and not np.isin(labels, (0, 1)).all():
            raise ValueError(f"{name} of shape (N, C) must be multi-hot, only 0 and 1: got {labels.dtype} values")
        packed = np.packbits(labels.astype(np.bool_), axis=1, bitorder="little")
        words = pad_bytes(packed if packed.shape[1] else np.zeros((num, 1), np.uint8), 8).view(np.uint64)
    words.flags.writeable = False
    return words


def label_pair(
    query_labels: Labels, num_queries: int, database_labels: Labels, size: int
) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64], bool]:
    """Return both sets of labels as words, and whether they are single class ids.

    Raises:
        TypeError, ValueError: for labels of a wrong dtype or shape, of two kinds, or not as many as given.
    """
    labels_QL = _label_words(query_labels, num_queries, "query_labels")
    labels_NL = _label_words(database_labels, size, "database_labels")
    if np.shape(query_labels)[1:] != np.shape(database_labels)[1:]:
        raise ValueError(
            f"query and database labels must be of one kind and number of classes: got shapes "
            f"{np.shape(query_labels)} and {np.shape(database_labels)}"
        )
    if num_queries == 0 or size == 0:
        raise ValueError(f"metrics need queries and a database: got {num_queries} queries and {size} samples")
    return labels_QL, labels_NL, np.ndim(query_labels) == 1


def make_task(query_codes: Codes, query_labels: Labels, database_codes: Codes, database_labels: Labels) -> Task:
    """Check the arguments that every metric takes, and convert them."""
    queries_QW, database_NW = code_pair(query_codes, database_codes)
    labels_QL, labels_NL, single = label_pair(query_labels, len(queries_QW), database_labels, len(database_NW))
    return Task(queries_QW, database_NW, labels_QL, labels_NL, single, 8 * query_codes.shape[1])
