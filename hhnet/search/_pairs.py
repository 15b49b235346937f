"""The compiled loops behind `hhnet.search.pairs`: equal codes, near pairs by tables of substrings, a forest.

Shape suffixes: Q queries, N codes, W 64-bit words per code, M substrings, S slots of a hash table, P pairs.
"""

import numpy as np

from hhnet.search._buckets import LOOKUP_NS, _cost, _distance, _found_before, _next, _substring, choose
from hhnet.search._compiled import compiled

ANSWERED, SCAN = 1, 2
"""Outcome of a query: all its pairs were found, or a scan is cheaper."""

EMPTY_SLOT = -1
SIZING_COST_SHARE = 0.1
"""Share of a scan's cost that looking up bucket sizes may take; wasted where the buckets hold too much after all."""


# ------------------------------------------------------------------------------------------------------- equal codes


@compiled
def _hash(codes_NW, row, seed):
    """Hash one code: the finaliser of splitmix64, applied for each word."""
    mixed = seed
    for w in range(codes_NW.shape[1]):
        mixed ^= codes_NW[row, w]
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed = mixed ^ (mixed >> np.uint64(31))
    return mixed


@compiled
def _equal(codes_NW, row, other):
    same = True
    for w in range(codes_NW.shape[1]):
        same &= codes_NW[row, w] == codes_NW[other, w]
    return same


@compiled
def group(codes_NW, known, share, shares, seed, table_S, leaders_N, counts_2):
    """Find the leaders of the codes whose hash falls into `share` of `shares`; False where the table is too small.

    A slot holds the leader of its code: n, or -2 - n once another code has joined it. `counts_2` is raised by the
    number of leaders and by the number of leaders that another code has joined.
    """
    # Linear probing slows down sharply in a table that is more than 7/10 full.
    mask, room = np.uint64(table_S.shape[0] - 1), table_S.shape[0] * 7 // 10
    table_S[:] = EMPTY_SLOT
    for n in range(codes_NW.shape[0]):
        mixed = _hash(codes_NW, n, seed)
        # High bits choose the share and low bits the slot, so that the codes of one share use all slots.
        if np.int64(mixed >> np.uint64(40)) % shares != share:
            continue
        slot = np.int64(mixed & mask)
        leader = -1
        while table_S[slot] != EMPTY_SLOT:
            leader = np.int64(table_S[slot])
            leader = leader if leader >= 0 else -2 - leader
            if _equal(codes_NW, n, leader):
                break
            leader = -1
            slot = np.int64(np.uint64(slot + 1) & mask)
        if leader < 0:
            if room == 0:
                return False
            room -= 1
            table_S[slot] = n
            leaders_N[n] = n
            counts_2[0] += 1
        elif n < known:
            leaders_N[n] = -1
        else:
            joined = table_S[slot] < 0
            if leader < known:  # a known code does not lead others: the first new code takes over, and it follows
                leaders_N[leader] = n
                leader = n
            leaders_N[n] = leader
            table_S[slot] = -2 - leader
            counts_2[1] += not joined
    return True


# --------------------------------------------------------------------------------------------------------- near pairs


@compiled
def join(queries_QW, first_Q, codes_NW, layout_M3, offsets_M, starts, rows_MN, radius, word, begin, state_Q, found):
    """Write the pairs (query, row, distance) within `radius` whose row is `first_Q` of the query or later, query by
    query.

    Goes from query `begin` on until `found` is full. Returns the query to go on with, whose pairs are not in `found`,
    and the number of pairs. A query is left to a scan if its pairs alone do not fit, or if a scan is cheaper at `word`
    for each word, in the unit of the costs in `hhnet.search._buckets`.
    """
    num, substrings = codes_NW.shape[0], layout_M3.shape[0]
    out_q, out_r, out_d = found
    count = 0
    lookups = 0.0
    for step in range(radius + 1):
        if step // substrings <= layout_M3[step % substrings, 2]:
            lookups += LOOKUP_NS * choose(layout_M3[step % substrings, 2], step // substrings)
    for q in range(begin, queries_QW.shape[0]):
        query_W, begun, first = queries_QW[q], count, first_Q[q]
        scan = word * (num - first) * codes_NW.shape[1]
        state_Q[q] = ANSWERED
        if first >= num:
            continue
        if (
            lookups > SIZING_COST_SHARE * scan
            or _cost(queries_QW, q, layout_M3, offsets_M, starts, num, 0, radius, np.inf, scan) == np.inf
        ):
            state_Q[q] = SCAN
            continue
        for step in range(radius + 1):
            j, flips = step % substrings, step // substrings
            width = layout_M3[j, 2]
            if flips > width:
                continue
            pattern = _substring(queries_QW, q, layout_M3, j)
            table, rows_N = starts[offsets_M[j] : offsets_M[j + 1]], rows_MN[j]
            mask = (1 << flips) - 1
            while mask < 1 << width:
                for i in range(np.int64(table[pattern ^ mask]), np.int64(table[(pattern ^ mask) + 1])):
                    row = np.int64(rows_N[i])
                    if row < first:
                        continue
                    distance = _distance(query_W, codes_NW, row)
                    if distance > radius or _found_before(query_W, codes_NW, row, layout_M3, step):
                        continue
                    if count == out_q.shape[0]:
                        if begun:
                            return q, begun
                        state_Q[q] = SCAN
                        break
                    out_q[count], out_r[count], out_d[count] = q, row, distance
                    count += 1
                if mask == 0 or state_Q[q] == SCAN:
                    break
                mask = _next(mask)
            if state_Q[q] == SCAN:
                count = begun
                break
    return queries_QW.shape[0], count


# ------------------------------------------------------------------------------------------------------------- forest


@compiled
def _root(parents_N, n):
    """Return the root of a node; every other node on the way is moved nearer to it (path halving)."""
    while parents_N[n] >= 0:
        parent = parents_N[n]
        if parents_N[parent] >= 0:
            parents_N[n] = parents_N[parent]
        n = parent
    return n


@compiled
def unite(parents_N, a_P, b_P):
    """Join the trees of each pair under the smaller root; a root holds minus the size of its tree."""
    for i in range(a_P.shape[0]):
        low, high = _root(parents_N, a_P[i]), _root(parents_N, b_P[i])
        if low == high:
            continue
        if high < low:
            low, high = high, low
        parents_N[low] += parents_N[high]
        parents_N[high] = low


@compiled
def roots(parents_N, start, out):
    """Write the roots of the nodes from `start` on to `out`."""
    for i in range(out.shape[0]):
        out[i] = _root(parents_N, start + i)
