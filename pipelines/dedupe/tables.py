"""The duplicates artifact: its tables and names.

A sample's id is ordinal << 32 | row; `shards.parquet` has the ordinal of each tar. `pairs-<unit>-<n>.parquet` are, one
after another, the pairs in the order of (id_a, id_b), with id_a < id_b. `components-<n>.parquet` are the samples that
are in a pair, in the order of (component, id). The ends of parts depend on the samples and the pairs alone: a unit is
`UNIT_SAMPLES` samples as id_a, and a part `MAX_PART_ROWS` rows.

Among samples with equal codes, the first that is not in the index leads. Each of the others has one pair, with the
leader, at distance 0. Pairs at other distances join leaders only, and all such pairs are there. Two samples of the
index are never a pair, and of those with equal codes only the first takes part.

The components say what each sample has in common with its twin, another sample of the component that stays.
"""

from collections import Counter
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipelines.artifacts.manifest import Artifact, Part
from pipelines.artifacts.parquet import schema_of, schema_of_rows
from pipelines.artifacts.tables import read_table
from pipelines.errors import DamagedArtifact

SHARDS_NAME = "shards.parquet"
PAIRS_PREFIX, COMPONENTS_PREFIX = "pairs-", "components-"


@dataclass(frozen=True)
class Sizes:
    """Sizes of the pieces in which the work is done."""

    unit: int = 1 << 20
    """Samples of one unit of work, the stretch that gets one receipt."""
    part_rows: int = 1 << 18
    """Largest number of rows in a part."""
    queries: int = 1 << 16
    """Samples searched for at a time."""
    block: int | None = None
    """Codes with tables at the same time; by default as many as the memory allows."""
    sorted_at_once: int | None = None
    """Integers sorted in memory; by default as many as fit a quarter of the memory."""


SIZES = Sizes()


@dataclass(frozen=True)
class PlacedShard:
    """A row of `shards.parquet`: one tar that takes part."""

    ordinal: int
    shard: str
    shard_sha256: str
    digest: str
    indexed: bool
    rows: int


SHARDS_SCHEMA = schema_of_rows(PlacedShard)
"""The tars that take part, by ordinal; `digest` is that of the codes artifact or the index with their rows."""

_PLACE = schema_of(id=pa.int64(), key=pa.string(), shard=pa.dictionary(pa.int32(), pa.string()), row=pa.int32())

PAIRS_SCHEMA = pa.schema(
    [
        *(field.with_name(f"{field.name}{side}") for side in ("_a", "_b") for field in _PLACE),
        *schema_of(distance=pa.int32()),
    ]
)

COMPONENTS_SCHEMA = pa.schema(
    [
        *schema_of(component=pa.int64()),
        *_PLACE,
        *schema_of(size=pa.int32(), match=pa.string(), twin=pa.int64(), keep=pa.bool_()),
    ]
)
"""`component` is the smallest id in the component, `size` its number of samples.

`match` names a `Match`; `twin` is the id of the sample that it is with: the sample's own for none, the smallest of the
component for code and unread. `keep` is true where `match` is none and, unless `dedupe.same_code`, code or unread."""


class Match(IntEnum):
    """What a sample has in common with its twin; the column `match` has the name in small letters."""

    NONE = 0
    """It has no twin: it is the first of its component, or a sample of the index."""
    BYTES = 1
    """The bytes of their files are the same."""
    PICTURE = 2
    """Their pictures look alike."""
    CODE = 3
    """Their codes alone: no sample of the component that stays looks like it."""
    UNREAD = 4
    """Their codes alone, since its picture cannot be read."""


MATCH_NAMES = pa.array([match.name.lower() for match in Match], pa.string())
"""Texts of the column `match`, by value."""
UNCONFIRMED = (Match.CODE, Match.UNREAD)


def count_matches(matches: npt.NDArray[np.uint8], same_code: bool) -> Counter[str]:
    """Return the totals of the samples that have a twin, by what they have in common, and of those that can go."""
    of = np.bincount(matches, minlength=len(Match)).tolist()
    code = of[Match.CODE] + of[Match.UNREAD]
    sure = of[Match.BYTES] + of[Match.PICTURE]
    return Counter(
        droppable=sure + (code if same_code else 0),
        same_bytes=of[Match.BYTES],
        look_alike=of[Match.PICTURE],
        same_code_only=code,
        unread=of[Match.UNREAD],
    )


def unit_name(unit: int) -> str:
    """Return the name of a unit's receipt."""
    return f"{PAIRS_PREFIX}{unit:06d}"


def pairs_name(unit: int, number: int) -> str:
    """Return the name of one of a unit's parts."""
    return f"{unit_name(unit)}-{number:06d}.parquet"


def components_name(number: int) -> str:
    """Return the name of a part of the components."""
    return f"{COMPONENTS_PREFIX}{number:06d}.parquet"


def list_parts(artifact: Artifact, prefix: str) -> list[Part]:
    """List the parts whose names begin with `prefix`, in the order of their rows."""
    return sorted((part for part in artifact.manifest.parts if part.name.startswith(prefix)), key=lambda p: p.name)


def read_places(artifact: Artifact) -> list[PlacedShard]:
    """Read the tars that took part; raise DamagedArtifact if their ordinals do not ascend."""
    table = read_table(artifact.store, artifact.manifest.part(SHARDS_NAME), SHARDS_SCHEMA)
    places = [PlacedShard(**row) for row in table.to_pylist()]
    ordinals = [place.ordinal for place in places]
    if ordinals != sorted(set(ordinals)) or min(ordinals, default=0) < 0:
        raise DamagedArtifact(f"{artifact.uri}/{SHARDS_NAME} is not sorted by ordinal")
    return places
