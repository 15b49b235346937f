"""Class ids of tables, folders and tars of others: who compares them goes by name."""

from pathlib import Path

import numpy as np
import pytest

from hhnet import mean_average_precision
from pipelines.config.loading import load_config
from pipelines.encode.codes import open_codes
from pipelines.encode.encode import encode
from pipelines.errors import InputError
from pipelines.evaluate.evaluate import evaluate
from pipelines.ingest.adopt import adopt
from pipelines.ingest.ingest import ingest
from pipelines.shards.shards import open_shards, write_tar
from pipelines.train.batches import TrainData
from pipelines.train.validation import _val_labels
from tests.support.inline import InlinePool
from tests.support.models import write_model
from tests.support.pictures import jpeg, picture

CONFIG = load_config(sets=["data.image_size=32", "encode.batch_size=4"])
NUMBERS = (0, 1, 2, 10)


@pytest.fixture
def both(tmp_path: Path) -> tuple[str, str]:
    """A table and an adopted tar of other pictures, both of the classes 0, 1, 2 and 10."""
    (tmp_path / "t").mkdir()
    lines = ["path,label"]
    for place, number in enumerate(NUMBERS * 3):
        (tmp_path / "t" / f"{place}.jpg").write_bytes(jpeg(picture(number, place)))
        lines.append(f"{place}.jpg,{number}")
    (tmp_path / "t" / "t.csv").write_text("\n".join(lines))
    (tmp_path / "wds").mkdir()
    samples = (
        {"__key__": f"{place}", "jpg": jpeg(picture(number, 50 + place)), "cls": b"%d" % number}
        for place, number in enumerate(NUMBERS * 2)
    )
    write_tar(tmp_path / "wds" / "a.tar", samples)
    return str(ingest(str(tmp_path / "t" / "t.csv"), str(tmp_path / "table"), CONFIG).uri), str(
        adopt(str(tmp_path / "wds"), str(tmp_path / "wds")).uri
    )


def test_adopted_numbers_are_ids_and_those_of_a_table_places(both: tuple[str, str]) -> None:
    table, adopted = map(open_shards, both)
    assert table.classes == ("0", "1", "2", "10") and adopted.classes == tuple(map(str, range(11)))
    for shards in (table, adopted):
        names = {shards.classes[label] for shard in shards.shards for r in shard.records() for label in r.labels}
        assert names == {"0", "1", "2", "10"}


@pytest.mark.parametrize("queries", [0, 1])
def test_codes_of_both_are_compared_by_the_names_of_classes(
    queries: int, both: tuple[str, str], tmp_path: Path
) -> None:
    write_model(tmp_path / "model", both[0])
    codes = [
        encode(uri, str(tmp_path / "model"), str(tmp_path / f"c{n}"), CONFIG, pool=InlinePool()).uri
        for n, uri in enumerate(both)
    ]
    asked, searched = codes[queries], codes[1 - queries]
    result = evaluate(asked, [searched], str(tmp_path / "report"), CONFIG).as_json()
    sides = []
    for uri in (asked, searched):
        opened = open_codes(uri)
        rows = [row for table in opened.tables() for row in table.to_pylist()]
        packed = np.stack([np.frombuffer(row["code"], np.uint8) for row in rows])
        sides += [packed, np.array([int(opened.classes[row["labels"][0]]) for row in rows])]
    assert result["map"] == pytest.approx(mean_average_precision(*sides), abs=1e-6)


@pytest.mark.parametrize("train", [0, 1])
def test_a_training_validates_on_the_other_by_name(train: int, both: tuple[str, str]) -> None:
    trained, val = open_shards(both[train]), open_shards(both[1 - train])
    data = TrainData.make(trained, val, CONFIG)
    said = {val.classes[label] for s, row in data.val_rows for label in val.shards[s].records()[row].labels}
    learned = {trained.classes[place] for place in np.flatnonzero(_val_labels(data).any(0))}
    assert learned == said == {"0", "1", "2", "10"}


def test_a_number_that_the_other_side_lacks_is_still_refused(both: tuple[str, str], tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    samples = ({"__key__": f"{n}", "jpg": jpeg(picture(n, 90)), "cls": b"%d" % n} for n in (1, 7))
    write_tar(tmp_path / "other" / "b.tar", samples)
    other = open_shards(str(adopt(str(tmp_path / "other"), str(tmp_path / "other")).uri))
    with pytest.raises(
        InputError, match=r"has classes the training shards lack: 7: validate on shards of the same classes"
    ):
        TrainData.make(open_shards(both[0]), other, CONFIG)
