"""What an encode that goes on finds done, and what it has to do."""

from pathlib import Path

import pytest

from pipelines.artifacts import manifest
from pipelines.artifacts.manifest import open_artifact
from pipelines.artifacts.versions import publish_next
from pipelines.encode.job import find_missing_work
from pipelines.errors import DamagedArtifact
from pipelines.shards.shards import open_shards
from tests.support.artifacts import make_codes, make_model
from tests.support.codes import write_shards


def test_a_lost_list_of_codes_costs_no_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "INLINE_ENTRIES", 0)
    shards = open_artifact(write_shards(tmp_path, "photos"))
    codes = make_codes(tmp_path / "codes", shards, make_model(tmp_path / "model", shards))
    opened = open_shards(shards)
    published, receipts, tasks = find_missing_work(codes.store, opened)
    assert published is not None and (receipts, tasks) == ({}, [])
    for ref in codes.manifest.lists:
        Path(codes.uri, ref.path).unlink()
    published, receipts, tasks = find_missing_work(codes.store, opened)
    assert (published, tasks) == (None, [])
    assert receipts.keys() == {shard.stem for shard in opened.shards}
    Path(codes.uri, receipts[opened.shards[0].stem].part.path).unlink()
    _, _, tasks = find_missing_work(codes.store, opened)
    assert [task.shard for task in tasks] == [opened.shards[0].name]


def test_a_lost_list_of_a_later_version_ends_the_encode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "INLINE_ENTRIES", 0)
    shards = open_artifact(write_shards(tmp_path, "photos"))
    codes = make_codes(tmp_path / "codes", shards, make_model(tmp_path / "model", shards))
    first = codes.manifest
    parts, totals = first.parts[:-2], {**first.totals, "samples": 1}
    later = publish_next(codes, 2, parts, first.receipts[:-1], totals, meta={**first.meta, "animated": 1})
    Path(codes.uri, later.manifest.lists[0].path).unlink()
    with pytest.raises(DamagedArtifact, match=r"list-.* is gone, and only it names codes: encode to another --out"):
        find_missing_work(codes.store, open_shards(shards))
