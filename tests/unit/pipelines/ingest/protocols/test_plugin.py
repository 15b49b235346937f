"""A data set is one module of the package: a toy one is ingested by its name."""

import json
from pathlib import Path

import pytest

from pipelines.ingest import protocols
from tests.support.plugins import plugged_in
from tests.support.protocols import hhnet, keys_of, write_pictures

TOY = """
from contextlib import contextmanager
from dataclasses import dataclass

from pipelines.ingest.protocols.base import Protocol
from pipelines.ingest.sources import open_source


@dataclass(frozen=True, kw_only=True)
class Toy(Protocol):
    @contextmanager
    def open(self, root):
        with open_source(root) as source:
            yield source

    def deal(self, entries, keys):
        return ["query" if key.endswith("0") else "database" for key in keys]


PROTOCOLS = (
    Toy(name="toy", parts={"query": 2, "database": 4}, database=("database",)),
    Toy(name="toy-large", parts={"query": 2, "database": 400}, database=("database",)),
)
"""


def test_a_data_set_is_one_module(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_pictures(tmp_path / "root", [f"{name}/{number}.jpg" for name in ("cat", "dog") for number in range(3)])
    words = ["ingest", "--root", str(tmp_path / "root"), "--out", str(tmp_path / "out"), "--json", "--protocol"]
    with plugged_in(protocols, tmp_path / "plugins", "toy", TOY):
        code, _, errors = hhnet([*words, "toy-large"], capsys)
        assert code == 2 and "4 images for database, toy-large has 400" in errors
        code, out, errors = hhnet([*words, "toy"], capsys)
        assert code == 0, errors
        assert json.loads(out)["protocol"]["name"] == "toy"
        assert keys_of(tmp_path / "out", "query") == ["cat/0", "dog/0"]
        code, _, errors = hhnet([*words, "tyo"], capsys)
        assert code == 2 and "choose one of cifar10, " in errors and ", toy, toy-large" in errors
    code, _, errors = hhnet([*words, "toy"], capsys)
    assert code == 2 and "protocol 'toy' is unknown" in errors
