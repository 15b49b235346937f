"""Training checkpoints: artifacts of our own under `checkpoints/` of a model root, verified before they are used.

Each save makes a new folder, so a save that was cut off can never spoil a good one; the newest that verifies is
the one to resume from. Tensors are safetensors, everything else is JSON.

Two runs of one training may save beside each other. A run drops only what it saved itself and what lay there when it
began, and of the latter never the best one of a checkpoint that it found: that run may still be alive.
"""

import json
import uuid
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import safetensors.torch
from torch import Tensor

from pipelines.artifacts.commit import ArtifactWriter
from pipelines.artifacts.facts import CheckpointMeta
from pipelines.artifacts.manifest import Artifact, open_artifact
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

    @property
    def best(self) -> str:
        """The name of the checkpoint that was best so far; its own where none was validated yet."""
        return str(self.progress["best"]["checkpoint"]) if self.progress["best"] else self.name


class Checkpoints:
    """The checkpoints of one model root that belong to one fingerprint."""

    def __init__(self, store: Store, fingerprint: str) -> None:
        self.store, self.fingerprint = store, fingerprint
        self._droppable: list[str] = []  # oldest first; the last ones are kept

    def new_name(self, step: int) -> str:
        """A folder name that sorts by step and that no other attempt has."""
        return f"{step:09d}-{uuid.uuid4().hex[:8]}"

    def save(self, name: str, step: int, tensors: dict[str, Tensor], progress: dict[str, Any]) -> None:
        """Commit a checkpoint and read it back, then drop those before it that are neither its best nor the last."""
        writer = ArtifactWriter(self.store.child(f"checkpoints/{name}"), "checkpoint", self.fingerprint, (), {})
        parts = [
            writer.put_part("state.safetensors", safetensors.torch.save(tensors), rows=len(tensors)),
            writer.put_part("progress.json", canonical_json(progress), rows=1),
        ]
        writer.commit(parts, {"tensors": len(tensors)}, CheckpointMeta(step=step), point="checkpoint.put")
        best = self.named(name).best
        self._droppable.append(name)
        for old in self._droppable[:-KEEP_LAST]:
            if old != best:
                self.store.discard(f"checkpoints/{old}")
                self._droppable.remove(old)

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint all of whose bytes verify, and those of its best one, or None."""
        names = self._names()
        needed = {best for name in names if (best := self._best_of(name)) != name}
        self._droppable = [name for name in names if name not in needed]
        for name in reversed(names):
            with suppress(DamagedArtifact, InputError):
                found = self.named(name)
                if found.best != name:
                    self.named(found.best)
                return found
        return None

    def named(self, name: str) -> Checkpoint:
        """The checkpoint of this name, its bytes verified. DamagedArtifact or InputError otherwise."""
        found = self._described(name)
        found.artifact.read(found.artifact.manifest.part("state.safetensors"))
        return found

    def _described(self, name: str) -> Checkpoint:
        """A checkpoint without a look at its tensors."""
        artifact = open_artifact(self.store.child(f"checkpoints/{name}"), "checkpoint")
        if artifact.manifest.fingerprint != self.fingerprint:
            raise DamagedArtifact(f"{artifact.uri} belongs to another training")
        progress = json.loads(artifact.read(artifact.manifest.part("progress.json")))
        return Checkpoint(name, artifact.facts(CheckpointMeta).step, progress, artifact)

    def _best_of(self, name: str) -> str | None:
        """Which checkpoint this one names as the best so far; None where it cannot be read."""
        try:
            return self._described(name).best
        except (DamagedArtifact, InputError):
            return None

    def _names(self) -> list[str]:
        """Folders with a manifest, oldest first."""
        suffix = "/manifest.json"
        return [
            name.removeprefix("checkpoints/").removesuffix(suffix)
            for name in self.store.names("checkpoints")
            if name.endswith(suffix)
        ]
