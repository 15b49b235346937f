"""What a worker that makes a model has to know."""

from dataclasses import dataclass
from typing import Any

from pipelines.artifacts.commit import ArtifactWriter, require_identity
from pipelines.artifacts.manifest import ArtifactInput
from pipelines.config.fingerprint import result_settings
from pipelines.config.settings import Config
from pipelines.shards.shards import ShardSet, open_shards
from pipelines.storage import Store


@dataclass(frozen=True)
class TrainJob:
    """The input of every worker: plain values that can be sent to other processes.

    Each of `inputs` has the name of the field that says where it lies.
    """

    shards: str
    val: str | None
    out: str
    fingerprint: str
    inputs: tuple[ArtifactInput, ...]
    config: Config

    @property
    def digests(self) -> dict[str, str]:
        """Return the digests of the input shards by role (`shards`, `val`); each selects one version."""
        return {entry.role: entry.digest for entry in self.inputs}

    def open_sets(self) -> tuple[ShardSet, ShardSet | None]:
        """Open the shards to learn from and those to validate on, in the versions of the job's start."""
        val = open_shards(self.val, self.digests["val"]) if self.val else None
        return open_shards(self.shards, self.digests["shards"]), val

    @property
    def settings(self) -> dict[str, Any]:
        """Settings that change the model, by dotted name."""
        return result_settings(self.config, "model")

    @property
    def origin(self) -> dict[str, str]:
        """Place of each input by role."""
        return {entry.role: str(getattr(self, entry.role)) for entry in self.inputs}

    def require_root(self) -> None:
        """Raise FingerprintMismatch where another run began the model's root."""
        require_identity(Store(self.out), "model", self.fingerprint, self.settings, self.inputs, self.origin)

    def writer(self) -> ArtifactWriter:
        """Return the writer at the model's root; it remembers where each input lay."""
        return ArtifactWriter(Store(self.out), "model", self.fingerprint, self.inputs, self.origin, self.settings)
