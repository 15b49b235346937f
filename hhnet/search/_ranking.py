"""The compiled loops behind `hhnet.metrics.retrieval`.

A ranking by Hamming distance is a sequence of groups of equal distance. Two counts per query and distance, of all
samples and of relevant ones, are enough for every metric that does not depend on the order inside a group.

Shape suffixes: Q queries, N database samples, W 64-bit words per code, L words per label, D distance values.
"""

import numpy as np

from hhnet.search._compiled import CHUNK_CODES, chunk_distances, compiled

RETRIEVED, MINIMUM, ALL = 0, 1, 2  # denominators


@compiled
def _matches(query_L, labels_NL, start, stop, single, out):
    """Write 1 where a row of start..stop shares a class with the query, else 0.

    With `single`, labels are class ids that must be equal; otherwise they are bits, and one must be common.
    """
    num = stop - start
    if query_L.shape[0] == 1:
        # `single` is tested outside the loops, so that LLVM can vectorise them.
        label, labels_N, out_N = query_L[0], labels_NL[start:stop].reshape(num), out[:num]
        if single:
            for i in range(num):
                out_N[i] = label == labels_N[i]
        else:
            for i in range(num):
                out_N[i] = (label & labels_N[i]) != 0
    else:
        for i in range(num):
            common = np.uint64(0)
            for w in range(query_L.shape[0]):
                common |= query_L[w] & labels_NL[start + i, w]
            out[i] = common != 0


@compiled
def histograms(queries_QW, database_NW, labels_QL, labels_NL, single, total_QD, hits_QD):
    # All subscripts are unsigned: a signed one would be tested for being negative in each step of the loop.
    distance, match = np.empty(CHUNK_CODES, np.uint16), np.empty(CHUNK_CODES, np.uint8)
    # One counter holds both counts (relevant in the high half), and four copies of it keep the increments of
    # neighbouring equal distances from waiting for each other.
    both = np.zeros((4, total_QD.shape[1]), np.uint64)
    low = np.uint64((1 << 32) - 1)
    for start in range(0, database_NW.shape[0], CHUNK_CODES):
        stop = min(start + CHUNK_CODES, database_NW.shape[0])
        for q in range(queries_QW.shape[0]):
            chunk_distances(queries_QW[q], database_NW, start, stop, distance)
            _matches(labels_QL[q], labels_NL, start, stop, single, match)
            both[:] = 0
            for i in range(stop - start):
                both[i & 3, distance[i]] += (np.uint64(match[i]) << np.uint64(32)) | np.uint64(1)
            for d in range(both.shape[1]):
                cell = both[0, d] + both[1, d] + both[2, d] + both[3, d]
                total_QD[q, d] += np.int64(cell & low)
                hits_QD[q, d] += np.int64(cell >> np.uint64(32))


@compiled
def _denominator(kind, retrieved, every, cut):
    if kind == RETRIEVED:
        return retrieved
    return min(every, cut) if kind == MINIMUM else every


@compiled
def _group_sum(before, size, hits, hits_before, harmonic, first):
    """Return the expected sum of relevance x precision over the first `first` ranks of a group in random order.

    The group has `size` samples, `hits` of them relevant, and follows on `before` ranks with `hits_before` relevant
    ones. At place j = 1, 2, ... the sample is relevant with probability hits / size. Then (j - 1)(hits - 1) / (size -
    1) of those before it in the group are expected to be relevant. With A = sum of 1 / (before + j), the sum over j of
    (j - 1) / (before + j) is first - (before + 1) A.
    """
    if hits == 0 or first == 0:
        return 0.0
    a = harmonic[before + first] - harmonic[before]
    value = (hits_before + 1) * a
    if hits > 1:
        value += (hits - 1) / (size - 1) * (first - (before + 1) * a)
    return float(value * hits / size)


@compiled
def _cut_group(before, size, hits, hits_before, first, summed, harmonic):
    """Return the expected AP where the cut falls inside a group and AP is divided by the number of retrieved hits.

    That number is hits_before + x with x hypergeometric. Given x, the first ranks of the group are themselves
    a group of `first` samples, x of them relevant, in random order. Probabilities are built from their
    ratios, from the mode outwards, and so stay exact where binomials would overflow.
    """
    low, high = max(0, first - (size - hits)), min(first, hits)
    mode = min(max((first + 1) * (hits + 1) // (size + 2), low), high)
    value, mass = 0.0, 0.0
    for direction in (1, -1):
        p, x = 1.0, mode
        if direction == -1:
            if mode == low:
                break
            p = mode * (size - hits - first + mode) / ((hits - mode + 1.0) * (first - mode + 1.0))
            x = mode - 1
        while low <= x <= high and p > 0.0:
            mass += p
            if hits_before + x > 0:
                inside = _group_sum(before, first, x, hits_before, harmonic, first)
                value += p * (summed + inside) / (hits_before + x)
            if direction == 1:
                p *= (hits - x) * (first - x) / ((x + 1.0) * (size - hits - first + x + 1.0))
            else:
                p *= x * (size - hits - first + x) / ((hits - x + 1.0) * (first - x + 1.0))
            x += direction
    return value / mass


@compiled
def expected_ap(total_QD, hits_QD, cut, kind, harmonic, ap_Q, hit_Q):
    """Write the expected AP at `cut` over random orders inside groups, and whether a hit within the cut is possible."""
    for q in range(total_QD.shape[0]):
        every = 0
        for d in range(total_QD.shape[1]):
            every += hits_QD[q, d]
        before, found, summed, value = 0, 0, 0.0, -1.0
        for d in range(total_QD.shape[1]):
            size, hits = total_QD[q, d], hits_QD[q, d]
            first = min(size, cut - before)
            if first < size and kind == RETRIEVED:
                hit_Q[q] = found + hits > 0
                value = _cut_group(before, size, hits, found, first, summed, harmonic)
                break
            summed += _group_sum(before, size, hits, found, harmonic, first)
            before += first
            found += hits
            if before == cut:
                break
        if value < 0.0:
            hit_Q[q] = found > 0
            value = summed / max(_denominator(kind, found, every, cut), 1)
        ap_Q[q] = value


@compiled
def stable_ap(queries_QW, database_NW, labels_QL, labels_NL, single, cut, kind, ap_Q, hit_Q):
    """Write AP at `cut` in the order (distance, row) to `ap_Q`, in one pass over the rows.

    When a relevant row is met, the rows before it at its own distance are counted; the nearer ones are added after the
    last row.
    """
    size, values = database_NW.shape[0], 8 * queries_QW.itemsize * queries_QW.shape[1] + 1
    distance, match = np.empty(CHUNK_CODES, np.uint16), np.empty(CHUNK_CODES, np.uint8)
    both, low = np.empty(values, np.uint64), np.uint64((1 << 32) - 1)  # all in the low half, relevant in the high
    # Every row is written, and a row that is no hit is overwritten by the next: a branch that the CPU cannot predict
    # costs more than a store. So there is one place more than there can be relevant rows.
    hit_both, hit_distance = np.empty(size + 1, np.uint64), np.empty(size + 1, np.uint16)
    for q in range(queries_QW.shape[0]):
        both[:] = 0
        every = np.uint64(0)  # as a subscript, see `histograms`
        for start in range(0, size, CHUNK_CODES):
            stop = min(start + CHUNK_CODES, size)
            chunk_distances(queries_QW[q], database_NW, start, stop, distance)
            _matches(labels_QL[q], labels_NL, start, stop, single, match)
            for i in range(stop - start):
                cell = both[distance[i]]
                both[distance[i]] = cell + ((np.uint64(match[i]) << np.uint64(32)) | np.uint64(1))
                hit_both[every], hit_distance[every] = cell, distance[i]
                every += np.uint64(match[i])
        nearer = np.uint64(0)
        for d in range(values):
            cell = both[d]
            both[d] = nearer
            nearer += cell
        found, summed = 0, 0.0
        relevant = np.int64(every)
        for i in range(relevant):
            cell = hit_both[i] + both[hit_distance[i]]
            rank = np.int64(cell & low)
            if rank < cut:
                found += 1
                summed += (np.int64(cell >> np.uint64(32)) + 1) / (rank + 1)
        hit_Q[q] = found > 0
        ap_Q[q] = summed / max(_denominator(kind, found, relevant, cut), 1)


@compiled
def scored_ap(queries_QW, database_NW, labels_QL, labels_NL, single, scores_QN, first, cut, kind, ap_Q, hit_Q):
    """Write AP at `cut` in the order (distance, score, row) to `ap_Q`.

    With `first` > 0, the first `first` rows by (distance, row) are ordered by (score, distance, row) instead, and the
    rest stays in its order.
    """
    size = database_NW.shape[0]
    distance, match = np.empty(size, np.int32), np.empty(size, np.uint8)
    order = np.empty(size, np.int64)
    for q in range(queries_QW.shape[0]):
        chunk_distances(queries_QW[q], database_NW, 0, size, distance)
        _matches(labels_QL[q], labels_NL, 0, size, single, match)
        place = np.zeros(8 * queries_QW.itemsize * queries_QW.shape[1] + 2, np.int64)
        for row in range(size):
            place[distance[row] + 1] += 1
        for d in range(1, place.shape[0]):
            place[d] += place[d - 1]
        starts = place.copy()
        for row in range(size):
            order[place[distance[row]]] = row
            place[distance[row]] += 1
        if first > 0:
            group = order[:first].copy()
            # Stable, so that equal scores stay in the order (distance, row); numba calls a stable sort mergesort.
            order[:first] = group[np.argsort(scores_QN[q][group], kind="mergesort")]
        else:
            for d in range(starts.shape[0] - 1):
                if starts[d] >= cut:
                    break
                group = order[starts[d] : starts[d + 1]].copy()
                order[starts[d] : starts[d + 1]] = group[np.argsort(scores_QN[q][group], kind="mergesort")]
        every, found, summed = 0, 0, 0.0
        for rank in range(size):
            if rank >= cut and kind == RETRIEVED:
                break
            if match[order[rank]]:
                every += 1
                if rank < cut:
                    found += 1
                    summed += found / (rank + 1)
        hit_Q[q] = found > 0
        ap_Q[q] = summed / max(_denominator(kind, found, every, cut), 1)
