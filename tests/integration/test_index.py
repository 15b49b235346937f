"""The index built on a real Ray: the same bytes for any number of workers, and a search that is exact."""

import numpy as np
import pytest

from pipelines.config import Config, IndexSettings
from pipelines.index import build_index
from pipelines.search import search
from tests.support.codes import random_codes, simple_rows, write_codes


@pytest.mark.parametrize("kind", ["flat", "ivf"])
def test_one_and_two_workers_build_the_same_bytes(tmp_path, kind, local_ray):
    contents = {f"x-{n:06d}.tar": simple_rows(f"x/{n}", 50, seed=n, flip=0.3) for n in range(6)}
    uri = write_codes(tmp_path / "codes", contents).uri
    results = [
        build_index([uri], str(tmp_path / f"index-{n}"), Config(index=IndexSettings(kind=kind, workers=n)))
        for n in (1, 2)
    ]
    assert results[0]["digest"] == results[1]["digest"] and results[0]["version"] == 1

    query = random_codes(1)[0]
    (answer,) = search(results[1]["uri"], Config(), hex_codes=[query.tobytes().hex()], k=9)["results"]
    codes = np.concatenate([rows.codes for rows in contents.values()])
    nearest = np.sort(np.unpackbits(query ^ codes, axis=1).sum(1))[:9]
    assert len(answer["neighbours"]) == 9
    if kind == "flat":
        assert [entry["distance"] for entry in answer["neighbours"]] == nearest.tolist()
