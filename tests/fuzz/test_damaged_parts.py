"""S5: damaged parts of codes and indexes. With their digest they are refused unparsed; without it, whatever a parser
does to its process, the parent lives."""

import hashlib
import random
import resource
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow.parquet as pq
import pytest

from hhnet.search.multi_index import ScanCosts
from pipelines.artifacts.manifest import Artifact, open_artifact
from pipelines.artifacts.parquet import read_parquet, require_schema
from pipelines.artifacts.tables import codes_schema
from pipelines.config.settings import Config, IndexSettings
from pipelines.encode.codes import code_array, open_codes
from pipelines.errors import DamagedArtifact, HHNetError
from pipelines.index.build import build_index
from pipelines.index.faiss_io import limit_parsing
from pipelines.index.kinds import NOTHING_REMOVED, index_kind, kind_names, multihash
from pipelines.index.kinds.ivf import IvfKind
from pipelines.index.layout import QUANTIZER_NAME
from pipelines.index.reader import open_index
from pipelines.verify.verify import verify
from tests.fuzz.apart import do_apart
from tests.support.codes import random_codes, simple_rows, write_codes
from tests.support.inline import InlinePool
from tests.support.report import SEED, report, scaled

pytestmark = pytest.mark.timeout(scaled(300, 3600))

PARTS = scaled(500, 10_000)
ROWS, LISTS = 120, 6
CHILD_MEMORY = 6 << 30


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    """Codes of three tars and an index of each kind of them."""
    root = tmp_path_factory.mktemp("parts")
    names = {f"x-{number:06d}.tar": simple_rows(f"x/{number}", ROWS, seed=number) for number in range(3)}
    found = {"codes": write_codes(root / "codes", names)}
    for kind in kind_names():
        settings = Config(index=IndexSettings(kind=kind, nlist=LISTS, nprobe=LISTS, workers=1))
        found[kind] = open_artifact(
            build_index([found["codes"].uri], str(root / kind), settings, pool=InlinePool()).uri
        )
    return found


def damaged(data: bytes, draw: random.Random) -> bytes:
    """Other bytes: flipped, overwritten, cut, or longer."""
    changed = bytearray(data)
    while changed == data:
        action, place = (
            draw.randrange(5),
            draw.randrange(len(changed) if draw.random() < 0.5 else min(len(changed), 96)),
        )
        if action == 0:
            changed[place] ^= 1 << draw.randrange(8)
        elif action == 1:
            value = draw.choice([b"\xff" * 8, bytes(8), b"\0\0\0\x80", b"\xff\xff\xff\x7f", draw.randbytes(8)])
            changed[place : place + len(value)] = value
        elif action == 2:
            del changed[place + 1 :]
        elif action == 3:
            del changed[place : place + draw.randint(1, 64)]
        else:
            changed[place:place] = draw.randbytes(draw.randint(1, 64))
        changed = changed or bytearray(b"\0")
    return bytes(changed)


# ---------------------------------------------------------------------------------------------------- with digests


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """The sha256 of everything that Arrow, Faiss or a memory map is given to parse."""
    seen: set[str] = set()

    def note(owner: Any, name: str, content: Any) -> None:
        original = getattr(owner, name)

        def recorded(source: Any, *args: Any, **options: Any) -> Any:
            seen.add(hashlib.sha256(content(source)).hexdigest())
            return original(source, *args, **options)

        monkeypatch.setattr(owner, name, recorded)

    note(pq, "ParquetFile", lambda source: source.read_at(source.size(), 0))
    note(faiss, "read_index_binary", lambda source: Path(source).read_bytes() if isinstance(source, str) else b"")
    note(faiss, "deserialize_index_binary", lambda array: array.tobytes())
    note(np, "memmap", lambda path: Path(path).read_bytes())
    yield seen


def use(artifact: Artifact) -> None:
    """Read every part, as search and index do."""
    if artifact.manifest.kind == "codes":
        for table in open_codes(artifact).tables():
            code_array(table["code"])
        return
    with open_index(artifact.uri) as reader:
        reader.search(random_codes(2), 5)
        assert len(list(reader.all_keys())) == 3 * ROWS


def test_a_damaged_part_is_refused_before_anything_parses_it(artifacts: dict[str, Artifact], parsed: set[str]) -> None:
    for artifact in artifacts.values():
        use(artifact)
    for artifact in artifacts.values():
        whole = {part.sha256 for part in artifact.manifest.parts}
        assert whole <= parsed, "the recorder misses a way to parse"
    refused = Counter[str]()
    draw = random.Random(f"{SEED} parts")
    for number in range(PARTS):
        artifact = draw.choice(list(artifacts.values()))
        part = draw.choice(artifact.manifest.parts)
        path = Path(artifact.uri, part.path)
        original = path.read_bytes()
        data = damaged(original, draw)
        path.write_bytes(data)
        try:
            for reader in (use, lambda artifact: verify(artifact.uri).as_json()):
                with pytest.raises(DamagedArtifact):
                    reader(artifact)
        finally:
            path.write_bytes(original)
        assert hashlib.sha256(data).hexdigest() not in parsed, f"seed {SEED}, part {number}, {part.path}"
        refused[f"{artifact.manifest.kind} {part.name.split('-')[0].split('.')[0]}"] += 1
    report("S5 with digests", tried=PARTS, refused=refused, parsed=0)
    assert sum(refused.values()) == PARTS


# ------------------------------------------------------------------------------------------------- without digests


def parse_damaged(seed: int, sources: dict[str, bytes], shared: bytes, folder: Path, number: int) -> str:
    """Parse and use a damaged part as if its digest had been right. Runs in a child."""
    resource.setrlimit(resource.RLIMIT_AS, (CHILD_MEMORY, CHILD_MEMORY))
    draw = random.Random(f"{seed} bypassed {number}")
    name = draw.choice(sorted(sources))
    data = damaged(sources[name], draw)
    try:
        _parse(name, data, shared, folder)
    except HHNetError:
        return f"{name}:refused"
    except (MemoryError, RuntimeError, OSError, ValueError, ArithmeticError) as error:
        return f"{name}:{type(error).__name__}"
    return f"{name}:accepted"


def _parse(name: str, data: bytes, shared: bytes, folder: Path) -> None:
    path = folder / "part"
    path.write_bytes(data)
    queries = random_codes(2)
    multihash.KIND.costs = ScanCosts(compare=1e18, least=0)
    if name == "quantizer":
        IvfKind().build(random_codes(20), np.arange(20, dtype=np.int64), data, {})
    elif name in kind_names():
        parameters = index_kind(name).parameters(IndexSettings(nlist=LISTS, nprobe=LISTS), ROWS)
        searcher = index_kind(name).open(path, 8, ROWS, shared, parameters, NOTHING_REMOVED)
        searcher.search(queries, 5)
        searcher.range_search(queries, 3)
    else:
        table = read_parquet(data, name)
        require_schema(table, codes_schema(64, "", ()), name)
        code_array(table["code"]).sum()
        table.to_pylist()


def test_the_parent_outlives_whatever_a_parser_does_with_damaged_bytes(
    artifacts: dict[str, Artifact], tmp_path: Path
) -> None:
    def part_of(kind: str, start: str) -> bytes:
        artifact = artifacts[kind]
        return artifact.read(next(part for part in artifact.manifest.parts if part.name.startswith(start)))

    sources = {"codes": part_of("codes", "x-"), **{kind: part_of(kind, "part-") for kind in kind_names()}}
    shared = sources["quantizer"] = part_of("ivf", QUANTIZER_NAME)
    apart = do_apart(partial(parse_damaged, SEED, sources, shared, tmp_path), range(PARTS), tmp_path)
    counts = Counter(apart.outcomes)
    report("S5 without digests", tried=PARTS, outcomes=counts, parent_died=0, growth_mib=round(apart.growth_mib))
    assert len(apart.outcomes) == PARTS
    assert counts["hung"] == 0
    assert {name for name in sources if counts[f"{name}:refused"] + counts[f"{name}:RuntimeError"]} == sources.keys()


def test_faiss_is_told_how_long_a_vector_can_be() -> None:
    with limit_parsing("a part", 1000):
        assert faiss.get_deserialization_vector_byte_limit() == faiss.get_deserialization_loop_limit() == 1000
