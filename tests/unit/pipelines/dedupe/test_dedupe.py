"""Near-duplicates: pairs and components against loops over all samples, equal bytes however they were found."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hhnet import hamming_distances, pack_bits
from pipelines.artifacts.manifest import open_artifact
from pipelines.config.settings import Config, DedupeSettings, IndexSettings
from pipelines.dedupe import pairs as search
from pipelines.dedupe.dedupe import dedupe
from pipelines.dedupe.tables import Sizes
from pipelines.errors import ConfigError, FingerprintMismatch, InputError, StoreUnavailable, WorkFailed
from pipelines.index.build import build_index
from pipelines.index.reader import open_index
from pipelines.index.update import add_codes, remove_rows
from pipelines.storage import failpoints
from pipelines.verify.verify import verify
from tests.support.codes import Rows, random_codes, simple_rows, write_codes
from tests.support.inline import InlinePool

FLAT = Config(index=IndexSettings(workers=1))


@pytest.fixture(autouse=True)
def fresh_failpoints() -> Iterator[None]:
    failpoints._hits.clear()
    yield
    failpoints._hits.clear()


def in_small_units(*args: Any, **changes: Any) -> Any:
    """Dedupe in units of 64 samples and parts of 50 rows, so that a small set has many of both."""
    against = {"against": changes.pop("against")} if "against" in changes else {}
    return dedupe(*args, **against, sizes=Sizes(unit=64, part_rows=50, **changes))


def settings(radius: int, **others: Any) -> Config:
    return Config(dedupe=DedupeSettings(radius=radius, **others))


def clustered(count: int, bits: int = 64, centres: int = 60, flips: float = 1.5, seed: int = 0) -> Any:
    random = np.random.default_rng(seed)
    middle = np.random.default_rng(99).random((centres, bits)) < 0.5
    return pack_bits(middle[random.integers(0, centres, count)] ^ (random.random((count, bits)) < flips / bits))


def tars(name: str, codes: Any, per_tar: int = 70) -> dict[str, Rows]:
    """Codes cut into tars, every seventh row of which was a reject."""
    contents = {}
    for number, start in enumerate(range(0, len(codes), per_tar)):
        part = codes[start : start + per_tar]
        rows = [n + n // 6 for n in range(len(part))]
        contents[f"{name}-{number:06d}.tar"] = Rows(
            [f"{name}/{number}/{row}" for row in rows], part, [[0]] * len(part), row=rows
        )
    return contents


def codes_at(root: Path, name: str, codes: Any, per_tar: int = 70, **options: Any) -> str:
    return write_codes(root / name, tars(name, codes, per_tar), 8 * codes.shape[1], **options).uri


def rows_of(out: str, prefix: str) -> list[dict[str, Any]]:
    """The rows of the parts of this prefix, read as any reader of Parquet would."""
    files = sorted(Path(out, "parts").glob(f"{prefix}*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def pairs_of(out: str) -> list[tuple[int, int, int]]:
    return [(row["id_a"], row["id_b"], row["distance"]) for row in rows_of(out, "pairs-")]


def components_of(out: str) -> dict[int, set[int]]:
    found: dict[int, set[int]] = {}
    for row in rows_of(out, "components-"):
        found.setdefault(row["component"], set()).add(row["id"])
    return found


class Expected:
    """Pairs by the definition, and the components of the graph of all pairs, by loops over all samples."""

    def __init__(self, samples: Mapping[int, bytes], known: set[int], radius: int) -> None:
        by_code: dict[bytes, list[int]] = {}
        for number in sorted(samples):
            by_code.setdefault(samples[number], []).append(number)
        leading, self.pairs, taking_part = [], [], []
        for numbers in by_code.values():
            old, new = [n for n in numbers if n in known][:1], [n for n in numbers if n not in known]
            leader = (new or old)[0]
            leading.append(leader)
            taking_part += old + new
            self.pairs += [(*sorted((n, leader)), 0) for n in old + new if n != leader]
        self.pairs += self._near(sorted(leading), samples, known, radius)
        self.pairs.sort()
        self.components = self._components(self._near(sorted(taking_part), samples, known, radius))
        kept = sum(len(ids & known) or 1 for ids in self.components.values())
        self.droppable = sum(map(len, self.components.values())) - kept

    @staticmethod
    def _near(numbers: list[int], samples: Mapping[int, bytes], known: set[int], radius: int) -> list[Any]:
        codes = np.array([list(samples[n]) for n in numbers], np.uint8)
        distances = hamming_distances(codes, codes)
        return [
            (numbers[i], numbers[j], int(distances[i, j]))
            for i, j in zip(*np.nonzero(np.triu(distances <= radius, 1)), strict=True)
            if not (numbers[i] in known and numbers[j] in known)
        ]

    @staticmethod
    def _components(pairs: list[Any]) -> dict[int, set[int]]:
        of: dict[int, set[int]] = {}
        for a, b, _ in pairs:
            both = of.get(a, {a}) | of.get(b, {b})
            of.update(dict.fromkeys(both, both))
        return {min(ids): ids for ids in of.values()}


def samples_of(contents: Mapping[str, Rows], first: int = 0) -> dict[int, bytes]:
    """Code by id, with ordinals in the order of the tars."""
    return {
        ordinal << 32 | row: code.tobytes()
        for ordinal, rows in enumerate(contents.values(), first)
        for row, code in zip(list(rows.row) or range(len(rows.keys)), rows.codes, strict=True)
    }


def files_of(out: str) -> dict[str, bytes]:
    root = Path(out)
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


# ---------------------------------------------------------------------------------------------- pairs and components


@pytest.mark.parametrize("bits", [16, 64, 128])
@pytest.mark.parametrize("radius", [0, 1, 3, 8])
@pytest.mark.parametrize("kind", ["clustered", "random"])
def test_pairs_and_components_are_those_of_all_samples(tmp_path: Path, bits: int, radius: int, kind: str) -> None:
    count = 150 if bits == 16 else 400
    codes = clustered(count, bits) if kind == "clustered" else random_codes(count, bits)
    contents = tars("a", codes)
    uri = write_codes(tmp_path / "codes", contents, bits).uri
    out = str(tmp_path / "out")
    result = in_small_units([uri], out, settings(radius)).as_json()
    expected = Expected(samples_of(contents), set(), radius)
    assert pairs_of(out) == expected.pairs
    assert components_of(out) == expected.components
    assert (result["verb"], result["status"], result["samples"]) == ("dedupe", "done", count)
    assert (result["pairs"], result["components"]) == (len(expected.pairs), len(expected.components))
    assert (result["same_code_only"], result["unread"]) == (expected.droppable, expected.droppable)
    assert result["droppable"] == 0  # there are no pictures that would confirm one
    assert result["groups"] == sum(number > 1 for number in Counter(map(bytes, codes)).values())
    assert verify(out).digest == result["digest"]


def test_what_a_row_says_of_a_sample(tmp_path: Path) -> None:
    code = random_codes(3)
    first = Rows(["x", "y"], code[[0, 1]], [[0], []], row=[4, 9])
    second = Rows(["z"], code[[0]], [[1]], row=[7])
    uri = write_codes(tmp_path / "codes", {"a-0.tar": first, "b-0.tar": second}).uri
    out = str(tmp_path / "out")
    dedupe([uri], out, settings(0))
    (pair,) = rows_of(out, "pairs-")
    assert pair == {
        **{"id_a": 4, "key_a": "x", "shard_a": "a-0.tar", "row_a": 4},
        **{"id_b": 1 << 32 | 7, "key_b": "z", "shard_b": "b-0.tar", "row_b": 7, "distance": 0},
    }
    joined = {"component": 4, "size": 2, "twin": 4, "keep": True}
    assert rows_of(out, "components-") == [
        {"id": 4, "key": "x", "shard": "a-0.tar", "row": 4, "match": "none", **joined},
        {"id": 1 << 32 | 7, "key": "z", "shard": "b-0.tar", "row": 7, "match": "unread", **joined},
    ]
    with open_index(str(build_flat(tmp_path, [uri]))) as reader:  # the ids are those of an index of these codes
        assert [item.key for item in reader.items([pair["id_a"], pair["id_b"]]).values()] == ["x", "z"]


def build_flat(root: Path, uris: list[str], name: str = "index") -> str:
    return str(build_index(uris, str(root / name), FLAT, pool=InlinePool()).uri)


def test_ten_thousand_equal_codes_make_as_many_pairs(tmp_path: Path) -> None:
    codes = np.zeros((10_000, 8), np.uint8)
    codes[5::1000] = 255
    out = str(tmp_path / "out")
    result = dedupe([codes_at(tmp_path, "codes", codes, 2500)], out, settings(2)).as_json()
    assert (result["pairs"], result["groups"], result["components"]) == (9_998, 2, 2)
    assert (result["same_code_only"], result["samples"]) == (9_998, 10_000)
    assert verify(out).status == "done"


@pytest.mark.parametrize("count", [0, 1])
def test_nothing_to_compare_is_no_error(tmp_path: Path, count: int) -> None:
    out = str(tmp_path / "out")
    result = dedupe([codes_at(tmp_path, "codes", random_codes(1)[:count])], out, settings(3)).as_json()
    assert (result["status"], result["samples"], result["pairs"], result["components"]) == ("done", count, 0, 0)
    assert verify(out).status == "done"
    assert dedupe([str(tmp_path / "codes")], out, settings(3)).status == "unchanged"


def test_codes_without_tars(tmp_path: Path) -> None:
    uri = write_codes(tmp_path / "codes", {}).uri
    assert dedupe([uri], str(tmp_path / "out"), settings(3)).samples == 0
    assert verify(str(tmp_path / "out")).status == "done"


def test_several_artifacts_are_compared_as_one(tmp_path: Path) -> None:
    one, two = tars("shard", clustered(90, seed=1)), tars("shard", clustered(80, seed=2))
    uris = [write_codes(tmp_path / name, contents).uri for name, contents in (("one", one), ("two", two))]
    out = str(tmp_path / "out")
    dedupe(uris, out, settings(2))
    expected = Expected({**samples_of(one), **samples_of(two, 2)}, set(), 2)
    assert pairs_of(out) == expected.pairs
    assert any(a >> 32 < 2 <= b >> 32 for a, b, _ in expected.pairs)
    assert verify(out).status == "done"


# ------------------------------------------------------------------------------------------------------- equal bytes


def test_bytes_do_not_depend_on_memory_blocks_or_threads(tmp_path: Path) -> None:
    uri = codes_at(tmp_path, "codes", clustered(700))
    plain = in_small_units([uri], str(tmp_path / "plain"), settings(3, threads=1)).as_json()
    names = set(files_of(plain["uri"]))
    assert sum("pairs-" in name and "parts/" in name for name in names) > 11
    for number, (size, threads, memory) in enumerate([(100, 2, "64MiB"), (333, 1, "32MiB"), (17, 2, "2GiB")]):
        out, how = str(tmp_path / str(number)), settings(3, threads=threads, memory=memory)
        assert in_small_units([uri], out, how, block=size, queries=size // 2).digest == plain["digest"]
        assert set(files_of(out)) == names


def test_pairs_that_do_not_fit_into_memory_are_put_in_order_on_disk(tmp_path: Path) -> None:
    uri = codes_at(tmp_path, "codes", clustered(400, centres=4))
    plain = in_small_units([uri], str(tmp_path / "plain"), settings(3)).as_json()
    spilled = in_small_units([uri], str(tmp_path / "spilled"), settings(3), sorted_at_once=37)
    assert spilled.digest == plain["digest"]
    assert plain["pairs"] > 7 * 16 * 37


# ---------------------------------------------------------------------------------------------------------- refusals


def test_a_tar_that_comes_twice_is_refused(tmp_path: Path) -> None:
    rows = simple_rows("a", 10)
    rows.sha256 = "7" * 64
    uris = [write_codes(tmp_path / name, {"a-000000.tar": rows}).uri for name in ("one", "two")]
    with pytest.raises(InputError, match=r"/one \(a-000000.tar\) and .*/two .* codes of the same tar: name it once"):
        dedupe(uris, str(tmp_path / "out"), settings(1))


@pytest.mark.parametrize(
    ("other", "bits", "complaint"),
    [({"model": "c" * 64}, 64, "has model aaaaaaaaaaaa, .* has model cccccccccccc"), ({}, 32, "bits 64, .* bits 32")],
)
def test_other_models_and_lengths_are_refused(tmp_path: Path, other: dict[str, Any], bits: int, complaint: str) -> None:
    one, two = codes_at(tmp_path, "one", random_codes(9)), codes_at(tmp_path, "two", random_codes(9, bits), **other)
    with pytest.raises(FingerprintMismatch, match=complaint):
        dedupe([one, two], str(tmp_path / "out"), settings(1))
    with pytest.raises(FingerprintMismatch, match=complaint):
        dedupe([two], str(tmp_path / "out"), settings(1), against=build_flat(tmp_path, [one]))


def test_too_many_pairs_are_an_error_with_the_figures(tmp_path: Path) -> None:
    uri = codes_at(tmp_path, "codes", clustered(400, centres=2))
    with pytest.raises(WorkFailed, match=r"\d+ pairs within radius 5 so far, .* raise dedupe.max_pairs = 1000"):
        dedupe([uri], str(tmp_path / "out"), settings(5, max_pairs=1000))
    assert dedupe([uri], str(tmp_path / "out"), settings(5)).pairs > 1000


def test_samples_that_do_not_fit_are_refused_with_the_figures() -> None:
    with pytest.raises(ConfigError, match=r"= 33554432 bytes: 10000000 samples take 50000000 .* --memory 48MiB"):
        search.require_memory(10_000_000, DedupeSettings(memory="32MiB"))
    with pytest.raises(InputError, match="2147483648 samples are too many"):
        search.require_memory(1 << 31, DedupeSettings(memory="1TiB"))
    search.require_memory(100_000_000, DedupeSettings())


# ------------------------------------------------------------------------------------------------- against an index


@pytest.mark.parametrize("radius", [0, 2, 6])
def test_new_codes_are_compared_with_each_other_and_with_those_of_the_index(tmp_path: Path, radius: int) -> None:
    old, new = tars("old", clustered(300, seed=1)), tars("new", clustered(250, seed=2))
    index = build_flat(tmp_path, [write_codes(tmp_path / "old", old).uri])
    out = str(tmp_path / "out")
    result = in_small_units([write_codes(tmp_path / "new", new).uri], out, settings(radius), against=index).as_json()
    known = samples_of(old)
    expected = Expected({**known, **samples_of(new, len(old))}, set(known), radius)
    assert pairs_of(out) == expected.pairs
    assert components_of(out) == expected.components
    assert (result["samples"], result["indexed"], result["same_code_only"]) == (250, 300, expected.droppable)
    assert {row["match"] for row in rows_of(out, "components-") if row["id"] in known} <= {"none"}
    assert verify(out).digest == result["digest"]


def test_removed_rows_take_no_part_and_tars_of_the_index_are_passed_over(tmp_path: Path) -> None:
    codes = random_codes(6)
    old = Rows(["a", "b", "c", "d"], codes[:4], [[0]] * 4, sha256="1" * 64)
    new = Rows(["e", "f"], codes[[1, 2]], [[0]] * 2, sha256="2" * 64)
    index = build_flat(tmp_path, [write_codes(tmp_path / "base", {"old-0.tar": old}).uri])
    remove_rows(index, FLAT, ["b"])
    grown = write_codes(tmp_path / "grown", {"new-0.tar": new, "old-0.tar": old}).uri
    out = str(tmp_path / "out")
    result = dedupe([grown], out, settings(0), against=index).as_json()
    assert (result["samples"], result["indexed"]) == (2, 3)
    assert [(row["key_a"], row["key_b"]) for row in rows_of(out, "pairs-")] == [("c", "f")]
    add_codes(index, [grown], FLAT, pool=InlinePool())  # the proof goes on from the version that was used
    assert verify(out).status == "done"
    assert dedupe([grown], str(tmp_path / "later"), settings(0), against=index).samples == 0


def test_dropping_all_of_the_same_code_leaves_no_pair(tmp_path: Path) -> None:
    codes = codes_at(tmp_path, "codes", clustered(300))
    out = str(tmp_path / "out")
    dropped = dedupe([codes], out, settings(2, same_code=True)).droppable
    index = build_flat(tmp_path, [codes])
    keys = [row["key"] for row in rows_of(out, "components-") if not row["keep"]]
    assert remove_rows(index, FLAT, keys).removed == dropped == len(keys)
    with open_index(index) as reader:
        table = pa.concat_tables([reader.live_keys(part, ["id", "key", "code"]) for part in reader.searched()])
    left = np.array([list(code) for code in table["code"].to_pylist()], np.uint8)
    joined = hamming_distances(left, left) <= 2
    kept = {row["key"] for row in rows_of(out, "components-") if row["keep"]}
    assert joined.sum() == len(left)  # each with itself alone
    assert kept <= set(table["key"].to_pylist())


# --------------------------------------------------------------------------------------------------- again, and resumed


def test_other_settings_in_the_same_place_are_refused(tmp_path: Path) -> None:
    uri = codes_at(tmp_path, "codes", clustered(100))
    first = dedupe([uri], str(tmp_path / "out"), settings(2)).as_json()
    again = dedupe([uri], str(tmp_path / "out"), settings(2, threads=1, memory="64MiB", max_pairs=1)).as_json()
    assert (again["status"], again["digest"]) == ("unchanged", first["digest"])
    with pytest.raises(FingerprintMismatch, match="choose another --out"):
        dedupe([uri], str(tmp_path / "out"), settings(3))


def test_a_broken_off_search_redoes_only_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = codes_at(tmp_path, "codes", clustered(500))
    whole = in_small_units([uri], str(tmp_path / "whole"), settings(3)).as_json()
    monkeypatch.setenv("HHNET_FAILPOINTS", "receipt.put.before=enospc@4")
    out = str(tmp_path / "broken")
    with pytest.raises(StoreUnavailable):
        in_small_units([uri], out, settings(3))
    with pytest.raises(InputError, match="no committed"):
        open_artifact(out)
    searched: list[int] = []
    plain = search.PairSearch._search
    monkeypatch.setattr(
        search.PairSearch, "_search", lambda self, unit, block: (searched.append(unit), plain(self, unit, block))
    )
    assert in_small_units([uri], out, settings(3)).digest == whole["digest"]
    assert searched == [3, 4, 5, 6, 7]


def test_a_part_that_was_deleted_is_made_again(tmp_path: Path) -> None:
    uri = codes_at(tmp_path, "codes", clustered(300))
    first = in_small_units([uri], str(tmp_path / "out"), settings(3)).as_json()
    part = next(Path(first["uri"], "parts").glob("pairs-000001-*"))
    part.unlink()
    assert in_small_units([uri], str(tmp_path / "out"), settings(3)).digest == first["digest"]
    assert part.exists()
    assert json.loads(Path(first["uri"], "receipts/pairs-000001.json").read_text())["unit"] == 1
