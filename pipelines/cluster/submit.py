"""Send a verb to a cluster: as it was called here, with paths that the job's own folder can resolve."""

import functools
import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ParamSpec, TypeVar, cast, get_type_hints

from pydantic import TypeAdapter, ValidationError

from pipelines.artifacts.commit import note_begun
from pipelines.artifacts.result import Result
from pipelines.cluster.access import is_loopback, require_ray_token
from pipelines.cluster.session import ray_address
from pipelines.config.loading import changed_settings
from pipelines.config.settings import Config, with_weights
from pipelines.errors import UsageError, WorkFailed

P = ParamSpec("P")
R = TypeVar("R", bound=Result)

PATH_FLAGS = ("--shards", "--val", "--model", "--codes", "--index", "--out")
"""Flags of submitted verbs whose values are folders or URIs."""


def on_cluster(
    command: str, here: Callable[[Mapping[str, Any]], bool] = lambda given: False, **renamed: str
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Declare that a verb's function runs as a Ray job, as `command`, where `ray.address` is an http(s) URL.

    The function has a parameter `config`. Its other arguments become flags of their own names, or as `renamed` says,
    but for those that `command` names in braces, those that have their defaults, and functions. With arguments for
    which `here` is true it runs in this process all the same.
    """

    def declare(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            given = signature.bind(*args, **kwargs)
            given.apply_defaults()
            address = job_address(given.arguments["config"])
            if address is None:
                require_ray_token(ray_address(given.arguments["config"]))  # before the work that leads to Ray
            if address is None or here(given.arguments):
                return function(*args, **kwargs)
            changed = {
                name: value
                for name, value in given.arguments.items()
                if name == "config" or (value != signature.parameters[name].default and not callable(value))
            }
            record = _submit(address, command, changed, renamed)
            try:
                return cast(R, TypeAdapter(get_type_hints(function)["return"]).validate_python(record))
            except ValidationError as error:
                raise WorkFailed(
                    f"Ray at {address} answered `{command}` with another result than this hhnet knows "
                    f"({error.errors()[0]['msg']}): install the same version on both sides"
                ) from error

        return run

    return declare


def job_address(config: Config) -> str | None:
    """Return the URL to which verbs are sent as Ray jobs; None where they run in this process."""
    address = config.ray.address or os.environ.get("RAY_ADDRESS", "")
    return address if address.startswith(("http://", "https://")) else None


def _submit(address: str, command: str, given: dict[str, Any], renamed: dict[str, str]) -> dict[str, Any]:
    from pipelines.cluster.jobs import submit_verb

    require_ray_token(address)
    config: Config = given["config"]
    same_disk = config.store.shared or is_loopback(address)
    words = [word.format_map(given) for word in command.split()]
    for name, value in given.items():
        if name != "config" and f"{{{name}}}" not in command:
            words += _flag(renamed.get(name, f"--{name.replace('_', '-')}"), value, same_disk)
    for setting in changed_settings(with_weights(config, functools.partial(_seen_by_job, same_disk=same_disk))):
        words += ["--set", setting]
    if command != "verify {uri}" and "--dry-run" not in words:
        note_begun()
    return submit_verb(address, words, wait_s=config.ray.wait_s, labels=config.ray.driver_labels)


def _flag(name: str, value: Any, same_disk: bool) -> Iterator[str]:
    """Yield the words of a flag: --no-... for False, and its name before each value of a list."""
    if isinstance(value, bool):
        yield name if value else name.replace("--", "--no-", 1)
    else:
        for one in value if isinstance(value, list | tuple) else [value]:
            yield from (name, _seen_by_job(name, one, same_disk) if name in PATH_FLAGS else str(one))


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
