"""The GPU kernel of `hhnet.search.device`: it finds codes closer than a limit by matrix products.

With the bits of a query as signs s = 1 - 2q, and those of a code as c in {0, 1}, q xor c is q + s c, so the Hamming
distance is popcount(q) + sum of s c. That is an int8 product with int32 sums: it is exact, and tensor cores compute it
several times faster than a GPU counts bits.

Shape suffixes: Q queries, N database codes, B bits of a word, W words per code, P places per query.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["first", "last", "places"])  # type: ignore[untyped-decorator]  # Triton has no types
def closer(  # type: ignore[no-untyped-def]
    codes_NW,
    signs_QWB,
    ones_Q,
    limits_Q,
    counts_Q,
    keys_QP,
    first,
    last,
    places,
    WORDS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Record the rows in [first, last) whose distance is below the query's limit, as keys distance << 32 | row.

    Rows beyond the `places` of `keys_QP` are counted but not stored. The queries fill whole blocks.
    """
    row_N = first + tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    query_Q = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    bit_B = tl.arange(0, 32)
    inside_N = row_N < last
    sum_NQ = tl.zeros((BLOCK_N, BLOCK_Q), tl.int32)
    for w in tl.static_range(WORDS):
        word_N = tl.load(codes_NW + row_N * WORDS + w, mask=inside_N, other=0)
        bits_NB = ((word_N[:, None] >> bit_B[None, :]) & 1).to(tl.int8)
        signs_BQ = tl.load(signs_QWB + (query_Q[None, :] * WORDS + w) * 32 + bit_B[:, None])
        sum_NQ = tl.dot(bits_NB, signs_BQ, acc=sum_NQ, out_dtype=tl.int32)
    ones_1Q, limits_1Q = tl.load(ones_Q + query_Q)[None, :], tl.load(limits_Q + query_Q)[None, :]
    found_NQ = (sum_NQ < limits_1Q - ones_1Q) & inside_N[:, None]
    if tl.max(tl.max(found_NQ.to(tl.int32), 1), 0) > 0:  # rarely, once the limits are tight
        counters_NQ = counts_Q + query_Q[None, :] + tl.zeros((BLOCK_N, BLOCK_Q), tl.int32)
        # Relaxed, since nothing else is ordered by the counter: rows may come in any order and are sorted later.
        place_NQ = tl.atomic_add(counters_NQ, 1, mask=found_NQ, sem="relaxed")
        keys_NQ = ((sum_NQ + ones_1Q).to(tl.int64) << 32) | row_N[:, None]
        slots_NQ = keys_QP + query_Q[None, :].to(tl.int64) * places + place_NQ
        tl.store(slots_NQ, keys_NQ, mask=found_NQ & (place_NQ < places))
