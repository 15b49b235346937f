"""Generators of binary linear codes [K, k] of large minimum distance: K bits, 2^k words.

A code is kept as its K columns, integers of k bits: bit j of the word of a message m is the parity of m & column j. The
distance of a linear code is the least weight of its words, the zero word left out.

`_FOUND` holds cyclic and quasi-cyclic codes, which a search over all columns would not find. Their columns are orbits
r, r x, r x^2 ... modulo a polynomial h over GF(2), until r comes again, for each of several r, and single columns. They
were found by choosing orbits greedily and exchanging them (after Braun, Kohnert and Wassermann 2005), for lengths that
are a multiple of 8 as in the table of distances of `hhnet.nn.centres`. Other lengths are made from these by removing or
adding columns, and small dimensions by choosing all columns greedily.

Shape suffixes: k dimension, K bits, M messages, P candidate columns, W words of 64 bits.
"""

from collections.abc import Sequence
from functools import cache

import numpy as np
import numpy.typing as npt

MAX_DIMENSION = 16
_LONGEST = 128
_GREEDY_DIMENSION = 8  # up to here a greedy choice of all columns is as good as the table, or nearly
_CELLS = 1 << 22  # largest matrix of messages x candidate columns, in entries
_MANTISSA = 24  # bits of a float32

_Columns = list[int]
_Floats = npt.NDArray[np.float32]

# Each line: K, k, h, each r, and after | the single columns. All numbers but K and k are hexadecimal.
_FOUND = """
8 4 11 1 7
16 9 273 1 1d1
16 10 537 5 | 16f
16 11 9af c1 765
16 12 1001 1 777
16 13 2001 7eb 1fff 1fff 1fff
16 14 4001 fdf 1555
16 15 8001 127f 7fff
16 16 10001 5eff
24 9 2ef b f9
24 10 401 1 9f 155 155
24 11 801 1 ed 7ff 7ff
24 12 1001 1 17b
24 13 2bd7 37 194d 194d 194d
24 14 4001 fdf 387 1555 3fff
24 15 8001 127f 1ce7 1249 7fff
24 16 1195f 24f1 f735 f735 f735
32 6 41 1 d 7 1f b 15
32 9 273 1 17 1d1 1d1
32 10 4b7 2d | 2d3
32 11 867 1f 7dd
32 12 1653 f 75 | e ba3 13b c7
32 13 2001 7eb 3a5 1fff 1fff 1fff 1fff 1fff 1fff
32 14 4001 67f 47d 1555 1555
32 15 8001 50b 629 7fff 7fff
32 16 10001 55d 1cb7
40 9 273 1 17 e1 13
40 10 401 177 eb 9 3b
40 11 fff 13 51 5d 111
40 12 1001 1cf 1ff e5 777
40 13 2001 7eb 4df 6b 1fff
40 14 5ab3 1ad | 2834
40 15 b0ff 6c7 | 4f62 2dda 3851 59f5 3aea 5133 1016 96f 2022
40 16 10001 128f cd7 1313
48 8 101 7 37 17 3d 3 15
48 9 201 67 b7 19 1 f 49
48 10 555 d 61 59 2b
48 11 f59 2b 6d bf 273
48 12 1001 119 19 2ff 43
48 13 36db 629 8d 357 1249 1249 1249
48 14 7fff 747 723 cad 1249
48 15 8001 127f 629 2e5 1249
48 16 10001 5eff b4d c39
56 7 81 b 2f 37 7 1f d 1 15
56 9 215 b 1f3 1f3 1f3 1f3 1f3
56 10 555 d 61 59 2b 6b 111
56 11 801 2f 16f 37f 3f 95 7ff
56 12 1001 13 14d 7 35b 7df 555
56 13 2001 1dd 4f7 15 2a9 1fff 1fff 1fff 1fff
56 14 4001 4d7 7b7 dbb 109
56 15 9249 381 1cd 307 71c7 71c7
56 16 1b6db 455 c23 1309 71c7
64 7 81 13 1 1f 15 b 37 d 7 2f 7f
64 9 201 b 7 39 29 6f 67 33 1ff
64 10 4b3 15 391
64 11 923 11 | d8
64 12 1001 f 2fb 27b 3bf 1e7 777
64 13 3775 b 12d3
64 14 62ef 1 15d 1f63 1f63
64 15 f8d1 13 | 59a4
64 16 1c523 5d bce1
72 9 201 b 7 39 ff 2b 67 9 29
72 10 4b3 15 a9 391 391
72 11 fff 75 97 255 cb a9 3
72 12 1001 295 165 53 19f 11 b3
72 13 2bd7 25f 111 df 2ef 194d 194d
72 14 4001 6cb ddb 5f7 111 175 1555
72 15 d325 6e1 307 2dd 953 4ee3 4ee3
72 16 10001 55ab 139d cbb 194d 303
80 8 101 5f 9 19 13 57 3 7f 7 25 d
80 9 3ff 67 b 19 59 23 2d 17 47
80 10 401 1 79 1ff ed 73 3d 4d 57
80 11 f59 9d 25 97 d3 285 79
80 12 1001 3ff 35d a7 1e5 5d 1f9 34d 555
80 13 2bd7 25f 111 df 2ef 4d5 194d 194d 194d
80 14 7fff 154d 17d 589 b69 22d c63
80 15 8001 3bdf 71 9b 2dbf ccf c63
80 16 10001 5eff 111 c39 2b77 bd3
88 8 101 7 37 b 3d 3b 15 9 7f 1f 1 5b
88 9 20b 1 1f9 1f9 1f9
88 10 7ff cb 47 15 73 cd 14d 5b ad
88 11 801 cb 3ff 137 75 eb 2db 5d 2ff
88 12 1049 37 2b 6b 2f 6c3 fc7
88 13 2ded 10f 73 41b 573 1b5b 1b5b 1b5b 1b5b
88 14 4001 fdf 2f3 5df 109 6ef 16d7 1555 1555
88 15 bd73 15d 875 | 2eab 2634 6def 77de
88 16 1ced5 999 | fbbf d72c 2ac6
96 7 8b 1 f 1f 5 d 3 13 35
96 9 273 1 17 45 d 7d 61 5f 1d1
96 10 555 b1 2f 5b 19b 3b 9b 2b cf
96 11 8c3 69 | 14f 2 282 712 fa 36a 72c
96 12 100d 1 ffb ffb ffb ffb ffb ffb ffb
96 13 36db ff 163 dd 97 497 3d 421 1249
96 14 63b9 347 da3 373 d3 3dd 1653 | 1999 d88
96 15 d101 3ab 66b 243 | 4687 5cff 13ed
96 16 1cfcd 17cb 1819 86d babb babb babb
104 6 53 1 3 1 3 7 9 b 1d
104 9 279 7 3 5f 23 17 57 1d7 1d7
104 10 555 1d 1f 29 6f f 6d 133 47 6b 111
104 11 9c3 19 f 741 741
104 12 1fff 49 f5 333 347 d3 b1 b3 113
104 13 2001 7eb 3a5 133 151 6b5 1d 1fd 55d
104 14 62ef 181 289 46b 71b 1f63 1f63
104 15 8001 8c5 1ff 1f55 1fdf 14df 44d 2d6b 421 1249 7fff
104 16 18c63 127f d69 7f1 103 2acd 1953
112 7 8b 1 f 7 5 d 3 1f 13 35 79
112 8 115 1d 1 b 29 7 53 3 19
112 9 273 1 19 45 d 7d 61 23 35 1d1 1d1
112 10 401 177 77 47 17 fb 73 6f 79 eb 15 1d 155
112 11 801 155 a7 2b 21 9b 157 127 1dd fd 75 7ff 7ff
112 12 1049 357 91 11d fb 12b 2ef
112 13 2c97 1 253 6d 61
112 14 4001 6cb 63f a97 389 19b 56d 3bd 149
112 15 a4cb 1 2f 691 c49 8e9 20e5
112 16 10001 55f7 fe5 c6d 8ed 729 ea9 1d9d
120 8 139 5 53 37 1 b 9 3 | 11
120 9 34b 49 43 b 37 23 11 9 139
120 10 421 15 69 7f 53 fd 17 5 19
120 11 9af c1 5f c9 a9 ab 2b 2a3 25
120 12 1249 28f 30b 55d 1c5 fb 41 ef eb
120 13 3af5 2f 6f a9 79 459 14b 5b3 1653
120 14 63b9 3d5 17 409 243 3f7 b13 e3f | 30d0
120 15 a4cb 69d 153 6b1 b9 1679 1819 e3f 63b9
120 16 153d7 577 157
128 8 107 1 fd
128 9 249 5f 37 b 2b c7 5 47 57 23 d 9 bd
128 10 555 e3 87 21 11b b 17 ef 47 5d 8b e9 111
128 11 8a5 1 13 | 1c9 7e1
128 12 12d3 5 5b | 541 a1a
128 13 3775 b 17 12d3 12d3
128 14 547d 3 | 77d
128 15 f49b 1f 5389
128 16 10001 5eff 111 c39 19d bd3 3d77 336d de7
"""


@cache
def _found() -> dict[tuple[int, int], tuple[int, ...]]:
    """Read the table: the columns of its codes by (K, k)."""
    codes = {}
    for line in _FOUND.split("\n"):
        if line:
            orbits, _, single = line.partition("|")
            bits, dimension, modulus, *starts = orbits.split()
            columns = [column for start in starts for column in _orbit(int(start, 16), int(modulus, 16))]
            columns += [int(column, 16) for column in single.split()]
            codes[int(bits), int(dimension)] = tuple(columns)
    return codes


def _orbit(start: int, modulus: int) -> _Columns:
    """List start, start x, start x^2 ... modulo a polynomial of degree k until start comes again.

    The polynomial has a constant term, so x is invertible and the orbit is a cycle.
    """
    columns, top = [start], modulus.bit_length() - 1
    while True:
        following = columns[-1] << 1
        if following >> top:
            following ^= modulus
        if following == start:
            return columns
        columns.append(following)


def generator(bits: int, dimension: int) -> npt.NDArray[np.int64]:
    """Return the best code known here as 0 and 1, int64 (k, K), for 1 <= k <= 16 and k <= K; always the same."""
    return as_bits(np.array(_columns(bits, dimension, np.random.default_rng(0))), dimension).T


def as_bits(numbers: npt.NDArray[np.int64], dimension: int) -> npt.NDArray[np.int64]:
    """Return the lowest `dimension` bits of each number, int64 (N, k)."""
    return numbers[:, None] >> np.arange(dimension) & 1


def minimum_distance(generator_kK: npt.NDArray[np.int64]) -> int:
    """Return the minimum distance of a code, from the weights of all its words."""
    padded_kK = np.pad(generator_kK, ((0, 0), (0, -generator_kK.shape[1] % 64)))
    rows_kW = np.ascontiguousarray(np.packbits(padded_kK.astype(np.uint8, order="C"), axis=1)).view(np.uint64)
    words_MW = np.zeros((1, rows_kW.shape[1]), np.uint64)
    for row_W in rows_kW:
        words_MW = np.concatenate([words_MW, words_MW ^ row_W])
    return int(np.bitwise_count(words_MW[1:]).sum(1, dtype=np.int64).min())


def _columns(bits: int, dimension: int, rng: np.random.Generator) -> _Columns:
    """Choose the columns of a [bits, dimension] code: the best of the table, codes made from it, and a greedy
    choice."""
    if (bits, dimension) in _found():
        return list(_found()[bits, dimension])
    options = []
    if dimension <= _GREEDY_DIMENSION or bits < 16:
        options.append(_grown([1 << i for i in range(dimension)], bits, dimension, rng))
    if bits > _LONGEST:
        whole = [c for _ in range(bits // _LONGEST) for c in _mixed(_columns(_LONGEST, dimension, rng), dimension, rng)]
        options.append(_grown(whole, bits, dimension, rng))
        if bits % _LONGEST >= dimension:
            options.append(whole + _mixed(_columns(bits % _LONGEST, dimension, rng), dimension, rng))
    longer, shorter = (-(-bits // 8) * 8, dimension), (bits // 8 * 8, dimension)
    if longer in _found():
        options.append(list(_found()[longer][:bits]))
    if shorter in _found():
        options.append(_grown(_found()[shorter], bits, dimension, rng))
    return max(options, key=lambda columns: minimum_distance(as_bits(np.array(columns), dimension).T))


def _mixed(columns: _Columns, dimension: int, rng: np.random.Generator) -> _Columns:
    """Return an equivalent code in which other messages have the light words.

    Two codes side by side add their weights word by word, so their light words should belong to different messages.
    """
    images = np.zeros(1, np.int64)
    while len(np.unique(images)) < 2**dimension:  # again until the map is invertible, as three in ten are
        images = np.zeros(1, np.int64)
        for image in rng.integers(1, 2**dimension, dimension):
            images = np.concatenate([images, images ^ image])
    return [int(image) for image in images[columns]]


def _grown(base: Sequence[int], bits: int, dimension: int, rng: np.random.Generator) -> _Columns:
    """Append columns to `base` up to `bits`, then exchange each of the appended ones twice."""
    parity = np.bitwise_xor.reduce(base, keepdims=True)  # the sum of all columns; appended, it makes all weights even
    drawn = rng.permutation(np.arange(1, 2**dimension))[: max(dimension, _CELLS >> dimension)]
    search = _Search(base, np.concatenate([parity, drawn]), dimension)
    for _ in range(bits - len(base)):
        search.add(int(search.gain().argmax()))
    for _ in range(2 * (bits - len(base))):
        search.drop()
        search.add(int(search.gain().argmax()))
    return [*base, *search.columns()]


class _Search:
    """A greedy exchange of columns: columns of `pool` join those of `base` so that sum over words of 2^-weight falls.

    Light words count most. Words that are heavier than the lightest by more than a limit count nothing; so all sums are
    exact in float32, and every machine chooses alike.
    """

    def __init__(self, base: Sequence[int], pool: npt.NDArray[np.int64], dimension: int) -> None:
        messages_M: npt.NDArray[np.uint32] = np.arange(1, 2**dimension, dtype=np.uint32)
        self.pool, self.chosen = pool, list[int]()
        self.heavier = _MANTISSA - dimension
        # The bit that candidate column p adds to the word of message m.
        self.adds_MP = _parity(messages_M[:, None] & pool.astype(np.uint32))
        self.weight_M = np.zeros(len(messages_M), np.float32)
        for column in base:
            self.weight_M += _parity(messages_M & np.uint32(column))

    def gain(self) -> _Floats:
        """Return, for each candidate, how much the words it makes heavier count; light words count more."""
        above_M = self.weight_M - self.weight_M.min()
        gain: _Floats = np.where(above_M <= self.heavier, np.exp2(-above_M), np.float32(0)) @ self.adds_MP
        return gain

    def add(self, candidate: int) -> None:
        """Choose a candidate."""
        self.chosen.append(candidate)
        self.weight_M += self.adds_MP[:, candidate]

    def drop(self) -> None:
        """Remove the candidate that was chosen first."""
        self.weight_M -= self.adds_MP[:, self.chosen.pop(0)]

    def columns(self) -> _Columns:
        """Return the chosen columns."""
        return [int(column) for column in self.pool[self.chosen]]


def _parity(numbers: npt.NDArray[np.uint32]) -> _Floats:
    return (np.bitwise_count(numbers) & 1).astype(np.float32)
