"""Attempts at the items of a pool: how each ended and why, and what became of the item."""

from collections.abc import Container
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class End(StrEnum):
    """The end of an attempt at an item."""

    DONE = "done"
    DIED = "died"
    OUT_OF_MEMORY = "out of memory"
    STUCK = "stuck"
    NODE_LOST = "node lost"
    PREEMPTED = "preempted"


class AttemptFailed(Exception):
    """Raised by a worker that outlived the death of its item, in a process of its own: counts as the worker's death."""


OWN_FAULT = (End.DIED, End.OUT_OF_MEMORY, End.STUCK)
"""Ends that count against `max_attempts` if the node lives on."""


@dataclass(frozen=True)
class Attempt:
    """One worker's attempt at an item. `began` and `ended` are Unix times; `pid` and `gpu` are the worker's."""

    began: float
    ended: float
    host: str
    pid: int
    gpu: str | None
    end: str


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """The result of an item, or its error after `attempts` workers died or got stuck on it."""

    item: T
    result: Any
    attempts: int
    error: str | None = None
    end: End = End.DONE
    tries: tuple[Attempt, ...] = ()


def cause_of_death(death: Exception, node: str | None, draining: Container[str]) -> End:
    """Return why an actor on `node` died, from the error that Ray raised in place of its answer."""
    from ray.exceptions import ActorUnavailableError, OutOfMemoryError

    text = str(death)  # Ray names some causes by type, others only in the text
    if getattr(death, "preempted", False) or node in draining:
        return End.PREEMPTED
    # Unavailable: Ray cannot reach the actor. Had only its process ended, its node would have reported a death.
    if isinstance(death, ActorUnavailableError) or "node has died" in text:
        return End.NODE_LOST
    if isinstance(death, OutOfMemoryError) or "running low on memory" in text or "NODE_OUT_OF_MEMORY" in text:
        return End.OUT_OF_MEMORY
    return End.DIED


def first_line(error: Exception) -> str:
    """Return the first line of an error's text."""
    return str(error).splitlines()[0]
