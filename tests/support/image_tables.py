"""Tables of labels and images, and the shards that they became."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.config.settings import Config
from pipelines.ingest.ingest import ingest
from pipelines.shards.shards import ShardSet, open_shards
from tests.support import pictures

PICTURES = [pictures.jpeg(pictures.picture(0, number)) for number in range(6)]


def write_pictures(folder: Path) -> Path:
    """Write six pictures im/0.jpg to im/5.jpg."""
    (folder / "im").mkdir(parents=True)
    for number, data in enumerate(PICTURES):
        (folder / "im" / f"{number}.jpg").write_bytes(data)
    return folder


def csv_of(folder: Path, text: str | bytes, name: str = "t.csv") -> str:
    (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)
    return str(folder / name)


def parquet_of(
    folder: Path, columns: dict[str, Any], hub: dict[str, Any] | None = None, name: str = "t.parquet"
) -> str:
    table = pa.table(columns)
    if hub is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": hub}})})
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, folder / name)
    return str(folder / name)


def labels_of(result: dict[str, Any]) -> dict[str, list[str]]:
    """Key -> class names."""
    return {key: names for key, (_, names, _) in samples_of(open_shards(result["uri"])).items()}


def samples_of(shards: ShardSet) -> dict[str, tuple[bytes, list[str], dict[str, Any]]]:
    """Key -> image, class names, metadata."""
    return {
        sample.record.key: (
            sample.image,
            [shards.classes[label] for label in sample.record.labels],
            json.loads(sample.metadata or b"{}"),
        )
        for shard in shards.shards
        for sample in shards.read(shard, metadata=True)
    }


def take(source: str | Path, tmp_path: Path, out: str = "out", **how: Any) -> dict[str, Any]:
    return ingest(str(source), str(tmp_path / out), Config(), **how).as_json()
