"""The compiled loops behind `hhnet.search.kernels` and `hhnet.metrics.retrieval`.

A scan looks for codes nearer than a limit. It tests a group of codes at once, and looks at each code only where the
group holds a near one. Nearly all groups of a large database hold none, so two things decide the speed: the test must
take few instructions, and the next lines of the database must be on their way from memory. For codes of one or two
64-bit words the test is written in vectors, since the compiler does not vectorise it by itself: it keeps the least
distances instead of comparing each. The database is scanned in chunks that stay in the first-level cache while a few
queries pass over them, so no array of the size queries x database is ever made.

The loops are serial and release the interpreter lock; the callers spread blocks over threads. Arguments are not checked
here, and have no annotations: numba compiles a loop for the types that it meets. A code is W words of one unsigned
type. A loop is compiled for each W, the length of the tuple `zeros` of W such words.

Shape suffixes: Q queries, N database codes, W words per code, L words per label, D distance values, H hits.
"""

import warnings
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from llvmlite import binding, ir
from numba.core import cgutils, types
from numba.cpython.unsafe.tuple import tuple_setitem
from numba.extending import intrinsic, overload

Words = npt.NDArray[np.unsignedinteger]
"""Codes or labels as unsigned words."""
Ints = npt.NDArray[np.integer]
Query = tuple[np.unsignedinteger, ...]
"""The words of one code."""
Hits = tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.int64]]
"""Query, distance and row of each hit."""

CHUNK_CODES = 4096  # codes per chunk of one word: 32 KiB at 64 bits
PREFETCH_WORDS = 512  # words from the tested group to the fetched one; the CPU's own prefetch stops at a page's end
VECTOR_CODES = 8  # codes per vector: two registers of AVX2, one of AVX-512
NARROW_GROUP_CODES = 64  # codes per group, of one or two words of 64 bits
HAS_VECTOR_POPCOUNT = bool(binding.get_host_cpu_features().get("avx512vpopcntdq"))
"""Whether one instruction counts the bits of a whole vector."""

# Codes per group of wider codes. Where the CPU has the vector instruction, LLVM uses it on a large group. Elsewhere it
# would emulate it with several instructions, and a few codes with the scalar instruction are faster.
WIDE_GROUP_CODES = 128 if HAS_VECTOR_POPCOUNT else 8


_without_cache = False


def compiled(function: Callable[..., Any]) -> Any:
    """Compile a function with numba at its first call; it runs outside the interpreter lock.

    The machine code is kept in numba's cache on disk. Where no folder for that cache can be written, each process
    compiles anew and warns once.
    """
    global _without_cache
    if not _without_cache:
        try:
            return numba.njit(cache=True, nogil=True)(function)
        except RuntimeError:  # numba finds no folder that it can write its cache to
            _without_cache = True
            warnings.warn(
                "numba can write its cache neither beside hhnet nor below the home: every process compiles the search "
                "loops anew, for some seconds; set NUMBA_CACHE_DIR to a folder of your own",
                RuntimeWarning,
                stacklevel=2,
            )
    return numba.njit(nogil=True)(function)


def _ctpop(typingctx, word):

    def codegen(context, builder, signature, args):
        return builder.ctpop(args[0])

    return types.uint64(types.uint64), codegen


# Number of set bits of a uint64, by the CPU's own instruction: numba has no function for it.
_popcount: Any = intrinsic(_ctpop)


def _fetch(typingctx, query, words, place):
    # llvm.prefetch's locality: 3 asks for all cache levels, 2 leaves out the first. Groups of narrow codes are tested
    # so fast that lines on their way into the first level hold up the lines that are read now.
    level = 2 if _is_narrow(query) else 3

    def codegen(context, builder, signature, args):
        array = context.make_array(signature.args[1])(context, builder, args[1])
        bytes_, flag = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [bytes_, flag, flag, flag])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
        address = builder.bitcast(builder.gep(array.data, [args[2]]), bytes_)
        builder.call(function, [address, flag(0), flag(level), flag(1)])  # 0 = to read, locality, 1 = data cache
        return context.get_dummy_value()

    return types.void(query, words, place), codegen


# Prefetch the line that holds words[place]; the type of `query` gives the width of codes. A place beyond the array does
# no harm.
_prefetch: Any = intrinsic(_fetch)


@compiled
def _query_words(zeros, queries_QW, q):
    query = zeros
    for w in range(len(zeros)):
        query = tuple_setitem(query, w, queries_QW[q, w])
    return query


@compiled
def _distance(query, words, code):
    """Return the distance between a query and the code at place `code` of a flat array."""
    distance = np.uint64(0)
    for w in range(len(query)):
        distance += _popcount(np.uint64(query[w] ^ words[code * len(query) + w]))
    return distance


def _vectors(typingctx, query, words, limit):

    def codegen(context, builder, signature, args):
        array = context.make_array(signature.args[1])(context, builder, args[1])
        width, word, index = query.count, ir.IntType(64), ir.IntType(32)
        vector = ir.VectorType(word, VECTOR_CODES)
        count = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(vector, [vector]), f"llvm.ctpop.v{VECTOR_CODES}i64"
        )

        def filled(values):
            found = ir.Constant(vector, ir.Undefined)
            for lane in range(VECTOR_CODES):
                found = builder.insert_element(found, values[lane % len(values)], index(lane))
            return found

        def every_second(first, second, start):
            lanes = [start + 2 * lane for lane in range(VECTOR_CODES)]
            return builder.shuffle_vector(first, second, ir.Constant(ir.VectorType(index, VECTOR_CODES), lanes))

        queries = filled([builder.extract_value(args[0], w) for w in range(width)])
        least = None
        for code in range(0, NARROW_GROUP_CODES, VECTOR_CODES):
            bits = []
            for start in range(code * width, (code + VECTOR_CODES) * width, VECTOR_CODES):
                place = builder.bitcast(builder.gep(array.data, [word(start)]), vector.as_pointer())
                # align=8, as words may begin at any multiple of 8 bytes; by default LLVM assumes a vector's alignment.
                bits.append(builder.call(count, [builder.xor(builder.load(place, align=8), queries)]))
            if width == 2:
                low, high = bits
                bits = [builder.add(every_second(low, high, 0), every_second(low, high, 1))]
            # A count fills the low half of its lane and the high half is 0, so both can be compared as 32 bits: such a
            # minimum is one instruction, a minimum of 64 bits is several.
            distances = builder.bitcast(bits[0], ir.VectorType(index, 2 * VECTOR_CODES))
            if least is None:
                least = distances
            else:
                least = builder.select(builder.icmp_unsigned("<", distances, least), distances, least)
        nearer = builder.icmp_unsigned("<", builder.bitcast(least, vector), filled([args[2]]))
        flags = ir.IntType(VECTOR_CODES)
        return builder.icmp_unsigned("!=", builder.bitcast(nearer, flags), flags(0))

    return types.boolean(query, words, types.uint64), codegen


# Test whether any of the first NARROW_GROUP_CODES codes in `words` is nearer than `limit` to the query, one or two
# uint64.
_near_vectors: Any = intrinsic(_vectors)


def _constant(typingctx, query):
    size = NARROW_GROUP_CODES if _is_narrow(query) else WIDE_GROUP_CODES
    return types.intp(query), lambda context, builder, signature, args: context.get_constant(types.intp, size)


# Number of codes tested at once, a constant for each type of query.
_group: Any = intrinsic(_constant)


def _is_narrow(query: Any) -> bool:
    return bool(query.dtype == types.uint64 and query.count <= 2)


def _near(query, group, limit):
    """Test whether any code of a group is nearer than `limit`; for compiled loops only."""
    raise NotImplementedError


def _near_by_type(query, group, limit):
    def vectors(query, group, limit):
        return _near_vectors(query, group, limit)

    def one_by_one(query, group, limit):
        near = False
        for code in range(WIDE_GROUP_CODES):
            near |= _distance(query, group, code) < limit
        return near

    return vectors if _is_narrow(query) else one_by_one


overload(_near, inline="always")(_near_by_type)


@compiled
def _append(query, words, start, stop, limit, allowed_N, first_row, rows, distances, count):
    """Write the codes in [start, stop) that are allowed and nearer than `limit` to the outputs; return the count."""
    for code in range(start, stop):
        distance = _distance(query, words, code)
        if distance < limit and (allowed_N.shape[0] == 0 or allowed_N[code]):
            rows[count] = first_row + code
            distances[count] = distance
            count += 1
    return count


@compiled
def _next_near(query, words, first, limit, fetch):
    """Return the first code of the first group, from the code `first` on, that holds a code nearer than `limit`.

    Where no group does, returns the number of codes in whole groups. `fetch` prefetches the lines ahead of each group.
    No array is returned from here: counting its references would take a tenth of the time of a chunk.
    """
    width, size = len(query), _group(query)
    whole = words.shape[0] // width // size * size
    for start in range(first, whole, size):
        # A slice and a loop from 0 let LLVM drop the checks for negative subscripts.
        group = words[start * width : (start + size) * width]
        if fetch:
            for word in range(0, size * width, 8):
                _prefetch(query, group, word + PREFETCH_WORDS)
        if _near(query, group, limit):
            return start
    return whole


@compiled
def _collect(query, words, first, limit, allowed_N, first_row, rows, distances, count):
    """Write the allowed codes nearer than `limit`, from the group at `first` on, to the outputs; return the count."""
    num, size = words.shape[0] // len(query), _group(query)
    whole = num // size * size
    while first < whole:
        count = _append(query, words, first, first + size, limit, allowed_N, first_row, rows, distances, count)
        first = _next_near(query, words, first + size, limit, False)
    return _append(query, words, whole, num, limit, allowed_N, first_row, rows, distances, count)


@compiled
def chunk_distances(query_W, database_NW, start, stop, out):
    """Write the distances of `query_W` to rows start..stop of the database to `out[: stop - start]`."""
    words = query_W.shape[0]
    num = stop - start
    if words == 1:
        # Slices and a loop from 0 let LLVM drop the checks for negative subscripts and use vector registers.
        word, codes_N, out_N = query_W[0], database_NW[start:stop].reshape(num), out[:num]
        for i in range(num):
            out_N[i] = _popcount(np.uint64(word ^ codes_N[i]))
    elif words == 2:
        low, high = query_W[0], query_W[1]
        codes_N, out_N = database_NW[start:stop].reshape(2 * num), out[:num]
        for i in range(num):
            out_N[i] = _popcount(np.uint64(low ^ codes_N[2 * i])) + _popcount(np.uint64(high ^ codes_N[2 * i + 1]))
    else:
        codes_NW, out_N = database_NW[start:stop], out[:num]
        for i in range(num):
            distance = np.uint64(0)
            for w in range(words):
                distance += _popcount(np.uint64(query_W[w] ^ codes_NW[i, w]))
            out_N[i] = distance


@compiled
def distances(queries_QW, database_NW, out_QN):
    for q in range(queries_QW.shape[0]):
        chunk_distances(queries_QW[q], database_NW, 0, database_NW.shape[0], out_QN[q])


@compiled
def _compact(distances, rows, keep, hist_D, spare_d, spare_r):
    """Sort the candidates by distance (a stable counting sort), keep the first `keep`, and recount `hist_D`."""
    count = distances.shape[0]
    place = np.empty(hist_D.shape[0], np.int64)
    total = 0
    for d in range(hist_D.shape[0]):
        place[d] = total
        total += hist_D[d]
    for i in range(count):
        d = distances[i]
        to = place[d]
        place[d] += 1
        if to < keep:
            spare_d[to] = d
            spare_r[to] = rows[i]
    kept = min(count, keep)
    hist_D[:] = 0
    for i in range(kept):
        distances[i] = spare_d[i]
        rows[i] = spare_r[i]
        hist_D[spare_d[i]] += 1
    return kept


@compiled
def _threshold(hist_QD, q, k):
    """Return the least distance within which k candidates lie already: a later row at that distance cannot win."""
    total = 0
    for d in range(hist_QD.shape[1]):
        total += hist_QD[q, d]
        if total >= k:
            return d
    return int(hist_QD.shape[1])


@compiled
def _lead(zeros, words):
    """Return the number of codes between the last boundary of a 64-byte line and the first code.

    Chunks then begin at such boundaries: a vector that spans two lines costs two loads.
    """
    size = words.itemsize * len(zeros)
    before = words.ctypes.data % 64
    return before // size if before % size == 0 else 0


@compiled
def _fetch_share(zeros, words, start, stop, share, shares):
    """Prefetch one of `shares` equal shares of words[start:stop], the next chunk, while the present one is read."""
    lines = (stop - start + 7) // 8
    for line in range(lines * share // shares, lines * (share + 1) // shares):
        _prefetch(zeros, words, start + 8 * line)


@compiled
def scan_knn(zeros, queries_QW, words, allowed_N, radius_Q, first_row, out_d, out_r):
    """Find the k nearest of the codes in the flat `words`; their first row is `first_row`, and k is the width of
    `out_d`.

    `allowed_N` masks the rows that may be found; an empty one allows all. Where fewer than k lie within a query's
    radius, the rest of its outputs is not written.
    """
    num_queries, size, k = queries_QW.shape[0], words.shape[0] // len(zeros), out_d.shape[1]
    chunk = max(_group(zeros), CHUNK_CODES // len(zeros))
    bound = max(2 * k, k + chunk)  # compact when above; one more chunk always fits
    room = bound + chunk
    # The candidates of all queries in one array each: a slice for every query and chunk would count references.
    rows, distances = np.empty(num_queries * room, np.int64), np.empty(num_queries * room, np.int32)
    spare_d, spare_r = np.empty(k, np.int32), np.empty(k, np.int64)
    hist = np.zeros((num_queries, 8 * words.itemsize * len(zeros) + 1), np.int64)
    ends = np.arange(num_queries) * room
    for place in range(-_lead(zeros, words), size, chunk):
        start, stop = max(0, place), min(place + chunk, size)
        chunk_W = words[start * len(zeros) : stop * len(zeros)]
        mask = allowed_N[start:stop]
        for q in range(num_queries):
            limit = np.uint64(min(_threshold(hist, q, k), radius_Q[q] + 1))
            query = _query_words(zeros, queries_QW, q)
            if num_queries > 1:
                _fetch_share(zeros, words, stop * len(zeros), min(stop + chunk, size) * len(zeros), q, num_queries)
            near = _next_near(query, chunk_W, 0, limit, num_queries == 1)
            if near == stop - start:
                continue
            end = _collect(query, chunk_W, near, limit, mask, first_row + start, rows, distances, ends[q])
            for i in range(ends[q], end):
                hist[q, distances[i]] += 1
            if end - q * room > bound:
                found = slice(q * room, end)
                end = q * room + _compact(distances[found], rows[found], k, hist[q], spare_d, spare_r)
            ends[q] = end
    for q in range(num_queries):
        found = slice(q * room, ends[q])
        _compact(distances[found], rows[found], k, hist[q], out_d[q], out_r[q])


@compiled
def scan_range(zeros, queries_QW, words, allowed_N, radius, first_row, counts_QD):
    """Find all codes within `radius`; return (query, distance, row) of each hit, and add to `counts_QD`.

    Hits of one query and distance come in the order of their rows.
    """
    num_queries, size = queries_QW.shape[0], words.shape[0] // len(zeros)
    chunk = max(_group(zeros), CHUNK_CODES // len(zeros))
    room, count, limit = 2 * chunk, 0, np.uint64(radius + 1)
    hit_q, hit_d, hit_r = np.empty(room, np.int32), np.empty(room, np.int32), np.empty(room, np.int64)
    for place in range(-_lead(zeros, words), size, chunk):
        start, stop = max(0, place), min(place + chunk, size)
        chunk_W = words[start * len(zeros) : stop * len(zeros)]
        mask = allowed_N[start:stop]
        for q in range(num_queries):
            if num_queries > 1:
                _fetch_share(zeros, words, stop * len(zeros), min(stop + chunk, size) * len(zeros), q, num_queries)
            if count + chunk > room:
                room *= 2
                old_q, old_d, old_r = hit_q, hit_d, hit_r
                hit_q, hit_d, hit_r = np.empty(room, np.int32), np.empty(room, np.int32), np.empty(room, np.int64)
                hit_q[:count], hit_d[:count], hit_r[:count] = old_q[:count], old_d[:count], old_r[:count]
            query, before = _query_words(zeros, queries_QW, q), count
            near = _next_near(query, chunk_W, 0, limit, num_queries == 1)
            count = _collect(query, chunk_W, near, limit, mask, first_row + start, hit_r, hit_d, before)
            for i in range(before, count):
                hit_q[i] = q
                counts_QD[q, hit_d[i]] += 1
    return hit_q[:count], hit_d[:count], hit_r[:count]


@compiled
def place_hits(hits, place_QD, rows, distances):
    """Move hits to their places: `place_QD` has the next place of each query and distance, and is advanced."""
    hit_q, hit_d, hit_r = hits
    for i in range(hit_q.shape[0]):
        to = place_QD[hit_q[i], hit_d[i]]
        place_QD[hit_q[i], hit_d[i]] = to + 1
        rows[to] = hit_r[i]
        distances[to] = hit_d[i]
