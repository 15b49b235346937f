"""Chooses the queries that a report shows, and finds the pictures of their nearest neighbours."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

import hhnet
from pipelines.encode.codes import CodesSet
from pipelines.evaluate.pair import Pair, Side, find_names
from pipelines.report.page import GalleryRow, Tile
from pipelines.report.pictures import Pictures

NEIGHBOURS_SHOWN = 10


def choose_queries(pair: Pair, ap_Q: npt.NDArray[np.float64], count: int) -> list[tuple[int, bool]]:
    """Return seeded queries spread over the classes, as (query, hard): every third is the worst of its class by AP."""
    # A fixed seed, other than those of the draws in `figures`: a report depends on its codes and settings alone.
    random = np.random.Generator(np.random.Philox(1))
    order = random.permutation(len(ap_Q))
    used = [number for number in range(len(pair.classes)) if pair.queries.labels[:, number].any()]
    groups = [order[pair.queries.labels[order, number]] for number in used] or [order]
    worst = [group[np.argsort(np.nan_to_num(ap_Q[group]), kind="stable")] for group in groups]
    chosen: dict[int, bool] = {}
    turn = 0
    while len(chosen) < min(count, sum(len(group) for group in groups)) and turn < 4 * count + len(groups):
        hard = turn % 3 == 2
        pool = (worst if hard else groups)[turn % len(groups)]
        pick = next((int(query) for query in pool if int(query) not in chosen), None)
        if pick is not None:
            chosen[pick] = hard
        turn += 1
    return sorted(chosen.items(), key=lambda entry: (int(pair.queries.labels[entry[0]].argmax()), entry[1]))


def worst_queries(pair: Pair, ap_Q: npt.NDArray[np.float64], count: int) -> list[tuple[int, str]]:
    """Return the `count` queries with the lowest AP among those with a relevant item, as (query, remark)."""
    findable = pair.findable() & ~np.isnan(ap_Q)
    order = [int(query) for query in np.argsort(ap_Q, kind="stable") if findable[query]]
    return [(query, f"AP {ap_Q[query]:.3f}") for query in order[:count]]


def spread_queries(pair: Pair, ap_Q: npt.NDArray[np.float64], count: int) -> list[tuple[int, str]]:
    """Return the queries of `choose_queries` with a remark for each."""
    chosen = choose_queries(pair, ap_Q, count)
    return [(n, f"{'hard query' if hard else 'query'}, AP {np.nan_to_num(ap_Q[n]):.3f}") for n, hard in chosen]


def gallery_rows(
    pair: Pair, chosen: Sequence[tuple[int, str]], pictures: Pictures, sets: Sequence[CodesSet]
) -> list[GalleryRow]:
    """Return rows of a gallery: queries, each with a remark, and their nearest neighbours, with pictures.

    `sets` are the codes of the pair, which hold the names of the files.
    """
    if not chosen:
        return []
    queries = np.array([query for query, _ in chosen])
    distances, near = hhnet.hamming_knn(pair.queries.codes[queries], pair.database.codes, NEIGHBOURS_SHOWN)
    wanted = {pair.queries.place(query) for query, _ in chosen}
    wanted |= {pair.database.place(number) for number in near.ravel().tolist()}
    found, names = pictures.get(wanted), find_names(sets, wanted)

    def shown(side: Side, number: int) -> tuple[str, list[str], str | None]:
        place = side.place(number)
        return names[place], [pair.classes[n] for n in np.flatnonzero(side.labels[number])], found.get(place)

    rows = []
    for (query, remark), ds, numbers in zip(chosen, distances.tolist(), near.tolist(), strict=True):
        head = Tile(*shown(pair.queries, query), remark=remark)
        right = (pair.queries.labels[query] & pair.database.labels[numbers]).any(1).tolist()
        neighbours = zip(ds, numbers, right, strict=True)
        tiles = [Tile(*shown(pair.database, n), distance, good) for distance, n, good in neighbours]
        rows.append(GalleryRow(head, tiles))
    return rows
