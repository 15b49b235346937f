"""The cost model against a real S3 server: it predicts requests exactly, and bytes within a fifth, at two sizes.

Lists and pieces are made small, so that these sizes have several of each, as a large corpus has.
"""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from pipelines.artifacts import lists, manifest
from pipelines.cost.model import Work
from pipelines.cost.requests import SINGLE_PUT_BYTES, puts_of, upload_lists_of
from pipelines.shards import index
from pipelines.storage import Store
from tests.bench.cost import BYTES, figures, planned_for, predict, run_all
from tests.support.seaweed import seaweed
from tests.support.traffic import Traffic, counted

SMALL, LARGE = SIZES = tuple(planned_for(tars, per_shard=2, part_codes=8) for tars in (12, 30))

Runs = list[tuple[dict[str, Work], dict[str, Traffic]]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """For each size what the artifacts of the first one predict, and what was measured."""
    folder = tmp_path_factory.mktemp("cost")
    with pytest.MonkeyPatch.context() as patch, seaweed(folder / "weed") as server, server.environment():
        for module in (lists, manifest):
            patch.setattr(module, "INLINE_ENTRIES", 8)
        patch.setattr(lists, "LIST_ENTRIES", 10)
        patch.setattr(index, "PIECE_ROWS", 12)
        with counted() as traffic:
            seen = [run_all(server, folder / str(planned.images), planned, traffic) for planned in SIZES]
        yield [(predict(server, SMALL, planned), one) for planned, one in zip(SIZES, seen, strict=True)]


@pytest.mark.parametrize("size", [0, 1])
def test_requests_are_predicted_exactly(runs: Runs, size: int) -> None:
    told, seen = runs[size]
    found = {step: {name: asked[name] for name in ("get", "head", "put", "list")} for step, asked in seen.items()}
    assert found == {step: asdict(work.requests) for step, work in told.items()}


def test_a_put_in_parts_takes_the_requests_that_are_predicted(tmp_path: Path) -> None:
    size = SINGLE_PUT_BYTES + 1
    with seaweed(tmp_path) as server, server.environment(), counted() as traffic:
        Store(server.uri("large")).put("object", bytes(size))
    assert (traffic["put"], traffic["list"]) == (puts_of(size), upload_lists_of(size)) == (5, 1)


@pytest.mark.parametrize("size", [0, 1])
def test_bytes_are_predicted_within_a_fifth(runs: Runs, size: int) -> None:
    told, seen = runs[size]
    pairs = {(step, name): (figures(work)[name], seen[step][name]) for step, work in told.items() for name in BYTES}
    assert {key: pair for key, pair in pairs.items() if abs(pair[0] - pair[1]) > 0.2 * pair[1]} == {}
    assert sum(measured for _, measured in pairs.values()) > 10**6
