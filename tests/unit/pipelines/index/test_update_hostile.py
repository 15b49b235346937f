"""Versions of an index that somebody forged or damaged are refused, and verify proves those that are sound."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from pipelines.artifacts.commit import list_versions, publish_version
from pipelines.artifacts.manifest import manifest_digest, open_artifact
from pipelines.artifacts.parquet import parquet_bytes, read_parquet, table_of
from pipelines.artifacts.versions import open_current
from pipelines.config.settings import Config
from pipelines.errors import (
    DamagedArtifact,
)
from pipelines.index.build import build_index
from pipelines.index.layout import ORDINALS, ORDINALS_NAME, QUANTIZER_NAME, REMOVED
from pipelines.index.publish import rollback_index
from pipelines.index.update import add_codes, compact_index, remove_rows
from pipelines.storage import Store, canonical_json, sha256_of
from pipelines.verify.verify import verify
from tests.support.indexes import FLAT, IVF, KINDS, ask, codes_at
from tests.support.inline import InlinePool

# --------------------------------------------------------------------------------------------------- hostile versions


def forge(index: str, number: int, change: Callable[[dict[str, Any]], None]) -> None:
    """Publish a manifest that somebody wrote by hand, with a digest that is right."""
    fields = open_current(index).manifest.model_dump(mode="json")
    change(fields)
    fields["digest"] = manifest_digest(fields)
    path = f"manifests/{fields['digest'][:16]}.json"
    store = Store(index)
    store.put(path, canonical_json(fields))
    publish_version(store, number, path, fields["digest"])


@pytest.mark.parametrize(
    ("pairs", "complaint"),
    [
        ([(0, 5), (0, 3)], "is not sorted"),
        ([(0, 3), (0, 3)], "is not sorted"),
        ([(0, -1)], "is not sorted"),
        ([(7, 0)], "more rows of shard ordinal 7"),
        ([(0, n) for n in range(21)], "more rows of shard ordinal 0"),
        ([(0, 99)], "names rows that"),
    ],
)
def test_a_table_of_removed_rows_that_lies_is_found(index: str, pairs: list[tuple[int, int]], complaint: str) -> None:
    data = parquet_bytes(table_of(REMOVED, {"ordinal": [o for o, _ in pairs], "row": [r for _, r in pairs]}))
    path = "parts/removed-0123456789abcdef.parquet"
    part = {"path": path, "bytes": len(data), "rows": len(pairs), "sha256": sha256_of(data)}
    Store(index).put(path, data)
    forge(index, 2, lambda fields: fields["parts"].append(part))
    with pytest.raises(DamagedArtifact, match=complaint):
        ask(index)


def test_a_flipped_bit_in_the_table_of_removed_rows_is_found(index: str) -> None:
    remove_rows(index, FLAT, ["base/0/00000"])
    (path,) = (Path(index) / "parts").glob("removed-*")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    with pytest.raises(DamagedArtifact, match="does not match the digest"):
        ask(index)


def test_a_swapped_quantizer_is_refused_naming_both(tmp_path: Path, pool: InlinePool) -> None:
    config = IVF.model_copy(update={"index": IVF.index.model_copy(update={"seed": 9})})
    index = str(build_index([codes_at(tmp_path, "base")], str(tmp_path / "index"), IVF, pool=pool).uri)
    other = str(build_index([str(tmp_path / "base")], str(tmp_path / "other"), config, pool=pool).uri)
    own, foreign = (open_current(uri).manifest.part(QUANTIZER_NAME) for uri in (index, other))
    Store(index).put(foreign.path, Store(other).read(foreign.path))

    def swap(fields: dict[str, Any]) -> None:
        parts = [part for part in fields["parts"] if part["path"] != own.path]
        fields["parts"] = sorted([*parts, asdict(foreign)], key=lambda part: str(part["path"]))

    forge(index, 2, swap)
    with pytest.raises(
        DamagedArtifact, match=f"built with quantizer {own.sha256[:12]}, .* lists {foreign.sha256[:12]}"
    ):
        ask(index)


def test_a_part_that_is_gone_is_not_named_again(index: str) -> None:
    (path,) = (Path(index) / "parts").glob("part-000001-*")
    path.unlink()
    with pytest.raises(DamagedArtifact, match=r"part-000001-.* is gone, so version 2 cannot name it"):
        remove_rows(index, FLAT, ["base/0/00000"])
    assert list_versions(Store(index)) == [1]


# ---------------------------------------------------------------------------------------------------------- verify


@KINDS
def test_verify_proves_every_version(tmp_path: Path, pool: InlinePool, config: Config) -> None:
    index = str(build_index([codes_at(tmp_path, "base", shards=3)], str(tmp_path / "index"), config, pool=pool).uri)
    remove_rows(index, config, ["base/0/00003", "base/1/00004"])
    add_codes(index, [codes_at(tmp_path, "more")], config, pool=pool)
    compact_index(index, config, pool=pool)
    remove_rows(index, config, ["more/0/00000"], ["base-000002.tar"])
    rollback_index(index, 2)
    last = rollback_index(index, 5).as_json()
    result = verify(index).as_json()
    assert result["digest"] == last["digest"]
    assert result["orphans"] == []
    for check in (
        "versions 1 to 7 name",
        "77 codes in 5 parts that open, 21 of their rows removed",
        "98 codes in 5 parts",
    ):
        assert any(check in line for line in result["checks"]), check


def test_verify_finds_rows_that_are_not_those_of_the_codes(tmp_path: Path, index: str) -> None:
    store, artifact = Store(index), open_current(index)
    part = artifact.manifest.part("keys-000001.parquet")
    table = read_parquet(store.read(part.path), "keys")
    data = parquet_bytes(table.set_column(1, table.schema.field(1), [[f"x{n}" for n in range(20)]]))
    changed = {"path": "parts/keys-000001-0123456789abcdef.parquet", "bytes": len(data), "sha256": sha256_of(data)}
    store.put(str(changed["path"]), data)

    def swap(fields: dict[str, Any]) -> None:
        fields["parts"] = [entry | changed if entry["path"] == part.path else entry for entry in fields["parts"]]

    forge(index, 2, swap)
    with pytest.raises(
        DamagedArtifact, match=r"keys-000001-0123456789abcdef.parquet has other rows than .*/base/parts"
    ):
        verify(index)


def test_verify_finds_rows_that_went_without_being_compacted(tmp_path: Path, index: str) -> None:
    """A version that leaves a shard's rows out and tells nobody."""
    remove_rows(index, FLAT, ["base/0/00003"])
    compact_index(index, FLAT, pool=InlinePool())
    listed = open_current(index).manifest.part(ORDINALS_NAME)
    table = read_parquet(Store(index).read(listed.path), "ordinals").to_pylist()
    columns = {name: [row[name] for row in table] for name in ORDINALS.names} | {"compacted": [0, 0, 0]}
    data = parquet_bytes(table_of(ORDINALS, columns))
    quiet = {"path": "parts/ordinals-0123456789abcdef.parquet", "bytes": len(data), "sha256": sha256_of(data)}
    Store(index).put(str(quiet["path"]), data)

    def hide(fields: dict[str, Any]) -> None:
        fields["parts"] = [entry | quiet if entry["path"] == listed.path else entry for entry in fields["parts"]]
        fields["meta"]["version"] = 4

    forge(index, 4, hide)
    with pytest.raises(DamagedArtifact, match=r"does not list the tars of .*/base with their codes"):
        verify(index)


def test_verify_finds_a_part_that_belongs_to_no_shard(index: str) -> None:
    remove_rows(index, FLAT, shards=["base-000001.tar"])
    compact_index(index, FLAT, pool=InlinePool())
    dropped = open_artifact(index).manifest.part("part-000001.safetensors")
    forge(index, 4, lambda fields: (fields["parts"].append(asdict(dropped)), fields["meta"].update(version=4)))
    with pytest.raises(DamagedArtifact, match="the ordinal table gives it no rows"):
        verify(index)
