"""Measures a version of an index before it is published, and refuses one below the settings.

A sample of its codes is searched for, part by part, and each answer is compared with an exact scan of the key tables,
which were written beside the parts. Nothing else is read, so a version with removed rows is measured in the same way as
the first.

Shape suffixes: P probes, Q queries, K neighbours, H hits, N codes of a part, B bytes of a code.
"""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hhnet import hamming_knn, hamming_range
from pipelines.config.settings import GateSettings
from pipelines.encode.codes import code_array
from pipelines.errors import WorkFailed
from pipelines.index.kinds import NO_ID, Codes, Ids, Neighbours, PartSearcher
from pipelines.index.parts import sample_places
from pipelines.index.reader import IndexReader, merge_nearest

HITS_AT_ONCE = 1 << 22
"""Hits within the radius that are judged in one step, which bounds memory."""
COLUMNS_READ = ("id", "code")
"""Columns of a key table that the gate reads; leaving out the keys makes reading several times faster."""


@dataclass(frozen=True)
class GateFigures:
    """Measurements of the gate: recalls and counts depend on the index, times on the machine too."""

    exact: bool
    k: int
    radius: int
    codes: int
    opened: int
    """Codes in the opened parts; `codes` is the number that the manifest promises."""
    self_recall: float
    recall: float
    recall_within: float
    duplicates: int
    """Ids that came twice in an answer; for an exact kind, also ids that a part holds twice."""
    wrong: int
    """Ids that are not in their part, or came with a distance other than the distance of their code."""
    p50_ms: float
    p99_ms: float

    def card(self) -> dict[str, Any]:
        """Return the figures that the manifest keeps, rounded."""
        return {
            "recall": round(self.recall, 4),
            "recall_at": self.k,
            "self_recall": round(self.self_recall, 4),
            "recall_within": round(self.recall_within, 4),
            "radius": self.radius,
        }

    def record(self) -> dict[str, Any]:
        """Return the figures that the run record keeps, rounded."""
        return six_digits(asdict(self))

    def __str__(self) -> str:
        return (
            f"self-recall {self.self_recall:.6g}, recall@{self.k} {self.recall:.6g}, recall within {self.radius} bits "
            f"{self.recall_within:.6g}, {self.duplicates} ids twice, {self.wrong} wrong, {self.opened} of {self.codes} "
            f"codes opened, p50 {self.p50_ms:.3g} ms, p99 {self.p99_ms:.3g} ms"
        )


def six_digits(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values with floats rounded to 6 digits after the point."""
    return {name: round(value, 6) if isinstance(value, float) else value for name, value in values.items()}


def probe_index(reader: IndexReader, settings: GateSettings, seed: int) -> GateFigures:
    """Search a seeded sample of the codes in one part after another, and in their key tables.

    Queries are timed one at a time, in opened parts.
    """
    probes_PB, ids_P = _probes(reader, settings.probes, seed)
    found: Neighbours = np.empty((len(probes_PB), 0), np.int32), np.empty((len(probes_PB), 0), np.int64)
    truth = found
    seconds_P = np.zeros(len(probes_PB))
    opened = duplicates = wrong = hits = within = 0
    for entry in reader.searched():
        part, table = reader.open_part(entry), reader.live_keys(entry, COLUMNS_READ)
        codes_NB, ids_N = code_array(table["code"]), table["id"].to_numpy()
        answers = _Answers(codes_NB, ids_N)
        found = merge_nearest(found, answers.check_nearest(part, probes_PB, settings.k, seconds_P), settings.k)
        right, expected = answers.check_within(part, probes_PB, settings.radius)
        hits, within = hits + right, within + expected
        if reader.kind.exact:
            answers.check_everything(part, probes_PB[:1])
        distances, rows = hamming_knn(probes_PB, codes_NB, settings.k)
        truth = merge_nearest(truth, (distances, ids_N[rows]), settings.k)
        opened, duplicates, wrong = opened + part.count, duplicates + answers.duplicates, wrong + answers.wrong
    # Where more than K samples share the code, K others at distance 0 are a right answer too.
    itself_P = (found[1] == ids_P[:, None]).any(1) | (found[0] == 0).all(1)
    p50, p99 = np.percentile(1e3 * seconds_P, [50, 99])
    return GateFigures(
        exact=reader.kind.exact,
        k=settings.k,
        radius=settings.radius,
        codes=reader.artifact.manifest.totals["codes"],
        opened=opened,
        self_recall=float((itself_P & (found[0][:, 0] == 0)).mean()),
        recall=tie_aware_recall(found[0], truth[0]),
        recall_within=hits / within,
        duplicates=duplicates,
        wrong=wrong,
        p50_ms=float(p50),
        p99_ms=float(p99),
    )


def require_limits(figures: GateFigures, settings: GateSettings, where: str) -> None:
    """Raise WorkFailed, with all figures, unless they reach the limits in `settings`."""
    least = {"self_recall": settings.min_self_recall, "recall": settings.min_recall}
    least["recall_within"] = settings.min_recall_within
    if figures.exact:
        least |= {"recall": 1.0, "recall_within": 1.0}
    problems = [
        f"{name} {getattr(figures, name):.6g} is below {limit:g}"
        for name, limit in least.items()
        if getattr(figures, name) < limit
    ]
    problems += [
        f"{name} {getattr(figures, name):.3g} is above {limit:g}"
        for name, limit in (("p50_ms", settings.max_p50_ms), ("p99_ms", settings.max_p99_ms))
        if limit is not None and getattr(figures, name) > limit
    ]
    problems += [f"{figures.duplicates} ids come twice"] if figures.duplicates else []
    problems += [f"{figures.wrong} answers are not what their codes say"] if figures.wrong else []
    problems += [f"{figures.opened} codes of {figures.codes} opened"] if figures.opened != figures.codes else []
    if problems:
        todo = "mend the index, or change the limits in index.gate"
        raise WorkFailed(f"{where}: not published: {'; '.join(problems)}: {todo} (measured: {figures})")


def search_one_by_one(part: PartSearcher, queries_QB: Codes, k: int) -> tuple[Neighbours, npt.NDArray[np.float64]]:
    """Search the nearest of each query, one query at a time; return them and the seconds (Q,) that each took."""
    part.search(queries_QB[:1], k)  # no query shall pay for compiling or for the first page faults
    answers, seconds_Q = [], np.empty(len(queries_QB))
    for place in range(len(queries_QB)):
        begun = time.perf_counter()
        answers.append(part.search(queries_QB[place : place + 1], k))
        seconds_Q[place] = time.perf_counter() - begun
    distances_QK, ids_QK = (np.concatenate(column) for column in zip(*answers, strict=True))
    return (distances_QK, ids_QK), seconds_Q


def tie_aware_recall(found: Any, exact: Any) -> float:
    """Return the share of the k places whose neighbour is as near as the exact k-th; ties count as found."""
    return float((found <= exact[:, -1:]).mean())


def _probes(reader: IndexReader, size: int, seed: int) -> tuple[Codes, Ids]:
    """Draw seeded codes uint8 (P, B) from the key tables, with the ids int64 (P,) that the parts must give them."""
    parts = reader.searched()
    codes, ids = [], []
    drawn = sample_places([(part.number, reader.live_in(part)) for part in parts], size, seed)
    for part, places in zip(parts, drawn, strict=True):
        if len(places):
            table = reader.live_keys(part, COLUMNS_READ)
            codes.append(code_array(table["code"])[places])
            ids.append(table["id"].to_numpy()[places])
    return np.concatenate(codes), np.concatenate(ids)


class _Answers:
    """Compares the answers of one part with its key table, and counts wrong ones."""

    def __init__(self, codes_NB: Codes, ids_N: Ids) -> None:
        self._codes_NB, self._ids_N = codes_NB, ids_N
        self.duplicates = self.wrong = 0

    def check_nearest(
        self, part: PartSearcher, probes_PB: Codes, k: int, seconds_P: npt.NDArray[np.float64]
    ) -> Neighbours:
        """Return the nearest of each probe, asked one by one; add their times to `seconds_P`."""
        (distances_PK, ids_PK), spent_P = search_one_by_one(part, probes_PB, k)
        seconds_P += spent_P
        there = ids_PK != NO_ID
        self._judge(probes_PB, there.sum(1), distances_PK[there], ids_PK[there])
        return distances_PK, ids_PK

    def check_within(self, part: PartSearcher, probes_PB: Codes, radius: int) -> tuple[int, int]:
        """Return the number of right hits of the probes, and the number that an exact scan finds."""
        found = expected = 0
        step = max(1, HITS_AT_ONCE // len(self._ids_N))  # each probe may have as many hits as there are codes
        for start in range(0, len(probes_PB), step):
            chunk_PB = probes_PB[start : start + step]
            offsets, distances, ids = part.range_search(chunk_PB, radius)
            found += self._judge(chunk_PB, np.diff(offsets), distances, ids)
            expected += int(hamming_range(chunk_PB, self._codes_NB, radius)[0][-1])
        return found, expected

    def check_everything(self, part: PartSearcher, probe_PB: Codes) -> None:
        """Ask an exact part for all its codes, and count the missing and wrong ones."""
        offsets, distances, ids = part.range_search(probe_PB, 8 * probe_PB.shape[1])
        self.wrong += len(self._ids_N) - self._judge(probe_PB, np.diff(offsets), distances, ids)

    def _judge(
        self, probes_PB: Codes, counts_P: npt.NDArray[np.int64], distances_H: npt.NDArray[np.int32], ids_H: Ids
    ) -> int:
        """Return the number of right answers: distinct ids of the part with the true distance of their code.

        Answers come probe after probe, `counts_P` of each.
        """
        probe_H = np.repeat(np.arange(len(probes_PB)), counts_P)
        places_H = np.searchsorted(self._ids_N, ids_H).clip(max=len(self._ids_N) - 1)
        true_H = np.bitwise_count(self._codes_NB[places_H] ^ probes_PB[probe_H]).sum(1)
        right_H = (self._ids_N[places_H] == ids_H) & (true_H == distances_H)
        # One number for each pair of probe and place, so that an answer given twice gives equal neighbours.
        answers_H = np.sort((probe_H * len(self._ids_N) + places_H)[right_H])
        again = int((np.diff(answers_H) == 0).sum())
        self.duplicates += again
        self.wrong += len(ids_H) - len(answers_H)
        return len(answers_H) - again
