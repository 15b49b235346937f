"""Training checkpoints: artifacts under `checkpoints/` of a model root, verified before they are used.

Each save makes a new folder, so a save that was cut off can never spoil a good one. Training resumes from the newest
checkpoint that verifies. Tensors are safetensors, everything else is JSON.

Two runs of one training may save beside each other. A run drops only its own checkpoints and those that it found at its
start, and of the latter never one that another checkpoint names as its best: the other run may still be alive.
"""

import uuid
from contextlib import suppress
from dataclasses import dataclass

import safetensors.torch
from torch import Tensor

from pipelines.artifacts.commit import ArtifactWriter
from pipelines.artifacts.facts import CheckpointMeta, Progress
from pipelines.artifacts.manifest import Artifact, open_artifact
from pipelines.errors import DamagedArtifact, InputError
from pipelines.storage import Store, canonical_json

KEEP_LAST = 2
"""Number of the newest checkpoints that are kept besides the best one."""


@dataclass(frozen=True)
class Checkpoint:
    """One verified moment of a training."""

    name: str
    step: int
    progress: Progress
    artifact: Artifact

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """Read the tensors whose names begin with `prefix`; return them by their names without it."""
        data = self.artifact.read(self.artifact.manifest.part("state.safetensors"))
        state = safetensors.torch.load(data)
        return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}

    @property
    def best(self) -> str:
        """Name of the best checkpoint so far, or of this one if none was validated yet."""
        return self.progress.best.checkpoint if self.progress.best else self.name


class Checkpoints:
    """The checkpoints of one model root that belong to one fingerprint."""

    def __init__(self, store: Store, fingerprint: str) -> None:
        self.store, self.fingerprint = store, fingerprint
        self._droppable: list[str] = []  # oldest first; the last ones are kept

    def new_name(self, step: int) -> str:
        """Return a new folder name that sorts by step and that no other attempt has."""
        return f"{step:09d}-{uuid.uuid4().hex[:8]}"

    def save(self, name: str, step: int, tensors: dict[str, Tensor], progress: Progress) -> None:
        """Commit a checkpoint and verify it, then drop older ones except the best and the last KEEP_LAST."""
        writer = ArtifactWriter(self.store.child(f"checkpoints/{name}"), "checkpoint", self.fingerprint, (), {})
        parts = [
            writer.put_part("state.safetensors", safetensors.torch.save(tensors), rows=len(tensors)),
            writer.put_part("progress.json", canonical_json(progress), rows=1),
        ]
        writer.commit(parts, {"tensors": len(tensors)}, CheckpointMeta(step=step), point="checkpoint.put")
        best = self.open_named(name).best
        self._droppable.append(name)
        for old in self._droppable[:-KEEP_LAST]:
            if old != best:
                self.store.discard(f"checkpoints/{old}")
                self._droppable.remove(old)

    def latest(self) -> Checkpoint | None:
        """Return the newest checkpoint that verifies together with the best one that it names, or None."""
        names = self._names()
        needed = {best for name in names if (best := self._best_of(name)) != name}
        self._droppable = [name for name in names if name not in needed]
        for name in reversed(names):
            with suppress(DamagedArtifact, InputError):  # cut off or damaged: the one before may be whole
                found = self.open_named(name)
                if found.best != name:
                    self.open_named(found.best)
                return found
        return None

    def open_named(self, name: str) -> Checkpoint:
        """Open the checkpoint of this name and verify its bytes. Raises DamagedArtifact or InputError if that fails."""
        found = self._described(name)
        found.artifact.read(found.artifact.manifest.part("state.safetensors"))
        return found

    def _described(self, name: str) -> Checkpoint:
        """Open a checkpoint without reading its tensors."""
        artifact = open_artifact(self.store.child(f"checkpoints/{name}"), "checkpoint")
        if artifact.manifest.fingerprint != self.fingerprint:
            raise DamagedArtifact(f"{artifact.uri} belongs to another training")
        data = artifact.read(artifact.manifest.part("progress.json"))
        progress = Progress.parse(data, f"{artifact.uri}: progress.json", "delete this checkpoint to go on without it")
        return Checkpoint(name, artifact.facts(CheckpointMeta).step, progress, artifact)

    def _best_of(self, name: str) -> str | None:
        """Return the name of the best checkpoint that this one knows, or None if it cannot be read."""
        try:
            return self._described(name).best
        except (DamagedArtifact, InputError):
            return None

    def _names(self) -> list[str]:
        """List the folders with a manifest, oldest first."""
        suffix = "/manifest.json"
        return [
            name.removeprefix("checkpoints/").removesuffix(suffix)
            for name in self.store.names("checkpoints")
            if name.endswith(suffix)
        ]
