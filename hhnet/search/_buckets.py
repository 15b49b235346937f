"""The compiled loops behind `hhnet.search.multi_index`: counting sorts, and searches through the buckets of substrings.

Nobody has checked the bytes of the tables, so every subscript from a table is compared with the number of codes before
it is used. That costs a predicted branch per candidate, hidden behind its cache miss. Checking the tables when they are
opened would cost as much as the scan that they avoid.

Shape suffixes: Q queries, N database codes, W 64-bit words per code, M substrings, K neighbours.
"""

import numpy as np

from hhnet.search._compiled import HAS_VECTOR_POPCOUNT, _popcount, compiled

ANSWERED, SCAN, DAMAGED = 0, 1, 2
"""Outcome of a query: answered from the buckets, cheaper by a scan, or stopped at a subscript outside the codes."""

ROW_BITS = 48  # a found code is one integer: its distance above its row
NO_ROW = (1 << ROW_BITS) - 1

# Costs of a step in nanoseconds of one thread. A bucket is a miss of the cache and of the TLB in `starts` (the second
# pass over it finds it in the cache). A candidate is a miss in `rows` and one in `codes`, which overlap with those of
# its neighbours. At 10 million codes on two busy cores of an EPYC, a bucket took 170 to 230 ns, a candidate 35 to 50.
# A figure that is too high only makes queries scan too soon.
LOOKUP_NS = 200
CANDIDATE_NS = 40
INSERT_NS = 1.2  # per level of the heap of the k best

# Costs of an exact scan in nanoseconds for each 64-bit word of a code: with one instruction that counts the bits of a
# vector, or without it. Reading the word from memory is paid once for all queries.
COMPARE_WORD_NS = 0.07 if HAS_VECTOR_POPCOUNT else 0.31
READ_WORD_NS = 0.55

# Bits of a radix sort's digit, and keys from which it is faster than comparisons.
RADIX_DIGIT_BITS, MIN_RADIX_KEYS = 11, 512

# Shares of the cost of a scan that may be spent on buckets, and on their sizes, before they are sure to be cheaper. If
# a scan is needed after all, that time is lost; both shares together keep the loss below a tenth.
PROBE_COST_SHARE = 0.05
SIZING_COST_SHARE = 0.03


# -------------------------------------------------------------------------------------------------------- substrings


@compiled
def _cut(low, high, shift, width):
    """Return `width` bits from place `shift` on of the word `low`; they may continue in the word `high`."""
    bits = low >> np.uint64(shift)  # cast: numba would make a float of uint64 and int64
    if shift + width > 64:
        bits |= high << np.uint64(64 - shift)
    return np.int64(bits & np.uint64((1 << width) - 1))


@compiled
def _substring(codes_NW, row, layout_M3, j):
    word, shift, width = layout_M3[j, 0], layout_M3[j, 1], layout_M3[j, 2]
    high = codes_NW[row, word + 1] if shift + width > 64 else np.uint64(0)
    return _cut(codes_NW[row, word], high, shift, width)


@compiled
def _found_before(query_W, codes_NW, row, layout_M3, step):
    """Test whether a step before `step` has met the code, by the flips in each of its substrings.

    Step s visits the buckets whose substring s % M differs in s // M bits, so a code is first met at the least flips *
    M + substring. Counting it only there needs no memory of the codes already met.
    """
    num = layout_M3.shape[0]
    for j in range(num):
        word, shift, width = layout_M3[j, 0], layout_M3[j, 1], layout_M3[j, 2]
        high = np.uint64(0)
        if shift + width > 64:
            high = query_W[word + 1] ^ codes_NW[row, word + 1]
        flips = np.int64(_popcount(np.uint64(_cut(query_W[word] ^ codes_NW[row, word], high, shift, width))))
        if flips * num + j < step:
            return True
    return False


@compiled
def _distance(query_W, codes_NW, row):
    distance = np.uint64(0)
    for w in range(query_W.shape[0]):
        distance += _popcount(query_W[w] ^ codes_NW[row, w])
    return np.int64(distance)


@compiled
def _next(mask):
    """Return the next larger integer with as many bits set (Gosper)."""
    low = mask & -mask
    ripple = mask + low
    return ripple | ((mask ^ ripple) >> (np.int64(_popcount(np.uint64(low - 1))) + 2))


@compiled
def choose(width, flips):
    """Return the number of ways to flip `flips` of `width` bits; the widths of tables are too small to overflow it."""
    ways = 1
    for i in range(flips):
        ways = ways * (width - i) // (i + 1)
    return ways


# ------------------------------------------------------------------------------------------------------------- build


@compiled
def fill_table(codes_NW, layout_M3, j, starts, rows_N):
    """Sort the rows by substring `j` (a counting sort): bucket p is rows_N[starts[p]:starts[p + 1]], ascending."""
    num = codes_NW.shape[0]
    starts[:] = 0
    for row in range(num):
        starts[_substring(codes_NW, row, layout_M3, j) + 1] += 1
    for p in range(1, starts.shape[0]):
        starts[p] += starts[p - 1]
    place = starts[:-1].copy()
    for row in range(num):
        p = _substring(codes_NW, row, layout_M3, j)
        rows_N[place[p]] = row
        place[p] += 1


# ------------------------------------------------------------------------------------------------------------ search


@compiled
def _candidates(pattern, width, flips, starts, num):
    """Count the rows in the buckets `flips` bits from `pattern`; -1 where `starts` is damaged."""
    mask = (1 << flips) - 1
    total = 0
    while mask < 1 << width:
        first, last = np.int64(starts[pattern ^ mask]), np.int64(starts[(pattern ^ mask) + 1])
        if first > last or last > num:
            return -1
        total += last - first
        if mask == 0:
            break
        mask = _next(mask)
    return total


@compiled
def _sift_down(heap_K, size, key):
    """Replace the largest key of the heap by `key`, and restore the heap."""
    at = 0
    while True:
        child = 2 * at + 1
        if child >= size:
            break
        if child + 1 < size and heap_K[child + 1] > heap_K[child]:
            child += 1
        if heap_K[child] <= key:
            break
        heap_K[at] = heap_K[child]
        at = child
    heap_K[at] = key


@compiled
def _sift_up(heap_K, size, key):
    """Insert `key` into a heap of `size`."""
    at = size
    while at and heap_K[(at - 1) // 2] < key:
        heap_K[at] = heap_K[(at - 1) // 2]
        at = (at - 1) // 2
    heap_K[at] = key


@compiled
def _nearest_of_step(query_W, codes_NW, layout_M3, starts, rows_N, allowed_N, step, pattern, heap_K, filled):
    """Take the new codes of one step into the heap; return how full it is then, or -1 where a table is damaged."""
    num = codes_NW.shape[0]
    width, flips = layout_M3[step % layout_M3.shape[0], 2], step // layout_M3.shape[0]
    mask = (1 << flips) - 1
    while mask < 1 << width:
        first, last = np.int64(starts[pattern ^ mask]), np.int64(starts[(pattern ^ mask) + 1])
        if first > last or last > num:
            return -1
        for i in range(first, last):
            row = rows_N[i]
            if row >= num:
                return -1
            key = _distance(query_W, codes_NW, row) << ROW_BITS | np.int64(row)
            full = filled == heap_K.shape[0]
            if full and key >= heap_K[0]:
                continue
            if allowed_N.shape[0] and not allowed_N[row]:
                continue
            if _found_before(query_W, codes_NW, row, layout_M3, step):
                continue
            if full:
                _sift_down(heap_K, filled, key)
            else:
                _sift_up(heap_K, filled, key)
                filled += 1
        if mask == 0:
            break
        mask = _next(mask)
    return filled


@compiled
def _cost(queries_QW, q, layout_M3, offsets_M, starts, num, first, last, most_lookups, most):
    """Estimate the cost of the steps first..last from the sizes of their buckets; -1 where a table is damaged.

    It is infinite above `most`, or where looking up the sizes costs more than `most_lookups`.
    """
    substrings = layout_M3.shape[0]
    lookups, total = 0.0, 0.0
    for step in range(first, last + 1):
        j, flips = step % substrings, step // substrings
        width = layout_M3[j, 2]
        if flips > width:
            continue
        ways = choose(width, flips)
        lookups += LOOKUP_NS * ways
        if lookups > most_lookups:
            return np.inf
        pattern = _substring(queries_QW, q, layout_M3, j)
        size = _candidates(pattern, width, flips, starts[offsets_M[j] : offsets_M[j + 1]], num)
        if size < 0:
            return -1.0
        total += LOOKUP_NS * ways + CANDIDATE_NS * size
        if total > most:
            return np.inf
    return total


@compiled
def mih_knn(
    queries_QW, codes_NW, layout_M3, offsets_M, starts, rows_MN, allowed_N, radius_Q, scan, out_d_QK, out_r_QK, state_Q
):
    """Find the k nearest of each query that is sure to cost less than `scan`; `state_Q` has each query's outcome.

    After step r all codes within distance r were met, so the search ends once the k-th best is at most at distance r. A
    radius is set as k made-up codes at that distance, each after all real rows; where such a code is left at the end,
    the output is not written.
    """
    num, substrings, k = codes_NW.shape[0], layout_M3.shape[0], out_d_QK.shape[1]
    bits = layout_M3[:, 2].sum()
    heap_K = np.empty(k, np.int64)
    for q in range(queries_QW.shape[0]):
        state_Q[q] = SCAN
        query_W = queries_QW[q]
        filled, certain, spent = 0, False, float(INSERT_NS * k * np.log2(k + 1.0))
        if radius_Q[q] < bits:
            heap_K[:] = radius_Q[q] << ROW_BITS | NO_ROW
            filled = k
        for step in range(bits + 1):
            j, flips = step % substrings, step // substrings
            if flips <= layout_M3[j, 2]:
                if not certain:
                    left = PROBE_COST_SHARE * scan - spent
                    cost = _cost(queries_QW, q, layout_M3, offsets_M, starts, num, step, step, left, left)
                    if cost == np.inf and filled == k:
                        # The k-th best can only come nearer: no step after this bound is needed.
                        bound = min(heap_K[0] >> ROW_BITS, bits)
                        sizing, left = (PROBE_COST_SHARE + SIZING_COST_SHARE) * scan - spent, scan - spent
                        cost = _cost(queries_QW, q, layout_M3, offsets_M, starts, num, step, bound, sizing, left)
                        certain = cost >= 0 and cost != np.inf
                    if cost < 0:
                        state_Q[q] = DAMAGED
                        break
                    if cost == np.inf:
                        break
                    spent += cost
                pattern = _substring(queries_QW, q, layout_M3, j)
                table = starts[offsets_M[j] : offsets_M[j + 1]]
                filled = _nearest_of_step(
                    query_W, codes_NW, layout_M3, table, rows_MN[j], allowed_N, step, pattern, heap_K, filled
                )
                if filled < 0:
                    state_Q[q] = DAMAGED
                    break
            if filled == k and heap_K[0] >> ROW_BITS <= step:
                state_Q[q] = ANSWERED
                break
        if state_Q[q] == ANSWERED:
            best = np.sort(heap_K)
            for i in range(k):
                if best[i] & NO_ROW == NO_ROW:
                    break
                out_d_QK[q, i] = best[i] >> ROW_BITS
                out_r_QK[q, i] = best[i] & NO_ROW


@compiled
def _sort(keys, num, radius):
    """Sort keys of rows below `num` and distances up to `radius` in place; many keys by digits (a radix sort)."""
    if keys.shape[0] < MIN_RADIX_KEYS:
        keys.sort()
        return
    counts, spare = np.empty(max(1 << RADIX_DIGIT_BITS, radius + 1), np.int64), np.empty_like(keys)
    for shift in (0, RADIX_DIGIT_BITS, 2 * RADIX_DIGIT_BITS, ROW_BITS):  # a row has 32 bits at most
        if 0 < shift < ROW_BITS and num >> shift == 0:
            continue
        mask = (1 << RADIX_DIGIT_BITS) - 1 if shift < ROW_BITS else (1 << (63 - ROW_BITS)) - 1
        counts[:] = 0
        for i in range(keys.shape[0]):
            counts[(keys[i] >> shift) & mask] += 1
        total = 0
        for digit in range(counts.shape[0]):
            begin = total
            total += counts[digit]
            counts[digit] = begin
        for i in range(keys.shape[0]):
            digit = (keys[i] >> shift) & mask
            spare[counts[digit]] = keys[i]
            counts[digit] += 1
        keys[:] = spare


@compiled
def mih_range(queries_QW, codes_NW, layout_M3, offsets_M, starts, rows_MN, allowed_N, radius, scan, counts_Q, state_Q):
    """Find all codes within `radius` of each query that costs less than `scan`; return their keys, query by query.

    A key is distance << ROW_BITS | row, and each query's keys ascend; `counts_Q` has their number.
    """
    num, substrings = codes_NW.shape[0], layout_M3.shape[0]
    keys = np.empty(1024, np.int64)
    total = 0
    for q in range(queries_QW.shape[0]):
        query_W, begun = queries_QW[q], total
        sizing = (PROBE_COST_SHARE + SIZING_COST_SHARE) * scan
        cost = _cost(queries_QW, q, layout_M3, offsets_M, starts, num, 0, radius, sizing, scan)
        state_Q[q] = DAMAGED if cost < 0 else SCAN if cost == np.inf else ANSWERED
        for step in range(radius + 1):
            j, flips = step % substrings, step // substrings
            width = layout_M3[j, 2]
            if flips > width or state_Q[q] != ANSWERED:
                continue
            pattern = _substring(queries_QW, q, layout_M3, j)
            table, rows_N = starts[offsets_M[j] : offsets_M[j + 1]], rows_MN[j]
            mask = (1 << flips) - 1
            while mask < 1 << width and state_Q[q] == ANSWERED:
                first, last = np.int64(table[pattern ^ mask]), np.int64(table[(pattern ^ mask) + 1])
                for i in range(first, last):  # inside `rows_N`: the sizes were looked up above
                    row = rows_N[i]
                    if row >= num:
                        state_Q[q] = DAMAGED
                        break
                    distance = _distance(query_W, codes_NW, row)
                    if distance > radius or (allowed_N.shape[0] and not allowed_N[row]):
                        continue
                    if _found_before(query_W, codes_NW, row, layout_M3, step):
                        continue
                    if total == keys.shape[0]:
                        grown = np.empty(2 * total, np.int64)
                        grown[:total] = keys
                        keys = grown
                    keys[total] = distance << ROW_BITS | np.int64(row)
                    total += 1
                if mask == 0:
                    break
                mask = _next(mask)
        if state_Q[q] != ANSWERED:
            total = begun
        _sort(keys[begun:total], num, radius)
        counts_Q[q] = total - begun
    return keys[:total].copy()
