"""Sends a verb to a cluster with the settings given here, and with paths that the job can resolve."""

import os
from collections.abc import Mapping
from typing import Any

from pipelines.config.loading import changed_settings
from pipelines.config.settings import Config
from pipelines.errors import UsageError

PATHS = ("--shards", "--val", "--model", "--codes", "--index", "--out")
"""Flags of submitted verbs whose values are folders or URIs."""


def submit(config: Config, words: list[str], flags: Mapping[str, str | list[str] | None]) -> dict[str, Any] | None:
    """Run the verb as a Ray job if the address of Ray is an http(s) URL; return None if it is to run here."""
    address = config.ray.address or os.environ.get("RAY_ADDRESS", "")
    if not address.startswith(("http://", "https://")):
        return None
    from pipelines.cluster.access import is_loopback, require_ray_token
    from pipelines.cluster.jobs import submit_verb

    require_ray_token(address)
    same_disk = config.store.shared or is_loopback(address)
    arguments = list(words)
    for name, value in flags.items():
        for one in value if isinstance(value, list) else [value]:
            if one is not None:
                arguments += [name, _seen_by_job(name, one, same_disk) if name in PATHS else one]
    for setting in changed_settings(_with_seen_files(config, same_disk)):
        arguments += ["--set", setting]
    return submit_verb(address, arguments, wait_s=config.ray.wait_s, labels=config.ray.driver_labels)


def _seen_by_job(name: str, value: str, same_disk: bool) -> str:
    """Return the path to give to a job, which runs in another folder. Raises UsageError if it cannot be found there."""
    path = os.path.expanduser(value)  # noqa: PTH111 (Path would make one slash of the two in s3://)
    if "://" in path or os.path.isabs(path):  # noqa: PTH117
        return path
    if not same_disk:
        raise UsageError(
            f"{name} {value} is relative to this folder, and the job runs in another one: give s3://..., or an "
            "absolute path that all nodes see; with store.shared=true it is taken from this folder"
        )
    return os.path.abspath(path)  # noqa: PTH100


def _with_seen_files(config: Config, same_disk: bool) -> Config:
    """Return the settings with the paths of weights as the job can find them."""
    model, train = config.model, config.train
    if model.weights not in (None, "timm"):
        model = model.model_copy(update={"weights": _seen_by_job("model.weights", str(model.weights), same_disk)})
    if train.teacher_weights != "timm":
        seen = _seen_by_job("train.teacher_weights", train.teacher_weights, same_disk)
        train = train.model_copy(update={"teacher_weights": seen})
    return config.model_copy(update={"model": model, "train": train})
