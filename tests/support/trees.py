"""Trees of pictures in every form of source, and what became of them."""

import gzip
import io
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.config.settings import Config
from pipelines.ingest.ingest import ingest
from pipelines.ingest.skips import SkipReason
from pipelines.shards.shards import open_shards
from pipelines.verify.verify import verify
from tests.support.pictures import jpeg, picture

FORMS = ["folder", "x.zip", "x.tar", "x.tar.gz"]

Tree = Mapping[str, bytes]


def shot(number: int) -> bytes:
    return jpeg(picture(number % 7, number, 8))


def shots(*paths: str) -> dict[str, bytes]:
    """A picture of its own at each path."""
    return {path: shot(number) for number, path in enumerate(paths)}


def made(form: str, tree: Tree, root: Path) -> Path:
    """The tree as a folder, zip or tar."""
    root.mkdir(parents=True, exist_ok=True)
    if form == "folder":
        for name, data in tree.items():
            (root / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
            (root / "folder" / name).write_bytes(data)
        return root / "folder"
    path = root / form
    if form.endswith(".zip"):
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in tree.items():
                archive.writestr(name, data)
        return path
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as tar:
        for name, data in tree.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    path.write_bytes(gzip.compress(sink.getvalue()) if form.endswith(".gz") else sink.getvalue())
    return path


def taken(source: Path, out: Path, config: Config | None = None, **options: Any) -> dict[str, Any]:
    """The result of an ingest that keeps the law: found = samples + skipped, each skip under one of the reasons."""
    result = ingest(str(source), str(out), config or Config(), **options).as_json()
    assert result["found"] == result["samples"] + result["skipped"]
    assert result["skipped"] == sum(result["skipped_reasons"].values())
    assert set(result["skipped_reasons"]) <= set(SkipReason)
    assert verify(result["uri"]).status == "done" if "splits" not in result else True
    return result


def classes_of(uri: str) -> dict[str, str]:
    """Key -> class names, joined."""
    shards = open_shards(uri)
    return {
        record.key: "+".join(shards.classes[label] for label in record.labels)
        for shard in shards.shards
        for record in shard.records()
    }


def reasons_of(result: Mapping[str, Any]) -> dict[str, str]:
    return {file["path"]: file["reason"] for file in result["skipped_files"]}
