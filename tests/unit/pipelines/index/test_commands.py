"""Every command that `hhnet plan` prints is run, in its order, through the command line: none is refused."""

import shlex
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest

from pipelines.cli.main import build_app
from pipelines.config.loading import load_config
from pipelines.encode.codes import open_codes
from pipelines.encode.encode import encode
from pipelines.errors import FingerprintMismatch, InputError
from pipelines.index.build import build_index
from pipelines.index.diff import PlanResult, plan_changes
from pipelines.index.reader import open_index
from pipelines.index.update import add_codes, compact_index, remove_rows
from pipelines.ingest.adopt import adopt
from pipelines.shards.shards import write_tar
from pipelines.verify.verify import verify
from tests.support import pictures
from tests.support.codes import Rows, random_codes, simple_rows, write_codes
from tests.support.indexes import FLAT, IVF
from tests.support.inline import InlinePool
from tests.support.models import write_model

Named = tuple[list[str], list[str]]
"""The shards and the codes that a scenario names to `plan`."""


def write_night(folder: Path, night: int, labels: Sequence[str] = ("cat", "dog")) -> None:
    """A tar of four samples of these classes; no labels = unlabelled. The same night has the same bytes anywhere."""
    folder.mkdir(exist_ok=True)
    samples = [pictures.jpeg(pictures.picture(number % 3, 10 * night + number)) for number in range(4)]
    named = [{"cls": labels[n % len(labels)].encode()} if labels else {} for n in range(4)]
    write_tar(
        folder / f"night-{night}.tar",
        ({"__key__": f"{night}-{n}", "jpg": samples[n], **named[n]} for n in range(4)),
    )


def shards_of(root: Path, name: str, *nights: int, labels: Sequence[str] = ("cat", "dog")) -> str:
    """Shards of these nights; named again, the shards grow."""
    for night in nights:
        write_night(root / name, night, labels)
    return adopt(str(root / name), str(root / name)).uri


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("model")
    return write_model(root / "model", shards_of(root, "learnt", 9)).uri


Encode = Callable[..., str]


@pytest.fixture
def encoded(tmp_path: Path, model: str) -> Encode:
    """Encodes shards to a folder of this name and returns its URI."""

    def make(shards: str, name: str, *sets: str) -> str:
        return encode(shards, model, str(tmp_path / name), load_config(sets=sets), pool=InlinePool()).uri

    return make


@pytest.fixture
def run(tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[PlanResult], dict[str, str]]:
    """Runs the commands of a plan as a user types them, here instead of on Ray; returns what stood for the capitals."""
    for name, verb in (
        ("pipelines.encode.encode.encode", encode),
        ("pipelines.index.build.build_index", build_index),
        ("pipelines.index.update.add_codes", add_codes),
    ):
        monkeypatch.setattr(name, partial(verb, pool=InlinePool()))

    def type_all(found: PlanResult) -> dict[str, str]:
        given = {"MODEL": model}
        for command in found.commands:
            name, *words = shlex.split(command)
            assert name == "hhnet"
            for word in words:
                if word.isupper() and not Path(word).is_absolute():
                    given.setdefault(word, str(tmp_path / f"given-{word}"))
            build_app()([given.get(word, word) for word in words], standalone_mode=False)
        return given

    return type_all


Scenario = Callable[[Path, Encode], Named]
SCENARIOS: dict[str, Scenario] = {}


def scenario(make: Scenario) -> Scenario:
    SCENARIOS[make.__name__] = make
    return make


def index_of(root: Path, codes: list[str], **options: object) -> None:
    build_index(codes, str(root / "index"), FLAT, pool=InlinePool(), **options)


@scenario
def nothing_is_there(root: Path, encoded: Encode) -> Named:
    return [shards_of(root, "a", 0, 1)], [str(root / "codes")]


@scenario
def two_shards_of_other_classes_and_of_none(root: Path, encoded: Encode) -> Named:
    first = shards_of(root, "a", 0)
    codes = encoded(first, "codes-a")
    index_of(root, [codes])
    more = shards_of(root, "b", 1, labels=("ant", "cat", "yak")), shards_of(root, "c", 2, labels=())
    return [first, *more], [codes]


@scenario
def an_index_of_real_codes(root: Path, encoded: Encode) -> Named:
    first = shards_of(root, "a", 0)
    codes = encoded(first, "codes-a", "encode.real_codes=true")
    index_of(root, [codes])
    return [first, shards_of(root, "b", 1)], [codes, str(root / "codes-b")]


@scenario
def shards_that_grew_since_an_encode_with_settings_of_its_own(root: Path, encoded: Encode) -> Named:
    codes = encoded(shards_of(root, "a", 0), "codes", "encode.batch_size=4", "encode.real_codes=true")
    index_of(root, [codes])
    return [shards_of(root, "a", 1, labels=("ant", "cat"))], [codes]


@scenario
def codes_of_some_tars_of_other_shards(root: Path, encoded: Encode) -> Named:
    return [shards_of(root, "b", 1, 2)], [encoded(shards_of(root, "a", 1), "codes-a")]


@scenario
def tars_that_the_index_has_from_other_shards(root: Path, encoded: Encode) -> Named:
    index_of(root, [encoded(shards_of(root, "a", 1), "codes-a")])
    return [shards_of(root, "b", 1, 2)], []


@scenario
def a_killed_encode_with_a_setting(root: Path, encoded: Encode) -> Named:
    shards = shards_of(root, "a", 0, 1)
    codes = encoded(shards, "codes", "encode.real_codes=true")
    Path(codes, "manifest.json").unlink()
    return [shards], [codes]


@scenario
def a_place_where_other_codes_were_begun(root: Path, encoded: Encode) -> Named:
    first, other = shards_of(root, "a", 0), shards_of(root, "b", 1)
    index_of(root, [codes := encoded(first, "codes-a")])
    Path(begun := encoded(first, "codes-b", "encode.batch_size=3"), "manifest.json").unlink()
    return [first, other], [codes, begun]


@scenario
def a_place_where_another_index_was_begun(root: Path, encoded: Encode) -> Named:
    index_of(root, [encoded(shards_of(root, "a", 0), "codes-a")], publish=False)
    return [shards := shards_of(root, "b", 1)], [encoded(shards, "codes-b")]


@scenario
def an_index_that_waits_for_its_publication(root: Path, encoded: Encode) -> Named:
    codes = encoded(shards := shards_of(root, "a", 0, 1), "codes-a")
    build_index([codes], str(root / "index"), IVF, publish=False, pool=InlinePool())
    return [shards], [codes]


@scenario
def shards_in_place_of_all_that_the_index_holds(root: Path, encoded: Encode) -> Named:
    index_of(root, [codes := encoded(shards_of(root, "a", 0, 1), "codes-a")])
    return [shards_of(root, "b", 2)], [codes]


@scenario
def as_many_codes_as_before_but_others(root: Path, encoded: Encode) -> Named:
    shards = shards_of(root, "a", 0, 1)
    codes = encoded(shards, "codes-a")
    index_of(root, [codes])
    opened, contents = open_codes(codes), {}
    for shard in opened.shards:
        table = opened.read(shard).to_pydict()
        changed = random_codes(4, 16, seed=5)
        contents[shard.name] = Rows(table["key"], changed, table["labels"], shard.sha256, table["row"])
    contents["night-7.tar"] = simple_rows("new", 5, 16)
    other = write_codes(root / "other", contents, 16, (*opened.classes, "owl"), model=opened.model)
    return [], [other.uri]


def newest(codes: Sequence[str]) -> list[str]:
    """Those of the codes that are there, the last ones where several are codes of one tar."""
    kept, tars = [], set[str]()
    for uri in reversed([uri for uri in codes if Path(uri, "manifest.json").exists()]):
        own = {shard.sha256 for shard in open_codes(uri).shards}
        if not own & tars:
            kept.append(uri)
            tars |= own
    return kept


@pytest.mark.parametrize("make", SCENARIOS.values(), ids=SCENARIOS)
def test_every_command_is_accepted_and_leaves_nothing_to_do(
    make: Scenario, tmp_path: Path, encoded: Encode, run: Callable[[PlanResult], dict[str, str]]
) -> None:
    shards, codes = make(tmp_path, encoded)
    index = str(tmp_path / "index")
    found = plan_changes(shards, codes, index)
    assert found.status == "pending"
    assert found.commands
    given = run(found)
    made = [*codes, *(place for word, place in given.items() if word.startswith("CODES"))]
    index = given.get("INDEX", index)
    again = plan_changes(shards, newest(made), index)
    assert (again.status, again.commands) == ("unchanged", [])
    assert verify(index).status == "done"


# ------------------------------------------------------------------------------------------------ without a command


def test_an_index_that_would_be_empty_is_a_note_and_no_command(tmp_path: Path) -> None:
    held = write_codes(tmp_path / "held", {"a-000000.tar": simple_rows("a", 6)}).uri
    empty = write_codes(tmp_path / "empty", {"b-000000.tar": Rows([], random_codes(0), [])}).uri
    index_of(tmp_path, [held])
    found = plan_changes([], [empty], str(tmp_path / "index"))
    assert (found.status, found.remove, found.commands) == ("pending", 1, [])
    assert (
        found.note == f"no code would be left in {tmp_path}/index: name what it shall hold, or delete the whole index"
    )
    assert f"note             {found.note}" in found.as_text()
    with pytest.raises(InputError, match="no code would be left"):
        remove_rows(str(tmp_path / "index"), FLAT, shards=["a-000000.tar"])


def test_codes_without_one_row_are_no_index_to_build(tmp_path: Path) -> None:
    empty = write_codes(tmp_path / "empty", {"b-000000.tar": Rows([], random_codes(0), [])}).uri
    found = plan_changes([], [empty], str(tmp_path / "index"))
    assert (found.status, found.commands, found.note) == ("unchanged", [], None)


def test_codes_that_are_not_there_and_no_shards_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="/nowhere holds no committed codes"):
        plan_changes([], [str(tmp_path / "nowhere")])


def test_what_an_index_would_refuse_is_refused_by_the_plan(tmp_path: Path, encoded: Encode) -> None:
    shards = [shards_of(tmp_path, "a", 0), shards_of(tmp_path, "b", 1)]
    codes = [encoded(shards[0], "codes-a"), encoded(shards[1], "codes-b", "encode.real_codes=true")]
    assert plan_changes(shards, codes).commands == []
    with pytest.raises(FingerprintMismatch, match=r"codes-a has encode.real_codes False, .*codes-b has .* True"):
        plan_changes(shards, codes, str(tmp_path / "index"))
    index_of(tmp_path, codes[:1])
    with pytest.raises(FingerprintMismatch, match=r"index has encode.real_codes False, .*codes-b has .* True"):
        plan_changes(shards, codes, str(tmp_path / "index"))


def test_new_codes_that_would_bring_back_removed_samples_are_refused(tmp_path: Path) -> None:
    rows = {"a-000000.tar": simple_rows("a", 6), "b-000000.tar": simple_rows("b", 6)}
    for number, one in enumerate(rows.values()):
        one.sha256 = f"{number}" * 64
    first = write_codes(tmp_path / "first", rows).uri
    index_of(tmp_path, [first])
    index = str(tmp_path / "index")
    remove_rows(index, FLAT, ["a/00002"])
    compact_index(index, FLAT, pool=InlinePool())
    rows["a-000000.tar"].codes[0] ^= 1
    second = write_codes(tmp_path / "second", rows).uri
    Path(first).rename(tmp_path / "gone")
    with pytest.raises(InputError, match=r"cannot keep 1 earlier removals of a-000000\.tar"):
        plan_changes([], [second], index)
    with open_index(index) as reader:
        assert reader.count == 11
