"""Generators of binary linear codes [K, k] of large minimum distance: K bits, 2^k words.

A code is kept as its K columns, integers of k bits: bit j of the word of a message m is the parity of m & column j. The
distance of a linear code is the least weight of its words, the zero word left out.

`linear_codes.txt` holds cyclic and quasi-cyclic codes, which a search over all columns would not find. Their columns
are orbits r, r x, r x^2 ... modulo a polynomial h over GF(2), until r comes again, for each of several r, and single
columns. They were found by choosing orbits greedily and exchanging them (after Braun, Kohnert and Wassermann 2005), for
lengths that are a multiple of 8 as in the table of distances of `hhnet.nn.centres`. Other lengths are made from these
by removing or adding columns, and dimensions that are not in the table by choosing all columns greedily. The table ends
at dimension 10: 1,024 classes, more than any protocol has.

Shape suffixes: k dimension, K bits, M messages, P candidate columns, W words of 64 bits.
"""

from collections.abc import Sequence
from functools import cache
from importlib.resources import files

import numpy as np
import numpy.typing as npt

MAX_TABLE_DIMENSION = 10
_MAX_BITS = 128
_TABLE_ONLY_DIMENSIONS = (9, 10)  # dimensions in which a greedy choice of all columns is far worse than the table
_MAX_MATRIX_ENTRIES = 1 << 22  # largest matrix of messages x candidate columns, in entries
_MANTISSA_BITS = 24  # bits of a float32

_Columns = list[int]
_Floats = npt.NDArray[np.float32]


@cache
def _found() -> dict[tuple[int, int], tuple[int, ...]]:
    """Read the table: the columns of its codes by (K, k)."""
    codes = {}
    for line in files(__package__).joinpath("linear_codes.txt").read_text().splitlines():
        if not line.startswith("#"):
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
    """Return the best code known here as 0 and 1, int64 (k, K), for 1 <= k <= 14 and k <= K; always the same."""
    return as_bits(np.array(_choose_columns(bits, dimension, np.random.default_rng(0))), dimension).T


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


def _choose_columns(bits: int, dimension: int, rng: np.random.Generator) -> _Columns:
    """Choose the columns of a [bits, dimension] code: the best of the table, codes made from it, and a greedy
    choice."""
    if (bits, dimension) in _found():
        return list(_found()[bits, dimension])
    options = []
    if dimension not in _TABLE_ONLY_DIMENSIONS or bits < 16:
        options.append(_grown([1 << i for i in range(dimension)], bits, dimension, rng))
    if bits > _MAX_BITS:
        whole = [
            c
            for _ in range(bits // _MAX_BITS)
            for c in _mixed(_choose_columns(_MAX_BITS, dimension, rng), dimension, rng)
        ]
        options.append(_grown(whole, bits, dimension, rng))
        if bits % _MAX_BITS >= dimension:
            options.append(whole + _mixed(_choose_columns(bits % _MAX_BITS, dimension, rng), dimension, rng))
    longer, shorter = (-(-bits // 8) * 8, dimension), (bits // 8 * 8, dimension)
    if longer in _found():
        options.append(list(_found()[longer][:bits]))
    if shorter in _found():
        options.append(_grown(_found()[shorter], bits, dimension, rng))
    return max(options, key=lambda columns: minimum_distance(as_bits(np.array(columns), dimension).T))


def _mixed(columns: _Columns, dimension: int, rng: np.random.Generator) -> _Columns:
    """Return an equivalent code whose light words belong to other messages.

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
    drawn = rng.permutation(np.arange(1, 2**dimension))[: max(dimension, _MAX_MATRIX_ENTRIES >> dimension)]
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
        self.heavier = _MANTISSA_BITS - dimension
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
