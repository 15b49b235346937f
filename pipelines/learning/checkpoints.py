"""Training checkpoints: artifacts of our own under `checkpoints/` of a model root, verified before they are used.

Each save makes a new folder, so a save that was cut off can never spoil a good one; the newest that verifies is
the one to resume from. Tensors are safetensors, everything else is JSON.
"""

import json
import uuid
from dataclasses import dataclass
from typing import Any

import safetensors.torch
from torch import Tensor

from pipelines.artifacts import Artifact, ArtifactWriter, open_artifact
from pipelines.errors import DamagedArtifact, InputError
from pipelines.storage import Store, canonical_json

KEEP_LAST = 2


@dataclass(frozen=True)
class Checkpoint:
    """One verified moment of a training."""

    name: str
    step: int
    progress: dict[str, Any]
    artifact: Artifact

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names begin with `prefix`, without it."""
        data = self.artifact.read(self.artifact.manifest.part("state.safetensors"))
        state = safetensors.torch.load(data)
        return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


class Checkpoints:
    """The checkpoints of one model root that belong to one fingerprint."""

    def __init__(self, store: Store, fingerprint: str) -> None:
        self.store, self.fingerprint = store, fingerprint

    def new_name(self, step: int) -> str:
        """A folder name that sorts by step and that no other attempt has."""
        return f"{step:09d}-{uuid.uuid4().hex[:8]}"

    def save(self, name: str, step: int, tensors: dict[str, Tensor], progress: dict[str, Any]) -> None:
        """Commit a checkpoint and read it back, then drop those that are neither among the last ones nor the best."""
        writer = ArtifactWriter(self.store.child(f"checkpoints/{name}"), "checkpoint", self.fingerprint, (), {})
        parts = [
            writer.put_part("state.safetensors", safetensors.torch.save(tensors), rows=len(tensors)),
            writer.put_part("progress.json", canonical_json(progress), rows=1),
        ]
        writer.commit(parts, {"tensors": len(tensors)}, {"step": step}, point="checkpoint.put")
        self.named(name)
        best = progress["best"]["checkpoint"] if progress["best"] else None
        for old in self._names()[:-KEEP_LAST]:
            if old != best:
                self.store.discard(f"checkpoints/{old}")

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint all of whose bytes verify, or None."""
        for name in reversed(self._names()):
            try:
                return self.named(name)
            except (DamagedArtifact, InputError):
                continue
        return None

    def named(self, name: str) -> Checkpoint:
        """The checkpoint of this name, its bytes verified. DamagedArtifact or InputError otherwise."""
        artifact = open_artifact(self.store.child(f"checkpoints/{name}"), "checkpoint")
        if artifact.manifest.fingerprint != self.fingerprint:
            raise DamagedArtifact(f"{artifact.uri} belongs to another training")
        artifact.read(artifact.manifest.part("state.safetensors"))
        progress = json.loads(artifact.read(artifact.manifest.part("progress.json")))
        return Checkpoint(name, int(artifact.manifest.meta["step"]), progress, artifact)

    def _names(self) -> list[str]:
        """Folders with a manifest, oldest first."""
        suffix = "/manifest.json"
        return [
            name.removeprefix("checkpoints/").removesuffix(suffix)
            for name in self.store.names("checkpoints")
            if name.endswith(suffix)
        ]
