"""An alias on a real S3 server: of an index in its bucket, in another, and on a disk."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.config.settings import Config, GateSettings, IndexSettings
from pipelines.index.alias import set_alias
from pipelines.index.build import build_index
from pipelines.search.search import search
from pipelines.storage import Store
from pipelines.verify.verify import verify
from tests.support.codes import simple_rows, write_codes
from tests.support.inline import InlinePool
from tests.support.seaweed import Seaweed, seaweed

CONFIG = Config(index=IndexSettings(workers=1, gate=GateSettings(probes=5)))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seaweed]:
    with seaweed(tmp_path_factory.mktemp("weed")) as running, running.environment():
        yield running


def test_a_copied_prefix_names_its_own_index(server: Seaweed, tmp_path: Path) -> None:
    codes = write_codes(tmp_path / "codes", {"base-000000.tar": simple_rows("base", 20)}).uri

    def build(out: str) -> str:
        return build_index([codes], out, CONFIG, pool=InlinePool()).uri

    def found(alias: str) -> str:
        return search(alias, CONFIG, keys=["base/00003"]).uri

    tree, copy = Store(server.uri("tree")), Store(server.uri("deeper/copy"))
    index = build(f"{tree.uri}/indexes/v1")
    set_alias(f"{tree.uri}/photos", index)
    assert found(f"{tree.uri}/photos") == index
    for name in tree.names(""):
        copy.put(name, tree.read(name))
    assert found(f"{copy.uri}/photos") == f"{copy.uri}/indexes/v1"

    local = build(str(tmp_path / "index"))
    for alias, named in ((str(tmp_path / "photos"), index), (f"{tree.uri}/photos", local)):
        set_alias(alias, named)
        assert found(alias) == named
        assert any(f"index {named} is published" in check for check in verify(alias).checks)
