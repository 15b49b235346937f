"""Facts of each kind: the fields of `meta` in a manifest, of the receipts of its parts, and of a model's card.

Facts without a default are always written; the others are left out where they have their default. Results of verbs show
the facts in the order of the fields here.
"""

from typing import Annotated, Self

from pydantic import AfterValidator, ConfigDict, Field, JsonValue, field_validator

from pipelines.artifacts.manifest import Artifact, Facts, Part
from pipelines.artifacts.tables import REAL_CODES
from pipelines.config.fingerprint import config_of
from pipelines.config.settings import Config
from pipelines.errors import ConfigError

DIGEST_CHARS_SHOWN = 12


def _known_settings(settings: dict[str, JsonValue]) -> dict[str, JsonValue]:
    try:
        config_of(settings)
    except ConfigError as error:
        raise ValueError(str(error)) from None
    return settings


UsedSettings = Annotated[dict[str, JsonValue], AfterValidator(_known_settings)]
"""Settings that a result was made with, by dotted name."""

# --------------------------------------------------------------------------------------------------------- splits


class SplitPart(Facts):
    """A part of a protocol's split, as codes and models name it: `train`, `query`, `val` or `database`."""

    name: str
    """Name of the protocol."""
    digest: str
    """Digest over every image of every part, so it tells two splits of one name apart."""
    part: str
    database: tuple[str, ...]
    """Parts that the protocol searches."""

    def __str__(self) -> str:
        return f"{self.name} ({self.digest[:DIGEST_CHARS_SHOWN]})"


class PartProof(Facts):
    """Samples of one part of a split, and the sha256 of their sorted keys and of their images."""

    samples: int
    keys: str
    images: str


class ProtocolCard(Facts):
    """The whole split of a protocol, as each of its shards artifacts describes it."""

    name: str
    version: int
    digest: str
    database: tuple[str, ...]
    leaks: dict[str, int]
    """Number of images that are in two parts, by their bytes: `query in train` -> count."""
    parts: dict[str, PartProof]
    files: dict[str, str] = Field(default_factory=dict)
    """The sha256 of the files that define labels or parts."""


class SplitSpec(Facts):
    """The rule that assigned the samples to parts, and the part that these shards hold."""

    by: str
    spec: str
    part: str


# ------------------------------------------------------------------------------------------------------ manifests


class ShardsMeta(Facts):
    """Facts of shards."""

    classes: tuple[str, ...]
    source: str
    """Digest of the ingested source."""
    split: SplitSpec | None
    protocol: ProtocolCard | None = None
    columns: dict[str, str] = Field(default_factory=dict)
    """Arrow types of the metadata columns that came from a table."""
    adopted: bool = False
    """Whether the tars were written by others and stay at their place."""
    version: int = 1
    grown_from: str | None = None
    """Digest of the first version, if the shards have grown since."""

    @property
    def split_part(self) -> SplitPart | None:
        """Part of a protocol's split that the samples are, as models and codes keep it; None outside protocols."""
        card = self.protocol
        if card is None or self.split is None:
            return None
        return SplitPart(name=card.name, digest=card.digest, part=self.split.part, database=card.database)


class Metrics(Facts):
    """Validation figures of the epoch whose weights the model has, and figures of its training."""

    epoch: int
    map: float
    skipped: int
    """Number of training images left out because they did not decode."""
    steps: int


class Rotation(Facts):
    """Figures of a hash layer that replaced the trained one."""

    bits: int
    error: float | None = None
    """Mean squared difference between outputs and their signs."""
    error_before: float | None = None
    images: int
    map: float
    map_before: float
    rotated: str


class ModelMeta(Facts):
    """Facts of a model."""

    bits: int
    classes: tuple[str, ...]
    metrics: Metrics
    protocol: SplitPart | None = None
    """Split part of the training images."""
    rotation: Rotation | None = None


class EpochFigures(Facts):
    """Figures of one epoch of a training."""

    epoch: int
    step: int
    """Number of steps done at its end."""
    loss: float
    """Mean loss of its steps."""
    map: float | None = None
    """Validation mAP; None if the epoch was not validated."""


class ModelCard(Facts):
    """The contents of model.json: the network, as `hhnet.nn.model.card` describes it, and its training.

    What values a network can have is checked where it is built, in `hhnet.nn.model.model_from_bytes`.
    """

    format: int
    backbone: str
    bits: int
    head: str
    stem_stride: int
    branches: tuple[int, ...] | None = None
    class_count: int = 0
    preprocess: dict[str, JsonValue]
    """Fields of `hhnet.preprocess.Preprocess`."""
    classes: tuple[str, ...]
    precision: str
    loss: str
    metrics: Metrics
    history: tuple[EpochFigures, ...]
    settings: UsedSettings
    """The settings that change a model."""

    @classmethod
    def of(cls, model: Artifact) -> Self:
        """Read the card of a model artifact; raises DamagedArtifact where it cannot be used."""
        data = model.read(model.manifest.part("model.json"))
        return cls.parse(data, f"{model.uri}: model.json", "train the model again to another --out")

    @property
    def config(self) -> Config:
        """Settings of the training; those that do not change a model have their defaults."""
        return config_of(self.settings)


class BestEpoch(Facts):
    """The epoch of the best validation so far."""

    map: float
    epoch: int
    checkpoint: str
    """Name of the checkpoint with its weights."""


class Progress(Facts):
    """The contents of a checkpoint's progress.json. A training changes it as it goes on."""

    model_config = ConfigDict(frozen=False)

    best: BestEpoch | None
    """None before the first validation."""
    history: list[EpochFigures]
    """Figures of the epochs that have ended."""
    skipped: int
    """Number of images left out so far because they did not decode."""
    legs: list[list[int]]
    """Number of workers, and of their steps, for each leg of the present epoch."""
    loss_sum: float
    """Sum of the losses of the present epoch's steps so far."""

    @classmethod
    def new(cls) -> Self:
        """Return the progress of a training that begins."""
        return cls(best=None, history=[], skipped=0, legs=[], loss_sum=0.0)


class CheckpointMeta(Facts):
    """Facts of a checkpoint."""

    step: int


class _CodedMeta(Facts):
    """Facts that codes share with the index built from them."""

    bits: int
    classes: tuple[str, ...]
    real_codes: str | None = None
    """Form of the real codes beside the codes; None if there are none."""

    @property
    def has_real_codes(self) -> bool:
        """True if there are real codes beside the codes."""
        return self.real_codes is not None

    @field_validator("real_codes")
    @classmethod
    def _known(cls, form: str | None) -> str | None:
        if form not in (None, REAL_CODES):
            raise ValueError(f"the form {form!r} is not known to this hhnet")
        return form


class CodesMeta(_CodedMeta):
    """Facts of codes."""

    carried: dict[str, str]
    """Arrow types of the metadata columns."""
    settings: UsedSettings
    """The settings that change codes."""
    animated: int = 0
    """Number of pictures with several frames."""
    protocol: SplitPart | None = None
    trained_on: SplitPart | None = None
    """Split part of the model's training images."""

    @property
    def config(self) -> Config:
        """Settings of the encoding; those that do not change codes have their defaults."""
        return config_of(self.settings)


class IndexCard(Facts):
    """Size of an index, and the gate's measurements on it."""

    bytes_per_code: float
    count: int
    """Number of codes that can be found."""
    note: str | None = None
    radius: int | None = None
    recall: float | None = None
    recall_at: int | None = None
    recall_within: float | None = None
    self_recall: float | None = None
    trained_on: int | None = None
    """Number of codes that the quantizer was trained on, if the index has changed since."""


class IndexMeta(_CodedMeta):
    """Facts of an index."""

    kind: str
    parameters: dict[str, int]
    part_codes: int = Field(ge=1)
    """Number of codes to which its parts are filled."""
    quantizer_sha256: str | None
    card: IndexCard
    version: int = 1


class AliasMeta(Facts):
    """Facts of one version of an alias, which names an index."""

    version: int = Field(ge=1)
    index: str = Field(min_length=1)
    """Place of the index: relative to the alias if both share a folder or a bucket, else the whole URI."""
    fingerprint: str
    bits: int
    model: str


class RerankedMeta(Facts):
    """Figures of a search that orders the nearest codes by their real codes."""

    first: int
    map: float


class ReportMeta(Facts):
    """Facts of a report on retrieval."""

    map: float
    convention: str
    chance: float
    precision_at: dict[str, float]
    bits: int
    reranked: RerankedMeta | None = None
    protocol: str | None = None
    split: str | None = None
    """Digest of the protocol's split."""


class AgreementMeta(Facts):
    """Facts of a report on the agreement of two codes of the same images."""

    overlap: float
    chance: float
    k: int
    correlation: float | None
    bits_old: int
    bits_new: int


class DuplicatesMeta(Facts):
    """Facts of duplicates."""

    radius: int
    bits: int
    same_code: bool = False
    """Whether samples that share only the code are droppable too."""


class StudyMeta(Facts):
    """Facts of a study."""

    title: str
    axes: tuple[str, ...]


# ------------------------------------------------------------------------------------------------------- receipts


class Receipt(Facts):
    """The receipt of a shard's codes. Each row of the shard is in one of its parts or among its rejects."""

    shard: str
    shard_sha256: str
    samples: int
    part: Part
    more: tuple[Part, ...] = ()
    """Parts with codes that a retry recovered."""
    rejects: Part | None
    animated: int = 0
    """Number of pictures with several frames."""

    @property
    def codes(self) -> tuple[Part, ...]:
        """Parts that hold codes, in the order of their paths."""
        return (self.part, *self.more)

    @property
    def parts(self) -> list[Part]:
        """All parts: those with codes and, if there are any, the rejects."""
        return [*self.codes, *([self.rejects] if self.rejects else [])]


class UnreadFile(Facts):
    """A file of a source that could not be read: its path, and a reason of `SkipReason`."""

    path: str
    reason: str
    detail: str = ""


class TarReceipt(Facts):
    """The receipt of a tar that an ingest wrote. It is deleted once the manifest is put, which lists all tars."""

    part: Part | None
    """The tar; None if no sample of it could be read."""
    rows: Part | None
    """The tar's rows of the shard index."""
    stamps: str
    """Digest of the stamps of its samples, "" if one has none."""
    unread: tuple[UnreadFile, ...] = ()

    @property
    def parts(self) -> list[Part]:
        """The tar and its rows."""
        return [part for part in (self.part, self.rows) if part]


class QuantizerReceipt(Facts):
    """The receipt of the quantizer that all parts of an index share."""

    part: Part

    @property
    def parts(self) -> tuple[Part, ...]:
        """The part."""
        return (self.part,)


class PartReceipt(Facts):
    """The receipt of a part of an index and of its key table."""

    number: int
    rows: int
    quantizer_sha256: str | None
    """The sha256 of the quantizer that the part was built with; None for a kind without one."""
    part: Part
    keys: Part

    @property
    def parts(self) -> tuple[Part, ...]:
        """The part and its key table."""
        return (self.part, self.keys)


class PairsReceipt(Facts):
    """The receipt of one unit of a search for duplicates."""

    unit: int
    pairs: int
    parts: tuple[Part, ...]
