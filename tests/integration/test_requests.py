"""Requests to a real S3 server: each verb makes those that docs/scale.md says, for any number of tars."""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError

from pipelines.artifacts.runs import RunLog
from pipelines.config.loading import load_config
from pipelines.encode.encode import encode
from pipelines.evaluate.evaluate import evaluate
from pipelines.index.build import build_index
from pipelines.index.diff import plan_changes
from pipelines.index.update import add_codes
from pipelines.ingest.ingest import ingest
from pipelines.search.search import search
from pipelines.storage import Store
from pipelines.storage.bucket import Bucket
from pipelines.verify import proofs
from pipelines.verify.verify import verify
from tests.support.inline import InlinePool
from tests.support.models import write_model
from tests.support.pictures import write_folder
from tests.support.seaweed import Seaweed, seaweed

SIZES = (3, 6, 12)
"""Tars of two pictures each."""
SETTINGS = (
    *("ingest.samples_per_shard=2", "data.image_size=32", "data.workers=1", "encode.batch_size=8"),
    *("evaluate.gallery=0", "index.kind=flat"),
)
COLUMNS = {"GET": "get_object", "HEAD": "head_object", "PUT": "put_object", "LIST": "list_objects_v2"}
PAGE = Path(__file__).parents[2] / "docs" / "scale.md"

Asked = dict[str, Counter[str]]


def run_all(server: Seaweed, folder: Path, tars: int, sent: Counter[str]) -> Asked:
    """Run the verbs one after another, from pictures to an answer; return the requests of each."""
    config, pool, asked = load_config(sets=SETTINGS), InlinePool(), Asked()
    small_parts = load_config(sets=[*SETTINGS, "index.part_codes=2"])

    def count(verb: str, work: Callable[[], object]) -> None:
        sent.clear()
        work()
        asked[verb] = Counter(sent)

    def at(name: str) -> str:
        return server.uri(f"{tars}/{name}")

    for number, (name, per_class) in enumerate((("photos", tars), ("tonight", tars), ("queries", 2))):
        write_folder(folder / name, classes=2, per_class=per_class, seed=number, first=100 * number)
        ingest(str(folder / name), at(name), load_config(sets=[*SETTINGS, f"ingest.name={name}"]))
    photos, tonight, queries = at("photos"), at("tonight"), at("queries")
    model, codes, more, index, parts = at("model"), at("codes"), at("more"), at("index"), at("parts")
    write_model(model, photos, backbone="test_resnet")
    encode(tonight, model, more, config, pool=pool)
    encode(queries, model, at("asking"), config, pool=pool)

    count("encode", lambda: encode(photos, model, codes, config, pool=pool))
    count("encode, finished", lambda: encode(photos, model, codes, config, pool=pool))
    Store(codes).delete("manifest.json")
    count("encode, resumed with all receipts there", lambda: encode(photos, model, codes, config, pool=pool))
    count("index build, one part", lambda: build_index([codes], index, config, pool=pool))
    count("index build, n parts", lambda: build_index([codes], parts, small_parts, pool=pool))
    count("index add of n tars, one part", lambda: add_codes(index, [more], config, pool=pool))
    count("index add of n tars to n, a part for each", lambda: add_codes(parts, [more], small_parts, pool=pool))
    count("plan", lambda: plan_changes([photos, tonight], [codes, more], index))
    for what, uri in (("shards", photos), ("codes", codes), ("an index of two versions, 2n parts", parts)):
        for time in ("first", "again"):
            count(f"verify of {what}, {time}", lambda uri=uri: verify(uri, config, pool=None))  # type: ignore[misc]
    count("search by key, one part", lambda: search(index, config, keys=["class_00/0000"], k=3))
    count("search by key, 2n parts", lambda: search(parts, config, keys=["class_00/0000"], k=3))
    count("evaluate against n tars", lambda: evaluate(at("asking"), [codes], at("report"), config))
    return asked


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, Asked]]:
    """The answered requests of each verb, by the number of tars."""
    folder, sent, send = tmp_path_factory.mktemp("requests"), Counter[str](), Bucket.request

    async def request(self: Bucket, method: str, **fields: Any) -> Any:
        try:
            answer = await send(self, method, **fields)
        except ClientError as error:  # a busy server's refusals are tried again, and do not count
            sent[method] += error.response["ResponseMetadata"]["HTTPStatusCode"] < 500
            raise
        sent[method] += 1
        return answer

    with seaweed(folder / "weed") as server, server.environment(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Bucket, "request", request)
        patch.setattr(RunLog, "progress_every_s", 1e6)  # else a slow run puts its progress
        patch.setattr(proofs, "SETTLED_S", -60.0)  # else what was just put is read again
        yield {tars: run_all(server, folder / str(tars), tars, sent) for tars in SIZES}


def told() -> dict[str, list[str]]:
    """The first table of the page: the formulas of each verb, in the order of the columns."""
    table = PAGE.read_text().partition("\n\n|")[2].partition("\n\n")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert rows[0] == ["verb", *COLUMNS]
    return {verb: formulas for verb, *formulas in rows[2:]}


def value(formula: str, tars: int) -> int:
    """`3n + 5` for so many tars; nothing but a multiple and a constant can be said."""
    match = re.fullmatch(r"(?:(?P<times>\d*)n)?(?: \+ )?(?P<more>\d+)?", formula)
    assert match and formula, formula
    times = 0 if match["times"] is None else int(match["times"] or 1)
    return times * tars + int(match["more"] or 0)


def test_each_verb_makes_the_requests_that_the_page_says(asked: dict[int, Asked]) -> None:
    expected = {
        tars: {
            verb: {name: value(formula, tars) for name, formula in zip(COLUMNS, formulas, strict=True)}
            for verb, formulas in told().items()
        }
        for tars in SIZES
    }
    found = {
        tars: {verb: {name: sent[method] for name, method in COLUMNS.items()} for verb, sent in verbs.items()}
        for tars, verbs in asked.items()
    }
    assert found == expected
    assert {method for verbs in asked.values() for sent in verbs.values() for method in sent} <= {*COLUMNS.values()}
