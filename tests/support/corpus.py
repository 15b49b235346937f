"""Shards that a test damages and mends."""

import shutil
from pathlib import Path

from pipelines.shards.shards import open_shards


class Corpus:
    """A copy of shards of which some tars can be damaged and mended, and a folder for codes of them."""

    def __init__(self, shards: Path, folder: Path) -> None:
        self.uri = str(shutil.copytree(shards, folder / "shards"))
        self.out = str(folder / "codes")
        self._whole: dict[Path, bytes] = {}

    def damage(self, number: int, rows: list[int]) -> None:
        """Flip a byte in the images of these rows of the tar."""
        shard = open_shards(self.uri).shards[number]
        path = Path(self.uri, shard.part.path)
        data = bytearray(self._whole.setdefault(path, path.read_bytes()))
        for row in rows:
            data[shard.records()[row].members[0].offset + 20] ^= 1
        path.write_bytes(data)

    def remove(self, number: int) -> None:
        """Take a tar away."""
        path = Path(self.uri, open_shards(self.uri).shards[number].part.path)
        self._whole.setdefault(path, path.read_bytes())
        path.unlink()

    def mend(self) -> None:
        """Bring the bytes back that were published."""
        for path, data in self._whole.items():
            path.write_bytes(data)
