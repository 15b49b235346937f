"""Protocols of CIFAR-10: the counts of the field, and splits of small files in the exact format of the original."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from pipelines.artifacts.manifest import manifest_digest, open_artifact
from pipelines.errors import DamagedArtifact, FingerprintMismatch, InputError, WorkFailed
from pipelines.ingest import protocols
from pipelines.ingest.protocols.cifar10 import Cifar10
from pipelines.ingest.sources import SourceImage
from pipelines.shards.images import decode_image
from pipelines.shards.shards import open_shards
from pipelines.storage import canonical_json
from pipelines.verify.verify import verify
from tests.support.pictures import png
from tests.support.plugins import plugged_in
from tests.support.protocols import hhnet, keys_of, samples_of
from tests.support.protocols import ingested as ingested_by

RECORD = 3073
BATCHES = ["data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"]
NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
DRAWN = Cifar10(
    name="drawn",
    parts={"train": 20, "query": 10, "val": 10, "database": 80},
    database=("database",),
    batch=20,
)
OFFICIAL = Cifar10(name="official", parts={"train": 100, "query": 20}, database=("train",), official=True, batch=20)

Records = npt.NDArray[np.uint8]


@pytest.fixture
def cifar(tmp_path: Path) -> Path:
    """Six files of 20 records, 12 of each class in all, two of them in the test file, and no two images alike."""
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    random = np.random.default_rng(0)
    labels = [*random.permutation(np.repeat(np.arange(10), 10)), *random.permutation(np.repeat(np.arange(10), 2))]
    for place, batch in enumerate(BATCHES):
        pixels = random.integers(0, 256, (20, RECORD - 1), np.uint8)
        own = np.array(labels[place * 20 : place * 20 + 20], np.uint8)
        (folder / f"{batch}.bin").write_bytes(np.column_stack([own, pixels]).tobytes())
    (folder / "batches.meta.txt").write_text("\n".join(NAMES) + "\n\n")
    return folder


@pytest.fixture
def pictures(cifar: Path) -> Path:
    """The same images as PNG files in train/<class> and test/<class>."""
    root = cifar.parent / "pictures"
    for batch in BATCHES:
        for row, record in enumerate(records_of(cifar, batch)):
            folder = root / ("test" if batch == "test_batch" else "train") / NAMES[record[0]]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{batch}-{row}.png").write_bytes(png(record[1:].reshape(3, 32, 32).transpose(1, 2, 0)))
    return root


def records_of(folder: Path, batch: str) -> Records:
    return np.frombuffer((folder / f"{batch}.bin").read_bytes(), np.uint8).reshape(-1, RECORD).copy()


def change_records(folder: Path, batch: str, change: Callable[[Records], None]) -> None:
    records = records_of(folder, batch)
    change(records)
    (folder / f"{batch}.bin").write_bytes(records.tobytes())


def copy_pixels(folder: Path, source: str, target: str) -> None:
    """Give the record of the key `target` the pixels of `source`."""
    batch, _, row = source.partition("/")
    pixels = records_of(folder, batch)[int(row), 1:]
    batch, _, row = target.partition("/")
    records = records_of(folder, batch)
    records[int(row), 1:] = pixels
    (folder / f"{batch}.bin").write_bytes(records.tobytes())


def ingested(folder: Path, out: Path, protocol: Cifar10 = DRAWN, *sets: str) -> dict[str, Any]:
    return ingested_by(folder, out, protocol, *sets)


# ------------------------------------------------------------------------------------------------- counts and draws


@pytest.mark.parametrize(
    ("name", "parts", "searched"),
    [
        ("cifar10", {"train": 5_000, "query": 1_000, "database": 54_000}, 54_000),
        ("cifar10-1", {"train": 5_000, "query": 1_000, "database": 54_000}, 59_000),
        ("cifar10-2", {"train": 50_000, "query": 10_000}, 50_000),
        ("cifar10-h2q", {"train": 5_000, "query": 1_000, "val": 1_000, "database": 53_000}, 53_000),
    ],
)
def test_all_60000_images_are_dealt_by_the_counts_of_the_field(name: str, parts: dict[str, int], searched: int) -> None:
    protocol = protocols.find_protocol(name)
    keys = [f"{batch}/{row:05d}" for batch in BATCHES for row in range(10_000)]
    labels = [NAMES[place % 10] for place in range(60_000)]
    groups = ["test" if key.startswith("test") else "train" for key in keys]
    entries = [
        SourceImage(f"{key}.bmp", (label,), None, group) for key, label, group in zip(keys, labels, groups, strict=True)
    ]
    dealt = protocol.assign(entries, keys, "here")
    assert Counter(dealt) == parts == protocol.parts
    assert sum(parts[part] for part in protocol.database) == searched
    of_a_class = Counter(zip(dealt, labels, strict=True))
    assert all(of_a_class[part, klass] == count // 10 for part, count in parts.items() for klass in NAMES)


def test_a_draw_gives_each_class_its_share(cifar: Path, tmp_path: Path) -> None:
    result = ingested(cifar, tmp_path / "out")
    assert {part: split["samples"] for part, split in result["splits"].items()} == DRAWN.parts
    keys = [key for part in DRAWN.parts for key in keys_of(tmp_path / "out", part)]
    assert sorted(keys) == sorted(f"{batch}/{row:05d}" for batch in BATCHES for row in range(20))
    for part, count in DRAWN.parts.items():
        labels = Counter(sample.record.labels for sample in samples_of(tmp_path / "out", part))
        assert labels == {(klass,): count // 10 for klass in range(10)}


def test_the_draw_follows_the_rule_and_no_setting(cifar: Path, tmp_path: Path) -> None:
    labels = {f"{batch}/{row:05d}": r[0] for batch in BATCHES for row, r in enumerate(records_of(cifar, batch))}
    order = sorted(labels, key=lambda key: hashlib.sha256(f"cifar10 draw 1:{key}".encode()).hexdigest())
    of_class = [[key for key in order if labels[key] == klass] for klass in range(10)]
    first = ingested(cifar, tmp_path / "a")
    second = ingested(cifar, tmp_path / "b", DRAWN, "ingest.seed=7", "ingest.samples_per_shard=9")
    assert first["protocol"] == second["protocol"]
    for part, start, stop in (("query", 0, 1), ("train", 1, 3), ("val", 3, 4), ("database", 4, 12)):
        expected = sorted(key for keys in of_class for key in keys[start:stop])
        assert keys_of(tmp_path / "a", part) == keys_of(tmp_path / "b", part) == expected


def test_protocols_of_equal_shares_have_equal_queries_and_training_images(cifar: Path, tmp_path: Path) -> None:
    other = replace(DRAWN, name="other", parts={"train": 20, "query": 10, "database": 90})
    cards = [ingested(cifar, tmp_path / protocol.name, protocol)["protocol"] for protocol in (DRAWN, other)]
    for part in ("query", "train"):
        assert cards[0]["parts"][part] == cards[1]["parts"][part]
    assert cards[0]["digest"] != cards[1]["digest"]


def test_the_official_queries_are_the_test_images(cifar: Path, pictures: Path, tmp_path: Path) -> None:
    for source, out in ((cifar, tmp_path / "binary"), (pictures, tmp_path / "folder")):
        result = ingested(source, out, OFFICIAL)
        assert {part: split["samples"] for part, split in result["splits"].items()} == OFFICIAL.parts
    assert keys_of(tmp_path / "binary", "query") == [f"test_batch/{row:05d}" for row in range(20)]
    assert all(key.startswith("test/") for key in keys_of(tmp_path / "folder", "query"))


def test_pixels_and_labels_are_those_of_the_records(cifar: Path, tmp_path: Path) -> None:
    ingested(cifar, tmp_path / "out", OFFICIAL)
    records = records_of(cifar, "test_batch")
    for sample in samples_of(tmp_path / "out", "query"):
        record = records[int(sample.record.key.removeprefix("test_batch/"))]
        assert sample.record.labels == (record[0],)
        assert np.array_equal(decode_image(sample.image).transpose(2, 0, 1).ravel(), record[1:])
    assert open_shards(str(tmp_path / "out/query")).classes == tuple(NAMES)


def test_a_folder_of_pictures_is_dealt_like_the_records(pictures: Path, tmp_path: Path) -> None:
    (pictures / "labels.txt").write_text("no picture")
    result = ingested(pictures, tmp_path / "out")
    assert {part: split["samples"] for part, split in result["splits"].items()} == DRAWN.parts
    assert result["skipped"] == 1
    for part, count in DRAWN.parts.items():
        classes = Counter(sample.record.key.split("/")[1] for sample in samples_of(tmp_path / "out", part))
        assert classes == dict.fromkeys(NAMES, count // 10)
        for sample in samples_of(tmp_path / "out", part):
            assert sample.image == (pictures / f"{sample.record.key}.png").read_bytes()


# ------------------------------------------------------------------------------------------------------------- proof


def test_every_manifest_proves_its_part_of_the_split(cifar: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    card = ingested(cifar, out)["protocol"]
    for part in DRAWN.parts:
        meta = open_artifact(str(out / part)).manifest.meta
        assert meta["protocol"] == card
        assert meta["split"] == {"by": "protocol", "spec": "drawn@1", "part": part}
        samples = sorted((s.record.key, hashlib.sha256(s.image).hexdigest()) for s in samples_of(out, part))
        assert card["parts"][part] == {
            "samples": len(samples),
            "keys": hashlib.sha256("".join(f"{key}\n" for key, _ in samples).encode()).hexdigest(),
            "images": hashlib.sha256("".join(f"{image}  {key}\n" for key, image in samples).encode()).hexdigest(),
        }
        checks = verify(str(out / part)).checks
        assert f"keys and images are those of {part} in protocol drawn, split {card['digest'][:12]}" in checks
    whole = {"parts": card["parts"], "database": ["database"]}
    assert card["digest"] == hashlib.sha256(canonical_json(whole)).hexdigest()


def test_the_digest_tells_what_is_searched_and_what_the_images_are(cifar: Path, tmp_path: Path) -> None:
    searched = replace(DRAWN, name="searched", database=("train", "database"))
    cards = [ingested(cifar, tmp_path / protocol.name, protocol)["protocol"] for protocol in (DRAWN, searched)]
    change_records(cifar, "data_batch_1", lambda records: records[3:4, 9].fill(records[3, 9] ^ 1))
    cards.append(ingested(cifar, tmp_path / "changed")["protocol"])
    assert cards[0]["parts"] == cards[1]["parts"]
    assert all(a["digest"] != b["digest"] for a, b in combinations(cards, 2))
    for part in DRAWN.parts:
        assert cards[0]["parts"][part]["keys"] == cards[2]["parts"][part]["keys"]


def unlisted_part(meta: dict[str, Any]) -> None:
    del meta["protocol"]["parts"]["query"]


def other_part(meta: dict[str, Any]) -> None:
    meta["split"]["part"] = "train"


def other_keys(meta: dict[str, Any]) -> None:
    meta["protocol"]["parts"]["query"]["keys"] = "0" * 64


def other_database(meta: dict[str, Any]) -> None:
    meta["protocol"]["database"] = ["train"]


def no_card(meta: dict[str, Any]) -> None:
    meta["protocol"] = ["query"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (unlisted_part, "does not say which part of which protocol this is"),
        (other_part, "the samples are not those of train in protocol drawn"),
        (other_keys, "the samples are not those of query in protocol drawn"),
        (other_database, "the parts of protocol drawn do not have the digest of its split"),
        (no_card, r"the shards manifest cannot be used \(protocol is wrong"),
    ],
)
def test_a_manifest_that_lies_about_its_split(
    cifar: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    ingested(cifar, tmp_path / "out")
    path = tmp_path / "out/query/manifest.json"
    fields = json.loads(path.read_bytes())
    change(fields["meta"])
    path.write_bytes(canonical_json({**fields, "digest": manifest_digest(fields)}))
    with pytest.raises(DamagedArtifact, match=message):
        verify(str(tmp_path / "out/query"))


def test_a_rerun_is_unchanged_resumes_and_refuses_another_protocol(cifar: Path, tmp_path: Path) -> None:
    first = ingested(cifar, tmp_path / "out")
    assert ingested(cifar, tmp_path / "out") == {**first, "status": "unchanged"}
    (tmp_path / "out/train/manifest.json").unlink()
    assert ingested(cifar, tmp_path / "out") == first
    with pytest.raises(FingerprintMismatch):
        ingested(cifar, tmp_path / "out", replace(DRAWN, name="other"))
    with pytest.raises(FingerprintMismatch):
        ingested(cifar, tmp_path / "out", replace(DRAWN, version=2))


# ------------------------------------------------------------------------------------------------------------- leaks


def test_images_that_two_parts_have_are_counted_and_warned_of(
    cifar: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ingested(cifar, tmp_path / "clean")["protocol"]["leaks"] == {}
    assert "warning" not in capsys.readouterr().err
    query, train, val, database = (keys_of(tmp_path / "clean", part) for part in ("query", "train", "val", "database"))
    for key, copy in ((query[0], train[0]), (query[1], train[1]), (train[2], database[0]), (val[0], database[1])):
        copy_pixels(cifar, key, copy)
    result = ingested(cifar, tmp_path / "out")
    assert result["protocol"]["leaks"] == {"query in train": 2, "train in database": 1, "val in database": 1}
    named = "2 query in train, 1 train in database, 1 val in database"
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert warning == f"hhnet: warning: drawn: the data set has images twice, and so two parts have them: {named}"
    both = replace(DRAWN, database=("train", "database"))
    assert ingested(cifar, tmp_path / "both", both)["protocol"]["leaks"] == {"query in train": 2, "val in database": 1}


def test_training_images_that_are_searched_by_design_are_warned_of(
    cifar: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ingested(cifar, tmp_path / "out", OFFICIAL)
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert "official: the 100 training images are in the database, by design of the protocol" in warning


# --------------------------------------------------------------------------------------------------------- bad files


def no_folder(folder: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))


def no_data(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def no_names(folder: Path) -> None:
    (folder / "batches.meta.txt").unlink()


def other_names(folder: Path) -> None:
    (folder / "batches.meta.txt").write_text("\n".join(reversed(NAMES)))


def no_batch(folder: Path) -> None:
    (folder / "data_batch_4.bin").unlink()


def short_batch(folder: Path) -> None:
    path = folder / "data_batch_4.bin"
    path.write_bytes(path.read_bytes()[:-1])


def long_batch(folder: Path) -> None:
    path = folder / "test_batch.bin"
    path.write_bytes(path.read_bytes() + bytes(RECORD))


def bad_label(folder: Path) -> None:
    change_records(folder, "data_batch_2", lambda records: records[11:12, 0].fill(10))


def all_one_class(folder: Path) -> None:
    change_records(folder, "data_batch_2", lambda records: records[:, 0].fill(0))


def swapped(folder: Path) -> None:
    """The set as a whole has the right counts, its test file has not."""
    train, test = records_of(folder, "data_batch_1"), records_of(folder, "test_batch")
    row, other = np.flatnonzero(train[:, 0] == 0)[0], np.flatnonzero(test[:, 0] == 1)[0]
    change_records(folder, "data_batch_1", lambda records: records[row : row + 1, 0].fill(1))
    change_records(folder, "test_batch", lambda records: records[other : other + 1, 0].fill(0))


def pickles(folder: Path) -> None:
    for path in folder.iterdir():
        path.rename(path.with_name(path.name.replace(".bin", "").replace(".meta.txt", ".meta")))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (no_folder, "cifar-10-batches-bin: No such file or directory: --root is the folder cifar-10-batches-bin, or"),
        (no_data, "cifar-10-batches-bin does not hold CIFAR-10: --root is the folder cifar-10-batches-bin, or one of"),
        (no_names, "batches.meta.txt: No such file or directory: --root is the folder cifar-10-batches-bin"),
        (other_names, "batches.meta.txt does not name airplane, automobile"),
        (no_batch, "data_batch_4.bin: No such file or directory"),
        (short_batch, "data_batch_4.bin has 61459 bytes, 61460 expected (20 records of 3073)"),
        (long_batch, "test_batch.bin has 64533 bytes, 61460 expected (20 records of 3073)"),
        (bad_label, "data_batch_2.bin: the label of record 11 is 10, 0 to 9 expected"),
        (all_one_class, "train images of airplane, 10 expected: it is not the original CIFAR-10"),
        (swapped, "train images of airplane, 10 expected: it is not the original CIFAR-10"),
        (pickles, "made of pickles and never read: take the binary version, cifar-10-binary.tar.gz from https://"),
    ],
)
def test_files_that_do_not_fit(cifar: Path, tmp_path: Path, spoil: Callable[[Path], None], message: str) -> None:
    spoil(cifar)
    with pytest.raises(InputError) as caught:
        ingested(cifar, tmp_path / "out")
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


def one_less(root: Path) -> None:
    next((root / "test/frog").iterdir()).unlink()


def unknown_class(root: Path) -> None:
    (root / "train/frog").rename(root / "train/toad")


def too_deep(root: Path) -> None:
    (root / "train/frog/more").mkdir()
    (root / "train/frog/more/x.png").write_bytes(b"")


def third_folder(root: Path) -> None:
    (root / "valid/frog").mkdir(parents=True)
    (root / "valid/frog/x.png").write_bytes(b"")


def beside(root: Path) -> None:
    (root / "frog").mkdir()
    (root / "frog/x.png").write_bytes(b"")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (one_less, "pictures: 1 test images of frog, 2 expected: it is not the original CIFAR-10"),
        (
            unknown_class,
            ".png does not lie in train/<class> or test/<class> of the classes airplane, automobile",
        ),
        (too_deep, "pictures/train/frog/more/x.png does not lie in train/<class> or test/<class>"),
        (third_folder, "pictures/valid/frog/x.png does not lie in train/<class> or test/<class>"),
        (beside, "pictures/frog/x.png does not lie in train/<class> or test/<class>"),
    ],
)
def test_pictures_that_do_not_fit(pictures: Path, tmp_path: Path, spoil: Callable[[Path], None], message: str) -> None:
    spoil(pictures)
    with pytest.raises(InputError) as caught:
        ingested(pictures, tmp_path / "out")
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_protocol_of_other_counts_than_the_files(cifar: Path, tmp_path: Path) -> None:
    other = replace(DRAWN, parts={"train": 20, "query": 10, "database": 80})
    with pytest.raises(InputError, match="90 images for database, drawn has 80: it is not the data set"):
        ingested(cifar, tmp_path / "out", other)


def test_a_file_that_shrinks_in_between(cifar: Path) -> None:
    with DRAWN.open(cifar) as source:
        short_batch(cifar)
        with pytest.raises(WorkFailed, match=r"data_batch_4\.bin changed while it was ingested: run again"):
            source.read("data_batch_4/00019.bmp")
        no_batch(cifar)
        with pytest.raises(InputError, match=r"cannot read .*data_batch_4\.bin: No such file"):
            source.read("data_batch_4/00019.bmp")


# ------------------------------------------------------------------------------------------------------ command line


def test_the_command_line(cifar: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with plugged_in(
        protocols, tmp_path / "plugins", "drawn", f"from {__name__} import DRAWN\n\nPROTOCOLS = (DRAWN,)\n"
    ):
        words = ["ingest", "--protocol", "drawn", "--root", str(cifar), "--out", str(tmp_path / "out"), "--json"]
        code, out, _ = hhnet(words, capsys)
        result = json.loads(out)
        assert (code, result["verb"], result["status"]) == (0, "ingest", "done")
        assert result["protocol"]["name"] == "drawn"
        code, out, _ = hhnet(words[:-1], capsys)
        assert out.startswith("ingest: unchanged\n")
        assert result["protocol"]["digest"] in out


KNOWN = "'cifar11' is unknown: choose one of cifar10, cifar10-1, cifar10-2, cifar10-h2q"
ALONE = "give only --root and --out with it"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--protocol", "cifar10", "--root", "{root}"], "data_batch_1.bin has 61460 bytes, 30730000 expected"),
        (["--protocol", "cifar11", "--root", "{root}"], KNOWN),
        (["--protocol", "cifar10", "--root", "s3://bucket/cifar"], "images are read from a local path"),
        (["--root", "{root}"], "--protocol NAME and --root DIR go together"),
        (["--protocol", "cifar10"], "--protocol NAME and --root DIR go together"),
        (["{root}", "--protocol", "cifar10", "--root", "{root}"], ALONE),
        (["--protocol", "cifar10", "--root", "{root}", "--split", "folder"], ALONE),
        (["--protocol", "cifar10", "--root", "{root}", "--adopt"], ALONE),
        (["--protocol", "cifar10", "--root", "{root}", "--unlabelled"], ALONE),
        (["--protocol", "cifar10", "--root", "{root}", "--label", "x"], ALONE),
        ([], "nothing to ingest: give SOURCE, or --protocol and --root"),
    ],
)
def test_bad_usage_is_one_line_and_exit_2(
    cifar: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    given = [word.format(root=cifar) for word in words]
    code, out, errors = hhnet(["ingest", *given, "--out", str(tmp_path / "out")], capsys)
    (line,) = errors.splitlines()
    assert (code, out) == (2, "")
    assert message in line
    assert not (tmp_path / "out").exists()
