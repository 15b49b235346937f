"""One training worker in a process of its own, without Ray, which writes down every sample that it learns from.

python -m tests.support.training JOB.json RANK WORLD PORT RUN

Each step appends two lines of JSON to RUN.<rank>.jsonl: before it the step and the keys of this worker's part of the
batch, after it the step and the loss of the whole batch.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import pipelines.train.worker
from pipelines.artifacts.manifest import open_artifact
from pipelines.config.loading import load_config
from pipelines.train.learner import Batch, Learner, StepLoss
from pipelines.train.train import plan_training
from pipelines.train.worker import train_worker


def work(job_file: str, rank: int, world: int, port: int, run: str) -> None:
    """Train until the last step."""
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    with Path(f"{run}.{rank}.jsonl").open("w") as log:

        def say(entry: dict[str, Any]) -> None:
            log.write(json.dumps(entry) + "\n")
            log.flush()

        class Recorded(Learner):
            """A learner that says what it learns from, before it does, and its loss afterwards."""

            def step(self, batch: Batch) -> StepLoss:
                step = self.step_count
                say({"step": step, "keys": list(batch.keys)})
                loss = super().step(batch)
                say({"step": step, "loss": loss.value().hex()})
                return loss

        pipelines.train.worker.Learner = Recorded  # type: ignore[misc]
        facts = json.loads(Path(job_file).read_text())
        config = load_config(sets=[*facts["sets"], f"train.workers={world}"])
        job = plan_training(open_artifact(facts["shards"], "shards"), None, facts["out"], config)
        job.writer()
        train_worker(job, lambda step, note: None)
    if world > 1:
        dist.destroy_process_group()


def main(words: Sequence[str]) -> None:
    """Read the command line."""
    job_file, rank, world, port, run = words
    work(job_file, int(rank), int(world), int(port), run)


if __name__ == "__main__":
    main(sys.argv[1:])
