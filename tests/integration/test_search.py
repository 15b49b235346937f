"""Search and evaluation over codes of a trained network, as a user asks for them."""

import json
from pathlib import Path

import faiss
import numpy as np
import pytest

from hhnet import hamming_knn
from pipelines.config.loading import load_config
from pipelines.config.settings import Config
from pipelines.encode.codes import code_array, open_codes
from pipelines.encode.encode import encode
from pipelines.errors import FingerprintMismatch, InputError
from pipelines.evaluate.evaluate import evaluate
from pipelines.index.build import build_index
from pipelines.search.search import search
from pipelines.verify.verify import verify
from tests.integration.conftest import SETTINGS
from tests.support.models import write_model


@pytest.fixture(scope="module")
def index(codes: Path, tmp_path_factory: pytest.TempPathFactory, config: Config, local_ray: None) -> Path:
    out = tmp_path_factory.mktemp("index") / "index"
    build_index([str(codes / "train"), str(codes / "database")], str(out), config)
    return out


def test_an_indexed_image_finds_itself_first(index: Path, pictures: Path, shards: Path, config: Config) -> None:
    image = pictures / "class_01" / "0003.png"
    assert image.exists()
    (by_image,) = search(str(index), config, images=[str(image)], k=48).results
    indexed = {found["key"]: found for found in by_image["neighbours"]}
    if "class_01/0003" not in indexed:
        pytest.fail("the split is seeded: this picture belongs to the database")
    assert indexed["class_01/0003"]["distance"] == 0
    (by_key,) = search(str(index), config, keys=["class_01/0003"], k=48).results
    assert by_key["neighbours"] == by_image["neighbours"]


def test_faiss_over_the_parquet_bytes_finds_the_same_distances(index: Path, codes: Path, config: Config) -> None:
    database = np.concatenate(
        [
            code_array(table["code"])
            for split in ("train", "database")
            for table in open_codes(str(codes / split)).tables()
        ]
    )
    queries = np.concatenate([code_array(table["code"]) for table in open_codes(str(codes / "query")).tables()])
    flat = faiss.IndexBinaryFlat(16)
    flat.add(database)
    expected, _ = flat.search(queries, 10)
    results = search(str(index), config, codes=[str(codes / "query")], k=10).results
    assert [[n["distance"] for n in entry["neighbours"]] for entry in results] == expected.tolist()
    assert hamming_knn(queries, database, 10)[0].tolist() == expected.tolist()


def test_the_page_holds_the_pictures(index: Path, pictures: Path, config: Config, tmp_path: Path) -> None:
    page = tmp_path / "found.html"
    search(str(index), config, images=[str(next(pictures.rglob("*.png")))], k=5, html=str(page))
    text = page.read_text()
    assert text.count("data:image/") == 6
    assert "http://" not in text.replace("http://www.w3.org", "") and "https://" not in text


def test_evaluation_of_a_learned_set_beats_chance_and_verifies(codes: Path, tmp_path: Path, config: Config) -> None:
    databases = [str(codes / "train"), str(codes / "database")]
    result = evaluate(str(codes / "query"), databases, str(tmp_path / "report"), config).as_json()
    assert result["map"] > 0.9 > 2 * result["chance"]
    metrics = json.loads(next((tmp_path / "report" / "parts").glob("metrics-*.json")).read_bytes())
    assert metrics["map"] == result["map"]
    assert verify(str(tmp_path / "report")).kind == "report"
    assert evaluate(str(codes / "query"), databases, str(tmp_path / "report"), config).status == "unchanged"


def test_a_model_of_other_bits_is_refused(
    index: Path, shards: Path, pictures: Path, tmp_path: Path, local_ray: None
) -> None:
    wide = load_config(sets=[*SETTINGS, "model.bits=32"])
    write_model(tmp_path / "model", str(shards / "train"), bits=32)
    encode(str(shards / "query"), str(tmp_path / "model"), str(tmp_path / "codes"), wide)
    image = str(next(pictures.rglob("*.png")))
    with pytest.raises(FingerprintMismatch, match="32"):
        search(str(index), wide, codes=[str(tmp_path / "codes")])
    with pytest.raises(FingerprintMismatch, match="was made from model"):
        search(str(index), wide, images=[image], model=str(tmp_path / "model"))


def test_what_is_no_image_is_named(index: Path, config: Config, tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("no picture")
    with pytest.raises(InputError, match=r"text\.jpg"):
        search(str(index), config, images=[str(tmp_path / "text.jpg")])
