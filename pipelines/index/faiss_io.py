"""Reads and writes Faiss indexes for the kinds that keep them, and limits Faiss to one thread for a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

import faiss

from pipelines.errors import DamagedArtifact

_limits = Lock()


@contextmanager
def limit_parsing(what: str, size: int) -> Iterator[None]:
    """Let Faiss parse `size` bytes inside the context, and refuse bytes that claim more elements than fit into them.

    Raises DamagedArtifact. Faiss reports refused bytes by RuntimeError and too large ones by MemoryError. Its limits
    hold for the whole process.
    """
    with _limits:
        faiss.set_deserialization_loop_limit(size)
        faiss.set_deserialization_vector_byte_limit(size)
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            raise DamagedArtifact(f"{what} is not readable by Faiss: {str(error).splitlines()[0]}") from None


def faiss_bytes(index: Any) -> bytes:
    """Return the index in Faiss's own format."""
    return bytes(faiss.serialize_index_binary(index).tobytes())


@contextmanager
def one_thread() -> Iterator[None]:
    """Run Faiss on one thread inside the context, so that the same input gives the same bytes."""
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(threads)
