"""Folders of pictures, archives of them, and the shards that they became."""

import bz2
import gzip
import io
import lzma
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.config.loading import load_config
from pipelines.shards.shards import ShardSet

SMALL = load_config(sets=["ingest.samples_per_shard=10"])


def tree(root: Path) -> dict[str, bytes]:
    """All stored bytes except the run records, which hold clocks."""
    found = {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    return {name: data for name, data in found.items() if "runs/" not in name}


def images_of(shards: ShardSet) -> dict[str, tuple[bytes, list[str]]]:
    """Key -> image bytes and class names."""
    return {
        sample.record.key: (sample.image, [shards.classes[label] for label in sample.record.labels])
        for shard in shards.shards
        for sample in shards.read(shard)
    }


def expected_images(folder: Path) -> dict[str, tuple[bytes, list[str]]]:
    return {
        f"{path.parent.name}/{path.stem}": (path.read_bytes(), [path.parent.name])
        for path in folder.rglob("*")
        if path.is_file()
    }


def zip_of(folder: Path, path: Path, prefix: str = "", method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for file in sorted(folder.rglob("*"), reverse=True):
            archive.write(file, prefix + str(file.relative_to(folder)))
    return path


def tar_of(folder: Path, path: Path, prefix: str = "") -> Path:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as archive:
        archive.add(folder, prefix or ".")
    compress: Callable[[bytes], bytes] = {
        ".gz": gzip.compress,
        ".tgz": gzip.compress,
        ".xz": lzma.compress,
        ".bz2": bz2.compress,
    }.get(path.suffix, bytes)
    path.write_bytes(compress(sink.getvalue()))
    return path


def write_table(path: Path, columns: dict[str, list[Any]]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.table(columns), path)
    else:
        rows = zip(*columns.values(), strict=True)
        lines = [",".join("" if cell is None else str(cell) for cell in row) for row in rows]
        path.write_text("\n".join([",".join(columns), *lines]) + "\n")
    return path


PATHS = [f"class_0{klass}/000{number}.jpg" for klass in range(3) for number in range(3)]
