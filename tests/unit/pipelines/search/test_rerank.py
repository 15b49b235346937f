"""Logits beside the codes, from encoding over the index to a re-ranked search; Ray's pool is played in this process."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import numpy.typing as npt
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import pipelines.encode.encoder
import pipelines.encode.workers
import pipelines.index.pool
from hhnet import pack_bits, quantise_real_codes
from hhnet.codes import sign_bits
from pipelines.artifacts.manifest import Artifact, manifest_digest
from pipelines.artifacts.parquet import parquet_bytes, read_parquet
from pipelines.artifacts.versions import open_current, open_input_version
from pipelines.config.loading import load_config
from pipelines.config.settings import Config
from pipelines.encode.codes import code_array, open_codes, real_codes_array
from pipelines.encode.encode import encode
from pipelines.encode.encoder import Encoder
from pipelines.encode.retry_rejects import retry_rejects
from pipelines.errors import DamagedArtifact, FingerprintMismatch, InputError
from pipelines.index.build import build_index
from pipelines.index.layout import ROW_MASK, index_id
from pipelines.index.reader import open_index
from pipelines.index.update import add_codes, compact_index, remove_rows
from pipelines.ingest.ingest import ingest
from pipelines.search.search import SearchLimits, search
from pipelines.storage import canonical_json, sha256_of
from pipelines.verify.verify import verify
from tests.support.codes import Rows, random_codes, simple_rows, with_real_codes, write_codes
from tests.support.corpus import Corpus
from tests.support.inline import InlinePool
from tests.support.models import write_model
from tests.support.pictures import write_folder

SETTINGS = ["ingest.samples_per_shard=10", "data.image_size=32", "encode.batch_size=8", "index.workers=1"]
PLAIN = load_config(sets=SETTINGS)
REAL_CODES = load_config(sets=[*SETTINGS, "encode.real_codes=true"])


def reranking(n: int) -> Config:
    return load_config(sets=[*SETTINGS, f"search.rerank={n}"])


@pytest.fixture
def pool() -> InlinePool:
    return InlinePool()


# ---------------------------------------------------------------------------------------------------------- encoding


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    write_folder(folder, classes=3, per_class=8)
    return folder


@pytest.fixture(scope="module")
def shards(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shards") / "train"
    ingest(str(pictures), str(out), PLAIN)
    return out


@pytest.fixture(scope="module")
def model(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return write_model(tmp_path_factory.mktemp("model") / "model", str(shards))


def encoded(shards: Path, model: Artifact, out: Path, config: Config) -> str:
    return str(encode(str(shards), model.uri, str(out), config, pool=InlinePool()).uri)


def bytes_of(root: str) -> dict[str, bytes]:
    files = [path for path in Path(root).rglob("*") if path.is_file() and "runs" not in path.parts]
    return {str(path.relative_to(root)): path.read_bytes() for path in files if path.name != "origin.json"}


def test_real_codes_are_those_of_the_network_and_change_no_code(
    pool: InlinePool, pictures: Path, shards: Path, model: Artifact, tmp_path: Path
) -> None:
    plain = open_codes(encoded(shards, model, tmp_path / "plain", PLAIN))
    codes = open_codes(encoded(shards, model, tmp_path / "codes", REAL_CODES))
    assert (plain.real_codes, codes.real_codes) == (False, True)
    encoder = Encoder.open(model.uri)
    for mine, theirs in zip(codes.tables(), plain.tables(), strict=True):
        assert mine.drop_columns("real_codes").cast(theirs.schema).equals(theirs)
        images = [next(pictures.glob(f"{key}.*")).read_bytes() for key in mine["key"].to_pylist()]
        z = encoder.real_codes(images)
        near = real_codes_array(mine["real_codes"]).astype(int) - quantise_real_codes(z).astype(int)
        assert np.abs(near).max() <= 1  # a batch of another size may differ in the last digit
        assert (pack_bits(sign_bits(real_codes_array(mine["real_codes"]))) == code_array(mine["code"])).all()
    verify(codes.artifact.uri)


def test_codes_without_real_codes_have_no_column_of_them(
    pool: InlinePool, shards: Path, model: Artifact, tmp_path: Path
) -> None:
    """Only the manifest's settings say that none were asked for."""
    before = bytes_of(encoded(shards, model, tmp_path / "codes", PLAIN))
    assert [name for name, data in before.items() if b"real_codes" in data] == ["manifest.json"]
    schema = pq.read_schema(next((tmp_path / "codes" / "parts").iterdir()))
    assert schema.names == ["key", "shard", "row", "path", "code", "labels"]
    with pytest.raises(FingerprintMismatch, match="choose another --out"):
        encode(str(shards), model.uri, str(tmp_path / "codes"), REAL_CODES, pool=pool)
    assert bytes_of(str(tmp_path / "codes")) == before


def test_neither_order_nor_threads_change_a_byte(
    pool: InlinePool, shards: Path, model: Artifact, tmp_path: Path
) -> None:
    first = bytes_of(encoded(shards, model, tmp_path / "first", REAL_CODES))
    pool.reverse = True
    other = load_config(sets=[*SETTINGS, "encode.real_codes=true", "data.workers=1", "encode.workers=2"])
    assert bytes_of(encoded(shards, model, tmp_path / "second", other)) == first


def test_duckdb_and_pandas_read_real_codes(pool: InlinePool, shards: Path, model: Artifact, tmp_path: Path) -> None:
    codes = open_codes(encoded(shards, model, tmp_path / "codes", REAL_CODES))
    path = Path(codes.artifact.uri, codes.shards[0].parts[0].path)
    expected = real_codes_array(codes.read(codes.shards[0])["real_codes"])
    for column in (
        [row for (row,) in duckdb.sql(f"select real_codes from '{path}'").fetchall()],
        pandas.read_parquet(path)["real_codes"].tolist(),
    ):
        assert (np.stack([np.frombuffer(row, np.int8) for row in column]) == expected).all()
    assert b"127 x output" in pq.read_schema(path).metadata[b"hhnet.real_codes"]


def test_a_retry_keeps_what_the_codes_have(pool: InlinePool, shards: Path, model: Artifact, tmp_path: Path) -> None:
    for name, made, retried in (("with", REAL_CODES, PLAIN), ("without", PLAIN, REAL_CODES)):
        (tmp_path / name).mkdir()
        corpus = Corpus(shards, tmp_path / name)
        corpus.damage(0, [1])
        encode(corpus.uri, model.uri, corpus.out, made, allow_degraded=True, pool=pool)
        corpus.mend()
        assert retry_rejects(corpus.out, retried, pool=pool).recovered == 1
        verify(corpus.out)
        assert open_codes(corpus.out).real_codes == made.encode.real_codes


# ------------------------------------------------------------------------------------------------------------- index


def contents(name: str, shards: int = 2, count: int = 30, seed: int = 0) -> dict[str, Rows]:
    rows = {f"{name}-{n:06d}.tar": simple_rows(f"{name}/{n}", count, 16, seed=seed + n) for n in range(shards)}
    return {tar: with_real_codes(one, 16, seed + n) for n, (tar, one) in enumerate(rows.items())}


@pytest.fixture
def codes(tmp_path: Path) -> str:
    return write_codes(tmp_path / "codes", contents("base"), 16).uri


@pytest.fixture
def index(codes: str, tmp_path: Path, pool: InlinePool) -> str:
    return str(build_index([codes], str(tmp_path / "index"), PLAIN, pool=pool).uri)


def without(rows: dict[str, Rows]) -> dict[str, Rows]:
    return {name: Rows(one.keys, one.codes, one.labels) for name, one in rows.items()}


def test_one_index_has_real_codes_of_all_its_codes_or_of_none(
    codes: str, index: str, tmp_path: Path, pool: InlinePool
) -> None:
    plain = write_codes(tmp_path / "plain", without(contents("plain", seed=5)), 16).uri
    both = "has encode.real_codes True, .* has encode.real_codes False"
    with pytest.raises(FingerprintMismatch, match=f"codes {both}: name codes .* with the same setting"):
        build_index([codes, plain], str(tmp_path / "mixed"), PLAIN, pool=pool)
    with pytest.raises(FingerprintMismatch, match=f"index {both}"):
        add_codes(index, [plain], PLAIN, pool=pool)
    build_index([plain], str(tmp_path / "other"), PLAIN, pool=pool)
    with pytest.raises(
        FingerprintMismatch, match=r"other has encode\.real_codes False, .*codes has encode\.real_codes True"
    ):
        add_codes(str(tmp_path / "other"), [codes], PLAIN, pool=pool)


def test_added_and_compacted_parts_keep_their_real_codes(codes: str, index: str, tmp_path: Path) -> None:
    more = write_codes(tmp_path / "more", contents("more", shards=1, seed=9), 16, shards_digest="c" * 64).uri
    assert add_codes(index, [more], PLAIN, pool=InlinePool()).added == 30
    remove_rows(index, PLAIN, ["base/0/00003", "more/0/00000"])
    queries = [f"more/0/{n:05d}" for n in range(1, 30)]
    before = search(index, reranking(40), keys=queries, k=40).results
    compact_index(index, PLAIN, pool=InlinePool())
    assert search(index, reranking(40), keys=queries, k=40).results == before
    with open_index(index) as reader:
        for ordinal, source in enumerate([codes, codes, more]):
            table = reader.read_shard_keys(reader.shards[ordinal])
            whole = list(open_codes(source).tables())[ordinal if ordinal < 2 else 0]
            kept = np.isin(whole["row"].to_numpy(), table["id"].to_numpy() & ROW_MASK)
            assert (real_codes_array(table["real_codes"]) == real_codes_array(whole["real_codes"])[kept]).all()
    verify(index)


def test_an_index_without_real_codes_has_the_bytes_that_it_always_had(tmp_path: Path, pool: InlinePool) -> None:
    plain = write_codes(tmp_path / "plain", without(contents("plain")), 16).uri
    index = str(build_index([plain], str(tmp_path / "index"), PLAIN, pool=pool).uri)
    assert not [name for name, data in bytes_of(index).items() if b"real_codes" in data]
    with pytest.raises(InputError, match=r"index has no real codes to re-rank by: encode with encode\.real_codes=true"):
        search(index, reranking(5), keys=["plain/0/00000"])
    assert search(index, PLAIN, keys=["plain/0/00000"]).results[0]["neighbours"][0]["distance"] == 0


# ------------------------------------------------------------------------------------------------------------ search


def brute(uri: str, n: int, k: int) -> Callable[[npt.NDArray[Any], bytes], list[tuple[int, float]]]:
    """The k of an answer as (id, score), by plain floats over every row."""
    tables = list(open_codes(uri).tables())
    codes = np.concatenate([code_array(table["code"]) for table in tables])
    real_codes = np.concatenate([real_codes_array(table["real_codes"]) for table in tables]).astype(float)
    ids = np.concatenate([index_id(n, table["row"].to_numpy().astype(np.int64)) for n, table in enumerate(tables)])

    def answer(outputs: npt.NDArray[Any], code: bytes) -> list[tuple[int, float]]:
        distances = np.unpackbits(codes ^ np.frombuffer(code, np.uint8), axis=1).sum(1)
        short = np.lexsort((ids, distances))[: max(n, k)]
        z = np.tanh(outputs / np.sqrt(np.mean(outputs.astype(float) ** 2)))
        near = np.tanh(real_codes[short] / np.sqrt(np.mean(real_codes[short] ** 2, axis=1, keepdims=True)))
        far = 1 - near @ z / np.linalg.norm(z) / np.linalg.norm(near, axis=1)
        order = np.lexsort((ids[short], distances[short], far.round(6)))[:k]
        return [(int(ids[short][place]), far[place]) for place in order]

    return answer


def answers(result: dict[str, Any]) -> list[tuple[int, float]]:
    return [(found["id"], found["score"]) for found in result["neighbours"]]


@pytest.mark.parametrize(("n", "k"), [(1, 5), (12, 5), (25, 25), (1000, 5), (1000, 1000)])
@pytest.mark.parametrize("pairs", [1, 1 << 20])
def test_the_short_list_is_ordered_as_plain_floats_order_it(codes: str, index: str, n: int, k: int, pairs: int) -> None:
    expected, limits = brute(codes, n, k), SearchLimits(pairs=pairs)
    opened = open_codes(codes)
    keys = ["base/1/00003", "base/0/00029"]
    by_key = search(index, reranking(n), keys=keys, k=k, limits=limits).results
    by_codes = search(index, reranking(n), codes=[codes], k=k, limits=limits).results
    rows = [row for table in opened.tables() for row in table.to_pylist()]
    found = dict(zip([row["key"] for row in rows], by_codes, strict=True))
    for row in rows:
        want = expected(np.frombuffer(row["real_codes"], np.int8), row["code"])
        got = answers(found[row["key"]])
        assert [number for number, _ in got] == [number for number, _ in want]
        assert [score for _, score in got] == pytest.approx([score for _, score in want], abs=2e-6)
    assert [answers(result) for result in by_key] == [answers(found[key]) for key in keys]


def test_equal_real_codes_come_by_id(tmp_path: Path, pool: InlinePool) -> None:
    row = with_real_codes(Rows(["x"], random_codes(1, 16), [[0]]), 16)
    assert row.real_codes is not None
    same = Rows(list("abcdef"), np.repeat(row.codes, 6, 0), [[0]] * 6, real_codes=np.repeat(row.real_codes, 6, 0))
    codes = write_codes(tmp_path / "codes", {"x.tar": same}, 16).uri
    index = str(build_index([codes], str(tmp_path / "index"), PLAIN, pool=pool).uri)
    (result,) = search(index, reranking(6), keys=["d"], k=4).results
    assert [found["key"] for found in result["neighbours"]] == ["a", "b", "c", "d"]


def test_an_image_is_encoded_by_the_model_that_was_checked_not_by_what_lies_there_by_now(
    pool: InlinePool, pictures: Path, shards: Path, model: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = str(
        build_index(
            [encoded(shards, model, tmp_path / "codes", PLAIN)], str(tmp_path / "index"), PLAIN, pool=pool
        ).as_json()["uri"]
    )
    shutil.copytree(model.uri, tmp_path / "model")
    other = write_model(tmp_path / "other", str(shards), seed=5)

    def swapped(*arguments: object) -> Artifact:
        opened = open_input_version(*arguments)  # type: ignore[arg-type]
        shutil.rmtree(tmp_path / "model")
        shutil.copytree(other.uri, tmp_path / "model")
        return opened

    monkeypatch.setattr("pipelines.search.search.open_input_version", swapped)
    with pytest.raises(DamagedArtifact):
        search(index, PLAIN, images=[str(next(pictures.rglob("*.*")))], model=str(tmp_path / "model"))


def test_an_encoder_leaves_the_threads_of_the_process_as_they_are(model: Artifact, pictures: Path) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        Encoder.open(model).real_codes([next(pictures.rglob("*.*")).read_bytes()])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_an_image_is_ranked_by_what_the_network_says_of_it(
    pool: InlinePool, pictures: Path, shards: Path, model: Artifact, tmp_path: Path
) -> None:
    codes = encoded(shards, model, tmp_path / "codes", REAL_CODES)
    index = str(build_index([codes], str(tmp_path / "index"), PLAIN, pool=pool).uri)
    image = next(pictures.rglob("*.*"))
    page = tmp_path / "found.html"
    found = search(index, reranking(20), images=[str(image)], k=6, html=str(page))
    (result,) = found.results
    (z,) = Encoder.open(model.uri).real_codes([image.read_bytes()])
    want = brute(codes, 20, 6)(z, pack_bits(sign_bits(z[None]))[0].tobytes())
    assert [score for _, score in answers(result)] == pytest.approx([score for _, score in want], abs=2e-6)
    assert result["neighbours"][0]["key"] == str(image.relative_to(pictures).with_suffix(""))
    assert json.loads(json.dumps(result)) == result
    table = found.as_text().splitlines()[:-2]
    assert table[1].split() == ["rank", "score", "distance", "labels", "key"]
    assert [line.split()[1] for line in table[2:]] == [f"{score:.4f}" for _, score in answers(result)]
    assert "the nearest 20 of them ordered by their real codes" in page.read_text()


def test_a_bare_code_and_codes_without_real_codes_cannot_be_re_ranked(codes: str, index: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--code ffff has no real codes to re-rank by"):
        search(index, reranking(5), hex_codes=["ffff"])
    plain = write_codes(tmp_path / "plain", without(contents("plain")), 16).uri
    with pytest.raises(InputError, match="plain has no real codes to re-rank by"):
        search(index, reranking(5), codes=[plain])
    (result,) = search(index, PLAIN, keys=["base/0/00001"]).results
    assert "score" not in result["neighbours"][0]


# ------------------------------------------------------------------------------------------------------------- proof


def forge(root: str, name: str, change: Callable[[npt.NDArray[np.int8]], None]) -> None:
    """Other real codes in a part, with size, sha256 and the manifest's digest fitting again."""
    path = Path(root, "manifest.json")
    fields = json.loads(path.read_bytes())
    (part,) = [part for part in fields["parts"] if part["path"].startswith(f"parts/{name}")]
    table = read_parquet(Path(root, part["path"]).read_bytes(), name)
    real_codes = real_codes_array(table["real_codes"]).copy()
    change(real_codes)
    place = table.schema.get_field_index("real_codes")
    column = pa.array([row.tobytes() for row in real_codes], table.schema.field(place).type)
    table = table.set_column(place, table.schema.field(place), column)
    data = parquet_bytes(table)
    Path(root, part["path"]).write_bytes(data)
    part.update(bytes=len(data), sha256=sha256_of(data))
    fields["digest"] = manifest_digest(fields)
    path.write_bytes(canonical_json(fields))
    version = Path(root, "versions", "1.json")
    if version.exists():
        version.write_bytes(canonical_json({**json.loads(version.read_bytes()), "digest": fields["digest"]}))


def flip_sign(real_codes: npt.NDArray[np.int8]) -> None:
    real_codes[4, 7] *= -1


def shrink(real_codes: npt.NDArray[np.int8]) -> None:
    real_codes[4, 7] = np.sign(real_codes[4, 7]) * (3 if abs(real_codes[4, 7]) != 3 else 4)


def least(real_codes: npt.NDArray[np.int8]) -> None:
    real_codes[real_codes < 0] = -128


@pytest.mark.parametrize("change", [flip_sign, least])
def test_real_codes_that_are_not_those_of_the_codes_are_noticed(codes: str, index: str, change: Any) -> None:
    verify(index)
    forge(index, "keys-000000", change)
    with pytest.raises(DamagedArtifact, match=r"keys-000000.* has real codes that are not those of its codes"):
        verify(index)


def test_codes_whose_real_codes_lie_on_the_wrong_side_are_noticed(
    pool: InlinePool, shards: Path, model: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipelines.encode.encoder, "quantise_real_codes", lambda z: -quantise_real_codes(z))
    uri = encoded(shards, model, tmp_path / "codes", REAL_CODES)
    with pytest.raises(DamagedArtifact, match="has real codes that are not those of its codes"):
        verify(uri)


def test_other_real_codes_than_those_of_the_codes_artifact_are_noticed(codes: str, index: str) -> None:
    forge(index, "keys-000000", shrink)
    with pytest.raises(DamagedArtifact, match="has other rows than"):
        verify(index)


def test_real_codes_of_an_unknown_form_are_refused(codes: str) -> None:
    path = Path(codes, "manifest.json")
    fields = json.loads(path.read_bytes())
    fields["meta"]["real_codes"] = "float8"
    fields["digest"] = manifest_digest(fields)
    path.write_bytes(canonical_json(fields))
    with pytest.raises(DamagedArtifact, match=r"\(real_codes is wrong: the form 'float8' is not known to this hhnet\)"):
        open_codes(codes)
    with pytest.raises(DamagedArtifact, match="is not known"):
        verify(codes)
    assert open_current(codes).digest == fields["digest"]
