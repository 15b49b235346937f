"""Exact Hamming search over packed codes in the memory of a GPU.

The answers are those of `hhnet.hamming_knn`. The codes are scanned in chunks that grow. Each chunk records only the
rows closer than the k-th best so far, few enough to sort together with the k best. Rows come in ascending order, so a
row at the distance of the k-th best or beyond is not among the k: the chunks do not change the answer.

Shape suffixes: Q queries, N database codes, B bits of a word, W words per code, P places per query.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hhnet.codes import pad_bytes
from hhnet.search._closer import closer
from hhnet.search.kernels import as_words

Codes = npt.NDArray[np.uint8]

WORD_BYTES = 4
"""Bytes per word on the GPU."""

# Queries -> rows of one block of threads; Hopper's products take 64 and up.
_ROWS_PER_BLOCK = {16: 128, 64: 128, 128: 64}
_PLACES_PER_ROW = 4  # places per row expected to need one
# Longest chunk of full blocks, in times the rows before it; recording rows costs more there than chunks do.
_MAX_CHUNK_GROWTH = 2
_NO_DISTANCE = np.iinfo(np.int32).max


class DeviceCodes:
    """Codes in the memory of a GPU, for searches by many queries at once.

    Each code takes its bytes, rounded up to a multiple of 4; a search takes 200 MB more.
    """

    def __init__(
        self, parts: Sequence[Codes], device: str = "cuda", rows: int = 1 << 24, places: int = 4096, keys: int = 1 << 24
    ) -> None:
        """Copy `parts`, uint8 (n, bytes) each, to the GPU; their rows are numbered one part after another.

        Args:
            parts: the codes.
            device: where they go.
            rows: how many are copied at once.
            places: for found rows, at least, per query and chunk.
            keys: places of all queries together, 8 bytes each.

        Raises:
            TypeError: for codes that are not uint8. ValueError: for shapes that do not fit, no part, or 2^31 codes.
            torch.OutOfMemoryError: where the GPU has no room for them.
        """
        self._places, self._keys = places, keys
        words = [as_words(part, "codes") for part in parts]  # checks them
        widths = {np.shape(part)[1] for part in parts}
        self.count = sum(map(len, words))
        if len(widths) != 1 or self.count >= 1 << 31:
            raise ValueError(
                f"{self.count} codes of {sorted(widths)} bytes: there must be fewer than 2^31 of one width"
            )
        self.width, self._device = widths.pop(), torch.device(device)
        self._codes_NW = torch.empty((self.count, -(-self.width // WORD_BYTES)), dtype=torch.int32, device=self._device)
        start = 0
        for part in parts:
            for first in range(0, len(part), rows):
                piece = part[first : first + rows]
                words_nW = torch.from_numpy(pad_bytes(piece, WORD_BYTES).view(np.int32))
                self._codes_NW[start : start + len(piece)].copy_(words_nW)
                start += len(piece)

    def knn(self, queries: Codes, k: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """Find the k nearest codes of each query, exactly.

        Args:
            queries: uint8 (Q, bytes).
            k: how many neighbours, at least 1; cut to N.

        Returns:
            Distances in bits, int32 (Q, min(k, N)), and rows, int64 (Q, min(k, N)), each row of both ordered by
            (distance, row), as `hamming_knn` returns them.

        Raises:
            TypeError: for codes that are not uint8. ValueError: for shapes that do not fit or k < 1.
        """
        as_words(queries, "queries")
        if queries.shape[1] != self.width or k < 1:
            raise ValueError(f"queries must have {self.width} bytes, and k be at least 1: got {queries.shape[1]}, {k}")
        k = min(k, self.count)
        keys_QK = np.empty((len(queries), k), np.int64)
        places = max(self._places, _PLACES_PER_ROW * k)
        step = max(min(_ROWS_PER_BLOCK), self._keys // places // max(_ROWS_PER_BLOCK) * max(_ROWS_PER_BLOCK))
        for start in range(0, len(queries) if k else 0, step):
            part = slice(start, start + step)
            keys_QK[part] = self._nearest(pad_bytes(queries[part], WORD_BYTES), k, places).cpu().numpy()
        return (keys_QK >> 32).astype(np.int32), keys_QK & 0xFFFFFFFF

    def _nearest(self, queries: Codes, k: int, places: int) -> Tensor:
        """Return the k smallest keys, distance << 32 | row, int64 (Q, k)."""
        num = len(queries)
        block_q = next((size for size in _ROWS_PER_BLOCK if num <= size), max(_ROWS_PER_BLOCK))
        rows = -(-num // block_q) * block_q
        bits_QB = np.zeros((rows, 8 * queries.shape[1]), np.int8)
        bits_QB[:num] = np.unpackbits(queries, axis=1, bitorder="little")
        signs_QWB = torch.from_numpy(1 - 2 * bits_QB).to(self._device)
        ones_Q = torch.from_numpy(bits_QB.sum(1, dtype=np.int32)).to(self._device)
        limits_Q = torch.full((rows,), _NO_DISTANCE, dtype=torch.int32, device=self._device)
        limits_Q[num:] = -1  # queries that only fill the last block find nothing
        best_QK = torch.empty((num, 0), dtype=torch.int64, device=self._device)
        first, length = 0, places
        while first < self.count:
            last = min(self.count, first + length)
            counts_Q = torch.zeros(rows, dtype=torch.int32, device=self._device)
            keys_QP = torch.full((rows, places), torch.iinfo(torch.int64).max, device=self._device)
            grid = -(-(last - first) // _ROWS_PER_BLOCK[block_q]), rows // block_q
            closer[grid](
                *(self._codes_NW, signs_QWB, ones_Q, limits_Q, counts_Q, keys_QP, first, last, places),
                WORDS=self._codes_NW.shape[1],
                BLOCK_Q=block_q,
                BLOCK_N=_ROWS_PER_BLOCK[block_q],
                num_warps=4,
            )
            most = int(counts_Q.max())
            if most > places:  # some rows found no place: again with a shorter chunk; one of `places` rows always fits
                length = max(places, (last - first) // 2)
                continue
            found_QP = torch.cat([best_QK, keys_QP[:num, :most]], dim=1)
            best_QK = found_QP.topk(k, dim=1, largest=False).values
            limits_Q[:num] = (best_QK[:, -1] >> 32).int()
            # In random order, about k * length / last rows of a chunk are closer than the k-th best of those before.
            growth = places / (_PLACES_PER_ROW * k)
            if block_q == max(_ROWS_PER_BLOCK):
                growth = min(_MAX_CHUNK_GROWTH, growth)
            first, length = last, max(places, int(last * growth))
        return best_QK
