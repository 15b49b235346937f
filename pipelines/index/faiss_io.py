"""What the kinds that keep Faiss indexes share: how their bytes are made and read, and one thread for a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

import faiss

from pipelines.errors import DamagedArtifact

_limits = Lock()


@contextmanager
def readable(what: str, size: int) -> Iterator[None]:
    """Let Faiss parse `size` bytes, in which no more elements can lie; what claims more is refused unread.

    Faiss says with RuntimeError what it refuses, and with MemoryError what would be too large. Its limits are those of
    the process.
    """
    with _limits:
        faiss.set_deserialization_loop_limit(size)
        faiss.set_deserialization_vector_byte_limit(size)
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            raise DamagedArtifact(f"{what} is not readable by Faiss: {str(error).splitlines()[0]}") from None


def bytes_of(index: Any) -> bytes:
    """The index as Faiss writes it."""
    return bytes(faiss.serialize_index_binary(index).tobytes())


@contextmanager
def one_thread() -> Iterator[None]:
    """Have Faiss work on one thread, so that the same input gives the same bytes."""
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(threads)
