"""The samples that take part, numbered from 0: their codes, ids and keys in mapped files of a scratch folder."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from hhnet.search.multi_index import Codes, padded
from pipelines.cluster.progress import stage
from pipelines.dedupe.source_tars import SourceTar
from pipelines.encode.codes import code_array
from pipelines.index.layout import ROW_MASK

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Corpus:
    """All samples, in the order of their ids; those of an index come first."""

    codes: Codes
    """uint8 (N, 8 * W), zero-padded."""
    ids: npt.NDArray[np.int64]
    keys: pa.LargeStringArray
    known: int
    """Number of samples that are already in the index; they come first."""
    shards: dict[int, str]

    @property
    def count(self) -> int:
        """Number of samples."""
        return len(self.ids)

    def numbers(self, ids: npt.NDArray[np.int64]) -> Numbers:
        """Return the numbers of samples, given their ids."""
        return np.searchsorted(self.ids, ids)

    def columns(self, numbers: Numbers, suffix: str = "") -> dict[str, pa.Array]:
        """Return id, key, shard and row of some samples, as columns of the artifact's tables."""
        ids = self.ids[numbers]
        ordinals, places = np.unique(ids >> 32, return_inverse=True)
        names, back = np.unique([self.shards[int(ordinal)] for ordinal in ordinals], return_inverse=True)
        indices = back[places] if len(ids) else places
        codes, texts = pa.array(indices.astype(np.int32)), pa.array(names.tolist(), pa.string())
        columns = {
            "id": pa.array(ids),
            "key": pc.take(self.keys, pa.array(numbers)).cast(pa.string()),
            "shard": pa.DictionaryArray.from_arrays(codes, texts),
            "row": pa.array((ids & ROW_MASK).astype(np.int32)),
        }
        return {f"{name}{suffix}": column for name, column in columns.items()}


def read_corpus(sources: Sequence[SourceTar], width: int, folder: Path) -> Corpus:
    """Read every source once, with codes of `width` bytes, and keep the samples' columns in files of `folder`."""
    words, known = (width + 7) // 8, 0
    ends = np.zeros(1, np.int64)
    names = ("codes", "ids", "ends", "keys")
    with ExitStack() as stack, stage("dedupe: reading", len(sources), unit="tars") as advance:
        files = {name: stack.enter_context((folder / name).open("wb")) for name in names}
        files["ends"].write(ends.tobytes())
        for source in sources:
            table = source.read()
            known += len(table) if source.place.indexed else 0
            files["codes"].write(padded(code_array(table["code"])).tobytes())
            files["ids"].write(table["id"].to_numpy().tobytes())
            lengths, data = _strings(table["key"])
            ends = ends[-1:] + np.cumsum(lengths) if len(lengths) else ends
            files["ends"].write(ends.tobytes() if len(lengths) else b"")
            files["keys"].write(data)
            advance(1)
    mapped = {name: _mapped(folder / name) for name in names}
    ids = np.frombuffer(mapped["ids"], np.int64)
    keys = pa.LargeStringArray.from_buffers(len(ids), mapped["ends"], mapped["keys"])
    codes = np.frombuffer(mapped["codes"], np.uint8).reshape(-1, 8 * words)
    shards = {source.place.ordinal: source.place.shard for source in sources}
    return Corpus(codes, ids, keys, known, shards)


def _strings(column: pa.ChunkedArray) -> tuple[npt.NDArray[np.int64], Any]:
    """Return the length in bytes of each string of a column, and the bytes of all strings one after another."""
    lengths = pc.binary_length(column).to_numpy().astype(np.int64)
    # Large strings, whose offsets have 64 bits: all keys together may take more than 2 GiB.
    chunks = [chunk.cast(pa.large_string()) for chunk in column.chunks]
    pieces = []
    for chunk in chunks:
        _, offsets, data = chunk.buffers()
        inside = np.frombuffer(offsets, np.int64)[chunk.offset : chunk.offset + len(chunk) + 1]
        pieces.append(memoryview(data)[int(inside[0]) : int(inside[-1])] if data is not None else b"")
    return lengths, b"".join(pieces)


def _mapped(path: Path) -> pa.Buffer:
    """Map a file's bytes; the system may drop them from memory and read them again."""
    if not path.stat().st_size:  # an empty file cannot be mapped
        return pa.py_buffer(b"")
    with pa.memory_map(str(path)) as source:
        return source.read_buffer()
