"""`retry-rejects` without Ray: what makes a version, and what is never lost. The integration test goes all the way."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import duckdb
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from pipelines.artifacts.commit import list_versions
from pipelines.artifacts.manifest import Artifact, open_artifact
from pipelines.artifacts.versions import open_current
from pipelines.config.loading import load_config
from pipelines.config.settings import Config
from pipelines.encode import retry_rejects as retry_module
from pipelines.encode.codes import open_codes
from pipelines.encode.encode import encode
from pipelines.encode.retry_rejects import retry_rejects
from pipelines.errors import CommitConflict, FingerprintMismatch, InputError
from pipelines.index.build import build_index
from pipelines.ingest.ingest import ingest
from pipelines.shards.shards import open_shards
from pipelines.storage import Store
from pipelines.verify.verify import verify
from tests.support.corpus import Corpus
from tests.support.inline import InlinePool
from tests.support.models import write_model
from tests.support.pictures import animated_gif, write_folder


@pytest.fixture(scope="module")
def config() -> Config:
    return load_config(sets=["ingest.samples_per_shard=10", "data.image_size=32", "encode.batch_size=8"])


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, config: Config) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    write_folder(folder / "photos", classes=3, per_class=12)
    ingest(str(folder / "photos"), str(folder / "train"), config)
    return folder / "train"


@pytest.fixture(scope="module")
def model(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("model") / "model"
    write_model(out, str(shards))
    return out


@pytest.fixture
def corpus(shards: Path, tmp_path: Path) -> Corpus:
    return Corpus(shards, tmp_path)


def encode_damaged(corpus: Corpus, model: Path, config: Config, rows: dict[int, list[int]]) -> None:
    """Encode while these rows of the tars are damaged, and bring their bytes back."""
    for number, damaged in rows.items():
        corpus.damage(number, damaged)
    encode(corpus.uri, str(model), corpus.out, config, allow_degraded=True, pool=InlinePool())
    corpus.mend()


def test_a_partly_mended_corpus_makes_a_version_and_stays_degraded(corpus: Corpus, model: Path, config: Config) -> None:
    encode_damaged(corpus, model, config, {0: [1, 4], 2: [0, 1]})
    corpus.damage(2, [0, 1])
    corpus.damage(0, [4])
    result = retry_rejects(corpus.out, config, pool=InlinePool()).as_json()
    assert (result["status"], result["version"], result["rejects"]) == ("degraded", 2, 3)
    corpus.mend()
    last = retry_rejects(corpus.out, config, pool=InlinePool()).as_json()
    assert (last["status"], last["version"], last["rejects"]) == ("done", 3, 0)
    assert verify(corpus.out).digest == last["digest"]


def test_whoever_reads_the_parts_reads_each_sample_once(corpus: Corpus, model: Path, config: Config) -> None:
    """By a glob or by the folder, also after two retries; what was there before keeps its bytes."""
    encode_damaged(corpus, model, config, {0: [1, 4], 2: list(range(10))})
    before = {path.name: path.read_bytes() for path in Path(corpus.out, "parts").iterdir()}
    corpus.damage(0, [4])
    assert retry_rejects(corpus.out, config, pool=InlinePool()).rejects == 1
    corpus.mend()
    assert retry_rejects(corpus.out, config, pool=InlinePool()).rejects == 0
    parts = f"{corpus.out}/parts"
    assert before.items() <= {path.name: path.read_bytes() for path in Path(parts).iterdir()}.items()
    found = duckdb.sql(f"select count(*), count(distinct key) from '{parts}/*.parquet'").fetchall()
    keys = {name: set(reader(parts)) for name, reader in READERS.items()}
    assert found == [(36, 36)] and {name: len(each) for name, each in keys.items()} == dict.fromkeys(keys, 36)
    assert verify(corpus.out).orphans == []
    undisturbed = encode(corpus.uri, str(model), corpus.out + "-other", config, pool=InlinePool()).as_json()
    tables = [pa.concat_tables(open_codes(uri).tables()).to_pylist() for uri in (corpus.out, undisturbed["uri"])]
    assert tables[0] == tables[1]


READERS: dict[str, Callable[[str], list[str]]] = {
    "pandas": lambda folder: pd.read_parquet(folder)["key"].tolist(),
    "pyarrow": lambda folder: pq.read_table(folder)["key"].to_pylist(),
    "dataset": lambda folder: ds.dataset(folder).to_table()["key"].to_pylist(),
}


def test_animations_are_counted_of_the_version_that_is_current(tmp_path: Path, model: Path, config: Config) -> None:
    write_folder(tmp_path / "photos", classes=3, per_class=8)
    for number in range(3):
        (tmp_path / "photos" / "class_00" / f"moving{number}.gif").write_bytes(animated_gif())
    shards = Path(ingest(str(tmp_path / "photos"), str(tmp_path / "train"), config).uri)
    corpus = Corpus(shards, tmp_path)
    rows = {
        number: [row for row, record in enumerate(shard.records()) if "moving" in record.key]
        for number, shard in enumerate(open_shards(str(shards)).shards)
    }
    assert sum(map(len, rows.values())) == 3
    damaged = {number: some[:1] for number, some in rows.items() if some}
    encode_damaged(corpus, model, config, damaged)
    assert open_artifact(corpus.out).manifest.meta.get("animated", 0) == 3 - len(damaged)
    retry_rejects(corpus.out, config, pool=InlinePool())
    assert open_current(Store(corpus.out), "codes").manifest.meta["animated"] == 3
    assert encode(corpus.uri, str(model), corpus.out, config, pool=InlinePool()).animated == 3


@pytest.mark.parametrize("which", ["first", "recovered", "receipt"])
def test_what_is_lost_of_a_retried_shard_is_made_again(which: str, corpus: Corpus, model: Path, config: Config) -> None:
    encode_damaged(corpus, model, config, {0: [1, 4]})
    first = {path.name for path in Path(corpus.out, "parts").glob("*-000000-*")}
    done = retry_rejects(corpus.out, config, pool=InlinePool()).as_json()
    (recovered,) = {path.name for path in Path(corpus.out, "parts").glob("*-000000-*")} - first
    lost = {
        "first": f"parts/{min(first)}",
        "recovered": f"parts/{recovered}",
        "receipt": "receipts/v2/train-000000.json",
    }
    path = next(Path(corpus.out).glob(lost[which].replace("train-", "*-")))
    data = path.read_bytes()
    path.unlink()
    assert encode(corpus.uri, str(model), corpus.out, config, pool=InlinePool()).digest == done["digest"]
    assert path.read_bytes() == data and verify(corpus.out).orphans == []


def test_a_code_is_never_lost_to_a_retry(corpus: Corpus, model: Path, config: Config) -> None:
    encode_damaged(corpus, model, config, {0: [1]})
    corpus.remove(0)
    result = retry_rejects(corpus.out, config, pool=InlinePool()).as_json()
    assert (result["status"], result["codes"], result["rejects"]) == ("unchanged", 35, 1)
    corpus.mend()
    corpus.damage(0, [2])  # another row than before
    assert retry_rejects(corpus.out, config, pool=InlinePool()).status == "unchanged"


def test_a_retry_that_was_cut_off_goes_on_from_its_receipts(
    corpus: Corpus, model: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode_damaged(corpus, model, config, {0: [1, 4], 2: [0]})

    def cut_off(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(retry_module, "publish_next", cut_off)
        with pytest.raises(KeyboardInterrupt):
            retry_rejects(corpus.out, config, pool=InlinePool())
    before = set(Path(corpus.out, "runs").iterdir())
    assert list_versions(Store(corpus.out)) == []
    result = retry_rejects(corpus.out, config, pool=InlinePool()).as_json()
    assert (result["status"], result["rejects"]) == ("done", 0)
    assert set(Path(corpus.out, "runs").iterdir()) == before  # nothing was encoded
    assert verify(corpus.out).orphans == []


def test_of_two_retries_with_other_results_one_publishes(
    corpus: Corpus, model: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode_damaged(corpus, model, config, {0: [1, 4], 2: [0]})
    publish = retry_module.publish_next

    def overtaken(*arguments: object, **changed: object) -> Artifact:
        base, number, parts, refs, totals = arguments
        publish(base, number, parts, refs, {**totals, "codes": 0}, **changed)  # type: ignore[arg-type,dict-item]
        return publish(*arguments, **changed)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(retry_module, "publish_next", overtaken)
        with pytest.raises(CommitConflict, match="another run published version 2 meanwhile"):
            retry_rejects(corpus.out, config, pool=InlinePool())
    assert list_versions(Store(corpus.out)) == [1, 2]


def test_moved_inputs_are_named_and_others_refused(corpus: Corpus, model: Path, config: Config, tmp_path: Path) -> None:
    write_folder(tmp_path / "photos", classes=3, per_class=1)
    other = str(ingest(str(tmp_path / "photos"), str(tmp_path / "other"), config).uri)
    encode_damaged(corpus, model, config, {0: [1]})
    moved = str(shutil.move(corpus.uri, tmp_path / "moved"))
    with pytest.raises(InputError, match="holds no committed shards"):
        retry_rejects(corpus.out, config, pool=InlinePool())
    with pytest.raises(FingerprintMismatch, match="was made from shards"):
        retry_rejects(corpus.out, config, shards=other, pool=InlinePool())
    assert retry_rejects(corpus.out, config, shards=moved, model=str(model), pool=InlinePool()).status == "done"


def test_the_settings_are_those_that_made_the_codes(corpus: Corpus, model: Path, config: Config) -> None:
    encode_damaged(corpus, model, config, {0: [1]})
    other = load_config(sets=["encode.batch_size=5", "encode.carry=['author']", "encode.workers=1"])
    result = retry_rejects(corpus.out, other, pool=InlinePool()).as_json()
    assert (result["status"], result["rejects"]) == ("done", 0)
    assert verify(corpus.out).digest == result["digest"]
    identity = json.loads(Path(corpus.out, "identity.json").read_bytes())
    assert open_current(corpus.out).manifest.fingerprint == identity["fingerprint"]


def test_an_index_of_the_first_version_is_still_proven_after_a_retry(
    corpus: Corpus, model: Path, config: Config, tmp_path: Path
) -> None:
    corpus.damage(0, [1, 4])
    encode(corpus.uri, str(model), corpus.out, config, allow_degraded=True, pool=InlinePool())
    build_index([corpus.out], str(tmp_path / "index"), load_config(sets=["index.workers=1"]), pool=InlinePool())
    corpus.mend()
    retry_rejects(corpus.out, config, pool=InlinePool())
    assert f"input codes-0: {corpus.out} has the digest" in "\n".join(verify(str(tmp_path / "index")).checks)
