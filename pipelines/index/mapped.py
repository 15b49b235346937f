"""Maps tensors of a safetensors file; the library's own numpy reader would copy them."""

import json
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.errors import DamagedArtifact

MAX_HEADER_BYTES = 1 << 16


def map_tensor(path: Path, name: str, dtype: np.dtype[Any], code: str, shape: tuple[int | None, ...]) -> Any:
    """Map the tensor `name` of dtype `dtype` and return it; None in `shape` stands for any length.

    `code` is the name of the dtype in safetensors. Raises DamagedArtifact where the file does not hold the tensor.
    """
    # safetensors: 8 bytes with the length of the header, the header as JSON, then the data, to which its offsets refer.
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = stream.read(length) if length <= MAX_HEADER_BYTES else b""
    try:
        entry = json.loads(header)[name]
        start, stop = (int(offset) for offset in entry["data_offsets"])
        found = str(entry["dtype"]), tuple(int(number) for number in entry["shape"])
    except (ValueError, KeyError, TypeError, RecursionError):
        raise DamagedArtifact(f"{path} is not a safetensors file with a tensor {name}") from None
    size = prod(found[1]) * dtype.itemsize
    fits = len(found[1]) == len(shape) and all(
        number > 0 if wanted is None else number == wanted for number, wanted in zip(found[1], shape, strict=True)
    )
    if found[0] != code or not fits or start < 0 or stop - start != size or 8 + length + stop > path.stat().st_size:
        expected = tuple("any" if number is None else number for number in shape)
        raise DamagedArtifact(f"{path}: {name} is {found[0]} {found[1]}, expected {code} {expected}")
    return np.memmap(path, dtype, "r", 8 + length + start, found[1])
