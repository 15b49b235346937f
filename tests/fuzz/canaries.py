"""Files that run a program when they are loaded the way many readers load them. The program leaves a file behind.

made(folder)           name -> bytes of a specimen; loading `name` unsafely creates folder/fired-<name>
fire(folder)           loads every specimen the unsafe way; to be run in a process of its own
"""

import io
import os
import pickle
import sys
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

RAY_EXTENSION = b"ray.data.arrow_tensor"


class Canary:
    """Unpickled, it runs a shell command."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.mark}'",)


def mark_of(folder: Path, name: str) -> Path:
    return folder / f"fired-{name}"


def made(folder: Path) -> dict[str, bytes]:
    """The specimens, by suffix; `pipe` and `rewrite` are URLs rather than files."""
    import torch

    def canary(name: str) -> Canary:
        return Canary(mark_of(folder, name))

    found = {name: pickle.dumps(canary(name)) for name in ("pkl", "pickle", "pyd", "metadata", "joblib")}
    for name in ("pth", "pt", "ckpt"):
        sink = io.BytesIO()
        torch.save(canary(name), sink)
        found[name] = sink.getvalue()
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        archive.writestr("archive/data/constants/model_constants.pkl", pickle.dumps(canary("pt2")))
    found["pt2"] = sink.getvalue()
    sink = io.BytesIO()
    np.save(sink, np.array([canary("npy")], dtype=object), allow_pickle=True)
    found["npy"] = sink.getvalue()
    sink = io.BytesIO()
    np.savez(sink, a=np.array([canary("npz")], dtype=object))
    found["npz"] = sink.getvalue()
    found["yaml"] = f"!!python/object/apply:os.system [\"touch '{mark_of(folder, 'yaml')}'\"]\n".encode()
    found["parquet"] = parquet_of(pickle.dumps(canary("parquet")))
    found["pipe"] = f"pipe:touch '{mark_of(folder, 'pipe')}'".encode()
    found["rewrite"] = f"s3://=pipe:touch '{mark_of(folder, 'rewrite')}' #".encode()
    return found


def parquet_of(serialized: bytes, paths: list[str] | None = None) -> bytes:
    """A table of paths and labels with a column whose type Ray used to unpickle."""
    paths = paths or ["a.jpg"]
    storage = pa.array([[1]] * len(paths), pa.list_(pa.int64()))
    mark = {b"ARROW:extension:name": RAY_EXTENSION, b"ARROW:extension:metadata": serialized}
    fields = [pa.field("path", pa.string()), pa.field("label", pa.string())]
    fields.append(pa.field("t", storage.type, metadata=mark))
    table = pa.Table.from_arrays([pa.array(paths), pa.array(["x"] * len(paths)), storage], schema=pa.schema(fields))
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


def fire(folder: Path) -> None:
    """Load every specimen the way that must never be used here."""
    os.environ["RAY_DATA_AUTOLOAD_CLOUDPICKLE_TENSOR_METADATA"] = "1"
    specimens = made(folder)
    os.environ["GOPEN_REWRITE"] = specimens["rewrite"].decode()
    import torch
    import yaml
    from ray.data._internal.tensor_extensions import arrow as ray_arrow
    from webdataset.gopen import gopen

    with zipfile.ZipFile(io.BytesIO(specimens["pt2"])) as archive:
        model = archive.read(archive.namelist()[0])

    def open_url(url: str) -> None:
        with gopen(url) as stream:
            stream.read()

    with suppress(pa.ArrowKeyError):  # which says that Ray has done so itself
        pa.register_extension_type(ray_arrow.ArrowTensorType((1,), pa.int64()))
    loads = {
        **{name: lambda data: pickle.loads(data) for name in ("pkl", "pickle", "pyd", "metadata", "joblib")},
        **{name: lambda data: torch.load(io.BytesIO(data), weights_only=False) for name in ("pth", "pt", "ckpt")},
        **{name: lambda data: np.load(io.BytesIO(data), allow_pickle=True)["a"] for name in ("npz",)},
        "npy": lambda data: np.load(io.BytesIO(data), allow_pickle=True),
        "pt2": lambda _: pickle.loads(model),
        "yaml": yaml.unsafe_load,
        "parquet": lambda data: pq.read_table(io.BytesIO(data)),
        "pipe": lambda data: open_url(data.decode()),
        "rewrite": lambda _: open_url("s3://bucket/shard.tar"),
    }
    for name, load in loads.items():
        try:
            load(specimens[name])
        except Exception as error:
            sys.stderr.write(f"{name}: {type(error).__name__}: {error}\n")


if __name__ == "__main__":
    fire(Path(sys.argv[1]))
